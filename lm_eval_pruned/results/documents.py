"""Single documents of a logged task: their scores, the choices they offer, the answers."""

from __future__ import annotations

import itertools
import json
import math
import os.path
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy import special, stats

from lm_eval_pruned.results import bbq
from lm_eval_pruned.results.files import Run, Score
from lm_eval_pruned.results.metrics import metric_of
from lm_eval_pruned.results.parts import ResultsError, as_mapping, from_json, reading


if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

#: Documents that share this field belong together, if their task declares no ``cluster``: they ask
#: about the same text.
CLUSTER_FIELDS = {
    r"(^|_)musr(_|$)": "narrative",
    r"(^|_)boolq(_|$)": "passage",
    r"^race(_|$)": "article",
    r"(^|_)drop(_|$)": "passage",
    r"quad(v2|_|$)": "context",
    r"hellaswag(_|$)": "source_id",
    r"(^|_)multirc(_|$)": "paragraph",
    r"(^|_)record(_|$)": "passage",
    r"belebele(_|$)": "flores_passage",
}


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


#: Probability of the right choice among all choices of a document, which the harness does not report.
CHOICE_PROB = "choice_prob,none"
#: Divergence from the base over the whole vocabulary, in nats per token, which a verdict measures.
KL = "kl,none"
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


class Sample(NamedTuple):
    """One line of samples: how a model was asked about a document, and what it answered.

    `number` and `digest` are the harness's ``doc_id`` and ``doc_hash``; documents of one `cluster`
    ask about the same text. `choices` is empty where the model wrote freely, `right` the index of
    the one right choice, and `target` the text of the right choice, of IFEval the names of the
    instructions. `rivals` are indices of MC1's choices where the document has more of them. `level` is
    empty where the task declares none.

    The model's answer is in the `likelihoods` of the choices, natural logarithms, or is what it wrote:
    `written` after the task's filter, `text` before. None or empty where the line does not tell.
    """

    number: str
    digest: str
    cluster: str
    prompt: str
    target: str
    choices: tuple[str, ...]
    right: int | None
    chance: float | None
    rivals: tuple[int, ...]
    level: str
    likelihoods: tuple[float, ...]
    written: str | None
    text: str

    @property
    def choice_prob(self) -> float | None:
        """The probability of the right choice among all choices; None where there is not one."""
        if self.right is None or not self.likelihoods:
            return None
        return float(special.softmax(self.likelihoods)[self.right])

    def answer(self, metric: str) -> str | None:
        """Return the answer that a metric judges, likeliest for its length where the metric divides by it.

        None where the line does not tell.
        """
        if not self.likelihoods:
            return self.written
        scores = dict(enumerate(self.likelihoods))
        if metric.startswith("mc1") and self.rivals:
            scores = {n: scores[n] for n in self.rivals}
        elif metric.startswith(("acc_norm", "acc_bytes")):
            # The harness divides by the length of the choice without the space in front of it.
            texts = [choice.removeprefix(" ") for choice in self.choices]
            in_bytes = metric.startswith("acc_bytes")
            lengths = [len(text.encode() if in_bytes else text) for text in texts]
            scores = {n: score / (lengths[n] or 1) for n, score in scores.items()}
        return self.choices[max(scores, key=scores.__getitem__)].strip()


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
        levels: Scores without knowledge, where the documents tell: of a model that finds all choices alike
            (``chance``), and of always giving the ``commonest answer``, where one is right more often than chance
            makes it.
        samples: The line of each document, length n; empty where they are not known.
    """

    keys: tuple[tuple[str, str, int], ...]
    values: np.ndarray
    weights: np.ndarray
    clusters: tuple[str, ...] | None
    transform: str
    levels: Mapping[str, float] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()

    @property
    def score(self) -> float:
        """What the harness would report of these documents."""
        mean = np.average(self.values, weights=self.weights)
        return float(TRANSFORMS[self.transform].score(mean))

    def answers(self, metric: str) -> list[str | None]:
        """Return `Sample.answer` of each document, length n; empty where the lines are not known."""
        return [sample.answer(metric) for sample in self.samples]

    @property
    def level(self) -> tuple[str, ...]:
        """Level of each document, length n; empty where the task declares no field for it."""
        levels = tuple(sample.level for sample in self.samples)
        return levels if all(levels) else ()

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
            samples=self.samples and tuple(self.samples[n] for n in order),
        )

    @property
    def members(self) -> dict[str, Documents]:
        """The documents of each task, with their own scores without knowledge, by its name."""
        keys: dict[str, list[tuple[str, str, int]]] = {}
        for key in self.keys:
            keys.setdefault(key[0], []).append(key)
        found = {name: self.taken(tuple(of_task)) for name, of_task in keys.items()}
        return {
            name: replace(own, levels=levels_of(own.samples, own.weights))
            if self.levels
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
        rows: dict[str, list[Any]] = {m: [] for name, m in run.scores if name == task}
        rows[CHOICE_PROB] = []
        for leaf in run.leaves(task):
            read = read_samples(run, leaf, rows) if leaf in run.samples else {}
            # A score that some member has no documents of is not made of documents.
            rows = {m: rows[m] + read[m] for m in rows if read.get(m)}
        run.documents[task] = {
            name: documents
            for name, lines in rows.items()
            if (documents := _documents(name, lines, run.scores.get((task, name))))
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
    values = [value for _, value, _ in read_samples(run, task, [metric])[metric]]
    if values and {*map(type, values)} <= _NUMBERS:
        score = run.scores[task, metric].value
        raise ResultsError(
            f"{run.path} says that {task} has a {metric.partition(',')[0]} of {score:.6g}, which is not that of "
            f"the documents in {run.samples[task]}: one of them is damaged, so evaluate again."
        )


def _documents(
    metric: str, lines: Sequence[tuple[Any, ...]], reported: Score | None
) -> Documents | None:
    unbounded = metric.startswith(_UNBOUNDED)
    if unbounded and metric != KL:
        lines = bbq.with_contributions(metric, lines)
    if not lines:
        return None
    transforms = [name for name in TRANSFORMS if (name == "unbounded") == unbounded]
    keys, raw, samples = zip(*lines, strict=True)
    counts = Counter(leaf for leaf, *_ in keys)
    sizes = np.array([counts[leaf] for leaf, *_ in keys])
    # The score of a group is a mean over documents, or over tasks.
    for (values, weights), divisor, transform in itertools.product(
        _readings(raw), (1, sizes), transforms
    ):
        weights = weights / divisor
        with np.errstate(over="ignore"):
            mean = np.average(values, weights=weights)
            score = TRANSFORMS[transform].score(mean)
        expected = score if reported is None else reported.value
        if np.isclose(score, expected, rtol=1e-6, atol=1e-9, equal_nan=True):
            clusters = tuple(sample.cluster for sample in samples)
            grouped = clusters if len({*clusters}) < len(keys) else None
            levels = levels_of(samples, weights, metric)
            return Documents(keys, values, weights, grouped, transform, levels, samples)
    return None


def _readings(raw: Sequence[Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield what per-document values can mean, as (values, weights).

    A number is a score. A list is several scores (IFEval's instructions) or, if each
    is a pair, a sum with its weight (log-likelihood and words).
    """
    if {*map(type, raw)} <= _NUMBERS:
        yield np.array(raw, dtype=float), np.ones(len(raw))
        return
    lists = all(isinstance(value, list) and value for value in raw)
    if lists and {*map(type, itertools.chain(*raw))} <= _NUMBERS:
        lengths = np.array([*map(len, raw)], dtype=float)
        yield np.array([*map(np.mean, raw)]), lengths
        if (lengths == 2).all() and all(weight > 0 for _, weight in raw):
            sums, weights = np.array(raw, dtype=float).T
            yield sums / weights, weights


def levels_of(
    samples: Sequence[Sample], weights: np.ndarray, metric: str = "acc"
) -> dict[str, float]:
    """Return scores without knowledge, by their names; see `Documents.levels`."""
    chances = [sample.chance for sample in samples]
    rights = [sample.right for sample in samples]
    if None in chances or not metric.startswith(("acc", "mc1", "mc2", CHOICE_PROB)):
        return {}
    if metric.startswith("mc1"):
        # The best answer has to beat the false ones, and not the other true ones.
        false = [len(s.choices) * (1 - (s.chance or 0)) for s in samples]
        chances = [1 / (1 + count) for count in false]
    chance = float(np.average(np.array(chances, dtype=float), weights=weights))
    # The same choice in words may be the right one in every other context.
    if None in rights or len({sample.choices for sample in samples}) > 1:
        return {"chance": chance}
    answers = np.array(rights, dtype=int)
    most = int(np.bincount(answers).max())
    # One of several answers is right in more than its share of documents by luck, too.
    count = len(samples[0].choices)
    p = count * stats.binomtest(most, len(answers), 1 / count, "greater").pvalue
    if p >= 0.05:
        return {"chance": chance}
    commonest = float(np.bincount(answers, weights).max() / weights.sum())
    return {"chance": chance, "commonest answer": commonest}


def read_samples(
    run: Run, task: str, metrics: Iterable[str]
) -> dict[str, list[tuple[Any, ...]]]:
    """Read the logged documents of one task, not of a group, in the order of ``doc_id``.

    Returns by metric the key of each document that has it, as in `Documents`, the value and the sample.
    ResultsError if the file cannot be read, holds a document twice, or another number of documents
    than the results file says.
    """
    file, numbers = run.samples[task], defaultdict[str, set[int]](set)
    metadata = run.metadata.get(task, {})
    rows: dict[str, list[tuple[Any, ...]]] = {metric: [] for metric in metrics}
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line_number, line in enumerate(lines, 1):
            with reading(
                f"{file}, line {line_number}, is damaged",
                f"evaluate {task} again with --log_samples.",
            ):
                try:
                    row = from_json(line)
                    row["doc_hash"]
                except (json.JSONDecodeError, KeyError, TypeError, RecursionError):
                    raise ResultsError(
                        f"{file}, line {line_number}: not complete JSON with a doc_hash: the file is "
                        "truncated, or was not written by lm-eval 0.4.3 or later."
                    ) from None
                number, digest, of_filter = _identity(row)
                if number in numbers[of_filter]:
                    raise ValueError(f"an earlier line has doc_id {number}, too")
                numbers[of_filter].add(number)
                sample = read_sample(row, task, metadata)
            for metric, values in rows.items():
                name, _, filter_name = metric.rpartition(",")
                value = sample.choice_prob if metric == CHOICE_PROB else row.get(name)
                if of_filter == filter_name and (
                    value is not None or metric == CHOICE_PROB
                ):
                    values.append((number, digest, value, sample))
    for metric, values in rows.items():
        name, score = metric.rpartition(",")[2], run.scores.get((task, metric))
        logged = len(numbers[name])
        if score and score.documents not in (None, logged):
            raise ResultsError(
                f"{file} holds {logged} documents of {task} (filter {name!r}), but the results "
                f"file says {score.documents}: one of them is incomplete."
            )
        seen: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)
        rows[metric] = [
            ((task, digest, next(seen[digest])), value, sample)
            for _, digest, value, sample in sorted(values, key=lambda row: row[0])
        ]
    return rows


def _identity(row: Mapping[str, Any]) -> tuple[int, str, str]:
    """Return ``doc_id``, ``doc_hash`` and filter of a line."""
    kinds = {"doc_id": int, "doc_hash": str, "filter": str}
    for key, kind in kinds.items():
        if type(row[key]) is not kind:
            expected = "a whole number" if kind is int else "a text"
            raise ValueError(f"{key} is {row[key]!r}, not {expected}")
    return row["doc_id"], row["doc_hash"], row["filter"]


def read_sample(
    row: Mapping[str, Any], task: str = "", metadata: Mapping[str, Any] | None = None
) -> Sample:
    """Return what a line of the samples of a task says, as far as it goes.

    `metadata` of the task names the fields of a document that are its ``cluster`` and its ``level``.
    """
    prompt, endings = _asked(row)
    metadata = metadata or {}
    document, choices = as_mapping(row.get("doc")), endings if endings[1:] else ()
    texts = [choice.strip() for choice in choices]
    # The target of IFEval says nothing.
    target = str(document.get("instruction_id_list") or row.get("target", ""))
    right, chance = None, 1 / len(texts) if texts else None
    rivals: tuple[int, ...] = ()
    # The score of MC2 is the share of probability on true answers, which can be several.
    several = as_mapping(document.get("mc2_targets")) if texts else {}
    if texts and texts == [str(each).strip() for each in several.get("choices") or ()]:
        chance = float(np.mean(_labels(several)))
        # MC1 is judged among other choices, of which one is right.
        single = as_mapping(document.get("mc1_targets"))
        answers = [str(choice).strip() for choice in single.get("choices") or ()]
        rivals = tuple(texts.index(answer) for answer in answers if answer in texts)
        target = next(itertools.compress(answers, _labels(single)), target)
    elif texts and document.get("context_condition") == "ambig":
        # All choices but two people say that nobody can know, and are right.
        chance = (len(texts) - 2) / len(texts)
    elif target.strip().isdecimal() and int(target) < len(texts):
        right = int(target)
    elif texts.count(target.strip()) == 1:
        right = texts.index(target.strip())
    if right is not None:
        target = texts[right]
    by_name = (f for text, f in CLUSTER_FIELDS.items() if re.search(text, task))
    about = document.get(metadata.get("cluster") or next(by_name, ""))
    number, digest = (str(row.get(key, "")) for key in ("doc_id", "doc_hash"))
    # Whatever a model says of a document, it says of its copies.
    cluster = f"{task}\0{digest if about is None else about}"
    # Every run was asked the same, and a command keeps what it has read.
    prompt, choices = sys.intern(prompt), tuple(map(sys.intern, choices))
    asked = number, digest, cluster, prompt, target, choices, right, chance, rivals
    level = str(document.get(metadata.get("level", ""), ""))
    return Sample(*asked, level, *_answered(row, endings))


def _labels(targets: Mapping[str, Any]) -> list[int]:
    """Return which choices of MC1 or MC2 are true, none where there are no choices."""
    choices, labels = targets.get("choices") or [], targets.get("labels") or []
    if len(labels) != len(choices) or not all(label in (0, 1) for label in labels):
        raise ValueError(f"{choices!r} have the labels {labels!r}, not a 0 or 1 each")
    return labels


def _asked(row: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Return what a model read, and the continuations; none where it wrote freely."""
    requests = list(map(as_mapping, as_mapping(row.get("arguments")).values()))
    # Asked once more without the question, for the metric that takes this away.
    if "acc_mutual_info" in row:
        requests = requests[: len(requests) // 2]
    prompts = [str(request.get("arg_0", "")) for request in requests]
    endings = [request.get("arg_1", "") for request in requests]
    # The choices of Winogrande are put into the prompt, before one ending.
    shared = prompts[0] if len({*prompts}) == 1 else os.path.commonprefix(prompts)  # noqa: RUF071
    if not all(isinstance(ending, str) for ending in endings):
        return shared, ()
    pairs = zip(prompts, endings, strict=True)
    return shared, tuple(prompt[len(shared) :] + ending for prompt, ending in pairs)


def _answered(
    row: Mapping[str, Any], endings: Sequence[str]
) -> tuple[tuple[float, ...], str | None, str]:
    """Return log-likelihoods of the choices, and what a model wrote, after the filter and before."""
    answers, written = row.get("filtered_resps"), row.get("resps")
    if not isinstance(answers, list) or not answers or len(endings) == 1:
        return (), None, ""
    if not endings:
        while isinstance(written, list) and len(written) == 1:
            written = written[0]
        return (), str(answers[0] if len(answers) == 1 else answers), str(written)
    try:
        likelihoods = tuple(float(answers[n][0]) for n in range(len(endings)))
    except (TypeError, ValueError, LookupError):
        return (), None, ""
    return likelihoods, None, ""
