"""Model arguments that are true or false."""

from __future__ import annotations

from typing import Any


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither true nor false, such as the text ``off``.

    Raises:
        ValueError: It is neither.
    """
    if value not in (True, False):
        raise ValueError(f"{name}={value!r} is not understood: pass true or false.")
