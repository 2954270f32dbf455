"""How many tokens a model worked on."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from operator import add, sub


@dataclass
class TokenCounts:
    """Running totals; padding is in none of them.

    The fast paths add what they do, `EnergyLoggingHFLM` what `HFLM` does: each row of
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
