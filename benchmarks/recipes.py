"""What each recipe costs: loss on kinds of text that nothing was calibrated on, and what is kept.

    python benchmarks/recipes.py --held speeches=speeches.jsonl

For each size, the mean loss of each kind of held text in nats per token, the shares of the lift of
both probes that are kept, on all of their prompts, and the CPU seconds of the load. The kinds of the
held text that comes with the package are always there; `--held` adds others, from JSON Lines files
with `text` or `passage`. Random cuts are the mean of their seeds. `--tokens_per_neuron` repeats the
rows with as many tokens of the calibration text for each kept neuron.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from reporting import machine
from transformers import AutoTokenizer

from lm_eval_pruned import load_pruned
from lm_eval_pruned.checkpoints.cost import HELD_TEXT, probed
from lm_eval_pruned.checkpoints.default_model import find_default_model
from lm_eval_pruned.pruning.layouts import find_glu_mlps
from lm_eval_pruned.pruning.measuring import text_loss
from lm_eval_pruned.util.tables import csv_table


#: Name of a row and its arguments; first those that read no text.
WITHOUT_TEXT: dict[str, list[dict[str, Any]]] = {
    "maw": [{}],
    "random": [{"criterion": "random", "seed": seed} for seed in range(3)],
    "fast": [{"recipe": "fast"}],
}
ROWS = WITHOUT_TEXT | {
    "act": [{"criterion": "act"}],
    "act, repaired": [{"criterion": "act", "repair": "least_squares"}],
    "best": [{"recipe": "best"}],
    "uneven": [{"recipe": "uneven"}],
}
#: The probes, and how many prompts each has.
PROBES = {"pruned_probe_knowledge": 800, "pruned_probe_instructions": 300}


def held_text(sources: list[str], tokenizer: Any, documents: int) -> dict[str, list]:
    """Return the first 128 tokens of each held document, by kind."""
    held: dict[str, list] = defaultdict(list)
    files = [("", str(HELD_TEXT)), *(source.split("=", 1) for source in sources)]
    for kind, file in files:
        lines = map(json.loads, Path(file).read_text("utf-8").splitlines())
        for line in lines:
            text = line.get("text") or line.get("passage")
            of_kind = held[kind or line["kind"]]
            if len(of_kind) < documents:
                of_kind.append(torch.tensor(tokenizer(text)["input_ids"][:128]))
    return held


@torch.no_grad()
def losses(model: Any, held: dict[str, list]) -> dict[str, float]:
    """Return the mean loss over the documents of each kind, in nats per token."""
    means = {}
    for kind, documents in held.items():
        by_document = []
        for tokens in documents:
            by_document.append(text_loss(model, tokens[None]) / (len(tokens) - 1))
        means[kind] = sum(by_document) / len(by_document)
    return means


def lifts(model: Any, tokenizer: Any) -> dict[str, float]:
    """Return the lift of each probe, in nats, whose floor is 0."""
    run = probed(model, tokenizer, "model", PROBES)
    if run is None:
        raise SystemExit("The probes could not be scored.")
    return {
        task.removeprefix("pruned_probe_"): run.scores[task, "lift,none"].value
        for task in PROBES
    }


def main() -> None:
    """Print one row for each recipe and size, as CSV."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained", metavar="NAME_OR_FOLDER")
    parser.add_argument("--gguf_file")
    parser.add_argument("--held", nargs="*", default=[], metavar="KIND=FILE.jsonl")
    parser.add_argument("--documents", type=int, default=16, help="of each kind")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--prune_percents", nargs="+", type=int, default=[20, 40])
    parser.add_argument(
        "--calibration", help="as in --model_args; the package's text if not passed"
    )
    parser.add_argument(
        "--tokens_per_neuron", nargs="+", type=float, default=[None],
        help="how much of the calibration text to read, for each kept neuron; all if not passed",
    )  # fmt: skip
    options = parser.parse_args()
    load = {"pretrained": find_default_model()}
    if options.pretrained:
        named = {"pretrained": options.pretrained, "gguf_file": options.gguf_file}
        load = {name: value for name, value in named.items() if value}
    load["dtype"] = "float32"
    whole = load_pruned(**load)
    source = {n: v for n, v in load.items() if n == "gguf_file"}
    tokenizer = AutoTokenizer.from_pretrained(load["pretrained"], **source)
    held = held_text(options.held, tokenizer, options.documents)
    (width,) = {mlp.width for mlp in find_glu_mlps(whole)}

    def measured(model: Any) -> dict[str, float]:
        """Return the loss by kind, the mean of the kinds, and the lift of each probe."""
        loss = losses(model, held)
        mean = sum(loss.values()) / len(loss)
        return loss | {"mean": mean} | lifts(model, tokenizer)

    def show(row: str, removed: int, tokens: Any, means: dict, seconds: float) -> None:
        line = {"row": row, "removed": removed, "tokens_per_neuron": tokens}
        line |= {name: f"{means[name]:.3f}" for name in (*held, "mean")}
        for probe in sorted(means.keys() - {*held, "mean"}):
            line[f"{probe} kept"] = f"{means[probe] / unpruned[probe]:.3f}"
        table = csv_table([line | {"seconds": f"{seconds:.0f}"}])
        print(table[table.index("\n") + 1 :] if removed else table, end="", flush=True)

    print(f"# {machine('cpu')}")
    unpruned = measured(whole)
    show("unpruned", 0, "", unpruned, 0)
    for removed, row in itertools.product(options.prune_percents, options.rows):
        kept_width = width - width * removed // 100
        for tokens in [None] if row in WITHOUT_TEXT else options.tokens_per_neuron:
            text: dict[str, Any] = {}
            if row not in WITHOUT_TEXT and options.calibration:
                text["calibration"] = options.calibration
            if tokens is not None:
                text["calibration_tokens"] = round(tokens * kept_width)
            seeds, seconds = [], 0.0
            for arguments in ROWS[row]:
                start = time.process_time()
                model = load_pruned(**load, prune_percent=removed, **arguments, **text)
                seconds = time.process_time() - start
                seeds.append(measured(model))
            means = {n: sum(seed[n] for seed in seeds) / len(seeds) for n in unpruned}
            show(row, removed, tokens or "", means, seconds)


if __name__ == "__main__":
    main()
