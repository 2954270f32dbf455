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

from lm_eval_pruned.pruning.allocations import (
    MEASURED,
    UNIFORM,
    canonical_allocation,
)
from lm_eval_pruned.pruning.criteria import BEST, CALIBRATED, canonical_name
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

#: Seeds are below this: with the number of the layer, one has to fit into 63 bits.
SEEDS = 1 << 43


def exact(name: str, value: Number, example: str) -> Fraction:
    """Return `value` as the rational number that its decimal notation denotes."""
    from fractions import Fraction

    try:
        text = str(value).strip()
        # 10 ** exponent is computed in full, so an absurd exponent would hang.
        if isinstance(value, bool) or re.search(r"[eE][+-]?\d{4}", text):
            raise ValueError
        return Fraction(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(
            f"{name}={value} is not a finite number: pass one such as {name}={example}."
        ) from None


def _whole(name: str, value: Number, at_least: int) -> int:
    """Return `value` as a whole number."""
    number = exact(name, value, str(max(at_least, 1)))
    if number.denominator != 1 or number < at_least:
        raise ValueError(
            f"{name}={value} is not a whole number of {at_least} or more: "
            f"pass one such as {name}={max(at_least, 1)}."
        )
    return int(number)


def _seed(name: str, value: Number) -> int:
    seed = _whole(name, value, at_least=0)
    if seed >= SEEDS:
        raise ValueError(
            f"{name}={value} is too large for a generator: pass one below {SEEDS}."
        )
    return seed


def _whole_from_1(name: str, value: Number) -> int:
    return _whole(name, value, at_least=1)


def _criterion(name: str, value: str) -> str:
    return canonical_name(value, or_best=True)


def _criteria(name: str, value: str | Iterable[str]) -> tuple[str, ...]:
    """Return the criteria that text such as ``maw+act`` names, each once."""
    words = [value] if isinstance(value, str) else [*value]
    written = [part for word in words for part in re.split(r"[+,;\s]+", word) if part]
    if not written:
        raise ValueError(
            f"{name}={value} names no criterion: pass some such as {name}=maw+act."
        )
    return tuple(dict.fromkeys(map(canonical_name, written)))


def _allocation(name: str, value: str) -> str:
    return canonical_allocation(value)


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
        allocation: How the neurons are shared among the layers. ``uniform`` cuts all
            alike; ``sensitivity`` takes from those whose cut raises the loss on
            `calibration` least; ``global`` ranks the neurons of all layers together; or
            one that another package declares. A size is the mean over the layers then:
            as many neurons stay in all as by ``uniform``. See
            `lm_eval_pruned.pruning.allocations`.
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
            ``criterion=best`` and for ``allocation=sensitivity``.
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
        default=1, metadata={"metavar": "N", "check": _whole_from_1}
    )
    layers: Layers | None = None
    skip_layers: Layers | None = None
    allocation: str = field(
        default=UNIFORM,
        metadata={"metavar": "NAME", "check": _allocation, "several": "allocations"},
    )
    min_width: Number | None = field(
        default=None, metadata={"metavar": "N", "check": _whole_from_1}
    )
    criterion: str = field(
        default="maw",
        metadata={"metavar": "NAME", "check": _criterion, "several": "criteria"},
    )
    criteria_tried: str | Iterable[str] | None = field(
        default=None, metadata={"metavar": "NAMES", "check": _criteria}
    )
    seed: Number = field(
        default=0, metadata={"metavar": "N", "check": _seed, "several": "seeds"}
    )
    calibration: str | None = field(default=None, metadata={"metavar": "FILE.jsonl"})
    calibration_samples: Number | None = field(
        default=None, metadata={"metavar": "N", "check": _whole_from_1}
    )

    @classmethod
    def taken_from(cls, given: dict[str, Any]) -> PruneArguments:
        """Take the arguments of pruning out of keyword arguments, and leave the others there.

        From ``skip_layers=0,15`` the harness makes ``{"skip_layers": 0, "15": ""}``; such
        pieces are taken too.
        """
        own = {name: given.pop(name) for name in DECLARED if name in given}
        pieces = [
            name
            for name, value in given.items()
            if value == "" and re.fullmatch(r"\d+(-\d+)?[\])]?", name)
        ]
        for name in ("layers", "skip_layers"):
            if own.get(name) is not None and pieces:
                own[name] = [own[name], *pieces]
                for piece in pieces:
                    del given[piece]
                break
        return cls(**own)

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

    def _check_calibration(self) -> None:
        why = None
        if self.criterion in CALIBRATED:
            why = f"criterion={self.criterion} looks at activations"
        elif self.criterion == BEST:
            why = "criterion=best measures losses"
        elif self.allocation in MEASURED:
            why = f"allocation={self.allocation} measures losses"
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
#: Among what ``criterion=best`` chooses, if nothing else is named.
DEFAULT_TRIED = ("maw", "act")
#: Those of which only one may be given, by what each of them does.
EXCLUSIVE = {
    "sets the kept width": SIZES,
    "says which layers to prune": ("layers", "skip_layers"),
}
#: Options that take several values of an argument, and the argument.
SEVERAL = {
    each.metadata["several"]: name
    for name, each in DECLARED.items()
    if "several" in each.metadata
}
#: Those of `SEVERAL` that take sizes.
SEVERAL_SIZES = {option: name for option, name in SEVERAL.items() if name in SIZES}


def without_idle(given: dict[str, Any]) -> dict[str, Any]:
    """Return arguments without those that would say nothing, and be refused, beside the others.

    A sweep passes one set to all of its models, the baseline among them.

    Example:
        >>> without_idle({"dtype": "float32", "calibration": "a.jsonl", "multiple_of": 8})
        {'dtype': 'float32'}
    """
    criterion = given.get("criterion", PruneArguments.criterion)
    allocation = given.get("allocation", PruneArguments.allocation)
    idle: set[str] = set()
    if all(given.get(name) is None for name in SIZES):
        idle |= DECLARED.keys() - SIZES
    if criterion != BEST:
        idle |= {"criteria_tried"}
    if allocation == UNIFORM:
        idle |= {"min_width"}
    if criterion not in (BEST, *CALIBRATED) and allocation not in MEASURED:
        idle |= {"calibration", "calibration_samples"}
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
