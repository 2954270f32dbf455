"""Options, declared once: as rows for a command, or as a dataclass for YAML and Python too."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from dataclasses import MISSING, Field, field, fields
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

#: Name and arguments of `argparse.ArgumentParser.add_argument`.
Row = tuple[str, dict[str, Any]]
#: What to say of a value that is not of a kind.
EXPECTED = {
    str: "a name",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "key=value pairs or a mapping",
}


def row(name: str, metavar: str | None, about: str | None, **how: Any) -> Row:
    """Declare an option of a command: its name, a placeholder for the value, and its line of help.

    An option whose `metavar` is empty is a flag. `how` is what argparse takes besides.
    """
    kind = {"action": "store_true"} if metavar == "" else {"metavar": metavar}
    return name, {"help": about, **kind, **how}


def add_options(parser: Any, rows: Iterable[Any]) -> None:
    """Add rows to a command: of a list of rows, one may be given; a function adds its own."""
    for item in rows:
        if isinstance(item, list):
            add_options(parser.add_mutually_exclusive_group(), item)
        elif callable(item):
            item(parser)
        else:
            parser.add_argument(item[0], **item[1])


def option(kind: Any, default: Any, metavar: str | None = None, **more: Any) -> Any:
    """Declare an option, as a field of a `DeclaredOptions`.

    Args:
        kind: What a value must be: str, int, float, bool or dict; or a function that converts it,
            with `expected`, what to say of a value that it refuses.
        default: The value where nobody gives one; of an option that takes several, a tuple.
        metavar: Placeholder for the value in ``--help``.
        **more: ``least`` value; ``choices``; ``check``, which returns what to keep of name and
            value; ``help``, in place of the docstring; ``nargs`` of argparse.
    """
    shown = {"kind": kind, "metavar": metavar, **more}
    if kind is dict:
        return field(default_factory=dict, metadata=shown)
    return field(default=default, metadata=shown)


class DeclaredOptions:
    """A dataclass with fields that `option` declares; values out of bounds raise ValueError.

    The first sentence on an option in the docstring of the dataclass is its line for ``--help``.
    """

    def __post_init__(self) -> None:
        for name, declared in self.declared().items():
            bounds, value = declared.metadata, getattr(self, name)
            if "check" in bounds and (value, declared.default) != (None, None):
                value = bounds["check"](name, value)
                self._settle(**{name: value})
            for one in value if isinstance(value, tuple) else (value,):
                if one not in bounds.get("choices", (one,)):
                    known = ", ".join(bounds["choices"])
                    raise ValueError(f"{name}={one} is unknown: pass one of {known}.")
                if "least" in bounds and one is not None and one < bounds["least"]:
                    raise ValueError(
                        f"{name}={one} is too small: pass {bounds['least']} or more."
                    )

    def _settle(self, **values: Any) -> None:
        """Put values in their canonical form, while the dataclass, which may be frozen, is made."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def declared(cls) -> dict[str, Field[Any]]:
        """Return the options by name."""
        every = fields(cls)  # type: ignore[arg-type]
        return {option.name: option for option in every if "kind" in option.metadata}

    @classmethod
    def row(cls, name: str) -> Row:
        """Return the row of an option, which is None where a command is not given it."""
        declared, how = cls.declared()[name], {"default": None}
        metadata = declared.metadata
        default: Any = declared.default
        several = isinstance(default, tuple)
        if nargs := metadata.get("nargs", "+" * several):
            how |= {"nargs": nargs} | ({"const": True} if nargs == "?" else {})
        about = metadata.get("help")
        if about is None:
            explained = (cls.__doc__ or "").partition("Args:\n")[2]
            line = re.search(rf"(?m)^ +{name}: ((?s:.*?))\.(?:\s|\Z)", explained)
            about = " ".join(line[1].split())  # type: ignore[index]
            if not about[:2].isupper():
                about = about[:1].lower() + about[1:]
            if not any(default is nothing for nothing in (MISSING, None, False)):
                values = map(str, default if several else [default])
                about += f" (default: {', '.join(values)})"
        metavar = "" if metadata["kind"] is bool else metadata["metavar"]
        return row(f"--{name}", metavar, about, **how)

    @classmethod
    def rows(cls) -> list[Row]:
        """Return the rows of all options."""
        return [*map(cls.row, cls.declared())]

    @classmethod
    def parsed(cls, arguments: Any) -> dict[str, Any]:
        """Return the options that were given to a command."""
        every = {name: getattr(arguments, name, None) for name in cls.declared()}
        return {name: value for name, value in every.items() if value is not None}

    @classmethod
    def of(cls, options: Mapping[str, Any], where: str, **others: Any) -> Any:
        """Make one of values by the names of options, or of texts that spell them.

        Raises:
            ValueError: A name in what the message calls `where` is unknown, or a value is
                unusable.
        """
        known, values = cls.declared(), {}
        for name, value in options.items():
            if name not in known:
                hint = nearest(str(name), known)
                raise ValueError(f"{where} has the unknown key {name}: {hint}")
            kind, several = known[name].metadata["kind"], known[name].default
            try:
                if isinstance(several, tuple):
                    values[name] = tuple(_converted(kind, item) for item in value)
                else:
                    values[name] = _converted(kind, value)
            except (TypeError, ValueError, OSError):
                wanted = known[name].metadata.get("expected") or EXPECTED[kind]
                raise ValueError(
                    f"{where} has {name}={value}: pass {wanted}."
                ) from None
        return cls(**values, **others)


def nearest(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """Return advice on an unknown name: the known one that it resembles, else `otherwise` or all."""
    if near := difflib.get_close_matches(name, every := list(known), n=1):
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


def mapping(value: Any) -> dict[str, Any]:
    """Return key=value pairs as in ``lm_eval run``, JSON, a mapping, or a list of these as one mapping.

    TypeError or ValueError for something else.
    """
    from lm_eval._cli.utils import key_val_to_dict

    if isinstance(value, list):
        return {k: v for item in value for k, v in mapping(item).items()}
    if isinstance(value, str):
        if value.lstrip().startswith("{"):
            return json.loads(value)
        return {k: _from_json(v) for k, v in key_val_to_dict(value).items()}
    return dict(value)


def _from_json(value: Any) -> Any:
    """Return what a text in braces holds: the harness reads Python there, which has no true, false and null."""
    if isinstance(value, str) and value.startswith(("{", "[")):
        with contextlib.suppress(ValueError):
            return json.loads(value)
    return value


def _converted(kind: Any, value: Any) -> Any:
    """Return a value as its option has it, or raise TypeError or ValueError."""
    if kind is dict:
        return mapping(value)
    cut_off = kind is int and isinstance(value, float)
    flag = kind in EXPECTED and isinstance(value, bool) is not (kind is bool)
    if cut_off or flag:
        raise TypeError
    return kind(value)
