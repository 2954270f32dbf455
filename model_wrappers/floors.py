"""What is scored without reading a question: the floors of tasks, and of one model.

The model types ``constant`` and ``echo`` know nothing: a floor for any model. Answers after another
document's question are the floor of one model: what its own preferences among the answers are worth.
Sources: choices-only prompts, Balepur et al. 2024 (arXiv 2402.12483); the prior of an answer, Holtzman
et al. 2021 (arXiv 2104.08315).
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter, defaultdict
from copy import copy
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import LM


if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lm_eval.api.instance import Instance

#: The argument of the model types, and the entry of ``config`` in their results.
MISMATCHED = "mismatched_questions"
#: Which of several answers is the most likely one.
RULES = ("equal", "shortest", "longest", "first")
_OF_HARNESS = {"batch_size", "device", "max_batch_size", "trust_remote_code"}


class EchoLM(LM):
    _answer: str | None = None
    tokenizer_name = "contents of messages"

    def __init__(self, loglikelihood: str = "equal", **others: Any) -> None:
        """Answer each prompt with the prompt.

        Args:
            loglikelihood: The most likely of several answers. ``equal``: all alike, and ``acc``
                guesses; ``shortest``, ``longest``, ``first``. Guesses, also between answers of one
                length, are the same in each run.
            **others: What the harness passes to every model.

        Raises:
            ValueError: An argument is unknown, or `loglikelihood` has no such value.
        """
        super().__init__()
        for name in others.keys() - _OF_HARNESS:
            known = "pass loglikelihood=RULE, and to constant answer=TEXT"
            raise ValueError(f"{name}={others[name]} is unknown: {known}.")
        if loglikelihood not in RULES:
            known = f"pass one of {', '.join(RULES)}"
            raise ValueError(f"loglikelihood={loglikelihood} is not a rule: {known}.")
        self._rule, self._device = loglikelihood, "cpu"

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Make one answer to each document certain, or all alike; a single one is any bytes."""
        answers: dict[int, tuple[float, bool]] = {}
        for document in _documents(requests).values():
            answers |= self._answers(document)
        return [answers[id(request)] for request in requests]

    def _answers(self, document: Sequence[Instance]) -> dict[int, tuple[float, bool]]:
        if len(document) == 1:
            return {id(document[0]): (_of_bytes(document[0].args[1]), False)}
        # acc_mutual_info asks once more without the question, where nothing may be certain.
        offered = [request for request in document if request.args[0]] or document

        def rank(index: int) -> tuple[int, str]:
            context, answer = offered[index].args[:2]
            size = len(context + answer)
            by_rule = {"shortest": -size, "longest": size, "first": -index}
            # The harness gives ties to the first, which data sets often make the right one.
            draw = hashlib.sha256(f"{context}\0{answer}".encode()).hexdigest()
            return by_rule.get(self._rule, 0), draw

        chosen = offered[max(range(len(offered)), key=rank)]
        # As likely as the chosen one, to nine digits, or never.
        other = -1e-9 if self._rule == "equal" else -1000.0
        others = {id(request): (other, False) for request in document}
        return others | {id(chosen): (0.0, True)}

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[Any]:
        """Return the log-likelihood of each text where all bytes are equally likely: 8 bits each."""
        texts = [_of_bytes(request.args[-1]) for request in requests]
        # lm-eval 0.5 asks as for a continuation, of an empty context, and wants such an answer.
        pairs = requests and len(requests[0].args) > 1
        return [(text, False) for text in texts] if pairs else texts

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the text for each prompt, up to the first of its stop sequences."""
        answers = []
        for prompt, settings, *_ in (request.args for request in requests):
            text = prompt if self._answer is None else self._answer
            stops = settings.get("until") or ()
            for stop in filter(None, [stops] if isinstance(stops, str) else stops):
                text = text.partition(stop)[0]
            answers.append(text)
        return answers

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the contents of the messages, one after the other."""
        return "\n\n".join(message["content"] for message in chat_history)


class ConstantLM(EchoLM):
    def __init__(self, answer: Any = "Yes", **others: Any) -> None:
        """Answer each prompt with `answer`; `others` are those of `EchoLM`."""
        super().__init__(**others)
        self._answer = str(answer)
        # IFEval's code counts an answer without letters, and logs an error with all of it.
        ifeval = logging.getLogger("lm_eval.tasks.ifeval.instructions")
        ifeval.addFilter(_is_no_missing_language)


def _is_no_missing_language(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Unable to detect language")


def _documents(requests: Iterable[Instance]) -> dict[Any, list[Instance]]:
    """Return the requests about each document, by its task and number."""
    documents: dict[Any, list[Instance]] = defaultdict(list)
    # One that is repeated is listed again.
    for request in {id(request): request for request in requests}.values():
        documents[request.task_name, request.doc_id].append(request)
    return documents


def _of_bytes(text: str) -> float:
    return -math.log(256) * len(text.encode())


def mismatched(request_type: str, requests: Sequence[Instance]) -> list[Instance]:
    """Return requests of type ``loglikelihood`` with the contexts of another document of the same task.

    The exchange is fixed: documents in the order of a hash of their contexts take those of a later
    one, never a context equal to theirs. It brings its few-shot examples along. Where each answer
    has a context of its own, as in Winogrande, documents with as many answers are exchanged, place
    by place. An empty context, by which ``acc_mutual_info`` asks for an answer alone, stays empty.

    Raises:
        ValueError: A task has no two documents that can be exchanged, or the requests are of a type
            that offers no answers to score.
    """
    if request_type != "loglikelihood":
        raise ValueError(
            f"{MISMATCHED}=true scores given answers after another document's question, and "
            f"{requests[0].task_name} has none: leave the task out of --tasks."
        )
    documents = _documents(requests)
    alike: dict[Any, list[list[Instance]]] = defaultdict(list)
    for (task, _), document in documents.items():
        alike[task, len(_contexts(document))].append(document)

    def order(document: Sequence[Instance]) -> tuple[str, int]:
        contexts = "\0".join(_contexts(document)).encode()
        return hashlib.sha256(contexts).hexdigest(), document[0].doc_id

    exchanged: dict[int, Instance] = {}
    for (task, _), group in alike.items():
        group.sort(key=order)
        commonest = max(Counter(map(_contexts, group)).values())
        if 2 * commonest > len(group):
            raise ValueError(
                f"{MISMATCHED}=true asks for another document's question, but {task} has no "
                f"{len(group)} documents with different questions to exchange: raise --limit, or "
                "leave the task out."
            )
        for number, document in enumerate(group):
            contexts = _contexts(group[(number + commonest) % len(group)])
            in_turn = iter(contexts * len(document))
            for request in document:
                exchanged[id(request)] = other = copy(request)
                if request.args[0]:
                    other.arguments = (next(in_turn), *request.args[1:])
    return [exchanged[id(request)] for request in requests]


def _contexts(document: Sequence[Instance]) -> tuple[str, ...]:
    """Return the contexts of a document: one, or one for each answer."""
    contexts = tuple(request.args[0] for request in document if request.args[0])
    return contexts[:1] if len(set(contexts)) == 1 else contexts
