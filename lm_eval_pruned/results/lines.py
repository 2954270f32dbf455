"""The lines of logged samples, as the harness writes them, one for each document."""

from __future__ import annotations

import hashlib
import itertools
import json
import os.path
import re
import sys
from collections import defaultdict
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np

from lm_eval_pruned.results.parts import ResultsError, as_mapping, from_json, reading
from lm_eval_pruned.results.samples import Question, Sample, Samples


if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from lm_eval_pruned.results.files import Run

#: Probability of the right choice among all choices of a document, which the harness does not report. Release 0.5
#: has its logarithm, ``choice_logprob``; its ``choice_prob_norm`` first divides each log-likelihood by bytes.
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


#: Fields of a line that say how a model was asked. The harness writes them before the answers.
_ASKED, _ANSWERS = {"doc_id", "doc", "target", "arguments"}, ', "resps": '


class Lines(NamedTuple):
    """The documents of one metric: their keys as in `Documents`, what was logged of each, and the lines."""

    keys: tuple[tuple[str, str, int], ...]
    values: list[Any]
    samples: Samples

    @classmethod
    def joined(cls, parts: Sequence[Lines]) -> Lines:
        """Return the documents of several tasks."""
        keys, values, samples = zip(*parts, strict=True)
        chained = itertools.chain.from_iterable
        return cls((*chained(keys),), [*chained(values)], Samples.joined(samples))


#: Questions that are held by documents which a command has read, by what they were read from.
_QUESTIONS: WeakValueDictionary[bytes, Question] = WeakValueDictionary()


def read_samples(run: Run, task: str, metrics: Iterable[str]) -> dict[str, Lines]:
    """Read the logged documents of one task, not of a group, in the order of ``doc_id``.

    Returns by metric the documents that have it; a metric that none has is left out.
    ResultsError if the file cannot be read, holds a document twice, or another number of documents
    than the results file says, or if all log-likelihoods are 0.
    """
    only_0 = True
    file, metadata = run.samples[task], run.metadata.get(task, {})
    names: dict[str, list[str]] = {}
    for metric in metrics:
        names.setdefault(metric.rpartition(",")[2], []).append(metric)
    fields = {
        of_filter: [metric.rpartition(",")[0] for metric in of_rows]
        for of_filter, of_rows in names.items()
    }
    about = repr([task, metadata.get("cluster"), metadata.get("level")])
    # By filter, where each ``doc_id`` stands in columns, which are those of `Sample` and the filter's metrics.
    # Millions of small objects would keep Python's garbage collector busy.
    places: defaultdict[str, dict[int, int]] = defaultdict(dict)
    read: dict[str, list[list[Any]]] = {}
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line_number, line in enumerate(lines, 1):
            with reading(
                f"{file}, line {line_number}, is damaged",
                f"evaluate {task} again with --log_samples.",
            ):
                question, row, key = _asked_before(line, about)
                if question is None:
                    try:
                        whole = from_json(line)
                        whole["doc_hash"]
                    except (json.JSONDecodeError, KeyError, TypeError, RecursionError):
                        raise ResultsError(
                            f"{file}, line {line_number}: not complete JSON with a doc_hash: the file is "
                            "truncated, or was not written by lm-eval 0.4.3 or later."
                        ) from None
                    _check_identity(whole)
                    question = _question(whole, task, metadata)
                    if key and whole.keys() - row.keys() <= _ASKED:
                        _QUESTIONS[key] = question
                    row = whole
                number, of_filter = int(question.number), row["filter"]
                if number in places[of_filter]:
                    raise ValueError(f"an earlier line has doc_id {number}, too")
                places[of_filter][number] = len(places[of_filter])
                logged = map(row.get, fields.get(of_filter, ()))
                values = [*_answered(row, question), *logged]
                if of_filter not in read:
                    read[of_filter] = [[] for _ in values]
                for column, value in zip(read[of_filter], values, strict=True):
                    column.append(value)
            only_0 = only_0 and _has_only_0(row, question)
    # Each model that knows nothing may say so of single continuations.
    if only_0 and places and not run.is_floor:
        raise ResultsError(
            f"{file}: every log-likelihood of {task} is 0, which is what a server answers that computes none, such "
            f"as llama.cpp's (its issue 27174): evaluate {task} again with a model type or a server that does, "
            "such as hf, vllm or vLLM's server."
        )
    found: dict[str, Lines] = {}
    for of_filter, of_rows in names.items():
        order = [place for _, place in sorted(places[of_filter].items())]
        for metric in of_rows:
            score = run.scores.get((task, metric))
            if score and score.documents not in (None, len(order)):
                raise ResultsError(
                    f"{file} holds {len(order)} documents of {task} (filter {of_filter!r}), but the results "
                    f"file says {score.documents}: one of them is incomplete."
                )
        if order:
            columns = [[column[n] for n in order] for column in read.pop(of_filter)]
            asked = len(Sample._fields)
            of_metrics = zip(of_rows, columns[asked:], strict=True)
            found |= _by_metric(Samples.of(*columns[:asked]), of_metrics)
    return found


def _by_metric(
    samples: Samples, values: Iterable[tuple[str, Sequence[Any]]]
) -> Iterator[tuple[str, Lines]]:
    """Yield each metric that documents have, with these."""
    keys = _keys(samples.questions)
    for metric, column in values:
        has = [n for n, value in enumerate(column) if value is not None]
        if metric == CHOICE_PROB:
            yield metric, Lines(keys, samples.choice_probs(), samples)
        elif len(has) == len(column):
            yield metric, Lines(keys, [*column], samples)
        elif has:
            some = samples.taken(has)
            logged = [column[n] for n in has]
            yield metric, Lines(_keys(some.questions), logged, some)


def _keys(questions: Sequence[Question]) -> tuple[tuple[str, str, int], ...]:
    """Return what documents are matched by, each with its repetition."""
    keys = tuple(question.key for question in questions)
    if len({*keys}) == len(keys):
        return keys
    seen: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)
    return tuple((task, digest, next(seen[digest])) for task, digest, _ in keys)


def _asked_before(
    line: str, about: str
) -> tuple[Question | None, dict[str, Any], bytes | None]:
    """Return the question of a line, if it is held already, the rest of the line, and the question's key.

    No question, nothing and None where a line does not say first what was asked. `about` is what else
    decides what is read from a line.
    """
    asked, _, answers = line.partition(_ANSWERS)
    try:
        row = from_json(f'{{"resps": {answers}')
    except (ValueError, RecursionError):
        return None, {}, None
    digest = row.get("doc_hash")
    if (
        row.keys() & _ASKED
        or type(digest) is not str
        or type(row.get("filter")) is not str
    ):
        return None, {}, None
    known = f"{about} {digest!r} {'acc_mutual_info' in row} {asked}"
    key = hashlib.blake2b(known.encode(), digest_size=16).digest()
    return _QUESTIONS.get(key), row, key


def _has_only_0(row: Mapping[str, Any], question: Question) -> bool:
    """Whether a line has log-likelihoods, of continuations or of a whole text, and all are 0."""
    answers = _answers(row)
    if not question.endings or not answers:
        return False
    try:
        # Beside it, whether the continuation is the likeliest.
        return not any(float(a[0] if isinstance(a, list) else a) for a in answers)
    except (TypeError, ValueError, LookupError):
        return False


def _check_identity(row: Mapping[str, Any]) -> None:
    """Raise ValueError unless ``doc_id``, ``doc_hash`` and filter of a line can be such."""
    kinds = {"doc_id": int, "doc_hash": str, "filter": str}
    for key, kind in kinds.items():
        if type(row[key]) is not kind:
            expected = "a whole number" if kind is int else "a text"
            raise ValueError(f"{key} is {row[key]!r}, not {expected}")


def read_sample(
    row: Mapping[str, Any], task: str = "", metadata: Mapping[str, Any] | None = None
) -> Sample:
    """Return what a line of the samples of a task says, as far as it goes.

    `metadata` of the task names the fields of a document that are its ``cluster`` and its ``level``.
    """
    return _answered(row, _question(row, task, metadata or {}))


def _question(
    row: Mapping[str, Any], task: str, metadata: Mapping[str, Any]
) -> Question:
    prompt, endings = _asked(row)
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
    about = document.get(metadata.get("cluster") or _cluster_field(task))
    number, digest = (str(row.get(key, "")) for key in ("doc_id", "doc_hash"))
    # Whatever a model says of a document, it says of its copies.
    cluster = f"{task}\0{digest if about is None else about}"
    # Documents often offer the same.
    choices = tuple(map(sys.intern, choices))
    level = str(document.get(metadata.get("level", ""), ""))
    asked = number, cluster, prompt, target, choices, right, chance, rivals, level
    return Question((task, digest, 0), *asked, len(endings))


@cache
def _cluster_field(task: str) -> str:
    """Return the field of `CLUSTER_FIELDS` of a task; empty if it has none."""
    by_name = (f for text, f in CLUSTER_FIELDS.items() if re.search(text, task))
    return next(by_name, "")


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


def _answered(row: Mapping[str, Any], question: Question) -> Sample:
    """Return a line with what the model answered to its question."""
    answers = _answers(row)
    tokens, count = tuple(map(int, row.get("tokens") or ())), question.endings
    if not answers or count == 1:
        return Sample(question, tokens=tokens)
    if not count:
        after = str(answers[0] if len(answers) == 1 else answers)
        return Sample(question, (), after, str(_alone(row.get("resps"))), tokens)
    try:
        likelihoods = [float(answer[0]) for answer in answers[:count]]
    except (TypeError, ValueError, LookupError):
        likelihoods = []
    return Sample(
        question,
        tuple(likelihoods[: count * (len(likelihoods) == count)]),
        tokens=tokens,
    )


def _answers(row: Mapping[str, Any]) -> list[Any]:
    """Return what the filter left of each request, which lm-eval 0.5 puts into a list of repetitions."""
    answers = row.get("filtered_resps")
    return [*map(_alone, answers)] if isinstance(answers, list) else []


def _alone(answer: Any) -> Any:
    while isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    return answer
