"""What the probes show: ``python benchmarks/probes.py NAME=FOLDER ...``, of results with samples.

Writes ``probes.csv``, the scores of each run by level and by family with 95 % intervals over blocks
(Student's t), and ``probes_kept.csv``, the difference of each run from the first, paired by block, into
``docs/measurements``. ``p`` is one-sided, of "not above the floor". Where all blocks score alike there is
neither interval nor p.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import stats

from lm_eval_pruned.compare import pairing, power
from lm_eval_pruned.compare.gaffke import POWER
from lm_eval_pruned.results.runs import read_run


if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_eval_pruned.results.files import Run

PAGES = Path(__file__).resolve().parents[1] / "docs" / "measurements"
PROBES = ("knowledge", "instructions")


def documents(run: Run, probe: str) -> pd.DataFrame:
    """Return block, level, family, floor, acc and lift of each prompt."""
    lines = run.samples[f"pruned_probe_{probe}"].read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return pd.DataFrame(
        {
            **{key: row["doc"][key] for key in ("block", "level", "family")},
            "floor": 1 / len(row["doc"]["choices"]),
            **{key: row[key] for key in ("acc", "lift")},
        }
        for row in rows
    )


def above(docs: pd.DataFrame, metric: str) -> dict[str, Any]:
    """Return mean, interval and p of a metric against its floor, over blocks."""
    value, n = docs[metric], len(docs)
    floor = docs["floor"].mean() if metric == "acc" else 0.0
    sums = (value - value.mean()).groupby(docs["block"]).sum()
    stderr = np.sqrt((sums**2).sum() * len(sums) / max(1, len(sums) - 1)) / n
    found = {metric: round(value.mean(), 4)}
    if stderr > 1e-9:
        test = stats.t(len(sums) - 1, value.mean(), stderr)
        low, high = test.interval(0.95)
        found |= {f"{metric}_low": round(low, 4), f"{metric}_high": round(high, 4)}
        found[f"{metric}_p"] = f"{test.cdf(floor):.2g}"
    return found


def scores(name: str, run: Run) -> Iterator[dict[str, Any]]:
    """Yield a row for each probe, and for each level and each family of it."""
    for probe in PROBES:
        docs = documents(run, probe)
        parts = [("all", "all", docs)]
        parts += [(str(level), "all", of) for level, of in docs.groupby("level")]
        parts += [("all", str(family), of) for family, of in docs.groupby("family")]
        for level, family, of in parts:
            row = {"run": name, "probe": probe, "level": level, "family": family}
            row |= {"items": len(of), "blocks": of["block"].nunique()}
            row |= {"floor": round(of["floor"].mean(), 4)}
            yield row | above(of, "acc") | above(of, "lift")


def kept(name: str, base: Run, run: Run) -> Iterator[dict[str, Any]]:
    """Yield the difference of a run from the base, and how many documents would show it."""
    for probe in PROBES:
        task = f"pruned_probe_{probe}"
        for metric in ("acc", "lift"):
            pair = pairing.paired_documents(base, run, task, f"{metric},none")
            test = pairing.paired_test(pair)
            n, size = len(pair[0].values), abs(test.difference)
            chance = lambda m, t=test, n=n, s=size: power.chances(t, n, s, 0.05, m)
            floor = documents(base, probe)["floor"].mean() if metric == "acc" else 0.0
            above_floor = np.mean(pair[0].values) - floor
            yield {
                "run": name, "probe": probe, "metric": metric,
                "difference": round(test.difference, 4),
                "low": round(test.low, 4), "high": round(test.high, 4), "p": f"{test.p:.2g}",
                "kept": round(1 + test.difference / above_floor, 3),
                f"documents_for_{POWER:.0%}_power": power.documents_for(chance, 2, n),
            }  # fmt: skip


def main() -> None:
    """Write both files from the results named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="+", metavar="NAME=FOLDER")
    pairs = [text.partition("=") for text in parser.parse_args().results]
    runs = {name: read_run(folder) for name, _, folder in pairs}
    base, *others = runs
    rows = [row for name, run in runs.items() for row in scores(name, run)]
    pd.DataFrame(rows).to_csv(PAGES / "probes.csv", index=False)
    # Runs of another model have no base here.
    same = [name for name in others if name.split()[0] == base.split()[0]]
    rows = [row for name in same for row in kept(name, runs[base], runs[name])]
    pd.DataFrame(rows).to_csv(PAGES / "probes_kept.csv", index=False)


if __name__ == "__main__":
    main()
