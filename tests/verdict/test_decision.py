"""The decision on two runs, of which the scores and what decides are known by hand."""

from __future__ import annotations

import numpy as np
import pytest

from lm_eval_pruned.results.runs import read_run
from lm_eval_pruned.verdict.decision import decide, read_margins
from tests.helpers.results_files import answered, write_run


RIGHTS = [n % 2 for n in range(400)]


def right(wrong, documents=400):
    """Return answers of which so many are wrong, the last ones; chance is one half."""
    picks = [r if n < documents - wrong else 1 - r for n, r in enumerate(RIGHTS)]
    return answered(picks[:documents], RIGHTS[:documents])


@pytest.fixture
def decided(tmp_path):
    """Return the verdict on two runs of the same tasks."""

    def decided(base, candidate, *margins, measure="acc", **about):
        runs = [
            read_run(write_run(tmp_path / name, tasks, **about))
            for name, tasks in (("base", base), ("new", candidate))
        ]
        return decide(*runs, read_margins(margins), measure=measure)

    return decided


def words(verdict):
    return [each.word for each in verdict.judged]


@pytest.mark.parametrize(
    ("wrong", "code", "word"),
    [(10, 0, "equivalent"), (11, 1, "worse")],
)
def test_the_level_of_a_claim_is_5_percent(wrong, code, word, decided):
    """P is 0.041 and 0.069, by Wilson's interval; see test_judge.py."""
    found = decided({"boolq": right(0)}, {"boolq": right(wrong)}, "4.25pt")
    assert (found.code, words(found)) == (code, [word])


def test_the_interval_that_is_shown_is_of_90_percent(decided):
    (judged,) = decided({"boolq": right(0)}, {"boolq": right(10)}, "4.25pt").judged
    z, n, lost = 1.6449, 400, 0.025
    middle = (lost + z * z / 2 / n) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(lost * (1 - lost) / n + (z / 2 / n) ** 2)
    assert -judged.row.low == pytest.approx(middle + half, abs=1e-5)


def test_equivalent_is_said_only_of_an_interval_within_the_margin_on_both_sides(
    decided,
):
    """40 answers became right: 10 points, and the margin is 5."""
    found = decided({"boolq": right(60)}, {"boolq": right(20)}, "5pt")
    assert words(found) == ["not worse"]
    assert words(decided({"boolq": right(0)}, {"boolq": right(0)}, "5pt")) == [
        "equivalent"
    ]


def test_a_verdict_of_nothing_but_scores_at_their_floor_is_not_decided(decided):
    at_floor = {"boolq": right(196), "piqa": right(198)}
    found = decided(at_floor, at_floor)
    assert (found.code, {*words(found)}) == (2, {"cannot show a loss"})
    assert not found.pooled
    assert (
        decided({**at_floor, "arc": right(0)}, {**at_floor, "arc": right(0)}).code == 0
    )


def lines(values, aggregation="mean", up=True):
    return {"values": [*values], "aggregation": aggregation, "higher_is_better": up}


LIFTS = np.random.default_rng(0).normal(5, 4, 80)
LOGS = np.random.default_rng(1).normal(-3, 0.2, 80)
PROBE = {"metadata": {"primary_metric": "lift", "floors": {"lift": 0}}}


@pytest.mark.parametrize(
    ("task", "margin"),
    [
        ({"lift,none": lines(LIFTS)}, "5%"),
        ({"mc2,none": lines(np.linspace(0.3, 0.9, 80))}, "2pt"),
        ({"word_perplexity,none": lines(LOGS, "perplexity", up=False)}, "2%"),
        ({"bias,none": lines([0.0, 1.0] * 40, up=None)}, "15pt"),
    ],
    ids=["kept", "probability", "text", "bias"],
)
def test_the_margin_by_default_of_each_measure(task, margin, decided):
    configs = {"t": PROBE if "lift,none" in task else {}}
    found = decided({"t": task}, {"t": task}, measure=None, configs=configs)
    assert [each.row.case.margin.text for each in found.judged] == [margin]


@pytest.mark.parametrize(
    ("measure", "loses", "code"),
    [("lift", 0.03, 0), ("lift", 0.07, 1), ("text", 0.01, 0), ("text", 0.03, 1)],
)
def test_losses_on_both_sides_of_a_default_margin_are_decided(
    measure, loses, code, decided
):
    """Losses of the same share of every document, which have hardly any spread."""
    noise = np.random.default_rng(2).normal(0, 1e-4, 80)
    if measure == "lift":
        tasks = [{"lift,none": lines(v)} for v in (LIFTS, LIFTS * (1 - loses) + noise)]
    else:
        after = LOGS - np.log(1 + loses) + noise
        tasks = [
            {"word_perplexity,none": lines(v, "perplexity", up=False)}
            for v in (LOGS, after)
        ]
    about = {"configs": {"t": PROBE if measure == "lift" else {}}}
    found = decided(*({"t": task} for task in tasks), measure=None, **about)
    assert found.code == code
