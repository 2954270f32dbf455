"""The arguments of pruning, declared once: names, defaults, help, and what is wrong with them.

Python, the model types, the commands and a sweep's YAML file take them from `PruneArguments`.
Nothing here imports torch, transformers or the harness.
"""

from __future__ import annotations

import re
from dataclasses import Field, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from lm_eval_pruned.pruning.argument_values import (
    ALLOCATIONS,
    LEAST_SQUARES,
    NO_REPAIR,
    REPAIRS,
    SENSITIVITY,
    UNIFORM,
    percent,
    seed_below_limit,
    whole,
    written_source,
)
from lm_eval_pruned.pruning.criteria import CALIBRATED, OBS, canonical_name
from lm_eval_pruned.util.options import DeclaredOptions, Row, option


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lm_eval_pruned.pruning.argument_values import Layers, Number

    #: Kept widths by layer: a file, or what `lm_eval_pruned.pruning.argument_values` reads from one.
    LayerWidths = str | Path | Mapping[int, int] | Sequence[int | None]

#: Those that say how many neurons to keep.
SIZES = ("ratio", "prune_percent", "intermediate_size", "widths")
#: Those of which only one may be given, by what each of them does.
EXCLUSIVE = {
    "sets the kept width": SIZES,
    "says which layers to prune": ("layers", "skip_layers", "widths"),
    "decides layer by layer": ("widths", "allocation"),
}
#: Those that have no effect without one of others.
NEEDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("layers", "skip_layers", "allocation"), SIZES[:-1]),
    "multiple_of": SIZES,
}
#: Those that say which text is calibrated on.
CALIBRATION = ("calibration", "calibration_samples", "calibration_tokens")

#: The recipe of arXiv 2512.22671, which is the default.
STUDY = "study"
#: What each recipe sets where the user does not; the others set besides what the first does.
RECIPES: dict[str, dict[str, str]] = {
    STUDY: {"criterion": "maw", "repair": NO_REPAIR, "allocation": UNIFORM},
    "fast": {"skip_layers": "0"},
    "best": {"criterion": OBS, "repair": LEAST_SQUARES},
}
RECIPES["uneven"] = RECIPES["best"] | {"allocation": SENSITIVITY}
#: The text that is calibrated on where none is named; `docs/criteria.md` says what it holds.
OWN_TEXT = Path(__file__).with_name("calibration_text.jsonl")


# `several` names the option of commands that takes several values, one model each; `text` has the
# values that need calibration text.
@dataclass(frozen=True, kw_only=True)
class PruneArguments(DeclaredOptions):
    """What a user asks for, checked as far as possible without a model.

    Whole numbers become integers, and `criterion` its name without aliases.

    Args:
        ratio: Expansion ratio to keep. For example 2.0; the kept width is ``ceil(ratio * H)``.
        prune_percent: Share of neurons to remove, in percent. The kept width is
            ``I - floor(prune_percent / 100 * I)``.
        intermediate_size: Kept width, in neurons.
        widths: Kept width of each layer, as a JSON or CSV file. JSON such as
            ``{"0": 1200, "1": 900}`` or ``[1200, 900]``, which Python may pass itself, or CSV with
            the columns layer and width. Layers that it does not name keep their width. Pass at most
            one of these four; without any, no neurons are removed.
        multiple_of: Round the kept width down to a multiple of this, in neurons.
        layers: Layers to prune, such as 4-11; default: all. They count from 0: ``0,2-5`` or
            ``[0, 2]``, and ``0+2-5`` where a comma separates arguments. Stock transformers opens
            the saved model only if its config holds widths per layer; this package always does.
        skip_layers: Layers not to prune. Instead of `layers`.
        allocation: How to distribute the cut over the layers; default: uniform, or that of the
            recipe. ``uniform`` removes the same share from every layer; ``sensitivity`` takes as
            many neurons in all, from the layers whose cut costs least on `calibration`. See
            `lm_eval_pruned.pruning.allocation`.
        recipe: Recipe for the cut: study, fast, best or uneven. It sets arguments that are not
            given: ``study`` sets ``criterion=maw``, as in arXiv 2512.22671; ``fast``, which reads
            no text, the same and ``skip_layers=0``; ``best`` sets ``criterion=obs`` and
            ``repair=least_squares``; ``uneven`` the same and ``allocation=sensitivity``.
        criterion: Importance score; default: maw, or that of the recipe. One of ``maw`` (alias
            ``ppm``), ``max_abs``, ``l1``, ``l2``, ``vow``, ``pon`` and ``random``, the calibrated
            ``maw_act``, ``act`` and ``obs``, or one that another package declares; see
            `lm_eval_pruned.pruning.criteria`.
        repair: How to compensate for removed neurons: none or least_squares; default: none,
            or that of the recipe. ``least_squares`` fits the down projections to the old output on
            `calibration` text. See `lm_eval_pruned.pruning.repair`.
        seed: Seed for the criterion random, and for ``calibration=self``.
        calibration: JSON Lines file, ``dataset:NAME``, ``dataset:NAME:CONFIG``, or ``self`` for what
            the unpruned model writes: text for criteria that look at activations, for `repair` and
            ``allocation=sensitivity``; default: text included in this package. See
            `lm_eval_pruned.pruning.calibration_text`.
        calibration_samples: Number of its texts to use, the first ones; default: all.
        calibration_tokens: Read no more texts after this many tokens; default: all of a file,
            40000 of a dataset or of ``self``.

    Raises:
        ValueError: One sentence naming an argument, its value and what would work.

    Example:
        >>> PruneArguments(prune_percent=40, criterion="ppm").criterion
        'maw'
    """

    ratio: Number | None = option(object, None, "R", several="ratios")
    prune_percent: Number | None = option(
        object, None, "P", check=percent, several="prune_percents"
    )
    intermediate_size: Number | None = option(object, None, "K")
    widths: LayerWidths | None = option(object, None, "FILE", several="widths")
    multiple_of: Number = option(object, 1, "N", check=whole)
    layers: Layers | None = option(object, None)
    skip_layers: Layers | None = option(object, None)
    allocation: str = option(
        object,
        None,
        "NAME",
        choices=ALLOCATIONS,
        several="allocations",
        text=(SENSITIVITY,),
    )
    recipe: str = option(
        object, STUDY, "NAME", choices=tuple(RECIPES), several="recipes"
    )
    criterion: str = option(
        object,
        None,
        "NAME",
        check=lambda _, value: canonical_name(value),
        several="criteria",
        text=CALIBRATED,
    )
    repair: str = option(
        object,
        None,
        "NAME",
        choices=REPAIRS,
        several="repairs",
        text=(LEAST_SQUARES,),
    )
    seed: Number = option(object, 0, "N", check=seed_below_limit, several="seeds")
    calibration: str | None = option(object, None, "TEXT")
    calibration_samples: Number | None = option(object, None, "N", check=whole)
    calibration_tokens: Number | None = option(object, None, "N", check=whole)

    def __post_init__(self) -> None:
        self._settle(**with_recipe(vars(self)))
        super().__post_init__()
        written = _written(vars(self))
        for purpose, names in EXCLUSIVE.items():
            if len(several := [written[n] for n in names if n in written]) > 1:
                raise ValueError(
                    f"{' and '.join(several)} were given together, but each of them {purpose}: pass "
                    "one."
                )
        for sentence in _idle(vars(self)).values():
            raise ValueError(sentence)
        text = self.size is not None and _needs_text(vars(self))
        if self.calibration is None and text:
            self._settle(calibration=str(OWN_TEXT))

    @property
    def size(self) -> tuple[str, Number] | None:
        """Name and value of the argument that says how many neurons to keep, if any."""
        sizes = [(n, v) for n in SIZES if (v := getattr(self, n)) is not None]
        return sizes[0] if sizes else None

    @property
    def layer_by_layer(self) -> bool:
        """Whether layers are cut one after the other, on what text does in those before."""
        return self.size is not None and (
            self.criterion == OBS or self.repair != NO_REPAIR
        )


#: The arguments by name, in order.
DECLARED: dict[str, Field[Any]] = PruneArguments.declared()
#: Options that take several values of an argument, and the argument.
SEVERAL: dict[str, str] = {
    o.metadata["several"]: n for n, o in DECLARED.items() if "several" in o.metadata
}
#: Those of `SEVERAL` that take sizes.
SEVERAL_SIZES = {option: name for option, name in SEVERAL.items() if name in SIZES}


class PruneKeywords(TypedDict, total=False):
    """The arguments of `PruneArguments`, for functions that take them by name."""

    ratio: Number | None
    prune_percent: Number | None
    intermediate_size: Number | None
    widths: LayerWidths | None
    multiple_of: Number
    layers: Layers | None
    skip_layers: Layers | None
    allocation: str
    recipe: str
    criterion: str
    repair: str
    seed: Number
    calibration: str | None
    calibration_samples: Number | None
    calibration_tokens: Number | None


def with_recipe(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments completed by their recipe."""
    row = RECIPES[STUDY] | RECIPES.get(str(values["recipe"]), {})
    sizes = [name for name in SIZES if values[name] is not None]
    if sizes in ([], ["widths"]):
        # There is nothing to share.
        row["allocation"] = UNIFORM
        row.pop("skip_layers", None)
    if values["layers"] is not None:
        row.pop("skip_layers", None)
    return {n: row.get(n) if value is None else value for n, value in values.items()}


def _needs_text(values: Mapping[str, Any]) -> bool:
    """Return whether arguments look at more than weights."""
    return any(
        values[name] in declared.metadata.get("text", ())
        for name, declared in DECLARED.items()
    )


def _written(values: Mapping[str, Any]) -> dict[str, str]:
    """Return those of some arguments that are not at their default, as ``name=value``."""
    usual = {name: declared.default for name, declared in DECLARED.items()}
    usual |= RECIPES[STUDY]
    chosen = {
        name: value
        for name in DECLARED
        if (value := values[name]) not in (None, usual[name])
    }
    if "widths" in chosen:
        chosen["widths"] = written_source(chosen["widths"])
    return {name: f"{name}={value}" for name, value in chosen.items()}


def _idle(values: Mapping[str, Any]) -> dict[str, str]:
    """Return a sentence on each argument that has no effect beside the others, by its name."""
    written, idle = _written(values), {}
    for name, others in NEEDS.items():
        if name in written and all(values[other] is None for other in others):
            idle[name] = (
                f"{written[name]} has no effect without {' or '.join(others)}: add one, or leave "
                "it out."
            )
    for name in CALIBRATION:
        if name in written and not _needs_text(values):
            idle[name] = (
                f"{written[name]} was given, but criterion={values['criterion']} reads only "
                f"weights: leave it out, or pass criterion={' or '.join(CALIBRATED)}."
            )
    return idle


def without_idle(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments without those that have no effect beside the others, and would be refused.

    A sweep passes one set to all of its models, including the baseline.

    Example:
        >>> without_idle({"dtype": "float32", "calibration": "a.jsonl", "multiple_of": 8})
        {'dtype': 'float32'}
    """
    if all(arguments.get(name) is None for name in SIZES):
        return {n: value for n, value in arguments.items() if n not in DECLARED}
    defaults = {name: declared.default for name, declared in DECLARED.items()}
    idle = _idle(
        with_recipe(
            {name: arguments.get(name, value) for name, value in defaults.items()}
        )
    )
    return {name: value for name, value in arguments.items() if name not in idle}


def take_prune_arguments(keywords: dict[str, Any]) -> dict[str, Any]:
    """Take the arguments of pruning out of keyword arguments, unchecked, and leave the others there."""
    taken: dict[str, Any] = {}
    last = ""
    for name in list(keywords):
        if name in DECLARED:
            taken[name] = keywords.pop(name)
            last = name if name.endswith("layers") else last
        # From skip_layers=0,15 the harness makes {"skip_layers": 0, "15": ""}.
        elif last and keywords[name] == "" and re.fullmatch(r"\d+(-\d+)?[\])]?", name):
            before = taken[last]
            taken[last] = [*(before if isinstance(before, list) else [before]), name]
            del keywords[name]
    return taken


def option_row(name: str, *, several: bool = False) -> Row:
    """Return the row of a command's option: ``ratio``, or, with `several`, ``ratios``."""
    if not several:
        return PruneArguments.row(name)
    _, how = PruneArguments.row(SEVERAL[name])
    about = f"{how['help']}; one model each"
    return f"--{name}", how | {"help": about, "nargs": "+"}
