"""Log-likelihood with shared prefixes, for any model type built on `HFLM`.

Multiple-choice tasks send each choice with its whole context, and few-shot tasks
send the same examples with each question. `PrefixSharingMixin` puts all requests
of a call into one prefix tree (`.token_tree`), computes each node of the tree once, and
computes logits at the scored nodes only (`.prefix_pass`). Independent of pruning.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from .attention_support import config_of, row_limit, sequence_limit
from .fast_path import FastPath, FastPathMixin
from .forward import Forward
from .prefix_pass import PathCache, Work, run_pack
from .token_tree import Budget, next_pack


if TYPE_CHECKING:
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
        """
        self._sharing = FastPath("prefix_sharing", prefix_sharing, "tokens")
        super().__init__(*args, **kwargs)

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
        # As the harness does for windows of a longer text.
        rolling = "_rolling" if requests and requests[0][0] is None else ""
        path = self.answer_paths[f"loglikelihood{rolling}"]
        reasons = self._reasons(requests)
        shared = [i for i, why in enumerate(reasons) if why is None]
        work = (
            Work.from_requests([requests[i] for i in shared], self.max_length)
            if shared
            else None
        )
        if work and not self._is_worth_it(work):
            few = "requests have too little in common"
            reasons, work = [few if why is None else why for why in reasons], None
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        if work:
            scores = self._score([requests[i] for i in shared], work, disable_tqdm)
            for index, answer in zip(shared, scores, strict=True):
                answers[index] = answer
            path.add("shared", len(shared), len(work.tree))
        before = self.token_counts.processed
        plain = {i: requests[i] for i, why in enumerate(reasons) if why is not None}
        if plain:
            scores = self._score_plainly([*plain.values()], disable_tqdm, override_bs)
            for index, answer in zip(plain, scores, strict=True):
                answers[index] = answer
            computed = self.token_counts.processed - before
            path.add("plain", len(plain), computed, filter(None, reasons))
        return answers

    def _reasons(self, requests: list[Request]) -> list[str | None]:
        """Return why each request cannot be shared, None for those that can."""
        if (reason := self._why_not(self._sharing)) is not None:
            return [reason] * len(requests)
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

    def _is_worth_it(self, work: Work) -> bool:
        """Estimate the share of `HFLM`'s work that sharing saves, and ask if it is enough."""
        config = config_of(self).get_text_config()
        # Of the usual proportions, whatever the width: sizes of a sweep take one path.
        body = 12 * config.num_hidden_layers * config.hidden_size**2
        head = config.vocab_size * config.hidden_size
        # `HFLM` computes inputs that are the same once.
        theirs = int((work.tree.depth[np.unique(work.tree.last)] + 1).sum())
        ours = len(work.tree) * body + int(work.scored_before[-1]) * head
        return 1 - ours / (theirs * (body + head)) >= _least_saving(self.device)

    def _input_length(self, request: Request) -> int:
        _, context, continuation = request
        return min(len(context) + len(continuation) - 1, self.max_length)

    def _score_plainly(
        self, requests: list[Request], disable_tqdm: bool, override_bs: int | None
    ) -> list[tuple[float, bool]]:
        """Let `HFLM` answer, without its cache of logits where that answers wrongly.

        lm-eval 0.4.13 gives two requests that split one text differently the first logits
        of the text for the shorter continuation, where the last ones belong.
        """
        if self._sharing.is_on and self.world_size > 1 and self.batch_size == "auto":
            # HFLM would find a size in a meeting of all processes, of which some share all.
            longest = max(self._input_length(request) for request in requests)
            override_bs = override_bs or max(
                1, self._budget(requests).scored // longest
            )
        lengths: dict[tuple[int, ...], int] = {}
        splits_alike = all(
            lengths.setdefault((*context, *continuation[:-1]), len(continuation))
            == len(continuation)
            for _, context, continuation in requests
        )
        cached = self.logits_cache  # type: ignore[has-type]
        self.logits_cache = cached and splits_alike
        try:
            return super()._loglikelihood_tokens(  # type: ignore[misc]
                requests, disable_tqdm=disable_tqdm, override_bs=override_bs
            )
        finally:
            self.logits_cache = cached

    def _score(
        self, requests: list[Request], work: Work, disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        """Return the answers to `requests`, and hand each on when its last node is done."""
        dtype = self.softmax_dtype or self.mixed_precision_dtype or self.model.dtype
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        last_nodes, whole = work.tree.last, self._budget(requests)
        waiting = deque(np.argsort(last_nodes, kind="stable").tolist())
        forward, cache, start = Forward(self), PathCache(), 0
        bar = tqdm(
            total=len(requests),
            disable=disable_tqdm or self.rank != 0,
            desc="Running loglikelihood requests",
        )

        def run(tokens: int) -> None:
            nonlocal start
            budget = whole.within(tokens)
            while start < len(work.tree):
                pack = next_pack(work.tree, work.scored_before, start, budget)
                run_pack(forward, work, pack, cache, self.softmax_dtype)
                self.token_counts.processed += pack.stop - start
                start = pack.stop
                while waiting and last_nodes[waiting[0]] < start:
                    index = waiting.popleft()
                    pairs = work.pairs[index]
                    total = torch.tensor(work.values[pairs].sum()).to(dtype)
                    answer = float(total), bool(work.greedy[pairs].all())
                    results[index] = answer
                    if (key := requests[index][0]) is not None:
                        self.cache_hook.add_partial("loglikelihood", key, answer)
                    bar.update()

        with bar:
            self._run(self._sharing, run, whole.tokens)
        return results

    def _budget(self, requests: list[Request]) -> Budget:
        """Return how much one forward pass may hold.

        Never more tokens than `HFLM` would put into a batch of ``batch_size``, down
        to a floor that no machine notices; ``auto`` begins at the device's ceiling.
        """
        # Rows of several subtrees read each other's keys in vain.
        most = Budget(8192, 256, 2048)
        if self.device.type == "cpu":
            # Products of fewer tokens are slower for each; of more a core's cache holds none.
            tokens = 256 * max(torch.get_num_threads(), 4)
            # With sdpa a row is read in blocks, and one row has no padding.
            in_blocks = config_of(self)._attn_implementation == "sdpa"
            most = Budget(tokens, tokens if in_blocks else 256, 1024)
        tokens = most.tokens
        if isinstance(self.batch_size, int):
            longest = max(self._input_length(request) for request in requests)
            tokens = min(max(self.batch_size * longest, _FEWEST_TOKENS), tokens)
        # What a shortage of memory left, and what Llama 4 bears in a row.
        for limit in (self._sharing.most, row_limit(config_of(self))):
            tokens = min(tokens, limit or tokens)
        return most.within(tokens)


def _least_saving(device: torch.device) -> float:
    """Return the share of the work that sharing has to save to be worth it."""
    # On a GPU, attention under a mask takes up to twice as long as causal attention, which is
    # about a fifth of the work in rows of a few thousand tokens.
    return 0.05 if device.type == "cpu" else 0.2
