"""Widths in ``block_configs``, the list of blocks in configs of NVIDIA's Puzzletron and Nemotron-NAS.

Nothing here imports torch, transformers or the harness.

Source: `FFNConfig` and `AttentionConfig` of these models; that ``ffn_mult`` is turned into a
width as vLLM's ``nemotron_nas`` does it.
"""

from __future__ import annotations

from typing import Any


#: Name of the list in a config.
BLOCKS = "block_configs"
#: Widths that follow from ``ffn_mult`` are rounded up to a multiple of this, in neurons.
_MULTIPLE = 256


def widths_of_blocks(
    blocks: Any, hidden_size: Any, heads: Any, groups: Any, where: str
) -> dict[int, int]:
    """Return the width of each layer's MLP, of the layers whose block says one.

    Args:
        blocks: The list, its entries mappings or objects.
        hidden_size: Model width H, to which ``ffn_mult`` refers; None where it is not known.
        heads: Attention heads that all layers have; None where that is not known.
        groups: Heads of keys and values that all layers have.
        where: Names the list in an error.

    Raises:
        ValueError: Blocks differ in more than the widths of their MLPs, or an entry is no width.

    Example:
        >>> widths_of_blocks([{"ffn": {"ffn_mult": 1.3}}], 1024, 16, 8, "block_configs")
        {0: 1024}
    """
    if not isinstance(blocks, (list, tuple)):
        return {}
    found = {}
    for layer, block in enumerate(blocks):
        parts = _entries(block)
        ffn, attention = _entries(parts.get("ffn")), _entries(parts.get("attention"))
        for name in _odd(ffn, attention, heads, groups):
            raise ValueError(
                f"{where} gives layer {layer} {name} of its own, and models whose layers differ "
                "in more than the width of their MLPs are not supported: use one whose blocks "
                "differ in ffn.intermediate_size or ffn.ffn_mult alone."
            )
        if ffn.get("intermediate_size") is not None:
            found[layer] = int(_number("intermediate_size", ffn, layer, where, int))
        elif ffn.get("ffn_mult") is not None:
            share = _number("ffn_mult", ffn, layer, where, float)
            if type(hidden_size) is not int:
                raise ValueError(
                    f"{where} gives layer {layer} an ffn.ffn_mult, a multiple of a hidden_size "
                    "that stands nowhere: add hidden_size beside the blocks."
                )
            width = int(2 * share * hidden_size / 3)
            found[layer] = -(-width // _MULTIPLE) * _MULTIPLE
    return found


def _odd(
    ffn: dict[str, Any], attention: dict[str, Any], heads: Any, groups: Any
) -> list[str]:
    """Return what a block has besides a width of its own."""
    odd = []
    if type(heads) is int and type(groups) is int:
        same = {"num_key_value_heads": groups, "n_heads_in_group": heads // groups}
        odd = [
            f"attention.{name}"
            for name, usual in same.items()
            if attention.get(name) not in (None, usual)
        ]
    return odd + [
        f"{part}.{name}"
        for part, own in (("ffn", ffn), ("attention", attention))
        for name in ("no_op", "replace_with_linear")
        if own.get(name)
    ]


def _number(
    name: str, ffn: dict[str, Any], layer: int, where: str, kind: type
) -> int | float:
    value = ffn[name]
    if type(value) not in (int, kind) or not 0 < value < 10**9:
        raise ValueError(
            f"{where} has ffn.{name}={value!r:.40} in layer {layer}, which is no width: write a "
            "number above 0 there, whole where it is an intermediate_size."
        )
    return value


def _entries(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    return dict(getattr(value, "__dict__", {}))
