"""One unit that ends when its comparison with the unpruned model is decided."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.compare import statistics
from lm_eval_pruned.compare.stopping import Looks, StopRule, with_scores
from lm_eval_pruned.results.runs import read_newest
from lm_eval_pruned.sweeps.blocks import Blocks
from lm_eval_pruned.sweeps.document_order import (
    DocumentOrder,
    FirstDocuments,
    document_counts,
)


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lm_eval.api.model import LM

    from lm_eval_pruned.results.files import Run
    from lm_eval_pruned.results.stopping_record import Stopping

    #: Evaluates tasks, with so many bootstrap iterations, and writes the files to a folder.
    Evaluate = Callable[[list[Any], int, Path], None]

logger = logging.getLogger("lm_eval.pruned.sweep")
#: What the harness takes where nobody says otherwise.
BOOTSTRAP = 100_000


@dataclass(frozen=True)
class Decision:
    """What a unit that may stop early needs beside its model.

    Attributes:
        rule: What ends it.
        base: The unpruned model's results.
        sizes: Sizes of the sweep, which share the error.
        blocks: Folder of finished blocks.
        block_size: Most documents of a block, or None.
        order_seed: Of the order of documents.
        seed: See `Blocks`.
    """

    rule: StopRule
    base: Run
    sizes: int
    blocks: Path
    block_size: int | None
    order_seed: int
    seed: int | None


def evaluate_until_decided(
    lm: LM,
    loaded: dict[str, Any],
    decision: Decision,
    evaluate: Evaluate,
    settings: Any,
    folder: Path,
) -> None:
    """Evaluate a unit look by look, and write the harness's files of its documents.

    Args:
        lm: The model.
        loaded: From the harness's `TaskManager.load`: ``tasks`` and ``groups``.
        decision: What ends it.
        evaluate: See `Evaluate`.
        settings: With ``limit`` and ``samples``, as the harness has them.
        folder: Where the files belong; the results file gets the block ``stopping``.
    """
    tasks, groups = loaded["tasks"], list(loaded["groups"].values())
    counts = document_counts(tasks, settings.limit, settings.samples)
    order = DocumentOrder(counts, decision.order_seed)
    documents = len(order.documents)
    counted = statistics.looks(
        documents, max(statistics.FIRST_LOOK, min(order.least, documents))
    )
    name = groups[0].name if groups else next(iter(tasks))
    top = groups[:1] or list(tasks.values())
    looks = Looks(decision.rule, decision.base, counted, decision.sizes)
    numbering = order.numbering(counted, decision.block_size)
    parts = {task: FirstDocuments(each) for task, each in tasks.items()}
    stopping = None
    with Blocks(decision.blocks, numbering, decision.seed).answering(lm):
        for count in counted:
            chosen = order.first(count)
            for task, part in parts.items():
                part.chosen = chosen.get(task, set())
            with _without_model_info(lm), _scratch(folder) as scratch:
                evaluate(top, 0, scratch)
                stopping = looks.add(read_newest(scratch), name)
            if stopping is not None:
                break
        evaluate(top, BOOTSTRAP, folder)
    assert stopping is not None
    logger.info("%s: %s (%s).", name, stopping.text, stopping.reason)
    _add_record(folder, with_scores(stopping, read_newest(folder)))


@contextlib.contextmanager
def _without_model_info(lm: Any) -> Iterator[None]:
    """Keep what was measured so far open: asking for it ends the measurement."""
    lm.get_model_info = dict
    try:
        yield
    finally:
        del lm.get_model_info


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        yield Path(name)


def _add_record(folder: Path, stopping: Stopping) -> None:
    (file,) = folder.glob("results_*.json")
    results = json.loads(file.read_text(encoding="utf-8"))
    results["stopping"] = stopping.as_dict()
    file.write_text(json.dumps(results, indent=2, ensure_ascii=False), encoding="utf-8")
