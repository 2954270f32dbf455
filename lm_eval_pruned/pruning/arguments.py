"""The arguments of pruning, declared once: names, defaults, help, and what is wrong with them.

`lm_eval_pruned.load_pruned` and `lm_eval_pruned.prune_model`, the model types, and the commands
``prune``, ``plan`` and ``sweep`` with its YAML file take them from `PruneArguments`. Whatever
needs a model to be checked is checked in `lm_eval_pruned.pruning.plan`. Nothing here imports
torch, transformers or the harness.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

from lm_eval_pruned.pruning.allocation_names import MEASURED, UNIFORM
from lm_eval_pruned.pruning.argument_checks import (
    BLOCK_INFLUENCE,
    LAST,
    allocation_name,
    criterion_name,
    criterion_names,
    depth_rule,
    dropped_layers,
    seed_below_limit,
    whole_from_1,
)
from lm_eval_pruned.pruning.criteria import BEST, CALIBRATED
from lm_eval_pruned.pruning.layer_widths import written_source


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from fractions import Fraction
    from pathlib import Path

    Function = TypeVar("Function", bound=Callable[..., Any])

    Number = int | float | str | Fraction
    #: Layers as the user writes them: ``4-11``, ``0,15``, 3 or a list of such.
    Layers = int | str | Iterable[int | str]
    #: Kept widths by layer: a file, or what `lm_eval_pruned.pruning.layer_widths` reads from one.
    LayerWidths = str | Path | Mapping[int, int] | Sequence[int | None]


@dataclass(frozen=True, kw_only=True)
class PruneArguments:
    """What a user asks for, checked as far as that needs no model; without a size, nothing.

    Whole numbers become integers, and `criterion` its name without aliases. The first
    sentence of each argument is its line for ``--help``.

    Args:
        ratio: Expansion ratio to keep. That is intermediate size / hidden size, such as
            2.0; the kept width is ``ceil(ratio * H)``.
        prune_percent: Share of neurons to remove, in percent. The kept width is
            ``I - floor(prune_percent / 100 * I)``.
        intermediate_size: Kept width, in neurons.
        widths: Kept width of each layer, as a JSON or CSV file. JSON such as
            ``{"0": 1200, "1": 900}``, ``[1200, 900]`` or
            ``[{"layer": 0, "width": 1200}]``, or CSV with the columns layer and width;
            from Python also what such a file holds. Layers that it does not name keep
            their width. At most one of these four; without any the model stays as it is.
        multiple_of: Round the kept width down to a multiple of this, in neurons.
        layers: Layers to prune, such as 4-11; default: all. They count from 0: ``0,2-5``
            or ``[0, 2]``, and ``0+2-5`` where a comma separates arguments. The others
            keep their width, so stock transformers can open the saved model only if its
            config holds widths per layer; this package always can.
        skip_layers: Layers to leave as they are. Instead of `layers`.
        drop_layers: Layers to leave out whole, as a count or as a list. Such as 4, chosen by
            `drop_by`, or ``3+7-9``, ``[3]`` or ``[3, 7]``. The layers that stay are numbered
            anew from 0; `layers` and `skip_layers` go by the numbers of the unpruned model.
            With a size, the layers that stay are narrowed as well. See
            `lm_eval_pruned.pruning.depth`.
        drop_by: How a count of `drop_layers` chooses. ``last`` keeps the last layer and drops
            those before it; ``block_influence`` drops those that change the hidden states of
            `calibration` text least.
        allocation: How the neurons are shared among the layers. ``uniform`` cuts all
            alike; ``sensitivity`` takes from those whose cut raises the loss on
            `calibration` least; ``global`` ranks the neurons of all layers together; or
            one that another package declares. A size is the mean over the layers then:
            as many neurons stay in all as by ``uniform``. See
            `lm_eval_pruned.pruning.allocation`.
        min_width: Neurons to leave in each layer at least, where `allocation` is not
            uniform.
        criterion: Importance score. One of ``maw`` (alias ``ppm``), ``max_abs``, ``l1``,
            ``l2``, ``vow``, ``pon`` and ``random``, the calibrated ``maw_act`` and
            ``act``, or one that another package declares; see
            `lm_eval_pruned.pruning.criteria`. ``best`` takes for each layer the one of
            `criteria_tried` whose cut raises the loss on `calibration` least.
        criteria_tried: Criteria that ``criterion=best`` chooses among, such as maw+act,
            which is the default.
        seed: Seed of the criterion random.
        calibration: JSON Lines file of text, for criteria that look at activations, for
            ``criterion=best``, ``allocation=sensitivity`` and ``drop_by=block_influence``.
            See `lm_eval_pruned.pruning.calibration`; there is no default text.
        calibration_samples: How many of its texts to use, from the first on; default:
            all.

    Raises:
        ValueError: One sentence naming an argument, its value and what would work.

    Example:
        >>> PruneArguments(prune_percent=40, criterion="ppm").criterion
        'maw'
        >>> PruneArguments(ratio=2, prune_percent=40)
        Traceback (most recent call last):
            ...
        ValueError: ratio=2 and prune_percent=40 were given together, but each of them sets ...
    """

    # "several" is the option of a command that takes several values, for one model each.
    ratio: Number | None = field(
        default=None, metadata={"metavar": "R", "several": "ratios"}
    )
    prune_percent: Number | None = field(
        default=None, metadata={"metavar": "P", "several": "prune_percents"}
    )
    intermediate_size: Number | None = field(default=None, metadata={"metavar": "K"})
    widths: LayerWidths | None = field(
        default=None, metadata={"metavar": "FILE", "several": "widths"}
    )
    multiple_of: Number = field(
        default=1, metadata={"metavar": "N", "check": whole_from_1}
    )
    layers: Layers | None = None
    skip_layers: Layers | None = None
    drop_layers: Layers | None = field(
        default=None,
        metadata={"metavar": "N", "check": dropped_layers, "several": "drop_layers"},
    )
    drop_by: str = field(
        default=LAST, metadata={"metavar": "NAME", "check": depth_rule}
    )
    allocation: str = field(
        default=UNIFORM,
        metadata={
            "metavar": "NAME",
            "check": allocation_name,
            "several": "allocations",
        },
    )
    min_width: Number | None = field(
        default=None, metadata={"metavar": "N", "check": whole_from_1}
    )
    criterion: str = field(
        default="maw",
        metadata={"metavar": "NAME", "check": criterion_name, "several": "criteria"},
    )
    criteria_tried: str | Iterable[str] | None = field(
        default=None, metadata={"metavar": "NAMES", "check": criterion_names}
    )
    seed: Number = field(
        default=0,
        metadata={"metavar": "N", "check": seed_below_limit, "several": "seeds"},
    )
    calibration: str | None = field(default=None, metadata={"metavar": "FILE.jsonl"})
    calibration_samples: Number | None = field(
        default=None, metadata={"metavar": "N", "check": whole_from_1}
    )

    @classmethod
    def taken_from(cls, given: dict[str, Any]) -> PruneArguments:
        """Take the arguments of pruning out of keyword arguments, and leave the others there."""
        return cls(**take_prune_arguments(given))

    def __post_init__(self) -> None:
        for name, declared in DECLARED.items():
            check, value = declared.metadata.get("check"), getattr(self, name)
            if check is not None and (value, declared.default) != (None, None):
                object.__setattr__(self, name, check(name, value))
        for purpose, names in EXCLUSIVE.items():
            given = [f"{n}={v}" for n in names if (v := getattr(self, n)) is not None]
            if len(given) > 1:
                raise ValueError(
                    f"{' and '.join(given)} were given together, but each of them {purpose}: "
                    "pass one."
                )
        self._check_depth()
        self._check_calibration()
        self._check_allocation()
        for name in ("layers", "skip_layers"):
            if self.widths is not None and (value := getattr(self, name)) is not None:
                raise ValueError(
                    f"{name}={value} and widths={written_source(self.widths)} were given together, "
                    "but widths says itself which layers to prune: leave out the others there."
                )
        if self.size is not None:
            return
        for name in ("layers", "skip_layers"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name} says which layers to prune, but no size was asked for: add one of "
                    f"{', '.join(SIZES)}."
                )
        if self.allocation != UNIFORM:
            raise ValueError(
                f"allocation={self.allocation} shares out the neurons to keep, but no size was "
                f"asked for: add one of {', '.join(_SHARED)}."
            )
        if self.multiple_of != 1:
            raise ValueError(
                f"multiple_of={self.multiple_of} rounds a kept width, but none was asked for: "
                f"add one of {', '.join(SIZES)}."
            )

    @property
    def size(self) -> tuple[str, Number] | None:
        """Name and value of the argument that says how many neurons to keep, if any."""
        given = ((name, getattr(self, name)) for name in SIZES)
        return next((size for size in given if size[1] is not None), None)

    @property
    def tried(self) -> tuple[str, ...]:
        """The criteria among which the loss decides; none where there is no choice."""
        if self.criterion != BEST:
            return ()
        named: Any = self.criteria_tried
        return named or DEFAULT_TRIED

    @property
    def measures_depth(self) -> bool:
        """Whether text decides which layers are dropped."""
        return self.drop_by == BLOCK_INFLUENCE

    def _check_depth(self) -> None:
        """Refuse what contradicts the layers to drop."""
        dropped = self.drop_layers
        if self.drop_by != LAST and not isinstance(dropped, int):
            what = "no count was given"
            if dropped is not None:
                what = "drop_layers names them itself"
            raise ValueError(
                f"drop_by={self.drop_by} chooses layers to drop, but {what}: pass a count such as "
                "drop_layers=4, or leave it out."
            )
        if dropped is None:
            return
        for name, value in (
            ("widths", self.widths and written_source(self.widths)),
            ("allocation", self.allocation != UNIFORM and self.allocation),
            ("criterion", self.criterion == BEST and BEST),
        ):
            if value:
                raise ValueError(
                    f"drop_layers and {name}={value} were given together, but the one numbers the "
                    "layers anew and the other decides layer by layer: pass one of them, or "
                    f"drop_layers with one of {', '.join(_SHARED)}."
                )

    def _check_calibration(self) -> None:
        why = None
        if self.criterion in CALIBRATED:
            why = f"criterion={self.criterion} looks at activations"
        elif self.criterion == BEST:
            why = "criterion=best measures losses"
        elif self.allocation in MEASURED:
            why = f"allocation={self.allocation} measures losses"
        elif self.measures_depth:
            why = f"drop_by={self.drop_by} compares hidden states"
        if why is not None:
            if self.calibration is None:
                raise ValueError(
                    f"{why}, so it needs text to run on: pass calibration=FILE.jsonl, with text "
                    "that is not part of the evaluation."
                )
            return
        for name in ("calibration", "calibration_samples"):
            if (value := getattr(self, name)) is not None:
                raise ValueError(
                    f"{name}={value} was given, but criterion={self.criterion} looks at weights "
                    f"alone: leave it out, or pass criterion={' or '.join(CALIBRATED)}."
                )

    def _check_allocation(self) -> None:
        """Refuse what contradicts the allocation, or the choice of criteria."""
        if self.criteria_tried is not None and self.criterion != BEST:
            raise ValueError(
                f"criteria_tried={'+'.join(self.criteria_tried)} names criteria to choose among, "
                f"but criterion={self.criterion} leaves no choice: add criterion=best, or leave "
                "it out."
            )
        if self.criterion == BEST and self.allocation not in (UNIFORM, *MEASURED):
            raise ValueError(
                f"criterion=best and allocation={self.allocation} were given together, but the one "
                "compares losses and the other scores, which differ between criteria: name a "
                f"criterion, or pass allocation={' or '.join((UNIFORM, *MEASURED))}."
            )
        if self.min_width is not None and self.allocation == UNIFORM:
            raise ValueError(
                f"min_width={self.min_width} bounds what an allocation takes from a layer, but "
                "allocation=uniform cuts all alike: leave it out, or pass another allocation."
            )
        if self.widths is not None and (
            self.allocation != UNIFORM or self.criterion == BEST
        ):
            given = "criterion=best"
            if self.allocation != UNIFORM:
                given = f"allocation={self.allocation}"
            raise ValueError(
                f"{given} and widths={written_source(self.widths)} were given together, but each "
                f"of them decides layer by layer: pass one, or {given} with one of "
                f"{', '.join(_SHARED)}."
            )


#: The arguments by name, in order.
DECLARED: dict[str, Field[Any]] = {each.name: each for each in fields(PruneArguments)}
#: Those that say how many neurons to keep.
SIZES = ("ratio", "prune_percent", "intermediate_size", "widths")
#: Those that an allocation shares out among the layers.
_SHARED = SIZES[:-1]
#: Those that say which text is looked at.
_TEXT = ("calibration", "calibration_samples")
#: Among what ``criterion=best`` chooses, if nothing else is named.
DEFAULT_TRIED = ("maw", "act")
#: Those of which only one may be given, by what each of them does.
EXCLUSIVE = {
    "sets the kept width": SIZES,
    "says which layers to prune": ("layers", "skip_layers"),
}
#: Those that may be lists of layers.
_LISTS = (*EXCLUSIVE["says which layers to prune"], "drop_layers")
#: Options that take several values of an argument, and the argument.
SEVERAL = {
    each.metadata["several"]: name
    for name, each in DECLARED.items()
    if "several" in each.metadata
}
#: Those of `SEVERAL` that take sizes.
SEVERAL_SIZES = {option: name for option, name in SEVERAL.items() if name in SIZES}
#: Those that say how much of the model goes: neurons, or layers.
CUTS = (*SIZES, "drop_layers")


def take_prune_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Take the arguments of pruning out of keyword arguments, unchecked."""
    # From skip_layers=0,15 the harness makes {"skip_layers": 0, "15": ""}: such pieces
    # are taken too, for the list of layers that they follow.
    order = list(given)
    own = {name: given.pop(name) for name in DECLARED if name in given}
    lists = [name for name in _LISTS if own.get(name) is not None]
    for name in order if lists else ():
        if name in lists:
            lists.insert(0, lists.pop(lists.index(name)))
        elif given.get(name) == "" and re.fullmatch(r"\d+(-\d+)?[\])]?", name):
            del given[name]
            before = own[lists[0]]
            own[lists[0]] = [*(before if type(before) is list else [before]), name]
    return own


def without_idle(given: dict[str, Any]) -> dict[str, Any]:
    """Return arguments without those that would say nothing, and be refused, beside the others.

    A sweep passes one set to all of its models, the baseline among them.

    Example:
        >>> without_idle({"dtype": "float32", "calibration": "a.jsonl", "multiple_of": 8})
        {'dtype': 'float32'}
    """
    idle: set[str] = set()
    if all(given.get(name) is None for name in SIZES):
        idle |= DECLARED.keys() - {*CUTS, "drop_by", *_TEXT}
    if given.get("drop_layers") is None:
        idle |= {"drop_by"}
    told = {name: value for name, value in given.items() if name not in idle}
    criterion = told.get("criterion", PruneArguments.criterion)
    allocation = told.get("allocation", PruneArguments.allocation)
    if criterion != BEST:
        idle |= {"criteria_tried"}
    if allocation == UNIFORM:
        idle |= {"min_width"}
    by_text = allocation in MEASURED or told.get("drop_by") == BLOCK_INFLUENCE
    if criterion not in (BEST, *CALIBRATED) and not by_text:
        idle |= {*_TEXT}
    return {name: value for name, value in given.items() if name not in idle}


def add_option(parser: Any, name: str, *, several: bool = False) -> None:
    """Add the option of an argument, or of several of its values, to a command.

    Args:
        parser: An `argparse.ArgumentParser`, or a group of one.
        name: Such as ``ratio``; with `several`, such as ``ratios``.
        several: Whether it takes several values, for one model each.
    """
    declared = DECLARED[SEVERAL[name] if several else name]
    takes = {"nargs": "+"} if several else {"default": declared.default}
    parser.add_argument(
        f"--{name}",
        metavar=declared.metadata.get("metavar"),
        help=help_of(name, several=several),
        **takes,
    )


def help_of(name: str, *, several: bool = False) -> str:
    """Return the line for ``--help`` of the option that `add_option` adds."""
    argument = SEVERAL[name] if several else name
    entry = re.search(
        rf"^    {argument}: (.*(?:\n     .*)*)", _described(), re.MULTILINE
    )
    text = " ".join(entry[1].split()) if entry else ""
    text = text.partition(". ")[0].rstrip(".")
    if not text[:2].isupper():
        text = text[:1].lower() + text[1:]
    if (default := DECLARED[argument].default) is not None:
        text += f" (default: {default})"
    return f"{text}; one model each" if several else text


def takes_prune_arguments(function: Function) -> Function:
    """Show the arguments of pruning in the signature and the docstring of a function.

    In the signature they are the first to be passed by name, and stand for
    ``**prune_arguments``; in the docstring they stand for the line ``ratio, ...:``.
    """
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    if parameters[-1].name == "prune_arguments":
        parameters.pop()
    named = inspect.Parameter.KEYWORD_ONLY
    first = sum(each.kind < named for each in parameters)
    parameters[first:first] = [
        inspect.Parameter(name, named, default=each.default, annotation=each.type)
        for name, each in DECLARED.items()
    ]
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    if function.__doc__ is not None:
        function.__doc__ = described(function.__doc__)
    return function


def described(docstring: str) -> str:
    """Return a docstring with the arguments in place of its line ``ratio, ...:``."""
    return re.sub(
        r"^( *)ratio, \.\.\.:.*\n",
        lambda line: textwrap.indent(textwrap.dedent(_described()), line[1]),
        docstring,
        flags=re.MULTILINE,
    )


def _described() -> str:
    """Return what the docstring of `PruneArguments` says of them."""
    docstring = inspect.getdoc(PruneArguments) or ""
    return docstring.partition("Args:\n")[2].partition("\n\n")[0] + "\n"
