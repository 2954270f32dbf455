"""The verdict on a model in five sentences, and what its results cannot say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_eval_pruned.results.groups import LEFT, TAKEN


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lm_eval_pruned.results.files import Run
    from lm_eval_pruned.study.findings import Findings

    #: Scores of the study by task, metric and percentage.
    Published = Mapping[tuple[str, str, float], float]


def size_of(run: Run) -> float:
    """Return the percentage of the neurons that was asked for, or that a run has lost."""
    record = run.pruning
    if asked := record["asked"].get("prune_percent"):
        return float(asked)
    kept = record["intermediate_size_after"] / record["intermediate_size_before"]
    return round(100 - 100 * kept, 1)


def sentences(name: str, found: Findings, published: Published) -> list[str]:
    """Return what was found: the verdict, losses, gains, beside chance, beside the study."""
    return [
        f"For {name} the dichotomy {found.verdict}: {_why(found)}.",
        f"{_losses(found)}.",
        f"{_gains(found)}.",
        f"{_against_chance(found)}.",
        f"{_beside_the_study(found, published)}.",
    ]


def open_questions(found: Findings, energy: bool) -> list[str]:
    """Return what the results do not tell, a sentence each."""
    blind = [each for each in found.tasks if not each.can_fall]
    unknown = [t.task for t in found.tasks if None in t.above.values()]
    limit, seeds = found.base.config.get("limit"), found.beside["random"]
    draws = len({run.pruning.get("seed") for run in seeds})
    told = {
        f"No floor is known for {_joined(unknown)}.": unknown,
        f"Each task is its first documents (limit {limit}), too few for small differences.": limit,
        f"Chance is as many random cuts of each size as there are seeds: {draws}.": draws,
        "No cut by recipe=best was evaluated.": not found.beside["recipe=best"],
        "Energy and latency were not measured.": not energy,
        "Energy is gross, and modelled where the profile says so.": energy,
    }
    return [
        *(
            f"{each.task} cannot show a loss: unpruned, it is not shown to be above the "
            f"{each.floor.floor:.3f} of {each.floor_by}."
            for each in blind
            if each.floor
        ),
        *(text for text, applies in told.items() if applies),
        *[*found.failed, *found.comparison.notes][:8],
    ]


def _joined(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def _clauses(groups: Mapping[str, Sequence[str]]) -> str:
    """Return ``PHRASE a and b`` for each phrase with tasks, or ``a and b PHRASE`` after a dash."""
    told = [
        f"{_joined(tasks)} {phrase[1:]}"
        if phrase[0] == "-"
        else f"{phrase} {_joined(tasks)}"
        for phrase, tasks in groups.items()
        if tasks
    ]
    return "; ".join(told)


def _why(found: Findings) -> str:
    taken, left = found.on(TAKEN), found.on(LEFT)
    if found.verdict == "cannot be decided":
        return "on one of its two sides no task has a score that is shown to be above the floor"
    drops = [each.task for each in left if each.falls]
    rises = [each.task for each in left if each.rises and each.task not in drops]
    kept = [e.task for e in left if e.can_fall and e.task not in (*drops, *rises)]
    falls = [each.task for each in taken if each.falls]
    groups = {"-fall": falls, "-rise above the floor": rises, "-fall as well": drops}
    told = _clauses({**groups, "no change is shown in": kept})
    return told if falls else f"no loss of knowledge or language is shown; {told}"


def _losses(found: Findings) -> str:
    first: dict[str, list[str]] = {}
    for run in found.cuts:
        known = [task for tasks in first.values() for task in tasks]
        first[f"at {size_of(run):g} % in"] = [
            each.task
            for each in found.on(TAKEN)
            if each.task not in known and run.name in (row.run for row in each.falls)
        ]
    told = _clauses(first)
    return f"A loss is first shown {told}" if told else "No loss is shown at any size"


def _gains(found: Findings) -> str:
    sizes, told = {run.name: size_of(run) for run in found.cuts}, []
    for each in found.on(LEFT):
        better = [row for row in each.rows if row.verdict == "better"]
        if not better:
            continue
        row = better[-1]
        above = "above" if each.above[row.run] else "not shown to be above"
        floor = each.floor and f"{above} the {each.floor.floor:.3f} of {each.floor_by}"
        told.append(
            f"{each.task} goes from {row.base_score:.3f} to {row.score:.3f} at "
            f"{sizes[row.run]:g} %, {floor or 'and no floor is known'}"
        )
    return "; ".join(told) or "No rise is shown in what the study calls robust"


def _against_chance(found: Findings) -> str:
    groups: dict[str, list[str]] = {
        "the criterion keeps more in": [],
        "it keeps less in": [],
        "it keeps more at some sizes and less at others in": [],
        "no difference is shown in": [],
    }
    more, less, both, neither = groups.values()
    for task, verdicts in found.random.items():
        up, down = "better" in verdicts, "worse" in verdicts
        (both if up and down else more if up else less if down else neither).append(
            task
        )
    told = _clauses(groups)
    if not told:
        return "Nothing was cut at random, so nothing tells the criterion from chance"
    return f"Against random cuts of the same size, {told}"


def _beside_the_study(found: Findings, published: Published) -> str:
    run = found.cuts[-1]
    groups: dict[str, list[str]] = {"-move as published": [], "-move the other way": []}
    size = size_of(run)
    for each in found.tasks:
        ends = [published.get((each.task, each.metric, at)) for at in (0.0, size)]
        rows = [row for row in each.rows if row.run == run.name]
        if rows and ends[0] is not None and ends[1] is not None:
            same = (ends[1] > ends[0]) == (rows[0].difference > 0)
            groups["-move as published" if same else "-move the other way"].append(
                each.task
            )
    told = _clauses(groups)
    if not told:
        return "The study published nothing that can be set beside these scores"
    return f"Beside the study's own scores at {size:g} %, {told}"
