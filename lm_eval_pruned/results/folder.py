"""The format of a sweep's folder, which `lm_eval_pruned.sweeps` writes and `read_sweep` reads.

``DIR/sweep.json`` says what the sweep is. ``DIR/units/CONFIGURATION/TASK/`` holds one unit:
the harness's ``results_*.json`` and ``samples_*.jsonl``, or ``error.json`` where it failed,
and ``unit.json``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lm_eval_pruned.results.files import ResultsError, newest_first, read_json


if TYPE_CHECKING:
    from collections.abc import Mapping

#: Version of ``sweep.json`` and ``unit.json``.
SCHEMA = 1
DEFINITION = "sweep.json"
UNIT = "unit.json"
ERROR = "error.json"
UNITS = "units"
#: What the ids of configurations that know nothing start with.
FLOOR = "floor-"
#: Adapters of healed configurations, by configuration and what they were trained with.
ADAPTERS = "adapters"
#: Curves of single layers, as ``lm-eval-pruned sensitivity`` writes them.
SENSITIVITY = "sensitivity.json"


class UnitRecord(NamedTuple):
    """What the folder holds for one unit: the harness's `results` file, or an `error`.

    `fingerprint` is that of the `definition`; evaluating took `seconds`, without loading.
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
    names = (re.sub(r"[^\w.+-]", "_", name) for name in (configuration, task))
    return Path(sweep, UNITS, *names)


def as_text(content: Mapping[str, Any]) -> str:
    """Return the text of a ``sweep.json`` or ``unit.json``."""
    return error_text({"schema_version": SCHEMA, **content})


def error_text(error: Mapping[str, Any]) -> str:
    """Return the text of an ``error.json``: ``type``, ``message`` and ``traceback``."""
    return json.dumps(error, indent=2, ensure_ascii=False) + "\n"


def read_unit(folder: Path) -> UnitRecord | None:
    """Return what is there for a unit; None for nothing, or nothing whole."""
    try:
        unit = read_json(folder / UNIT)
        if unit["schema_version"] != SCHEMA:
            return None
        results = next(iter(newest_first(folder)), None)
        error = None if results else read_json(folder / ERROR)
        made = str(unit["fingerprint"]), float(unit["seconds"])
        return UnitRecord(*made, error, results, unit.get("definition") or {})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_definition(sweep: Path) -> tuple[Mapping[str, Any], list[str]]:
    """Read ``sweep.json`` and the ids of its configurations; ResultsError if it is not known here."""
    file = sweep / DEFINITION
    if not is_sweep(sweep):
        raise ResultsError(
            f"{sweep} is not a sweep folder: it has no sweep.json. `lm-eval-pruned sweep` makes one."
        )
    definition = read_json(file)
    if (schema := definition.get("schema_version")) != SCHEMA:
        raise ResultsError(
            f"{file} has schema version {schema}, and this version of lm-eval-pruned reads "
            f"{SCHEMA}: use the version that wrote it, or upgrade lm-eval-pruned."
        )
    return definition, [str(each["id"]) for each in definition["configurations"]]
