"""Single documents of a logged task: their scores, the choices they offer, the answers."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy import stats

from lm_eval_pruned.results import bbq
from lm_eval_pruned.results.files import Run, Score
from lm_eval_pruned.results.lines import CHOICE_PROB, KL, Lines, read_samples
from lm_eval_pruned.results.metrics import metric_of
from lm_eval_pruned.results.parts import ResultsError


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from lm_eval_pruned.results.samples import Question, Samples


class Transform(NamedTuple):
    """How the harness computes a score from the weighted mean over documents.

    The score is ``factor * mean``, or the exponential of that. Tests, intervals and trends are
    computed on ``factor * mean``: the score itself, or the logarithm of a perplexity.
    """

    factor: float
    exponential: bool = False

    def score(self, mean: Any) -> Any:
        """Return the score for a mean."""
        scaled = self.factor * mean
        return np.exp(scaled) if self.exponential else scaled


#: The transforms that are tried, in this order, until one yields the reported score.
TRANSFORMS = {
    "mean": Transform(1.0),
    "perplexity": Transform(-1.0, exponential=True),
    "bits_per_byte": Transform(-1 / math.log(2)),
    # A mean, too, of values that could be any number, although those at hand lie between 0 and 1.
    "unbounded": Transform(1.0),
}
#: Types of what JSON holds that can be a score.
_NUMBERS = {bool, int, float}
#: Means that have no bounds, by the beginnings of their names; `bbq` holds the last two.
_UNBOUNDED = ("kl,", "amb_bias_score", "disamb_bias_score")


@dataclass(frozen=True)
class Documents:
    """Scores of one (task, metric), document by document.

    The score is ``TRANSFORMS[transform].score(sum(weights * values) / sum(weights))``.

    Attributes:
        keys: What documents are matched by, length n: task, ``doc_hash`` and which repetition.
        values: Shape (n,), float64.
        weights: Shape (n,), float64; ones for a plain mean.
        clusters: Cluster of each document, length n, or None if documents are independent.
        transform: Name in `TRANSFORMS`.
        level: Level of each document, length n, such as the kind of a text; empty where the task declares none.
        levels: Scores without knowledge, where the documents tell: of a model that finds all choices alike
            (``chance``), and of always giving the ``commonest answer``, where one is right more often than chance
            makes it.
        samples: The lines of the documents; None where they are not known.
    """

    keys: tuple[tuple[str, str, int], ...]
    values: np.ndarray
    weights: np.ndarray
    clusters: tuple[str, ...] | None
    transform: str
    level: tuple[str, ...] = ()
    levels: Mapping[str, float] = field(default_factory=dict)
    samples: Samples | None = None

    @property
    def score(self) -> float:
        """What the harness would report of these documents."""
        mean = np.average(self.values, weights=self.weights)
        return float(TRANSFORMS[self.transform].score(mean))

    def answers(self, metric: str) -> list[str | None]:
        """Return `Samples.answers`, length n; empty where the lines are not known."""
        return self.samples.answers(metric) if self.samples else []

    def at(self, level: str) -> Documents:
        """Return the documents of a level, of which no score without knowledge is known."""
        named = zip(self.keys, self.level, strict=True)
        keys = tuple(key for key, name in named if name == level)
        return replace(self.taken(keys), levels={})

    def taken(self, keys: tuple[tuple[str, str, int], ...]) -> Documents:
        """Return the documents with these keys, in their order."""
        indices = {key: index for index, key in enumerate(self.keys)}
        order = [indices[key] for key in keys]
        return replace(
            self,
            keys=keys,
            values=self.values[order],
            weights=self.weights[order],
            clusters=self.clusters and tuple(self.clusters[n] for n in order),
            level=self.level and tuple(self.level[n] for n in order),
            samples=self.samples and self.samples.taken(order),
        )

    @property
    def members(self) -> dict[str, Documents]:
        """The documents of each task, with their own scores without knowledge, by its name."""
        keys: dict[str, list[tuple[str, str, int]]] = {}
        for key in self.keys:
            keys.setdefault(key[0], []).append(key)
        found = {name: self.taken(tuple(of_task)) for name, of_task in keys.items()}
        return {
            name: replace(own, levels=levels_of(own.samples.questions, own.weights))
            if self.levels and own.samples
            else own
            for name, own in found.items()
        }

    @property
    def groups(self) -> dict[str, Any]:
        """How documents weigh and belong together, as `compare.claims.paired` takes it.

        Strata are the tasks, which another draw would have too; None for a single one.
        """
        tasks = tuple(task for task, _, _ in self.keys)
        strata = tasks if len({*tasks}) > 1 else None
        return {"weights": self.weights, "clusters": self.clusters, "strata": strata}


def scored_on(run: Run, key: tuple[str, str], documents: Documents) -> Run:
    """Return a run with one score, that of some documents; more is better where the run has no such score."""
    known = run.scores.get(key, Score(math.nan, None, True, None))
    score = known._replace(
        value=documents.score, stderr=None, documents=len(documents.keys)
    )
    of_task = {key[0]: {key[1]: documents}}
    return replace(run, scores={key: score}, documents=of_task)


def documents_of(run: Run, task: str, metric: str) -> Documents | None:
    """Return the documents of a score of a task or group, from the logged samples; the run keeps them.

    None where samples are missing, or where no aggregation known here makes the reported score of them
    (some of the harness's are not functions of a mean). `CHOICE_PROB` is there where each document has
    choices, one of which is right. ResultsError as in `read_samples`.
    """
    if task not in run.documents:
        rows: dict[str, list[Lines]] = {m: [] for name, m in run.scores if name == task}
        rows[CHOICE_PROB] = []
        for leaf in run.leaves(task):
            read = read_samples(run, leaf, rows) if leaf in run.samples else {}
            # A score that some member has no documents of is not made of documents.
            rows = {m: [*rows[m], read[m]] for m in rows if m in read}
        run.documents[task] = {
            name: documents
            for name, parts in rows.items()
            if (documents := _documents(name, parts, run.scores.get((task, name))))
        }
    return run.documents[task].get(metric)


def check_score(run: Run, task: str, metric: str) -> None:
    """Raise ResultsError where a score of known form is not that of the logged documents: one is damaged.

    Nothing is raised of groups, and where documents have no plain numbers, whose aggregation may be any.
    """
    row = metric_of(task, metric, run.metadata.get(task))
    if (
        documents_of(run, task, metric) is not None
        or run.subtasks.get(task)
        or task not in run.samples
        or not (row.limits or row.loss)
    ):
        return
    lines = read_samples(run, task, [metric]).get(metric)
    values = lines.values if lines else []
    if values and {*map(type, values)} <= _NUMBERS:
        score = run.scores[task, metric].value
        raise ResultsError(
            f"{run.path} says that {task} has a {metric.partition(',')[0]} of {score:.6g}, which is not that of "
            f"the documents in {run.samples[task]}: one of them is damaged, so evaluate again."
        )


def _documents(
    metric: str, parts: Sequence[Lines], reported: Score | None
) -> Documents | None:
    if not parts:
        return None
    unbounded, (keys, raw, samples) = metric.startswith(_UNBOUNDED), Lines.joined(parts)
    if unbounded and metric != KL:
        counted, raw = bbq.contributions(metric, raw)
        keys, samples = tuple(keys[n] for n in counted), samples.taken(counted)
    if not raw:
        return None
    transforms = [name for name in TRANSFORMS if (name == "unbounded") == unbounded]
    leaves = [leaf for leaf, *_ in keys]
    counts = Counter(leaves)
    # The score of a group is a mean over documents, or over tasks.
    divisors = [None, np.array([counts[leaf] for leaf in leaves])][: len(counts)]
    for (values, weights), divisor, transform in itertools.product(
        _readings(raw), divisors, transforms
    ):
        if divisor is not None:
            weights = weights / divisor
        with np.errstate(over="ignore"):
            mean = np.average(values, weights=weights)
            score = TRANSFORMS[transform].score(mean)
        expected = score if reported is None else reported.value
        if np.isclose(score, expected, rtol=1e-6, atol=1e-9, equal_nan=True):
            questions = samples.questions
            clusters = tuple(question.cluster for question in questions)
            grouped = clusters if len({*clusters}) < len(keys) else None
            level = tuple(question.level for question in questions)
            about = level if all(level) else (), levels_of(questions, weights, metric)
            return Documents(keys, values, weights, grouped, transform, *about, samples)
    return None


def _readings(raw: Sequence[Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield what per-document values can mean, as (values, weights).

    A number is a score. A list is several scores (IFEval's instructions) or, if each
    is a pair, a sum with its weight (log-likelihood and words).
    """
    if {*map(type, raw)} <= _NUMBERS:
        # One number for all of many runs.
        yield np.array(raw, dtype=float), np.broadcast_to(1.0, len(raw))
        return
    lists = all(isinstance(value, list) and value for value in raw)
    if lists and {*map(type, itertools.chain(*raw))} <= _NUMBERS:
        lengths = np.array([*map(len, raw)], dtype=float)
        yield np.array([*map(np.mean, raw)]), lengths
        if (lengths == 2).all() and all(weight > 0 for _, weight in raw):
            sums, weights = np.array(raw, dtype=float).T
            yield sums / weights, weights


def levels_of(
    questions: Sequence[Question], weights: np.ndarray, metric: str = "acc"
) -> dict[str, float]:
    """Return scores without knowledge, by their names; see `Documents.levels`."""
    if not metric.startswith(("acc", "mc1", "mc2", CHOICE_PROB)):
        return {}
    chances = [question.chance for question in questions]
    rights = [question.right for question in questions]
    if None in chances:
        return {}
    if metric.startswith("mc1"):
        # The best answer has to beat the false ones, and not the other true ones.
        false = [len(s.choices) * (1 - (s.chance or 0)) for s in questions]
        chances = [1 / (1 + count) for count in false]
    chance = float(np.average(np.array(chances, dtype=float), weights=weights))
    # The same choice in words may be the right one in every other context.
    if None in rights or len({question.choices for question in questions}) > 1:
        return {"chance": chance}
    answers = np.array(rights, dtype=int)
    most = int(np.bincount(answers).max())
    # One of several answers is right in more than its share of documents by luck, too. The level is that
    # at which a model that gives this answer to all would be taken to be above chance.
    share = 1 / len(questions[0].choices)
    p = stats.binomtest(most, len(answers), share, "greater").pvalue
    if p >= 0.05:
        return {"chance": chance}
    commonest = float(np.bincount(answers, weights).max() / weights.sum())
    return {"chance": chance, "commonest answer": commonest}
