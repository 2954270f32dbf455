"""One pass of a prefix tree through a model: its mask, its scores; and the trial of it.

A pass takes a run of the tree's nodes behind a cached path, with the position of each
token in its own request and a 4-D mask in which a token sees its own ancestors and
nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from .attention_support import cache_argument
from .forward import Forward, LogitsMemory
from .masks import SentOnce, additive_mask
from .path_cache import PathCache
from .token_tree import Budget, TokenTree, blocks, build_tree, next_pack


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .token_tree import Pack

    #: What identifies the request, its context and its continuation.
    Request = tuple[tuple[str, str] | None, list[int], list[int]]


# Rows of logits per softmax, so that a chunk stays in a processor's cache.
_SOFTMAX_ROWS = 64
# Queries of a row whose attention is computed at a time on a CPU.
_BLOCK_QUERIES = 128


@dataclass
class Work:
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
        logits: What passes write their logits to.
    """

    tree: TokenTree
    scored_before: np.ndarray
    pair_node: np.ndarray
    pair_target: np.ndarray
    pairs: list[np.ndarray]
    values: np.ndarray
    greedy: np.ndarray
    logits: LogitsMemory = field(default_factory=LogitsMemory)

    @classmethod
    def of(cls, requests: list[Request], max_length: int) -> Work:
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


def run_pack(
    forward: Forward,
    work: Work,
    pack: Pack,
    cache: PathCache,
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
        work.logits,
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
    mask = additive_mask(~seen, dtype)
    if rows == 1 and device.type == "cpu" and width > _BLOCK_QUERIES:
        return _BlockMask.cut(mask, tree, pack, cached)
    return mask


class _BlockMask(SentOnce):
    """A mask of one row with which sdpa attention reads, block by block, what a block may see.

    Most of a long row is hidden from each of its tokens, and a CPU computes what is hidden
    as well. Whatever else is done with the mask, it is that of the whole row.
    """

    #: First query of each block, one past its last, its keys, and its part of the mask.
    blocks: list[tuple[int, int, torch.Tensor, torch.Tensor]]

    @classmethod
    def cut(
        cls, mask: SentOnce, tree: TokenTree, pack: Pack, cached: int
    ) -> _BlockMask:
        """Return `mask`, that of `pack`, in blocks."""
        cut: Any = cls.of(mask._whole, mask.shape[-1])
        cut.blocks = []
        for start, stop, before in blocks(tree, pack.start, pack.stop, _BLOCK_QUERIES):
            begin, end = start - pack.start, stop - pack.start
            path = np.where(
                before < pack.start, tree.depth[before], cached + before - pack.start
            )
            seen = np.concatenate([path, np.arange(cached + begin, cached + end)])
            keys = torch.from_numpy(seen)
            part = mask[..., begin:end, :].index_select(-1, keys)
            cut.blocks.append((begin, end, keys, part))
        return cut

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            with torch._C.DisableTorchFunctionSubclass():
                return _in_blocks(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


def _in_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """Return what `scaled_dot_product_attention` does, by the blocks of the mask."""
    attend = F.scaled_dot_product_attention
    fits = attn_mask.shape[-2:] == (query.shape[-2], key.shape[-2])
    if not (isinstance(attn_mask, _BlockMask) and fits):
        return attend(query, key, value, attn_mask, *args, **kwargs)
    parts = [
        attend(
            query[..., begin:end, :],
            key.index_select(-2, keys),
            value.index_select(-2, keys),
            part,
            *args,
            **kwargs,
        )
        for begin, end, keys, part in attn_mask.blocks
    ]
    # Heads lie side by side in what the kernel returns, where a model wants them.
    return torch.cat([part.transpose(-2, -3) for part in parts], -3).transpose(-2, -3)


def _score(
    work: Work,
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
        greedy = _is_greedy(chunk, row, target, values)
        # Not every device has float64.
        work.values[here] = values.cpu().double().numpy()
        work.greedy[here] = greedy.cpu().numpy()


def _is_greedy(
    chunk: torch.Tensor, row: torch.Tensor, target: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """Return whether argmax takes `target` in rows of `chunk`, where it has `values`.

    Of equals, argmax takes one. It is slow, and equals are rare: they are looked for by the
    largest of what is left. `chunk` is not to be used afterwards.
    """
    top = chunk.amax(-1)
    greedy = values == top[row]
    row, target = row[greedy], target[greedy]
    chunk[row, target] = float("-inf")
    tied = chunk.amax(-1)[row] == top[row]
    # Two targets of one row may be equal to one another.
    tied |= row.bincount(minlength=len(chunk))[row] > 1
    if tied.any():
        chunk[row, target] = top[row]
        tied_row = row[tied]
        taken = torch.ones_like(tied)
        taken[tied] = chunk[tied_row].argmax(-1) == target[tied]
        greedy[greedy.clone()] = taken
    return greedy


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


def trial_plain(trial: PreTrainedModel) -> torch.Tensor:
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


def trial_shared(trial: PreTrainedModel) -> torch.Tensor:
    """Return the same with shared prefixes, in passes of every kind."""
    requests: list[Request] = [(None, t[:1], t[1:]) for t in _trial_texts(trial)]
    work = Work.of(requests, max_length=64)
    forward, cache, start = Forward(trial, torch.device("cpu")), PathCache(), 0
    while start < len(work.tree):
        pack = next_pack(work.tree, work.scored_before, start, Budget(14, 4, 14))
        run_pack(forward, work, pack, cache)
        start = pack.stop
    return torch.from_numpy(work.values[np.concatenate(work.pairs)])
