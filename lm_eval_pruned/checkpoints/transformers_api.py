"""What transformers keeps private about building and loading models, used here and nowhere else.

Pruning while loading needs three things that no public interface offers: to hand
transformers another checkpoint than the one in the files, to know which parameter a
checkpoint key becomes, and where and in which dtype it will lie. Another release may
change any of them, so `unknown_loader` looks first whether they are as they are
known here, and whoever would use them takes another way if they are not.

Source: `transformers.PreTrainedModel._load_pretrained_model` and
`transformers.core_model_loading.convert_and_load_state_dict_in_model`.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import weakref
from typing import TYPE_CHECKING, Any, Protocol

import torch


if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable, Iterable

    from transformers import PreTrainedModel

#: The static method that fills a model from its checkpoint, and what it is given.
_LOADER = "_load_pretrained_model"
_LOADER_TAKES = ("model", "state_dict", "checkpoint_files", "load_config")
#: Modules and names that are imported, and the parameters of those whose order matters.
_USED = (
    (
        "core_model_loading",
        "rename_source_key",
        (
            "source_key",
            "weight_renamings",
            "weight_converters",
            "base_model_prefix",
            "meta_state_dict",
        ),
    ),
    ("core_model_loading", "build_glob_alternation", ()),
    ("core_model_loading", "dot_natural_key", ()),
    (
        "integrations.accelerate",
        "get_device",
        ("device_map", "param_name", "valid_torch_device"),
    ),
    ("integrations", "is_deepspeed_zero3_enabled", ()),
    ("core_model_loading", "WeightConverter", ()),
    ("core_model_loading", "WeightRenaming", ()),
)
#: What is read of the last of `_LOADER_TAKES`.
_SETTINGS = (
    "device_map",
    "dtype",
    "dtype_plan",
    "hf_quantizer",
    "ignore_mismatched_sizes",
    "weight_mapping",
)


def unknown_loader() -> str | None:
    """Return why no other checkpoint can be handed to the installed transformers, or None."""
    import transformers

    if _loader_is_known() and all(_is_known(*used) for used in _USED):
        return None
    return f"transformers {transformers.__version__} loads checkpoints in a way not known here"


def _loader_is_known() -> bool:
    from transformers import PreTrainedModel, modeling_utils

    loader = vars(PreTrainedModel).get(_LOADER)
    settings = getattr(modeling_utils, "LoadStateDictConfig", None)
    return (
        isinstance(loader, staticmethod)
        and _takes(loader.__func__, _LOADER_TAKES)
        and settings is not None
        and inspect.signature(settings).parameters.keys() >= set(_SETTINGS)
    )


def _is_known(module: str, name: str, parameters: tuple[str, ...]) -> bool:
    try:
        found = getattr(importlib.import_module(f"transformers.{module}"), name, None)
    except ImportError:
        return False
    return callable(found) and (not parameters or _takes(found, parameters))


def _takes(function: Callable[..., Any], names: tuple[str, ...]) -> bool:
    """Return whether `function` takes arguments of these names in this order."""
    signature = inspect.signature(function)
    own = [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    try:
        signature.bind(*names)
    except TypeError:
        return False
    shared = min(len(own), len(names))
    return own[:shared] == list(names[:shared])


class Checkpoint(Protocol):
    """What stands in for the checkpoint of one model."""

    def provide(
        self, model, state_dict, checkpoint_files, load_config
    ) -> tuple[dict[str, Any] | None, list[str] | None]:
        """Return the state dict and the files to load instead.

        Called for every model that the class loads; may return what it was given.
        """


def reading(
    checkpoint: Checkpoint, auto_class: Any, model_class: type[PreTrainedModel], config
) -> Any:
    """Return an Auto class whose model is filled from what `checkpoint` provides.

    transformers has no hook at this place, but asks the class that it loads with for
    the method that fills a model. So it is shown a subclass that answers with another
    one. The model itself is of `model_class`, and no other load takes notice.

    Needs `unknown_loader` to be None.

    Args:
        checkpoint: What stands in for the files.
        auto_class: The Auto class to load with.
        model_class: The class that it chooses for `config`.
        config: The config to load with.

    Returns:
        The new class; `auto_class` itself if the model would not ask.
    """
    from transformers import PreTrainedModel

    loader = inspect.getattr_static(model_class, _LOADER, None)
    chooses = getattr(auto_class, "_model_mapping", None) is not None
    if not chooses or loader is not vars(PreTrainedModel)[_LOADER]:
        return auto_class

    # A class waits for the garbage collector; the model must not wait with it.
    checkpoint = weakref.proxy(checkpoint)

    def build(cls, *args, **kwargs):
        return model_class(*args, **kwargs)

    def load(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        state_dict, checkpoint_files = checkpoint.provide(
            model, state_dict, checkpoint_files, load_config
        )
        return getattr(model_class, _LOADER)(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )

    asking = _subclass(model_class, __new__=build, **{_LOADER: staticmethod(load)})
    return _subclass(auto_class, _model_mapping={type(config): asking})


def _subclass(base: type, **attributes: Any) -> type:
    """Derive a class that goes by the name of its base, which transformers asks for."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base)(base.__name__, (base,), {**names, **attributes})


def shares_weights_among_ranks() -> bool:
    """Return whether DeepSpeed ZeRO-3 spreads every weight over its processes."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


def in_order(keys: Iterable[str]) -> list[str]:
    """Sort checkpoint keys as transformers does, by number where they hold numbers."""
    from transformers.core_model_loading import dot_natural_key

    return sorted(keys, key=dot_natural_key)


def target_names(
    entries: Iterable[str],
    model: PreTrainedModel,
    load_config,
    remember: bool = False,
) -> dict[str, tuple[str, Any, str | None]]:
    """Map each checkpoint key to a parameter, the converter that leads there and its pattern.

    Args:
        entries: The keys.
        model: The model.
        load_config: The settings of the load.
        remember: Let its transforms know that they were used.
    """
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    # Transforms remember what they have seen, which must not be seen twice.
    transforms = load_config.weight_mapping or []
    if not remember:
        transforms = copy.deepcopy(transforms)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    state = model.state_dict()
    prefix = model.base_model_prefix
    names = {}
    for key in in_order(entries):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        converter = None if pattern is None else by_pattern[pattern]
        names[key] = (name, converter, pattern)
    return names


def may_be_missing(model: PreTrainedModel) -> list[str]:
    """Return patterns of the parameters that a checkpoint of `model` need not hold."""
    return list(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())


def may_be_superfluous(model: PreTrainedModel) -> list[str]:
    """Return patterns of the keys that a checkpoint of `model` may hold in vain."""
    return list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())


def uninitialised() -> contextlib.AbstractContextManager[Any]:
    """Build models without drawing their weights."""
    from transformers.initialization import no_init_weights

    return no_init_weights()


class Placement:
    """Where and in which dtype transformers will put the parameters of a model."""

    def __init__(self, load_config, model: PreTrainedModel):
        """Look at a model that is not filled yet.

        Args:
            load_config: The settings of the load; without a dtype, weights stay as
                they are stored.
            model: The model, on any device.
        """
        from transformers.core_model_loading import build_glob_alternation

        self._config = load_config
        self._model = model
        self._built = {
            name: tensor.dtype for name, tensor in model.state_dict().items()
        }
        self._plan = None
        if load_config.dtype_plan:
            self._plan = build_glob_alternation(list(load_config.dtype_plan))[:2]

    def device(self, parameter: str) -> torch.device:
        """Return the device of `parameter`."""
        from transformers.integrations.accelerate import get_device

        device_map = self._config.device_map or {"": "cpu"}
        return torch.device(get_device(device_map, parameter, valid_torch_device=True))

    def dtype(self, parameter: str) -> torch.dtype | None:
        """Return the dtype of `parameter`; None: as it is stored.

        That is the one its class keeps it in whatever was asked for, else the one
        it was built in, else the one asked for.
        """
        dtype: torch.dtype | None = self._config.dtype
        if dtype is None:
            return None
        if self._plan is not None:
            pattern, by_group = self._plan
            match = pattern.search(parameter)
            if match is not None and match.lastgroup is not None:
                return self._config.dtype_plan[by_group[match.lastgroup]]
        if self._will_be_quantised(parameter):
            return dtype
        return self._built.get(parameter, dtype)

    def _will_be_quantised(self, parameter: str) -> bool:
        quantiser = self._config.hf_quantizer
        return (
            quantiser is not None
            and not quantiser.pre_quantized
            and quantiser.param_needs_quantization(self._model, parameter)
        )
