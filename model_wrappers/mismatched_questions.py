"""What a model scores without reading the question: answers after another document's question.

Constant answers are a floor for any model. This is the floor of one model: what its own
preferences among the answers are worth. Sources: choices-only prompts, Balepur et al. 2024
(arXiv 2402.12483); the prior of an answer, Holtzman et al. 2021 (arXiv 2104.08315).
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from copy import copy
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval.api.instance import Instance

#: The argument of the model types, and the entry of ``config`` in their results.
ARGUMENT = "mismatched_questions"


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
            f"{ARGUMENT}=true scores given answers after another document's question, and "
            f"{requests[0].task_name} has none: leave the task out of --tasks."
        )
    documents: dict[Any, list[Instance]] = defaultdict(list)
    for request in {id(request): request for request in requests}.values():
        documents[request.task_name, request.doc_id].append(request)
    alike: dict[Any, list[list[Instance]]] = defaultdict(list)
    for (task, _), document in documents.items():
        alike[task, len(_contexts(document))].append(document)
    exchanged: dict[int, Instance] = {}
    for (task, _), group in alike.items():
        group.sort(key=lambda document: (_hash(document), document[0].doc_id))
        commonest = max(Counter(map(_contexts, group)).values())
        if 2 * commonest > len(group):
            raise ValueError(
                f"{ARGUMENT}=true asks for another document's question, but {task} has no "
                f"{len(group)} documents with different questions to exchange: raise --limit, or "
                "leave the task out."
            )
        for number, document in enumerate(group):
            contexts = _contexts(group[(number + commonest) % len(group)])
            in_turn = iter(contexts * len(document))
            for request in document:
                exchanged[id(request)] = _after(request, in_turn)
    return [exchanged[id(request)] for request in requests]


def _contexts(document: Sequence[Instance]) -> tuple[str, ...]:
    """Return the contexts of a document: one, or one for each answer."""
    contexts = tuple(request.args[0] for request in document if request.args[0])
    return contexts[:1] if len(set(contexts)) == 1 else contexts


def _after(request: Instance, contexts: Any) -> Instance:
    if not request.args[0]:
        return request
    other = copy(request)
    other.arguments = (next(contexts), *request.args[1:])
    return other


def _hash(document: Sequence[Instance]) -> str:
    return hashlib.sha256("\0".join(_contexts(document)).encode()).hexdigest()
