"""How often a claim is wrong, over a grid of claims and data whose truth is known; see ``coverage.py``.

A loss of exactly the margin must not be shipped, and a candidate that does not differ must not be refused, each
in more than 5 % of cases. An interval ends where the same test rejects, so its coverage is counted without finding
its ends. All data are synthetic; the same ``--times`` gives the same table.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from lm_eval_pruned.compare.claims import CLAIM_LEVEL, GUARD, Paired, p_of, paired


if TYPE_CHECKING:
    from collections.abc import Iterator

UNITS = (10, 20, 40, 60, 100, 300)
GROUPINGS = ("alone", "clusters of 4", "5 strata", "each 4 times")
FLOORS = ((0.0, "far"), (0.25, "near"), (0.25, "far"), (0.5, "near"), (0.5, "far"))
#: How far a base lies above its floor.
NEAR, FAR = 0.1, 0.35
COLUMNS = ["claim", "data", "floor", "base", "grouping", "units", "comparisons"]
COLUMNS += ["ships at the margin", "does not ship if equal", "ships if equal"]
COLUMNS += ["low end above", "high end below"]


class Data(NamedTuple):
    """How documents are drawn: `values` makes scores of base and run, of a mean and with a mean loss."""

    name: str
    limits: tuple[float, float] | None
    lowest: float = 0.0
    weighted: bool = False

    def values(
        self, rng: np.random.Generator, n: int, mean: float, loss: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return scores of shape (n,) each, whose expectations are `mean` and `mean` - `loss`."""
        if self.name.startswith("right or wrong"):
            base = (rng.random(n) < mean).astype(float)
            # As many change either way, and those that are lost.
            changes = 0.0 if "losses only" in self.name else 0.03
            lost = rng.random(n) < changes + max(loss, 0) / mean
            won = rng.random(n) < (changes * mean + max(-loss, 0)) / (1 - mean)
            return base, np.where(base == 1, 1.0 - lost, 1.0 * won)
        if self.name == "without limits":
            base = rng.normal(mean, 0.3, n)
            return base, base * (1 - loss / mean) + rng.normal(0, 0.05, n)
        width = min(mean, 1 - mean, 0.1)
        base = rng.uniform(mean - width, mean + width, n)
        if "rare" in self.name:
            return base, base - 0.4 * (rng.random(n) < loss / 0.4)
        return base, base - loss + rng.uniform(-0.03, 0.03, n)


DATA = (
    Data("right or wrong", (0, 1)),
    Data("right or wrong, losses only", (0, 1)),
    # A document that loses 0.4 has to have it.
    Data("probability, rare losses of 0.4", (0, 1), lowest=0.5),
    Data("probability", (0, 1), lowest=0.2),
    Data("without limits", None),
    Data("ratio of sums", (0, 1), lowest=0.2, weighted=True),
)


class Cell(NamedTuple):
    """One cell of the grid."""

    claim: str
    data: Data
    floor: float
    base: str
    grouping: str
    units: int

    @property
    def mean(self) -> float:
        """The expected score of the base."""
        above = NEAR if self.base == "near" else FAR
        return self.floor + above if self.claim == "kept" else 0.6

    @property
    def loss(self) -> float:
        """The loss at the margin."""
        if self.claim == "kept":
            return 0.05 * (self.mean - self.floor)
        return {"ratio": -0.02 * self.mean, "bias": -0.15}.get(self.claim, 0.02)

    def exists(self) -> bool:
        """Whether there are such data, of which such a claim is made."""
        if self.claim != "kept" and (self.floor, self.base) != FLOORS[0]:
            return False
        if self.claim == "ratio":
            return self.data.name in ("without limits", "ratio of sums")
        if self.claim == "pooled":
            return self.data.limits is not None and not self.data.weighted
        if self.claim == "bias":
            return self.data.name == "right or wrong"
        return self.mean >= self.data.lowest

    def drawn(self, rng: np.random.Generator, part: float) -> list[Paired]:
        """Draw tasks whose loss is a part of that at the margin, the mean over them first."""
        tasks = [
            self._task(rng, part, n) for n in range(3 * (self.claim == "pooled") or 1)
        ]
        if not tasks[1:]:
            return [paired(*tasks[0][0], self.floor, **tasks[0][1])]
        values = np.concatenate([task[0] for task in tasks], axis=1)
        about = {
            **tasks[0][1],
            "strata": [n for n, (v, _) in enumerate(tasks) for _ in v[0]],
        }
        if tasks[0][1]["clusters"]:
            about["clusters"] = list(
                itertools.chain(*(t[1]["clusters"] for t in tasks))
            )
        return [paired(*values, **about), *(paired(*v, **how) for v, how in tasks)]

    def _task(
        self, rng: np.random.Generator, part: float, number: int
    ) -> tuple[np.ndarray, dict[str, Any]]:
        size = 4 if self.grouping == "clusters of 4" else 1
        n = self.units * size
        values = np.array(self.data.values(rng, n, self.mean, part * self.loss))
        groups: list[Any] | None = None
        if size > 1:
            first = np.repeat(np.arange(0, n, size), size)
            values = np.where(rng.random(n) < 0.5, values[:, first], values)
            groups = [f"{number} {unit}" for unit in first]
        if self.grouping == "each 4 times":
            groups = [f"{number} {unit}" for unit in np.repeat(np.arange(n), 4)]
            values = values.repeat(4, axis=1)
        strata = None
        if self.grouping == "5 strata":
            strata = (np.arange(n) % 5).tolist()
        about = {"clusters": groups, "strata": strata, "limits": self.data.limits}
        if self.data.weighted:
            about["weights"] = rng.integers(1, 9, n).repeat(values.shape[1] // n)
        return values, about


def outcome(
    cell: Cell, tests: list[Paired], part: float
) -> tuple[bool, bool, bool, bool]:
    """Return whether a verdict ships, whether it does not, and whether either end of the interval misses the truth."""
    test, share = tests[0], {"kept": 0.05, "ratio": 0.02}.get(cell.claim)
    side, size = -1 if cell.claim == "ratio" else 1, abs(cell.loss)
    ps = [test.p_margin(size, share, side)]
    if cell.claim == "bias":
        ps.append(test.p_margin(size, None, -1))
    ps += [each.p_margin(GUARD * size, None, 1) for each in tests[1:]]
    ship = all(p is not None and p < CLAIM_LEVEL for p in ps)
    worse = test.p if cell.claim == "bias" else test.p_beyond(0.0, -side)
    refused = not ship and worse is not None and worse < CLAIM_LEVEL
    if cell.claim == "kept" and test.above > 0 and test.shares_tested:
        ends = [p_of(test.keeps(1 - 0.05 * part, side)) for side in (1, -1)]
    else:
        ends = [test.p_beyond(-part * cell.loss, side) for side in (1, -1)]
    low, high = (p is not None and p < 0.05 for p in ends)
    return ship, refused, low, high


def grid() -> Iterator[Cell]:
    """Yield the cells that exist."""
    claims = "difference", "kept", "ratio", "pooled", "bias"
    for claim, data, (floor, base), grouping, units in itertools.product(
        claims, DATA, FLOORS, GROUPINGS, UNITS
    ):
        cell = Cell(claim, data, floor, base, grouping, units)
        if cell.exists():
            yield cell


def rates(cell: Cell, number: int, times: int) -> list[Any]:
    """Return a row of the table: how often the answer is wrong at the margin, and without a difference."""
    found = np.zeros((2, 4))
    for part, seed in itertools.product((0, 1), range(times)):
        rng = np.random.default_rng([number, part, seed])
        found[part] += outcome(cell, cell.drawn(rng, part), part)
    equal, margin = found / times
    low, high = np.maximum(equal, margin)[2:]
    floor = f"{cell.floor:g}" if cell.claim == "kept" else ""
    start = [cell.claim, cell.data.name, floor, cell.base if floor else ""]
    start += [cell.grouping, cell.units, times]
    wrong = margin[0], equal[1], equal[0], low, high
    return [*start, *(f"{rate:.3f}" for rate in wrong)]


def verdicts(times: int) -> list[list[Any]]:
    """Return the rows of the whole grid; what seems to be wrong too often is compared eight times as often."""
    rows = []
    for number, cell in enumerate(tqdm([*grid()])):
        row = rates(cell, number, times)
        if max(map(float, row[7:9])) > CLAIM_LEVEL:
            row = rates(cell, number, 8 * times)
        rows.append(row)
    return rows
