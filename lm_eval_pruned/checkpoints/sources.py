"""Which keys of a checkpoint hold which projections of the GLU-MLPs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_eval_pruned.checkpoints.damage import check_entries
from lm_eval_pruned.checkpoints.route import RouteDeclined
from lm_eval_pruned.checkpoints.transformers_api import in_order, target_names
from lm_eval_pruned.pruning.layouts import GluMlp, regions_by_parameter


if TYPE_CHECKING:
    from collections.abc import Iterable


def find_sources(entries, model, mlps: Iterable[GluMlp], load_config):
    """Map checkpoint keys to the projections they hold.

    Returns:
        ``{key: [(mlp, (projection, part), region, source_region)]}``, where source_region
        is the part of the entry that is meant, None for all of it.

    Raises:
        RouteDeclined: Some projection is computed in a way not known here.
        ValueError: Two keys hold one projection.
    """
    places = regions_by_parameter(mlps)
    found: dict[str, list] = {}
    converted: dict[tuple[str, str], list[str]] = {}
    converters = {}
    first: dict[str, str] = {}
    names = target_names(entries, model, load_config)
    check_entries(
        entries,
        names,
        model,
        places,
        any_shape=load_config.is_quantized or load_config.ignore_mismatched_sizes,
    )
    for key in in_order(names):
        parameter, converter, pattern = names[key]
        if converter is not None and pattern is not None:
            targets = [
                parameter.replace(converter.target_patterns[0], target)
                for target in converter.target_patterns
            ]
            if places.keys() & {parameter, *targets}:
                converted.setdefault((parameter, pattern), []).append(key)
                converters[parameter] = converter
        elif parameter in places:
            if (other := first.setdefault(parameter, key)) != key:
                raise ValueError(
                    f"The checkpoint holds {other} and {key}, which are one parameter of this "
                    "model: remove the one that is not meant."
                )
            found[key] = [
                (mlp, place, region, None if region.is_whole else region)
                for mlp, place, region in places[parameter]
            ]
    for (parameter, pattern), keys in converted.items():
        found |= _converted_sources(
            parameter, pattern, keys, converters[parameter], places.get(parameter, [])
        )
    return found


def _converted_sources(
    parameter: str, pattern: str, keys: list[str], converter, places
):
    """Assign the sources that a converter stacks or concatenates to their regions."""
    steps = [
        (type(op).__name__, getattr(op, "dim", None)) for op in converter.operations
    ]
    merges = steps[:1] == [("MergeModulelist", 0)]
    concatenation = steps[1:] if merges else steps
    halves = len(converter.source_patterns)
    sizes = {region.expert for _, _, region in places}
    known = (
        len(converter.target_patterns) == 1
        and concatenation
        == ([] if halves == 1 else [("Concatenate", 1 if merges else 0)])
        and merges == (None not in sizes)
        and len(keys) == len(sizes)
        and len(places) == len(sizes) * halves
        and not any(region.transposed or region.interleaved for _, _, region in places)
    )
    if not known:
        raise RouteDeclined(f"transformers computes {parameter} from other tensors")
    half = converter.source_patterns.index(pattern)
    chosen = [place for place in places if halves == 1 or place[2].half == half]
    chosen.sort(key=lambda place: place[2].expert or 0)
    return {
        key: [(mlp, place, region, None)]
        for key, (mlp, place, region) in zip(keys, chosen, strict=True)
    }
