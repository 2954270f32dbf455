"""A checkpoint as a stream of narrowed tensors, for engines that build models of their own.

The checkpoint is opened the way it is for loading (`lm_eval_pruned.checkpoints.session`),
but instead of filling a model of transformers, its entries are handed out one after the
other under the names that they have in the files.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.checkpoints.damage import check_complete, missing_tensors
from lm_eval_pruned.checkpoints.layers import observe
from lm_eval_pruned.checkpoints.narrowed import layer_by_layer
from lm_eval_pruned.checkpoints.route import (
    OWN_WAY,
    RouteDeclined,
    WidthsDiffer,
    clear_errors,
    with_stored_widths,
)
from lm_eval_pruned.checkpoints.session import Session
from lm_eval_pruned.checkpoints.transformers_api import target_names
from lm_eval_pruned.pruning.allocations import UNIFORM
from lm_eval_pruned.pruning.layouts import UnsupportedModelError
from lm_eval_pruned.pruning.record import PruneRecord
from lm_eval_pruned.pruning.scores import ScoreTable
from lm_eval_pruned.pruning.slicing import score_loaded


if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lm_eval_pruned.checkpoints.request import LoadRequest
    from lm_eval_pruned.pruning.calibration import Calibration

# Below the harness's logger, so that its verbosity applies.
logger = logging.getLogger("lm_eval.pruned.loading")


@dataclass(frozen=True)
class NarrowedStream:
    """An open checkpoint, none of its weights read yet.

    Attributes:
        request: What is loaded, with the widths that the checkpoint has.
        changes_model: Whether any tensor differs from the one in the files.
    """

    request: LoadRequest
    changes_model: bool
    _session: OpenedSession

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Read the checkpoint, one MLP at a time.

        Yields:
            The key and the narrowed tensor, on the CPU, of every entry.

        Raises:
            ValueError: A weight is NaN or infinite.
        """
        entries = self._session.entries
        with clear_errors(self._session, self.request):
            for key in layer_by_layer(entries):
                # An entry that is narrowed answers with itself, and reads when it is moved.
                yield key, entries[key][...].to(dtype=None)

    def record(self) -> PruneRecord:
        """Describe what became of the MLPs, once the tensors are read."""
        return record_of(
            self.request, self._session.kept(), self._session.known.calibration
        )


@contextlib.contextmanager
def open_stream(
    request: LoadRequest, known: ScoreTable | None = None
) -> Iterator[NarrowedStream]:
    """Open the checkpoint of `request` without reading a weight.

    Args:
        request: What is to be loaded.
        known: Scores for criteria that look at activations; see `scores_of_activations`.

    Raises:
        UnsupportedModelError: It cannot be read tensor by tensor, or the layers would
            have widths that no engine can build.
        ValueError: A tensor is missing, or has another shape than the config says.
        OSError: A file is missing or damaged.
    """
    check_buildable(request)
    try:
        session = _opened(request, known)
    except WidthsDiffer as found:
        request = request.with_widths(found.actual)
        check_buildable(request)
        session = _opened(request, known)
    with contextlib.closing(session):
        yield NarrowedStream(request, session.changes_model, session)


def _opened(request: LoadRequest, known: ScoreTable | None) -> OpenedSession:
    targets = request.widths.targets(request.plan)
    session = OpenedSession(request.plan, request.widths, targets, known)
    session.declined = request.unreadable()
    with contextlib.ExitStack() as on_error:
        on_error.callback(session.close)
        if session.declined is None:
            with clear_errors(session, request), contextlib.suppress(Opened):
                request.load(
                    request.widths.narrowed_config(targets), checkpoint=session
                )
                raise RouteDeclined(OWN_WAY)
        if session.declined is not None:
            raise _Unreadable(
                f"{request.pretrained} cannot be pruned while an engine loads it, because "
                f"{session.declined}: export the pruned model first (lm-eval-pruned prune), and "
                "load that."
            )
        on_error.pop_all()
    return session


def record_of(
    request: LoadRequest,
    kept: tuple[Tensor, ...] | None,
    calibration: Calibration | None = None,
) -> PruneRecord:
    """Describe what a stream did to the MLPs of `request`.

    Args:
        request: What was loaded, with the widths that the checkpoint has.
        kept: The kept neurons of every MLP, each of shape (k,); none for the
            baseline, None where they are not known.
        calibration: The text behind the scores.
    """
    plan, widths = request.plan, request.widths
    return PruneRecord.of(
        plan,
        widths,
        widths.parameters_before,
        widths.count_parameters(widths.targets(plan)),
        kept,
        calibration,
    )


def as_stored(request: LoadRequest) -> LoadRequest:
    """Return `request` with the widths that the checkpoint has, from the heads of its files.

    A baseline that cannot be read tensor by tensor is left as it is: an engine may know how.

    Raises:
        UnsupportedModelError, ValueError, OSError: As `open_stream`.
    """
    quantised = getattr(request.widths.original, "quantization_config", None)
    if not request.plan.prunes and quantised is not None:
        return request
    try:
        with open_stream(request) as stream:
            return stream.request
    except _Unreadable:
        if request.plan.prunes:
            raise
        return request


def check_buildable(request: LoadRequest) -> None:
    """Refuse widths that no engine can build.

    An engine builds a model from its config, and a layer's experts as one. Dense MLPs it can
    build anew.

    Raises:
        UnsupportedModelError: Experts would have a width that the config cannot hold, or
            layers would be left out.
    """
    widths, plan = request.widths, request.plan
    if request.prune_arguments.drop_layers is not None:
        raise UnsupportedModelError(
            "drop_layers leaves out whole layers, which an engine that builds its model by itself "
            "would look for in the checkpoint: use --model pruned-hf, or export the pruned model "
            "first (lm-eval-pruned prune)."
        )
    if plan.is_open:
        asked = f"allocation={plan.allocation}"
        if plan.allocation == UNIFORM:
            asked = f"criterion={plan.criterion}"
        raise UnsupportedModelError(
            f"{asked} looks at the whole model before its first layer is narrowed, which an engine "
            "that reads its layers one after the other cannot wait for: use --model pruned-hf, or "
            "export the pruned model first (lm-eval-pruned prune)."
        )
    experts = {mlp.name for mlp in widths.mlps if mlp.kind == "expert"}
    names = [n for n in widths.inexpressible(widths.targets(plan)) if n in experts]
    if not names:
        return
    asked = ", ".join(f"{name}={value}" for name, value in plan.asked.items())
    raise UnsupportedModelError(
        f"{asked or 'The checkpoint'} gives {names[0]} a width of its own, and an engine that "
        f"builds experts from {widths.keys[names[0]]} in the config cannot have that: prune "
        "all layers alike, or use --model pruned-hf."
    )


def scores_of_activations(request: LoadRequest) -> ScoreTable:
    """Return the scores that `request` needs from a pass over calibration text.

    The model runs on the CPU, layer by layer, or in full where that cannot be; empty
    where the criterion looks at weights alone.
    """
    known = ScoreTable()
    if not request.needs_scores(known):
        return known
    request.check_prunable_in_memory("its criterion looks at activations")
    why = with_stored_widths(request, lambda stored: observe(stored, known))
    if why is not None:
        logger.warning(
            "%s is loaded in full to see its activations, because %s.",
            request.pretrained,
            why,
        )
        score_loaded(
            request.plan,
            request.in_stored_dtype().load_whole(),
            request.load_tokenizer(),
            known,
        )
    return known


class _Unreadable(UnsupportedModelError):
    """A checkpoint cannot be read tensor by tensor."""


class Opened(Exception):
    """The entries are known, so transformers has nothing to load."""


class OpenedSession(Session):
    """A load that ends once the entries are known."""

    entries: dict[str, Any]

    def provide(self, model, state_dict, checkpoint_files, load_config):
        its_own = type(model).__name__ == self._widths.model_class.__name__
        if its_own and not self.opened:
            self.entries = self.open(model, state_dict, checkpoint_files, load_config)
            names = target_names(self.entries, model, load_config)
            check_complete(missing_tensors(names, model))
            raise Opened
        return state_dict, checkpoint_files
