"""What a checkpoint says about its layers before it is pruned; see `lm_eval_pruned.pruning.settling`."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING

from lm_eval_pruned.checkpoints.layers import observe
from lm_eval_pruned.checkpoints.route import RouteDeclined, clear_errors
from lm_eval_pruned.checkpoints.stream import Opened, OpenedSession
from lm_eval_pruned.pruning.settling import settled


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from lm_eval_pruned.checkpoints.request import LoadRequest
    from lm_eval_pruned.pruning.scores import ScoreTable
    from lm_eval_pruned.pruning.sensitivity import Sensitivity


def settled_request(
    request: LoadRequest,
    known: ScoreTable,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[LoadRequest, str | None]:
    """Settle the plan of `request` out of its checkpoint, without a model in memory.

    Args:
        request: What is to be loaded.
        known: Scores from before; takes those of this checkpoint.
        tokenizer: What reads calibration text; default: the model's own.

    Returns:
        The request with a plan that says what each layer becomes, and None; or the request
        as it is, and why the plan can be settled only with the model in memory.

    Raises:
        WidthsDiffer: The layers have other widths than `request` says.
        ValueError: The checkpoint, the text or a bound is wrong.
    """
    if not request.plan.is_open:
        return request, None
    if (why := request.unreadable()) is not None:
        return request, why
    try:
        evidence = _StoredModel(request, known, tokenizer)
        plan = settled(request.plan, request.widths, evidence)
    except RouteDeclined as reason:
        return request, str(reason)
    return dataclasses.replace(request, plan=plan), None


@dataclasses.dataclass(frozen=True)
class _StoredModel:
    """A checkpoint as evidence."""

    request: LoadRequest
    known: ScoreTable
    tokenizer: PreTrainedTokenizerBase | None

    def scores(self) -> Mapping[str, Tensor]:
        request, known = self.request, self.known
        targets = request.widths.targets(request.plan)
        if known.covers(request.widths.actual, targets):
            return known.scores
        if request.needs_scores(known):
            if (why := observe(request, known, self.tokenizer)) is not None:
                raise RouteDeclined(why)
            return known.scores
        session = OpenedSession(request.plan, request.widths, targets, known)
        with contextlib.closing(session):
            with clear_errors(session, request), contextlib.suppress(Opened):
                narrowed = request.widths.narrowed_config(targets)
                request.load(narrowed, checkpoint=session)
                raise RouteDeclined("its model class loads checkpoints in its own way")
            if session.declined is not None:
                raise RouteDeclined(session.declined)
            with clear_errors(session, request):
                session.score()
        return known.scores

    def curves(
        self, criteria: Sequence[str], widths: Mapping[int, Sequence[int]]
    ) -> Sensitivity:
        raise RouteDeclined("losses are measured with the whole model")
