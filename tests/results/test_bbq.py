"""BBQ's bias scores, from what the harness's own code logs of made documents."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from lm_eval_pruned.compare.pairing import paired_documents, paired_test
from lm_eval_pruned.results.documents import CHOICE_PROB, documents_of
from lm_eval_pruned.results.runs import read_run
from tests.helpers.bbq import AGGREGATIONS, write_bbq
from tests.helpers.cases import stderr_of


def run_of(folder, picks):
    return read_run(write_bbq(folder, picks))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    rng = np.random.default_rng(0)
    base = rng.choice(12, 600, p=[0.3, 0.3, *[0.04] * 10])
    changed = np.where(rng.random(600) < 0.2, 0, base)
    return [run_of(tmp_path_factory.mktemp("bbq"), picks) for picks in (base, changed)]


def test_each_score_is_a_mean_over_its_documents(both):
    for run in both:
        metrics = [CHOICE_PROB, *(name for _, name in run.scores)]
        found_of = {name: documents_of(run, "bbq", name) for name in metrics}
        read = {name: found for name, found in found_of.items() if found}
        names = [name for _, name in run.scores if "bias_score" in name]
        # Three categories have documents, and the scores of the other eight are not known.
        assert sum(name in read for name in names) == 2 * 4 == len(names) - 16
        for name in names:
            if name in read:
                score, found = run.scores["bbq", name], read[name]
                assert score.higher_is_better is None
                assert found.values.mean() == pytest.approx(score.value, abs=1e-9)
                overall = name in ("amb_bias_score,none", "disamb_bias_score,none")
                assert len(found.values) == 600 / (2 if overall else 6)
        # Ten choices say that nobody can know, and each is right.
        assert CHOICE_PROB not in read
        assert read["acc,none"].levels["chance"] == pytest.approx((10 + 1) / 24)


@pytest.mark.parametrize("kind", AGGREGATIONS)
@pytest.mark.parametrize("category", ["", "_Age"])
def test_the_spread_is_that_of_a_paired_bootstrap_and_the_interval_no_shorter(
    both, kind, category
):
    name = f"{kind}_bias_score{category}"
    pair = paired_documents(*both, "bbq", f"{name},none")
    test = paired_test(pair, both[0], "bbq", f"{name},none")
    logged = []
    for run in both:
        lines = run.samples["bbq"].read_text("utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        of = [(n, row[name]) for n, row in enumerate(rows)]
        wanted = {("ambig", "disambig")[kind == "disamb"]}
        logged += [
            [
                (*row[:3], row[3] == "True")
                for n, row in of
                if rows[n]["doc"]["context_condition"] in wanted and row[1] == row[1]
            ]
        ]

    def difference(indices):
        one, other = (AGGREGATIONS[kind]([of[i] for i in indices]) for of in logged)
        return other - one

    drawn = stats.bootstrap(
        (np.arange(len(logged[0])),),
        difference,
        n_resamples=1000,
        confidence_level=0.9,
        vectorized=False,
        rng=np.random.default_rng(1),
        method="BCa",
    )
    assert test.difference == pytest.approx(difference(range(len(logged[0]))))
    # The standard error of a thousand draws has one of 1 / sqrt(2000), 2.2 %.
    assert stderr_of(test) == pytest.approx(drawn.standard_error, rel=0.08)
    # Ours allows for a document that nobody has seen.
    (low, high), of_draws = test.interval(0.1), drawn.confidence_interval
    within = 0.08 * (of_draws.high - of_draws.low)
    assert low < of_draws.low + within
    assert high > of_draws.high - within


def test_where_no_answer_follows_a_stereotype_nothing_is_tested(tmp_path):
    run = run_of(tmp_path, np.full(120, 5))
    assert run.scores["bbq", "disamb_bias_score,none"].value == 0.0
    assert documents_of(run, "bbq", "disamb_bias_score,none") is None
