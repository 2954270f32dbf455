"""Keys and types of ``profile.json`` and of the record of a healing, in ``records.json``.

Only keys and types are held, because times differ. After a change that is meant to alter a record,

    python -m tests.golden.records

rewrites the file.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from lm_eval_pruned.checkpoints.adapters import HEALING
from lm_eval_pruned.energy.meter import EnergyMonitor
from lm_eval_pruned.healing.options import HealingOptions
from lm_eval_pruned.healing.run import heal
from lm_eval_pruned.profiling import measure, report
from tests.helpers import checkpoints
from tests.helpers.meters import Clock, FakeMeter


FILE = Path(__file__).with_suffix(".json")


class TickingClock(Clock):
    """A clock that moves on by a quarter of a second each time it is read."""

    def __call__(self) -> float:
        self.sleep(0.25)
        return self.now


def shape(value: Any) -> Any:
    """Return keys and types of a value as JSON types, with one entry for equal parts of a list."""
    if isinstance(value, dict):
        return {name: shape(each) for name, each in value.items()}
    if isinstance(value, list):
        shapes = {json.dumps(shape(each)) for each in value}
        return [json.loads(each) for each in sorted(shapes)]
    return type(value).__name__


def profile_of(tiny: Path, folder: Path) -> Any:
    """Return what ``profile.json`` holds for a model at two sizes."""
    clock = TickingClock()
    sizes = {"ratios": ("1.375",), "max_new_tokens": 4, "repeats": 2}
    request = measure.ProfileRequest(str(tiny), **sizes)
    monitor = EnergyMonitor(FakeMeter(clock, {"cpu": 10.0, "ram": 2.0}), clock)
    prompts = ["one", "two three"]
    *_, result = measure.profile(request, prompts, monitor=monitor)
    report.write(result, folder)
    record = json.loads((folder / "profile.json").read_text())
    for cell in record["cells"]:
        # Not every system tells it.
        cell["peak_host_bytes"] = cell["peak_host_bytes"] or 0
    return record


def healing_of(tiny: Path, folder: Path, **options: Any) -> Any:
    """Return what the record in an adapter holds."""
    data = folder / "data.txt"
    data.write_text("The tide comes in twice a day. " * 20)
    training = {"use_cpu": True, "disable_tqdm": True, "save_steps": 1}
    options |= {"max_length": 32, "max_steps": 1, "training_args": training}
    arguments = {"pretrained": str(tiny), "prune_percent": 40}
    heal(arguments, str(data), folder / "healed", HealingOptions(**options))
    record = json.loads((folder / "healed" / HEALING).read_text())
    steps = folder / "healed.checkpoints" / "checkpoint-1" / HEALING
    return {"adapter": record, "checkpoint": json.loads(steps.read_text())}


def observed() -> dict[str, Any]:
    """Return the keys and types of all records."""
    with tempfile.TemporaryDirectory() as place:
        made = (Path(tempfile.mkdtemp(dir=place)) for _ in range(4))
        tiny, profiled, plain, taught = made
        checkpoints.save_tiny(tiny)
        found = {
            "profile": profile_of(tiny, profiled),
            "healing": healing_of(tiny, plain),
            "healing with a teacher": healing_of(tiny, taught, teacher_weight=0.5),
        }
        return shape(found)


if __name__ == "__main__":
    FILE.write_text(json.dumps(observed(), indent=1) + "\n")
