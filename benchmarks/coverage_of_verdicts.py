"""How often a verdict is wrong: ``python benchmarks/coverage_of_verdicts.py [--times 300] [--claim kept]``.

Writes ``docs/measurements/coverage_verdicts.csv``, a row for each cell of one grid: claim, data, floor and base,
independent units, and how documents belong together. Each cell is drawn with a loss of exactly the margin, and
with none. The same command writes the same.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from unittest import mock

import numpy as np
from scipy import special
from tqdm import tqdm

from lm_eval_pruned.compare.answer import DO_NOT_SHIP, SHIP
from lm_eval_pruned.compare.cases import Case, mean_of
from lm_eval_pruned.compare.claims import Paired, p_of, paired
from lm_eval_pruned.compare.judge import answer_of, claims_on
from lm_eval_pruned.compare.margins import Margin
from lm_eval_pruned.results.documents import TRANSFORMS, Documents
from lm_eval_pruned.results.files import Run, Score
from lm_eval_pruned.util.tables import csv_table


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CSV = Path(__file__).parents[1] / "docs" / "measurements" / "coverage_verdicts.csv"
LEVEL = 0.05
LIMITS = (0.0, 1.0)
UNITS = (10, 20, 40, 60, 100, 300)
#: Documents of a unit where there are several.
TOGETHER = 4
#: How much of the margin each of five subjects loses.
SUBJECTS = np.array([0.0, 0.5, 1.0, 1.5, 2.0])
#: The largest loss of a document that has a probability.
LARGEST = 0.4


def flips(u: np.ndarray, base: float, loss: np.ndarray, lost: bool, gain: float):
    """Right-or-wrong documents: a share of `gain` becomes right, as many and the loss wrong."""
    before = u[0] < base
    stays = u[1] >= (gain + lost * loss) / base
    return before * 1.0, np.where(before, stays, u[1] < gain / (1 - base)) * 1.0


def even(u: np.ndarray, base: float, loss: np.ndarray, lost: bool):
    """Probabilities that all lose about as much."""
    width = min(base, 1 - base) / 2
    before = base + width * (2 * u[0] - 1)
    return before, before - lost * loss + width / 2 * (2 * u[1] - 1)


def rare(u: np.ndarray, base: float, loss: np.ndarray, lost: bool):
    """Probabilities of which few lose much; without a difference, few win back what all lose."""
    width = min(base, 1 - base) / 2
    before = base + width * (2 * u[0] - 1)
    if lost:
        size = min(LARGEST, base - width)
        return before, before - size * (u[1] < loss / size)
    size = np.minimum(LARGEST, 1 - base - width + loss)
    return before, before - loss + size * (u[1] < loss / size)


def endless(
    u: np.ndarray,
    base: float,
    loss: np.ndarray,
    lost: bool,
    spread: float,
    noise: float,
    share: float = 0.0,
):
    """Scores without limits that all lose about as much, or of which a `share` loses much, as in `rare`."""
    before = base + spread * special.ndtri(u[0])
    after = before + noise * special.ndtri(u[1])
    if not share:
        return before, after - lost * loss
    some = loss / share * (u[2] < share)
    return before, after - some if lost else after - loss + some


class Data(NamedTuple):
    """Documents as `draw` makes them of uniform numbers, shape (4, n), the base's mean, and each one's loss."""

    draw: Callable[..., tuple[np.ndarray, np.ndarray]]
    limits: tuple[float, float] | None = LIMITS
    transform: str = "mean"
    #: Whether documents weigh 1 to 4, and lose as much more.
    weighed: bool = False


def kinds(name: str, spread: float, noise: float, **how) -> dict[str, Data]:
    """Return data without limits whose losses are even or rare."""
    shares = {"": 0.0, ", 1 in 20 loses": 0.05, ", 1 in 50 loses": 0.02}
    return {
        name + text: Data(
            functools.partial(endless, spread=spread, noise=noise, share=share),
            None,
            **how,
        )
        for text, share in shares.items()
    }


RIGHT_OR_WRONG = {
    "right or wrong": Data(functools.partial(flips, gain=0.05)),
    "right or wrong, losses only": Data(functools.partial(flips, gain=0.0)),
}
PROBABILITIES = {"probability": Data(even), "probability, rare losses": Data(rare)}
SUMS = {
    "ratio of sums": Data(even, weighed=True),
    "ratio of sums, rare losses": Data(rare, weighed=True),
}
LOSSES = {
    **kinds("unbounded", 0.3, 0.05),
    **kinds("perplexity", 0.3, 0.05, transform="perplexity"),
    **kinds(
        "ratio of sums, bits per byte",
        0.3,
        0.05,
        transform="bits_per_byte",
        weighed=True,
    ),
}
SHARES = {**RIGHT_OR_WRONG, **PROBABILITIES, **SUMS}


GROUPINGS = ("alone", "clusters of 4", "5 strata", "4 times the same")


class Claim(NamedTuple):
    """A claim with its default margin, a `size` in points or a `share`, on data by (floor, base)."""

    data: dict[str, Data]
    places: tuple[tuple[float, float], ...]
    size: float = 0.0
    share: float | None = None
    side: int = 1
    groupings: tuple[str, ...] = GROUPINGS


NEAR_AND_FAR = tuple((f, b) for f in (0.0, 0.25, 0.5) for b in (f + 0.125, 0.9))
#: The grid. Points take limits; a ratio has no floor, tasks of a pool are strata already, and a floor only moves
#: scores without limits.
GRID: list[tuple[str, Claim]] = [
    ("difference", Claim(SHARES, ((0, 0.6),), 0.02)),
    ("kept", Claim(SHARES, NEAR_AND_FAR, share=0.05)),
    ("kept", Claim(kinds("unbounded", 4, 0.5), ((0, 1), (0, 5)), share=0.05)),
    ("ratio", Claim(LOSSES, ((0, 3),), share=0.02, side=-1)),
    (
        "pooled",
        Claim(
            {**RIGHT_OR_WRONG, **PROBABILITIES},
            ((0, 0.6),),
            0.02,
            groupings=(*GROUPINGS[:2], GROUPINGS[3]),
        ),
    ),
    ("bias", Claim(RIGHT_OR_WRONG, ((0, 0.5),), 0.15, side=0)),
]


class Cell(NamedTuple):
    """One cell of the grid, which makes documents and asks the package about them."""

    name: str
    claim: Claim
    data: str
    floor: float
    base: float
    units: int
    grouping: str

    @property
    def loss(self) -> float:
        """The margin, in what `Data.draw` makes."""
        if self.data.startswith("perplexity"):
            return math.log1p(self.claim.share or 0.0)
        return self.claim.size or self.claim.share * (self.base - self.floor)  # type: ignore[operator]

    def draw(self, rng: np.random.Generator, lost: bool):
        """Return values of base and run, weights, and the unit and the subject of each document."""
        data = self.claim.data[self.data]
        times = 1 if self.grouping in ("alone", "5 strata") else TOGETHER
        u = rng.random((4, self.units)).repeat(times, 1)
        if self.grouping == "clusters of 4":
            own = rng.random(u.shape)
            u = np.where(rng.random(u.shape) < 0.5, own, u)
        unit = np.arange(self.units).repeat(times)
        subject = unit % len(SUBJECTS)
        loss = np.full(u.shape[1], self.loss)
        if self.grouping == "5 strata":
            loss *= SUBJECTS[subject]
        weights = np.ones(u.shape[1])
        if data.weighed:
            weights = 1 + np.floor(4 * u[3])
            # Weights of 1 to 4 have the mean 2.5, their squares 7.5.
            loss *= weights / 3
        before, after = data.draw(u, self.base, loss, lost)
        if self.claim.side < 0:
            # What is lost of these is a rise.
            after = 2 * before - after
        factor = TRANSFORMS[data.transform].factor
        return before / factor, after / factor, weights, unit, subject

    def test(self, rng: np.random.Generator, lost: bool) -> Paired:
        """Return the package's test of two runs."""
        data = self.claim.data[self.data]
        before, after, weights, unit, subject = self.draw(rng, lost)
        return paired(
            before,
            after,
            self.floor,
            weights=weights,
            clusters=None if len(unit) == self.units else unit,  # type: ignore[arg-type]
            strata=subject if self.grouping == "5 strata" else None,  # type: ignore[arg-type]
            transform=data.transform,
            limits=data.limits,
        )

    def ask(self, rng: np.random.Generator, lost: bool) -> tuple[bool, ...]:
        """Return whether it ships, whether it must not, and whether the interval lies above or below the truth.

        An end is above the truth exactly where the test of this side rejects the truth.
        """
        if self.name == "pooled":
            return self._pooled(rng, lost)
        test, share, side = self.test(rng, lost), self.claim.share, self.claim.side
        size = share * test.perplexity if share and test.perplexity else self.loss
        sides = (side,) if side else (1, -1)
        ships = all(small(test.p_margin(size, share, one)) for one in sides)
        if share and test.perplexity is None:
            truth = 1 - lost * side * share
            ends = [kept_p(test, truth, one) for one in (1, -1)]
        else:
            truth = lost * (size if side < 0 else -size)
            ends = [test.p_beyond(truth, one) for one in (1, -1)]
        worse = test.p_beyond(0.0, -side) if side else test.p
        return ships, not ships and small(worse), *map(small, ends)

    def _pooled(self, rng: np.random.Generator, lost: bool) -> tuple[bool, ...]:
        cases = [self._case(task, *self.draw(rng, lost)) for task in ("a", "b", "c")]
        # No answer depends on an interval, and each takes as long as thirty tests.
        with mock.patch.object(Paired, "interval", return_value=(None, None)):
            answer = answer_of(claims_on(cases))
        test = mean_of(cases).test
        ends = (test.p_beyond(-lost * self.claim.size, side) for side in (1, -1))
        return answer == SHIP, answer == DO_NOT_SHIP, *map(small, ends)

    def _case(self, task: str, *documents: np.ndarray) -> Case:
        *pair, weights, unit, _ = documents
        metric = "acc" if "wrong" in self.data else "choice_prob"
        key, names = (task, f"{metric},none"), [f"{task}{number}" for number in unit]
        keys = tuple((task, name, number) for number, name in enumerate(names))
        clusters = None if len(unit) == self.units else tuple(names)
        runs = []
        for values in pair:
            held = Documents(keys, values, weights, clusters, "mean")
            scores = {key: Score(held.score, None, True, len(keys))}
            about = {"metadata": {}, "documents": {task: {key[1]: held}}}
            runs.append(Run("run", Path(), scores, **about))
        return Case(
            *runs, key, key, margin=Margin("not_worse", f"{100 * self.claim.size:g}pt")
        )


def small(p: float | None) -> bool:
    """Whether a p is known and below the level."""
    return p is not None and p < LEVEL


def kept_p(test: Paired, share: float, side: int) -> float | None:
    """Return the p that an end of the interval of what is kept is made of."""
    known = test.tested and test.above
    return p_of(test.keeps(share, side)) if known else None


def check_truth(cell: Cell, draws: int = 10**6) -> None:
    """Raise where the mean over many draws is not what the grid says."""
    many = cell._replace(units=draws)
    factor = TRANSFORMS[cell.claim.data[cell.data].transform].factor
    for lost in (True, False):
        before, after, weights, *_ = many.draw(np.random.default_rng(0), lost)
        losses = factor * (before - after) * (1 if cell.claim.side >= 0 else -1)
        for values, expected in (
            (losses, lost * cell.loss),
            (factor * before, cell.base),
        ):
            terms = weights * (values - expected)
            if abs(terms.mean()) > 5 * terms.std() / math.sqrt(draws) + 1e-12:
                raise AssertionError(f"{cell.data}: {values.mean()} is not {expected}")


def cells() -> Iterator[Cell]:
    """Yield the grid."""
    for name, claim in GRID:
        for data, place, units, grouping in itertools.product(
            claim.data, claim.places, UNITS, claim.groupings
        ):
            yield Cell(name, claim, data, *place, units, grouping)


def rates(
    cell: Cell, times: int, seed: int, truths: tuple[bool, ...] = (True, False)
) -> np.ndarray:
    """Return shares of what `Cell.ask` says, with a loss of the margin and without, shape (truths, 4)."""
    rng = np.random.default_rng(seed)
    return np.array(
        [np.mean([cell.ask(rng, lost) for _ in range(times)], 0) for lost in truths]
    )


def main() -> None:
    """Simulate and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=300, help="draws of each truth")
    parser.add_argument("--claim", default="", help="only this one, printed")
    arguments = parser.parse_args()
    rows, checked = [], set()
    for seed, cell in enumerate(tqdm([*cells()])):
        if arguments.claim not in ("", cell.name):
            continue
        if (kind := (cell.name, cell.data, cell.floor, cell.base)) not in checked:
            check_truth(cell)
            checked.add(kind)
        # The judge of three tasks takes as long as twenty tests.
        times = arguments.times // (4 if cell.name == "pooled" else 1)
        lost, equal = rates(cell, times, seed)
        about = cell._asdict() | {"repetitions": times}
        about |= {"floor": f"{cell.floor:g}", "base": f"{cell.base:g}"}
        about["claim"] = about.pop("name")
        names = ["claim", "data", "floor", "base", "units", "grouping", "repetitions"]
        found = {
            "false ship": lost[0],
            "false do not ship": equal[1],
            "low end above": max(lost[2], equal[2]),
            "high end below": max(lost[3], equal[3]),
            "ships if equal": equal[0],
        }
        shown = {name: f"{rate:.3f}" for name, rate in found.items()}
        rows.append({name: about[name] for name in names} | shown)
    if arguments.claim:
        print(csv_table(rows), end="")
    else:
        CSV.write_text(csv_table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
