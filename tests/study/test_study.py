"""A study from its command to its page: its options, what it will take, what it found."""

from __future__ import annotations

import re

import numpy as np
import pytest

from lm_eval_pruned.cli import main
from tests.helpers import checkpoints
from tests.helpers.results_files import offering, pruning, write_run, write_sweep


pytest.importorskip("altair", reason="figures need the extra `report`")

N = 80
#: Shares of right answers of the unpruned model and of the smallest, by task, and that of a model
#: that answers the same to everything.
FALLS = {"mmlu": (0.6, 0.3, 0.25), "piqa": (0.8, 0.6, 0.5)}
RISES = {"truthfulqa_mc2": (0.4, 0.7, 0.3)}
RISES_BELOW = {"ifeval": (0.1, 0.35, 0.4)}
DROPS = {"truthfulqa_mc2": (0.7, 0.4, 0.3)}
BLIND = {"mmlu": (0.26, 0.2, 0.25)}


def answers(share, seed):
    order = np.random.default_rng(seed).permutation(N)
    return {"acc,none": {"values": (order < share * N).astype(float).tolist()}}


def studied(folder, tasks, percents=(0, 20, 40, 60)):
    """Write the sweep of a study, with random cuts and a floor, and return what was found."""
    from lm_eval_pruned.results.runs import read_sweep
    from lm_eval_pruned.study.findings import read_findings

    def at(done):
        shares = {task: a + (b - a) * done for task, (a, b, _) in tasks.items()}
        return {task: answers(each, n) for n, (task, each) in enumerate(shares.items())}

    runs = {f"p{p}": (p, at(p / percents[-1])) for p in percents}
    for p in percents[1:]:
        cut = pruning(p, criterion="random", seed=0)
        runs[f"p{p}_random"] = (cut, at(1.2 * p / percents[-1]))
    floor = {task: answers(share, n) for n, (task, (*_, share)) in enumerate(tasks.items())}
    write_sweep(folder, {**runs, "floor-constant": ({}, floor)})
    return read_findings(read_sweep(folder), 0.05)


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        (FALLS | RISES, "dichotomy holds: mmlu and piqa lose; truthfulqa_mc2 rise"),
        (FALLS | DROPS, "does not hold: mmlu and piqa lose; truthfulqa_mc2 lose as well"),
        (FALLS | RISES | {"ifeval": (0.9, 0.5, 0.1)}, "holds in part"),
        (FALLS | RISES_BELOW, "is not decided"),
        (BLIND | RISES, "is not decided"),
        ({"mmlu": (0.6, 0.6, 0.25)} | RISES, "no loss of knowledge"),
    ],
)
def test_the_verdict(tasks, words, tmp_path):
    from lm_eval_pruned.study.page import verdict

    told = verdict("tiny", studied(tmp_path, tasks), {})
    assert len(told) == 5 and words in told[0], told
