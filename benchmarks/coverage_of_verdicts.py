"""How often a verdict is wrong, in each measure that it judges; see ``coverage.py``.

A loss of the margin must not be shipped, and a candidate that does not differ must not be refused, each
in more than 5 % of cases.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from lm_eval_pruned.compare import statistics
from lm_eval_pruned.compare.judge import Case, mean_of, p_of_claim
from lm_eval_pruned.compare.margins import Margin
from lm_eval_pruned.results.documents import TRANSFORMS, Documents
from lm_eval_pruned.results.files import Run, Score


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    #: Makes a case of so many documents that loses a part of its margin.
    MakeCase = Callable[..., Case]
    #: Makes the cases of one claim, with the documents of each.
    MakeCases = Callable[[np.random.Generator, int, float], list[Case]]

ALPHA = 0.05


def shared(
    rng: np.random.Generator, n: int, spread: float, blocks: bool = False
) -> np.ndarray:
    """Noise of documents, half of it common to blocks of four if there are some."""
    if not blocks:
        return spread * rng.normal(size=n)
    common = np.repeat(rng.normal(size=-(-n // 4)), 4)[:n]
    return spread * (common + rng.normal(size=n)) / math.sqrt(2)


def rare(rng: np.random.Generator, n: int, loss: float) -> np.ndarray:
    """2 % of documents gain 0.5, and as many and those that make up the `loss` lose it."""
    lose, gain = 0.02 + 2 * loss, 0.02
    return rng.choice([-0.5, 0.5, 0.0], size=n, p=[lose, gain, 1 - lose - gain])


def exponential(rng: np.random.Generator, n: int, loss: float) -> np.ndarray:
    """Losses that most documents hardly have, and few have several times."""
    return 0.05 * (1 - rng.exponential(size=n)) - loss


def probability(form: str, margin: float, blocks: bool = False) -> MakeCase:
    """Probabilities of the right answer, whose mean falls by a part of the margin."""

    def make(rng: np.random.Generator, n: int, part: float, task: str = "t") -> Case:
        base, loss = rng.uniform(0.5, 0.6, n), part * margin
        if form == "normal":
            gains = shared(rng, n, 0.08, blocks) - loss
        else:
            gains = {"rare": rare, "exponential": exponential}[form](rng, n, loss)
        return case(
            base, np.clip(base + gains, 0, 1), "choice_prob", "2pt", blocks, task
        )

    return make


def kept(mean: float, noise: float, form: str = "normal") -> MakeCase:
    """Lifts in blocks of four, of which a part of 5 % is lost."""

    def make(rng: np.random.Generator, n: int, part: float, task: str = "t") -> Case:
        base = mean + shared(rng, n, 4.0, True)
        lost = 0.05 * part * base
        if form == "a tenth":
            # The loss is that of a tenth of the blocks, of which each loses ten times as much.
            lost = 10 * lost * np.repeat(rng.random(-(-n // 4)) < 0.1, 4)[:n]
        skewed = noise * (1 - rng.exponential(size=n))
        change = skewed if form == "exponential" else shared(rng, n, noise, True)
        return case(base, base - lost + change, "lift", "5%", True, task, floor=0.0)

    return make


def text(form: str) -> MakeCase:
    """Log-likelihoods of long and short texts, whose perplexity rises by a part of 2 %."""

    def make(rng: np.random.Generator, n: int, part: float, task: str = "t") -> Case:
        base = rng.normal(-3, 0.3, n)
        tail = 0.03 * (math.exp(0.5) - np.exp(rng.normal(size=n)))
        noise = tail if form == "lognormal" else rng.normal(0, 0.05, n)
        run = base - np.log1p(0.02 * part) + noise
        return case(base, run, "word_perplexity", "2%", False, task, up=False)

    return make


def bias(rng: np.random.Generator, n: int, part: float, task: str = "t") -> Case:
    """Answers that follow a stereotype or not, of which a fifth changes; 15 points are the margin."""
    up = 0.1 + 0.15 * part
    base = (rng.random(n) < 0.5).astype(float)
    changes = np.where(base == 0, rng.random(n) < 2 * up, rng.random(n) < 0.2)
    return case(
        base, np.where(changes, 1 - base, base), "bias", "15pt", False, task, up=None
    )


def case(
    base: np.ndarray,
    run: np.ndarray,
    metric: str,
    margin: str,
    blocks: bool,
    task: str,
    *,
    up: bool | None = True,
    floor: float | None = None,
) -> Case:
    """Return two runs on the same documents, in blocks of four if there are some."""
    n, key = len(base), (task, f"{metric},none")
    transform = "perplexity" if metric == "word_perplexity" else "mean"
    keys = tuple((task, f"{task} {number}", 0) for number in range(n))
    clusters = tuple(f"{task} {number // 4}" for number in range(n)) if blocks else None
    pair = [Documents(keys, v, np.ones(n), clusters, transform) for v in (base, run)]
    known = {task: {"floors": {} if floor is None else {metric: floor}}}
    runs = []
    for name, documents in zip(("base", "run"), pair, strict=True):
        value = float(TRANSFORMS[transform].score(documents.values.mean()))
        scores = {key: Score(value, None, up, n)}
        held = {task: {key[1]: documents}}
        runs.append(Run(name, Path(), scores, metadata=known, documents=held))
    return Case(*runs, key, key, margin=Margin("not_worse", margin))


def pool(*parts: float, form: str = "normal", uneven: bool = False) -> MakeCases:
    """Several tasks, of which each loses a part of the margin of 2 points."""
    make = probability(form, 0.02)

    def several(rng: np.random.Generator, n: int, part: float) -> list[Case]:
        sizes = [n // (3 if uneven and task else 1) for task in range(len(parts))]
        both = enumerate(zip(sizes, parts, strict=True))
        return [make(rng, of, part * own, f"t{task}") for task, (of, own) in both]

    return several


def answer(cases: Sequence[Case]) -> tuple[bool, bool]:
    """Return whether a verdict on one case, or on a pool, ships, and whether it does not."""
    p = p_of_claim(cases)
    ship = p is not None and p < ALPHA
    every = [*cases, mean_of(cases)] if cases[1:] else [*cases]
    tests = [each.test for each in every]
    up = cases[0].scores[0].higher_is_better
    worse = [
        test.p if up is None else test.sides and test.sides[not up] for test in tests
    ]
    shown = [q for q, _ in statistics.false_discovery(worse) if q is not None]
    return ship, not ship and bool(shown) and min(shown) < ALPHA


#: Measure, data, and what makes the cases of one claim.
VERDICTS: list[tuple[str, str, MakeCases]] = [
    *(
        (measure, data, lambda rng, n, part, make=make: [make(rng, n, part)])
        for measure, data, make in [
            ("probability", "normal", probability("normal", 0.02)),
            ("probability", "normal, blocks of 4", probability("normal", 0.02, True)),
            ("probability", "exponential losses", probability("exponential", 0.02)),
            (
                "probability",
                "4 % more lose 0.5 than gain it",
                probability("rare", 0.02),
            ),
            ("kept", "ratio near 1", kept(5, 0.5)),
            ("kept", "noise as large as the lift", kept(5, 5)),
            ("kept", "base near its floor", kept(0.8, 0.5)),
            ("kept", "exponential losses", kept(5, 1, "exponential")),
            ("kept", "a tenth of the blocks loses", kept(5, 0.1, "a tenth")),
            ("text", "normal", text("normal")),
            ("text", "lognormal losses", text("lognormal")),
            ("bias", "a fifth of the answers changes", bias),
        ]
    ),
    ("mean of 3", "each loses the margin", pool(1, 1, 1)),
    ("mean of 3", "each, 4 % more lose 0.5 than gain it", pool(1, 1, 1, form="rare")),
    ("mean of 3", "one loses three times the margin", pool(3, 0, 0)),
    (
        "mean of 3",
        "the same, others have a third of the documents",
        pool(3, 0, 0, uneven=True),
    ),
    ("mean of 3", "the same, it has a third", pool(0, 3, 0, uneven=True, form="rare")),
    ("mean of 6", "one loses its guard", pool(2.5, 0, 0, 0, 0, 0)),
    (
        "mean of 6",
        "the same, 10 % more lose 0.5 than gain it",
        pool(2.5, 0, 0, 0, 0, 0, form="rare"),
    ),
]


COLUMNS = ["measure", "data", "documents", "ships at the margin"]
COLUMNS += [
    "does not ship if equal",
    "ships if equal",
    "does not ship at twice the margin",
]


def verdicts(times: int) -> list[list[Any]]:
    """Return rows on verdicts: how often the answer is wrong at the margin, and without a difference.

    Documents are those of a task. Losses are as the data say, none of it, and twice as much.
    """
    rows: list[list[Any]] = []
    cells = itertools.product(enumerate(VERDICTS), (30, 100, 300))
    for (number, (measure, data, make)), n in tqdm([*cells]):
        found = np.zeros((3, 2))
        for part, seed in itertools.product(range(3), range(times)):
            rng = np.random.default_rng([number, n, part, seed])
            found[part] += answer(make(rng, n, float(part)))
        rates = found / times
        shown = rates[1, 0], rates[0, 1], rates[0, 0], rates[2, 1]
        rows.append([measure, data, n, *(f"{rate:.3f}" for rate in shown)])
    return rows
