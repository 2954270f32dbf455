"""Requests as the harness makes them, in 0.4 and 0.5."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from lm_eval.api.instance import Instance
from packaging.version import Version


#: Releases from here on ask for a text as for a continuation of nothing.
IS_NEXT = Version(version("lm_eval")) >= Version("0.5.dev0")


def request(
    kind: str, *arguments: Any, place: int = 0, task: str = "t", number: int = 0
) -> Instance:
    """Return a request about the document `number` of a task, at its `place` among those about it."""
    if IS_NEXT and kind == "loglikelihood_rolling":
        arguments = ("", *arguments[:1])
    named = {"task_name": task, "doc_id": number, "metadata": (task, number, 1)}
    return Instance(kind, {}, arguments, idx=place, **named)  # type: ignore[arg-type]
