"""What a study found: each task against its floor and by its side, and the verdict in sentences."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.compare.comparison import compare, split_sweep
from lm_eval_pruned.compare.margins import Margin
from lm_eval_pruned.compare.pairing import DocumentReader
from lm_eval_pruned.report.pairs import compared_pairs
from lm_eval_pruned.results.files import ResultsError, as_mapping, read_json
from lm_eval_pruned.results.groups import (
    BEHAVIOUR,
    FAMILIES,
    SIDES,
    is_control,
    is_loss,
    primary_metrics,
)
from lm_eval_pruned.results.runs import FLOOR
from lm_eval_pruned.study import sides
from lm_eval_pruned.study.preset import EQUILIBRIUM, MARGIN


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lm_eval_pruned.compare.comparison import Comparison
    from lm_eval_pruned.compare.floors import Standing
    from lm_eval_pruned.compare.judge import Difference
    from lm_eval_pruned.results.files import Run
    from lm_eval_pruned.results.groups import Family
    from lm_eval_pruned.results.runs import SweepResults


@dataclass(frozen=True)
class TaskFinding:
    """One task: the `rows` of its cuts from the largest size down, and its `floor` if it is known."""

    task: str
    metric: str
    family: Family
    floor: Standing | None
    rows: list[Difference]

    def is_of(self, names: Sequence[str]) -> bool:
        """Return whether the family of the task, or its side, is among `names`."""
        return self.family.name in names or self.family.side in names

    @property
    def level(self) -> str:
        """The floor and what has it: a level, or a model that knows nothing."""
        if self.floor is None:
            return "-"
        return f"{self.floor.floor:.3f} ({self.floor.floor_name.removeprefix(FLOOR)})"

    @property
    def can_fall(self) -> bool:
        """Whether a loss can be seen: the unpruned model is shown to be above the floor.

        A loss on text has no floor where no model that knows nothing was evaluated.
        """
        if self.floor is None:
            return is_loss(self.metric)
        return bool(self.floor.base_above_floor)

    @property
    def states(self) -> list[str]:
        """What each size shows."""
        return [sides.state_at(row, self.can_fall) for row in self.rows]

    @property
    def state(self) -> str:
        """What all sizes show."""
        return sides.first_in(sides.OVER_SIZES, self.states)

    @property
    def counts(self) -> bool:
        """Whether the task can decide anything: an unpruned model at the floor can only rise."""
        return self.can_fall or self.state == sides.RISES


@dataclass(frozen=True)
class Findings:
    """The runs of one model, what of its tasks falls, keeps and rises, and the verdicts against others.

    `definition` are the options of its sweep; `against` has the verdicts of `cuts` by the criterion
    against the other cuts of the same size, by their name in `beside` and task: of several seeds,
    what is shown against each.
    """

    base: Run
    cuts: list[Run]
    beside: dict[str, list[Run]]
    tasks: list[TaskFinding]
    comparison: Comparison
    against: dict[str, dict[str, set[str]]]
    failed: list[str]
    definition: Mapping[str, Any]
    profile: Mapping[str, Any] = field(default_factory=dict)

    @property
    def criterion(self) -> str:
        """What ranked the neurons of the cuts."""
        return str(self.cuts[0].pruning.get("criterion"))

    @property
    def at_equilibrium(self) -> list[str]:
        """The names of the cuts with an expansion ratio of 2.4."""
        return [
            run.name
            for run in self.cuts
            if run.pruning["intermediate_size_after"]
            == math.ceil(EQUILIBRIUM * run.pruning["hidden_size"])
        ]

    def on(self, *names: str) -> list[TaskFinding]:
        """Return the tasks that count of sides, or of families."""
        return [task for task in self.tasks if task.counts and task.is_of(names)]

    def state(self, *names: str) -> str:
        """Return what the tasks of sides or families show together."""
        states = {task.state for task in self.on(*names)}
        return sides.first_in(sides.OVER_TASKS, states)

    def text(self, *names: str) -> str:
        """Return the tasks of sides or families by what they show."""
        evaluated = any(task.is_of(names) for task in self.tasks)
        states = {task.task: task.state for task in self.on(*names)}
        return sides.side_text(names[0].replace("_", " "), states, evaluated)

    @property
    def verdict(self) -> str:
        """Whether what the study says of its models can be said of this one."""
        return sides.verdict_on({side: self.state(side) for side in SIDES[:-1]})


def read_findings(
    sweep: SweepResults,
    alpha: float = 0.05,
    margin: str = MARGIN,
    families: Mapping[str, str] | None = None,
    read: DocumentReader | None = None,
) -> Findings:
    """Compare the runs of a study.

    Args:
        sweep: Its results.
        alpha: Level of the tests.
        margin: How far a score may be away from that of the unpruned model and be kept; see
            `compare.margin.Margin`.
        families: The family of each task that declares none.
        read: Knows documents already.

    Raises:
        ResultsError: No unpruned or no pruned model is done.
    """
    arguments = {
        str(configuration["id"]): as_mapping(configuration.get("arguments"))
        for configuration in sweep.definition["configurations"]
    }
    base, others = split_sweep(list(sweep.runs), str(sweep.path))
    ways: dict[str, list[Run]] = defaultdict(list)
    for run in others:
        if {*run.tasks()} & {*base.tasks()}:
            ways[_way(run, arguments.get(run.name, {}))].append(run)
    main = min(ways, key=_rank, default="random")
    if main == "random":
        raise ResultsError(f"{sweep.path} holds no finished pruned model yet.")
    cuts = ways.pop(main)
    cuts.sort(key=lambda run: -(run.expansion_ratio or 0))
    read, tasks = read or DocumentReader(), []
    known = {family.name: family for family in FAMILIES}
    comparison = compare(
        *(base, [*cuts, *sweep.floors]),
        alpha=alpha,
        read=read,
        margin=Margin("equivalent", margin),
    )
    for key in primary_metrics([base]):
        rows = [row for row in comparison.rows if (row.task, row.metric) == key]
        floor = next((row.floor for row in rows if row.floor), None)
        named = base.metadata.get(key[0], {}).get("family") or (families or {}).get(
            key[0]
        )
        family = known.get(str(named), FAMILIES[-1])
        tasks += [TaskFinding(*key, family, floor, rows)] if rows else []
    against = {way: _against(cuts, runs, alpha, read) for way, runs in ways.items()}
    failed = [f"{e.task} failed on {e.run}: {e.message}" for e in sweep.failures]
    options = as_mapping(sweep.definition.get("definition"))
    file = sweep.path / "profile" / "profile.json"
    profile = read_json(file) if file.is_file() else {}
    return Findings(
        base, cuts, dict(ways), tasks, comparison, against, failed, options, profile
    )


def _rank(way: str) -> list[bool]:
    """Return what puts plain cuts by a criterion before all other ways, and random cuts last."""
    return [way == "random", way.endswith("healed"), way.startswith("recipe=")]


def _way(run: Run, arguments: Mapping[str, Any]) -> str:
    """Return how a run was cut, apart from its size and seed."""
    if is_control(run):
        return "random"
    names = ("recipe", "repair", "allocation")
    parts = [f"{name}={arguments[name]}" for name in names if name in arguments]
    parts = (
        parts if "recipe" in arguments else [str(run.pruning.get("criterion")), *parts]
    )
    return ", ".join([*parts, *["healed"] * bool(run.healing)])


def _against(
    cuts: Sequence[Run], others: Sequence[Run], alpha: float, read: DocumentReader
) -> dict[str, set[str]]:
    """Return by task what is shown of any cut against all others of the same size."""
    pairs = [
        (other, run)
        for run in cuts
        for other in others
        if other.expansion_ratio == run.expansion_ratio
    ]
    seen: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in compared_pairs(pairs, alpha, read):
        seen[row.task, row.run.partition(" against ")[0]].add(row.verdict)
    against_all: dict[str, set[str]] = defaultdict(set)
    for (task, _), verdicts in seen.items():
        against_all[task] |= verdicts if len(verdicts) == 1 else {"not shown"}
    return against_all


def size_of(run: Run) -> float:
    """Return the percentage of the neurons that was asked for, or that a run has lost."""
    record = run.pruning
    if percent := record["asked"].get("prune_percent"):
        return float(percent)
    kept = record["intermediate_size_after"] / record["intermediate_size_before"]
    return round(100 - 100 * kept, 1)


def sentences(name: str, findings: Findings) -> list[str]:
    """Return what was found: verdict, losses, gains, and the criterion against the other cuts."""
    shown = "; ".join(findings.text(side) for side in SIDES[:-1])
    margin = findings.comparison.margin
    rule = (
        f"A task keeps its score where it is shown to lie within {margin and margin.text} of the "
        "unpruned model's at every size; what is not shown counts for nothing."
    )
    return [
        f"For {name} the dichotomy {findings.verdict}. {shown[0].upper()}{shown[1:]}.",
        rule,
        f"A loss is first shown {losses}."
        if (losses := filled(_losses(findings)))
        else "No loss is shown at any size.",
        f"{_gains(findings) or 'No rise is shown in what the study calls robust'}.",
        *(
            f"Compared with {way_text(way)} of the same size, {against_text(findings, way)}."
            for way in findings.beside
        ),
    ]


def over_all(models: Mapping[str, Findings]) -> str:
    """Return one sentence on the verdicts of several models."""
    verdicts = [findings.verdict for findings in models.values()]
    groups = {
        f"{verdict} for {verdicts.count(verdict)} ({{}})": [
            name for name, findings in models.items() if findings.verdict == verdict
        ]
        for verdict in dict.fromkeys(verdicts)
    }
    return f"Of {len(models)} models, the dichotomy {filled(groups)}."


def open_questions(findings: Findings) -> list[str]:
    """Return what the results leave open, a sentence each."""
    unknown = [
        task.task for task in findings.tasks if task.floor is None and not task.can_fall
    ]
    alone = [task.task for task in findings.tasks if task.family.side == SIDES[-1]]
    limit = findings.base.config.get("limit")
    draws = len({run.pruning.get("seed") for run in findings.beside.get("random", ())})
    # Told already, in the first lines.
    floors = {floor.note(findings.base.name) for floor in findings.comparison.floors}
    notes = [note for note in findings.comparison.notes if note not in floors]
    texts = {
        f"No floor is known for {sides.joined(unknown)}.": unknown,
        f"On no side: {sides.joined(alone)}. Name their families, as in `--families "
        f"{''.join(alone[:1])}=knowledge`.": alone,
        f"Each task is cut to its first documents (limit {limit}), too few for small differences.": limit,
        f"Chance is estimated from random cuts of each size, one for each seed: {draws}.": draws,
    }
    return [
        *(
            f"{task.task} cannot show a loss: unpruned, it is not shown to be above {task.level}."
            for task in findings.tasks
            if task.floor and not task.can_fall
        ),
        *(text for text, applies in texts.items() if applies),
        *[*findings.failed, *notes][:8],
    ]


def filled(groups: Mapping[str, Sequence[str]]) -> str:
    """Return the phrases with their tasks filled in, without those that have none."""
    every = (
        phrase.format(sides.joined(tasks)) for phrase, tasks in groups.items() if tasks
    )
    return "; ".join(every)


def _losses(findings: Findings) -> Mapping[str, list[str]]:
    phrases = {run.name: f"at {size_of(run):g} % in {{}}" for run in findings.cuts}
    groups: dict[str, list[str]] = {phrase: [] for phrase in phrases.values()}
    for task in findings.on(*SIDES[:-1]):
        shown = zip(task.rows, task.states, strict=True)
        falls = [row for row, state in shown if state == sides.FALLS]
        for row in falls[:1]:
            groups[phrases[row.run]].append(task.task)
    return groups


def _gains(findings: Findings) -> str:
    sizes, gains = {run.name: size_of(run) for run in findings.cuts}, []
    for task in (task for task in findings.tasks if task.family.side == BEHAVIOUR):
        for row in [row for row in task.rows if row.verdict == "better"][-1:]:
            above = row.floor and row.floor.above_floor
            gains.append(
                f"{task.task} goes from {row.base_score:.3f} to {row.score:.3f} at {sizes[row.run]:g} "
                f"%, {'above' if above else 'not shown to be above'} its floor, {task.level}"
            )
    return "; ".join(gains)


def way_text(way: str) -> str:
    """Return the name of other cuts in a sentence."""
    return "random cuts" if way == "random" else f"`{way}`"


def against_text(findings: Findings, way: str) -> str:
    """Return in which tasks the criterion keeps more or less than other cuts of the same size."""
    phrases = {
        (True, False): "the criterion keeps more in {}",
        (False, True): "it keeps less in {}",
        (True, True): "it keeps more at some sizes and less at others in {}",
        (False, False): "no difference is shown in {}",
    }
    groups: dict[str, list[str]] = {phrase: [] for phrase in phrases.values()}
    for task, verdicts in findings.against[way].items():
        groups[phrases["better" in verdicts, "worse" in verdicts]].append(task)
    return filled(groups) or "nothing was tested"
