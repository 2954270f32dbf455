"""Checks of model arguments."""

from __future__ import annotations

from typing import Any


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither true nor false, such as the text ``off``.

    Raises:
        ValueError: It is neither.
    """
    if value not in (True, False):
        raise ValueError(f"{name}={value!r} is not understood: pass true or false.")


def check_count(name: str, value: Any) -> None:
    """Refuse what is neither None nor a whole number of 1 or more.

    Raises:
        ValueError: It is neither.
    """
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(
            f"{name}={value!r} is not understood: pass a whole number of 1 or more."
        )
