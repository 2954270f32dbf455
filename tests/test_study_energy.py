"""The study's energy runs, read again (arXiv 2512.22671; figures in `tests/data`)."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
study = runpy.run_path(str(ROOT / "benchmarks" / "study_energy.py"))


@pytest.fixture(scope="module")
def runs():
    return study["read"](ROOT / "tests" / "data" / "energy_llama32_1b_l4.csv")


def test_the_published_energy_is_emissions_in_every_run(runs):
    low, high = study["quotient_of_raw_and_total"](runs)
    assert len(runs) == 126
    assert low == pytest.approx(0.34923, abs=5e-6)
    assert high == pytest.approx(0.34923, abs=5e-6)


def test_the_latency_penalty_is_output_length(runs):
    whole, pruned = (study["figures"](runs, "hellaswag_latency_b1", p) for p in (0, 60))
    assert whole["tokens_per_prompt"] == pytest.approx(5.2, abs=0.1)
    assert pruned["tokens_per_prompt"] == pytest.approx(19.8, abs=0.1)
    assert pruned["ms"] / whole["ms"] > 3.5
    assert pruned["tokens_per_second"] > whole["tokens_per_second"]


def test_the_headline_saving_is_a_third_of_what_was_published(runs):
    before, after = (study["figures"](runs, "mmlu_latency_b1", p) for p in (0, 60))
    change = {key: 100 * (after[key] / before[key] - 1) for key in before}
    assert change["published"] == pytest.approx(-23.2, abs=0.05)
    assert change["joules_per_token"] == pytest.approx(-7.7, abs=0.05)
    assert change["gpu_joules_per_token"] == pytest.approx(-13.7, abs=0.05)


def test_the_documentation_shows_what_the_script_prints(runs):
    document = (ROOT / "docs" / "energy.md").read_text(encoding="utf-8")
    for workload in ("hellaswag_latency_b1", "mmlu_latency_b1"):
        assert study["table"](runs, workload) in document
        assert study["changes"](runs, workload, 60) in document
