"""Units of a sweep on W&B and Trackio: one run each, refused early, never in the way."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from lm_eval_pruned.sweeps.run import run_sweep
from tests.helpers.sweeping import results_of


UNITS = ["baseline tiny_choice", "ratio-1.5 tiny_choice"]


@pytest.fixture
def options(options):
    return {**options, "tasks": ["tiny_choice"]}


@pytest.fixture
def services(monkeypatch):
    """Stand-ins for wandb and trackio, which note what they are called with."""
    monkeypatch.setitem(sys.modules, "wandb.sdk.lib.printer", MagicMock())
    modules = []
    for name in ("wandb", "trackio"):
        module = MagicMock(
            __version__="0.99", __spec__=ModuleSpec(name, None), run=None
        )
        module.init.return_value = module
        monkeypatch.setitem(sys.modules, name, module)
        modules.append(module)
    return modules


@pytest.mark.slow
def test_each_unit_is_a_run(options, services):
    told = {
        "wandb_args": {"project": "secret-p", "name": "mine", "step": 3},
        "wandb_config_args": {"cluster": "a"},
        "trackio_args": {"project": "q"},
    }
    assert run_sweep({**options, **told}) == 0
    for service, before, samples in zip(services, ("mine ", ""), (0, 8), strict=True):
        named = [call.kwargs["name"] for call in service.init.call_args_list]
        assert named == [before + unit for unit in UNITS]
        keys = [key for call in service.log.call_args_list for key in call.args[0]]
        assert keys.count("tiny_choice/acc") == service.finish.call_count == 2
        assert keys.count("tiny_choice/sample") == samples
    services[0].config.update.assert_any_call({"cluster": "a"})
    written = Path(options["output_path"]).rglob("*.json")
    assert not any(b"secret-p" in path.read_bytes() for path in written)
    # A finished unit stays finished, whoever hears of it.
    assert run_sweep({**options, "wandb_args": {"project": "other"}}) == 0
    assert services[0].init.call_count == 2


@pytest.mark.parametrize("place", [0, 1])
def test_a_service_is_refused_early_and_leaves_the_results_if_it_fails(
    options, services, monkeypatch, caplog, place
):
    name = ("wandb", "trackio")[place]
    options[f"{name}_args"] = {"project": "refused"}
    services[place].init.side_effect = RuntimeError("not logged in")
    assert run_sweep(options) == 0
    assert len(results_of(options["output_path"])) == 2
    assert f"{UNITS[0]} was not logged to" in caplog.text
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"pip install {name}"):
        run_sweep(options)
