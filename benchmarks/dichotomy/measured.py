"""The sweeps of the steps, as they were measured so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.compare.comparison import split_sweep
from lm_eval_pruned.results.files import ResultsError, as_mapping
from lm_eval_pruned.results.folder import is_sweep
from lm_eval_pruned.results.runs import read_sweep


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from dichotomy.tables import Row
    from lm_eval_pruned.results.files import Run

#: What the id of a configuration ends in that was trained again.
HEALED = "_healed"
#: What of a sweep's definition the page says; the rest is paths, or stands in the other tables.
SAID = (
    *("dtype", "calibration_samples", "drop_by", "skip_layers", "multiple_of", "limit"),
    *("apply_chat_template", "gen_kwargs", "num_fewshot", "seed", "max_steps"),
)


@dataclass(frozen=True)
class Sweep:
    """One step as it was measured."""

    model: str
    step: str
    base: Run
    runs: tuple[Run, ...]
    asked: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Any]

    def identity(self, run: Run) -> Row:
        """Return the columns that say what a run is."""
        asked = self.asked.get(run.name, {})
        baseline = run is self.base
        cut = "drop_layers" if "drop_layers" in asked else "prune_percent"
        criterion = asked.get("criterion", "maw")
        words = [criterion]
        if cut == "drop_layers":
            by = asked.get("drop_by", "last")
            words = ["depth" if by == "last" else "depth, block influence"]
            criterion = None
        if asked.get("allocation", "uniform") != "uniform":
            words.append(str(asked["allocation"]))
        if asked.get("skip_layers") is not None:
            words.append(f"layer {asked['skip_layers']} kept")
        if asked.get("multiple_of"):
            words.append(f"multiples of {asked['multiple_of']}")
        healed = run.name.endswith(HEALED)
        if healed:
            words.append("healed")
        return {
            "model": self.model,
            "step": self.step,
            "run": run.name,
            "method": "unpruned" if baseline else ", ".join(words),
            "criterion": None if baseline else criterion,
            "seed": asked.get("seed", 0)
            if criterion == "random" and not baseline
            else None,
            "allocation": asked.get("allocation"),
            "healed": healed,
            "percent": 0 if baseline else asked.get("prune_percent"),
            "parameters": run.pruning.get("parameters_after"),
        }

    def select(self, **wanted: Any) -> list[Run]:
        """Return the runs whose identity has these values."""
        return [
            run for run in self.runs if wanted.items() <= {**self.identity(run)}.items()
        ]


def sweeps_of(folder: Path, model: str, notes: list[str]) -> Iterator[Sweep]:
    """Yield the sweeps in a folder that have a finished unpruned model; `notes` gets the others."""
    for path in sorted(folder.glob("*/")):
        if not is_sweep(path):
            continue
        try:
            sweep = read_sweep(path)
            base, runs = split_sweep(list(sweep.runs), path.name)
        except ResultsError as error:
            notes.append(f"{model}/{path.name} was left out: {error}")
            continue
        notes += [
            f"{model}/{path.name}: {each.run}, {each.task} failed: {each.message}"
            for each in sweep.failures
        ]
        definition = as_mapping(sweep.definition.get("definition"))
        everywhere = as_mapping(definition.get("model_args"))
        asked = {
            str(each["id"]): {**everywhere, **as_mapping(each.get("arguments"))}
            for each in sweep.definition.get("configurations", [])
        }
        settings = {**definition, **as_mapping(definition.get("heal")), **everywhere}
        yield Sweep(model, path.name, base, tuple(runs), asked, settings)
