"""The page with the energy runs of arXiv 2512.22671, read again."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from tests.helpers import checkpoints


@pytest.fixture(scope="module")
def study_energy():
    """Return docs/make_study_energy.py."""
    path = checkpoints.ROOT / "docs" / "make_study_energy.py"
    spec = importlib.util.spec_from_file_location("make_study_energy", path)
    module = importlib.util.module_from_spec(spec)
    # Its dataclass looks itself up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def runs(study_energy):
    return study_energy.read()


def test_the_published_energy_is_emissions_less_a_constant_power(study_energy, runs):
    taken_off = study_energy.Subtraction.of(runs)
    assert len(runs) == 126
    assert taken_off.low == pytest.approx(0.34923, abs=5e-6)
    assert taken_off.high == pytest.approx(taken_off.low, rel=1e-12)
    assert taken_off.factor == pytest.approx(1.582, abs=5e-4)
    assert taken_off.error < 0.0043
    for run in runs:
        # Emissions taken for kWh, less the factor times the RAM energy, per token.
        taken = 3.6e6 * run.raw - 1.582 * run.ram
        assert taken / run.tokens == pytest.approx(run.published, rel=0.0043)
        # The same in the unit that it should have: the carbon intensity cancels.
        assert taken_off.low * taken_off.net(run) == pytest.approx(taken, rel=1e-3)


@pytest.mark.parametrize(
    ("key", "expected"),
    [("published", -23.2), ("net", -23.2), ("gross", -7.7), ("gpu", -13.7)],
)
def test_the_saving_is_a_third_gross_of_what_it_is_net(
    study_energy, runs, key, expected
):
    found = study_energy.change(runs, "mmlu_latency_b1", key)
    assert found == pytest.approx(expected, abs=0.05)


def test_the_latency_penalty_is_output_length(study_energy, runs):
    whole, pruned = (
        study_energy.figures(runs, "hellaswag_latency_b1", p) for p in (0, 60)
    )
    assert whole["tokens_per_prompt"] == pytest.approx(5.2, abs=0.1)
    assert pruned["tokens_per_prompt"] == pytest.approx(19.8, abs=0.1)
    assert pruned["ms"] / whole["ms"] > 3.5
    assert pruned["tokens_per_second"] > whole["tokens_per_second"]


def test_the_page_is_what_the_script_writes(study_energy):
    page = study_energy.PAGE.read_text(encoding="utf-8")
    assert page.partition(study_energy.BEGIN)[2] == study_energy.as_markdown() + "\n"
