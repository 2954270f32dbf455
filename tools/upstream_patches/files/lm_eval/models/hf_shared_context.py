"""``hf-shared-context``: log-likelihoods in which equal contexts are computed once.

Multiple-choice tasks send each choice with its whole context. Here a context goes through the model
once, and its choices follow as rows that continue from its keys and values, with the masks, positions
and caches of ``generate``: contexts are padded on the left.
"""

from __future__ import annotations

import inspect
import logging
from collections import defaultdict
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import DynamicCache, cache_utils

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from lm_eval.models.utils_hf import pad_and_concat


if TYPE_CHECKING:
    #: What identifies the request, its context and its continuation.
    Request = tuple[tuple[str, str] | None, list[int], list[int]]

eval_logger = logging.getLogger(__name__)


@register_model("hf-shared-context")
class SharedContextHFLM(HFLM):
    """Computes a context once for all the continuations that are scored after it.

    Takes `HFLM`'s arguments; log-probabilities and greedy flags are `HFLM`'s up to rounding.
    Contexts with one continuation, those that are truncated, and models that keep more than keys
    and values take `HFLM`'s own path. The batch size counts contexts, and then continuations.
    """

    def _loglikelihood_tokens(
        self,
        requests: list[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            fits = len(context) + len(continuation) <= self.max_length + 1
            whole = fits and len(context) > 0 and len(continuation) > 0
            groups[tuple(context) if whole else (-1, index)].append(index)
        if (reason := self._no_sharing()) is not None:
            eval_logger.info("Contexts are not shared: %s.", reason)
            groups = {}
        shared = {}
        for members in groups.values():
            # It stands for its group, since a batch has to hold it.
            longest = max(members, key=lambda index: len(requests[index][2]))
            # Of one token each, they are one input, which `HFLM` computes once as well.
            if len(members) > 1 and len(requests[longest][2]) > 1:
                shared[longest] = members
        results: dict[int, tuple[float, bool]] = {}
        rest = sorted({*range(len(requests))}.difference(*shared.values()))
        if rest:
            answers = super()._loglikelihood_tokens(
                [requests[index] for index in rest], disable_tqdm, override_bs
            )
            results.update(zip(rest, answers, strict=True))
        if shared:
            self._score_groups(requests, shared, results, disable_tqdm, override_bs)
        return [results[index] for index in range(len(requests))]

    def _no_sharing(self) -> str | None:
        """Return why contexts cannot be shared with this model, or None if they can."""
        if self.backend != "causal":
            return "the model has an encoder"
        if getattr(self.model, "_is_stateful", False):
            return "the model keeps a recurrent state"
        adapters = (getattr(self.model, "peft_config", None) or {}).values()
        if any(adapter.is_prompt_learning for adapter in adapters):
            return "the adapter adds virtual tokens"
        if "position_ids" not in self._forward_arguments():
            return "the model takes no position_ids"
        if not hasattr(cache_utils, "DynamicLayer"):
            return "caches consist of layers from transformers 4.55 on"
        if self.world_size > 1 and self.batch_size == "auto":
            return "processes with different requests find the batch size together"
        return None

    def _score_groups(
        self,
        requests: list[Request],
        groups: dict[int, list[int]],
        results: dict[int, tuple[float, bool]],
        disable_tqdm: bool,
        override_bs: int | None,
    ) -> None:
        """Score requests whose contexts are equal within each group."""
        order = sorted(
            ((index, *requests[index][1:]) for index in groups),
            key=lambda request: -len(request[1]) - len(request[2]),
        )
        size = self.batch_size if self.batch_size != "auto" else override_bs or 0
        self.batch_sizes = {}
        scheduler = None if size else self._batch_scheduler
        bar = tqdm(
            total=sum(map(len, groups.values())),
            disable=disable_tqdm or self.rank != 0,
            desc="Running loglikelihood requests with shared contexts",
        )
        for chunk in Collator.get_chunks(order, n=size, fn=scheduler):
            batch = [groups[index] for index, _, _ in chunk]
            for index, answer in self._score_batch(requests, batch):
                results[index] = answer
                if (text := requests[index][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", text, answer)
                bar.update(1)
        bar.close()

    def _score_batch(
        self, requests: list[Request], groups: list[list[int]]
    ) -> list[tuple[int, tuple[float, bool]]]:
        """Run one batch of contexts, then their continuations in batches of as many rows."""
        contexts = [torch.tensor(requests[group[0]][1]) for group in groups]
        lengths = torch.tensor([[len(context)] for context in contexts])
        width = int(lengths.max())
        mask = (torch.arange(width) >= width - lengths).long()
        tokens = pad_and_concat(width, contexts, padding_side="left")
        cache = DynamicCache()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        first = self._run(tokens, mask, positions, cache, last_only=True)
        # By length, so that rows of a batch need little padding.
        rows = sorted(
            ((row, index) for row, group in enumerate(groups) for index in group),
            key=lambda pair: len(requests[pair[1]][2]),
        )
        answers = []
        for begin in range(0, len(rows), len(groups)):
            some = rows[begin : begin + len(groups)]
            which = torch.tensor([row for row, _ in some])
            targets = [torch.tensor(requests[index][2]) for _, index in some]
            logits = first[which.to(first.device)]
            longest = max(map(len, targets)) - 1
            if longest:
                # The last token's successor is not asked for.
                more = pad_and_concat(longest, [t[:-1] for t in targets], "right")
                seen = torch.cat([mask[which], torch.ones_like(more)], dim=-1)
                positions = lengths[which] + torch.arange(longest)
                after = self._run(more, seen, positions, _rows_of(cache, which))
                logits = torch.cat([logits, after], dim=1)
            logprobs = F.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)
            for row, (_, index), target in zip(logprobs, some, targets, strict=True):
                row, target = row[: len(target)], target.to(row.device)
                values = row.gather(-1, target[:, None])
                greedy = bool((row.argmax(-1) == target).all())
                answers.append((index, (float(values.sum()), greedy)))
        return answers

    def _run(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor,
        cache: DynamicCache,
        last_only: bool = False,
    ) -> torch.Tensor:
        """Return logits, and let `cache` grow."""
        known = self._forward_arguments()
        # Renamed in transformers 5.24.
        name = "cache" if "cache" in known else "past_key_values"
        arguments: dict[str, Any] = {"use_cache": True, name: cache}
        if last_only and "logits_to_keep" in known:
            arguments["logits_to_keep"] = 1
        dtype = self.mixed_precision_dtype
        autocast = torch.autocast(self.device.type, dtype, enabled=dtype is not None)
        with torch.no_grad(), autocast:
            logits = self.model(
                input_ids=tokens.to(self.device),
                attention_mask=mask.to(self.device),
                position_ids=positions.to(self.device),
                **arguments,
            ).logits
        return logits[:, -1:] if last_only else logits

    def _forward_arguments(self) -> set[str]:
        model = self.model
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        return set(inspect.signature(model.forward).parameters)


def _rows_of(cache: DynamicCache, which: torch.Tensor) -> DynamicCache:
    """Return some rows of a cache as a new one; nothing else is copied."""
    rows = copy(cache)
    rows.layers = [copy(layer) for layer in cache.layers]
    rows.batch_select_indices(which)
    return rows
