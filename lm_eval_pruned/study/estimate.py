"""What a study will take, before anything of it is fetched or run."""

from __future__ import annotations

import csv
import math
import shutil
import time
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import try_to_load_from_cache

from lm_eval_pruned.checkpoints.configs import clear_errors
from lm_eval_pruned.util.tables import markdown_table


if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lm_eval_pruned.sweeps.plan import Sweep

#: Models that the Hub hands out to those who accepted a licence there, by how their names begin.
LICENCES = {
    "meta-llama/": "the Llama Community License",
    "google/gemma": "the Gemma Terms of Use",
    "mistralai/": "the terms on the model's page",
}
#: Columns of ``work.csv``: documents of a task, members of a group, and tokens that are read and at
#: most written for a document, by Llama-3's tokenizer. A prompt that choices share counts once.
_COUNTS = ("documents", "members", "read", "written")
#: A written token takes as long as so many that are read, in batches of 16.
_WRITTEN = 5
#: Share of the speed of a matrix product that a model reaches.
_REACHED = 0.4
#: Bytes of samples for a document.
_SAMPLE = 4000


def missing(model: str) -> list[str]:
    """Return what has to be accepted and fetched before a model can be studied, a line each."""
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    found = (isinstance(try_to_load_from_cache(model, file), str) for file in names)
    with clear_errors(model):
        if Path(model).is_dir() or any(found):
            return []
    return [
        f"Accept {terms} on huggingface.co/{model}, then `hf auth login`."
        for start, terms in LICENCES.items()
        if model.startswith(start)
    ] + [f"Fetch the weights: `hf download {model}`."]


def operations_per_second(
    device: str | None,
    dtype: str | None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return how many floating-point operations a second the device does in a matrix product.

    Takes less than a second from 0.01 GFLOP/s on: a processor without float16 arithmetic is a
    hundred times slower at it than at float32. Without a dtype, or with ``auto``, it is float32.
    """
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    like: Any = {"device": place, "dtype": getattr(torch, dtype or "", torch.float32)}
    weight, speed, spent, rows = torch.ones(2048, 2048, **like), 0.0, 0.0, 1
    while spent < 0.25 and rows <= 2**14:
        tokens = torch.ones(rows, 2048, **like)
        start = clock()
        float((tokens @ weight)[0, 0])
        seconds = clock() - start
        speed = max(speed, 2 * rows * 2048**2 / seconds)
        spent, rows = spent + seconds, 2 * rows
    return speed


def estimate(name: str, options: Mapping[str, Any], sweep: Sweep, speed: float) -> str:
    """Return the documents, tokens, hours at `speed` and bytes of a study, and what is missing."""
    text = files(__package__).joinpath("work.csv").read_text("utf-8")
    known = {row["task"]: row for row in csv.DictReader(text.splitlines())}
    rows, data, documents, work = [], set(), 0, 0
    for task in (task.name for task in sweep.tasks if task.name in known):
        size, members, read, written = (int(known[task][each]) for each in _COUNTS)
        count = len((options.get("samples") or {}).get(task, range(size)))
        if limit := options.get("limit"):
            count = min(count, math.ceil(limit * (members if limit >= 1 else count)))
        rows.append([task, *(f"{count * each:,}" for each in (1, read, written))])
        documents, work = documents + count, work + count * (read + _WRITTEN * written)
        data |= {known[task]["data"]} - {""}
    models, needs = sweep.configurations, missing(options["model_args"]["pretrained"])
    operations = 2 * sum(each.parameters for each in models) * work
    size = documents * len(models) * _SAMPLE
    size += 4 * sweep.baseline.parameters if needs else 0
    folder = Path(options["output_path"]).resolve()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    short = f"; {there} has only {free / 1e9:.1f} GB free" if size > free else ""
    columns = ["task", "documents", "tokens read", "tokens written at most"]
    uncounted = [task.name for task in sweep.tasks if task.name not in known]
    hours = operations / _REACHED / speed / 3600
    lines = [
        f"{len(models)} configurations, each on these {documents:,} documents.",
        f"About {hours:.1f} hours on this machine, give or take a factor of 3.",
        f"About {size / 1e9:.1f} GB of disk beside the data sets{short}.",
        *needs,
        f"Data sets of the Hub, without a licence to accept: {', '.join(sorted(data)) or '-'}.",
        f"Not counted: {', '.join(uncounted) or '-'}.",
    ]
    return "\n".join([f"# {name}\n", markdown_table(columns, rows), "", *lines, ""])
