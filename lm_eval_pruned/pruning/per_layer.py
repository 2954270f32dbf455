"""Widths of single layers in a config: read in the forms that there are, written in one.

The form that is written is ``per_layer_config``, a sparse map from a layer to what differs
there. transformers 5.24 knows it, older releases keep it as it is, and so far no class of
transformers builds its MLPs from it.

``block_configs`` are read as well; see `lm_eval_pruned.pruning.block_configs`.

Source: `transformers.integrations.heterogeneity`.
"""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.pruning.block_configs import BLOCKS, widths_of_blocks
from lm_eval_pruned.pruning.layouts import UnsupportedModelError


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PretrainedConfig

    #: What single layers have of their own: by layer, by name of a key.
    Overrides = dict[int, dict[str, Any]]

#: Names of keys that may set a width.
WIDTH_NAME = re.compile(r"intermediate|ffn|ff_dim|d_ff|mlp_(dim|size|hidden)|ff_size")

_LAYERS = "per_layer_config"


def without_layers(
    config: PretrainedConfig,
) -> tuple[PretrainedConfig, dict[tuple[tuple[str, ...], str, int], int]]:
    """Take the widths of single layers out of a config.

    Args:
        config: Any config.

    Returns:
        A copy without them, and the widths by path of the sub-config, key and layer.

    Raises:
        UnsupportedModelError: Its layers differ in more than their widths.
    """
    plain = copy.deepcopy(config)
    found: dict[tuple[tuple[str, ...], str, int], int] = {}
    for path, part in _parts(plain):
        own = _of_blocks(part)
        others: Overrides = {}
        for layer, overrides in _overrides(part).items():
            for name, value in overrides.items():
                is_width = WIDTH_NAME.search(name) and type(value) is int
                kind = own if is_width else others
                kind.setdefault(layer, {})[name] = value
        if not own:
            continue
        _write(part, others)
        for layer, widths in own.items():
            found |= {(path, name, layer): width for name, width in widths.items()}
    return plain, found


def with_layers(
    config: PretrainedConfig,
    widths: Mapping[tuple[tuple[str, ...], str, int], int],
) -> PretrainedConfig:
    """Return a copy of a config with widths of single layers.

    Args:
        config: A config as `without_layers` returns it.
        widths: As `without_layers` returns them; those that the config has for all
            layers are left out.

    Raises:
        ValueError: The config counts no such layer.
    """
    described = copy.deepcopy(config)
    for path, part in list(_parts(described)):
        overrides = _overrides(part)
        for (owner, name, layer), width in widths.items():
            if owner == path and vars(part).get(name) != width:
                overrides.setdefault(layer, {})[name] = width
        if overrides:
            _write(part, overrides)
    return described


def copy_layers(source: PretrainedConfig, target: PretrainedConfig) -> None:
    """Give `target` what the single layers of `source` have of their own."""
    parts = dict(_parts(target))
    for path, part in _parts(source):
        if path in parts:
            vars(parts[path]).pop(BLOCKS, None)
            _write(parts[path], _overrides(part))


def renumber_layers(config: PretrainedConfig, new: Mapping[int, int]) -> None:
    """Keep of ``per_layer_config`` what is about the layers of `new`, by their new numbers."""
    if overrides := _overrides(config):
        _write(config, {new[n]: own for n, own in overrides.items() if n in new})


def _parts(
    config: PretrainedConfig, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], PretrainedConfig]]:
    from transformers import PretrainedConfig

    yield path, config
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from _parts(value, (*path, name))


def _knows_layers(config: PretrainedConfig) -> bool:
    """Return whether transformers has an opinion of its own on ``per_layer_config``."""
    return isinstance(getattr(type(config), _LAYERS, None), property)


def _overrides(config: PretrainedConfig) -> Overrides:
    if _knows_layers(config):
        differs = config.is_heterogeneous  # type: ignore[attr-defined]
        written = config.to_dict().get(_LAYERS) if differs else None
    else:
        written = vars(config).get(_LAYERS)
    if not isinstance(written, dict):
        return {}
    try:
        return {int(layer): dict(own) for layer, own in written.items()}
    except (TypeError, ValueError):
        raise UnsupportedModelError(
            f"{_LAYERS} in the config is no map from layers to what differs there: correct it."
        ) from None


def _write(config: PretrainedConfig, overrides: Overrides) -> None:
    if _knows_layers(config):
        # The setter looks at what is there already.
        config.per_layer_config = None  # type: ignore[attr-defined]
    vars(config).pop(_LAYERS, None)
    if overrides:
        written = {str(layer): own for layer, own in sorted(overrides.items())}
        setattr(config, _LAYERS, written)


def _of_blocks(config: PretrainedConfig) -> Overrides:
    """Take ``block_configs`` out of a config and return the widths that they set."""
    blocks = vars(config).pop(BLOCKS, None)
    hidden, heads = (
        getattr(config, name, None) for name in ("hidden_size", "num_attention_heads")
    )
    groups = getattr(config, "num_key_value_heads", heads)
    try:
        found = widths_of_blocks(
            blocks, hidden, heads, groups, f"{BLOCKS} in the config"
        )
    except ValueError as error:
        raise UnsupportedModelError(str(error)) from None
    return {layer: {"intermediate_size": width} for layer, width in found.items()}
