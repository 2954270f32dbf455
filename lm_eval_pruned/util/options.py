"""Options that the fields of a dataclass declare once, for a command, a YAML file and Python."""

from __future__ import annotations

import difflib
import inspect
import json
import re
from dataclasses import MISSING, Field, field, fields
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Mapping

_EXPECTED = {
    str: "a name",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "a mapping, or text such as key=value,key=value",
}


def option(kind: Any, default: Any, metavar: str | None = None, **bounds: Any) -> Any:
    """Declare an option, as a field of a `DeclaredOptions`.

    Args:
        kind: What a value must be: str, int, float, bool for a flag, or dict for a mapping; or a
            function that converts it, with `expected`, what to say of a value that it refuses.
        default: The value where nobody gives one; of an option that takes several, a tuple.
        metavar: What stands for the value in ``--help``.
        **bounds: ``least``, the smallest number; ``choices``, all values; ``help``, in place of
            the docstring; ``nargs`` of argparse, where ``?`` makes the value optional.
    """
    shown = {"kind": kind, "metavar": metavar, **bounds}
    if kind is dict:
        return field(default_factory=dict, metadata=shown)
    return field(default=default, metadata=shown)


class DeclaredOptions:
    """A dataclass with fields that `option` declares, and perhaps others.

    The first sentence on an option, under ``Args`` in the docstring of the dataclass, is its line
    for ``--help``.

    Raises:
        ValueError: A value is out of the bounds of its option.
    """

    def __post_init__(self) -> None:
        for name, each in self.declared().items():
            least, choices = map(each.metadata.get, ("least", "choices"))
            value = getattr(self, name)
            for one in value if isinstance(value, tuple) else (value,):
                if choices is not None and one not in choices:
                    known = ", ".join(choices)
                    raise ValueError(f"{name}={one} is unknown: pass one of {known}.")
                if None not in (least, one) and one < least:
                    raise ValueError(
                        f"{name}={one} is too small: pass {least} or more."
                    )

    @classmethod
    def declared(cls) -> dict[str, Field[Any]]:
        """Return the options by name."""
        return {each.name: each for each in fields(cls) if "kind" in each.metadata}  # type: ignore[arg-type]

    @classmethod
    def add_to(cls, parser: Any, names: Iterable[str] | None = None) -> None:
        """Add the options, or those of `names`, to a command; one that is not given is None."""
        explained = inspect.cleandoc(cls.__doc__ or "").partition("Args:\n")[2]
        declared = cls.declared()
        for name, each in [(name, declared[name]) for name in names or declared]:
            found = re.search(rf"(?m)^ +{name}: ((?s:.*?))\.(?:\s|\Z)", explained)
            about, default = " ".join(found[1].split()) if found else "", each.default
            about = about[:1].lower() + about[1:]
            several = isinstance(default, tuple)
            if default is not MISSING and default is not None and default is not False:
                values = map(str, default if several else [default])
                about += f" (default: {', '.join(values)})"
            about = each.metadata.get("help", about)
            if each.metadata["kind"] is bool:
                how: dict[str, Any] = {"action": "store_true", "default": None}
            else:
                nargs = each.metadata.get("nargs") or ("+" if several else None)
                how = {"metavar": each.metadata["metavar"], "nargs": nargs}
                how["const"] = True if nargs == "?" else None
            parser.add_argument(f"--{name}", help=about, **how)

    @classmethod
    def parsed(cls, arguments: argparse.Namespace) -> dict[str, Any]:
        """Return the options that were given to a command."""
        every = {name: getattr(arguments, name) for name in cls.declared()}
        return {name: value for name, value in every.items() if value is not None}

    @classmethod
    def of(cls, given: Mapping[str, Any], where: str, **others: Any) -> Any:
        """Make one of the options that a mapping holds, as a command or YAML has them.

        Args:
            given: Values by the names of the options, or texts that spell them.
            where: What holds them, for messages.
            **others: Fields that are no options, as they are.

        Raises:
            ValueError: A name is unknown, or a value of no use.
        """
        known, values = cls.declared(), {}
        for name, value in given.items():
            if name not in known:
                hint = nearest(str(name), known)
                raise ValueError(f"{where} has the unknown key {name}: {hint}")
            kind = known[name].metadata["kind"]
            several = isinstance(known[name].default, tuple)
            try:
                values[name] = (
                    tuple(_converted(kind, each) for each in value)
                    if several
                    else _converted(kind, value)
                )
            except (TypeError, ValueError, OSError):
                expected = known[name].metadata.get("expected") or _EXPECTED[kind]
                raise ValueError(
                    f"{where} has {name}={value}: pass {expected}."
                ) from None
        return cls(**values, **others)


def nearest(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """Return advice on an unknown name: the known one that it resembles, else `otherwise` or all."""
    every = list(known)
    near = difflib.get_close_matches(name, every, n=1)
    if near:
        return f"did you mean {near[0]}?"
    return otherwise or f"known: {', '.join(every)}."


def merged(model_args: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return both, and raise ValueError for an argument that is in both."""
    for name in options.keys() & model_args.keys():
        raise ValueError(
            f"{name} was given twice, as --{name} {options[name]} and as "
            f"{name}={model_args[name]} in --model_args: leave one of them out."
        )
    return {**model_args, **options}


def _converted(kind: Any, value: Any) -> Any:
    """Return a value as its option has it, or raise TypeError or ValueError."""
    if kind not in _EXPECTED:
        return kind(value)
    if kind is dict:
        from lm_eval.utils import handle_arg_string, simple_parse_args_string

        if isinstance(value, str) and not value.lstrip().startswith("{"):
            return simple_parse_args_string(value)
        every = dict(json.loads(value) if isinstance(value, str) else value)
        # YAML takes 1e-4 for a text.
        return {
            str(name): handle_arg_string(each) if isinstance(each, str) else each
            for name, each in every.items()
        }
    if isinstance(value, bool) is not (kind is bool):
        raise TypeError
    if kind is int and isinstance(value, float):
        raise TypeError
    return kind(value)
