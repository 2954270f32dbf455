"""Which way the answers of a run were computed, for the results file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from lm_eval_pruned.model_wrappers.cpu_linear import linear_backend


@dataclass
class AnswerPath:
    """What answered the requests of one type so far.

    Attributes:
        requests: Number of requests by path: ``shared``, ``slots`` or ``plain``.
        tokens_computed: Positions that went through the model, padding left out, by path.
        reasons: Why requests took the plain path.
    """

    requests: dict[str, int] = field(default_factory=dict)
    tokens_computed: dict[str, int] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)

    def add(
        self, path: str, requests: int, tokens: int, reason: str | None = None
    ) -> None:
        """Count `requests` that took `path` and the tokens that this computed."""
        self.requests[path] = self.requests.get(path, 0) + requests
        self.tokens_computed[path] = self.tokens_computed.get(path, 0) + tokens
        if reason is not None and reason not in self.reasons:
            self.reasons.append(reason)


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
        on a path other than the plain one; see `lm_eval_pruned.model_wrappers.cpu_linear`.
        """
        onednn = any(
            type(layer) is torch.nn.Linear
            and layer.weight.device.type == "cpu"
            and layer.weight.dtype == torch.float32
            for layer in model.modules()
        )
        faster = any(set(path.requests) - {"plain"} for path in self._paths.values())
        return {
            **{name: vars(path) for name, path in self._paths.items()},
            "linear": linear_backend() if onednn and faster else "torch",
        }
