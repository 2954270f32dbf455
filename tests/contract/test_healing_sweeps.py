"""What docs/healing.md promises of ``sweep --heal``."""

from __future__ import annotations

import json

import pytest

from tests.contract.commands import pruned
from tests.contract.test_healing import TEXTS, TRAINING
from tests.helpers import evaluations
from tests.helpers.sweeping import errors_of, files_of, write_tasks
from tests.helpers.ways_to_load import write_texts
from tests.sweeps.conftest import quick  # noqa: F401


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "data.jsonl", TEXTS)


@pytest.fixture(scope="module")
def sweep_of(tiny_llama, data, tmp_path_factory):
    """Return the command of a sweep of one size, before and after training."""
    made = write_tasks(tmp_path_factory.mktemp("tasks"))
    training = dict(
        pair.split("=") for pair in TRAINING.split(",") if "use" not in pair
    )

    def sweep_of(folder, *heal, words=(), size=("--prune_percents", 40), saved=2):
        heal = heal or (f"data={data}",)
        heal = ("max_length=32", "max_steps=2", *heal)
        return pruned(
            *("sweep", "--model_args", f"pretrained={tiny_llama}", *size),
            *("--tasks", "tiny_choice", "--include_path", made, "--device", "cpu"),
            *("--floors", "no", "--output_path", folder, *words, "--heal", *heal),
            f"training_args={json.dumps({**training, 'save_steps': saved})}",
        )

    return sweep_of


CONFIGURATIONS = ["baseline", "prune_percent-40", "prune_percent-40_healed"]


@pytest.fixture(scope="module")
def swept(sweep_of, tmp_path_factory):
    """The folder of that sweep."""
    folder = tmp_path_factory.mktemp("sweep")
    done = sweep_of(folder)
    assert done.code == 0, done.err
    return folder


def test_each_size_of_a_sweep_is_evaluated_before_and_after(swept):
    assert sorted(files_of(swept)) == [f"{name}/tiny_choice" for name in CONFIGURATIONS]
    before, after = (
        evaluations.results(swept / "units" / name)["config"]
        for name in CONFIGURATIONS[1:]
    )
    assert "healing" not in before
    assert after["pruning"] == before["pruning"]
    # One way of training, whose checkpoints are gone.
    kept = (swept / "adapters" / CONFIGURATIONS[2]).iterdir()
    (adapter,) = (path for path in kept if path.is_dir())
    record = json.loads((adapter / "healing.json").read_text())
    assert record == after["healing"] | {"pruning": after["pruning"]}
    compared = pruned("compare", swept)
    assert all(name in compared.out for name in CONFIGURATIONS[1:])


def test_each_adapter_is_trained_once_and_another_text_trains_another(
    sweep_of, swept, data, tmp_path
):
    def files():
        adapters = swept.glob("adapters/*/*/adapter_model.safetensors")
        return {path: path.stat().st_mtime_ns for path in adapters}

    first = files()
    # What counts is the content.
    moved = write_texts(tmp_path / "moved.jsonl", TEXTS)
    done = sweep_of(swept, f"data={moved}")
    assert "3 done, 0 failed before, 0 to run" in done.out
    assert files() == first
    other = write_texts(tmp_path / "other.jsonl", TEXTS[1:])
    done = sweep_of(swept, f"data={other}")
    assert "2 done, 0 failed before, 1 to run" in done.out
    assert first.items() < files().items()


@pytest.mark.slow
def test_a_failed_training_fails_only_its_units_and_retry_failed_continues_it(
    sweep_of, swept, tmp_path
):
    """A file lies where the last checkpoint of the same training is to be written."""
    obstacles = []
    for file in swept.glob("adapters/*/*/adapter_model.safetensors"):
        adapter = tmp_path / file.parent.relative_to(swept)
        checkpoints = adapter.with_name(f"{adapter.name}.checkpoints")
        checkpoints.mkdir(parents=True)
        obstacles.append(checkpoints / "checkpoint-2")
        obstacles[-1].touch()
    assert sweep_of(tmp_path, saved=1).code == 1
    assert [*errors_of(tmp_path)] == [f"{CONFIGURATIONS[2]}/tiny_choice"]
    (left,) = tmp_path.glob("adapters/*/*/checkpoint-1/healing.json")
    # What was spent before counts, which a training from the start does not know.
    record = json.loads(left.read_text())
    left.write_text(json.dumps(record | {"seconds": 1e6}))
    for obstacle in obstacles:
        obstacle.unlink()
    done = sweep_of(tmp_path, saved=1, words=("--retry_failed",))
    assert done.code == 0, done.out + done.err
    (trained,) = tmp_path.glob("adapters/*/*/healing.json")
    record = json.loads(trained.read_text())
    assert (record["steps"], record["seconds"] > 1e6 - 1) == (2, True)


@pytest.mark.slow
def test_a_report_tests_after_against_before_and_lists_the_cost(swept):
    assert pruned("report", swept).code == 0
    report = (swept / "report" / "report.md").read_text()
    _, after = report.split("## Healing, compared with no healing")
    assert "|prune_percent-40_healed (1.66) against prune_percent-40|" in after
    assert "steps 2, tokens_seen 128, seconds" in after


@pytest.mark.parametrize(
    ("heal", "words", "message"),
    [
        ("teacher_weight=0.5", "", "add data=FILE"),
        ("data=DATA max_step=3", "", "did you mean max_steps"),
        ("data=DATA max_length=5000", "", "512 positions"),
        ("data=DATA method=full", "", "pass method=lora"),
        ("data=DATA", "--model pruned-vllm", "model=pruned-vllm"),
        ("data=DATA", "--ray", "leave out --ray"),
        ("data=DATA", "--model_args pretrained=TINY peft=x", "model_args has peft=x"),
        ("data=DATA", "--model_args pretrained=TINY delta=x", "model_args has delta=x"),
        ("data=DATA", "--model_args pretrained=TINY load_in_8bit=true", "load_in_8bit"),
    ],
)
def test_what_a_sweep_cannot_heal_is_refused_before_a_model_is_loaded(
    heal, words, message, sweep_of, data, tiny_llama, tmp_path
):
    heal = heal.replace("DATA", data).split()
    words = words.replace("TINY", str(tiny_llama)).split()
    assert message in sweep_of(tmp_path / "out", *heal, words=words).sentence
    assert not (tmp_path / "out").exists()


def test_a_launcher_of_several_processes_is_refused(sweep_of, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without a launcher" in sweep_of(tmp_path / "out").sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("size", "heal", "message"),
    [
        ([], [], "add sizes"),
        (["--drop_layers", 1], ["teacher_weight=1"], "no size"),
    ],
)
def test_a_sweep_without_a_size_has_nothing_to_heal(
    size, heal, message, sweep_of, data, tmp_path
):
    done = sweep_of(tmp_path / "out", f"data={data}", *heal, size=size)
    assert message in done.sentence
