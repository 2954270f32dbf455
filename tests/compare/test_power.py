"""How many documents a claim needs, against draws from the truth and the tests themselves."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from lm_eval_pruned.compare import power
from lm_eval_pruned.compare.claims import paired
from lm_eval_pruned.compare.power import ALIKE, SEEN, Pilot, chance_of, documents_for
from lm_eval_pruned.results.documents import scored_on
from tests.helpers.cases import case_of


#: Three standard errors of a chance.
SPREAD = 3 * math.sqrt(0.25 / power.DRAWS)


def answers(n, changed, seed=0):
    """Return right-or-wrong answers of two models, a share of which changes."""
    rng = np.random.default_rng(seed)
    base = (rng.random(n) < 0.6).astype(float)
    return base, np.where(np.arange(n) < changed * n, 1 - base, base)


def lifts(n, kept=1.0, noise=1.0):
    base = np.random.default_rng(0).normal(5, 4, n)
    return base, kept * base + np.random.default_rng(1).normal(0, noise, n)


@pytest.mark.parametrize("margin", ["2pt", "6pt"])
def test_the_chance_is_that_of_the_test_on_documents_of_which_as_many_change(margin):
    pilot = [Pilot(case_of(*answers(400, 0.1), margin=margin))]
    found = chance_of("not worse", ALIKE, pilot, 200, 0.05)
    rng, shown = np.random.default_rng(0), 0
    for _ in range(1000):
        up, down, _ = rng.multinomial(200, [0.05, 0.05, 0.9])
        base = [0] * up + [1] * (200 - up)
        run = [1] * up + [0] * down + [1] * (200 - up - down)
        test = paired(base, run, limits=(0, 1))
        shown += test.p_margin(float(margin[0]) / 100, None, 1) < 0.05
    assert found == pytest.approx(shown / 1000, abs=SPREAD + 0.05)


def test_the_number_of_documents_has_a_chance_of_80_percent():
    pilot = [Pilot(case_of(*answers(400, 0.1), margin="5pt"))]
    needed = documents_for("not worse", ALIKE, pilot, 0.05)
    assert chance_of("not worse", ALIKE, pilot, needed, 0.05) > 0.8 - SPREAD
    assert chance_of("not worse", ALIKE, pilot, needed // 2, 0.05) < 0.8 - SPREAD


def test_the_difference_seen_is_that_of_the_pilot():
    """A loss of a third of the margin takes more documents than none; one beyond it takes none."""
    base, run = lifts(240, noise=0.5)
    given = {"metric": "lift,none", "margin": "5%", "floor": 0.0}
    needed = []
    for kept in (1.0, 0.985, 0.9):
        pilot = [Pilot(case_of(base, run - (1 - kept) * base, **given))]
        needed.append(documents_for("not worse", SEEN, pilot, 0.05))
    assert needed[0] < needed[1]
    assert needed[2] is None


def test_a_hopeless_number_of_documents_is_not_told(monkeypatch):
    monkeypatch.setattr(power, "MOST", 500)
    pilot = [Pilot(case_of(*answers(100, 0.5), margin="1pt"))]
    assert documents_for("not worse", ALIKE, pilot, 0.05) is None


def test_blocks_are_drawn_whole_and_strata_keep_their_shares():
    n = 240
    base, run = lifts(n)
    blocks = tuple(str(number // 4) for number in range(n))
    pilot = Pilot(case_of(base, run, margin="5%", clusters=blocks))
    drawn = pilot.drawn(2.0, np.random.default_rng(0), alike=False).pair
    sizes = np.unique(drawn[0].clusters, return_counts=True)[1]
    assert len(sizes) == 120 and set(sizes) == {4}
    pairs = {*zip(base, run, strict=True)}
    assert {*zip(drawn[0].values, drawn[1].values, strict=True)} <= pairs
    parts = in_strata(case_of(base, run), 3)
    drawn = Pilot(parts).drawn(0.5, np.random.default_rng(0), alike=True).pair[0]
    strata = np.unique(drawn.groups["strata"], return_counts=True)
    assert strata[1].tolist() == 3 * [40]


def in_strata(case, strata):
    """Return the case with its documents in so many strata."""
    base, run = (
        scored_on(run, case.key, dataclasses.replace(documents, keys=keys))
        for run, documents in zip((case.base, case.run), case.pair, strict=True)
        for keys in [
            tuple((f"part {n % strata}", str(n), 0) for n in range(len(documents.keys)))
        ]
    )
    return dataclasses.replace(case, base=base, run=run)


@pytest.mark.parametrize("documents", [10, 100, 140, 150])
def test_as_many_documents_are_drawn_as_are_asked_for_however_small_the_strata(
    documents,
):
    """As of MMLU with two questions on each of 57 subjects, which each have the same chance."""
    pilot = Pilot(in_strata(case_of(*answers(114, 0.1)), 57))
    rng = np.random.default_rng(0)
    counts = np.zeros(57)
    for _ in range(400):
        drawn = pilot.drawn(documents / 114, rng, alike=True).pair[0]
        assert len(drawn.keys) == documents
        parts = [int(name.split()[1]) for name, *_ in drawn.keys]
        counts += np.bincount(parts, minlength=57)
    share = documents / 57 % 1
    error = 4 * math.sqrt(share * (1 - share) / 400)
    assert counts / 400 == pytest.approx(documents / 57, abs=error)


def test_models_that_are_alike_have_one_mean_whatever_was_lost():
    base, run = lifts(400, kept=0.5)
    rng, pilot = np.random.default_rng(0), Pilot(case_of(base, run))
    gains = [
        np.diff([d.values.mean() for d in pilot.drawn(1.0, rng, alike=True).pair])
        for _ in range(200)
    ]
    error = np.std(gains) / math.sqrt(200)
    assert np.mean(gains) == pytest.approx(0, abs=3 * error)


def test_of_several_tasks_the_claim_on_their_mean_takes_fewer_documents_of_each():
    """Three tasks with the same noise: a third of the documents, until the guards need more."""
    cases = [
        case_of(*answers(300, 0.1, seed), margin="4pt", task=f"t{seed}")
        for seed in range(3)
    ]
    alone = documents_for("not worse", ALIKE, [Pilot(cases[0])], 0.05)
    together = documents_for("not worse", ALIKE, [*map(Pilot, cases)], 0.05)
    # 8 % of noise in each, twice.
    assert 0.75 * alone < together < 1.35 * alone
