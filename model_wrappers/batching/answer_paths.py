"""Which way the answers of a run were computed, for the results file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .cpu_linear import float32_layers, linear_backend


if TYPE_CHECKING:
    import torch


@dataclass
class AnswerPath:
    """What answered the requests of one type so far.

    Attributes:
        requests: Number of requests by path: ``shared``, ``slots`` or ``plain``.
        tokens_computed: Positions that went through the model, padding left out, by path;
            None where that was not counted.
        reasons: Why requests took the plain path.
        slots: In how many slots texts were generated, last; None: in none.
    """

    requests: dict[str, int] = field(default_factory=dict)
    tokens_computed: dict[str, int | None] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    slots: int | None = None

    def add(self, path: str, requests: int, tokens: int | None, *reasons: str) -> None:
        """Count `requests` that took `path`, for `reasons`, and the tokens that this computed."""
        self.requests[path] = self.requests.get(path, 0) + requests
        before = self.tokens_computed.get(path, 0)
        self.tokens_computed[path] = (
            None if before is None or tokens is None else before + tokens
        )
        self.reasons += [reason for reason in reasons if reason not in self.reasons]


class AnswerPaths:
    """The `AnswerPath` of each request type that a model was asked for."""

    def __init__(self) -> None:
        self._paths: dict[str, AnswerPath] = {}

    def of(self, request_type: str) -> AnswerPath:
        """Return the record of `request_type`, such as ``loglikelihood``."""
        return self._paths.setdefault(request_type, AnswerPath())

    def as_dict(self, model: torch.nn.Module) -> dict[str, Any]:
        """Return all records, and what computed the linear layers of `model`.

        ``linear`` is ``torch``, or ``onednn`` where float32 layers on a CPU ran through it
        on a path other than the plain one; see `lm_eval_pruned.model_wrappers.batching.cpu_linear`.
        """
        faster = any(set(path.requests) - {"plain"} for path in self._paths.values())
        return {
            **{
                name: {k: v for k, v in vars(path).items() if v is not None}
                for name, path in self._paths.items()
            },
            "linear": linear_backend() if faster and float32_layers(model) else "torch",
        }
