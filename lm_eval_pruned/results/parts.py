"""JSON files, their parts, and the one error for what they do not hold."""

from __future__ import annotations

import json
import math
import textwrap
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


class ResultsError(ValueError):
    """A file or folder that cannot be read as results; the message names it."""


@contextmanager
def reading(what: str, repair: str) -> Iterator[None]:
    """Turn what values of unexpected kinds raise into a ResultsError: `what` is wrong (why): `repair`.

    `what` names the file. A ResultsError passes as it is.
    """
    try:
        yield
    except ResultsError:
        raise
    except (
        ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError,
    ) as error:  # fmt: skip
        why = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        why = textwrap.shorten(why, 300, placeholder=" ...").rstrip(".")
        raise ResultsError(f"{what} ({why}): {repair}") from error


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; ResultsError if the file holds something else."""
    try:
        data = from_json(file.read_text(encoding="utf-8", errors="replace"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ResultsError(f"{file} is not complete JSON ({error}).") from None
    except ValueError as error:
        raise ResultsError(f"{file} is damaged: {error}.") from None
    if not isinstance(data, dict):
        raise ResultsError(f"{file} holds a {type(data).__name__}, not an object.")
    return data


def from_json(text: str) -> Any:
    """Return what JSON says; ValueError for what is none, and for integers that no float can hold."""
    return _DECODER.decode(text)


def _whole_number(digits: str) -> int:
    if not math.isfinite(float(digits)):
        raise ValueError(
            f"it holds a number of {len(digits)} digits, and none has more than 308"
        )
    return int(digits)


_DECODER = json.JSONDecoder(parse_int=_whole_number)


def part(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return an object within a file, empty where there is none; ValueError where it is something else."""
    value = data.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{key} is {value!r}, not an object")
    return value or {}


def direction(value: Any) -> bool | None:
    """Return what a file says of ``higher_is_better``; ValueError where that is no answer."""
    if value is not None and type(value) is not bool:
        raise ValueError(f"higher_is_better is {value!r}, not true, false or null")
    return value


def version(value: Any) -> Any:
    """Return the version of a task, which may be a name; ValueError where it is none."""
    if value is None or isinstance(value, str) or finite_or_none(value) is not None:
        return value
    raise ValueError(f"a version is {value!r}, not a number or a name")


def as_mapping(value: Any) -> Mapping[str, Any]:
    """Return a value of a results file, or an empty mapping where it is none."""
    return value if isinstance(value, dict) else {}


def finite_or_none(value: Any) -> float | None:
    """Return a value of a results file as a number, or None where it is not finite."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None
