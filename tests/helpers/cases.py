"""Cases for the judge, made of values without any file."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from lm_eval_pruned.compare.cases import Case
from lm_eval_pruned.compare.margins import Margin
from lm_eval_pruned.results.documents import TRANSFORMS, Documents
from lm_eval_pruned.results.files import Run, Score


def case_of(
    base,
    run,
    *,
    margin: str = "2pt",
    claim: str = "not_worse",
    task: str = "t",
    metric: str = "acc,none",
    clusters: tuple[str, ...] | None = None,
    floor: float | None = None,
    transform: str = "mean",
    up: bool | None = True,
) -> Case:
    """Return two runs on the same documents, with an exact `floor` if the task declares one."""
    key, size = (task, metric), len(base)
    keys = tuple((task, f"{task} {number}", 0) for number in range(size))
    about = np.ones(size), clusters, transform
    floors = {} if floor is None else {metric.partition(",")[0]: floor}
    runs = []
    for name, values in (("base", base), ("run", run)):
        documents = Documents(keys, np.asarray(values, dtype=float), *about)
        value = float(TRANSFORMS[transform].score(documents.values.mean()))
        scores = {key: Score(value, None, up, size)}
        known = {task: {"floors": floors}}
        held = {task: {metric: documents}}
        runs.append(Run(name, Path(), scores, metadata=known, documents=held))
    return Case(*runs, key, key, margin=Margin(claim, margin))


def stderr_of(test):
    """Return the standard error of a mean, from how far each unit departs from it."""
    claim = test.differs(0.0, 1)
    departures = claim.gains - test.difference * claim.weights
    spread = (claim.counts * departures**2).sum()
    return math.sqrt(spread) / (claim.counts * claim.weights).sum()
