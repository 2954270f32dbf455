"""What prefix sharing and slot refilling are built on."""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from .answer_paths import AnswerPath, TokenCounts, computing_linear, paths_record
from .attention_support import base_model, unsupported_reason


if TYPE_CHECKING:
    from collections.abc import Callable

    # The mixins' neighbour among the bases, whose attributes they use.
    from lm_eval.models.huggingface import HFLM as _Neighbour
else:
    _Neighbour = object

T = TypeVar("T")


@dataclass
class FastPath:
    """One faster way to answer requests than `HFLM`'s own, and whether it is taken.

    Attributes:
        argument: The model argument that turns it off, such as ``prefix_sharing``.
        is_on: Whether requests may take it.
        notice: What the log says before the reason where requests do not take it.
        unit: What the size of a pass is counted in, such as ``tokens``.
        smaller: What a user can pass for smaller passes; ``{}`` is half of the size.
        unsupported: Says of an `HFLM` what about its model speaks against it, if anything.
        reason: Why it is off, if it is.
        most: The size of a pass that a shortage of memory left, in `unit`; None: any.
        logged: Reasons that were logged.

    Raises:
        ValueError: `is_on` is neither true nor false.
    """

    argument: str
    is_on: bool
    notice: str
    unit: str
    smaller: str
    unsupported: Callable[[Any], str | None] = unsupported_reason
    reason: str = field(init=False)
    most: int | None = None
    logged: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_flag(self.argument, self.is_on)
        self.reason = f"{self.argument}=false"

    @property
    def logger(self) -> logging.Logger:
        return logging.getLogger(f"lm_eval.models.{self.argument}")


class FastPathMixin(_Neighbour):
    """Decides whether a fast path is taken, runs its passes and records what answered.

    It comes before `HFLM` among the bases, behind all mixins that are built on it.

    Attributes:
        token_counts: Totals since the model was loaded. Of what `HFLM` itself computes, only the
            prompts of scored requests count; a class that measures more adds it.
        answer_paths: How many requests of each type took which path, and why, since the last
            `get_model_info`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.token_counts = TokenCounts()
        self.answer_paths: dict[str, AnswerPath] = defaultdict(AnswerPath)
        super().__init__(*args, **kwargs)

    def get_model_info(self) -> dict[str, Any]:
        """Return `HFLM`'s model information and what answered since the last call."""
        paths, self.answer_paths = self.answer_paths, defaultdict(AnswerPath)
        record = {**paths_record(paths), "linear": computing_linear(paths, self.model)}
        return {**super().get_model_info(), "answer_paths": record}

    @property
    def _shares_model(self) -> bool:
        """Whether several processes hold a part of each of the model's tensors."""
        return (getattr(base_model(self.model), "tp_size", None) or 1) > 1

    def _free_memory(self) -> int | None:
        """Return the bytes that are free on the card; None: not known, or not the same for all."""
        card: Any = getattr(torch, self.device.type, None)
        if self._shares_model or not hasattr(card, "mem_get_info"):
            return None
        unused = card.memory_reserved(self.device) - card.memory_allocated(self.device)
        return int(card.mem_get_info(self.device)[0] + unused)

    def _can_take(self, path: FastPath) -> bool:
        """Return whether nothing about the model speaks against `path`; say once what does."""
        if path.is_on and (reason := path.unsupported(self)) is not None:
            path.is_on = False
            path.reason = reason
            self._complain(path, reason)
        return path.is_on

    def _complain(self, path: FastPath, reason: str) -> None:
        """Log why requests do not take `path`, once for each reason."""
        if reason not in path.logged:
            path.logged.append(reason)
            if self.rank == 0:
                path.logger.warning("%s: %s.", path.notice, reason)

    def _run_or_shrink(
        self,
        path: FastPath,
        run: Callable[[], T],
        size: int,
        shrink: Callable[[int], None],
    ) -> T | None:
        """Return what a pass returns, or None where the memory was too short for it.

        Args:
            path: Whose pass it is.
            run: Runs the pass. It takes no arguments: they would live as long as this call.
            size: How much the pass may hold, in the path's unit.
            shrink: Takes half of `size` after a shortage: lets go of what the failed pass
                holds, and makes the next one smaller.

        Raises:
            RuntimeError: The pass failed otherwise, or at size 1; or it was too large
                for one of several processes that share the model: the others wait for
                this one within the pass.
        """
        try:
            return run()
        except RuntimeError as error:
            if size == 1 or not should_reduce_batch_size(error):
                raise
            if self._shares_model:
                raise RuntimeError(
                    f"Out of memory with {size} {path.unit} at once, and processes that "
                    "share a model (tp_plan) cannot take fewer one by one: give "
                    f"{path.smaller.format(size // 2)}."
                ) from error
            path.most = size // 2
            path.logger.warning(
                "Out of memory: continuing with at most %d %s at once.",
                path.most,
                path.unit,
            )
            shrink(path.most)
        # Outside the handler, whose traceback holds on to the failed pass's tensors.
        clear_device_cache(garbage_collection=True)
        return None


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither true nor false, such as the text ``off``.

    Raises:
        ValueError: It is neither.
    """
    if value not in (True, False):
        raise ValueError(f"{name}={value!r} is not understood: pass true or false.")


def check_count(name: str, value: Any) -> None:
    """Refuse what is neither None nor a whole number of 1 or more.

    Raises:
        ValueError: It is neither.
    """
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(
            f"{name}={value!r} is not understood: pass a whole number of 1 or more."
        )
