"""Which way the answers of a run were computed, and how many tokens that took."""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple, dataclass, field
from operator import add, sub
from typing import TYPE_CHECKING, Any

from .cpu_linear import float32_layers, linear_backend


if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch


@dataclass
class TokenCounts:
    """Running totals; padding is in none of them.

    The fast paths add what they do, and `PrefixHFLM` what `HFLM` does: each row of
    ``_loglikelihood_tokens``, and each call of ``_model_generate``.

    Attributes:
        prompt: Tokens of the requests: context and continuation of a scored request,
            the prompt of a generation; after truncation to the model's length.
        generated: Tokens that the model generated, the end-of-text token included. What
            follows a stop string was generated too, before the harness cut it off.
        processed: Positions that went through the model. Less than prompt + generated
            where answers share their context.
    """

    prompt: int = 0
    generated: int = 0
    processed: int = 0

    def __add__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(*map(add, astuple(self), astuple(other)))

    def __sub__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(*map(sub, astuple(self), astuple(other)))


@dataclass
class AnswerPath:
    """What answered the requests of one type so far.

    Attributes:
        requests: Number of requests by path: ``shared``, ``slots`` or ``plain``.
        tokens_computed: Positions that went through the model, padding left out, by path;
            None where that was not counted.
        by_reason: Why requests took the plain path, and how many did for each reason.
        slots: In how many slots texts were generated, last; None: in none.
    """

    requests: Counter[str] = field(default_factory=Counter)
    tokens_computed: dict[str, int | None] = field(default_factory=dict)
    by_reason: Counter[str] = field(default_factory=Counter)
    slots: int | None = None

    def add(
        self, path: str, requests: int, tokens: int | None, reasons: Iterable[str] = ()
    ) -> None:
        """Count `requests` that took `path`, the tokens that this computed, each one's reason."""
        self.requests[path] += requests
        before = self.tokens_computed.get(path, 0)
        self.tokens_computed[path] = (
            None if before is None or tokens is None else before + tokens
        )
        self.by_reason.update(reasons)

    def as_dict(self) -> dict[str, Any]:
        """Return the record for the results file, without the numbers behind the reasons."""
        record = {
            "requests": dict(self.requests),
            "tokens_computed": self.tokens_computed,
            "reasons": list(self.by_reason),
        }
        return record if self.slots is None else {**record, "slots": self.slots}


def paths_record(paths: Mapping[str, AnswerPath]) -> dict[str, Any]:
    """Return the records of all request types, such as ``loglikelihood``."""
    return {kind: path.as_dict() for kind, path in paths.items()}


def computing_linear(paths: Mapping[str, AnswerPath], model: torch.nn.Module) -> str:
    """Return what computed the linear layers of `model`.

    That is ``torch``, or on a fast path with float32 layers on a CPU what `cpu_linear` chose.
    """
    faster = any(path.requests.keys() - {"plain"} for path in paths.values())
    return linear_backend() if faster and float32_layers(model) else "torch"
