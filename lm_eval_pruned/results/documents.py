"""Single documents of a logged task: their scores, the choices they offer, the answers."""

from __future__ import annotations

import itertools
import json
import math
import os.path
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from lm_eval_pruned.results.files import ResultsError, Run, as_mapping, is_number


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

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
    """Scores without knowledge: of a model that finds all choices alike, of the commonest answer.

    None where documents offer no choices, and where they offer different ones.
    """

    chance: float | None = None
    majority: float | None = None


@dataclass(frozen=True)
class Reply:
    """What one model answered to a document: the text of the likeliest choice, or what it wrote.

    `normed` is the choice that is likeliest for its length, `likelihoods` the log-likelihoods of all
    choices; a text that was written freely is that after the task's filter, and has none.
    """

    chosen: str
    normed: str
    likelihoods: tuple[float, ...] = ()


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
        replies: Answer to each document, length n; None where the samples do not tell.
    """

    keys: tuple[tuple[str, str, int], ...]
    values: np.ndarray
    weights: np.ndarray
    clusters: tuple[str, ...] | None
    transform: str
    levels: Levels = Levels()
    replies: tuple[Reply | None, ...] = ()

    def in_the_order_of(self, other: Documents, part: bool = False) -> Documents | None:
        """Return the documents of `other`, all or a `part` of these; None where it has others."""
        place = {key: index for index, key in enumerate(self.keys)}
        order = [place.get(key, -1) for key in other.keys]
        if -1 in order or (len(order) < len(place) and not part):
            return None
        clusters = self.clusters and tuple(self.clusters[index] for index in order)
        replies = self.replies and tuple(self.replies[index] for index in order)
        values, weights = self.values[order], self.weights[order]
        ordered = replace(self, keys=other.keys, values=values, weights=weights)
        return replace(ordered, clusters=clusters, replies=replies)

    def is_scored_like(self, other: Documents) -> bool:
        """Whether the same documents in the same order make up their score in one way."""
        alike = np.allclose(self.weights, other.weights)
        return alike and self.transform == other.transform

    @property
    def strata(self) -> tuple[str, ...] | None:
        """Task of each document, which another draw would have too; None for a single one."""
        tasks = tuple(task for task, _, _ in self.keys)
        return tasks if len(set(tasks)) > 1 else None


@dataclass(frozen=True)
class Question:
    """One document as a model was asked about it; the harness's ``doc_id`` and ``doc_hash``.

    `choices` is empty where the model wrote freely, `right` the index of the one right choice, and
    `target` of IFEval the names of the instructions.
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
    """Return the documents of one metric as `read_task` reads them, or None."""
    return read_task(run, task).get(metric)


def read_task(run: Run, task: str) -> dict[str, Documents]:
    """Read the scores of single documents of a task or group from the logged samples, by metric.

    Metrics are left out where samples are missing, or where no aggregation known here makes the
    reported score of them (some of the harness's are not functions of a mean). Raises what
    `read_samples` does.
    """
    metrics = [metric for name, metric in run.scores if name == task]
    lines: dict[str, list[Any]] = {metric: [] for metric in metrics}
    for leaf in run.leaves(task):
        about = partial(_about, leaf)
        read = _read(run, leaf, metrics, about) if leaf in run.samples else {}
        # A score that some member has no documents of is not made of documents.
        lines = {metric: of for metric, of in lines.items() if read.get(metric)}
        for metric, of in lines.items():
            size = len(read[metric])
            of += [((leaf, *key), size, *rest) for key, *rest in read[metric]]
    found = {
        metric: _documents(metric, of, run.scores[task, metric].value)
        for metric, of in lines.items()
    }
    return {metric: documents for metric, documents in found.items() if documents}


def _about(
    leaf: str, row: Mapping[str, Any]
) -> tuple[str, Question | None, Reply | None]:
    fields = [field for text, field in CLUSTER_FIELDS.items() if re.search(text, leaf)]
    text = as_mapping(row.get("doc")).get(*fields[:1] or [""])
    cluster = f"{leaf}\0{row.get('doc_id') if text is None else text}"
    asks = any(name.startswith("acc") for name in row)
    return cluster, read_question(row) if asks else None, read_reply(row)


def _documents(
    metric: str, lines: Sequence[tuple[Any, ...]], reported: float
) -> Documents | None:
    keys, sizes, raw, abouts = zip(*lines, strict=True)
    # The score of a group is a mean over documents, or over tasks.
    for (values, weights), divisor, transform in itertools.product(
        _readings(raw), (1, np.array(sizes)), TRANSFORMS
    ):
        weights = weights / divisor
        with np.errstate(over="ignore"):
            score = TRANSFORMS[transform](np.average(values, weights=weights))
        if np.isclose(score, reported, rtol=1e-6, atol=1e-9, equal_nan=True):
            clusters, questions, replies = zip(*abouts, strict=True)
            grouped = clusters if len({*clusters}) < len(keys) else None
            levels = levels_of(questions if metric.startswith("acc") else (), weights)
            found = keys, values, weights, grouped, transform, levels, replies
            return Documents(*found)
    return None


def _readings(raw: Sequence[Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield what per-document values can mean, as (values, weights).

    A number is a score. A list is several scores (IFEval's instructions) or, if each
    is a pair, a sum with its weight (log-likelihood and words).
    """
    if all(map(is_number, raw)):
        yield np.array(raw, dtype=float), np.ones(len(raw))
        return
    lists = all(isinstance(each, list) and each for each in raw)
    if lists and all(map(is_number, itertools.chain(*raw))):
        lengths = np.array([*map(len, raw)], dtype=float)
        yield np.array([*map(np.mean, raw)]), lengths
        if (lengths == 2).all() and all(weight > 0 for _, weight in raw):
            sums, weights = np.array(raw, dtype=float).T
            yield sums / weights, weights


def read_samples(
    run: Run, task: str, metric: str, take: Callable[[Mapping[str, Any]], T]
) -> list[tuple[tuple[str, int], T]]:
    """Read the logged documents of one task, not of a group, that have a metric.

    Returns:
        Pairs of key and what `take` makes of a line, in the order of ``doc_id``. A key is
        ``doc_hash`` and which repetition of the document it is.

    Raises:
        ResultsError: The file cannot be read, or holds another number of documents than
            the results file says.
    """
    found = _read(run, task, [metric], take)[metric]
    return [(key, taken) for key, _, taken in found]


def _read(
    run: Run, task: str, metrics: Iterable[str], take: Callable[[Mapping[str, Any]], T]
) -> dict[str, list[tuple[tuple[str, int], Any, T]]]:
    """Return key, value and what `take` makes of a line, of each document with a metric."""
    file, found = run.samples[task], {}
    parts = {metric: metric.rpartition(",")[::2] for metric in metrics}
    rows: dict[str, list[tuple[Any, ...]]] = {metric: [] for metric in parts}
    logged: Counter[str] = Counter()
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
            logged[row.get("filter")] += 1
            has = [
                (metric, row[name])
                for metric, (name, of) in parts.items()
                if row.get("filter") == of and row.get(name) is not None
            ]
            taken = take(row) if has else None
            for metric, value in has:
                rows[metric].append((row.get("doc_id", number), digest, value, taken))
    for metric, (_, of) in parts.items():
        score = run.scores.get((task, metric))
        if score and score.documents not in (None, logged[of]):
            raise ResultsError(
                f"{file} holds {logged[of]} documents of {task} (filter {of!r}), and the results "
                f"file says {score.documents}: one of them is incomplete."
            )
        seen: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)
        found[metric] = [
            ((digest, next(seen[digest])), *rest)
            for _, digest, *rest in sorted(rows[metric], key=lambda row: row[0])
        ]
    return found


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
        likelihoods = [float(each[0]) for each in answers[: len(endings)]]
        return Answer(bool(value), str(_likeliest(endings, likelihoods, metric)))
    while isinstance(written, list) and len(written) == 1:
        written = written[0]
    chosen = answers[0] if len(answers) == 1 else answers
    return Answer(bool(value), str(chosen), str(written))


def read_reply(row: Mapping[str, Any]) -> Reply | None:
    """Return the answer in a line of samples, right or wrong; None where the line does not tell."""
    answers, endings = row.get("filtered_resps"), _prompt_and_endings(row)[1]
    if not isinstance(answers, list) or not answers or len(endings) == 1:
        return None
    if not endings:
        text = str(answers[0] if len(answers) == 1 else answers)
        return Reply(text, text)
    try:
        likelihoods = [float(answers[place][0]) for place in range(len(endings))]
    except (TypeError, ValueError, LookupError):
        return None
    chosen, normed = (
        endings[_likeliest(endings, likelihoods, metric)].strip()
        for metric in ("acc", "acc_norm")
    )
    return Reply(chosen, normed, tuple(likelihoods))


def _likeliest(
    endings: Sequence[str], likelihoods: Sequence[float], metric: str
) -> int:
    # The harness divides by the length of the choice without the space in front of it.
    lengths = [len(ending.removeprefix(" ")) or 1 for ending in endings]
    scores = np.array(likelihoods)
    return int(np.argmax(scores / lengths if metric == "acc_norm" else scores))


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
