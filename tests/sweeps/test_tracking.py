"""Units of a sweep on W&B, Trackio and the Hub: one run each, refused early, never in the way."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from lm_eval.loggers import EvaluationTracker

from lm_eval_pruned.cli import main
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from lm_eval_pruned.sweeps.run import run_sweep
from tests.helpers import trackers
from tests.helpers.sweeping import results_of, sweep_options, write_tasks


pytestmark = pytest.mark.usefixtures("quick")


UNITS = [
    f"{configuration} {task}"
    for configuration in ("baseline", "ratio-1.5")
    for task in ("tiny_choice", "tiny_sentence")
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def options(tiny_llama, tasks, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return sweep_options(tiny_llama, tasks, tmp_path / "sweep", tasks=["tiny_choice"])


@pytest.fixture
def services(monkeypatch, tmp_path):
    return trackers.install(monkeypatch, tmp_path / "packages")


@pytest.fixture
def hub(monkeypatch):
    return trackers.stand_in_for_the_hub(monkeypatch)


@pytest.mark.slow
def test_each_unit_is_a_run_of_its_own(options, services):
    told = {
        "wandb_args": {"project": "p", "name": "mine", "step": 3},
        "wandb_config_args": {"cluster": "a"},
        "trackio_args": {"project": "q"},
    }
    given = json.dumps(told)
    assert run_sweep({**options, "tasks": ["tiny_both"], **told}) == 0
    assert json.dumps(told) == given, "the harness takes keys out of what it gets"
    calls = services.wandb()
    starts = [call for call in calls if call["what"] == "init"]
    assert [call["name"] for call in starts] == [f"mine {unit}" for unit in UNITS]
    assert {call["project"] for call in starts} == {"p"}
    assert [call["exit_code"] for call in calls if call["what"] == "finish"] == [0] * 4
    assert sum(call.get("keys") == ["cluster"] for call in calls) == 4
    logged = [key for call in calls if call["what"] == "log" for key in call["keys"]]
    assert logged.count("tiny_choice/acc") == 2
    assert logged.count("tiny_choice_eval_results") == 2
    assert {call["step"] for call in calls if call["what"] == "log"} == {3}
    assert [call["name"] for call in services.trackio() if "name" in call] == UNITS
    keys = [key for call in services.trackio() for key in call.get("keys", ())]
    assert keys.count("tiny_choice/sample") == 8
    assert [call["what"] for call in services.trackio()].count("finish") == 4


@pytest.mark.slow
def test_results_are_those_of_a_sweep_that_tells_nobody(options, services, tmp_path):
    quiet = {**options, "output_path": str(tmp_path / "quiet")}
    assert run_sweep(quiet) == 0
    told = {**options, "wandb_args": {"project": "secret-p"}}
    assert run_sweep(told) == 0
    folders = [Path(each["output_path"]) for each in (quiet, told)]
    assert results_of(folders[0]) == results_of(folders[1])
    assert not any(
        b"secret-p" in path.read_bytes() for path in folders[1].rglob("*.json")
    )
    # A finished unit stays finished, whoever hears of it.
    before = len(services.wandb())
    assert run_sweep({**told, "wandb_args": {"project": "other"}}) == 0
    assert len(services.wandb()) == before


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"wandb_args": {"project": "refused"}}, "was not logged to W&B: RuntimeError"),
        ({"trackio_args": {"project": "p"}}, "was not logged to Trackio: RuntimeError"),
    ],
)
def test_a_service_that_fails_leaves_the_results(
    options, services, monkeypatch, caplog, broken, message
):
    monkeypatch.setattr(
        "lm_eval.loggers.TrackioLogger.log_eval_result",
        lambda self: (_ for _ in ()).throw(RuntimeError("no network")),
    )
    assert run_sweep({**options, **broken}) == 0
    assert len(results_of(Path(options["output_path"]))) == 2
    assert message in caplog.text
    assert "baseline tiny_choice" in caplog.text


def test_results_on_the_hub(options, hub, monkeypatch):
    cards = []
    monkeypatch.setattr(
        EvaluationTracker,
        "recreate_metadata_card",
        lambda self: cards.append(self.details_repo_private),
    )
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    arguments = {"push_results_to_hub": True, "push_samples_to_hub": True}
    assert run_sweep({**options, "hf_hub_log_args": arguments}) == 0
    assert [call for call in hub if call[0] == "whoami"] == [
        ("whoami", {"token": "hf_of_a_test"})
    ]
    places = [call["path_in_repo"] for name, call in hub if name == "upload_file"]
    assert len(places) == 2
    assert "_baseline/results_" in places[0]
    assert "_ratio-1.5/results_" in places[1]
    folders = [call["path_in_repo"] for name, call in hub if name == "upload_folder"]
    assert [each.rpartition("_")[2] for each in folders] == ["baseline", "ratio-1.5"]
    assert cards == ["somebody/lm-eval-results-private"] * 2
    written = Path(options["output_path"])
    assert not any(
        b"hf_of_a_test" in path.read_bytes()
        for path in written.rglob("*")
        if path.is_file()
    )


def test_a_hub_without_a_card_leaves_the_results(options, hub, monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    arguments = {"push_results_to_hub": True, "hub_results_org": "o"}
    assert run_sweep({**options, "hf_hub_log_args": arguments}) == 0
    assert "the card of o/lm-eval-results was not written" in caplog.text
    assert not any(name == "whoami" for name, _ in hub)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"wandb_args": {"id": "x"}}, "wandb_args has id=x, but each unit is a run"),
        ({"hf_hub_log_args": {"push": True}}, "hf_hub_log_args cannot be used.*push"),
        ({"hf_hub_log_args": {"push_results_to_hub": True}}, "token is not defined"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(
    options, services, monkeypatch, arguments, message
):
    monkeypatch.setattr(PrunedHFLM, "__init__", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        run_sweep({**options, **arguments})
    assert not Path(options["output_path"]).exists()


def test_a_hub_that_cannot_be_reached(options, hub, monkeypatch):
    def unreachable(self):
        raise RuntimeError("no route")

    monkeypatch.setattr(sys.modules["huggingface_hub"].HfApi, "whoami", unreachable)
    monkeypatch.setattr(PrunedHFLM, "__init__", lambda *_, **__: pytest.fail("loaded"))
    arguments = {"push_results_to_hub": True, "token": "hf_of_a_test"}
    with pytest.raises(ValueError, match=r"no route.*hub_results_org"):
        run_sweep({**options, "hf_hub_log_args": arguments})


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_missing_package_is_named(options, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"pip install {package}"):
        run_sweep({**options, f"{package}_args": {"project": "p"}}, dry_run=True)


def test_the_command_and_the_file(options, services, tmp_path, capsys):
    words = [
        *("sweep", "--model_args", f"pretrained={options['model_args']['pretrained']}"),
        *("--prune_percents", "0", "--tasks", "tiny_choice", "--device", "cpu"),
        *("--include_path", options["include_path"]),
        *("--output_path", options["output_path"]),
    ]
    assert main([*words, "--dry_run", "--wandb_args", "project"]) == 2
    assert (
        "--wandb_args is ['project'] (expected `key=value`" in capsys.readouterr().err
    )
    file = tmp_path / "sweep.yaml"
    file.write_text("wandb_args:\n  project: of the file\ntrackio_args: project=q\n")
    assert main([*words, "--config", str(file)]) == 0
    assert {c["project"] for c in services.wandb() if "project" in c} == {"of the file"}
    assert {c["project"] for c in services.trackio() if "project" in c} == {"q"}
