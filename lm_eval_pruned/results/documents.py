"""Single documents of a logged task: their scores, the choices they offer, the answers."""

from __future__ import annotations

import itertools
import json
import math
import os.path
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from lm_eval_pruned.results.files import ResultsError, Run, as_mapping, is_number


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

T = TypeVar("T")

#: Documents that share this field belong together: they ask about the same text.
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
#: From a weighted mean to the score: the harness's mean, perplexity and bits per byte.
TRANSFORMS = {
    "mean": lambda mean: mean,
    "perplexity": lambda mean: np.exp(-mean),
    "bits_per_byte": lambda mean: -mean / math.log(2),
}


@dataclass(frozen=True)
class Levels:
    """Scores that need no knowledge.

    `chance` is that of a model that finds all choices equally likely, None without choices;
    `majority` that of the commonest answer, None where documents offer different choices.
    """

    chance: float | None = None
    majority: float | None = None


@dataclass(frozen=True)
class Documents:
    """Scores of one (task, metric), document by document.

    The score is ``TRANSFORMS[transform](sum(weights * values) / sum(weights))``.

    Attributes:
        keys: What documents are matched by, length n: task, ``doc_hash`` and which repetition.
        values: Shape (n,), float64.
        weights: Shape (n,), float64; ones for a plain mean.
        clusters: Cluster of each document, length n, or None if documents are independent.
        transform: Name in `TRANSFORMS`.
        levels: Where the documents tell.
    """

    keys: tuple[tuple[str, str, int], ...]
    values: np.ndarray
    weights: np.ndarray
    clusters: tuple[str, ...] | None
    transform: str
    levels: Levels = Levels()

    def in_the_order_of(self, other: Documents, part: bool = False) -> Documents | None:
        """Return the documents of `other`, all or a `part` of these; None where it has others."""
        place = {key: index for index, key in enumerate(self.keys)}
        if not {*other.keys} <= place.keys() or len(other.keys) < len(place) * (
            not part
        ):
            return None
        order = [place[key] for key in other.keys]
        clusters = self.clusters and tuple(self.clusters[index] for index in order)
        values, weights = self.values[order], self.weights[order]
        return Documents(
            other.keys, values, weights, clusters, self.transform, self.levels
        )

    def is_scored_like(self, other: Documents) -> bool:
        """Whether the same documents in the same order make up their score in one way."""
        return self.transform == other.transform and np.allclose(
            self.weights, other.weights
        )

    @property
    def strata(self) -> tuple[str, ...] | None:
        """Task of each document, which another draw would have too; None for a single one."""
        tasks = tuple(task for task, _, _ in self.keys)
        return tasks if len(set(tasks)) > 1 else None


@dataclass(frozen=True)
class Question:
    """One document as a model was asked about it.

    Attributes:
        number: The harness's ``doc_id``.
        digest: Its ``doc_hash``.
        prompt: What the model read.
        target: A text or the index of a choice; of IFEval, the names of the instructions.
        choices: Continuations that were compared; empty where the model wrote freely.
        right: Index of the right choice; None where that is not one.
        chance: See `Levels`.
    """

    number: str
    digest: str
    prompt: str
    target: str
    choices: tuple[str, ...]
    right: int | None = None
    chance: float | None = None


@dataclass(frozen=True)
class Answer:
    """What one model answered, and whether the metric counts it as right.

    `chosen` is the index of the most likely choice, or the text after the task's filter; None
    where the line does not tell. `text` is what the model wrote, before the filter.
    """

    right: bool
    chosen: str | None
    text: str = ""


def read_documents(run: Run, task: str, metric: str) -> Documents | None:
    """Read the scores of single documents of a task or group from the logged samples.

    None where samples are missing, or where no aggregation known here makes the reported score of
    them (the harness has some that are no function of a mean). Raises what `read_samples` does.
    """
    name = metric.rpartition(",")[0]
    of_choices = name.startswith("acc")
    rows: list[tuple[Any, ...]] = []
    for leaf in run.leaves(task):
        field = [each for text, each in CLUSTER_FIELDS.items() if re.search(text, leaf)]

        def take(row: Mapping[str, Any], field: list[str] = field) -> tuple[Any, ...]:
            cluster = as_mapping(row.get("doc")).get(*field[:1] or [""])
            return row[name], read_question(row) if of_choices else None, cluster

        found = read_samples(run, leaf, metric, take) if leaf in run.samples else []
        if not found:
            return None
        for number, (key, (value, question, cluster)) in enumerate(found):
            cluster = f"{leaf}\0{number if cluster is None else cluster}"
            rows.append(((leaf, *key), len(found), cluster, value, question))
    keys, sizes, clusters, raw, questions = zip(*rows, strict=True)
    reported = run.scores[task, metric].value
    # The score of a group is a mean over documents, or over tasks.
    for (values, weights), divisor, transform in itertools.product(
        _readings(raw), (1, np.array(sizes)), TRANSFORMS
    ):
        weights = weights / divisor
        with np.errstate(over="ignore"):
            score = TRANSFORMS[transform](np.average(values, weights=weights))
        if np.isclose(score, reported, rtol=1e-6, atol=1e-9, equal_nan=True):
            grouped = clusters if len({*clusters}) < len(keys) else None
            levels = levels_of(questions if of_choices else (), weights)
            return Documents(keys, values, weights, grouped, transform, levels)
    return None


def _readings(raw: Sequence[Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield what per-document values can mean, as (values, weights).

    A number is a score. A list is several scores (IFEval's instructions) or, if each
    is a pair, a sum with its weight (log-likelihood and words).
    """
    if all(map(is_number, raw)):
        yield np.array(raw, dtype=float), np.ones(len(raw))
    elif all(
        isinstance(each, list) and each and all(map(is_number, each)) for each in raw
    ):
        lengths = np.array([len(each) for each in raw], dtype=float)
        yield np.array([np.mean(each) for each in raw]), lengths
        if (lengths == 2).all():
            sums, weights = np.array(raw, dtype=float).T
            if (weights > 0).all():
                yield sums / weights, weights


def read_samples(
    run: Run, task: str, metric: str, take: Callable[[Mapping[str, Any]], T]
) -> list[tuple[tuple[str, int], T]]:
    """Read the logged documents of one task, which is no group, that have a metric.

    Returns:
        Pairs of key and what `take` makes of a line, in the order of ``doc_id``. A key is
        ``doc_hash`` and which repetition of the document it is.

    Raises:
        ResultsError: The file cannot be read, or holds another number of documents than
            the results file says.
    """
    file = run.samples[task]
    name, _, filter_name = metric.rpartition(",")
    rows, logged = [], 0
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                digest = str(row["doc_hash"])
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ResultsError(
                    f"{file}, line {number}: not whole JSON with a doc_hash; the file was cut off, "
                    "or was not written by lm-eval 0.4.3 or later."
                ) from None
            if row.get("filter") == filter_name:
                logged += 1
                if row.get(name) is not None:
                    rows.append((row.get("doc_id", number), digest, take(row)))
    score = run.scores.get((task, metric))
    if score and score.documents not in (None, logged):
        raise ResultsError(
            f"{file} holds {logged} documents of {task} (filter {filter_name!r}), and the results "
            f"file says {score.documents}: one of them is incomplete."
        )
    seen: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)
    rows.sort(key=lambda row: row[0])
    return [((digest, next(seen[digest])), taken) for _, digest, taken in rows]


def levels_of(documents: Sequence[Question], weights: np.ndarray) -> Levels:
    """Return the levels of a score, in which documents count by `weights`, shape (n,)."""
    chances = [each.chance for each in documents]
    rights = [each.right for each in documents]
    if not documents or None in chances:
        return Levels()
    chance = float(np.average(np.array(chances, dtype=float), weights=weights))
    # The same choice in words may be the right one in every other context.
    if None in rights or len({each.choices for each in documents}) > 1:
        return Levels(chance)
    counts = np.bincount(np.array(rights, dtype=int), weights)
    return Levels(chance, float(counts.max() / weights.sum()))


def read_question(row: Mapping[str, Any]) -> Question:
    """Return what a line of samples says of its document."""
    prompt, choices = _prompt_and_endings(row)
    texts = [choice.strip() for choice in choices]
    document = as_mapping(row.get("doc"))
    # The target of IFEval says nothing.
    target = str(document.get("instruction_id_list") or row.get("target", ""))
    chance, right = (1 / len(choices) if choices[1:] else None), None
    # The score of MC2 is the share of probability on true answers, which can be several.
    several = as_mapping(document.get("mc2_targets"))
    if chance and texts == [str(each).strip() for each in several.get("choices") or ()]:
        chance = float(np.mean(several["labels"]))
    elif target.strip().isdecimal() and int(target) < len(choices):
        right = int(target)
    elif texts.count(target.strip()) == 1:
        right = texts.index(target.strip())
    number, digest = (str(row.get(key, "")) for key in ("doc_id", "doc_hash"))
    choices = choices if choices[1:] else ()
    return Question(number, digest, prompt, target, choices, right, chance)


def read_answer(row: Mapping[str, Any], metric: str) -> Answer | None:
    """Return the answer in a line of samples; None if it counts as neither right nor wrong.

    `metric` is without filter, such as ``acc_norm``.
    """
    value = row.get(metric)
    if not is_number(value) or value not in (0, 1):
        return None
    answers, written = row.get("filtered_resps"), row.get("resps")
    endings = _prompt_and_endings(row)[1]
    if not answers or len(endings) == 1:
        return Answer(bool(value), None)
    if endings:
        # The harness divides by the length of the choice without the space in front of it.
        lengths = [len(ending.removeprefix(" ")) or 1 for ending in endings]
        likelihoods = np.array([float(each[0]) for each in answers[: len(endings)]])
        scores = likelihoods / (lengths if metric == "acc_norm" else 1)
        return Answer(bool(value), str(np.argmax(scores)))
    while isinstance(written, list) and len(written) == 1:
        written = written[0]
    chosen = answers[0] if len(answers) == 1 else answers
    return Answer(bool(value), str(chosen), str(written))


def _prompt_and_endings(row: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Return what a model read, and the continuations; none where it wrote freely."""
    asked = list(map(as_mapping, as_mapping(row.get("arguments")).values()))
    # Asked once more without the question, for the metric that takes this away.
    if "acc_mutual_info" in row:
        asked = asked[: len(asked) // 2]
    prompts = [str(each.get("arg_0", "")) for each in asked]
    endings = [each.get("arg_1", "") for each in asked]
    # The choices of Winogrande are put into the prompt, before one ending.
    shared = prompts[0] if len({*prompts}) == 1 else os.path.commonprefix(prompts)  # noqa: RUF071
    if not all(isinstance(each, str) for each in endings):
        return shared, ()
    pairs = zip(prompts, endings, strict=True)
    return shared, tuple(prompt[len(shared) :] + ending for prompt, ending in pairs)
