"""May the candidate be shipped? Each score by the gate's rules, and what would decide it."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from lm_eval_pruned.compare.comparison import compare
from lm_eval_pruned.compare.judge import Case, Difference, judged as judge
from lm_eval_pruned.compare.kept import NO_LOSS
from lm_eval_pruned.compare.margin import Margin
from lm_eval_pruned.compare.pairing import DocumentReader, paired_documents
from lm_eval_pruned.compare.pooled import GUARD, mean_of, p_of_claim
from lm_eval_pruned.gate.check import CLAIM_LEVEL, decisions
from lm_eval_pruned.results.documents import CHOICE_PROB
from lm_eval_pruned.results.files import ResultsError, Run, Score
from lm_eval_pruned.results.groups import is_share, primary_metrics
from lm_eval_pruned.results.settings import asked_differently
from lm_eval_pruned.verdict.needed import what_decides


if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

Key = tuple[str, str]
#: By exit code.
ANSWERS = ("ship", "do not ship", "not decided")
CLAIM = "not_worse"
#: Metrics that say which way a model is biased, whose tasks may list others first.
BIAS = ("bias", "pct_stereotype")
#: Metrics that are the probability of the right answers, which needs fewer documents than their share.
PROBABILITIES = ("mc2", CHOICE_PROB.partition(",")[0])
_WORDS = {"fail": "worse", "undecided": "undecided", "improved": "better"}


class Judged(NamedTuple):
    """One score: how it differs, and what the gate says of it within a margin.

    `word` is ``equivalent``, ``not worse``, ``better``, ``worse``, ``undecided`` or `NO_LOSS`; `take`
    says what would decide.
    """

    row: Difference
    margin: str
    word: str
    message: str
    take: str


class Pooled(NamedTuple):
    """One claim on the mean over `keys`, tasks and metrics, and how it was judged.

    `text` is the claim: how far the score falls on average and in each task.
    """

    keys: Sequence[Key]
    judged: Judged
    text: str

    @property
    def sentence(self) -> str:
        """The claim, whether it is shown, and the mean difference in points with its 90 % interval."""
        row, tasks = self.judged.row, ", ".join(task for task, _ in self.keys)
        shown = {
            "undecided": "not decided",
            "worse": "not shown, and the mean is worse",
        }
        ends = (end for end in (row.low, row.high) if end is not None)
        interval = ", ".join(f"{100 * end:+.1f}" for end in ends)
        return (
            f"{self.text} ({tasks}): {shown.get(self.judged.word, 'shown')}; the mean differs by "
            f"{100 * row.difference:+.1f} points [{interval}]."
        )


class Verdict(NamedTuple):
    """The answer on two runs, with the exit code of `check`.

    The claims of `pooled` decide in place of those of their tasks, unless a task is shown to be worse.
    """

    base: Run
    candidate: Run
    code: int
    judged: Sequence[Judged]
    beside: Sequence[Difference]
    notes: Sequence[str]
    pooled: Sequence[Pooled] = ()

    @property
    def open(self) -> list[Judged]:
        """What is shown to be worse, or keeps the verdict from being decided."""
        held = {key for each in self.pooled for key in each.keys}
        return [
            each
            for each in [*(pool.judged for pool in self.pooled), *self.judged]
            if each.word == "worse"
            or (
                each.word == "undecided"
                and (each.row.task, each.row.metric) not in held
            )
        ]


def decide(
    base: Run,
    candidate: Run,
    margins: Sequence[str] = (),
    floors: Sequence[Run] = (),
    *,
    measure: str | None = None,
    read: DocumentReader | None = None,
    texts: bool = True,
) -> Verdict:
    """Compare a candidate with its base, each score within its margin, as `read_margins` takes it.

    `measure` is judged of each task that has it; see `PROBABILITIES` for what is judged of others. A
    candidate is shipped if each score is shown to lie within its margin, which needs no
    correction for many scores; it is not if one is shown to be worse, and not to lie within. `floors`
    are runs of models that know nothing: where the base is not shown to be above them, nobody could
    lose anything, and such scores alone decide nothing.

    Raises:
        ValueError: A margin names nothing that was scored, or the runs cannot be compared: of other
            tasks, versions, documents or settings, or without samples.
    """
    read = read or DocumentReader()
    base, candidate, *floors = (measured(r, read) for r in (base, candidate, *floors))
    keys = [*_judged_keys(base, measure)]
    if missing := [" ".join(key) for key in keys if key not in candidate.scores]:
        raise ResultsError(
            f"The candidate {candidate.path} has no {', '.join(missing)}, which the base has: "
            "evaluate it on the same tasks."
        )
    known = judged_scores(base, candidate, measure=measure)
    asked = check_margins(margins, known)
    chosen = {
        key: Margin(CLAIM, _asked(key, asked) or _usual(base, candidate, key))
        for key in keys
    }
    # Of this level, intervals beyond the margin are what the gate calls shown.
    compared = compare(
        base,
        [candidate, *floors],
        alpha=2 * CLAIM_LEVEL,
        margins=chosen,
        read=read,
        texts=texts,
    )
    _refuse_another_test(base, candidate, keys)
    by_key = {(row.task, row.metric): row for row in compared.rows}
    rows = [by_key[key] for key in keys]
    cases = [
        Case(
            *(base, candidate, key, paired_documents(base, candidate, *key, read)),
            *("", True, chosen[key]),
        )
        for key in keys
    ]
    pools = _pools(cases, rows, asked)
    means = [mean_of(pool) for pool in pools]
    found = _judged(
        [*([case] for case in cases), *pools],
        [*cases, *(mean._replace(family="") for mean in means)],
        [*rows, *judge(means, 2 * CLAIM_LEVEL)],
    )
    alone, together = found[: len(cases)], found[len(cases) :]
    pooled = [
        Pooled([case.key for case in pool], each, claim_text(pool))
        for pool, each in zip(pools, together, strict=True)
    ]
    blind = all(_at_floor(row) for row in rows)
    counted = [by_key[key] for key in primary_metrics([base, candidate])]
    beside = [row for row in counted if row not in rows]
    verdict = Verdict(base, candidate, 0, alone, beside, compared.notes, pooled)
    words = {each.word for each in verdict.open}
    code = 1 if "worse" in words else 2 if words or blind else 0
    return verdict._replace(code=code)


def _judged(
    claims: Sequence[Sequence[Case]], cases: Sequence[Case], rows: Sequence[Difference]
) -> list[Judged]:
    """Return what the gate says of `cases`, of which a claim may be made up of several."""
    found = []
    told = decisions(cases, rows, [CLAIM_LEVEL] * len(cases))
    for claim, case, row, (status, message) in zip(
        claims, cases, rows, told, strict=True
    ):
        if not math.isfinite(row.score):
            status, message = "fail", f"The score is {row.score}, not a finite number."
        word = _WORDS.get(status)
        if status == "pass":
            word = "equivalent" if _inside(row, case) else "not worse"
            p = p_of_claim(claim) if claim[1:] else 0.0
            if p is None or p >= CLAIM_LEVEL:
                status = word = "undecided"
                message = f"Shown of the mean, and not of each task (p = {p or 1:.3g})."
        if status != "fail" and _at_floor(row):
            # Such a score counts neither for nor against shipping.
            status, word = "pass", NO_LOSS
        take = what_decides(claim, row) if status == "undecided" else ""
        margin = case.margin.text if case.margin else ""
        found.append(Judged(row, margin, str(word), message, take))
    return found


def _pools(
    cases: Sequence[Case], rows: Sequence[Difference], asked: Mapping[str, str]
) -> list[list[Case]]:
    """Return the cases that are claimed together: of one measure, with one margin in points.

    Not among them are tasks whose margin the user named, and those that cannot show a loss.
    """
    found: dict[object, list[Case]] = {}
    for case, row in zip(cases, rows, strict=True):
        alone = case.key[0] in asked or _at_floor(row) or row.p is None
        if not alone and _can_be_pooled(case):
            found.setdefault(_kind(case), []).append(case)
    return [pool for pool in found.values() if len(pool) > 1]


def _can_be_pooled(case: Case) -> bool:
    """Whether a score is a mean between 0 and 1, more is better, and the margin is in points."""
    scores = [score.value for score in case.scores]
    return bool(
        case.pair
        and case.pair[0].transform == "mean"
        and case.scores[0].higher_is_better
        and case.margin_size
        and case.margin
        and case.margin.share is None
        and _names(case.key)[1] not in BIAS
        and is_share(case.key[1], scores)
    )


def _kind(case: Case) -> tuple[str, float | None]:
    """What a score measures, and its margin."""
    name = _names(case.key)[1]
    return PROBABILITIES[0] if name in PROBABILITIES else name, case.margin_size


def claim_text(pool: Sequence[Case]) -> str:
    """Return what is claimed of several tasks together, in a sentence without its end."""
    size, name = 100 * (pool[0].margin_size or 0.0), _names(pool[0].key)[1]
    what = "The probability of the right answer" if name in PROBABILITIES else name
    return (
        f"{what} falls by less than {size:g} points on average over these {len(pool)} tasks, and by "
        f"less than {GUARD * size:g} in each"
    )


def _at_floor(row: Difference) -> bool:
    """Whether nobody could lose anything: the base is not shown to be above the floor."""
    is_bias = _names((row.task, row.metric))[1] in BIAS
    return bool(row.floor and not row.floor.base_above_floor and not is_bias)


def _inside(row: Difference, case: Case) -> bool:
    """Whether the interval lies within the margin on both sides."""
    size, ends = case.margin_size, (row.low, row.high)
    return size is not None and all(end is not None and abs(end) < size for end in ends)


def _refuse_another_test(base: Run, candidate: Run, keys: Sequence[Key]) -> None:
    """Raise ResultsError where two runs were asked differently, or one has no samples of a task."""
    for task in dict.fromkeys(task for task, _ in keys):
        before, after = (run.settings.get(task, {}) for run in (base, candidate))
        if why := asked_differently(before, after, "for the base"):
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


def read_margins(texts: Sequence[str], known: set[str] | None = None) -> dict[str, str]:
    """Return margins by the task or metric that ``[NAME=]MARGIN`` names, else by an empty text."""
    found = {name: margin for name, _, margin in (t.rpartition("=") for t in texts)}
    for name, margin in found.items():
        Margin("margin", margin)
        if known is not None and name not in {"", *known}:
            raise ValueError(
                f"--margin {name}={margin} names no task or metric of this verdict: it has "
                f"{', '.join(sorted(known))}."
            )
    return found


def check_measure(measure: str | None, metrics: Iterable[str]) -> None:
    """Raise ValueError for a measure that no task of a verdict has; `metrics` are those of all tasks."""
    names = sorted({metric.partition(",")[0] for metric in metrics})
    if measure and names and measure not in names:
        raise ValueError(
            f"--measure {measure} is a metric of no task of this verdict: name one of "
            f"{', '.join(names)}."
        )


def check_margins(
    texts: Sequence[str], known: Mapping[str, Mapping[str, Sequence[float]]]
) -> dict[str, str]:
    """Return margins as `read_margins` does, and refuse those that cannot be meant.

    `known` are tasks, the metrics of each, and of each metric the scores, where there are some yet.
    """
    names = {_names((task, name)) for task, of in known.items() for name in of}
    # The metrics of a task in Python are known once it has scores.
    listed = {*itertools.chain(*names)} if all(known.values()) else None
    asked = read_margins(texts, listed)
    for task, of in known.items():
        # So is which of several metrics counts.
        sure = all(scores or is_share(metric) for metric, scores in of.items())
        for metric, scores in of.items() if sure else ():
            if margin := _asked((task, metric), asked):
                Margin("margin", margin).check(task, metric, *scores)
    return asked


def judged_scores(
    *runs: Run, measure: str | None = None
) -> dict[str, dict[str, list[float]]]:
    """Return the scores of runs by task and metric, of those that a verdict on the first looks at."""
    found: dict[str, dict[str, list[float]]] = {}
    for key in _judged_keys(runs[0], measure):
        values = [run.scores[key].value for run in runs]
        found.setdefault(key[0], {})[key[1]] = values
    return found


def measured(run: Run, read: DocumentReader, tasks: Sequence[str] = ()) -> Run:
    """Return a run with the score `CHOICE_PROB` of each task that has choices, one of which is right.

    Of `tasks`, or else of all that are no members of groups.
    """
    scores = {}
    for task in tasks or run.tasks(subtasks=False):
        if documents := read(run, task, CHOICE_PROB):
            mean = float(documents.values.mean())
            scores[task, CHOICE_PROB] = Score(mean, None, True, len(documents.values))
    return replace(run, scores={**run.scores, **scores})


def pilots_of(
    base: Run,
    run: Run,
    tasks: Sequence[str],
    margin: str | None = None,
    measure: str | None = None,
) -> list[list[Case]]:
    """Return the cases of each claim that may be made on a task, or of the one on several.

    Of a task, claims on `measure` or else on what a verdict judges and on the score that counts;
    of several tasks, the claim on the mean of what it judges first.

    ResultsError if results or samples of a task are missing; ValueError for a margin that cannot be
    meant, and where there is no mean over the tasks.
    """
    read, found = DocumentReader(), []
    for task in tasks:
        if task not in {*base.tasks()} & {*run.tasks()}:
            raise ResultsError(
                f"{base.name} and its runs share no results of {task}: pass a task that both have "
                f"({base.name} has {', '.join(base.tasks()) or 'none'}), or evaluate some of its documents."
            )
        one, other = (measured(each, read, [task]) for each in (base, run))
        check_measure(measure, (metric for of, metric in one.scores if of == task))
        keys = [*_judged_keys(one, measure, subtasks=True)]
        if not measure:
            keys += primary_metrics([one, other], subtasks=True)
        keys = [key for key in dict.fromkeys(keys) if key[0] == task]
        found.append([_pilot(one, other, key, margin, read) for key in keys])
    if len(tasks) == 1:
        return [[case] for case in found[0]]
    first = [of[0] for of in found]
    if len({_kind(case) for case in first}) > 1 or not all(map(_can_be_pooled, first)):
        raise ValueError(
            f"There is no mean over {', '.join(tasks)}, which takes scores between 0 and 1 of one "
            "measure, with a margin in points: name one with --measure and --margin, or one task."
        )
    return [first]


def _pilot(
    base: Run, run: Run, key: Key, margin: str | None, read: DocumentReader
) -> Case:
    pair = paired_documents(base, run, *key, read)
    if pair is None:
        raise ResultsError(
            f"{key[0]} of {run.name} has no logged samples from which its score can be computed: "
            "evaluate with --log_samples."
        )
    within = Margin(CLAIM, margin or _usual(base, run, key))
    within.check(*key, base.scores[key].value, run.scores[key].value)
    return Case(base, run, key, pair, "", margin=within)


def _judged_keys(
    base: Run, measure: str | None = None, *, subtasks: bool = False
) -> Iterator[Key]:
    """Yield what is judged of each task: `measure` where it has it, else what decides soonest.

    That is a score with an exact floor, the probability of the right answer, or the score that counts;
    beside it, how far a model is biased.
    """
    for task, primary in primary_metrics([base], subtasks=subtasks):
        metrics = {
            name.partition(",")[0]: name for of, name in base.scores if of == task
        }
        biases = [
            metrics[name] for name in BIAS if metrics.get(name, primary) != primary
        ]
        # CrowS-Pairs lists first how far two sentences are apart, whichever is likelier.
        apart = biases and primary.startswith("likelihood_diff")
        soonest = [] if base.exact_floor(task, primary) is not None else PROBABILITIES
        named = (metrics[name] for name in (measure, *soonest) if name in metrics)
        first = primary if primary.partition(",")[0] in BIAS else next(named, primary)
        yield from ((task, metric) for metric in [*[first] * (not apart), *biases])


def _names(key: Key) -> tuple[str, str]:
    return key[0], key[1].partition(",")[0]


def _asked(key: Key, asked: dict[str, str]) -> str | None:
    return next((asked[name] for name in (*_names(key), "") if name in asked), None)


def _usual(base: Run, candidate: Run, key: Key) -> str:
    """Return the margin by default: of a score with an exact floor, 95 % are kept.

    Less than 15 points of a bias take more than the 40 questions of the demo, once one answer changes.
    """
    if base.exact_floor(*key) is not None:
        return "5%"
    if _names(key)[1] in BIAS:
        return "15pt"
    scores = base.scores[key].value, candidate.scores[key].value
    return "2pt" if is_share(key[1], scores) else "2%"
