"""What the probes show of a model and of its cuts: ``python benchmarks/probes.py NAME=SWEEP ...``.

Of sweep folders with samples of both probes, writes into ``docs/measurements`` ``probes.csv``, the scores
of each unpruned model by level and family with 95 % intervals over blocks (Student's t; ``p`` is one-sided,
of "not above the floor"), and ``probes_kept.csv``: of each cut the difference from the unpruned model, paired
by block, the share kept with Fieller's interval, and how many prompts decide: as many blocks of it, drawn
200 times without replacement, show the difference (p < 0.05) in 80 % of the draws. ``q`` is Benjamini and
Hochberg's over the cuts of one model, probe, level and metric. Of random cuts, the mean of the seeds follows,
with the lowest and the highest.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import stats

from lm_eval_pruned.compare.claims import paired
from lm_eval_pruned.compare.power import POWER
from lm_eval_pruned.results.runs import read_sweep


if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_eval_pruned.results.files import Run

PAGES = Path(__file__).resolve().parents[1] / "docs" / "measurements"
PROBES = ("knowledge", "instructions")
METRICS = ("acc", "lift")
DRAWS = 200


def read_prompts(run: Run, probe: str) -> pd.DataFrame:
    """Return block, level, family, floors, acc and lift of each prompt, sorted by prompt."""
    lines = run.samples[f"pruned_probe_{probe}"].read_text("utf-8").splitlines()
    samples = sorted(map(json.loads, lines), key=lambda sample: sample["doc_id"])
    return pd.DataFrame(
        {
            **{key: sample["doc"][key] for key in ("block", "level", "family")},
            "acc_floor": 1 / len(sample["doc"]["choices"]),
            "lift_floor": 0.0,
            **{metric: sample[metric] for metric in METRICS},
        }
        for sample in samples
    )


def parts_of(prompts: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Yield level, family and prompts of the whole probe, of its levels, and of its families."""
    yield "all", "all", prompts
    for level, part in prompts.groupby("level"):
        yield str(level), "all", part
    for family, part in prompts.groupby("family"):
        yield "all", str(family), part


def above_floor(prompts: pd.DataFrame, metric: str) -> dict[str, Any]:
    """Return mean, interval and p of a metric against its floor, over blocks."""
    value, floor = prompts[metric], prompts[f"{metric}_floor"].mean()
    sums = (value - value.mean()).groupby(prompts["block"]).sum()
    variance = (sums**2).sum() * len(sums) / max(1, len(sums) - 1)
    row = {metric: round(value.mean(), 4)}
    # Where all blocks score alike there is neither interval nor p.
    if variance > 1e-9:
        stderr = np.sqrt(variance) / len(value)
        test = stats.t(len(sums) - 1, value.mean(), stderr)
        low, high = test.interval(0.95)
        row |= {f"{metric}_low": round(low, 4), f"{metric}_high": round(high, 4)}
        row[f"{metric}_p"] = f"{test.cdf(floor):.2g}"
    return row


def unpruned_rows(model: str, run: Run) -> Iterator[dict[str, Any]]:
    """Yield the scores of an unpruned model."""
    for probe in PROBES:
        for level, family, prompts in parts_of(read_prompts(run, probe)):
            row = {"model": model, "probe": probe, "level": level, "family": family}
            row |= {"items": len(prompts), "blocks": prompts["block"].nunique()}
            row |= {"floor": round(prompts["acc_floor"].mean(), 4)}
            yield row | above_floor(prompts, "acc") | above_floor(prompts, "lift")


def rounded(value: float | None, digits: int) -> float | None:
    """Return a number for the table; None stays an empty cell."""
    return None if value is None else round(value, digits)


def prompts_that_decide(gains: np.ndarray, blocks: pd.Series) -> int | None:
    """Return how many prompts, in whole blocks, show the difference in 80 % of the draws."""
    draw, names = np.random.default_rng(0), blocks.unique()

    def shown(many: int) -> float:
        seen = 0
        for _ in range(DRAWS):
            taken = blocks.isin(draw.choice(names, many, replace=False)).to_numpy()
            clusters = blocks[taken].astype(str).tolist()
            nothing = np.zeros(taken.sum())
            p = paired(nothing, gains[taken], clusters=clusters).p
            seen += p is not None and p < 0.05
        return seen / DRAWS

    low, high = 1, len(names)
    if shown(high) < POWER:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if shown(middle) < POWER else (low, middle)
    return round(high * len(blocks) / len(names))


def kept_rows(model: str, base: Run, run: Run) -> Iterator[dict[str, Any]]:
    """Yield what a cut keeps of each probe and of each of its levels."""
    asked = run.pruning["asked"]
    method = run.pruning.get("recipe", run.pruning["criterion"])
    start = {"model": model, "method": method, "percent": asked["prune_percent"]}
    start["seed"] = asked.get("seed", 0) if method == "random" else None
    for probe in PROBES:
        before, after = read_prompts(base, probe), read_prompts(run, probe)
        for level, family, prompts in parts_of(before):
            if family != "all":
                continue
            cut_prompts = after.loc[prompts.index]
            for metric in METRICS:
                clusters = prompts["block"].astype(str).tolist()
                gains = (cut_prompts[metric] - prompts[metric]).to_numpy()
                test = paired(np.zeros(len(gains)), gains, clusters=clusters)
                low, high = test.interval()
                share = paired(
                    prompts[metric], cut_prompts[metric], prompts[f"{metric}_floor"],
                    clusters=clusters,
                ).kept()  # fmt: skip
                yield start | {
                    "probe": probe, "level": level, "metric": metric,
                    "score": round(cut_prompts[metric].mean(), 4),
                    "difference": round(test.difference, 4),
                    "low": rounded(low, 4), "high": rounded(high, 4), "p": test.p,
                    "kept": rounded(share and share.share, 3),
                    "kept_low": rounded(share and share.low, 3),
                    "kept_high": rounded(share and share.high, 3),
                    "prompts_that_decide": prompts_that_decide(gains, prompts["block"])
                    if level == "all" and method != "random" else None,
                }  # fmt: skip


def with_q(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows with q beside p, both in two digits."""
    tested = rows.groupby(["model", "probe", "level", "metric"])["p"]
    q = tested.transform(stats.false_discovery_control)
    two_digits = "{:.2g}".format
    place = rows.columns.get_loc("p") + 1
    rows.insert(place, "q", q.map(two_digits))
    return rows.assign(p=rows["p"].map(two_digits))


def with_means(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows and the means of the seeds, with the lowest and highest in place of intervals."""
    drawn = rows[rows["method"] == "random"]
    keys = ["model", "method", "percent", "probe", "level", "metric"]
    means = drawn.groupby(keys, sort=False, as_index=False).agg(
        score=("score", "mean"), difference=("difference", "mean"),
        low=("difference", "min"), high=("difference", "max"),
        kept=("kept", "mean"), kept_low=("kept", "min"), kept_high=("kept", "max"),
    )  # fmt: skip
    return pd.concat([rows, means.assign(seed="mean").round(4)])


def main() -> None:
    """Write both files from the sweeps named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweeps", nargs="+", metavar="NAME=SWEEP")
    unpruned, kept = [], []
    for text in parser.parse_args().sweeps:
        model, _, folder = text.partition("=")
        base, *cuts = read_sweep(folder).runs
        unpruned += unpruned_rows(model, base)
        kept += (row for run in cuts for row in kept_rows(model, base, run))
    pd.DataFrame(unpruned).to_csv(PAGES / "probes.csv", index=False)
    with_means(with_q(pd.DataFrame(kept))).to_csv(
        PAGES / "probes_kept.csv", index=False
    )


if __name__ == "__main__":
    main()
