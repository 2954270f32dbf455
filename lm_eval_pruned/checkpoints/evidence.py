"""What a checkpoint says about its layers before it is pruned; see `lm_eval_pruned.pruning.settling`."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from typing import TYPE_CHECKING

from lm_eval_pruned.checkpoints.layers import observe, open_layers
from lm_eval_pruned.checkpoints.route import (
    OWN_WAY,
    RouteDeclined,
    clear_errors,
    with_stored_widths,
)
from lm_eval_pruned.checkpoints.sensitivity import measure_sensitivity
from lm_eval_pruned.checkpoints.stream import Opened, OpenedSession
from lm_eval_pruned.pruning.calibration import CalibrationText, read_texts
from lm_eval_pruned.pruning.influence import influence_by_layer, influence_in_memory
from lm_eval_pruned.pruning.layerwise import NotLayerByLayer
from lm_eval_pruned.pruning.layouts import find_glu_mlps
from lm_eval_pruned.pruning.scores import ScoreTable
from lm_eval_pruned.pruning.settling import REMOVED, check_settleable, settled
from lm_eval_pruned.pruning.slicing import LoadedModel
from lm_eval_pruned.pruning.widths import widths_in_memory


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from lm_eval_pruned.checkpoints.request import LoadRequest
    from lm_eval_pruned.pruning.plan import PrunePlan
    from lm_eval_pruned.pruning.scores import KnownScores
    from lm_eval_pruned.pruning.sensitivity import Sensitivity
    from lm_eval_pruned.pruning.widths import Widths


# Below the harness's logger, so that its verbosity applies.
logger = logging.getLogger("lm_eval.pruned.loading")


def settled_request(
    request: LoadRequest,
    known: ScoreTable,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[LoadRequest, ScoreTable, str | None]:
    """Settle the plan of `request` out of its checkpoint, without a model in memory.

    Args:
        request: What is to be loaded.
        known: Scores from before; takes those of this checkpoint.
        tokenizer: What reads calibration text; default: the model's own.

    Returns:
        The request with a plan that says what each layer becomes, the scores by which it does,
        and None; or both as they are, and why that takes the model in memory.

    Raises:
        WidthsDiffer: The layers have other widths than `request` says.
        ValueError: The checkpoint, the text or a bound is wrong.
    """
    if not request.plan.is_open:
        return request, known, None
    check_settleable(request.plan, request.widths)
    if (why := request.unreadable()) is not None:
        return request, known, why
    try:
        evidence = _StoredModel(request, known, tokenizer)
        plan = settled(request.plan, request.widths, evidence)
    except RouteDeclined as reason:
        return request, known, str(reason)
    settled_one = dataclasses.replace(request, plan=plan)
    return settled_one, known.of_plan(plan, request.widths.mlps), None


def with_depth(
    request: LoadRequest,
    tokenizer: PreTrainedTokenizerBase | None = None,
    known_scores: KnownScores | None = None,
) -> LoadRequest:
    """Return `request` for the layers of most influence on its text, if it asks for them.

    The checkpoint is run layer by layer, or loaded if it has to be, and dropped.

    Args:
        request: What is to be loaded.
        tokenizer: What reads calibration text; default: the model's own.
        known_scores: What earlier requests measured; takes what this one does.

    Raises:
        ValueError: The checkpoint or the text is wrong.
        UnsupportedModelError: The model has layers that cannot be dropped.
    """
    if not request.lacks_depth:
        return request
    arguments = request.prune_arguments
    file = str(arguments.calibration)
    samples = None
    if arguments.calibration_samples is not None:
        samples = int(arguments.calibration_samples)
    read_texts(file, samples)
    known = ScoreTable()
    if known_scores is not None and (key := request.influence_key()) is not None:
        known = known_scores.setdefault(key, known)

    def measure(request: LoadRequest) -> LoadRequest:
        if known.influence is not None:
            return request.with_influence(*known.influence)
        reader = tokenizer or request.load_tokenizer()
        try:
            with open_layers(request.in_stored_dtype()) as layers:
                text = CalibrationText.of(layers.model, reader, file, samples)
                layers.check(text.tokens[0].to(layers.device))
                influence = influence_by_layer(layers, text)
        except (RouteDeclined, NotLayerByLayer) as reason:
            logger.warning(
                "%s is loaded in full to see its hidden states, because %s.",
                request.pretrained,
                reason,
            )
            model = request.in_stored_dtype().load_whole()
            text = CalibrationText.of(model, reader, file, samples)
            influence = influence_in_memory(model, text.tokens)
        known.influence = influence, text.seen_by({}).as_dict()
        return request.with_influence(*known.influence)

    return with_stored_widths(request, measure)


def settled_plan(request: LoadRequest, known: ScoreTable) -> tuple[PrunePlan, Widths]:
    """Return what each layer of `request` becomes, and the widths that it has.

    The model is loaded if it has to be, and dropped.

    Args:
        request: What would be loaded.
        known: Scores and losses from before; takes those of this model.
    """

    def settle(request: LoadRequest) -> tuple[PrunePlan, Widths]:
        request, _, why = settled_request(request, known)
        if why is None:
            return request.plan, request.widths
        request.check_prunable_in_memory(why)
        tokenizer = request.load_tokenizer() if request.plan.calibration else None
        model = request.in_stored_dtype().load_whole()
        widths = widths_in_memory(model)
        plan = widths.plan(request.prune_arguments)
        evidence = LoadedModel(plan, model, find_glu_mlps(model), tokenizer, known)
        return settled(plan, widths, evidence), widths

    return with_stored_widths(request, settle)


@dataclasses.dataclass(frozen=True)
class _StoredModel:
    """A checkpoint as evidence."""

    request: LoadRequest
    known: ScoreTable
    tokenizer: PreTrainedTokenizerBase | None

    def scores(self) -> Mapping[str, Tensor]:
        request, known = self.request, self.known
        targets = request.widths.targets(request.plan)
        ranked = request.ranked
        if known.covers(ranked):
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
                raise RouteDeclined(OWN_WAY)
            if session.declined is not None:
                raise RouteDeclined(session.declined)
            with clear_errors(session, request):
                session.score(ranked)
        return known.scores

    def curves(self, criteria: Sequence[str]) -> Sensitivity:
        if self.known.curves is None:
            plan = self.request.plan
            self.known.curves = measure_sensitivity(
                self.request.in_stored_dtype(),
                str(plan.calibration),
                criteria=criteria,
                seeds=(plan.seed,),
                removed=REMOVED,
                samples=plan.calibration_samples,
                tokenizer=self.tokenizer,
                known=self.known,
            )
        return self.known.curves
