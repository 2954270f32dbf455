"""The documents that two runs were both scored on, and their test."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lm_eval_pruned.compare.statistics import PairedTest, paired_difference
from lm_eval_pruned.results.documents import Documents, documents_of
from lm_eval_pruned.results.files import ResultsError, Run


if TYPE_CHECKING:
    Pair = tuple[Documents, Documents]


def paired_documents(base: Run, run: Run, task: str, metric: str) -> Pair | None:
    """Return the documents of two runs in the same order, or None without samples.

    Raises:
        ResultsError: The runs saw different documents or task versions.
    """
    for name in base.leaves(task):
        versions = base.versions.get(name), run.versions.get(name)
        if None not in versions and versions[0] != versions[1]:
            raise ResultsError(
                f"{name} has version {versions[0]} in {base.name} and {versions[1]} in {run.name}: "
                "scores of different versions of a task cannot be compared, so evaluate both again."
            )
    one, other = (documents_of(item, task, metric) for item in (base, run))
    if one is None or other is None:
        return None
    same = other.in_the_order_of(one)
    if same is None:
        before, after = set(one.keys), set(other.keys)
        raise ResultsError(
            f"{task} was evaluated on different documents: {len(before - after)} of {len(before)} "
            f"only in {base.name}, {len(after - before)} of {len(after)} only in {run.name} "
            "(matched by doc_hash); evaluate both with the same --limit and data."
        )
    if one.transform != same.transform or not np.allclose(one.weights, same.weights):
        return None
    return one, same


def paired_test(pair: Pair, alpha: float = 0.05) -> PairedTest:
    """Test what the second of two runs differs by, on what `paired_documents` returned."""
    base, run = pair
    how = {"transform": base.transform, "alpha": alpha, **grouping(base)}
    return paired_difference(base.values, run.values, **how)


def grouping(documents: Documents) -> dict[str, Any]:
    """Return how documents weigh and belong together, as `paired_difference` takes it."""
    names = ("weights", "clusters", "strata")
    return {name: getattr(documents, name) for name in names}
