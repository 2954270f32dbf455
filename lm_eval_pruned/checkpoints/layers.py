"""A checkpoint whose decoder layers are read one at a time, each when it is run.

transformers loads everything but the weights of the layers, which stay behind: it is
handed entries for them that put a tensor without memory in their place. A layer's weights
are read when `lm_eval_pruned.pruning.layerwise.LayeredModel` asks for them, and dropped after it has run.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.checkpoints.route import OWN_WAY, RouteDeclined, clear_errors
from lm_eval_pruned.checkpoints.session import Session
from lm_eval_pruned.checkpoints.transformers_api import target_names
from lm_eval_pruned.pruning.calibration import (
    CalibrationText,
    calibrate_by_layer,
    check_observable,
    read_texts,
)
from lm_eval_pruned.pruning.criteria import CALIBRATED
from lm_eval_pruned.pruning.layerwise import (
    LayeredModel,
    NotLayerByLayer,
    layer_list,
)
from lm_eval_pruned.pruning.layouts import BUILDING
from lm_eval_pruned.pruning.measuring import scores_of_activity


if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lm_eval_pruned.checkpoints.request import LoadRequest
    from lm_eval_pruned.pruning.calibration import NeuronActivity
    from lm_eval_pruned.pruning.layouts import GluMlp
    from lm_eval_pruned.pruning.scores import ScoreTable


@contextlib.contextmanager
def open_layers(request: LoadRequest) -> Iterator[LayeredModel]:
    """Open the unpruned model of `request` with its layers on disk.

    It is not quantised, and lies on one device, the first that ``device_map`` names.

    Raises:
        RouteDeclined: It cannot be read layer by layer; the message says why.
        NotLayerByLayer: It cannot be run layer by layer.
        WidthsDiffer: The layers have other widths than `request` says.
        ValueError: The checkpoint is damaged.
        OSError: A file is missing or damaged.
    """
    if (why := request.unreadable()) is not None:
        raise RouteDeclined(why)
    device = request.device
    request = request.unplaced()
    layer_list(request.widths.skeleton())
    session = _LayersSession(request)
    with contextlib.closing(session):
        with clear_errors(session, request):
            widths = request.widths
            narrow = session.changes_model
            model = request.load(
                widths.narrowed_config(widths.actual) if narrow else widths.original,
                checkpoint=session,
            )
            session.take(model, device)
        if session.declined is not None:
            raise RouteDeclined(session.declined)
        yield LayeredModel(model, session.resident)


def observe(
    request: LoadRequest,
    known: ScoreTable,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> str | None:
    """Score the neurons of a model by what they do on calibration text, layer by layer.

    The text runs in the checkpoint's dtype, so that scores do not depend on the one in which
    the pruned model is loaded. Peak memory is what the model has besides its layers, one layer, and hidden states.

    Args:
        request: What is loaded, with a criterion that looks at activations.
        known: Takes the scores.
        tokenizer: What reads the text; default: the model's own.

    Returns:
        None, or why it cannot be done layer by layer.

    Raises:
        ValueError: The text or an activation is damaged.
        UnsupportedModelError: Activations cannot be observed in the model.
    """
    plan = request.plan
    assert plan.calibration is not None
    read_texts(plan.calibration, plan.calibration_samples)
    check_observable(request.widths.skeleton())
    try:
        with open_layers(request.in_stored_dtype()) as layers:
            text = CalibrationText.of(
                layers.model,
                tokenizer or request.load_tokenizer(),
                plan.calibration,
                plan.calibration_samples,
            )
            layers.check(text.tokens[0].to(layers.device))
            found: dict[str, Tensor] = {}
            ranked = request.ranked

            def seen(mlp: GluMlp, activity: NeuronActivity) -> None:
                tried = [each for each in plan.tried if each in CALIBRATED]
                if mlp.name not in ranked and not tried:
                    return
                criterion = plan.criterion_of(mlp.block)
                scores = scores_of_activity(plan, mlp, activity, tried or (criterion,))
                for each in tried:
                    # Another size may choose another.
                    known.by_criterion.setdefault(each, {})[mlp.name] = scores[each]
                if criterion in scores:
                    found[mlp.name] = scores[criterion]

            known.calibration = calibrate_by_layer(layers, text, seen)
    except (RouteDeclined, NotLayerByLayer) as reason:
        return str(reason)
    known.scores |= found
    return None


class _LayersSession(Session):
    """A load that leaves the weights of the layers in the files."""

    def __init__(self, request: LoadRequest):
        super().__init__(request.plan, request.widths, request.widths.actual)
        self._left: dict[str, _Left] = {}
        self._prefix = ""
        self._device = torch.device("cpu")

    def provide(self, model, state_dict, checkpoint_files, load_config):
        if self.opened:
            return state_dict, checkpoint_files
        entries = self.open(model, state_dict, checkpoint_files, load_config)
        entries = self.merge(entries, model, load_config)
        self._prefix = f"{layer_list(model)[0]}."
        parameters = dict(model.named_parameters())
        for key, (name, converter, _) in target_names(
            entries, model, load_config
        ).items():
            if not name.startswith(self._prefix) or name not in parameters:
                continue
            if converter is not None:
                raise RouteDeclined(f"transformers computes {name} from other tensors")
            left = _Left(entries[key], parameters[name].dtype)
            self._left[name] = entries[key] = left
        return entries, None

    def take(self, model: PreTrainedModel, device: torch.device) -> None:
        """Take a loaded model for the one whose layers stayed behind, and move the rest.

        Raises:
            RouteDeclined: It is another, or lacks weights that did not stay behind.
        """
        if not self.opened or model is not self._model:
            raise RouteDeclined(OWN_WAY)
        absent = {n for n, p in model.named_parameters() if p.is_meta}
        if absent - self._left.keys():
            raise RouteDeclined(OWN_WAY)
        self._device = device
        if device.type == "cpu":
            return
        for name, module in model.named_modules():
            if not f"{name}.".startswith(self._prefix):
                for tensors in (module._parameters, module._buffers):
                    for each, tensor in tensors.items():
                        if tensor is not None:
                            tensors[each] = _moved(tensor, device)
        with BUILDING:
            model.tie_weights()

    @contextlib.contextmanager
    def resident(self, layer: int) -> Iterator[None]:
        """Keep the weights of one layer in memory for a while."""
        assert self._model is not None
        prefix = f"{self._prefix}{layer}."
        module = self._model.get_submodule(prefix[:-1])
        names = [name for name in self._left if name.startswith(prefix)]
        try:
            for name in names:
                weight = self._left[name].read().to(self._device)
                _set(module, name.removeprefix(prefix), weight)
            for part in module.modules():
                for each, buffer in part._buffers.items():
                    if buffer is not None:
                        part._buffers[each] = buffer.to(self._device)
            yield
        finally:
            for name in names:
                old = module.get_parameter(name.removeprefix(prefix))
                empty = torch.empty_like(old, device="meta")
                _set(module, name.removeprefix(prefix), empty)


class _Left:
    """A checkpoint entry that stays in its file, and puts a tensor without memory in its place.

    It follows the protocol of `lm_eval_pruned.checkpoints.narrowed.NarrowedTensor`.
    """

    def __init__(self, entry: Any, dtype: torch.dtype):
        self._entry = entry
        self._dtype = dtype

    def get_shape(self) -> list[int]:
        return list(self._entry.get_shape())

    def get_dtype(self) -> str:
        return self._entry.get_dtype()

    def __getitem__(self, index):
        return self

    def to(self, device=None, dtype=None, **kwargs) -> Tensor:
        """Remember the dtype and return a tensor on the meta device."""
        self._dtype = dtype or self._dtype
        return torch.empty(self.get_shape(), dtype=self._dtype, device="meta")

    def read(self) -> Tensor:
        """Return the weights, in the dtype in which they were asked for."""
        with torch.device("cpu"):
            return self._entry[...].to(device="cpu", dtype=self._dtype)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    moved = tensor.detach().to(device)
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(moved, requires_grad=tensor.requires_grad)
    return moved


def _set(module: torch.nn.Module, name: str, weight: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(
        module.get_submodule(owner),
        attribute,
        torch.nn.Parameter(weight, requires_grad=False),
    )
