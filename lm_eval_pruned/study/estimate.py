"""What a study will take, before anything of it is fetched or run."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache

from lm_eval_pruned.study.preset import FLOOR
from lm_eval_pruned.util.tables import markdown_table


if TYPE_CHECKING:
    from lm_eval_pruned.study.preset import Study
    from lm_eval_pruned.sweeps.plan import Sweep


class Work(NamedTuple):
    """Documents of a task, in so many members of a group, and tokens of each: read, and at most written."""

    documents: int
    read: int
    written: int
    dataset: str = ""
    members: int = 1


_TRUTHFUL = "truthfulqa/truthful_qa"
#: Counted with the tokenizer of Llama-3, with the few-shot examples of `pruned_dichotomy`. A prompt
#: that choices share counts once.
WORK = {
    "wikitext": Work(62, 4700, 0, "EleutherAI/wikitext_document_level"),
    "boolq": Work(3270, 145, 0, "aps/super_glue"),
    "lambada_openai": Work(5153, 90, 0, "EleutherAI/lambada_openai"),
    "mmlu": Work(14042, 750, 0, "cais/mmlu", 57),
    "arc_challenge": Work(1172, 75, 0, "allenai/ai2_arc"),
    "hellaswag": Work(10042, 190, 0, "Rowan/hellaswag"),
    "winogrande": Work(1267, 50, 0, "allenai/winogrande"),
    "piqa": Work(1838, 75, 0, "baber/piqa"),
    "truthfulqa_mc1": Work(817, 270, 0, _TRUTHFUL),
    "truthfulqa_mc2": Work(817, 330, 0, _TRUTHFUL),
    "gsm8k": Work(1319, 950, 256, "openai/gsm8k"),
    "ifeval": Work(541, 60, 1280, "google/IFEval"),
    "leaderboard_musr": Work(756, 1250, 0, "TAUR-Lab/MuSR", 3),
    "pruned_demo_truthfulness": Work(120, 120, 0),
    "pruned_demo_instruction_following": Work(66, 40, 32),
}
#: Models that the Hub hands out once their licence was accepted there, by how their names begin.
LICENCES = {
    "meta-llama/": "the Llama Community License",
    "google/gemma": "the Gemma Terms of Use",
    "mistralai/": "the terms on the model's page",
}
#: A written token takes as long as so many read ones, in batches of 16.
_WRITTEN = 5
#: Share of a matrix product's speed that a model reaches.
_REACHED = 0.4
#: Bytes that a document of a configuration takes in the samples.
_SAMPLE = 4000


def missing(model: str) -> list[str]:
    """Return what has to be accepted and fetched before a model can be studied, one sentence each."""
    files = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    cached = (try_to_load_from_cache(model, file) for file in files if "/" in model)
    if Path(model).is_dir() or any(isinstance(each, str) for each in cached):
        return []
    terms = [of for start, of in LICENCES.items() if model.startswith(start)]
    told = [f"Accept {of} on https://huggingface.co/{model}." for of in terms]
    return [*told, f"Fetch the weights: hf download {model}"]


def operations_per_second(device: str | None, dtype: str | None) -> float:
    """Return how many floating-point operations a second the device does in a matrix product."""
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = getattr(torch, dtype or "", torch.float32)
    one, best = torch.ones(2048, 2048, device=place, dtype=kind), float("inf")
    for _ in range(5):
        start = time.perf_counter()
        float((one @ one)[0, 0])
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def estimate(study: Study, sweep: Sweep, speed: float) -> str:
    """Return the study's documents, tokens, hours at `speed` and bytes, and what is missing."""
    limit, samples = study.options.get("limit"), study.options.get("samples") or {}
    rows, uncounted, datasets = [], [], set()
    documents = tokens = weighted = 0
    for task in sweep.tasks:
        if (work := WORK.get(task.name)) is None:
            uncounted.append(task.name)
            continue
        count = len(samples.get(task.name) or range(work.documents))
        if limit is not None:
            most = limit * work.members if limit >= 1 else limit * count
            count = min(count, math.ceil(most))
        datasets |= {work.dataset} - {""}
        read, written = count * work.read, count * work.written
        rows.append([task.name, f"{count:,}", f"{read:,}", f"{written:,}"])
        documents, tokens = documents + count, tokens + read + written
        weighted += read + _WRITTEN * written
    models = [each for each in sweep.configurations if not each.id.startswith(FLOOR)]
    parameters = sum(each.parameters for each in models)
    hours = 2 * parameters * weighted / (_REACHED * speed) / 3600
    needs = missing(str(study.options["model_args"]["pretrained"]))
    weights = 4 * sweep.baseline.parameters * bool(needs)
    size = weights + documents * len(models) * _SAMPLE
    return "\n".join(
        [
            f"## {study.name}, as {study.kind} model\n",
            markdown_table(
                ["task", "documents", "tokens read", "written at most"], rows
            ),
            "",
            (
                f"{len(models)} configurations, each on {documents:,} documents and {tokens:,} "
                f"tokens. About {hours:.1f} hours on this machine, within a factor of 3; "
                f"{size / 1e9:.1f} GB of disk, without data sets."
            ),
            *(needs or ["The model is on this machine."]),
            *(
                [
                    f"Data sets, fetched unless they are here: {', '.join(sorted(datasets))}. None asks for a licence."
                ]
                if datasets
                else []
            ),
            *([f"Not counted: {', '.join(uncounted)}."] if uncounted else []),
            "",
        ]
    )
