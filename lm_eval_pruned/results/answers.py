"""What a model was asked and what it answered, from one line of the harness's samples.

The lines come from a disk, and their texts from data sets and models: whatever has another
form than the harness writes is taken as text or left out, and nothing here raises.
"""

from __future__ import annotations

import json
import os.path
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


@dataclass(frozen=True)
class Question:
    """One document as a model was asked about it.

    Attributes:
        number: The harness's ``doc_id``.
        digest: Its ``doc_hash``.
        prompt: What the model read.
        target: The target as the harness writes it: a text, or the index of a choice. In
            the schema of IFEval, whose targets say nothing, the instructions that are checked.
        choices: Continuations that were compared; empty where the model wrote freely.
    """

    number: str
    digest: str
    prompt: str
    target: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """What one model answered.

    Attributes:
        right: Whether the metric counts it.
        chosen: What two answers are compared by: the index of the most likely choice as
            text, or the text after the task's filter; None where the line does not tell.
        text: What the model wrote, before the filter; empty where it chose.
    """

    right: bool
    chosen: str | None
    text: str = ""


def read_question(row: Mapping[str, Any]) -> Question:
    """Return what a line of samples says of its document."""
    pairs = _arguments(row)
    prompts = [prompt for prompt, _ in pairs]
    endings = [ending for _, ending in pairs]
    prompt, choices = (prompts[0] if prompts else ""), tuple(endings)
    if len(set(endings)) == 1 and len(set(prompts)) > 1:
        # Such as Winogrande: the choices are put into the prompt, before one ending.
        prompt = shared_beginning(prompts)
        choices = tuple(each[len(prompt) :] + endings[0] for each in prompts)
    number = row.get("doc_id")
    return Question(
        number=str(number) if isinstance(number, int) else "",
        digest=str(row.get("doc_hash", "")),
        prompt=prompt,
        target=_instructions(row.get("doc")) or _text(row.get("target")),
        choices=choices if len(_likelihoods(row)) == len(pairs) > 1 else (),
    )


def read_answer(row: Mapping[str, Any], metric: str) -> Answer | None:
    """Return what a line of samples says of the model's answer.

    Args:
        row: The line.
        metric: Metric without filter, such as ``acc_norm``.

    Returns:
        None where the metric counts the document as neither right nor wrong.
    """
    value = row.get(metric)
    if not isinstance(value, (bool, int, float)) or value not in (0, 1):
        return None
    filtered = row.get("filtered_resps")
    answers = filtered if isinstance(filtered, list) else []
    likelihoods = _likelihoods(row)
    if len(likelihoods) > 1:
        chosen = _most_likely(likelihoods, [end for _, end in _arguments(row)], metric)
        return Answer(bool(value), chosen)
    if likelihoods:
        return Answer(bool(value), None, f"log-likelihood {_text(answers[0][0])}")
    if not answers:
        return Answer(bool(value), None)
    chosen = _text(answers[0] if len(answers) == 1 else answers)
    written = row.get("resps")
    while isinstance(written, list) and len(written) == 1:
        written = written[0]
    return Answer(bool(value), chosen, _text(written))


def shared_beginning(texts: Iterable[str]) -> str:
    """Return the characters that all texts begin with."""
    return os.path.commonprefix(list(texts))  # noqa: RUF071


def _arguments(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return prompt and ending of each request of a document."""
    found = row.get("arguments")
    requests: Sequence[Any] = ()
    if isinstance(found, dict):
        requests = [
            list(each.values()) if isinstance(each, dict) else each
            for each in found.values()
        ]
    elif isinstance(found, list):
        requests = found
    return [
        (_text(each[0]), _text(each[1]))
        for each in requests
        if isinstance(each, (list, tuple)) and len(each) > 1
    ]


def _instructions(document: Any) -> str:
    """Return what IFEval checks an answer for, one instruction a line; empty for others."""
    document = document if isinstance(document, dict) else {}
    names, given = document.get("instruction_id_list"), document.get("kwargs")
    if not isinstance(names, list) or not isinstance(given, list):
        return ""
    lines = []
    for name, arguments in zip(names, given, strict=False):
        told = [
            f"{key}={_text(value)}"
            for key, value in (arguments if isinstance(arguments, dict) else {}).items()
            if value is not None
        ]
        lines.append(f"{_text(name)} ({', '.join(told)})" if told else _text(name))
    return "\n".join(lines)


def _likelihoods(row: Mapping[str, Any]) -> list[float]:
    """Return the log-likelihood of each request; empty where the model wrote freely."""
    filtered = row.get("filtered_resps")
    values = []
    for each in filtered if isinstance(filtered, list) else []:
        if not isinstance(each, (list, tuple)) or len(each) != 2:
            return []
        try:
            values.append(float(each[0]))
        except (TypeError, ValueError):
            return []
    return values


def _most_likely(
    likelihoods: Sequence[float], endings: Sequence[str], metric: str
) -> str | None:
    """Return the index of the choice that the metric takes for the answer."""
    if len(endings) != len(likelihoods):
        # Mutual information asks for each choice twice.
        return None
    # The harness divides by the length of the choice without the space in front of it.
    choices = [ending.removeprefix(" ") for ending in endings]
    lengths = [1] * len(choices)
    if metric == "acc_norm":
        lengths = [len(choice) for choice in choices]
    elif metric == "acc_bytes":
        lengths = [len(choice.encode("utf-8", "surrogatepass")) for choice in choices]
    if 0 in lengths:
        return None
    scores = [
        value / length for value, length in zip(likelihoods, lengths, strict=True)
    ]
    return str(max(range(len(scores)), key=scores.__getitem__))


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False, default=str)
