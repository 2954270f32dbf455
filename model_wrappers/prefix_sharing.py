"""Log-likelihood with shared prefixes, for any model type built on `HFLM`.

Multiple-choice tasks send each choice with its whole context, and few-shot tasks
send the same examples with each question. `PrefixSharingMixin` puts all requests
of a call into one prefix tree (`lm_eval_pruned.token_tree`), computes each node of
the tree once, and computes logits at the scored nodes only. Independent of pruning.

One forward pass takes a run of the tree's nodes behind a cached path, with the
position of each token in its own request and a 4-D mask in which a token sees its
own ancestors and nothing else.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tqdm import tqdm
from transformers.cache_utils import Cache, DynamicLayer

from lm_eval_pruned.model_wrappers.attention_support import (
    cache_argument,
    config_of,
    rounding,
    sequence_limit,
    unsupported_reason,
)
from lm_eval_pruned.model_wrappers.cpu_linear import fast_cpu_linears
from lm_eval_pruned.model_wrappers.hf_arguments import check_flag
from lm_eval_pruned.model_wrappers.token_counts import TokenCounts
from lm_eval_pruned.token_tree import Budget, TokenTree, build_tree, next_pack


if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_eval_pruned.token_tree import Pack

    #: What identifies the request, its context and its continuation.
    Request = tuple[tuple[str, str] | None, list[int], list[int]]

    # The mixin's neighbour among the bases, whose attributes it uses.
    from lm_eval.models.huggingface import HFLM as _Neighbour
else:
    _Neighbour = object

eval_logger = logging.getLogger("lm_eval.models.prefix_sharing")

# Sharing has to save this much of the work to be worth leaving the plain path.
_LEAST_SAVING = 0.05
# The first use compares a few tokens with the plain path; it has to save more than that.
_WORTH_CHECKING = 200
# A pass of fewer tokens leaves the machine idle whatever the batch size.
_FEWEST_TOKENS = 512


class PrefixSharingMixin(_Neighbour):
    """Computes common prefixes of log-likelihood requests once.

    Put it before `HFLM` among the bases. Log-probabilities and greedy flags are
    `HFLM`'s up to rounding. Where a model's attention does not allow it, requests
    take `HFLM`'s own path, and one logged line says why.

    Attributes:
        token_counts: Its `processed` grows by the nodes that were run through the model;
            what takes `HFLM`'s own path is for the class to count that measures it.
    """

    token_counts: TokenCounts

    def __init__(self, *args: Any, prefix_sharing: bool = True, **kwargs: Any) -> None:
        """Set up as the next class does.

        Args:
            *args: Passed on.
            prefix_sharing: Compute common prefixes of log-likelihood requests once.
            **kwargs: Passed on.

        Raises:
            ValueError: `prefix_sharing` is neither true nor false.
        """
        check_flag("prefix_sharing", prefix_sharing)
        self.prefix_sharing = bool(prefix_sharing)
        if not hasattr(self, "token_counts"):
            self.token_counts = TokenCounts()
        self._sharing_budget: Budget | None = None
        self._sharing_checked = False
        super().__init__(*args, **kwargs)

    def _loglikelihood_tokens(
        self,
        requests: list[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        plain = super()._loglikelihood_tokens  # type: ignore[misc]
        lengths = [self._input_length(request) for request in requests]
        # Processes that find batch sizes together have to agree on whether they share.
        sharing = bool(requests) and (
            self._can_share() if self._detects_together else self._may_share()
        )
        limit = sequence_limit(config_of(self)) if sharing else None
        shareable = [
            sharing
            and (limit is None or length <= limit)
            # HFLM refuses what has nothing to score, or no token to score it after.
            and len(context) > 0
            and 0 < len(continuation) <= self.max_length
            for length, (_, context, continuation) in zip(
                lengths, requests, strict=True
            )
        ]
        shared = [r for r, ok in zip(requests, shareable, strict=True) if ok]
        rest = [r for r, ok in zip(requests, shareable, strict=True) if not ok]
        work = None
        if shared:
            work = _Work.of(shared, self.max_length)
            if not self._detects_together and not (
                self._is_worth_sharing(shared, work) and self._can_share()
            ):
                shared, rest, work = [], requests, None
        shared_results: Iterator[tuple[float, bool]] = iter(())
        if work is not None:
            shared_results = iter(
                self._score_requests(shared, work, disable_tqdm=disable_tqdm)
            )
        rest_results: Iterator[tuple[float, bool]] = iter(())
        if rest:
            if sharing and self._detects_together:
                longest = max(self._input_length(request) for request in rest)
                override_bs = override_bs or max(
                    1, self._budget(rest).scored // longest
                )
            rest_results = iter(
                plain(rest, disable_tqdm=disable_tqdm, override_bs=override_bs)
            )
        if work is None:
            return list(rest_results)
        return [next(shared_results if ok else rest_results) for ok in shareable]

    @property
    def _detects_together(self) -> bool:
        """Whether `HFLM` finds a batch size in a meeting of all processes.

        Processes hold different requests, so which path these take must not decide
        who comes to the meeting.
        """
        return self.world_size > 1 and self.batch_size == "auto"

    def _input_length(self, request: Request) -> int:
        return min(len(request[1]) + len(request[2]) - 1, self.max_length)

    def _is_worth_sharing(self, requests: list[Request], work: _Work) -> bool:
        """Estimate the share of `HFLM`'s work that sharing saves, and ask if it is enough."""
        config = config_of(self).get_text_config()
        head = config.vocab_size * getattr(config, "hidden_size", 1)
        if not hasattr(self, "_body_size"):
            everything = sum(p.numel() for p in self.model.parameters())
            tables = 1 if getattr(config, "tie_word_embeddings", False) else 2
            self._body_size = max(everything - tables * head, 1)
        asked = sum(self._input_length(request) for request in _distinct(requests))
        ours = len(work.tree) * self._body_size + int(work.scored_before[-1]) * head
        saving = 1 - ours / (asked * (self._body_size + head))
        # HFLM's search for a batch size costs more than the check.
        ready = self._sharing_checked or not isinstance(self.batch_size, int)
        return saving >= _LEAST_SAVING and (ready or saving * asked >= _WORTH_CHECKING)

    def _may_share(self) -> bool:
        """Ask whether anything that can be read off the model speaks against sharing."""
        if self.prefix_sharing and not self._sharing_checked:
            self._give_up_if(unsupported_reason(self))
        return self.prefix_sharing

    def _can_share(self) -> bool:
        """Try it out, the first time."""
        if self._may_share() and not self._sharing_checked:
            self._sharing_checked = True
            self._give_up_if(self._disagreement())
        return self.prefix_sharing

    def _give_up_if(self, reason: str | None) -> None:
        if reason is None:
            return
        self.prefix_sharing = False
        if self.rank == 0:
            eval_logger.warning(
                "Prefixes are not shared, each request is computed whole: %s.", reason
            )

    def _disagreement(self) -> str | None:
        """Compare a few random tokens with the plain path; return what differs."""
        generator = np.random.default_rng(0)
        vocabulary = config_of(self).get_text_config().vocab_size
        stem, *tails = (
            generator.integers(0, vocabulary, count).tolist() for count in (9, 5, 11, 7)
        )
        sequences = [stem + tails[0], stem + tails[1], stem + tails[1][:4] + tails[2]]
        requests: list[Request] = [(None, s[:1], s[1:]) for s in sequences]
        width = max(map(len, sequences))
        padded = [s[:-1] + [0] * (width - len(s)) for s in sequences]
        rows = np.concatenate(
            [np.arange(len(s) - 1) + i * (width - 1) for i, s in enumerate(sequences)]
        )
        targets = torch.tensor([t for s in sequences for t in s[1:]])
        logits = self._model_call(torch.tensor(padded, device=self.device))
        logits = logits.flatten(0, 1)[torch.from_numpy(rows).to(logits.device)]
        expected = (
            logits.double().log_softmax(-1).cpu()[torch.arange(len(rows)), targets]
        )

        work = _Work.of(requests, self.max_length)
        try:
            for _ in self._passes(work, Budget(14, 4, 14)):
                pass
        except Exception as error:  # noqa: BLE001 - whatever a model's code raises
            return f"the model's code rejects them ({type(error).__name__}: {error})"
        got = torch.from_numpy(work.values[np.concatenate(work.pairs)])
        difference = (got - expected).square().mean().sqrt().item()
        spread = expected.std().item()
        if not difference <= rounding(logits.dtype) * spread:
            return (
                "the model's log-probabilities change with them (by "
                f"{difference:.1e}, of a spread of {spread:.1e}, on random tokens)"
            )
        return None

    def _score_requests(
        self, requests: list[Request], work: _Work, disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        dtype = self.softmax_dtype or _logits_dtype(self)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        # A request is done when its last node is: hand results on as they come.
        last_nodes = work.tree.last
        order = np.argsort(last_nodes, kind="stable")
        done = 0
        bar = tqdm(
            total=len(requests),
            disable=disable_tqdm or self.rank != 0,
            desc="Running loglikelihood requests",
        )
        begin = 0
        for stop in self._passes(work, self._budget(requests)):
            self.token_counts.processed += stop - begin
            begin = stop
            while done < len(order) and last_nodes[order[done]] < stop:
                index = int(order[done])
                pairs = work.pairs[index]
                total = torch.tensor(work.values[pairs].sum()).to(dtype)
                answer = (float(total), bool(work.greedy[pairs].all()))
                results[index] = answer
                if requests[index][0] is not None:
                    self.cache_hook.add_partial(
                        "loglikelihood", requests[index][0], answer
                    )
                done += 1
                bar.update(1)
        bar.close()
        return results

    def _budget(self, requests: list[Request]) -> Budget:
        """Return how much one forward pass may hold.

        Never more tokens than `HFLM` would put into a batch of ``batch_size``, down
        to a floor that no machine notices; ``auto`` begins at the device's ceiling.
        """
        on_cpu = self.device.type == "cpu"
        # A core works fastest on as much as stays in its cache, a GPU on plenty.
        ceiling = (
            Budget(256 * torch.get_num_threads(), 256, 1024)
            if on_cpu
            else Budget(8192, 1024, 2048)
        )
        tokens = ceiling.tokens
        if isinstance(self.batch_size, int):
            longest = max(self._input_length(request) for request in requests)
            tokens = min(max(self.batch_size * longest, _FEWEST_TOKENS), tokens)
        if self._sharing_budget is not None:
            # What a shortage of memory left of it earlier.
            tokens = min(tokens, self._sharing_budget.tokens)
        return Budget(
            tokens, min(ceiling.row_tokens, tokens), min(ceiling.scored, tokens)
        )

    def _passes(self, work: _Work, budget: Budget) -> Iterator[int]:
        """Run the tree through the model; yield how many nodes are done after each pass."""
        tree = work.tree
        cache = _PathCache()
        start = 0
        while start < len(tree):
            pack = next_pack(tree, work.scored_before, start, budget)
            try:
                self._run_pack(work, pack, cache)
            except RuntimeError as error:
                if not should_reduce_batch_size(error) or budget.tokens == 1:
                    raise
                budget = self._sharing_budget = budget.halved()
                eval_logger.warning(
                    "Out of memory: going on with at most %d tokens per forward pass.",
                    budget.tokens,
                )
            else:
                start = pack.stop
                yield start
                continue
            # Outside the handler, whose traceback holds on to the failed pass's tensors.
            cache.forget_pass()
            clear_device_cache(garbage_collection=True)

    def _run_pack(self, work: _Work, pack: Pack, cache: _PathCache) -> None:
        tree, device = work.tree, self.device
        width = max(len(row) for row in pack.rows)
        nodes = np.full((len(pack.rows), width), -1)
        for i, row in enumerate(pack.rows):
            nodes[i, : len(row)] = row
        real = nodes >= 0
        tokens = np.where(real, tree.tokens[nodes], 0)
        position = np.where(real, tree.depth[nodes], 0)

        next_depth = int(tree.depth[pack.stop]) if pack.stop < len(tree) else 0
        kept = None
        if not pack.complete:
            path = tree.path(int(tree.parent[pack.stop]))
            kept = np.where(
                path < pack.start, tree.depth[path], cache.length + path - pack.start
            )
        arguments: dict[str, Any] = {"use_cache": False}
        if cache.length or kept is not None:
            cache.begin_pass(kept)
            arguments = {"use_cache": True, cache_argument(self.model): cache}
        if not pack.chains:
            arguments["attention_mask"] = self._mask(tree, pack, nodes, cache.length)

        scored = work.scored_before
        wanted = np.flatnonzero((scored[nodes + 1] > scored[nodes]) & real)
        pass_logits = self._logits_at(
            torch.from_numpy(tokens).to(device),
            torch.from_numpy(position).to(device),
            torch.from_numpy(wanted if len(wanted) else np.zeros(1, np.int64)).to(
                device
            ),
            arguments,
        )
        if len(wanted):
            self._score(work, nodes.ravel()[wanted], pass_logits)
        cache.end_pass(next_depth)

    def _mask(
        self, tree: TokenTree, pack: Pack, nodes: np.ndarray, cached: int
    ) -> torch.Tensor:
        """Return the additive mask, [rows, 1, width, cached + width].

        Padding gets numbers above all nodes' and sees itself only: a row without
        anything to see would be NaN.
        """
        rows, width = nodes.shape
        size = len(tree)
        padding = size + np.arange(rows * width).reshape(rows, width)
        number = np.where(nodes >= 0, nodes, padding)
        end = np.where(nodes >= 0, tree.end[nodes], padding + 1)
        path = tree.path(int(tree.parent[pack.start]))[:cached]
        path = np.broadcast_to(path, (rows, cached))
        key = torch.from_numpy(np.concatenate([path, number], 1)).to(self.device)
        key_end = torch.from_numpy(
            np.concatenate([tree.end[path], end], 1).astype(np.int64)
        ).to(self.device)
        query = torch.from_numpy(number).to(self.device)[:, :, None]
        seen = (key[:, None] <= query) & (query < key_end[:, None])
        mask = torch.zeros(seen.shape, dtype=self.model.dtype, device=self.device)
        return mask.masked_fill_(~seen, float("-inf"))[:, None]

    def _logits_at(
        self,
        tokens: torch.Tensor,
        position: torch.Tensor,
        wanted: torch.Tensor,
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        """Run the model and return logits at `wanted` only, [wanted, vocabulary].

        The hidden states are thinned out in front of the output embedding, inside
        the model's own forward: what a model does to its logits afterwards stays.

        Args:
            tokens: Token ids, [rows, width].
            position: Their positions, [rows, width].
            wanted: Indices into the flattened `tokens`.
            arguments: Further arguments of the model.
        """

        def thin_out(
            _module: torch.nn.Module, inputs: tuple[Any, ...]
        ) -> tuple[Any, ...]:
            hidden, *others = inputs
            rows = hidden.flatten(0, -2).index_select(0, wanted.to(hidden.device))
            return (rows[None], *others)

        hook = self.model.get_output_embeddings().register_forward_pre_hook(thin_out)
        try:
            with (
                torch.no_grad(),
                torch.autocast(
                    device_type=self.device.type,
                    dtype=self.mixed_precision_dtype,
                    enabled=self.mixed_precision_dtype is not None,
                ),
                fast_cpu_linears(self.model),
            ):
                logits = self.model(
                    input_ids=tokens, position_ids=position, **arguments
                ).logits
        finally:
            hook.remove()
        return logits[0]

    def _score(self, work: _Work, nodes: np.ndarray, logits: torch.Tensor) -> None:
        """Look up the log-probabilities of the pairs at `nodes`, whose logits are given."""
        # The rows of a batch need not be in the order of the tree.
        order = np.argsort(nodes)
        first = np.searchsorted(work.pair_node, nodes[order[0]])
        last = np.searchsorted(work.pair_node, nodes[order[-1]], side="right")
        pair_row = order[np.searchsorted(nodes[order], work.pair_node[first:last])]
        by_row = np.argsort(pair_row, kind="stable")
        pairs, pair_row = by_row + first, pair_row[by_row]
        for begin in range(0, len(logits), _SOFTMAX_ROWS):
            chunk = logits[begin : begin + _SOFTMAX_ROWS]
            chunk = F.log_softmax(chunk, dim=-1, dtype=self.softmax_dtype)
            low, high = np.searchsorted(pair_row, [begin, begin + len(chunk)])
            here = pairs[low:high]
            row = torch.from_numpy(pair_row[low:high] - begin).to(chunk.device)
            target = torch.from_numpy(work.pair_target[here]).to(chunk.device)
            values = chunk[row, target]
            greedy = values == chunk.amax(-1)[row]
            # Of equals, argmax takes one.
            greedy[greedy.clone()] = chunk[row[greedy]].argmax(-1) == target[greedy]
            work.values[here] = values.double().cpu().numpy()
            work.greedy[here] = greedy.cpu().numpy()


# Rows of logits per softmax, so that a chunk stays in a processor's cache.
_SOFTMAX_ROWS = 64


@dataclass
class _Work:
    """Requests as a tree, and what is wanted at its nodes.

    A pair is a node and a token whose log-probability is wanted there.

    Attributes:
        tree: The distinct prefixes of the requests' inputs.
        scored_before: Nodes below each number that are in a pair, [nodes + 1].
        pair_node: Node of each pair, ascending, [pairs].
        pair_target: Token of each pair, [pairs].
        pairs: Indices of each request's pairs, in the order of its continuation.
        values: Log-probability of each pair, [pairs].
        greedy: Whether no token is more likely, [pairs].
    """

    tree: TokenTree
    scored_before: np.ndarray
    pair_node: np.ndarray
    pair_target: np.ndarray
    pairs: list[np.ndarray]
    values: np.ndarray
    greedy: np.ndarray

    @classmethod
    def of(cls, requests: list[Request], max_length: int) -> _Work:
        # The model's input is cut from the left as HFLM does, and lacks the last token.
        tree = build_tree(
            (context + continuation)[-(max_length + 1) :][:-1]
            for _, context, continuation in requests
        )
        counts = [len(continuation) for _, _, continuation in requests]
        nodes = np.concatenate(
            [tree.path(int(node), n) for node, n in zip(tree.last, counts, strict=True)]
        )
        targets = np.concatenate([np.asarray(r[2], dtype=np.int64) for r in requests])
        distinct, which = np.unique(nodes << 32 | targets, return_inverse=True)
        pair_node = distinct >> 32
        wanted = np.zeros(len(tree), dtype=np.int64)
        wanted[pair_node] = 1
        return cls(
            tree=tree,
            scored_before=np.concatenate([[0], np.cumsum(wanted)]),
            pair_node=pair_node,
            pair_target=distinct & 0xFFFFFFFF,
            pairs=np.split(which.reshape(-1), np.cumsum(counts)[:-1]),
            values=np.full(len(distinct), np.nan),
            greedy=np.zeros(len(distinct), dtype=bool),
        )


class _PathLayer(DynamicLayer):
    """Keys and values of one path, lent to every row of a batch.

    Unlike its parent it does not grow by what it is shown: of a pass it keeps the
    next path only.
    """

    values: Any  # None where keys are.

    def __init__(self, kept: torch.Tensor | None = None) -> None:
        super().__init__()
        self.kept = kept
        self.next: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = len(key_states)
        if self.keys is not None:
            key_states = torch.cat(
                [self.keys.expand(rows, -1, -1, -1), key_states], dim=-2
            )
            value_states = torch.cat(
                [self.values.expand(rows, -1, -1, -1), value_states], dim=-2
            )
        if self.kept is not None:
            kept = self.kept.to(key_states.device)
            self.next = (
                key_states.index_select(-2, kept),
                value_states.index_select(-2, kept),
            )
        return key_states, value_states

    def set(self, keys: torch.Tensor | None, values: torch.Tensor | None) -> None:
        self.keys, self.values = keys, values
        self.is_initialized = keys is not None


class _PathCache(Cache):
    """The cached path that a run of passes shares; see `_PathLayer`."""

    layers: list[_PathLayer]  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(
            layer_class_to_replicate=lambda: _PathLayer(self._kept)  # type: ignore[arg-type]
        )
        self._kept: torch.Tensor | None = None
        #: Tokens of the path.
        self.length = 0

    def begin_pass(self, kept: np.ndarray | None) -> None:
        """Say which tokens of [path, row] are the next path; None: a beginning of the path."""
        self._kept = None if kept is None else torch.from_numpy(kept)
        for layer in self.layers:
            layer.kept, layer.next = self._kept, None

    def end_pass(self, length: int) -> None:
        """Take over the next path, of `length` tokens."""
        for layer in self.layers:
            if length == 0:
                layer.set(None, None)
            elif layer.next is not None:
                layer.set(*layer.next)
            elif length < self.length and layer.keys is not None:
                layer.set(
                    layer.keys[..., :length, :].clone(),
                    layer.values[..., :length, :].clone(),
                )
        self.length = length
        self.forget_pass()

    def forget_pass(self) -> None:
        """Drop what a pass has left, the path excepted."""
        self._kept = None
        for layer in self.layers:
            layer.kept = layer.next = None


def _distinct(requests: list[Request]) -> list[Request]:
    """Return one request of each group that `HFLM` computes once."""
    groups: dict[tuple[int, ...], Request] = {}
    for request in requests:
        groups.setdefault((*request[1], *request[2][:-1]), request)
    return list(groups.values())


def _logits_dtype(lm: Any) -> torch.dtype:
    return lm.mixed_precision_dtype or lm.model.dtype
