"""Scores of single documents, from logged samples: what they are matched and grouped by."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from lm_eval_pruned.results.chance import Choices, Levels, choices_of, levels_of
from lm_eval_pruned.results.files import ResultsError, Run, is_number


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

T = TypeVar("T")

#: Documents that share this field belong together: they ask about the same text.
CLUSTER_FIELDS = {
    re.compile(r"(^|_)musr(_|$)"): "narrative",
    re.compile(r"(^|_)boolq(_|$)"): "passage",
    re.compile(r"^race(_|$)"): "article",
    re.compile(r"(^|_)drop(_|$)"): "passage",
    re.compile(r"quad(v2|_|$)"): "context",
    re.compile(r"hellaswag(_|$)"): "source_id",
    re.compile(r"(^|_)multirc(_|$)"): "paragraph",
    re.compile(r"(^|_)record(_|$)"): "passage",
    re.compile(r"belebele(_|$)"): "flores_passage",
}


@dataclass(frozen=True)
class Documents:
    """Scores of one (task, metric), document by document.

    The score is ``TRANSFORMS[transform](sum(weights * values) / sum(weights))``.

    Attributes:
        keys: What a document is matched by: its task, ``doc_hash`` and, where
            documents repeat, which repetition it is. Length n.
        values: Shape (n,), float64.
        weights: Shape (n,), float64; ones for a plain mean.
        clusters: Cluster of each document, length n, or None if documents are
            independent.
        transform: Name in `TRANSFORMS`.
        prompts: The harness's ``prompt_hash`` of each document, length n, None where
            none was logged; empty where they were not read.
        levels: Of guessing and of the commonest answer, where the documents tell.
    """

    keys: tuple[tuple[str, str, int], ...]
    values: np.ndarray
    weights: np.ndarray
    clusters: tuple[str, ...] | None
    transform: str
    prompts: tuple[str | None, ...] = ()
    levels: Levels = field(default_factory=Levels)

    def other_prompts(self, other: Documents) -> int:
        """Return how many documents of both were put into other prompts."""
        prompts = dict(zip(self.keys, self.prompts, strict=False))
        return sum(
            key in prompts and prompts[key] != prompt
            for key, prompt in zip(other.keys, other.prompts, strict=False)
        )

    def in_the_order_of(self, other: Documents, part: bool = False) -> Documents | None:
        """Return the same documents in another order; None where `other` has others.

        Args:
            other: Gives the order.
            part: Whether it may have fewer.
        """
        position = {key: index for index, key in enumerate(self.keys)}
        wanted = set(other.keys)
        if not (wanted <= position.keys() if part else wanted == position.keys()):
            return None
        order = [position[key] for key in other.keys]

        def sorted_(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(values[index] for index in order)

        return replace(
            self,
            keys=other.keys,
            values=self.values[order],
            weights=self.weights[order],
            clusters=None if self.clusters is None else sorted_(self.clusters),
            prompts=sorted_(self.prompts) if self.prompts else (),
        )

    def is_scored_like(self, other: Documents) -> bool:
        """Whether the same documents in the same order make up their score in one way."""
        return self.transform == other.transform and np.allclose(
            self.weights, other.weights
        )

    @property
    def strata(self) -> tuple[str, ...] | None:
        """Task of each document, or None for a single one.

        The subtasks of a group, such as MMLU's subjects, are not drawn from others:
        another draw of documents would have the same.
        """
        tasks = tuple(task for task, _, _ in self.keys)
        return tasks if len(set(tasks)) > 1 else None


#: From a weighted mean to the score: the harness's mean, perplexity and bits per byte.
TRANSFORMS = {
    "mean": lambda mean: mean,
    "perplexity": lambda mean: np.exp(-mean),
    "bits_per_byte": lambda mean: -mean / math.log(2),
}


def read_documents(run: Run, task: str, metric: str) -> Documents | None:
    """Read the scores of single documents from the logged samples.

    Args:
        run: A run.
        task: One of its tasks, or a group.
        metric: Metric with filter, such as ``acc,none``.

    Returns:
        None where samples are missing, or where no aggregation known here makes the
        reported score of them (the harness has some that are no function of a mean).

    Raises:
        ResultsError: A samples file cannot be read, or holds another number of
            documents than the results file says.
    """
    leaves = run.leaves(task)
    if any(leaf not in run.samples for leaf in leaves):
        return None
    reported = run.scores[task, metric].value
    parts = [(leaf, _read_samples(run, leaf, metric)) for leaf in leaves]
    if any(not samples for _, samples in parts):
        return None
    keys = tuple(
        chain.from_iterable(
            ((leaf, *sample.key) for sample in samples) for leaf, samples in parts
        )
    )
    clusters = _clusters(parts)
    sizes = np.concatenate([np.full(len(s), float(len(s))) for _, s in parts])
    raw = [sample.value for _, samples in parts for sample in samples]
    prompts = tuple(sample.prompt for _, samples in parts for sample in samples)
    offered = [sample.choices for _, samples in parts for sample in samples]
    for values, weights in _readings(raw):
        weightings = [weights]
        if len(parts) > 1:
            weightings.append(weights / sizes)
        for weighting in weightings:
            for transform, function in TRANSFORMS.items():
                with np.errstate(over="ignore"):
                    score = function(np.average(values, weights=weighting))
                if _same(float(score), reported):
                    levels = levels_of(offered, weighting.tolist())
                    return Documents(
                        *(keys, values, weighting, clusters, transform, prompts),
                        levels,
                    )
    return None


@dataclass(frozen=True)
class _Sample:
    key: tuple[str, int]
    value: Any
    cluster: str | None
    prompt: str | None
    choices: Choices | None


def read_samples(
    run: Run, task: str, metric: str, take: Callable[[Mapping[str, Any]], T]
) -> list[tuple[tuple[str, int], T]]:
    """Read the logged documents of one task that have a metric.

    Args:
        run: A run that logged samples of `task`.
        task: A task that is no group.
        metric: Metric with filter, such as ``acc,none``.
        take: Called with each line of the file, in its order; what it returns is kept.

    Returns:
        Pairs of key and what was taken, in the order of ``doc_id``. A key is ``doc_hash``
        and which repetition of the document it is.

    Raises:
        ResultsError: The file cannot be read, or holds another number of documents than
            the results file says.
    """
    file = run.samples[task]
    name, _, filter_name = metric.rpartition(",")
    rows = []
    hashes = 0
    for number, row in _read_lines(file):
        if row.get("filter") != filter_name:
            continue
        identity = row.get("doc_hash")
        if not isinstance(identity, str):
            raise ResultsError(
                f"{file}, line {number}: no doc_hash, so its document cannot be matched; these "
                "are not samples of lm-eval 0.4.3 or later."
            )
        hashes += 1
        if row.get(name) is None:
            continue
        order = row.get("doc_id")
        rows.append((order if isinstance(order, int) else number, identity, take(row)))
    score = run.scores.get((task, metric))
    expected = None if score is None else score.documents
    if expected is not None and hashes != expected:
        raise ResultsError(
            f"{file} holds {hashes} documents of {task} (filter {filter_name!r}), and the results "
            f"file says {expected}: one of them is incomplete."
        )
    rows.sort(key=lambda row: row[0])
    repetitions: dict[str, int] = {}
    samples = []
    for _, identity, taken in rows:
        repetition = repetitions.get(identity, 0)
        repetitions[identity] = repetition + 1
        samples.append(((identity, repetition), taken))
    return samples


def _read_samples(run: Run, task: str, metric: str) -> list[_Sample]:
    """Read one metric of the samples of one task; documents without it are left out."""
    name = metric.rpartition(",")[0]
    cluster_field = next(
        (
            field
            for task_name, field in CLUSTER_FIELDS.items()
            if task_name.search(task)
        ),
        None,
    )

    def take(
        row: Mapping[str, Any],
    ) -> tuple[Any, str | None, str | None, Choices | None]:
        document = row.get("doc")
        cluster = document.get(cluster_field) if isinstance(document, dict) else None
        prompt = row.get("prompt_hash")
        return (
            row[name],
            None if cluster is None else str(cluster),
            None if prompt is None else str(prompt),
            choices_of(row, name),
        )

    return [
        _Sample(key, *taken) for key, taken in read_samples(run, task, metric, take)
    ]


def _clusters(parts: list[tuple[str, list[_Sample]]]) -> tuple[str, ...] | None:
    names: list[str] = []
    for leaf, samples in parts:
        for number, sample in enumerate(samples):
            if sample.cluster is not None:
                names.append(f"{leaf}\0{sample.cluster}")
            else:
                names.append(f"{leaf}\0{number}")
    return tuple(names) if len(set(names)) < len(names) else None


def _readings(raw: list[Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield what per-document values can mean, as (values, weights).

    A number is a score. A list is several scores (IFEval's instructions) or, if each
    is a pair, a sum with its weight (log-likelihood and words).
    """
    if all(is_number(value) for value in raw):
        yield np.array(raw, dtype=float), np.ones(len(raw))
        return
    if not all(
        isinstance(value, list) and value and all(map(is_number, value))
        for value in raw
    ):
        return
    lengths = np.array([len(value) for value in raw], dtype=float)
    yield np.array([np.mean(np.array(value, float)) for value in raw]), lengths
    if (lengths == 2).all():
        sums, weights = np.array(raw, dtype=float).T
        if (weights > 0).all():
            yield sums / weights, weights


def _same(score: float, reported: float) -> bool:
    return math.isclose(score, reported, rel_tol=1e-6, abs_tol=1e-9) or (
        math.isnan(score) and math.isnan(reported)
    )


def _read_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ResultsError(
                        f"{file}, line {number}: not whole JSON ({error}); the file was cut off or "
                        "damaged."
                    ) from None
                if not isinstance(row, dict):
                    raise ResultsError(f"{file}, line {number}: not an object.")
                yield number, row
    except UnicodeDecodeError:
        raise ResultsError(f"{file} is not a text file in UTF-8.") from None
    except OSError as error:
        raise ResultsError(f"{file} cannot be read: {error.strerror}.") from None
