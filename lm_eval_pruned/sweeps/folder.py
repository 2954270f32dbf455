"""The folder of a sweep: how a unit gets there whole or not at all.

A unit is written below ``DIR/.unfinished``, flushed to the disk and renamed into place,
so a process that dies at any moment leaves either the whole unit or none of it. What the
files are called and say is `lm_eval_pruned.results.runs`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from lm_eval_pruned.results import runs as layout
from lm_eval_pruned.sweeps.tasks import fingerprint
from lm_eval_pruned.util.atomic import sync


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from lm_eval_pruned.results.runs import UnitRecord, UnitsOf


class SweepFolder:
    """The folder of one sweep, of which a process holds the whole, a part, or a unit."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._unfinished = self.path / ".unfinished"

    def read(self, configuration: str, task: str) -> UnitRecord | None:
        """Return what is there for a unit; None for nothing, or nothing whole."""
        return layout.read_unit(layout.unit_folder(self.path, configuration, task))

    @contextlib.contextmanager
    def held(self, part: str | Path) -> Iterator[None]:
        """Hold a part, and remove what a process that died left of it; ValueError if one has it."""
        lock = self.path / ".locks" / f"{part}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            holding = FileLock(lock).acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"--output_path {self.path} is in use by another sweep: wait until it has ended, "
                "stop it, or pass another folder."
            ) from None
        with holding:
            self._unfinished = self.path / ".unfinished" / part
            shutil.rmtree(self._unfinished, ignore_errors=True)
            yield

    @contextlib.contextmanager
    def new_unit(self) -> Iterator[Path]:
        """Yield an empty folder on the sweep's file system, and remove it afterwards."""
        folder = self._unfinished / uuid.uuid4().hex
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def keep(
        self,
        folder: Path,
        names: tuple[str, str],
        seconds: float,
        definition: Mapping[str, Any],
        error: dict[str, str] | None = None,
    ) -> dict[str, float]:
        """Make `folder`, one of `new_unit`, the unit's folder, and return the unit's own scores.

        Results that were there before move to ``DIR/superseded``, so that a mistyped command
        loses none. The harness's files go where the unit has failed.
        """
        scores: dict[str, float] = {}
        if error is None:
            (results,) = folder.glob("results_*.json")
            scores = _scores_of(json.loads(results.read_text(encoding="utf-8")))
        else:
            for file in folder.iterdir():
                file.unlink()
            text = layout.error_text(error)
            (folder / layout.ERROR).write_text(text, encoding="utf-8")
        unit = {
            "configuration": names[0],
            "task": names[1],
            "fingerprint": fingerprint(definition),
            "seconds": round(seconds, 3),
            "definition": definition,
        }
        (folder / layout.UNIT).write_text(layout.as_text(unit), encoding="utf-8")
        for path in (*folder.iterdir(), folder):
            sync(path)
        target, before = layout.unit_folder(self.path, *names), self.read(*names)
        if before and before.error:
            shutil.rmtree(target)
        elif target.exists():
            earlier = self.path / "superseded" / target.parent.name / target.name
            earlier.mkdir(parents=True, exist_ok=True)
            os.rename(target, earlier / folder.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(folder, target)
        for path in (target.parent, target.parent.parent, self.path):
            sync(path)
        return scores


def with_earlier(
    now: Mapping[str, Any],
    earlier: Mapping[str, Any],
    units: UnitsOf,
    base: str,
) -> dict[str, Any]:
    """Return the content of ``sweep.json`` with what of an earlier one can be compared with it.

    That is what has the same unpruned model and, on a task of both, the same unit of it.

    Args:
        now: The content for the present command alone.
        earlier: What `lm_eval_pruned.results.runs.read_definition` read, with the `units` listed.
        base: The id of the unpruned model.
    """
    present = {
        configuration["id"]: configuration for configuration in now["configurations"]
    }
    before = {
        configuration["id"]: configuration
        for configuration in earlier["configurations"]
    }
    if before.get(base, {}).get("fingerprint") != present[base]["fingerprint"]:
        return dict(now)
    of_base = present[base]["units"]
    for name, configuration in before.items():
        here = present.get(name, {**configuration, "units": {}})
        if here["fingerprint"] != configuration.get("fingerprint"):
            continue
        kept = {
            task: digest
            for task, digest in units[name].items()
            if of_base.get(task) in (None, units[base].get(task))
        }
        if kept:
            present[name] = {**here, "units": {**kept, **here["units"]}}
    names = [name for name in dict.fromkeys([*before, *present]) if name in present]
    tasks = dict.fromkeys(
        task for configuration in present.values() for task in configuration["units"]
    )
    return {**now, "configurations": [present[n] for n in names], "tasks": [*tasks]}


def add_metric(
    results: Any,
    task: str,
    metric: str,
    values: Sequence[Any],
    score: float,
    *,
    up: bool,
) -> None:
    """Add a metric to the harness's results of a task, as if the task had computed it.

    `values` are those of the documents, in the order of ``doc_id``; `up` says whether more is better.
    """
    name, _, filtered = metric.partition(",")
    samples = sorted(results["samples"][task], key=lambda row: row["doc_id"])
    for row, value in zip(samples, values, strict=True):
        row[name] = value
        row["metrics"] = [*row["metrics"], name]
    of_task = {metric: score, f"{name}_stderr,{filtered}": "N/A"}
    results["results"][task] |= of_task
    results["higher_is_better"][task][name] = up


def write_results(results: dict[str, Any], tracker: Any, folder: Path) -> None:
    """Let the harness write its files; OSError if one is missing or cut short, which it only logs."""
    samples = results.pop("samples", None) or {}
    # The tracker writes beside a path that ends in .json.
    tracker.output_path = str(folder / "results.json")
    tracker.save_results_aggregated(results=results, samples=samples or None)
    for name, rows in samples.items():
        tracker.save_results_samples(task_name=name, samples=rows)
    total = sum(map(len, samples.values()))
    written = (file.read_bytes() for file in folder.glob("samples_*.jsonl"))
    lines = sum(content.count(b"\n") for content in written)
    whole = [file.read_bytes()[-1:] for file in folder.glob("results_*.json")] == [b"}"]
    if lines != total or not whole:
        raise OSError(
            f"{lines} of {total} samples and {'their' if whole else 'no'} results were written to "
            f"{folder}: is the disk full?"
        )


def _scores_of(results: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of a results file's group, or of its only task."""
    rows = results.get("groups") or results["results"]
    return {
        name.removesuffix(",none"): value
        for name, value in next(iter(rows.values())).items()
        if isinstance(value, (int, float)) and "," in name and "_stderr," not in name
    }
