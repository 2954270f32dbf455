"""Complete sweeps, stopped in many orders of their documents: ``stopping.py replay``.

Orders, looks, levels, tests and the correction over sizes are those of the package.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lm_eval_pruned.compare import statistics
from lm_eval_pruned.compare.comparison import compare, split_sweep
from lm_eval_pruned.compare.pairing import DocumentReader, paired_documents
from lm_eval_pruned.compare.stopping import LEVEL, Looks
from lm_eval_pruned.results.documents import TRANSFORMS
from lm_eval_pruned.results.series import primary_metrics
from lm_eval_pruned.results.sweep_results import read_sweep
from lm_eval_pruned.sweeps.document_order import DocumentOrder
from lm_eval_pruned.util.tables import markdown_table


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.compare.stopping import StopRule
    from lm_eval_pruned.results.documents import Documents
    from lm_eval_pruned.results.files import Run
    from lm_eval_pruned.results.stopping_record import Stopping

    Pair = tuple[Documents, Documents]


@dataclass(frozen=True)
class Replayed:
    """One task of a sweep in many orders.

    Attributes:
        task: Its name.
        documents: How many it has.
        whole: What all documents show of each size, after Holm over the sizes: the sign of
            the difference, 0 where none is shown. Shape (sizes,).
        compared: The same as `compare` says it of the complete sweep.
        shown: What is shown where units stop. Shape (orders, sizes).
        used: Documents of each unit. Shape (orders, sizes).
    """

    task: str
    documents: int
    whole: np.ndarray
    compared: np.ndarray
    shown: np.ndarray
    used: np.ndarray


def replay(folder: str, orders: int, rule: StopRule) -> list[Replayed]:
    """Stop the units of a complete sweep in many orders.

    Args:
        folder: Of the sweep; a size counts for the tasks that it has.
        orders: How many.
        rule: What ends a unit.
    """
    base, runs = split_sweep(list(read_sweep(folder).runs), folder)
    read = DocumentReader()
    rows = {
        (row.run, row.task): row
        for row in compare(base, runs, read=read).rows
        if row.primary
    }
    found = []
    for task, metric in primary_metrics([base]):
        having = [run for run in runs if (task, metric) in run.scores]
        paired = [
            (run, pair)
            for run in having
            if (pair := paired_documents(base, run, task, metric, read))
        ]
        if not paired:
            continue
        pairs = [pair for _, pair in paired]
        documents = len(pairs[0][0].keys)
        every = [
            _stopped(rule, base, (documents,), pair, (task, metric), len(pairs))
            for pair in pairs
        ]
        compared = [_sign(rows[run.name, task]) for run, _ in paired]
        shown, used = [], []
        for seed in range(orders):
            counts, ordered = _in_order(pairs, seed)
            ends = [
                _stopped(rule, base, counts, pair, (task, metric), len(pairs))
                for pair in ordered
            ]
            shown.append(_signs(ends))
            used.append([end.documents for end in ends])
        found.append(
            Replayed(
                task,
                documents,
                _signs(every),
                np.array(compared),
                np.array(shown),
                np.array(used),
            )
        )
    return found


def _in_order(pairs: Sequence[Pair], seed: int) -> tuple[tuple[int, ...], list[Pair]]:
    """Return the looks of a task, and its documents in the order of a seed."""
    of_task: dict[str, list[tuple[str, str, int]]] = {}
    for key in pairs[0][0].keys:
        of_task.setdefault(key[0], []).append(key)
    order = DocumentOrder({task: len(keys) for task, keys in of_task.items()}, seed)
    keys = tuple(of_task[task][place] for task, place in order.documents)
    counts = statistics.looks(
        len(keys), max(statistics.FIRST_LOOK, min(order.least, len(keys)))
    )
    ordered = []
    for base, run in pairs:
        like = replace(base, keys=keys)
        one, other = base.in_the_order_of(like), run.in_the_order_of(like)
        assert one is not None
        assert other is not None
        ordered.append((one, other))
    return counts, ordered


def _stopped(
    rule: StopRule,
    base: Run,
    counts: tuple[int, ...],
    pair: Pair,
    of: tuple[str, str],
    sizes: int,
) -> Stopping:
    looks = Looks(rule, base, counts, sizes)
    for count in counts:
        first = tuple(_first(each, count) for each in pair)
        scores = base.scores[of].value, _score(first[1])
        ended = looks.look(*of, (first[0], first[1]), scores)
        if ended is not None:
            return ended
    raise AssertionError("the last look ends a unit")


def _first(documents: Documents, count: int) -> Documents:
    clusters = documents.clusters
    return replace(
        documents,
        keys=documents.keys[:count],
        values=documents.values[:count],
        weights=documents.weights[:count],
        clusters=None if clusters is None else clusters[:count],
        prompts=(),
    )


def _score(documents: Documents) -> float:
    mean = np.average(documents.values, weights=documents.weights)
    return float(TRANSFORMS[documents.transform](mean))


def _signs(ends: Sequence[Stopping]) -> np.ndarray:
    """Return what the sizes of a task show, as `compare` says it of units that could stop."""
    ps = [statistics.repeated_p(end.p, end.fractions) for end in ends]
    qs = statistics.family_wise(ps, len(ends))
    return np.array(
        [
            np.sign(end.difference) if q is not None and q < LEVEL else 0.0
            for end, q in zip(ends, qs, strict=True)
        ]
    )


def _sign(row) -> float:
    return 0.0 if row.verdict.startswith("not ") else float(np.sign(row.difference))


def as_table(found: Sequence[Replayed]) -> str:
    """Return one row for each task of each sweep, and one of all."""
    rows = [_row(each.task, str(each.documents), [each]) for each in found]
    if len(found) > 1:
        rows.append(_row("all", "-", found))
    columns = ["task", "documents", "sizes", "orders", "shown by all documents"]
    columns += ["same verdict", "same as `compare`", "wrong", "missed"]
    columns += ["median saving", "median where shown", "documents saved"]
    return markdown_table(columns, rows, "l" + "r" * (len(columns) - 1))


def _row(name: str, documents: str, of: Sequence[Replayed]) -> list[str]:
    def joined(make) -> np.ndarray:
        return np.concatenate([np.ravel(make(each)) for each in of])

    same = joined(lambda each: each.shown == each.whole)
    wrong = joined(lambda each: (each.shown != 0) & (each.shown != each.whole))
    missed = joined(lambda each: (each.shown == 0) & (each.whole != 0))
    saving = joined(lambda each: each.documents / each.used)
    there = joined(lambda each: np.broadcast_to(each.whole != 0, each.used.shape))
    whole = sum(each.documents * each.used.size for each in of)
    left = 1 - sum(each.used.sum() for each in of) / whole
    return [
        name,
        documents,
        str(sum(len(each.whole) for each in of)),
        str(len(of[0].shown)),
        str(sum(int((each.whole != 0).sum()) for each in of)),
        f"{same.mean():.1%}",
        f"{joined(lambda each: each.shown == each.compared).mean():.1%}",
        f"{wrong.mean():.1%}",
        f"{missed.mean():.1%}",
        f"{np.median(saving):.1f}",
        f"{np.median(saving[there]):.1f}" if there.any() else "-",
        f"{left:.0%}",
    ]
