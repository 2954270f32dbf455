"""What a sweep's folder consists of: where its files lie, and what stands in them.

``DIR/sweep.json`` says what the sweep is, ``DIR/units/CONFIGURATION/TASK/`` holds one
unit: the harness's ``results_*.json`` and ``samples_*.jsonl`` and our ``unit.json``, or
``error.json`` and ``unit.json`` for one that failed. ``DIR/adapters/CONFIGURATION/`` holds
what healed configurations were trained to. ``DIR/sensitivity.json`` holds the
curves of single layers that its widths or criteria were chosen by, as ``lm-eval-pruned
sensitivity`` writes them. `lm_eval_pruned.sweeps` writes such a
folder and goes on in it, `sweep_results` reads it for tables; both ask here.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.results.files import (
    ResultsError,
    newest_first,
    read_json,
)


if TYPE_CHECKING:
    from collections.abc import Mapping

#: Version of ``sweep.json`` and ``unit.json``.
SCHEMA = 1
DEFINITION = "sweep.json"
UNIT = "unit.json"
ERROR = "error.json"
UNITS = "units"
#: Adapters of healed configurations, by configuration and what they were trained with.
ADAPTERS = "adapters"
#: Curves of single layers; there where a sweep measured them, or where somebody put them.
SENSITIVITY = "sensitivity.json"


@dataclass(frozen=True)
class UnitRecord:
    """What the folder holds for one unit.

    Attributes:
        fingerprint: Of the definition that was evaluated.
        seconds: Time the evaluation took, without loading the model.
        error: None for a finished unit, else what ``error.json`` says.
        results: None for a failed unit, else the harness's results file.
        definition: What the fingerprint is made from.
    """

    fingerprint: str
    seconds: float
    error: dict[str, str] | None
    results: Path | None
    definition: Mapping[str, Any]


def is_sweep(path: str | Path) -> bool:
    """Return whether `path` is a sweep folder."""
    return Path(path, DEFINITION).is_file()


def unit_folder(sweep: Path, configuration: str, task: str) -> Path:
    """Return where a unit belongs."""
    return sweep / UNITS / _file_name(configuration) / _file_name(task)


def as_text(content: Mapping[str, Any]) -> str:
    """Return the text of a ``sweep.json`` or ``unit.json``, the same for the same content."""
    versioned = {"schema_version": SCHEMA, **content}
    return json.dumps(versioned, indent=2, ensure_ascii=False) + "\n"


def error_text(error: Mapping[str, str]) -> str:
    """Return the text of an ``error.json``: ``type``, ``message`` and ``traceback``."""
    return json.dumps(error, indent=2, ensure_ascii=False) + "\n"


def read_unit(folder: Path) -> UnitRecord | None:
    """Return what is there for a unit; None for nothing, or nothing whole."""
    try:
        unit = read_json(folder / UNIT)
        fingerprint, seconds = str(unit["fingerprint"]), float(unit["seconds"])
        if unit["schema_version"] != SCHEMA:
            return None
        results = next(iter(newest_first(folder)), None)
        error = None if results else read_json(folder / ERROR)
        definition = unit.get("definition") or {}
        return UnitRecord(fingerprint, seconds, error, results, definition)
    except (ValueError, KeyError, TypeError):
        return None


def read_definition(sweep: Path) -> tuple[Mapping[str, Any], list[str]]:
    """Read ``sweep.json``.

    Returns:
        Its content, and the ids of the configurations in it.

    Raises:
        ResultsError: There is none, or none of a schema known here.
    """
    file = sweep / DEFINITION
    if not is_sweep(sweep):
        raise ResultsError(
            f"{sweep} is not a sweep folder: it has no sweep.json. `lm-eval-pruned sweep` "
            "makes one."
        )
    definition = read_json(file)
    schema = definition.get("schema_version")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise ResultsError(f"{file} gives no schema version: it is not a sweep's.")
    if schema > SCHEMA:
        raise ResultsError(
            f"{file} has schema version {schema}, and this version of lm-eval-pruned reads up "
            f"to {SCHEMA}: upgrade lm-eval-pruned."
        )
    return definition, _configuration_ids(file, definition)


def read_curves(sweep: Path) -> Mapping[str, Any] | None:
    """Read ``sensitivity.json``; None where the sweep has none.

    Raises:
        ResultsError: It is no JSON object.
    """
    file = sweep / SENSITIVITY
    return read_json(file) if file.is_file() else None


def _configuration_ids(file: Path, definition: Mapping[str, Any]) -> list[str]:
    configurations = definition.get("configurations")
    identifiers: list[Any] = [
        entry.get("id") if isinstance(entry, dict) else None
        for entry in (configurations if isinstance(configurations, list) else [])
    ]
    if not identifiers or not all(
        isinstance(name, str) and re.fullmatch(r"[\w.=+-]+", name) and ".." not in name
        for name in identifiers
    ):
        raise ResultsError(
            f"{file} does not list its configurations, each with an id that can be a folder's name."
        )
    return identifiers


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.+-]", "_", name)
