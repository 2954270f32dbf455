"""What holds for every command: how it ends when it is stopped, or lacks a package."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

from lm_eval_pruned import cli


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
    "study-energy": [],
}
#: Modules of the extras, which the README's command need not have installed.
OPTIONAL = ("gguf", "matplotlib", "ray", "vl_convert", "vllm")


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
        ("matplotlib.colors", "report"),
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
