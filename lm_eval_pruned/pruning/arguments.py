"""The arguments of pruning, declared once: names, defaults, help, and what is wrong with them.

`lm_eval_pruned.load_pruned` and `lm_eval_pruned.prune_model`, the model types, and the commands
``prune``, ``plan`` and ``sweep`` with its YAML file take them from the fields of
`PruneArguments`. Whatever needs a model to be checked is checked in
`lm_eval_pruned.pruning.plan`. Nothing here imports torch, transformers or the harness.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

from lm_eval_pruned.pruning.argument_values import (
    MEASURED,
    UNIFORM,
    criterion_names,
    dropped_layers,
    known_allocation,
    seed_below_limit,
    whole,
    written_source,
)
from lm_eval_pruned.pruning.criteria import BEST, CALIBRATED, canonical_name


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from lm_eval_pruned.pruning.argument_values import Layers, Number

    Function = TypeVar("Function", bound=Callable[..., Any])
    #: Kept widths by layer: a file, or what `lm_eval_pruned.pruning.argument_values` reads from one.
    LayerWidths = str | Path | Mapping[int, int] | Sequence[int | None]

#: Those that say how many neurons to keep.
SIZES = ("ratio", "prune_percent", "intermediate_size", "widths")
#: Those that say how much of the model goes: neurons, or layers.
CUTS = (*SIZES, "drop_layers")
#: Those of which only one may be given, by what each of them does.
EXCLUSIVE = {
    "sets the kept width": SIZES,
    "says which layers to prune": ("layers", "skip_layers"),
}
#: How a count of layers to drop chooses them: by their place, or by what they do to hidden states.
LAST, BLOCK_INFLUENCE = "last", "block_influence"
_ANY_SIZE, _SHARED = ", ".join(SIZES), ", ".join(SIZES[:-1])
_TEXT = ("calibration", "calibration_samples")


def _argument(metavar: str | None, about: str, default: Any = None, **more: Any) -> Any:
    """Declare an argument of pruning.

    Args:
        metavar: What stands for its value in ``--help``.
        about: What it means; the first sentence is its line for ``--help``.
        default: Its value where nobody gives one.
        **more: ``check`` takes the name and a value, and returns the value as it is kept;
            ``several`` is the option of commands that take several values, for one model each.
    """
    more |= {"metavar": metavar, "help": about}
    return field(default=default, metadata=more)


def _depth_rule(name: str, value: str) -> str:
    if value not in (LAST, BLOCK_INFLUENCE):
        raise ValueError(
            f"{name}={value} is no way to choose layers: pass {LAST} or {BLOCK_INFLUENCE}."
        )
    return value


@dataclass(frozen=True, kw_only=True)
class PruneArguments:
    """What a user asks for, checked as far as that needs no model; without a size, nothing.

    Whole numbers become integers, and `criterion` its name without aliases.

    Args:
        ratio, ...: The help of each field.

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

    ratio: Number | None = _argument(
        "R",
        "Expansion ratio to keep. That is intermediate size / hidden size, such as 2.0; the kept "
        "width is ``ceil(ratio * H)``.",
        several="ratios",
    )
    prune_percent: Number | None = _argument(
        "P",
        "Share of neurons to remove, in percent. The kept width is "
        "``I - floor(prune_percent / 100 * I)``.",
        several="prune_percents",
    )
    intermediate_size: Number | None = _argument("K", "Kept width, in neurons.")
    widths: LayerWidths | None = _argument(
        "FILE",
        'Kept width of each layer, as a JSON or CSV file. JSON such as ``{"0": 1200, "1": 900}``, '
        '``[1200, 900]`` or ``[{"layer": 0, "width": 1200}]``, or CSV with the columns layer and '
        "width; from Python also what such a file holds. Layers that it does not name keep their "
        "width. At most one of these four; without any the model stays as it is.",
        several="widths",
    )
    multiple_of: Number = _argument(
        "N",
        "Round the kept width down to a multiple of this, in neurons.",
        default=1,
        check=whole,
    )
    layers: Layers | None = _argument(
        None,
        "Layers to prune, such as 4-11; default: all. They count from 0: ``0,2-5`` or ``[0, 2]``, "
        "and ``0+2-5`` where a comma separates arguments. The others keep their width, so stock "
        "transformers can open the saved model only if its config holds widths per layer; this "
        "package always can.",
    )
    skip_layers: Layers | None = _argument(
        None, "Layers to leave as they are. Instead of `layers`."
    )
    drop_layers: Layers | None = _argument(
        "N",
        "Layers to leave out whole, as a count or as a list. Such as 4, chosen by `drop_by`, or "
        "``3+7-9``, ``[3]`` or ``[3, 7]``. The layers that stay are numbered anew from 0; `layers` "
        "and `skip_layers` go by the numbers of the unpruned model. With a size, the layers that "
        "stay are narrowed as well. See `lm_eval_pruned.pruning.depth`.",
        check=dropped_layers,
        several="drop_layers",
    )
    drop_by: str = _argument(
        "NAME",
        "How a count of `drop_layers` chooses. ``last`` keeps the last layer and drops those "
        "before it; ``block_influence`` drops those that change the hidden states of "
        "`calibration` text least.",
        default=LAST,
        check=_depth_rule,
    )
    allocation: str = _argument(
        "NAME",
        "How the neurons are shared among the layers. ``uniform`` cuts all alike; ``sensitivity`` "
        "takes from those whose cut raises the loss on `calibration` least; ``global`` ranks the "
        "neurons of all layers together. A size is the mean over the layers then: as many neurons "
        "stay in all as by ``uniform``. See `lm_eval_pruned.pruning.allocation`.",
        default=UNIFORM,
        check=known_allocation,
        several="allocations",
    )
    min_width: Number | None = _argument(
        "N",
        "Neurons to leave in each layer at least, where `allocation` is not uniform.",
        check=whole,
    )
    criterion: str = _argument(
        "NAME",
        "Importance score. One of ``maw`` (alias ``ppm``), ``max_abs``, ``l1``, ``l2``, ``vow``, "
        "``pon`` and ``random``, the calibrated ``maw_act`` and ``act``, or one that another "
        "package declares; see `lm_eval_pruned.pruning.criteria`. ``best`` takes for each layer "
        "the one of `criteria_tried` whose cut raises the loss on `calibration` least.",
        default="maw",
        check=lambda _, value: canonical_name(value, or_best=True),
        several="criteria",
    )
    criteria_tried: str | Iterable[str] | None = _argument(
        "NAMES",
        "Criteria that ``criterion=best`` chooses among, such as maw+act, which is the default.",
        check=criterion_names,
    )
    seed: Number = _argument(
        "N",
        "Seed of the criterion random.",
        default=0,
        check=seed_below_limit,
        several="seeds",
    )
    calibration: str | None = _argument(
        "FILE.jsonl",
        "JSON Lines file of text, for criteria that look at activations, for ``criterion=best``, "
        "``allocation=sensitivity`` and ``drop_by=block_influence``. See "
        "`lm_eval_pruned.pruning.calibration`; there is no default text.",
    )
    calibration_samples: Number | None = _argument(
        "N",
        "How many of its texts to use, from the first on; default: all.",
        check=whole,
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
        idle = _idle(vars(self))
        refusals = [
            why for n, why in idle.items() if getattr(self, n) != DECLARED[n].default
        ]
        for sentence in (*self._contradictions(), *refusals):
            raise ValueError(sentence)

    @property
    def size(self) -> tuple[str, Number] | None:
        """Name and value of the argument that says how many neurons to keep, if any."""
        given = ((name, getattr(self, name)) for name in SIZES)
        return next((size for size in given if size[1] is not None), None)

    @property
    def tried(self) -> tuple[str, ...]:
        """The criteria among which the loss decides; none where there is no choice."""
        named: Any = self.criteria_tried
        chooses = self.criterion == BEST and self.size is not None
        return (named or ("maw", "act")) if chooses else ()

    @property
    def measures_depth(self) -> bool:
        """Whether text decides which layers are dropped."""
        return self.drop_by == BLOCK_INFLUENCE

    def _contradictions(self) -> Iterator[str]:
        """Yield what is wrong with arguments that do not go together."""
        for purpose, names in EXCLUSIVE.items():
            given = [f"{n}={v}" for n in names if (v := getattr(self, n)) is not None]
            if len(given) > 1:
                yield (
                    f"{' and '.join(given)} were given together, but each of them {purpose}: "
                    "pass one."
                )
        widths = self.widths is not None and f"widths={written_source(self.widths)}"
        shared = self.allocation != UNIFORM and f"allocation={self.allocation}"
        best = self.criterion == BEST and "criterion=best"
        by_layer = [each for each in (widths, shared, best) if each]
        if self.drop_by != LAST and isinstance(self.drop_layers, tuple):
            yield (
                f"drop_by={self.drop_by} chooses layers to drop, but drop_layers names them "
                "itself: pass a count such as drop_layers=4, or leave it out."
            )
        if self.drop_layers is not None and by_layer:
            yield (
                f"drop_layers and {by_layer[0]} were given together, but the one numbers the "
                "layers anew and the other decides layer by layer: pass one of them, or "
                f"drop_layers with one of {_SHARED}."
            )
        why = _why_text(vars(self))
        if why is not None and self.calibration is None:
            yield (
                f"{why}, so it needs text to run on: pass calibration=FILE.jsonl, with text that "
                "is not part of the evaluation."
            )
        if self.criterion == BEST and self.allocation not in (UNIFORM, *MEASURED):
            yield (
                f"criterion=best and allocation={self.allocation} were given together, but the one "
                "compares losses and the other scores, which differ between criteria: name a "
                f"criterion, or pass allocation={' or '.join((UNIFORM, *MEASURED))}."
            )
        if widths and len(by_layer) > 1:
            yield (
                f"{by_layer[1]} and {widths} were given together, but each of them decides layer "
                f"by layer: pass one, or {by_layer[1]} with one of {_SHARED}."
            )
        for name in EXCLUSIVE["says which layers to prune"]:
            if widths and (value := getattr(self, name)) is not None:
                yield (
                    f"{name}={value} and {widths} were given together, but widths says itself "
                    "which layers to prune: leave out the others there."
                )


#: The arguments by name, in order.
DECLARED: dict[str, Field[Any]] = {each.name: each for each in fields(PruneArguments)}
#: Options that take several values of an argument, and the argument.
SEVERAL: dict[str, str] = {
    each.metadata["several"]: name
    for name, each in DECLARED.items()
    if "several" in each.metadata
}
#: Those of `SEVERAL` that take sizes.
SEVERAL_SIZES = {option: name for option, name in SEVERAL.items() if name in SIZES}


def _why_text(said: Mapping[str, Any]) -> str | None:
    """Return why the arguments need calibration text; None where they look at weights alone."""
    if said["criterion"] in CALIBRATED:
        return f"criterion={said['criterion']} looks at activations"
    if said["criterion"] == BEST:
        return "criterion=best measures losses"
    if said["allocation"] in MEASURED:
        return f"allocation={said['allocation']} measures losses"
    if said["drop_layers"] is not None and said["drop_by"] == BLOCK_INFLUENCE:
        return f"drop_by={said['drop_by']} compares hidden states"
    return None


def _idle(said: Mapping[str, Any]) -> dict[str, str]:
    """Return the arguments that say nothing beside the others, and a sentence on each."""
    found = {}
    if said["drop_layers"] is None:
        found["drop_by"] = (
            f"drop_by={said['drop_by']} chooses layers to drop, but no count was given: pass a "
            "count such as drop_layers=4, or leave it out."
        )
    if _why_text(said) is None:
        for name in _TEXT:
            found[name] = (
                f"{name}={said[name]} was given, but criterion={said['criterion']} looks at "
                f"weights alone: leave it out, or pass criterion={' or '.join(CALIBRATED)}."
            )
    if said["criterion"] != BEST:
        found["criteria_tried"] = (
            f"criteria_tried={'+'.join(said['criteria_tried'] or ())} names criteria to choose "
            f"among, but criterion={said['criterion']} leaves no choice: add criterion=best, or "
            "leave it out."
        )
    if said["allocation"] == UNIFORM:
        found["min_width"] = (
            f"min_width={said['min_width']} bounds what an allocation takes from a layer, but "
            "allocation=uniform cuts all alike: leave it out, or pass another allocation."
        )
    if all(said[name] is None for name in SIZES):
        for name in EXCLUSIVE["says which layers to prune"]:
            found[name] = (
                f"{name} says which layers to prune, but no size was asked for: add one of "
                f"{_ANY_SIZE}."
            )
        found["allocation"] = (
            f"allocation={said['allocation']} shares out the neurons to keep, but no size was "
            f"asked for: add one of {_SHARED}."
        )
        found["multiple_of"] = (
            f"multiple_of={said['multiple_of']} rounds a kept width, but none was asked for: add "
            f"one of {_ANY_SIZE}."
        )
    return found


def without_idle(given: dict[str, Any]) -> dict[str, Any]:
    """Return arguments without those that would say nothing, and be refused, beside the others.

    A sweep passes one set to all of its models, the baseline among them.

    Example:
        >>> without_idle({"dtype": "float32", "calibration": "a.jsonl", "multiple_of": 8})
        {'dtype': 'float32'}
    """
    told = dict(given)
    if all(given.get(name) is None for name in SIZES):
        for name in DECLARED.keys() - {*CUTS, "drop_by", *_TEXT}:
            told.pop(name, None)
    idle = _idle({name: each.default for name, each in DECLARED.items()} | told)
    return {name: value for name, value in told.items() if name not in idle}


def take_prune_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Take the arguments of pruning out of keyword arguments, unchecked."""
    own: dict[str, Any] = {}
    # From skip_layers=0,15 the harness makes {"skip_layers": 0, "15": ""}: such pieces
    # are taken too, for the list of layers that they follow.
    split = None
    for name in list(given):
        if name in DECLARED:
            own[name] = given.pop(name)
            if name.endswith("layers") and own[name] is not None:
                split = name
        elif split and given[name] == "" and re.fullmatch(r"\d+(-\d+)?[\])]?", name):
            before = own[split]
            own[split] = [*(before if type(before) is list else [before]), name]
            del given[name]
    return own


def add_option(parser: Any, name: str, *, several: bool = False) -> None:
    """Add the option of an argument to a command: ``ratio``, or, with `several`, ``ratios``."""
    declared = DECLARED[SEVERAL[name] if several else name]
    parser.add_argument(
        f"--{name}",
        metavar=declared.metadata["metavar"],
        help=help_of(name, several=several),
        **({"nargs": "+"} if several else {"default": declared.default}),
    )


def help_of(name: str, *, several: bool = False) -> str:
    """Return the line for ``--help`` of the option that `add_option` adds."""
    declared = DECLARED[SEVERAL[name] if several else name]
    text = declared.metadata["help"].partition(". ")[0].rstrip(".")
    if not text[:2].isupper():
        text = text[:1].lower() + text[1:]
    if declared.default is not None:
        text += f" (default: {declared.default})"
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
    function.__doc__ = described(function.__doc__ or "")
    return function


def described(docstring: str) -> str:
    """Return a docstring with the help of all arguments in place of its line ``ratio, ...:``."""
    filled = textwrap.TextWrapper(84, subsequent_indent="    ", break_on_hyphens=False)
    entries = (f"{name}: {each.metadata['help']}" for name, each in DECLARED.items())
    text = "\n".join(map(filled.fill, entries))
    line = re.compile(r"^( *)ratio, \.\.\.:.*$", re.MULTILINE)
    return line.sub(lambda found: textwrap.indent(text, found[1]), docstring)


PruneArguments.__doc__ = described(PruneArguments.__doc__ or "")
