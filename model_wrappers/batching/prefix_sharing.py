"""Log-likelihood with shared prefixes, for any model type built on `HFLM`.

Multiple-choice tasks send each choice with its whole context, and few-shot tasks
send the same examples with each question. `PrefixSharingMixin` puts all requests
of a call into one prefix tree (`lm_eval_pruned.model_wrappers.batching.token_tree`), computes each node of
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

from .answer_paths import AnswerPaths
from .attention_support import (
    cache_argument,
    config_of,
    row_limit,
    sequence_limit,
    trial_disagrees,
    unsupported_reason,
)
from .flags import check_flag
from .forward import Forward
from .masks import additive_mask
from .token_counts import TokenCounts
from .token_tree import Budget, TokenTree, build_tree, next_pack


if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel

    from .token_tree import Pack

    #: What identifies the request, its context and its continuation.
    Request = tuple[tuple[str, str] | None, list[int], list[int]]

    # The mixin's neighbour among the bases, whose attributes it uses.
    from lm_eval.models.huggingface import HFLM as _Neighbour
else:
    _Neighbour = object

eval_logger = logging.getLogger("lm_eval.models.prefix_sharing")

# The first use tries a small model of the class; it has to save more tokens than that costs.
_WORTH_CHECKING = 200
# A pass of fewer tokens leaves the machine idle whatever the batch size.
_FEWEST_TOKENS = 512


class PrefixSharingMixin(_Neighbour):
    """Computes common prefixes of log-likelihood requests once.

    Put it before `HFLM` among the bases. Log-probabilities and greedy flags are
    `HFLM`'s up to rounding. Where a model's attention does not allow it, requests
    take `HFLM`'s own path, and one logged line says why. Whether it does is decided by its
    class and config, on a small random model in float32: neither width nor dtype plays a
    part. ``config.answer_paths`` in the results says which way was taken.

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
        self._no_sharing = None if prefix_sharing else "prefix_sharing=false"
        self._request_type = "loglikelihood"
        self.answer_paths = AnswerPaths()
        super().__init__(*args, **kwargs)

    def _loglikelihood_tokens(
        self,
        requests: list[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
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
        reason = self._no_sharing or f"it is longer than {limit} tokens"
        work = None
        if shared:
            work = _Work.of(shared, self.max_length)
            if not self._detects_together and not self._is_worth_sharing(shared, work):
                reason = "requests have too little in common"
                shared, rest, work = [], requests, None
            elif not self._can_share():
                reason = self._no_sharing or ""
                shared, rest, work = [], requests, None
        paths = self.answer_paths.of(self._request_type)
        shared_results: Iterator[tuple[float, bool]] = iter(())
        if work is not None:
            paths.add("shared", len(shared), len(work.tree))
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
            rest_results = iter(self._score_plainly(rest, disable_tqdm, override_bs))
            computed = _distinct(rest) if self.logits_cache else rest
            paths.add(
                "plain", len(rest), sum(map(self._input_length, computed)), reason
            )
        if work is None:
            return list(rest_results)
        return [next(shared_results if ok else rest_results) for ok in shareable]

    def _score_plainly(
        self, requests: list[Request], disable_tqdm: bool, override_bs: int | None
    ) -> list[tuple[float, bool]]:
        """Let `HFLM` answer, without its cache of logits where that answers wrongly.

        lm-eval 0.4.13 gives two requests that split one text differently the first logits
        of the text for the shorter continuation, where the last ones belong.
        """
        lengths: dict[tuple[int, ...], set[int]] = {}
        for _, context, continuation in requests:
            text = (*context, *continuation[:-1])
            lengths.setdefault(text, set()).add(len(continuation))
        cached = self.logits_cache  # type: ignore[has-type]
        self.logits_cache = cached and all(len(n) == 1 for n in lengths.values())
        try:
            return super()._loglikelihood_tokens(  # type: ignore[misc]
                requests, disable_tqdm=disable_tqdm, override_bs=override_bs
            )
        finally:
            self.logits_cache = cached

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Score whole texts as `HFLM` does; see `_loglikelihood_tokens`."""
        self._request_type = "loglikelihood_rolling"
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)  # type: ignore[misc]
        finally:
            self._request_type = "loglikelihood"

    def get_model_info(self) -> dict[str, Any]:
        """Return `HFLM`'s model information and what answered, under ``answer_paths``."""
        info = super().get_model_info()  # type: ignore[misc]
        return {**info, "answer_paths": self.answer_paths.as_dict(self.model)}

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
        # Of the usual proportions, whatever the width: sizes of a sweep take one path.
        body = 12 * config.num_hidden_layers * config.hidden_size**2
        head = config.vocab_size * config.hidden_size
        asked = sum(self._input_length(request) for request in _distinct(requests))
        ours = len(work.tree) * body + int(work.scored_before[-1]) * head
        saving = 1 - ours / (asked * (body + head))
        # HFLM's search for a batch size costs more than the check.
        ready = self._sharing_checked or not isinstance(self.batch_size, int)
        enough = saving >= _least_saving(self.device)
        return enough and (ready or saving * asked >= _WORTH_CHECKING)

    def _may_share(self) -> bool:
        """Ask whether anything that can be read off the model speaks against sharing."""
        if self.prefix_sharing and not self._sharing_checked:
            self._give_up_if(unsupported_reason(self))
        return self.prefix_sharing

    def _can_share(self) -> bool:
        """Try it out, the first time."""
        if self._may_share() and not self._sharing_checked:
            self._sharing_checked = True
            self._give_up_if(trial_disagrees(self.model, _trial_plain, _trial_shared))
        return self.prefix_sharing

    def _give_up_if(self, reason: str | None) -> None:
        if reason is None:
            return
        self.prefix_sharing = False
        self._no_sharing = reason
        if self.rank == 0:
            eval_logger.warning(
                "Prefixes are not shared, each request is computed whole: %s.", reason
            )

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
            tokens,
            min(ceiling.row_tokens, tokens),
            min(ceiling.scored, tokens),
            row_limit=row_limit(config_of(self)) or tokens,
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
        _run_pack(Forward.of(self), work, pack, cache, self.softmax_dtype)


def _least_saving(device: torch.device) -> float:
    """Return the share of the work that sharing has to save to be worth it.

    Either path keeps a CPU busy, so that what saves work saves time. A GPU computes
    attention under a mask of ours with a kernel that takes up to twice as long as the one
    for causal rows, and attention is about a fifth of the work in rows of a few thousand
    tokens: less than that may be lost again.
    """
    return 0.05 if device.type == "cpu" else 0.2


def _run_pack(
    forward: Forward,
    work: _Work,
    pack: Pack,
    cache: _PathCache,
    softmax_dtype: torch.dtype | None = None,
) -> None:
    """Run the nodes of `pack` through the model and look up what is wanted at them."""
    tree, device = work.tree, forward.device
    width = max(len(row) for row in pack.rows)
    nodes = np.full((len(pack.rows), width), -1)
    for i, row in enumerate(pack.rows):
        nodes[i, : len(row)] = row
    real = nodes >= 0
    tokens = np.where(real, tree.tokens[nodes], 0)
    # A row that went back to 0 would look like two sequences to transformers.
    padding = np.arange(width) if pack.chains else 0
    position = np.where(real, tree.depth[nodes], padding)

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
        arguments = {"use_cache": True, cache_argument(forward.model): cache}
    if not pack.chains:
        dtype = forward.autocast_dtype or forward.model.dtype
        arguments["attention_mask"] = _mask(
            tree, pack, nodes, cache.length, dtype, device
        )

    scored = work.scored_before
    wanted = np.flatnonzero((scored[nodes + 1] > scored[nodes]) & real)
    places = torch.from_numpy(wanted if len(wanted) else np.zeros(1, np.int64))

    def keep(hidden: torch.Tensor) -> torch.Tensor:
        return hidden.flatten(0, -2).index_select(0, places.to(hidden.device))[None]

    logits = forward(
        torch.from_numpy(tokens).to(device),
        torch.from_numpy(position).to(device),
        keep,
        **arguments,
    )[0]
    if len(wanted):
        _score(work, nodes.ravel()[wanted], logits, softmax_dtype)
    cache.end_pass(next_depth)


def _mask(
    tree: TokenTree,
    pack: Pack,
    nodes: np.ndarray,
    cached: int,
    dtype: torch.dtype,
    device: torch.device,
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
    key = torch.from_numpy(np.concatenate([path, number], 1)).to(device)
    key_end = torch.from_numpy(
        np.concatenate([tree.end[path], end], 1).astype(np.int64)
    ).to(device)
    query = torch.from_numpy(number).to(device)[:, :, None]
    seen = (key[:, None] <= query) & (query < key_end[:, None])
    return additive_mask(~seen, dtype)


def _score(
    work: _Work,
    nodes: np.ndarray,
    logits: torch.Tensor,
    softmax_dtype: torch.dtype | None,
) -> None:
    """Look up the log-probabilities of the pairs at `nodes`, whose logits are given."""
    # The rows of a batch need not be in the order of the tree.
    order = np.argsort(nodes)
    first = np.searchsorted(work.pair_node, nodes[order[0]])
    last = np.searchsorted(work.pair_node, nodes[order[-1]], side="right")
    pair_row = order[np.searchsorted(nodes[order], work.pair_node[first:last])]
    by_row = np.argsort(pair_row, kind="stable")
    pairs, pair_row = by_row + first, pair_row[by_row]
    # A chunk stays in a processor's cache; a GPU has the launches to save.
    step = _SOFTMAX_ROWS if logits.device.type == "cpu" else len(logits)
    for begin in range(0, len(logits), step):
        chunk = logits[begin : begin + step]
        chunk = F.log_softmax(chunk, dim=-1, dtype=softmax_dtype)
        low, high = np.searchsorted(pair_row, [begin, begin + len(chunk)])
        here = pairs[low:high]
        row = torch.from_numpy(pair_row[low:high] - begin).to(chunk.device)
        target = torch.from_numpy(work.pair_target[here]).to(chunk.device)
        values = chunk[row, target]
        greedy = values == chunk.amax(-1)[row]
        # Of equals, argmax takes one.
        greedy[greedy.clone()] = chunk[row[greedy]].argmax(-1) == target[greedy]
        # Not every device has float64.
        work.values[here] = values.cpu().double().numpy()
        work.greedy[here] = greedy.cpu().numpy()


def _trial_texts(trial: PreTrainedModel) -> list[list[int]]:
    """Return texts of random tokens: three that begin alike, two that do not."""
    generator = np.random.default_rng(0)
    vocabulary = trial.config.get_text_config().vocab_size
    stem, tail, longer, end, other, last = (
        generator.integers(0, vocabulary, count).tolist()
        for count in (9, 5, 11, 7, 8, 6)
    )
    for text, begins in ((other, 1), (last, 2)):
        text[0] = (stem[0] + begins) % vocabulary
    return [stem + tail, stem + longer, stem + longer[:4] + end, other, last]


def _trial_plain(trial: PreTrainedModel) -> torch.Tensor:
    """Return the log-probabilities of the trial texts' tokens after the first, as `HFLM`."""
    texts = _trial_texts(trial)
    width = max(map(len, texts)) - 1
    rows = [text[:-1] + [0] * (width + 1 - len(text)) for text in texts]
    with torch.no_grad():
        logits = trial(torch.tensor(rows)).logits.log_softmax(-1)
    return torch.cat(
        [
            row[range(len(text) - 1), text[1:]]
            for row, text in zip(logits, texts, strict=True)
        ]
    )


def _trial_shared(trial: PreTrainedModel) -> torch.Tensor:
    """Return the same with shared prefixes, in passes of every kind."""
    requests: list[Request] = [(None, t[:1], t[1:]) for t in _trial_texts(trial)]
    work = _Work.of(requests, max_length=64)
    forward, cache, start = Forward(trial, torch.device("cpu")), _PathCache(), 0
    while start < len(work.tree):
        pack = next_pack(work.tree, work.scored_before, start, Budget(14, 4, 14))
        _run_pack(forward, work, pack, cache)
        start = pack.stop
    return torch.from_numpy(work.values[np.concatenate(work.pairs)])


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
