"""One pass of a prefix tree through a model, and the scores that come out of it.

A pass takes a run of the tree's nodes behind a cached path, with the position of each
token in its own request and a 4-D mask in which a token sees its own ancestors and
nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicCache

from .attention_in_parts import Part
from .forward import additive_mask
from .token_tree import TokenTree, best_cut, build_tree


if TYPE_CHECKING:
    from .forward import Forward
    from .token_tree import Pack

    #: What identifies the request, its context and its continuation.
    Request = tuple[tuple[str, str] | None, list[int], list[int]]
    #: Keys and values of a layer, each [1, heads, tokens, head size].
    Layer = tuple[torch.Tensor, ...]


# Rows of logits per softmax, so that a chunk stays in a processor's cache.
_SOFTMAX_ROWS = 64
# Queries of a single long row whose attention is computed together on a CPU.
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
    """

    tree: TokenTree
    scored_before: np.ndarray
    pair_node: np.ndarray
    pair_target: np.ndarray
    pairs: list[np.ndarray]
    values: np.ndarray
    greedy: np.ndarray

    @classmethod
    def from_requests(cls, requests: list[Request], max_length: int) -> Work:
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


class PathCache(DynamicCache):
    """Lends the keys and values of one path to every row of a batch.

    Unlike its parent it does not grow by what it is shown: of a pass it keeps the
    next path only.

    Attributes:
        length: Tokens of the path.
    """

    def __init__(self) -> None:
        """Begin with an empty path."""
        super().__init__()
        self.length = 0
        self._path: dict[int, Layer] = {}
        self._kept = torch.empty(0, dtype=torch.int64)
        self._next: dict[int, Layer] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of path and row, as a layer's attention sees them."""
        states: Layer = key_states, value_states
        if self.length:
            states = tuple(
                torch.cat([path.expand(len(row), -1, -1, -1), row], dim=-2)
                for path, row in zip(self._path[layer_idx], states, strict=True)
            )
        # Moved once for all layers of a device.
        kept = self._kept = self._kept.to(key_states.device)
        self._next[layer_idx] = tuple(s[:1].index_select(-2, kept) for s in states)
        keys, values = states
        return keys, values

    def begin_pass(self, kept: np.ndarray) -> None:
        """Say which tokens of [path, first row] are the next path; forget a pass that failed."""
        self._kept, self._next = torch.from_numpy(kept), {}

    def end_pass(self) -> None:
        """Take over the next path."""
        self.length, self._path, self._next = len(self._kept), self._next, {}


def run_pack(
    forward: Forward,
    work: Work,
    pack: Pack,
    cache: PathCache,
    softmax_dtype: torch.dtype | None = None,
) -> None:
    """Run the nodes of `pack` through the model and look up what is wanted at them."""
    tree, device = work.tree, forward.device
    count, width = len(pack.rows), max(len(row) for row in pack.rows)
    nodes = np.full((count, width), -1)
    for i, row in enumerate(pack.rows):
        nodes[i, : len(row)] = row
    real = nodes >= 0
    tokens = np.where(real, tree.tokens[nodes], 0)
    # A row that went back to 0 would look like two sequences to transformers.
    padding = np.arange(width) if pack.chains else 0
    position = np.where(real, tree.depth[nodes], padding)

    path = tree.path(int(tree.parent[pack.stop]) if pack.stop < len(tree) else -1)
    cache.begin_pass(_places(tree, pack, path, cache.length))
    mask: torch.Tensor | None = None
    parts: list[Part] = []
    if not pack.chains:
        mask = _mask(tree, pack, nodes, forward.dtype, device)
        if count == 1 and width > _BLOCK_QUERIES and device.type == "cpu":
            parts = _parts(tree, pack, cache.length)

    scored = work.scored_before
    wanted = np.flatnonzero((scored[nodes + 1] > scored[nodes]) & real)
    # In the order of the tree, which the rows of a batch need not have.
    wanted = wanted[np.argsort(nodes.ravel()[wanted])]
    rows = torch.from_numpy(wanted if len(wanted) else np.zeros(1, np.int64))

    def keep(hidden: torch.Tensor) -> torch.Tensor:
        return hidden.flatten(0, -2).index_select(0, rows.to(hidden.device))[None]

    logits = forward(
        torch.from_numpy(tokens).to(device),
        torch.from_numpy(position).to(device),
        keep,
        mask,
        parts,
        cache if cache.length or len(path) else None,
    )[0]
    if len(wanted):
        _score(work, nodes.ravel()[wanted], logits, softmax_dtype)
    cache.end_pass()


def _mask(
    tree: TokenTree,
    pack: Pack,
    nodes: np.ndarray,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Return the additive mask, [rows, 1, width, path + width].

    Padding gets numbers above all nodes' and sees itself only: a row without anything to see
    would be NaN.
    """
    padding = len(tree) + np.arange(nodes.size).reshape(nodes.shape)
    number = np.where(nodes >= 0, nodes, padding)
    end = np.where(nodes >= 0, tree.end[nodes], padding + 1)
    path = np.tile(tree.path(int(tree.parent[pack.start])), (len(nodes), 1))
    key, key_end = (
        torch.from_numpy(np.concatenate(path_and_row, 1)).to(device)
        for path_and_row in ([path, number], [tree.end[path], end])
    )
    query = torch.from_numpy(number).to(device)[:, :, None]
    return additive_mask((key[:, None] > query) | (query >= key_end[:, None]), dtype)


def _places(tree: TokenTree, pack: Pack, path: np.ndarray, cached: int) -> np.ndarray:
    """Return where the keys of `path` lie among the `cached` ones and those of a single row."""
    return np.where(path < pack.start, tree.depth[path], cached + path - pack.start)


def _parts(tree: TokenTree, pack: Pack, cached: int) -> list[Part]:
    """Cut the one row of `pack`, behind a path of `cached` tokens, into blocks of queries."""
    parts, start = [], pack.start
    while start < pack.stop:
        stop = pack.stop
        if stop - start > _BLOCK_QUERIES:
            stop = best_cut(tree, start, start + _BLOCK_QUERIES)
        path = tree.path(int(tree.parent[start]))
        before = _places(tree, pack, path, cached)
        queries = slice(start - pack.start, stop - pack.start)
        block = np.arange(cached + queries.start, cached + queries.stop)
        keys = torch.from_numpy(np.concatenate([before, block]))
        parts.append(Part(slice(0, 1), queries, keys))
        start = stop
    return parts


def _score(
    work: Work,
    nodes: np.ndarray,
    logits: torch.Tensor,
    softmax_dtype: torch.dtype | None,
) -> None:
    """Look up the log-probabilities of the pairs at `nodes`, ascending, whose logits are given."""
    # A GPU has the launches to save.
    step = _SOFTMAX_ROWS if logits.device.type == "cpu" else len(logits)
    for begin in range(0, len(nodes), step):
        rows = nodes[begin : begin + step]
        chunk = logits[begin : begin + step]
        chunk = F.log_softmax(chunk, dim=-1, dtype=softmax_dtype)
        low, high = np.searchsorted(work.pair_node, [rows[0], rows[-1] + 1])
        here = slice(low, high)
        row = torch.from_numpy(np.searchsorted(rows, work.pair_node[here]))
        row = row.to(chunk.device)
        target = torch.from_numpy(work.pair_target[here]).to(chunk.device)
        # Not every device has float64.
        work.values[here] = chunk[row, target].cpu().double().numpy()
        work.greedy[here] = (_likeliest(chunk)[row] == target).cpu().numpy()


def _likeliest(logits: torch.Tensor) -> torch.Tensor:
    """Return the first of the largest logits in each row, [rows]."""
    if logits.device.type != "cpu":
        return logits.argmax(-1)
    # NumPy takes a tenth of the time of torch, which needs as long as for the softmax. It
    # has no bfloat16.
    wide = logits.float() if logits.itemsize < 4 else logits
    return torch.from_numpy(wide.numpy().argmax(-1))
