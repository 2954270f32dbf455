"""May the candidate be shipped? The claims on both runs, their answer, and what would decide."""

from __future__ import annotations

import itertools
import math
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from lm_eval_pruned.compare.answer import CODES, REFUTED, WORDS
from lm_eval_pruned.compare.cases import Case
from lm_eval_pruned.compare.claims import CLAIM_LEVEL
from lm_eval_pruned.compare.comparison import compare
from lm_eval_pruned.compare.floors import blind_scores
from lm_eval_pruned.compare.judge import (
    OTHER,
    PART,
    SCORE,
    Claim,
    answer_of,
    claims_on,
    p_worse,
)
from lm_eval_pruned.compare.margins import (
    Margin,
    further_measures,
    judged_keys,
    usual_margin,
    with_choice_prob,
)
from lm_eval_pruned.compare.pairing import (
    another_test,
    answers_changed_by,
    served_otherwise,
)
from lm_eval_pruned.compare.power import ALIKE, Pilot, documents_for
from lm_eval_pruned.results.documents import check_score
from lm_eval_pruned.results.files import ResultsError, Run
from lm_eval_pruned.results.metrics import is_share


if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lm_eval_pruned.compare.floors import Standing
    from lm_eval_pruned.compare.judge import Difference

    Key = tuple[str, str]


class Verdict(NamedTuple):
    """The answer on two runs, by their claims.

    `rows` are all differences between the two, those of scores that are not judged among them; `floors` say
    how far the base is above them; `served` are the settings that differ, as `served_otherwise` returns them.
    """

    base: Run
    candidate: Run
    answer: str
    claims: Sequence[Claim]
    notes: Sequence[str]
    rows: Sequence[Difference]
    floors: Sequence[Standing]
    served: Mapping[str, tuple[Any, Any]]

    @property
    def code(self) -> int:
        """The exit code, which is that of `check`."""
        return CODES[self.answer]

    @property
    def changed(self) -> list[str]:
        """The names of the settings that change the answers, whatever the weights."""
        return answers_changed_by(self.served)

    def about(self, *kinds: str) -> list[Claim]:
        """Return the claims about scores, means, parts or other measures."""
        return [claim for claim in self.claims if claim.about in kinds]

    @property
    def open(self) -> list[Claim]:
        """The claims that are refuted, or keep the verdict from being decided.

        The wider margins of tasks with a mean are among them only where nothing else is.
        """
        found = [
            claim
            for claim in self.claims
            if claim.word in REFUTED
            or (claim.is_taken and WORDS[claim.word].status == "undecided")
        ]
        return [c for c in found if c.about != PART or c.row.case.member] or found

    @property
    def fallen(self) -> list[Claim]:
        """Members of groups, and other measures of answers, that are shown to be worse; refuted ones first.

        Not where the score that is judged of the task is.
        """
        worse = [c.row.case.key[0] for c in self.about(SCORE) if c.word in REFUTED]
        found = [
            claim
            for claim in self.about(PART, OTHER)
            if claim.fell
            and (claim.about == OTHER or claim.row.case.member)
            and claim.row.case.key[0] not in worse
        ]
        return sorted(found, key=lambda claim: claim.word not in REFUTED)


def decide(
    base: Run,
    candidate: Run,
    margins: Mapping[str, str] = MappingProxyType({}),
    floors: Sequence[Run] = (),
    *,
    measure: str | None = None,
) -> Verdict:
    """Compare a candidate with its base, each score within its margin, as `read_margins` returns them.

    `measure` is judged of each task that has it; see `judged_keys` for what is judged of others, and
    `answer.answer` for the rule. `floors` are runs of models that know nothing: a score whose base is not
    shown to be above them cannot show a loss.

    Raises:
        ValueError: A margin names nothing that was scored, or the runs cannot be compared: of other
            tasks, versions, documents or settings, or without samples.
    """
    base, candidate, *floors = map(with_choice_prob, [base, candidate, *floors])
    keys = [*judged_keys(base, measure, margins)]
    if missing := [" ".join(key) for key in keys if key not in candidate.scores]:
        raise ResultsError(
            f"The candidate {candidate.path} has no {', '.join(missing)}, which the base has: "
            "evaluate it on the same tasks."
        )
    check_margins(margins, keys, {key[0]: base for key in keys})
    _refuse_another_test(base, candidate, keys)
    for run, key in itertools.product((base, candidate), keys):
        check_score(run, *key)
    further = [key for key in further_measures(base, keys) if key in candidate.scores]
    within = {key: _within(base, key, margins) for key in (*keys, *further)}
    # Of this level, intervals beyond the margin are what the gate calls shown.
    compared = compare(
        base,
        [candidate, *floors],
        alpha=2 * CLAIM_LEVEL,
        margins={key: within[key] for key in keys},
    )
    cases = [Case(base, candidate, key, margin=within[key]) for key in within]
    others = [
        c for c in cases[len(keys) :] if c.pair and math.isfinite(c.test.difference)
    ]
    blind = blind_scores(base, floors, keys)
    claims = claims_on(cases[: len(keys)], others, blind, margins)
    served = served_otherwise(base, candidate)
    word = answer_of(claims, answers_changed_by(served))
    known = compared.notes, compared.rows, compared.floors, served
    return Verdict(base, candidate, word, claims, *known)


def _within(base: Run, key: Key, margins: Mapping[str, str]) -> Margin:
    return Margin("not_worse", _margin_of(key, margins) or usual_margin(base, key))


def what_decides(claim: Claim) -> str:
    """Say how many documents, in how many minutes, decide with a chance of 80 %, if the models do not differ.

    Empty where the message of the claim says why nothing was decided.
    """
    cases, case = claim.cases, claim.row.case
    alone = p_worse(case)
    if alone is not None and alone < CLAIM_LEVEL:
        return "A test of only this score would show it to be worse; a test of all scores needs more documents."
    if claim.p is None or any(each.pair is None for each in cases):
        return ""
    base, candidate = cases[0].base, cases[0].run
    pilots = [*map(Pilot, cases)]
    seen = sum(pilot.size for pilot in pilots)
    word = "equivalent" if case.up is None else "not worse"
    needed = documents_for(word, ALIKE, pilots, CLAIM_LEVEL)
    if needed is None:
        return ""
    if needed <= seen:
        return (
            f"{seen} documents would probably have decided if the models did not differ, so they may "
            "well differ: evaluate other documents, or accept a wider margin."
        )
    more = f"It would take about {needed:,} documents instead of {seen:,}"
    more += " of these tasks together" if cases[1:] else ""
    leaves = [leaf for each in cases for leaf in base.leaves(each.task)]
    if not {*leaves} <= base.evaluated.keys():
        return f"{more}."
    available = sum(base.evaluated[leaf].available for leaf in leaves)
    if available < needed:
        tasks = "the tasks have" if cases[1:] else "the task has"
        return f"{more}, but {tasks} {available:,}: accept a wider margin."
    costs = [run.seconds_per_document(leaves) for run in (base, candidate)]
    minutes = (needed - seen) * sum(map(float, filter(None, costs))) / 60
    return f"{more}, {max(1, round(minutes)):,} min." if all(costs) else f"{more}."


def _refuse_another_test(base: Run, candidate: Run, keys: Iterable[Key]) -> None:
    """Raise ResultsError where two runs were asked differently, or one has no samples of a task."""
    for task in dict.fromkeys(task for task, _ in keys):
        if why := another_test(base, candidate, task):
            raise ResultsError(
                f"The candidate {candidate.path} was evaluated otherwise on {task} ({why}): evaluate "
                "both with the same settings."
            )
        for name, run in (("base", base), ("candidate", candidate)):
            if not run.samples.keys() >= {*run.leaves(task)}:
                raise ResultsError(
                    f"The {name} {run.path} has no logged samples of {task}: evaluate it with "
                    "--log_samples."
                )


def read_margins(texts: Iterable[str]) -> dict[str, str]:
    """Return margins by the task or metric in ``[NAME=]MARGIN``; one without a name has an empty one."""
    margins = {name: text for name, _, text in (t.rpartition("=") for t in texts)}
    for text in margins.values():
        Margin("margin", text)
    return margins


def check_margins(
    margins: Mapping[str, str], keys: Sequence[Key], runs: Mapping[str, Run]
) -> None:
    """Raise ValueError for margins that cannot be meant of these scores.

    A metric is empty where it is not known yet; `runs` hold what is known of a task.
    """
    names = {name for task, metric in keys for name in (task, metric.partition(",")[0])}
    # The metrics of a task in Python are known once it has scores.
    all_known = all(metric for _, metric in keys)
    for name in sorted(margins.keys() - names - {""}) if all_known else ():
        raise ValueError(
            f"--margin {name}={margins[name]} names no task or metric of this verdict: it has "
            f"{', '.join(sorted(names))}."
        )
    # So is which of several metrics counts.
    vague = {task for task, m in keys if task not in runs and not is_share(task, m)}
    for key in keys:
        margin = _margin_of(key, margins)
        if margin and key[0] not in vague:
            Margin("margin", margin).check(*key, runs.get(key[0]))


def _margin_of(key: Key, margins: Mapping[str, str]) -> str | None:
    names = key[0], key[1].partition(",")[0], ""
    return next((margins[name] for name in names if name in margins), None)
