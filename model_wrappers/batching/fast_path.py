"""What prefix sharing and slot refilling are built on: which way answers are computed, and what it takes."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from dataclasses import astuple, dataclass, field
from operator import add, sub
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from .attention_support import base_model, is_encoder_decoder, unsupported_reason
from .cpu_linear import linear_backend


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    # The mixins' neighbour among the bases, whose attributes they use.
    from lm_eval.models.huggingface import HFLM as _Neighbour
else:
    _Neighbour = object


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


@dataclass
class FastPath:
    """One faster way to answer requests than `HFLM`'s own, and whether it is taken.

    Attributes:
        argument: The model argument that turns it off, such as ``prefix_sharing``.
        is_on: Whether requests may take it.
        unit: What the size of a pass is counted in, such as ``tokens``.
        reason: What about the model turned it off, if anything did.
        most: The size of a pass that a shortage of memory left, in `unit`; None: any.
        logged: Reasons that were logged.
    """

    argument: str
    is_on: bool
    unit: str
    reason: str | None = None
    most: int | None = None
    logged: set[str] = field(default_factory=set)

    @property
    def logger(self) -> logging.Logger:
        return logging.getLogger(f"lm_eval.models.{self.argument}")


def end_tokens(model: Any) -> list[int]:
    """Return the ids that end a text, from the generation config of `model`."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return []
    return list(ends) if isinstance(ends, (list, tuple)) else [int(ends)]


def count_generated(tokens: torch.Tensor, ends: list[int]) -> int:
    """Count generated tokens, up to and with the first end-of-text token of each row.

    Args:
        tokens: Shape (rows, steps): what ``generate`` returned, without the prompts.
        ends: Ids that end a row; what follows is padding.
    """
    if not ends:
        return tokens.numel()
    is_end = torch.isin(tokens, torch.tensor(ends, device=tokens.device)).int()
    ended_before = is_end.cumsum(1) - is_end
    return int((ended_before == 0).sum())


class FastPathMixin(_Neighbour):
    """Decides whether a fast path is taken, runs it, counts tokens and records what answered.

    It comes before `HFLM` among the bases, behind all mixins that are built on it.

    Attributes:
        token_counts: Totals since the model was loaded.
        answer_paths: How many requests of each type took which path, and why, since the last
            `get_model_info`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.token_counts = TokenCounts()
        self.answer_paths = AnswerPaths()
        super().__init__(*args, **kwargs)

    def get_model_info(self) -> dict[str, Any]:
        """Return `HFLM`'s model information and what answered since the last call."""
        ways = {way for path in self.answer_paths.values() for way in path.requests}
        # Only fast paths have float32 layers on a CPU computed otherwise.
        linear = linear_backend(self.model) if ways - {"plain"} else "torch"
        record = {**self.answer_paths.take(), "linear": linear}
        return {**super().get_model_info(), "answer_paths": record}

    def _why_not(self, path: FastPath) -> str | None:
        """Return why no request takes `path`, if none does; say once what about the model is why."""
        if path.is_on and (reason := unsupported_reason(self)) is not None:
            path.is_on, path.reason = False, reason
            self._complain(path, reason)
        return None if path.is_on else path.reason or f"{path.argument}=false"

    def _complain(self, path: FastPath, reason: str) -> None:
        """Log why requests do not take `path`, once for each reason."""
        if reason not in path.logged:
            path.logged.add(reason)
            if self.rank == 0:
                path.logger.warning(
                    "Requests are answered as by hf, without %s: %s.",
                    path.argument,
                    reason,
                )

    def _run(self, path: FastPath, run: Callable[[int], None], size: int) -> None:
        """Call ``run(size)``; after a shortage of memory once more, with half of `size`, for good.

        Args:
            path: What runs.
            run: Runs passes of up to so much, in the path's unit, and goes on where it failed.
            size: What memory seems to allow.

        Raises:
            RuntimeError: It failed otherwise, or at size 1, or where several processes share the
                model: the others wait for this one within the pass.
        """
        shared = (getattr(base_model(self.model), "tp_size", None) or 1) > 1
        while True:
            try:
                run(size)
            except RuntimeError as error:
                if size == 1 or shared or not should_reduce_batch_size(error):
                    raise
            else:
                return
            # Outside the handler, whose traceback holds on to the failed pass's tensors.
            size = path.most = size // 2
            path.logger.warning(
                "Out of memory: continuing with at most %d %s at once.", size, path.unit
            )
            clear_device_cache(garbage_collection=True)

    # --- tokens that `HFLM` computes

    def _model_call(
        self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None
    ) -> torch.Tensor:
        # What an encoder reads; `_select_cont_toks` sees the decoder's part.
        if attn_mask is not None:
            self.token_counts.processed += int(attn_mask.sum())
        return super()._model_call(inps, attn_mask=attn_mask, labels=labels)

    def _select_cont_toks(
        self,
        logits: torch.Tensor,
        contlen: int | None = None,
        inplen: int | None = None,
    ) -> torch.Tensor:
        # HFLM calls this once for each row that it sent through the model, with the
        # row's length before padding (the decoder's, in an encoder-decoder model).
        self.token_counts.processed += inplen or contlen or 0
        return super()._select_cont_toks(logits, contlen=contlen, inplen=inplen)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any
    ) -> torch.Tensor:
        output = super()._model_generate(context, max_length, stop, **options)
        mask = options.get("attention_mask")
        prompt = context.numel() if mask is None else int(mask.sum())
        start = 1 if is_encoder_decoder(self) else context.shape[1]
        generated = count_generated(output[:, start:], end_tokens(self.model))
        self.token_counts.prompt += prompt
        self.token_counts.generated += generated
        # The last token of a row is never fed back.
        self.token_counts.processed += prompt + generated - context.shape[0]
        return output
