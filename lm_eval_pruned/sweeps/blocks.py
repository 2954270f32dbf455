"""A unit's answers, kept block by block: what was answered before a process died stays."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.util.atomic import write_atomically


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM

    #: From requests to the number of the block of each.
    Numbering = Callable[[Sequence[Instance]], list[int]]

_KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


class Blocks:
    """Answers a unit's requests in blocks of documents, each computed once.

    A block is a file that appears whole. It holds a digest of its requests, so that
    answers to others are never taken for theirs.

    Args:
        folder: Where the files lie; made when the first is written.
        number: Says which block each request belongs to. All requests of a document
            belong to one.
        seed: Sampling in a block begins from this and the block's number, so that answers do
            not depend on which process gave them; None leaves the generator alone.
    """

    def __init__(self, folder: Path, number: Numbering, seed: int | None) -> None:
        self._folder = folder
        self._number = number
        self._seed = seed
        self._known: dict[tuple[str, int], tuple[str, list[Any]]] = {}

    @contextlib.contextmanager
    def answering(self, lm: LM) -> Iterator[None]:
        """Answer the requests of `lm` in blocks."""
        for kind in _KINDS:
            compute = getattr(lm, kind)
            setattr(lm, kind, functools.partial(self._answer, lm, kind, compute))
        try:
            yield
        finally:
            for kind in _KINDS:
                delattr(lm, kind)

    def _answer(
        self,
        lm: LM,
        kind: str,
        compute: Callable[..., list[Any]],
        requests: Sequence[Instance],
        **options: Any,
    ) -> list[Any]:
        answers: list[Any] = [None] * len(requests)
        places: dict[int, list[int]] = {}
        for place, number in enumerate(self._number(requests)):
            places.setdefault(number, []).append(place)
        kept = 0
        for number in sorted(places):
            part = [requests[place] for place in places[number]]
            digest = _digest(kind, part)
            found = self._known.get((kind, number), ("", []))
            if found[0] != digest:
                found = digest, self._read(kind, number, digest, len(part))
                kept += len(found[1])
            if not found[1]:
                self._begin(lm, kind, number)
                found = digest, compute(part, **options)
                self._write(kind, number, *found)
            self._known[kind, number] = found
            for place, answer in zip(places[number], found[1], strict=True):
                answers[place] = answer
        # Whatever was computed here, the rest of the evaluation goes on alike.
        self._begin(lm, kind, -1)
        count = getattr(lm, "count_kept_answers", None)
        if kept and count is not None:
            count(kept)
        return answers

    def _begin(self, lm: LM, kind: str, number: int) -> None:
        # Automatic batch sizes were found for the lengths of another block.
        if hasattr(lm, "batch_sizes"):
            lm.batch_sizes = {}
        if self._seed is not None:
            import torch

            text = f"{self._seed} {kind} {number}"
            digest = hashlib.sha256(text.encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:7], "big"))

    def _file(self, kind: str, number: int) -> Path:
        return self._folder / f"{kind}-{number:06d}.json"

    def _read(self, kind: str, number: int, digest: str, count: int) -> list[Any]:
        """Return the answers of a finished block; none where it is not there."""
        try:
            block = json.loads(self._file(kind, number).read_text(encoding="utf-8"))
            answers = block["answers"]
            if block["requests"] != digest or len(answers) != count:
                return []
        except (OSError, ValueError, KeyError, TypeError):
            return []
        if kind == "loglikelihood":
            return [tuple(answer) for answer in answers]
        return answers

    def _write(self, kind: str, number: int, digest: str, answers: list[Any]) -> None:
        block = {"requests": digest, "answers": answers}
        # Numbers of numpy and torch have `item`; JSON gives every float back as it was.
        text = json.dumps(block, default=lambda value: value.item())
        write_atomically(self._file(kind, number), text)


def by_appearance(size: int) -> Numbering:
    """Return a numbering of documents as they come, `size` of them in each block."""

    def number(requests: Sequence[Instance]) -> list[int]:
        seen: dict[tuple[str | None, int | None], int] = {}
        for request in requests:
            seen.setdefault((request.task_name, request.doc_id), len(seen))
        return [seen[each.task_name, each.doc_id] // size for each in requests]

    return number


def _digest(kind: str, requests: Sequence[Instance]) -> str:
    from lm_eval.api.model import hash_args

    digest = hashlib.sha256()
    for request in requests:
        digest.update(hash_args(kind, request.args).encode())
    return digest.hexdigest()
