"""Pruning while loading: the full model never exists in memory.

`load_pruned` asks transformers for a model with a narrowed config. While it
loads, `_Session` stands in for the checkpoint: the entries of the GLU-MLPs are
`NarrowedTensor`s, which look like tensors of the kept width. When transformers
materialises one, the layer's gate and up are read, moved to their target device
and dtype, scored there, sliced and dropped. Everything else transformers does
with a checkpoint (shards, renamed keys, ``device_map``, dtype casts, quantising
while loading, tensor parallelism) sees a checkpoint that was always narrow.

Source of the protocol: `transformers.core_model_loading.spawn_materialize` and
`transformers.modeling_utils.PreTrainedModel._load_pretrained_model`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lm_eval_pruned.expansion import PrunePlan
from lm_eval_pruned.glu import (
    GluMlp,
    UnsupportedModelError,
    count_parameters,
    find_glu_mlps,
    narrowed_config,
    skeleton,
)
from lm_eval_pruned.pruning import (
    PruneRecord,
    carry_out,
    check_finite,
    narrow,
    select,
)


if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

    from lm_eval_pruned.expansion import Number

# Below the harness's logger, so that its verbosity applies.
logger = logging.getLogger("lm_eval.pruned.loading")

_HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)
#: Arguments of `from_pretrained` that AutoConfig must not absorb into the config.
_MODEL_ARGUMENTS = ("dtype", "torch_dtype", "quantization_config")


def load_pruned(
    pretrained: str,
    *,
    ratio: Number | None = None,
    prune_percent: Number | None = None,
    intermediate_size: Number | None = None,
    criterion: str = "maw",
    multiple_of: Number = 1,
    seed: Number = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    auto_class: type | None = None,
    **from_pretrained: Any,
) -> PreTrainedModel:
    """Load a model whose GLU-MLPs are narrowed while its checkpoint is read.

    ``gate_proj`` and ``up_proj`` come out as (k, H) instead of (I, H), ``down_proj``
    as (H, k). Checkpoints that cannot be pruned while they load (GGUF, ``.bin``)
    are loaded in full and pruned in memory, with identical weights.

    Args:
        pretrained: Folder or Hub name of the model.
        ratio: Expansion ratio to keep; the kept width is ``ceil(ratio * H)``.
        prune_percent: Share of neurons to remove, in percent.
        intermediate_size: Kept width, in neurons. At most one of these three; none
            loads the model unpruned.
        criterion: Importance score; see `lm_eval_pruned.criteria`.
        multiple_of: Round the kept width down to a multiple of this, in neurons.
        seed: Seed of the ``random`` criterion.
        device: Where to load to; scores are computed there. Default: the CPU.
        dtype: Weight dtype; default: the one the checkpoint is stored in.
        auto_class: The transformers class to load with; default
            `AutoModelForCausalLM`.
        **from_pretrained: Anything else ``from_pretrained`` takes.

    Returns:
        The model, in evaluation mode. ``model.prune_record`` says what was done.

    Raises:
        ValueError: An argument is out of range, or a weight is NaN or infinite.
        UnsupportedModelError: The model cannot be pruned.
        OSError: The checkpoint is missing, incomplete or damaged.

    Source: arXiv 2512.22671, section 3.

    Example:
        >>> model = load_pruned("meta-llama/Llama-3.2-1B", prune_percent=40)
        >>> model.config.intermediate_size
        4916
    """
    import transformers

    auto_class = auto_class or transformers.AutoModelForCausalLM
    if dtype is not None:
        from_pretrained["dtype"] = dtype
    if device is not None:
        if from_pretrained.get("device_map") is not None:
            raise ValueError(
                f"device={device} and device_map={from_pretrained['device_map']} both say where "
                "to load: pass one."
            )
        from_pretrained["device_map"] = {"": device}
    return load_with_arguments(
        auto_class,
        pretrained,
        {
            "ratio": ratio,
            "prune_percent": prune_percent,
            "intermediate_size": intermediate_size,
            "criterion": criterion,
            "multiple_of": multiple_of,
            "seed": seed,
        },
        from_pretrained,
    )


def load_with_arguments(
    auto_class: type,
    pretrained: str,
    prune_arguments: dict[str, Any],
    from_pretrained: dict[str, Any],
) -> PreTrainedModel:
    """Load and prune; `load_pruned` with its arguments in two groups.

    Args:
        auto_class: The transformers class to load with.
        pretrained: Folder or Hub name of the model.
        prune_arguments: Keyword arguments of `PrunePlan.from_arguments`.
        from_pretrained: Keyword arguments of ``auto_class.from_pretrained``.
    """
    request = resolve_request(auto_class, pretrained, prune_arguments, from_pretrained)
    plan, config, model_arguments, layers, before = request
    if not plan.prunes:
        model = auto_class.from_pretrained(pretrained, config=config, **model_arguments)  # type: ignore[attr-defined]
        model.prune_record = PruneRecord(plan, layers, before, before, ())
        return model

    session = _Session(plan)
    if model_arguments.get("gguf_file") is None:
        with _standing_in(session), _clear_errors(session, pretrained):
            model = auto_class.from_pretrained(  # type: ignore[attr-defined]
                pretrained,
                config=narrowed_config(config, plan.width),
                **model_arguments,
            )
            model.prune_record = PruneRecord(
                plan, layers, before, count_parameters(model), session.kept()
            )
            return model
    else:
        session.declined = "it is a GGUF file"
        _dequantise(model_arguments)
    logger.info(
        "%s is loaded in full and pruned in memory, because %s.",
        pretrained,
        session.declined,
    )
    model = auto_class.from_pretrained(pretrained, config=config, **model_arguments)  # type: ignore[attr-defined]
    return carry_out(plan, model)


class Request(NamedTuple):
    """What is to be loaded, known before any weight is read.

    Attributes:
        plan: What to do to every GLU-MLP.
        config: The config of the unpruned model.
        model_arguments: Keyword arguments of ``from_pretrained`` besides the config.
        layers: Number of GLU-MLPs.
        parameters: Parameters of the unpruned model; tied ones count once.
    """

    plan: PrunePlan
    config: PretrainedConfig
    model_arguments: dict[str, Any]
    layers: int
    parameters: int


def resolve_request(
    auto_class: type,
    pretrained: str,
    prune_arguments: dict[str, Any],
    from_pretrained: dict[str, Any],
) -> Request:
    """Read the config of a model and plan its pruning.

    Takes the arguments of `load_with_arguments`.

    Raises:
        ValueError: An argument is out of range.
        UnsupportedModelError: The model cannot be pruned.
        OSError: The config cannot be read.
    """
    config, model_arguments = _resolve_config(pretrained, dict(from_pretrained))
    _refuse_quantised(config, model_arguments)
    whole = skeleton(
        auto_class,
        config,
        trust_remote_code=bool(from_pretrained.get("trust_remote_code")),
    )
    mlps = find_glu_mlps(whole)
    plan = PrunePlan.from_arguments(
        mlps[0].hidden_size, mlps[0].width, **prune_arguments
    )
    return Request(plan, config, model_arguments, len(mlps), count_parameters(whole))


def _resolve_config(
    pretrained: str, arguments: dict[str, Any]
) -> tuple[PretrainedConfig, dict[str, Any]]:
    """Split `arguments` into the config they describe and what is left for the model.

    Mirrors `transformers.models.auto.auto_factory._BaseAutoModelClass.from_pretrained`.
    """
    from transformers import AutoConfig

    kept = {name: arguments.pop(name) for name in _MODEL_ARGUMENTS if name in arguments}
    kept |= {name: arguments[name] for name in _HUB_ARGUMENTS if name in arguments}
    for name in ("trust_remote_code", "gguf_file"):
        if name in arguments:
            kept[name] = arguments[name]
    config, unused = AutoConfig.from_pretrained(
        pretrained, return_unused_kwargs=True, **arguments
    )
    return config, {**unused, **kept}


def _refuse_quantised(config: PretrainedConfig, arguments: dict[str, Any]) -> None:
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is None or arguments.get("gguf_file") is not None:
        return
    if not isinstance(quantisation, dict):
        quantisation = quantisation.to_dict()
    method = quantisation.get("quant_method", "unknown")
    raise UnsupportedModelError(
        f"The checkpoint is quantised already (quant_method={getattr(method, 'value', method)}), "
        "and quantised neurons can be neither ranked nor sliced: pass the unquantised checkpoint "
        "it was made from."
    )


def _dequantise(arguments: dict[str, Any]) -> None:
    """Make transformers expand the blocks of a GGUF file to dense weights."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return
    arguments["quantization_config"] = GgufConfig(dequantize=True)


class _RouteDeclined(Exception):
    """The checkpoint cannot be pruned while it loads; nothing was read yet."""


_current: ContextVar[_Session | None] = ContextVar("lm_eval_pruned_session")
_installation = threading.Lock()
_installed = 0
_original: Any = None


@contextlib.contextmanager
def _standing_in(session: _Session) -> Iterator[None]:
    """Let `session` provide the checkpoint of the next model this context loads.

    transformers has no hook at this place, so one static method is replaced
    while at least one session is open, and restored by the last one to close.
    Loads outside of a session, in other threads too, go to the original.
    """
    from transformers import PreTrainedModel

    global _installed, _original
    with _installation:
        if _installed == 0:
            _original = PreTrainedModel.__dict__["_load_pretrained_model"]
            PreTrainedModel._load_pretrained_model = staticmethod(_load_through_session)  # type: ignore[method-assign]
        _installed += 1
    token = _current.set(session)
    try:
        yield
    finally:
        _current.reset(token)
        session.close()
        with _installation:
            _installed -= 1
            if _installed == 0:
                PreTrainedModel._load_pretrained_model = _original  # type: ignore[method-assign]
                _original = None


def _load_through_session(
    model, state_dict, checkpoint_files, load_config, *args, **kwargs
):
    session = _current.get(None)
    original = _original.__func__
    if session is None or session.opened:
        return original(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )
    entries = session.open(model, state_dict, checkpoint_files, load_config)
    # Without file names, offloading to disk writes the narrowed weights instead of
    # pointing into the original files.
    return original(model, entries, None, load_config, *args, **kwargs)


@contextlib.contextmanager
def _clear_errors(session: _Session, pretrained: str) -> Iterator[None]:
    """Turn what escapes from a load into one sentence, or into `session.declined`."""
    try:
        yield
    except _RouteDeclined as reason:
        session.declined = str(reason)
    except Exception as error:
        if session.error is not None:
            raise session.error from None
        if not session.opened and isinstance(error, RuntimeError):
            # A class with a loader of its own went past the session and met narrow shapes.
            session.declined = "its model class loads checkpoints in its own way"
            return
        raise
    else:
        if session.error is not None:
            raise session.error


class _Session:
    """One load of one model: opens its files and narrows its GLU-MLPs."""

    def __init__(self, plan: PrunePlan):
        self.plan = plan
        self.opened = False
        self.declined: str | None = None
        self.error: Exception | None = None
        self._files = contextlib.ExitStack()
        self._mlps: list[_NarrowedMlp] = []

    def kept(self) -> tuple[Tensor, ...]:
        """Return the kept neurons of every layer, each of shape (k,), on the CPU."""
        return tuple(mlp.kept_on_cpu() for mlp in self._mlps)

    def close(self) -> None:
        self._files.close()

    def open(self, model, state_dict, checkpoint_files, load_config) -> dict[str, Any]:
        """Return the checkpoint as a state dict of lazy entries.

        Raises:
            _RouteDeclined: The checkpoint is not in safetensors, or transformers
                computes some GLU weight from other tensors.
            OSError: A file is damaged.
            ValueError: A GLU weight is missing or has another shape than the
                config says.
        """
        self.opened = True
        entries = self._open_files(state_dict, checkpoint_files)
        places = {
            parameter: (mlp, projection, axis)
            for mlp in find_glu_mlps(model)
            for parameter, (projection, axis) in mlp.sliced_parameters().items()
        }
        narrowed: dict[str, _NarrowedMlp] = {}
        for key, (parameter, converted) in _target_names(
            entries, model, load_config
        ).items():
            if parameter not in places:
                continue
            if converted:
                raise _RouteDeclined(f"{parameter} is made from several tensors")
            mlp, projection, axis = places.pop(parameter)
            if mlp.name not in narrowed:
                narrowed[mlp.name] = _NarrowedMlp(self, mlp)
            part = parameter.rpartition(".")[2]
            entries[key] = narrowed[mlp.name].add(
                projection, part, axis, entries[key], _target(load_config, parameter)
            )
        if places:
            raise ValueError(
                f"The checkpoint holds no tensor for {next(iter(places))}: it is incomplete, or "
                "its config.json describes another model."
            )
        self._mlps = sorted(narrowed.values(), key=lambda mlp: mlp.layer)
        return entries

    def _open_files(self, state_dict, checkpoint_files) -> dict[str, Any]:
        from safetensors import SafetensorError
        from transformers.integrations import is_deepspeed_zero3_enabled

        if is_deepspeed_zero3_enabled():
            raise _RouteDeclined("DeepSpeed ZeRO-3 gathers its weights itself")
        if state_dict is not None or not checkpoint_files:
            raise _RouteDeclined("its weights do not come from files")
        if not all(str(file).endswith(".safetensors") for file in checkpoint_files):
            raise _RouteDeclined("its checkpoint is not in safetensors")
        entries: dict[str, Any] = {}
        for file in checkpoint_files:
            try:
                entries |= self._entries_of(file)
            except (SafetensorError, OSError) as error:
                raise OSError(
                    f"{file} is not an intact safetensors file ({error}): download or copy it again."
                ) from None
        return entries

    def _entries_of(self, file: str) -> dict[str, Any]:
        """Return the tensors of one safetensors file, none of them read."""
        from safetensors import safe_open

        opened = self._files.enter_context(safe_open(file, framework="pt"))
        return {key: opened.get_slice(key) for key in opened.keys()}


class _NarrowedMlp:
    """The source tensors of one GLU-MLP, and the kept set once it is known."""

    def __init__(self, session: _Session, mlp: GluMlp):
        self.layer = mlp.layer
        self.name = mlp.name
        self._session = session
        self._sources: dict[tuple[str, str], NarrowedTensor] = {}
        self._ready: dict[tuple[str, str], Tensor] = {}
        self._kept: Tensor | None = None
        self._lock = threading.RLock()

    def add(self, projection: str, part: str, axis: int, source, target):
        plan = self._session.plan
        shape = list(source.get_shape())
        expected = {
            "gate_proj": [plan.width_before, plan.hidden_size],
            "up_proj": [plan.width_before, plan.hidden_size],
            "down_proj": [plan.hidden_size, plan.width_before],
        }[projection]
        if part == "bias":
            expected = [plan.width_before]
        if shape != expected:
            raise ValueError(
                f"{self.name}.{projection}.{part} has shape {shape} in the checkpoint, but its "
                f"config.json says {expected}."
            )
        if not source.get_dtype().startswith(("F32", "F16", "BF16", "F64")):
            raise ValueError(
                f"{self.name}.{projection}.{part} is stored as {source.get_dtype()}, which can "
                "be neither ranked nor sliced: use a checkpoint in float32, float16 or bfloat16."
            )
        tensor = NarrowedTensor(self, projection, part, axis, source, target)
        self._sources[projection, part] = tensor
        return tensor

    def kept_on_cpu(self) -> Tensor:
        with self._lock:
            return self._kept_set().cpu()

    def take(self, tensor: NarrowedTensor) -> Tensor:
        """Return the narrowed weights of `tensor` on its target device, in its target dtype."""
        try:
            with self._lock:
                kept = self._kept_set()
                key = (tensor.projection, tensor.part)
                if key in self._ready:
                    return self._ready.pop(key)
            weight = tensor.read()
            if tensor.part == "weight":
                check_finite(f"{self.name}.{tensor.projection}.weight", weight)
            return narrow(weight, kept, tensor.axis)
        except Exception as error:
            self._session.error = self._session.error or error
            raise

    def _kept_set(self) -> Tensor:
        if self._kept is None:
            rows = {p: self._sources[p, "weight"].read() for p in _SCORED}
            self._kept = select(self._session.plan, self.name, self.layer, **rows)
            self._ready = {
                (projection, "weight"): narrow(weight, self._kept, 0)
                for projection, weight in rows.items()
            }
        return self._kept


_SCORED = ("gate_proj", "up_proj")


class NarrowedTensor:
    """A checkpoint entry that reads as if it had been saved with the kept width.

    It follows the protocol of a safetensors slice: `get_shape`, `get_dtype` and
    indexing. ``entry[...]`` is the entry itself and ``.to`` reads it, because
    that is how transformers materialises an entry on a device.
    """

    def __init__(
        self,
        mlp: _NarrowedMlp,
        projection: str,
        part: str,
        axis: int,
        source,
        target: tuple[torch.device, torch.dtype],
    ):
        self.projection = projection
        self.part = part
        self.axis = axis
        self._mlp = mlp
        self._source = source
        self._device, self._dtype = target

    def get_shape(self) -> list[int]:
        """Return the narrowed shape."""
        shape = list(self._source.get_shape())
        shape[self.axis] = self._mlp._session.plan.width
        return shape

    def get_dtype(self) -> str:
        """Return the stored dtype in safetensors' notation, such as ``BF16``."""
        return self._source.get_dtype()

    def __getitem__(self, index):
        return self if index is Ellipsis else self.to()[index]

    def to(self, device=None, dtype=None, **kwargs) -> Tensor:
        """Read, narrow and move the weights."""
        return self._mlp.take(self).to(device=device, dtype=dtype)

    def read(self) -> Tensor:
        """Read the unpruned weights to the target device, in the target dtype."""
        return self._source[...].to(device=self._device, dtype=self._dtype)


def _target_names(entries, model, load_config) -> dict[str, tuple[str, bool]]:
    """Map each checkpoint key to a parameter, and whether others flow into it too."""
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    transforms = load_config.weight_mapping or []
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = model.state_dict()
    names = {}
    for key in entries:
        name, pattern = rename_source_key(
            key, renamings, converters, model.base_model_prefix, state
        )
        names[key] = (name, pattern is not None)
    return names


def _target(load_config, parameter: str) -> tuple[torch.device, torch.dtype]:
    """Return where and in which dtype transformers will put `parameter`.

    Mirrors `transformers.core_model_loading.convert_and_load_state_dict_in_model`.
    """
    from transformers.core_model_loading import build_glob_alternation
    from transformers.integrations.accelerate import get_device

    device = get_device(
        load_config.device_map or {"": "cpu"}, parameter, valid_torch_device=True
    )
    dtype = load_config.dtype
    if load_config.dtype_plan:
        pattern, by_group, _ = build_glob_alternation(list(load_config.dtype_plan))
        match = pattern.search(parameter)
        if match is not None and match.lastgroup is not None:
            dtype = load_config.dtype_plan[by_group[match.lastgroup]]
    return torch.device(device), dtype
