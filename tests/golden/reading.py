"""What the commands that read results print and write, as text files in the folder ``reading``.

The results are synthetic. After a change that is meant to alter what a command says,

    python -m tests.golden.reading

rewrites the files; the diff then shows what else changed.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np

from lm_eval_pruned import cli
from lm_eval_pruned.compare.comparison import compare, read_comparands
from lm_eval_pruned.compare.comparison_table import as_table
from tests.helpers import results_files
from tests.helpers.results_files import answered, pruning, write_run, written


if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = Path(__file__).with_suffix("")
DOCUMENTS = 80
#: The shares of right answers by size, then the level of the perplexities.
SIZES = {
    0: (0.8, 0.3, 0.5, 2.0),
    20: (0.5, 0.45, 0.48, 2.6),
    40: (0.4, 0.6, 0.4, 3.1),
    60: (0.3, 0.7, 0.1, 3.9),
}


def right(share: float) -> list[float]:
    """Return which documents are answered rightly: the easy ones first."""
    order = np.random.default_rng(11).permutation(DOCUMENTS)
    luck = np.random.default_rng(int(1000 * share)).random(DOCUMENTS) < 0.05
    return ((order < share * DOCUMENTS) ^ luck).astype(float).tolist()


def tasks(size: int) -> dict:
    """Return synthetic answers: two tasks of right and wrong, one of two metrics, one perplexity."""
    knows, true, follows, level = SIZES[size]
    losses = np.random.default_rng(2).normal(-level, 0.3, size=DOCUMENTS)
    losses = (losses + np.random.default_rng(size).normal(0, 1, DOCUMENTS)).tolist()
    wide = {"aggregation": "perplexity", "higher_is_better": False}
    return {
        "boolq": {"acc,none": right(knows)},
        "truthfulqa_mc2": {
            "acc,none": np.random.default_rng(size).beta(2, 3, DOCUMENTS).tolist()
        },
        "truthfulqa_mc1": {"acc,none": right(true)},
        "ifeval": {
            "prompt_level_strict_acc,none": right(follows),
            "prompt_level_loose_acc,none": right(follows + 0.05),
        },
        "wikitext": {"word_perplexity,none": {"values": losses, **wide}},
    }


def write() -> None:
    """Write a sweep with a failed configuration, and three results folders."""
    sizes = {
        ("base" if not size else f"p{size}"): (size, tasks(size)) for size in SIZES
    }
    results_files.write_sweep(Path("sweep"), {**sizes, "p80": (80, {})}, p80="boolq")
    for size in (0, 40):
        write_run(Path(f"p{size}"), tasks(size), pruning=pruning(size))
    changed = tasks(40) | {"boolq": tasks(0)["boolq"]}
    write_run(Path("changed"), changed, pruning=pruning(0))


def write_floors() -> None:
    """Write a sweep with floors: a task above, one that collapses, and one of free texts."""
    rng = np.random.default_rng(5)
    rights = (rng.random(DOCUMENTS) < 0.6).astype(int).tolist()

    def found(known: float, yes: float, follows: float, stem: str) -> dict:
        knows, says = rng.random((2, DOCUMENTS))
        pairs = zip(rights, knows < known, strict=True)
        texts = [f"{stem} {n}" if n % 3 else "Yes." for n in range(DOCUMENTS)]
        return {
            "arc": answered([each if x else 1 - each for each, x in pairs], rights),
            "boolq": answered((says < yes).astype(int).tolist(), rights),
            "ifeval": written(texts, right(follows)),
        }

    constant = {
        "arc": answered([0] * DOCUMENTS, rights),
        "boolq": answered([1] * DOCUMENTS, rights),
        "ifeval": written(["."] * DOCUMENTS, right(0.25)),
    }
    echo = {"ifeval": written([f"{n}" for n in range(DOCUMENTS)], right(0.35))}
    runs = {
        "base": (0, found(0.9, 0.8, 0.45, "A")),
        "p20": (20, found(0.8, 0.95, 0.55, "A")),
        "p40": (40, found(0.5, 1, 0.35, "B")),
        "floor-constant": ("constant", constant),
        "floor-echo": ("echo", echo),
    }
    results_files.write_sweep(Path("floors"), runs)


def printed(*arguments: str) -> str:
    """Return what a command prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli.main(list(arguments))
    return rounded(out.getvalue())


def rounded(text: str) -> str:
    """Return a text without our version, whose numbers have nine digits: the last ones depend on the processor."""
    text = text.replace(version("lm-eval-pruned"), "VERSION")
    number = r"-?\d+\.\d{9,}(e-?\d+)?"
    return re.sub(number, lambda found: f"{float(found[0]):.9g}", text)


def observed() -> Iterator[tuple[str, str]]:
    """Yield the name of each file and the text that belongs there."""
    with (
        tempfile.TemporaryDirectory() as path,
        contextlib.chdir(path),
        mock.patch.dict(os.environ, COLUMNS="100", NO_COLOR="1"),
    ):
        write()
        for form in ("markdown", "csv", "json"):
            yield f"compare.{form}", printed("compare", "sweep", "--format", form)
        short = {"everything": False, "padded": True}
        yield "compare.txt", as_table(compare(*read_comparands(["sweep"])), **short)
        write_floors()
        for form in ("markdown", "csv"):
            yield f"floors.{form}", printed("compare", "floors", "--format", form)
        yield "floors.txt", as_table(compare(*read_comparands(["floors"])), **short)
        printed("report", "floors", "--output_path", "report_of_floors")
        report = Path("report_of_floors/report.md").read_text("utf-8")
        yield "floors_report.md", rounded(report)
        models = ("floors", "floors/units/p40", "--output_path", "verdict")
        yield "verdict.txt", printed("verdict", *models)
        page = Path("verdict/verdict.html").read_text("utf-8")
        (scores,) = re.findall(
            r"<section>\s*<h2>Scores</h2>.*?</section>", page, re.DOTALL
        )
        yield "verdict_scores.html", scores
        pair = ("compare", "p0", "p40", "--format", "markdown")
        yield "compare_two.markdown", printed(*pair, "--subtasks")
        yield "not_worse.markdown", printed(*pair, "--not_worse", "5pt")
        yield "equivalent.markdown", printed(*pair, "--equivalent", "10%")
        yield "power.txt", printed("power", "boolq", "sweep", "--margin", "5pt")
        for rule in ("absolute", "relative", "not_worse"):
            value = {"not_worse": "5pt"}.get(rule, "0.2")
            file = f"{rule}.json"
            update = ("check", "p0", "--baseline", file, "--update", f"--{rule}", value)
            yield f"update_{rule}.txt", printed(*update)
            if rule == "absolute":
                yield "baseline.json", rounded(Path(file).read_text("utf-8"))
            for form in ("text", "json", "github"):
                yield (
                    f"check_{rule}.{form}",
                    printed("check", "changed", "--baseline", file, "--format", form),
                )
        printed("report", "sweep", "--output_path", "report")
        for name in ("report.md", "results.csv"):
            yield name, rounded((Path("report") / name).read_text("utf-8"))


if __name__ == "__main__":
    for name, text in observed():
        (FOLDER / name).write_text(text, encoding="utf-8")
