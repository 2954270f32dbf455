"""A prefix tree over token sequences, and how to cut it into forward passes.

A causal model's state at a token depends on the tokens before it only, so
sequences that begin alike share the work of their common beginning. The tree's
nodes are the distinct (prefix, token) pairs, numbered in depth-first order. Two
properties of that order carry everything else:

- the subtree of node `i` is the range ``[i, end[i])``, so node `j` may attend to
  node `i` exactly when ``i <= j < end[i]``;
- when the order is processed in consecutive ranges, the ancestors that a range
  needs from earlier ranges all lie on the path to its first node: one path of
  cached keys and values is all the memory that a tree of any depth takes.

Pure Python and NumPy: knows nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import isqrt
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True)
class TokenTree:
    """Distinct prefixes of a set of token sequences, in depth-first order.

    Attributes:
        tokens: Token of each node, shape [nodes].
        depth: Tokens before each node on its path, which is its position, [nodes].
        parent: Node before each node on its path, -1 for none, [nodes].
        end: One past the last node of each node's subtree, [nodes].
        last: Last node of each sequence that the tree was built from, [sequences].
    """

    tokens: np.ndarray
    depth: np.ndarray
    parent: np.ndarray
    end: np.ndarray
    last: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def path(self, node: int, count: int | None = None) -> np.ndarray:
        """Return the nodes from the root to `node`, the last `count` of them if given.

        The path to -1, the parent of a first token, is empty.
        """
        if count is None:
            count = int(self.depth[node]) + 1 if node >= 0 else 0
        parts = [np.arange(0)]
        # One step for each stretch of consecutive numbers, not for each token.
        while count > 0:
            first = max(int(self._stretch[node]), node - count + 1)
            parts.append(np.arange(first, node + 1))
            count -= node + 1 - first
            node = int(self.parent[first])
        return np.concatenate(parts[::-1])

    def is_chain(self, start: int, stop: int) -> bool:
        """Return whether the nodes ``[start, stop)`` are one unbranched path."""
        return int(self._stretch[stop - 1]) <= start

    @cached_property
    def _stretch(self) -> np.ndarray:
        """First node of the run of consecutive numbers on a path that a node is in, [nodes]."""
        index = np.arange(len(self))
        return np.maximum.accumulate(np.where(self.parent == index - 1, 0, index))


def build_tree(sequences: Iterable[Sequence[int]]) -> TokenTree:
    """Build the tree of `sequences`, which may repeat and be prefixes of each other.

    Siblings come in the order: branching subtrees before unbranched ones, large
    before small. So neighbours are of like size, and the time estimate of a
    progress bar errs on the long side.

    Args:
        sequences: Token ids below 2**32; each of at least one token. Consumed one by
            one, and only distinct ones are kept.

    Raises:
        ValueError: A sequence is empty.
    """
    distinct: dict[bytes, bytes] = {}
    members = []
    for sequence in sequences:
        # Big-endian bytes sort like the token ids themselves.
        key = np.asarray(sequence, dtype=">u4").tobytes()
        if not key:
            raise ValueError(
                "sequences has an empty member: every sequence needs a token."
            )
        members.append(distinct.setdefault(key, key))
    keys = sorted(distinct)
    ranks = _ranks(_numbered(keys))
    # Stable: of two equal ranks, a sequence and what continues it, the shorter stays first.
    keys = [keys[i] for i in sorted(range(len(keys)), key=ranks.__getitem__)]
    tree = _numbered(keys)
    index = {key: i for i, key in enumerate(keys)}
    return replace(tree, last=tree.last[[index[key] for key in members]])


def _numbered(keys: list[bytes]) -> TokenTree:
    """Number the nodes of sequences that lie beside those they share a beginning with."""
    # The last sequence's nodes by depth + 1; in front of them what a first token has.
    path = np.full(max(map(len, keys)) // 4 + 1, -1)
    end = np.empty(sum(map(len, keys)) // 4, dtype=np.int64)
    before = np.empty(0, dtype=">u4")
    count = 0
    tokens, depth, parent, last = [], [], [], []
    for key in keys:
        sequence = np.frombuffer(key, dtype=">u4")
        length = min(len(before), len(sequence))
        shared = int(np.append(before[:length] == sequence[:length], False).argmin())
        end[path[shared + 1 : len(before) + 1]] = count
        new = len(sequence) - shared
        path[shared + 1 : len(sequence) + 1] = np.arange(count, count + new)
        tokens.append(sequence[shared:])
        depth.append(np.arange(shared, len(sequence)))
        parent.append(path[shared : len(sequence)].copy())
        last.append(path[len(sequence)])
        count += new
        before = sequence
    end[path[1 : len(before) + 1]] = count
    return TokenTree(
        np.concatenate(tokens).astype(np.int64),
        np.concatenate(depth),
        np.concatenate(parent),
        end[:count],
        np.array(last),
    )


def _ranks(tree: TokenTree) -> list[list[tuple[bool, int, int]]]:
    """Return for each sequence where its branches belong among their siblings, root first."""
    siblings = np.bincount(tree.parent + 1)[tree.parent + 1]
    first = np.maximum.accumulate(np.where(siblings > 1, np.arange(len(tree)), 0))
    ranks = []
    for node in map(int, tree.last):
        rank = []
        while node >= 0:
            top = int(first[node])
            end = int(tree.end[top])
            rank.append((tree.is_chain(top, end), top - end, top))
            node = int(tree.parent[top])
        ranks.append(rank[::-1])
    return ranks


@dataclass(frozen=True)
class Pack:
    """One forward pass: the nodes ``[start, stop)`` behind a cached path.

    Attributes:
        start: First node.
        stop: One past the last node. If it is below a node of the pack, the pack has one row.
        rows: Nodes of each row of the batch, each in depth-first order. What a node
            needs besides its own row is the path to the parent of `start`.
        chains: Whether every row is one unbranched path from the root, so that
            the ordinary causal mask is right.
    """

    start: int
    stop: int
    rows: tuple[np.ndarray, ...]
    chains: bool


@dataclass(frozen=True)
class Budget:
    """Bounds of one forward pass.

    Attributes:
        tokens: Most tokens in it, padding included. At least 1.
        row_tokens: Tokens to collect in a row before another row is begun. The cost
            of attention grows with the length of a row, at equal tokens.
        scored: Most nodes whose logits are computed. At least 1.
        mask: Most entries of a mask, one per token and each that is in its row or before
            it; chains from the root need none. A single token may exceed it.
    """

    tokens: int
    row_tokens: int
    scored: int
    mask: int = 2**24

    def within(self, tokens: int) -> Budget:
        """Return what is left of this budget in a pass of so many tokens at most."""
        return Budget(
            min(self.tokens, tokens),
            min(self.row_tokens, tokens),
            min(self.scored, tokens),
            self.mask,
        )


def next_pack(
    tree: TokenTree, scored_before: np.ndarray, start: int, budget: Budget
) -> Pack:
    """Return the forward pass that begins at node `start`.

    Calling it again with the returned ``stop`` until that is ``len(tree)`` visits
    every node once.

    Args:
        tree: The tree.
        scored_before: Nodes below each number whose logits are wanted, [nodes + 1].
        start: First node; all nodes below it are done.
        budget: Bounds of the pass.
    """
    path, end = int(tree.depth[start]), int(tree.end[start])
    most_scored = scored_before[start] + budget.scored
    # Where the pass has to end for the sake of its logits.
    last = int(np.searchsorted(scored_before, most_scored, side="right")) - 1
    chains = path == 0 and tree.is_chain(start, min(end, start + budget.tokens))
    longest = budget.tokens
    if not chains:
        masked = (isqrt(path * path + 4 * budget.mask) - path) // 2
        longest = max(1, min(longest, masked))
    if end > min(start + longest, last):
        stop = best_cut(
            tree, start, max(start + 1, min(start + longest, end - 1, last))
        )
        chains = path == 0 and tree.is_chain(start, stop)
        return Pack(start, stop, (np.arange(start, stop),), chains)

    # Chains have a row each; of other subtrees, a row holds as many of the first one's size
    # as `row_tokens` allows.
    size = end - start
    in_row = 1 if chains else max(1, budget.row_tokens // size)
    most_rows = max(1, budget.tokens // (size * in_row))
    length = min(budget.tokens // most_rows, longest)
    if not chains:
        most_rows = min(most_rows, max(1, budget.mask // (length * (path + length))))
    rows: list[list[np.ndarray]] = []
    room: list[int] = []
    stop = start
    while stop < len(tree):
        end = int(tree.end[stop])
        size = end - stop
        # Past the end of the cached path's own subtree that path is dead weight:
        # go on only to keep a small remainder from becoming a separate pass.
        left = tree.depth[stop] < path and stop - start >= budget.tokens // 4
        if left or size > length or end > last:
            break
        if chains and not tree.is_chain(stop, end):
            break
        fitting = (i for i, free in enumerate(room) if free >= size and not chains)
        row = next(fitting, len(rows))
        if row == most_rows:
            break
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(np.arange(stop, end))
        room[row] -= size
        stop = end
    return Pack(start, stop, tuple(map(np.concatenate, rows)), chains)


def best_cut(tree: TokenTree, start: int, limit: int) -> int:
    """Return where ``[start, limit]`` is best cut: where the path is short, in its second half.

    The path to the cut stays cached for what follows.
    """
    earliest = start + (limit - start) // 2 + 1
    cuts = np.arange(earliest, limit + 1)
    cuts = cuts[tree.parent[cuts] != cuts - 1]
    if not len(cuts):
        return limit
    shortest = tree.depth[cuts]
    return int(cuts[np.flatnonzero(shortest == shortest.min())[-1]])
