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

from dataclasses import astuple, dataclass
from math import isqrt
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


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

        Nodes of an unbranched stretch have consecutive numbers, so the walk takes
        one step per branching rather than one per token.
        """
        if node < 0:
            return np.arange(0)
        if count is None:
            count = int(self.depth[node]) + 1
        parts: list[np.ndarray] = []
        while count > 0:
            first = max(int(self._stretch_start[node]), node - count + 1)
            parts.append(np.arange(first, node + 1))
            count -= node + 1 - first
            node = int(self.parent[first])
        parts.reverse()
        return np.concatenate(parts) if parts else np.arange(0)

    def is_chain(self, start: int, stop: int) -> bool:
        """Return whether the nodes ``[start, stop)`` are one unbranched path."""
        return int(self._stretch_start[stop - 1]) <= start

    @property
    def _stretch_start(self) -> np.ndarray:
        # Cached on first use; a frozen dataclass has no other place for it.
        cached = self.__dict__.get("_stretch")
        if cached is None:
            index = np.arange(len(self.tokens))
            starts = np.where(self.parent == index - 1, 0, index)
            cached = np.maximum.accumulate(starts)
            object.__setattr__(self, "_stretch", cached)
        return cached


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
    # Big-endian bytes sort like the token ids themselves.
    number: dict[bytes, int] = {}
    member = []
    for sequence in sequences:
        key = np.asarray(sequence, dtype=">u4").tobytes()
        if not key:
            raise ValueError(
                "sequences has an empty member: every sequence needs a token."
            )
        member.append(number.setdefault(key, len(number)))
    arrays = [np.frombuffer(key, dtype=">u4") for key in number]

    # A radix tree. A segment is a slice [begin, stop) of the sequence `source`.
    source: list[int] = []
    begin: list[int] = []
    stop: list[int] = []
    above: list[int] = []

    def add(sequence: int, first: int, last: int, parent: int) -> int:
        source.append(sequence)
        begin.append(first)
        stop.append(last)
        above.append(parent)
        return len(source) - 1

    stack: list[int] = []
    previous: np.ndarray | None = None
    leaf = [0] * len(arrays)
    for index in (number[key] for key in sorted(number)):
        current = arrays[index]
        shared = 0 if previous is None else _common_prefix(previous, current)
        while stack and begin[stack[-1]] >= shared:
            stack.pop()
        if stack and stop[stack[-1]] > shared:
            # Split: the upper part is a new segment, the lower keeps its number and children.
            lower = stack.pop()
            upper = add(source[lower], begin[lower], shared, above[lower])
            begin[lower] = shared
            above[lower] = upper
            stack.append(upper)
        child = add(index, shared, len(current), stack[-1] if stack else -1)
        stack.append(child)
        leaf[index] = child
        previous = current

    return _lay_out(arrays, source, begin, stop, above, [leaf[i] for i in member])


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


def _lay_out(
    arrays: list[np.ndarray],
    source: list[int],
    begin: list[int],
    stop: list[int],
    above: list[int],
    leaves: list[int],
) -> TokenTree:
    children: list[list[int]] = [[] for _ in source]
    roots: list[int] = []
    for segment, parent in enumerate(above):
        (children[parent] if parent >= 0 else roots).append(segment)
    down = list(roots)
    for segment in down:
        down.extend(children[segment])
    size = [stop[s] - begin[s] for s in range(len(source))]
    for segment in reversed(down):
        if above[segment] >= 0:
            size[above[segment]] += size[segment]

    def rank(segment: int) -> tuple[bool, int]:
        return (not children[segment], -size[segment])

    total = sum(size[s] for s in roots)
    tokens = np.empty(total, dtype=np.int64)
    depth = np.empty(total, dtype=np.int64)
    parent_node = np.empty(total, dtype=np.int64)
    end = np.empty(total, dtype=np.int64)
    last_node = [0] * len(source)
    position = 0
    pending = sorted(roots, key=rank)[::-1]
    while pending:
        segment = pending.pop()
        first, last = begin[segment], stop[segment]
        here = slice(position, position + last - first)
        tokens[here] = arrays[source[segment]][first:last]
        depth[here] = np.arange(first, last)
        parent_node[here] = np.arange(here.start - 1, here.stop - 1)
        parent_node[here.start] = (
            last_node[above[segment]] if above[segment] >= 0 else -1
        )
        end[here] = position + size[segment]
        last_node[segment] = here.stop - 1
        position = here.stop
        pending.extend(sorted(children[segment], key=rank)[::-1])
    return TokenTree(
        tokens, depth, parent_node, end, np.array([last_node[s] for s in leaves])
    )


@dataclass(frozen=True)
class Pack:
    """One forward pass: the nodes ``[start, stop)`` behind a cached path.

    Attributes:
        start: First node.
        stop: One past the last node.
        rows: Nodes of each row of the batch, each in depth-first order. What a node
            needs besides its own row is the path to the parent of `start`.
        complete: Whether every subtree that begins in the pack also ends in it.
            If not, the pack has one row, and later packs need nodes of it.
        chains: Whether every row is one unbranched path from the root, so that
            the ordinary causal mask is right.
    """

    start: int
    stop: int
    rows: tuple[np.ndarray, ...]
    complete: bool
    chains: bool


@dataclass(frozen=True)
class Budget:
    """Bounds of one forward pass.

    Attributes:
        tokens: Most tokens in it, padding included. At least 1.
        row_tokens: Tokens to collect in a row before another row is begun. The cost
            of attention grows with the length of a row, at equal tokens.
        scored: Most nodes whose logits are computed. At least 1.
        mask: Most entries of a mask, one per token and what stands in its row or before
            it; chains from the root need none. A single token may exceed it.
        row_limit: Most tokens in a row that is no chain from the root.
    """

    tokens: int
    row_tokens: int
    scored: int
    mask: int = 2**24
    row_limit: int = 2**24

    def halved(self) -> Budget:
        """Return half of this budget, rounded down to one token at least."""
        return Budget(*(max(1, bound // 2) for bound in astuple(self)))

    def longest_row(self, path: int) -> int:
        """Return how many tokens a row behind `path` tokens may have under a mask."""
        longest = (isqrt(path * path + 4 * self.mask) - path) // 2
        return max(1, min(self.tokens, self.row_limit, longest))


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
    size = int(tree.end[start]) - start
    scored_limit = int(scored_before[start]) + budget.scored
    chain = tree.depth[start] == 0 and tree.is_chain(
        start, start + min(size, budget.tokens)
    )
    most = budget.tokens if chain else budget.longest_row(int(tree.depth[start]))
    if size > most or scored_before[tree.end[start]] > scored_limit:
        return _part_of_subtree(tree, scored_before, start, budget, most)
    if chain:
        return _chains(tree, scored_before, start, budget)
    return _subtrees(tree, scored_before, start, budget, most)


def _part_of_subtree(
    tree: TokenTree, scored_before: np.ndarray, start: int, budget: Budget, most: int
) -> Pack:
    limit = min(start + most, int(tree.end[start]) - 1)
    most_scored = int(scored_before[start]) + budget.scored
    within = int(np.searchsorted(scored_before, most_scored, side="right")) - 1
    limit = max(start + 1, min(limit, within))
    # The path to the cut stays cached for what follows.
    limit = _cut(tree, start, limit)
    chain = tree.depth[start] == 0 and tree.is_chain(start, limit)
    return Pack(start, limit, (np.arange(start, limit),), False, chain)


def _cut(tree: TokenTree, start: int, limit: int) -> int:
    """Return where ``[start, limit]`` is best cut: where the path is short, in its second half."""
    earliest = start + (limit - start) // 2 + 1
    cuts = np.arange(earliest, limit + 1)
    cuts = cuts[tree.parent[cuts] != cuts - 1]
    if not len(cuts):
        return limit
    shortest = tree.depth[cuts]
    return int(cuts[np.flatnonzero(shortest == shortest.min())[-1]])


def blocks(
    tree: TokenTree, start: int, stop: int, size: int
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Cut the nodes ``[start, stop)`` into blocks that see little outside of themselves.

    Args:
        tree: The tree.
        start: First node.
        stop: One past the last.
        size: Most nodes of a block.

    Yields:
        First node of a block, one past its last, and the nodes in front of it that its nodes
        may see: the path to the parent of its first.
    """
    while start < stop:
        end = stop if stop - start <= size else _cut(tree, start, start + size)
        yield start, end, tree.path(int(tree.parent[start]))
        start = end


def _chains(
    tree: TokenTree, scored_before: np.ndarray, start: int, budget: Budget
) -> Pack:
    length = int(tree.end[start]) - start
    most_rows = max(1, budget.tokens // length)
    most_scored = int(scored_before[start]) + budget.scored
    rows: list[np.ndarray] = []
    stop = start
    while stop < len(tree) and len(rows) < most_rows:
        end = int(tree.end[stop])
        if (
            end - stop > length
            or scored_before[end] > most_scored
            or not tree.is_chain(stop, end)
        ):
            break
        rows.append(np.arange(stop, end))
        stop = end
    return Pack(start, stop, tuple(rows), True, True)


def _subtrees(
    tree: TokenTree, scored_before: np.ndarray, start: int, budget: Budget, most: int
) -> Pack:
    size = int(tree.end[start]) - start
    # Rows hold as many subtrees of the first one's size as `row_tokens` allows.
    most_rows = max(1, budget.tokens // (size * max(1, budget.row_tokens // size)))
    length = min(budget.tokens // most_rows, most)
    row_mask = length * (int(tree.depth[start]) + length)
    most_rows = min(most_rows, max(1, budget.mask // row_mask))
    most_scored = int(scored_before[start]) + budget.scored
    rows: list[list[np.ndarray]] = []
    free: list[int] = []
    stop = start
    while stop < len(tree):
        end = int(tree.end[stop])
        size = end - stop
        # Past the end of the cached path's own subtree that path is dead weight:
        # go on only to keep a small remainder from becoming a pass of its own.
        left_path = tree.depth[stop] < tree.depth[start]
        if left_path and stop - start >= budget.tokens // 4:
            break
        if size > length or scored_before[end] > most_scored:
            break
        row = next((i for i, room in enumerate(free) if room >= size), None)
        if row is None:
            if len(rows) == most_rows:
                break
            row = len(rows)
            rows.append([])
            free.append(length)
        rows[row].append(np.arange(stop, end))
        free[row] -= size
        stop = end
    return Pack(start, stop, tuple(np.concatenate(r) for r in rows), True, False)
