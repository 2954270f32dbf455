"""One line of logged samples: how a model was asked about a document, and what it answered."""

from __future__ import annotations

import itertools
import json
import os.path
import re
import sys
from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy import special

from lm_eval_pruned.results.parts import ResultsError, as_mapping, from_json, reading


if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from lm_eval_pruned.results.files import Run

#: Probability of the right choice among all choices of a document, which the harness does not report.
CHOICE_PROB = "choice_prob,none"
#: Divergence from the base over the whole vocabulary, in nats per token, which a verdict measures.
KL = "kl,none"
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


class Sample(NamedTuple):
    """One line of samples: how a model was asked about a document, and what it answered.

    `number` and `digest` are the harness's ``doc_id`` and ``doc_hash``; documents of one `cluster`
    ask about the same text. `choices` is empty where the model wrote freely, `right` the index of
    the one right choice, and `target` the text of the right choice, of IFEval the names of the
    instructions. `rivals` are indices of MC1's choices where the document has more of them. `level` is
    empty where the task declares none.

    The model's answer is in the `likelihoods` of the choices, natural logarithms, or is what it wrote:
    `written` after the task's filter, `text` before, and its `tokens` where a verdict had it written. None
    or empty where the line does not tell.
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
    tokens: tuple[int, ...] = ()

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


def read_samples(
    run: Run, task: str, metrics: Iterable[str]
) -> dict[str, list[tuple[Any, ...]]]:
    """Read the logged documents of one task, not of a group, in the order of ``doc_id``.

    Returns by metric the key of each document that has it, as in `Documents`, the value and the sample.
    ResultsError if the file cannot be read, holds a document twice, or another number of documents
    than the results file says, or if all log-likelihoods are 0.
    """
    answers_0: set[bool] = set()
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
            answers_0.add(_has_only_0(row))
            for metric, values in rows.items():
                name, _, filter_name = metric.rpartition(",")
                value = sample.choice_prob if metric == CHOICE_PROB else row.get(name)
                if of_filter == filter_name and (
                    value is not None or metric == CHOICE_PROB
                ):
                    values.append((number, digest, value, sample))
    # Each model that knows nothing may say so of single continuations.
    if answers_0 == {True} and not run.is_floor:
        raise ResultsError(
            f"{file}: every log-likelihood of {task} is 0, which is what a server answers that computes none, such "
            f"as llama.cpp's (its issue 27174): evaluate {task} again with a model type or a server that does, "
            "such as hf, vllm or vLLM's server."
        )
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


def _has_only_0(row: Mapping[str, Any]) -> bool:
    """Whether a line has log-likelihoods, of continuations or of a whole text, and all are 0."""
    requests = [*map(as_mapping, as_mapping(row.get("arguments")).values())]
    answers = row.get("filtered_resps")
    wrote = any(not isinstance(each.get("arg_1", ""), str) for each in requests)
    if not requests or wrote or not isinstance(answers, list) or not answers:
        return False
    try:
        # Beside it, whether the continuation is the likeliest.
        return not any(float(a[0] if isinstance(a, list) else a) for a in answers)
    except (TypeError, ValueError, LookupError):
        return False


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
    tokens = row.get("tokens") or ()
    return Sample(*asked, level, *_answered(row, endings), tuple(map(int, tokens)))


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
