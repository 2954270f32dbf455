"""Units of a sweep on W&B and Trackio: one run each, refused early, never in the way."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lm_eval_pruned.sweeps.run import run_sweep
from tests.helpers import trackers
from tests.helpers.sweeping import results_of


UNITS = ["baseline tiny_choice", "ratio-1.5 tiny_choice"]


@pytest.fixture
def options(options):
    return {**options, "tasks": ["tiny_choice"]}


@pytest.fixture
def calls(monkeypatch, tmp_path):
    return trackers.install(monkeypatch, tmp_path / "packages")


@pytest.mark.slow
def test_each_unit_is_a_run_and_its_results_are_the_same(options, calls, tmp_path):
    quiet = {**options, "output_path": str(tmp_path / "quiet")}
    assert run_sweep(quiet) == 0
    told = {
        "wandb_args": {"project": "secret-p", "name": "mine", "step": 3},
        "wandb_config_args": {"cluster": "a"},
        "trackio_args": {"project": "q"},
    }
    given = json.dumps(told)
    assert run_sweep({**options, **told}) == 0
    assert json.dumps(told) == given, "the harness takes keys out of what it gets"
    for service, names, logged in (
        ("wandb", [f"mine {unit}" for unit in UNITS], "tiny_choice/acc"),
        ("wandb", [f"mine {unit}" for unit in UNITS], "cluster"),
        ("trackio", UNITS, "tiny_choice/sample"),
    ):
        found = calls(service)
        assert [call["name"] for call in found if call.get("name")] == names
        keys = [key for call in found for key in call.get("keys", ())]
        assert keys.count(logged) == (8 if "sample" in logged else 2)
        assert [call["what"] for call in found].count("finish") == 2
    written = Path(options["output_path"])
    assert results_of(written) == results_of(tmp_path / "quiet")
    assert not any(b"secret-p" in path.read_bytes() for path in written.rglob("*.json"))
    # A finished unit stays finished, whoever hears of it.
    before = calls("wandb")
    assert run_sweep({**options, "wandb_args": {"project": "other"}}) == 0
    assert calls("wandb") == before


@pytest.mark.parametrize("service", ["wandb", "trackio"])
def test_a_service_that_fails_leaves_the_results(
    options, calls, monkeypatch, caplog, service
):
    def unreachable(self):
        raise RuntimeError("no network")

    logger = "lm_eval.loggers.TrackioLogger.log_eval_result"
    monkeypatch.setattr(logger, unreachable)
    assert run_sweep({**options, f"{service}_args": {"project": "refused"}}) == 0
    assert len(results_of(options["output_path"])) == 2
    assert f"{UNITS[0]} was not logged to" in caplog.text


@pytest.mark.parametrize(
    ("package", "given", "message"),
    [
        ("wandb", {"id": "x"}, "wandb_args has id=x"),
        ("wandb", {"project": "p"}, "pip install wandb"),
        ("trackio", {"project": "p"}, "pip install trackio"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(
    options, calls, monkeypatch, package, given, message
):
    if "pip" in message:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=message):
        run_sweep({**options, f"{package}_args": given})
    assert not Path(options["output_path"]).exists()
