"""What training a pruned model again takes back of the loss that pruning causes.

Every eighth document of a JSON Lines file is held out; the others are trained on. For each
size, the model is healed with next-token loss and by distillation, and the loss on the held
documents is compared with that of the unpruned and of the pruned model, in nats per token.

A run that was interrupted is measured as far as it came, and goes on when the script is started again.

With `--evaluation FILE.jsonl ...` the script first counts how many documents of evaluation
data share a run of words with the text, and how many held documents do.

    python benchmarks/healing.py --data texts.jsonl --output healed --max_steps 100

Without `--pretrained` the default model is pruned.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from allocation import losses
from lm_eval.utils import simple_parse_args_string
from peft import PeftModel
from reporting import machine
from scipy.stats import ttest_rel
from transformers import AutoTokenizer

from lm_eval_pruned import load_pruned
from lm_eval_pruned.checkpoints.default_model import find_default_model
from lm_eval_pruned.healing.options import HealingOptions
from lm_eval_pruned.healing.run import heal
from lm_eval_pruned.util.tables import markdown_table


if TYPE_CHECKING:
    from collections.abc import Iterator

#: One of so many documents is held out.
HELD = 8
#: Rows of the table, by the share of the distance to the teacher in the loss.
ROWS = {"next token": 0.0, "distillation": 1.0}


def runs_of_words(text: str, length: int) -> set[tuple[str, ...]]:
    """Return every run of `length` words in `text`, in lower case and without punctuation."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(words[n : n + length]) for n in range(len(words) - length + 1)}


def strings(value: Any) -> Iterator[str]:
    """Yield every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from strings(each)


def overlap(known: set[tuple[str, ...]], documents: list[str], length: int) -> str:
    """Return how many documents, and what share of their runs of words, are in the text."""
    documents_shared = runs = runs_shared = 0
    for each in documents:
        found = runs_of_words(each, length)
        shared = len(found & known)
        documents_shared += shared > 0
        runs, runs_shared = runs + len(found), runs_shared + shared
    return (
        f"{documents_shared:,} of {len(documents):,} documents, "
        f"{runs_shared / max(runs, 1):.2%} of the runs"
    )


def main() -> int:
    """Run the benchmark; return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, metavar="FILE.jsonl")
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--pretrained", metavar="NAME_OR_FOLDER")
    parser.add_argument("--prune_percents", nargs="+", type=int, default=[20])
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--training_args", default="", metavar="KEY=VALUE,...")
    parser.add_argument(
        "--tokens", type=int, default=1024, help="of each held document"
    )
    parser.add_argument("--evaluation", nargs="*", default=[], metavar="FILE.jsonl")
    parser.add_argument("--words", nargs="+", type=int, default=[8, 13])
    arguments = parser.parse_args()

    source = {"pretrained": arguments.pretrained}
    if arguments.pretrained is None:
        source = find_default_model().model_args()
    load = {**source, "dtype": "float32"}
    lines = Path(arguments.data).read_text("utf-8").splitlines()
    trained = [line for n, line in enumerate(lines) if n % HELD]
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "trained.jsonl"
    text.write_text("\n".join(trained) + "\n", "utf-8")
    held_texts = [json.loads(line)["text"] for line in lines[::HELD]]
    trained_texts = [json.loads(line)["text"] for line in trained]

    print(f"{machine('cpu')}\n")
    print(f"{len(trained_texts)} documents trained on, {len(held_texts)} held out\n")
    if arguments.evaluation:
        compared = {"held documents": held_texts}
        for file in arguments.evaluation:
            found = Path(file).read_text("utf-8").splitlines()
            compared["/".join(Path(file).parts[-3:])] = [
                "\n".join(strings(json.loads(each))) for each in found
            ]
        known = {
            n: set().union(*(runs_of_words(text, n) for text in trained_texts))
            for n in arguments.words
        }
        cells = [
            (name, *(overlap(runs, texts, n) for n, runs in known.items()))
            for name, texts in compared.items()
        ]
        header = ["", *(f"share {n} words in a row" for n in arguments.words)]
        print(markdown_table(header, cells) + "\n", flush=True)
    if not arguments.rows:
        return 0

    tokenizer = AutoTokenizer.from_pretrained(source["pretrained"])
    held = [
        torch.tensor(tokenizer(each)["input_ids"][: arguments.tokens])
        for each in held_texts
    ]
    unpruned = losses(load_pruned(**load), held)
    print(f"unpruned: {unpruned.mean():.3f} nats per token\n", flush=True)
    for percent in arguments.prune_percents:
        cut = losses(load_pruned(**load, prune_percent=percent), held)
        cells = [("pruned", f"{cut.mean():.3f}", "", "", "", "")]
        for name in arguments.rows:
            options = HealingOptions(
                teacher_weight=ROWS[name],
                max_length=arguments.max_length,
                max_steps=arguments.max_steps,
                training_args=simple_parse_args_string(arguments.training_args),
            )
            output = folder / f"{percent}-{name.replace(' ', '-')}"
            healed = heal(
                *({**load, "prune_percent": percent}, str(text), output, options),
                resume=any(folder.glob(f"{output.name}.checkpoints/*/healing.json")),
            )
            pruned = load_pruned(**load, prune_percent=percent)
            after = losses(PeftModel.from_pretrained(pruned, healed.folder), held)
            back = (cut.mean() - after.mean()) / (cut.mean() - unpruned.mean())
            cells.append(
                (
                    name,
                    f"{after.mean():.3f}",
                    f"{back:.0%}",
                    f"{ttest_rel(after, cut).pvalue:.1e}",
                    f"{healed.record['tokens_seen']:,}",
                    f"{healed.record['seconds']:.0f}",
                )
            )
        print(f"{percent} % removed\n")
        header = ["", "loss", "taken back", "p", "tokens trained on", "seconds"]
        print(markdown_table(header, cells) + "\n", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
