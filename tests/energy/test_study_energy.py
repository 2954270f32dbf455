"""The page with the energy runs of arXiv 2512.22671, read again."""

from __future__ import annotations

import make_study_energy as module
import pytest


RUNS = module.read()


def test_the_published_energy_is_emissions_less_a_constant_power():
    taken_off = module.Subtraction.of(RUNS)
    assert len(RUNS) == 126
    assert taken_off.low == pytest.approx(0.34923, abs=5e-6)
    assert taken_off.high == pytest.approx(taken_off.low, rel=1e-12)
    for run in RUNS:
        # Emissions taken for kWh, less the factor times the RAM energy, per token.
        taken = 3.6e6 * run.raw - 1.582 * run.ram
        assert taken / run.tokens == pytest.approx(run.published, rel=0.0043)
        # The same in the unit that it should have: the carbon intensity cancels.
        assert taken_off.low * taken_off.net(run) == pytest.approx(taken, rel=1e-3)


def test_the_page_has_the_saving_gross_and_net_and_is_what_the_script_writes():
    saving = {"published": -23.2, "net": -23.2, "gross": -7.7, "gpu": -13.7}
    for key, expected in saving.items():
        found = module.change(RUNS, "mmlu_latency_b1", key)
        assert found == pytest.approx(expected, abs=0.05)
    page = module.PAGE.read_text(encoding="utf-8")
    assert page.partition(module.BEGIN)[2] == module.as_markdown() + "\n"
