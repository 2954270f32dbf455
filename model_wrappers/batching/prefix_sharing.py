"""Log-likelihood with shared prefixes, for any model type built on `HFLM`.

Multiple-choice tasks send each choice with its whole context, and few-shot tasks
send the same examples with each question. `PrefixSharingMixin` puts all requests
of a call into one prefix tree (`.token_tree`), computes each node of the tree once, and
computes logits at the scored nodes only (`.prefix_pass`). Independent of pruning.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from .attention_support import (
    config_of,
    is_encoder_decoder,
    row_limit,
    sequence_limit,
)
from .fast_path import FastPath, FastPathMixin
from .forward import Forward, rounds_shapes
from .prefix_pass import PathCache, Work, run_pack
from .token_tree import Budget, next_pack, rounded


if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_eval.api.instance import Instance

    from .prefix_pass import Request


# A pass of fewer tokens leaves the machine idle whatever the batch size.
_FEWEST_TOKENS = 512


class PrefixSharingMixin(FastPathMixin):
    """Computes common prefixes of log-likelihood requests once.

    Put it before `HFLM` among the bases. Log-probabilities and greedy flags are
    `HFLM`'s up to rounding. Where a model's attention does not allow it, requests
    take `HFLM`'s own path, and one logged line says why. Class, config and adapter decide
    whether it does; width and dtype play no part. ``config.answer_paths`` in the results
    says which way was taken.
    """

    def __init__(self, *args: Any, prefix_sharing: bool = True, **kwargs: Any) -> None:
        """Set up as the next class does.

        Args:
            *args: Passed on.
            prefix_sharing: Compute common prefixes of log-likelihood requests once.
            **kwargs: Passed on.

        Raises:
            ValueError: `prefix_sharing` is neither true nor false.
        """
        self._sharing = FastPath(
            "prefix_sharing",
            prefix_sharing,
            "Prefixes are not shared; each request is computed separately",
            unit="tokens",
            smaller="a smaller batch_size, or prefix_sharing=false",
        )
        self._request_type = "loglikelihood"
        super().__init__(*args, **kwargs)

    @property
    def prefix_sharing(self) -> bool:
        """Whether prefixes are shared where that is worth it."""
        return bool(self._sharing.is_on)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Score whole texts as `HFLM` does; see `_loglikelihood_tokens`."""
        self._request_type = "loglikelihood_rolling"
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)  # type: ignore[misc]
        finally:
            self._request_type = "loglikelihood"

    def _loglikelihood_tokens(
        self,
        requests: list[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        self.token_counts.prompt += sum(
            min(len(context) + len(continuation), self.max_length + 1)
            for _, context, continuation in requests
        )
        reasons = self._reasons(requests)
        shared = [r for r, why in zip(requests, reasons, strict=True) if why is None]
        work = Work.of(shared, self.max_length) if shared else None
        # Processes that find batch sizes together have to agree on whether they share.
        if work and not self._detects_together and not self._is_worth_it(shared, work):
            few = "requests have too little in common"
            reasons, work = [few if why is None else why for why in reasons], None
        path = self.answer_paths[self._request_type]
        shared_answers: Iterator[tuple[float, bool]] = iter(())
        if work:
            path.add("shared", len(shared), len(work.tree))
            shared_answers = iter(self._score(shared, work, disable_tqdm))
        plain = [r for r, why in zip(requests, reasons, strict=True) if why is not None]
        plain_answers: Iterator[tuple[float, bool]] = iter(())
        if plain:
            if self.prefix_sharing and self._detects_together:
                longest = max(self._input_length(request) for request in plain)
                override_bs = override_bs or max(
                    1, self._budget(plain).scored // longest
                )
            answers, computed = self._score_plainly(plain, disable_tqdm, override_bs)
            plain_answers = iter(answers)
            path.add("plain", len(plain), computed, filter(None, reasons))
        return [
            next(shared_answers if why is None else plain_answers) for why in reasons
        ]

    def _reasons(self, requests: list[Request]) -> list[str | None]:
        """Return why each request cannot be shared, None for those that can."""
        if not self._can_take(self._sharing):
            return [self._sharing.reason] * len(requests)
        limit = sequence_limit(config_of(self))
        reasons: list[str | None] = []
        for request in requests:
            _, context, continuation = request
            reason = None
            if limit is not None and self._input_length(request) > limit:
                reason = f"it is longer than {limit} tokens"
                self._complain(self._sharing, reason)
            elif not context or not 0 < len(continuation) <= self.max_length:
                reason = "hf refuses it"
            reasons.append(reason)
        return reasons

    def _is_worth_it(self, requests: list[Request], work: Work) -> bool:
        """Estimate the share of `HFLM`'s work that sharing saves, and ask if it is enough."""
        config = config_of(self).get_text_config()
        # Of the usual proportions, whatever the width: sizes of a sweep take one path.
        body = 12 * config.num_hidden_layers * config.hidden_size**2
        head = config.vocab_size * config.hidden_size
        asked = sum(self._input_length(group[0]) for group in _by_text(requests))
        ours = len(work.tree) * body + int(work.scored_before[-1]) * head
        return 1 - ours / (asked * (body + head)) >= _least_saving(self.device)

    @property
    def _detects_together(self) -> bool:
        """Whether `HFLM` finds a batch size in a meeting of all processes.

        Processes hold different requests, so which path these take must not decide
        who comes to the meeting.
        """
        return self.world_size > 1 and self.batch_size == "auto"

    def _input_length(self, request: Request) -> int:
        _, context, continuation = request
        if is_encoder_decoder(self):
            parts = (len(context), len(continuation))
            return sum(min(length, self.max_length) for length in parts)
        return min(len(context) + len(continuation) - 1, self.max_length)

    def _score_plainly(
        self, requests: list[Request], disable_tqdm: bool, override_bs: int | None
    ) -> tuple[list[tuple[float, bool]], int]:
        """Let `HFLM` answer, without its cache of logits where that answers wrongly.

        lm-eval 0.4.13 gives two requests that split one text differently the first logits
        of the text for the shorter continuation, where the last ones belong.

        Returns:
            The answers, and how many tokens they took.
        """
        groups = _by_text(requests)
        splits_alike = all(len({len(r[2]) for r in group}) == 1 for group in groups)
        asked = self.logits_cache  # type: ignore[has-type]
        # HFLM looks for equal texts only in front of a decoder.
        cached = asked and splits_alike and not is_encoder_decoder(self)
        computed = [group[0] for group in groups] if cached else requests
        self.logits_cache = cached
        try:
            answers = super()._loglikelihood_tokens(  # type: ignore[misc]
                requests, disable_tqdm=disable_tqdm, override_bs=override_bs
            )
        finally:
            self.logits_cache = asked
        return answers, sum(map(self._input_length, computed))

    def _score(
        self, requests: list[Request], work: Work, disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        """Return the answers to `requests`, and hand each on when its last node is done."""
        dtype = self.softmax_dtype or self.mixed_precision_dtype or self.model.dtype
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        last_nodes = work.tree.last
        order = iter(np.argsort(last_nodes, kind="stable").tolist())
        index = next(order, None)
        bar = tqdm(
            total=len(requests),
            disable=disable_tqdm or self.rank != 0,
            desc="Running loglikelihood requests",
        )
        for stop in self._passes(work, self._budget(requests)):
            while index is not None and last_nodes[index] < stop:
                pairs = work.pairs[index]
                total = torch.tensor(work.values[pairs].sum()).to(dtype)
                answer = results[index] = float(total), bool(work.greedy[pairs].all())
                if (key := requests[index][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", key, answer)
                index = next(order, None)
                bar.update(1)
        bar.close()
        return results

    def _budget(self, requests: list[Request]) -> Budget:
        """Return how much one forward pass may hold.

        Never more tokens than `HFLM` would put into a batch of ``batch_size``, down
        to a floor that no machine notices; ``auto`` begins at the device's ceiling.
        """
        fewest = _FEWEST_TOKENS
        if self.device.type == "cpu":
            # Products of fewer tokens are slower for each; of more a core's cache holds none.
            tokens = 256 * max(torch.get_num_threads(), 4)
            # With sdpa a row is read in blocks, and one row has no padding.
            in_blocks = config_of(self)._attn_implementation == "sdpa"
            most = Budget(tokens, tokens if in_blocks else 256, 1024)
        else:
            fewest, most = self._card_budget()
        tokens = most.tokens
        if isinstance(self.batch_size, int):
            longest = max(self._input_length(request) for request in requests)
            tokens = min(max(self.batch_size * longest, fewest), tokens)
        # What a shortage of memory left, and what Llama 4 bears in a row.
        for limit in (self._sharing.most, row_limit(config_of(self))):
            tokens = min(tokens, limit or tokens)
        rounds = rounds_shapes(self.device)
        if rounds:
            tokens = rounded(tokens, 1, up=False)
        row_tokens, scored = (min(n, tokens) for n in (most.row_tokens, most.scored))
        return Budget(tokens, row_tokens, scored, most.mask, rounds)

    def _card_budget(self) -> tuple[int, Budget]:
        """Return the fewest tokens worth a pass on a card, and what it bears at most."""
        # Rows of several subtrees read each other's keys in vain.
        most = Budget(8192, 256, 2048)
        free = self._free_memory()
        if free is None:
            return _FEWEST_TOKENS, most
        config = config_of(self).get_text_config()
        # Bytes: of logits and their softmax, of a mask and what it is made of, of a layer.
        scored = free // 8 // (12 * config.vocab_size)
        mask = max(most.mask, free // 16 // 8)
        fewest = free // 16 // (100 * config.hidden_size)
        scored = min(max(256, scored), most.tokens)
        return max(_FEWEST_TOKENS, fewest), replace(most, scored=scored, mask=mask)

    def _passes(self, work: Work, budget: Budget) -> Iterator[int]:
        """Run the tree through the model; yield how many nodes are done after each pass."""
        forward = Forward(self)
        cache = PathCache(rounds=forward.rounds)
        start = 0

        def run() -> int:
            pack = next_pack(work.tree, work.scored_before, start, budget)
            run_pack(forward, work, pack, cache, self.softmax_dtype)
            return pack.stop

        def shrink(_: int) -> None:
            nonlocal budget
            budget = budget.halved()
            cache.forget_pass()

        while start < len(work.tree):
            stop = self._run_or_shrink(self._sharing, run, budget.tokens, shrink)
            if stop is not None:
                self.token_counts.processed += stop - start
                yield stop
                start = stop


def _least_saving(device: torch.device) -> float:
    """Return the share of the work that sharing has to save to be worth it."""
    # On a GPU, attention under a mask takes up to twice as long as causal attention, which is
    # about a fifth of the work in rows of a few thousand tokens.
    return 0.05 if device.type == "cpu" else 0.2


def _by_text(requests: list[Request]) -> list[list[Request]]:
    """Group the requests whose input is the same, which `HFLM` computes once."""
    groups: dict[tuple[int, ...], list[Request]] = {}
    for request in requests:
        groups.setdefault((*request[1], *request[2][:-1]), []).append(request)
    return list(groups.values())
