"""What a criterion gives beside pruning at random, and the command that adds what is missing for it.

A criterion that is no better than chance looks as good as any other until chance stands
beside it.
"""

from __future__ import annotations

import json
import re
import shlex
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.report.findings import Finding
from lm_eval_pruned.report.healing import judged, paired_rows, paired_section
from lm_eval_pruned.report.page import Section
from lm_eval_pruned.results.files import as_mapping
from lm_eval_pruned.results.groups import healing_name, is_control, series_name


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lm_eval_pruned.compare.pairing import DocumentReader
    from lm_eval_pruned.report.healing import PairedRow
    from lm_eval_pruned.results.files import Run
    from lm_eval_pruned.results.runs import SweepResults

RANDOM = "random"
SEEDS = (0, 1, 2)
#: The criterion of a sweep whose options name none.
_DEFAULT = "maw"
#: Options that are on unless they are switched off, or that are given as true or false.
TAKE_FALSE = ("fewshot_as_multiturn", "log_samples")
#: Those of which the command says something else, or which stand in front of the others.
_OURS = ("criteria", "seeds")
#: What a sweep's definition leaves out, since it decides no score but how long one takes; with defaults.
_HOW = {"batch_size": 1, "device": None}


def beside_random(
    base: Run, others: Sequence[Run], alpha: float, read: DocumentReader
) -> tuple[list[Finding], Section | None]:
    """Compare each configuration with those of its size that were cut at random.

    Args:
        base: The unpruned model.
        others: The other runs.
        alpha: Level of the tests.
        read: Reader whose documents are used again.

    Returns:
        A sentence for each criterion, and the table; nothing where no size has both.
    """
    rows = judged(
        [
            row
            for run in others
            if not is_control(run)
            for control in others
            if is_control(control) and _cut(control) == _cut(run)
            for row in paired_rows(control, run, alpha, read)
        ],
        alpha,
    )
    if not rows:
        return [], None
    text = (
        "Each configuration against those of its size whose neurons were removed at random, one "
        "seed at a time, paired by document: what the criterion is worth. q: p after "
        f"Benjamini-Hochberg over the rows of each task, significant at {alpha:g}."
    )
    by_series: dict[str, list[PairedRow]] = {}
    for row in rows:
        by_series.setdefault(series_name(row.after), []).append(row)
    return (
        [_finding(name, of) for name, of in by_series.items()],
        paired_section(
            "Against pruning at random", "at random", "score", text, base, rows, alpha
        ),
    )


def _cut(run: Run) -> tuple[Any, ...]:
    """Return what a run has in common with one that was cut at random in the same places."""
    names = ("asked", "allocation", "layers_pruned", "layers_dropped", "hidden_size")
    return (
        *(run.pruning.get(name) for name in names),
        healing_name(run) if run.healing else None,
    )


def _finding(series: str, rows: Sequence[PairedRow]) -> Finding:
    """Say on how many comparisons of each task a criterion is better than chance."""
    tasks: dict[str, list[PairedRow]] = {}
    for row in rows:
        tasks.setdefault(row.task, []).append(row)
    shown: dict[str, list[str]] = {}
    parts = []
    for task, of in tasks.items():
        tested = [row for row in of if row.q is not None]
        said = []
        for verdict in ("better", "worse", "different"):
            if count := sum(row.verdict == verdict for row in tested):
                shown.setdefault(verdict, []).append(task)
                said.append(f"{verdict} in {count} of {len(tested)}")
        none = f"no difference shown in {len(tested)}" if tested else "not tested"
        parts.append(f"{task} {' and '.join(said) or none}")
    leads = [f"{verdict} on {', '.join(on)}" for verdict, on in shown.items()]
    return Finding(
        f"{series} beside pruning at random: {' and '.join(leads) or 'no difference shown'}",
        f": of the comparisons by size and seed, {'; '.join(parts)}.",
    )


def random_baseline_section(sweep: SweepResults, base: Run) -> Section | None:
    """Say that no configuration was pruned at random, with the command that adds some.

    Returns:
        None where every size has a random configuration, or nothing is pruned.
    """
    missing = sizes_without_random(sweep.definition)
    if not missing:
        return None
    where = f" for {', '.join(missing)}" if _has_random(sweep.definition) else ""
    text = (
        f"This sweep has no random baseline{where}: nothing in it says how much of a score is "
        "owed to the criterion, and how much would be there if neurons had been removed by "
        "chance. In some layers of some models magnitude criteria rank worse than chance. This "
        f"command adds the control with {len(SEEDS)} seeds, and evaluates nothing again that is "
        "there:"
    )
    return Section(
        "No random baseline",
        [text],
        code=command_with_random(sweep.definition, str(sweep.path), base.config),
        language="bash",
    )


def sizes_without_random(definition: Mapping[str, Any]) -> list[str]:
    """Return the sizes of a sweep, such as ``prune_percent 20``, that were not cut at random.

    Args:
        definition: Content of ``sweep.json``.
    """
    found: dict[str, bool] = {}
    for each in definition.get("configurations") or ():
        arguments = _arguments(each)
        criterion = arguments.get("criterion", _DEFAULT)
        size = " ".join(
            f"{name} {value}"
            for name, value in arguments.items()
            if name not in ("criterion", "seed")
        )
        if size:
            found[size] = found.get(size, False) or criterion == RANDOM
    return [size for size, has_random in found.items() if not has_random]


def command_with_random(
    definition: Mapping[str, Any], folder: str, config: Mapping[str, Any]
) -> str:
    """Return the command that runs a sweep again with the criterion random beside its own.

    Args:
        definition: Content of ``sweep.json``.
        folder: The sweep's folder.
        config: The harness's ``config`` of one of its runs.
    """
    options = dict(as_mapping(definition.get("definition")))
    criteria = list(options.get("criteria") or [_DEFAULT])
    seeds = [str(seed) for seed in options.get("seeds") or ()]
    seeds = list(dict.fromkeys([*seeds, *map(str, SEEDS)]))[
        : max(len(seeds), len(SEEDS))
    ]
    options = {
        **{name: value for name, value in options.items() if name not in _OURS},
        "criteria": list(dict.fromkeys([*criteria, RANDOM])),
        "seeds": seeds,
        **{
            name: value
            for name, default in _HOW.items()
            if isinstance(value := config.get(name), int | str) and value != default
        },
        "output_path": folder,
    }
    words = ["lm-eval-pruned", "sweep"]
    for name, value in options.items():
        words += _words(name, value)
    return " ".join(map(shlex.quote, words))


def _words(name: str, value: Any) -> list[str]:
    """Return an option as it is typed; one that changes nothing is left out."""
    option = f"--{name}"
    if value is None or (value is False and name not in TAKE_FALSE):
        return []
    if value is True:
        return [option]
    if value is False:
        return [option, "false"]
    if isinstance(value, dict):
        if name != "samples" and value and all(map(_is_plain, value.values())):
            pairs = (f"{key}={each}" for key, each in value.items())
            return [option, ",".join(pairs)]
        return [option, json.dumps(value)]
    if isinstance(value, list):
        return [option, *map(str, value)]
    return [option, str(value)]


def _is_plain(value: Any) -> bool:
    """Return whether ``key=value`` is read as this value again."""
    if isinstance(value, bool):
        return True
    if isinstance(value, int | float):
        return value >= 0
    return (
        isinstance(value, str)
        and re.fullmatch(r"[A-Za-z./~_][\w./:~+-]*", value) is not None
        and value.lower() not in ("true", "false", "none", "nan", "inf", "infinity")
    )


def _has_random(definition: Mapping[str, Any]) -> bool:
    return any(
        _arguments(each).get("criterion") == RANDOM
        for each in definition.get("configurations") or ()
    )


def _arguments(configuration: Any) -> Mapping[str, Any]:
    return as_mapping(as_mapping(configuration).get("arguments"))
