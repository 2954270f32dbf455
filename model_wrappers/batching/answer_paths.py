"""Which way the answers of a run were computed, and how many tokens that took."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import astuple, dataclass, field
from operator import add, sub
from typing import TYPE_CHECKING, Any

from .cpu_linear import float32_layers, linear_backend


if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch


@dataclass
class TokenCounts:
    """Running totals; padding is in none of them.

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
        tokens_computed: Positions that went through the model, padding left out, by path.
        by_reason: Why requests took the plain path, and how many did for each reason.
        slots: In how many slots texts were generated, last; None: in none.
    """

    requests: Counter[str] = field(default_factory=Counter)
    tokens_computed: Counter[str] = field(default_factory=Counter)
    by_reason: Counter[str] = field(default_factory=Counter)
    slots: int | None = None

    def add(
        self, path: str, requests: int, tokens: int, reasons: Iterable[str] = ()
    ) -> None:
        """Count `requests` that took `path`, the tokens that this computed, each one's reason."""
        self.requests[path] += requests
        self.tokens_computed[path] += tokens
        self.by_reason.update(reasons)


class AnswerPaths(defaultdict[str, AnswerPath]):
    """What answered the requests of each type, such as ``loglikelihood``."""

    def __init__(self) -> None:
        super().__init__(AnswerPath)

    def take(self) -> dict[str, dict[str, Any]]:
        """Return the records for the results file, and begin anew."""
        records = {
            request_type: {
                "requests": dict(path.requests),
                "tokens_computed": dict(path.tokens_computed),
                "reasons": list(path.by_reason),
                **({} if path.slots is None else {"slots": path.slots}),
            }
            for request_type, path in self.items()
        }
        self.clear()
        return records

    def computing_linear(self, model: torch.nn.Module) -> str:
        """Return what computed the linear layers of `model`.

        That is ``torch``, or on a fast path with float32 layers on a CPU what `cpu_linear` chose.
        """
        faster = any(path.requests.keys() - {"plain"} for path in self.values())
        return linear_backend() if faster and float32_layers(model) else "torch"
