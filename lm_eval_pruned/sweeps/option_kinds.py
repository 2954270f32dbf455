"""What the value of an option of a sweep may be, on the command line and in YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Callable


def checked(kind: str, value: Any, where: str) -> Any:
    """Return an option's value as its kind has it.

    Args:
        kind: Key of `KINDS`.
        value: From the command line or a YAML file.
        where: Names the option in an error.

    Raises:
        ValueError: One sentence naming the option, its value and what works.
    """
    expected, check = KINDS[kind]
    try:
        return check(value)
    except (TypeError, ValueError, OSError) as error:
        detail = f" ({error})" if str(error) else ""
        raise ValueError(f"{where} is {value!r}{detail}: pass {expected}.") from None


def _numbers(value: Any) -> list[str]:
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, bool) or not _is_scalar(item) for item in items):
        raise TypeError
    return _words([",".join(str(item).split()) for item in items])


def _words(value: Any) -> list[str]:
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in items):
        raise TypeError
    words = [part.strip() for item in items for part in item.split(",") if part.strip()]
    if not words:
        raise ValueError
    return words


def _mapping(value: Any) -> dict[str, Any]:
    from lm_eval._cli.utils import key_val_to_dict, try_parse_json

    if isinstance(value, dict):
        return value
    items = value if isinstance(value, list) else [value]
    merged: dict[str, Any] = {}
    for item in items:
        if not isinstance(item, str):
            raise TypeError
        parsed = try_parse_json(item) if item.lstrip().startswith("{") else item
        merged.update(parsed if isinstance(parsed, dict) else key_val_to_dict(item))
    return merged


def _samples(value: Any) -> dict[str, list[int]]:
    if isinstance(value, str):
        if not value.lstrip().startswith("{"):
            value = Path(value).read_text(encoding="utf-8")
        value = json.loads(value)
    if not isinstance(value, dict):
        raise TypeError
    return value


def _text(value: Any) -> str:
    if isinstance(value, list) and all(_is_scalar(item) for item in value) and value:
        return ",".join(str(item) for item in value)
    if isinstance(value, bool) or not _is_scalar(value):
        raise TypeError
    return str(value)


def _integer(value: Any) -> int:
    if isinstance(value, (bool, float)):
        raise TypeError
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    number = float(value)
    if not 0 <= number < float("inf"):
        raise ValueError
    return number


def _boolean(value: Any) -> bool:
    text = str(value).lower()
    if text not in ("true", "1", "yes", "false", "0", "no"):
        raise ValueError
    return text in ("true", "1", "yes")


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _flag_or_text(value: Any) -> bool | str:
    if not isinstance(value, (bool, str)) or value == "":
        raise TypeError
    return value


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (str, int, float))


#: By name: what an error asks for, and the check, which returns the value or raises.
KINDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "numbers": ("one or more numbers", _numbers),
    "words": ("one or more names", _words),
    "mapping": ("key=value pairs or a mapping", _mapping),
    "samples": ('JSON such as {"boolq": [0, 1]}, or a file of it', _samples),
    "text": ("one value", _text),
    "integer": ("a whole number", _integer),
    "number": ("a number of 0 or more", _number),
    "boolean": ("true or false", _boolean),
    "flag": ("true or false", _flag),
    "flag_or_text": ("true, false or a name", _flag_or_text),
}
