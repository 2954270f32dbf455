"""The two models of a verdict: finished results, or evaluated here, each as a sweep of one model."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.config.evaluate_config import EvaluatorConfig

from lm_eval_pruned.compare.comparison import split_sweep
from lm_eval_pruned.pruning.arguments import PruneArguments
from lm_eval_pruned.results.files import ResultsError, Run
from lm_eval_pruned.results.folder import is_sweep
from lm_eval_pruned.results.runs import read_run, read_sweep
from lm_eval_pruned.sweeps.options import OF_HARNESS, read_mapping
from lm_eval_pruned.sweeps.plan import Configuration, Sweep
from lm_eval_pruned.sweeps.run import run_sweep
from lm_eval_pruned.sweeps.tasks import index_tasks, resolve_tasks


if TYPE_CHECKING:
    from collections.abc import Mapping

NAMES = BASE, CANDIDATE = ("base", "candidate")
#: What evaluates each model type: ``hf-prefix`` is ``hf`` that computes shared prefixes once.
TYPES = {
    "hf": "hf-prefix",
    **{name: name for name in ("hf-prefix", "pruned-hf", "vllm", "pruned-vllm")},
}
#: Where neither the user nor a finished base names tasks.
TASKS = ["pruned_demo", "pruned_demo_bias"]


class OneModel(Sweep):
    """A sweep of one model, of any type in `TYPES`.

    Args:
        name: What the configuration is called.
        text: ``TYPE,key=value,...``, as for ``lm_eval --model TYPE --model_args key=value,...``.
        options: Those of a sweep; ``output_path`` is the folder of this model.

    Raises:
        ValueError: The specification, an option or a task cannot be used.
    """

    def __init__(self, name: str, text: str, options: Mapping[str, Any]) -> None:
        kind, _, given = text.partition(",")
        if kind not in TYPES:
            raise ValueError(
                f"The {name} {text} is neither a path of results nor a model: pass a folder, or a "
                f"model type ({', '.join(TYPES)}) with its arguments, such as hf,pretrained=NAME."
            )
        self.model = TYPES[kind]
        self._base = read_mapping(given, f"The {name} {text}") if given else {}
        if kind == "vllm" and "pretrained" not in self._base:
            raise ValueError(
                f"The {name} {text} names no checkpoint: add pretrained=NAME."
            )
        if kind.startswith("pruned-"):
            # Before the base is evaluated.
            PruneArguments.taken_from(dict(self._base))
        which = {"model": self.model, "model_args": self._base}
        self.options = {**options, **which}
        read = {n: options[n] for n in OF_HARNESS if n in options}
        if "seed" in read:
            read["seed"] = read["seed"].split(",")
        self.settings = EvaluatorConfig.from_cli(
            Namespace(**{**read, "log_samples": True, **which})
        )
        self.stop_when = self.healing = None
        self.baseline = Configuration(name, {}, 0, 0.0, 0, 0.0)
        self.configurations = [self.baseline]
        self._manager = index_tasks(self.settings.include_path)
        self.tasks = resolve_tasks(options["tasks"], self._manager)

    def model_args(self, configuration: Configuration) -> dict[str, Any]:
        """Return the arguments of the model, of which none is left out."""
        return dict(self._base)


def both_runs(
    base: str, candidate: str, options: Mapping[str, Any], output_path: str | Path
) -> tuple[Run, Run]:
    """Return the results of both models; those that no folder holds are evaluated first.

    Args:
        base: Path of results, or a specification as `OneModel` takes it.
        candidate: The same.
        options: Those of a sweep.
        output_path: Gets a sweep folder for each model that is evaluated. What is in it is not
            evaluated again.

    Raises:
        ValueError: A model, an option or a task cannot be used.
        ResultsError: Results cannot be read, or none could be had.
        KeyboardInterrupt: Someone stopped the evaluation.
    """
    given = dict(zip(NAMES, (base, candidate), strict=True))
    found = {n: _finished(n, text) for n, text in given.items() if Path(text).exists()}
    tasks = found[BASE].tasks(subtasks=False) if BASE in found else TASKS
    asked = {"tasks": tasks, **options}
    planned = {
        name: OneModel(
            name, text, {**asked, "output_path": str(Path(output_path, name))}
        )
        for name, text in given.items()
        if name not in found
    }
    for name, sweep in planned.items():
        print(f"The {name}: {given[name]}", flush=True)
        if run_sweep(sweep.options, retry_failed=True, sweep=sweep) == 130:
            raise KeyboardInterrupt
        results = read_sweep(sweep.options["output_path"])
        for failure in results.failures:
            raise ResultsError(
                f"{failure.task} failed on the {name} ({failure.message}): the same command tries "
                "it again, and evaluates nothing else twice."
            )
        (found[name],) = results.runs
    return found[BASE], found[CANDIDATE]


def _finished(name: str, path: str) -> Run:
    if not is_sweep(path):
        return read_run(path, name)
    base, others = split_sweep(list(read_sweep(path).runs), path)
    if name == BASE:
        return base
    if len(others) != 1:
        raise ResultsError(
            f"The candidate {path} is a sweep of {len(others)} pruned models: name one of them, "
            f"such as {path}/units/{others[0].name if others else 'NAME'}."
        )
    return others[0]
