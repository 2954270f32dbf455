"""Every command that README and documentation show is one that its program accepts.

The commands are parsed, by the parsers of the programs themselves, and not run.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import runpy
import shlex
import sys
from typing import TYPE_CHECKING

import pytest
from lm_eval.__main__ import cli_evaluate

from lm_eval_pruned import cli
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from tests.helpers.checkpoints import ROOT


if TYPE_CHECKING:
    from collections.abc import Iterator

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: Pages for contributors, and those of the tasks: their Python is parts of files, no examples.
OTHERS = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "tasks").rglob("*.md"))]
#: Programs of others, whose commands no parser of ours knows.
NOT_PARSED = "vllm pip cd source . echo git mkdocs pre-commit tox python python3 sh"
#: Arguments that HFLM hands on to transformers, and that its signatures do not name.
FROM_PRETRAINED = {"load_in_8bit", "tp_plan"}
FENCED = re.compile(r"(?ms)^ *```(\w+)$(.*?)^ *```$")


def commands(text: str) -> Iterator[tuple[str, ...]]:
    """Give the words of the commands of shell blocks, one for each part of an ``&&`` chain."""
    for language, inside in FENCED.findall(text):
        shown = [inside] if language in ("bash", "sh") else []
        if language == "console":
            shown = re.findall(r"(?m)^\$ ((?:.*\\\n)*.*)", inside)
        for line in "\n".join(shown).replace("\\\n", " ").splitlines():
            words: list[str] = []
            for word in [*shlex.split(line, comments=True), "&&"]:
                if word != "&&":
                    words.append(word)
                elif words:
                    yield tuple(words)
                    words = []


COMMANDS = [
    pytest.param(words, id=f"{path.relative_to(ROOT)}: {' '.join(words)[:60]}")
    for path in (*PAGES, *OTHERS)
    for words in commands(path.read_text("utf-8"))
]


class ParsedError(BaseException):
    """Thrown in place of running what was parsed; nothing that runs catches it."""


@pytest.fixture
def parse(monkeypatch):
    """Return a function that calls a program until it has parsed its arguments."""
    original = argparse.ArgumentParser.parse_args
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def stop(self, args=None, namespace=None):
        raise ParsedError(original(self, args, namespace))

    def parse(call, *arguments: str) -> argparse.Namespace:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["program", *arguments])
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            with pytest.raises(ParsedError) as parsed:
                call()
        return parsed.value.args[0]

    return parse


def check_names(parsed) -> None:
    """Fail for an argument of `pruned-hf`, or a task of ours, that does not exist."""
    given = getattr(parsed, "model_args", None) or []
    if getattr(parsed, "model", None) in (None, "pruned-hf", "hf-prefix"):
        words = [given] if isinstance(given, str) else given
        pairs = [pair for word in words for pair in word.split(",") if "=" in pair]
        names = {pair.partition("=")[0] for pair in pairs}
        names |= {*given} if isinstance(given, dict) else set()
        assert names <= PrunedHFLM.argument_names() | FROM_PRETRAINED
    tasks = getattr(parsed, "tasks", None) or []
    files = "".join(f.read_text("utf-8") for f in (ROOT / "tasks").rglob("*.yaml"))
    for name in ",".join([tasks] if isinstance(tasks, str) else tasks).split(","):
        if name.startswith("pruned_"):
            assert re.search(rf"(?m)^[ -]*(task|group): *{name}$", files), name


def check(words: tuple[str, ...], parse) -> None:
    """Fail unless the program of the command accepts its arguments."""
    while words and re.match(r"[A-Z_]+=", words[0]):  # the environment of the command
        words = () if "=$(" in words[0] else words[1:]
    program, *arguments = words or ("echo",)
    match program.rpartition("/")[2]:
        case "lm_eval" | "lm-eval":
            check_names(parse(cli_evaluate, *arguments))
        case "lm-eval-pruned" | "lm_eval_pruned":
            check_names(parse(cli.main, *arguments))
        case "accelerate" | "torchrun" | "srun":
            # What it starts is a program, the module of one, or "$(which PROGRAM)".
            found = [re.search(r"lm[-_]eval([-_]pruned)?", word) for word in arguments]
            at, started = next((n, each[0]) for n, each in enumerate(found) if each)
            check((started, *arguments[at + 1 :]), parse)
        case "python" | "sh" if arguments[0].startswith("benchmarks/"):
            script = ROOT / arguments[0].replace(".sh", ".py")
            run = lambda: runpy.run_path(str(script), run_name="__main__")
            parse(run, *arguments[1:])
        case name:
            assert name in NOT_PARSED.split(), f"no parser is known for {name}"


@pytest.mark.parametrize("words", COMMANDS)
def test_the_command_is_accepted(words, parse, capsys):
    check(words, parse)
    assert "is an old name" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        "lm_eval --model pruned-hf --model_args rato=2.0 --tasks pruned_demo",
        "lm_eval --model pruned-hf --model_args ratio=2.0 --tasks pruned_domo",
        "torchrun --standalone --nproc 2 -m lm_eval --modle pruned-hf",
        "python benchmarks/rounding.py --no-such-option",
    ],
)
def test_a_command_that_is_wrong_is_not_accepted(wrong, parse):
    with pytest.raises((AssertionError, SystemExit)):
        check(tuple(shlex.split(wrong)), parse)


def test_what_the_python_examples_import_exists():
    for page in PAGES:
        for language, inside in FENCED.findall(page.read_text("utf-8")):
            for node in ast.walk(ast.parse(inside * (language == "python"))):
                if isinstance(node, ast.Import):
                    for alias in node.names:
                        importlib.import_module(alias.name)
                elif isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(str(node.module))
                    assert all(hasattr(module, alias.name) for alias in node.names)


def test_the_first_hour_runs_what_the_pages_show(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for line in importlib.import_module("first_hour").COMMANDS.strip().splitlines():
        name, _, command = line.split(maxsplit=2)
        folder = ROOT if name == "README.md" else ROOT / "docs"
        page = (folder / name).read_text("utf-8")
        shown = command.replace(
            "2m --output_path distilled", "20m --output_path pruned"
        )
        names = ("NAME", "HuggingFaceTB/SmolLM2-135M-Instruct")
        assert any(shown.replace("$NAME", name) in page for name in names), command
