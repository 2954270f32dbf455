"""One random order of a unit's documents, and evaluating the first of them alone."""

from __future__ import annotations

import bisect
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task


class DocumentOrder:
    """The documents of a task, or of all members of a group, in a random order.

    It depends on names, counts and seed alone: every size of a sweep has the same. A group's
    members take turns in proportion to their documents, so that every beginning of the order
    holds about the same share of each.

    Args:
        counts: Documents of each task.
        seed: Another seed, another order.

    Attributes:
        documents: Task and index of each document, in order.
        least: Length of the shortest beginning with two documents of each task, or all
            of a task that has fewer.

    Example:
        >>> order = DocumentOrder({"few": 2, "many": 4}, seed=0)
        >>> sorted(order.documents) == [("few", 0), ("few", 1), *(("many", i) for i in range(4))]
        True
    """

    def __init__(self, counts: Mapping[str, int], seed: int) -> None:
        places = []
        for task, count in counts.items():
            rng = np.random.default_rng([seed, zlib.crc32(task.encode())])
            start = rng.random()
            places += [
                ((rank + start) / count, task, int(document))
                for rank, document in enumerate(rng.permutation(count))
            ]
        self.documents = [(task, document) for _, task, document in sorted(places)]
        self._place = {each: place for place, each in enumerate(self.documents)}
        left = {task: min(2, count) for task, count in counts.items()}
        self.least = 0
        while any(left.values()):
            task = self.documents[self.least][0]
            left[task] = max(0, left[task] - 1)
            self.least += 1

    def first(self, count: int) -> dict[str, set[int]]:
        """Return the first documents by task."""
        found: dict[str, set[int]] = {}
        for task, document in self.documents[:count]:
            found.setdefault(task, set()).add(document)
        return found

    def numbering(
        self, looks: Sequence[int], size: int | None
    ) -> Callable[[Sequence[Instance]], list[int]]:
        """Return which block each request belongs to: blocks end at looks.

        Args:
            looks: Documents at each look.
            size: Most documents of a block; None for no bound.
        """
        ends: list[int] = []
        for start, end in zip((0, *looks), looks, strict=False):
            ends += range(start + (size or end), end, size or end)
            ends.append(end)

        def number(requests: Sequence[Instance]) -> list[int]:
            return [
                bisect.bisect_right(ends, self._place[each.task_name, each.doc_id])  # type: ignore[index]
                for each in requests
            ]

        return number


class FirstDocuments:
    """Lets the harness evaluate some documents of a task, as it would within all of them.

    The harness's own ``samples`` would draw other few-shot examples: they depend on how many
    documents came before. Here the requests of all documents are made, once, and those of
    the others left out.

    Args:
        task: The task; two methods of this object are replaced.

    Attributes:
        chosen: Indices of the documents to evaluate.
    """

    def __init__(self, task: Task) -> None:
        self.chosen: set[int] = set()
        self._task: Any = task
        self._all: list[Instance] | None = None
        self._build = task.build_all_requests
        self._documents = task.doc_iterator
        self._task.build_all_requests = self._build_chosen
        self._task.doc_iterator = self._chosen_documents

    def _build_chosen(self, **options: Any) -> None:
        if self._all is None:
            self._build(**options)
            self._all = list(self._task.instances)
        self._task._instances = [
            replace(each, resps=[], filtered_resps={})
            for each in self._all
            if each.doc_id in self.chosen
        ]

    def _chosen_documents(self, **options: Any) -> Iterator[tuple[int, Any]]:
        for index, document in self._documents(**options):
            if self._all is None or index in self.chosen:
                yield index, document


def document_counts(
    tasks: Mapping[str, Task],
    limit: float | None,
    samples: Mapping[str, Sequence[int]] | None,
) -> dict[str, int]:
    """Return how many documents of each task there are to evaluate."""
    from lm_eval.evaluator_utils import get_sample_size

    counts = {}
    for name, task in tasks.items():
        count = len(task.eval_docs)
        if samples and samples.get(name):
            count = len(samples[name])
        elif limit:
            count = min(count, get_sample_size(task, limit) or count)
        counts[name] = count
    return counts
