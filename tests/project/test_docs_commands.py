"""Every command that README and documentation show is one that its program accepts.

The commands are parsed, by the parsers of the programs themselves, and not run.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import re
import runpy
import shlex
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.helpers.checkpoints import ROOT


if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += sorted((ROOT / "docs").rglob("*.ipynb"))
#: Pages for contributors, and those of the tasks: their Python is parts of files, no examples.
OTHERS = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "tasks").rglob("*.md"))]
#: Programs of others, whose commands no parser of ours knows.
NOT_PARSED = {
    *("vllm", "pip", "cd", "source", ".", "echo", "git", "mkdocs", "pre-commit"),
}
MODULES = {"lm_eval": "lm_eval", "lm_eval_pruned.cli": "lm-eval-pruned"}
#: A command in a cell of a notebook, without where its output goes.
IN_A_CELL = re.compile(r"(?:\w+ = )?!(.+?)(?: 2?> \S+)*")
#: Arguments that HFLM hands on to transformers, in whose signatures they do not stand.
FROM_PRETRAINED = {"load_in_8bit", "tp_plan"}


class Command(NamedTuple):
    page: str
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {' '.join(self.words)[:60]}"


def read(page: Path) -> str:
    """Return a page as Markdown: the commands in the cells of a notebook are shell blocks."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        lines = source.replace("\\\n", " ").splitlines()
        shell = [found[1] for line in lines if (found := IN_A_CELL.fullmatch(line))]
        python = [each for each in lines if not re.match(r"%|(\w+ = )?!", each)]
        parts += ["\n".join(["```bash", *shell, "```", "```python", *python, "```"])]
    return "\n\n".join(parts)


def blocks(text: str) -> Iterator[tuple[str, int, list[str]]]:
    """Give language, number of the first line and lines of every fenced block."""
    fence, language, start, inside = "", "", 0, []
    for number, line in enumerate(text.splitlines(), 1):
        if fence and line.strip() == fence:
            yield language, start, inside
            fence = ""
        elif fence:
            inside.append(line)
        elif found := re.match(r"\s*(```+)\s*(\w*)", line):
            fence, language = found.groups()
            start, inside = number + 1, []


def commands(page: str, text: str) -> Iterator[Command]:
    """Give the commands of all shell blocks, one for each part of an ``&&`` chain."""
    for language, start, lines in blocks(text):
        if language == "console":
            shown = re.findall(r"(?m)^\$ ((?:.*\\\n)*.*)", "\n".join(lines))
        elif language in ("bash", "sh"):
            shown = ["\n".join(lines)]
        else:
            continue
        for line in "\n".join(shown).replace("\\\n", " ").splitlines():
            words: list[str] = []
            for word in [*shlex.split(line, comments=True), "&&"]:
                if word != "&&":
                    words.append(word)
                elif words:
                    yield Command(page, start, tuple(words))
                    words = []


COMMANDS = [
    command
    for path in [*PAGES, *OTHERS]
    for command in commands(path.relative_to(ROOT).as_posix(), read(path))
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
    """Fail for an argument of `pruned-hf`, or a task of ours, that there is not."""
    from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM

    given = getattr(parsed, "model_args", None) or []
    if getattr(parsed, "model", None) in (None, "pruned-hf", "hf-prefix"):
        words = [given] if isinstance(given, str) else given
        pairs = [pair for word in words for pair in word.split(",") if "=" in pair]
        names = set(given) if isinstance(given, dict) else pairs
        known = FROM_PRETRAINED | {
            name
            for kind in PrunedHFLM.__mro__[:-1]
            if "__init__" in vars(kind)
            for name in inspect.signature(vars(kind)["__init__"]).parameters
        }
        assert {name.partition("=")[0] for name in names} <= known
    tasks = getattr(parsed, "tasks", None) or []
    files = "".join(f.read_text("utf-8") for f in (ROOT / "tasks").rglob("*.yaml"))
    for name in ",".join([tasks] if isinstance(tasks, str) else tasks).split(","):
        if name.startswith("pruned_"):
            assert re.search(rf"(?m)^[ -]*(task|group): *{name}$", files), name


def check(words: tuple[str, ...], parse) -> None:
    """Fail unless the program of the command accepts its arguments."""
    while words and re.match(r"[A-Z_]+=", words[0]):  # the environment of the command
        words = () if "=$(" in words[0] else words[1:]
    if not words:
        return
    program, arguments = words[0].rpartition("/")[2], words[1:]
    match program:
        case "lm_eval" | "lm-eval":
            from lm_eval.__main__ import cli_evaluate

            check_names(parse(cli_evaluate, *arguments))
        case "lm-eval-pruned":
            from lm_eval_pruned.cli import main

            check_names(parse(main, *arguments))
        case "accelerate" | "torchrun":
            check(launched(arguments), parse)
        case "srun":
            check(arguments, parse)
        case "python" | "python3":
            check_python(arguments, parse)
        case "sh":
            check_python((arguments[0].replace(".sh", ".py"), *arguments[1:]), parse)
        case "tox":
            sections = re.findall(
                r"(?m)^\[testenv:(.+)\]", (ROOT / "tox.ini").read_text()
            )
            known = {name for each in sections for name in re.split(r"[{},]", each)}
            if arguments[:1] == ("-e",):
                assert {*arguments[1].split(",")} <= known | {"py"}
        case _:
            assert program in NOT_PARSED, f"no parser is known for {program}"


def launched(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """Return the command that accelerate or torchrun starts."""
    for number, word in enumerate(arguments):
        if word == "-m":
            return ("python", *arguments[number:])
        if found := re.fullmatch(r"\$\(which (\S+)\)", word):
            return (found[1], *arguments[number + 1 :])
    raise AssertionError(arguments)


def check_python(arguments: tuple[str, ...], parse) -> None:
    """Fail unless the module or script is there and takes the arguments."""
    if arguments[0] == "-c":
        compile(arguments[1], "documentation", "exec")
    elif arguments[0] == "-m":
        if arguments[1] not in ("venv", "pip", "pytest"):
            check((MODULES[arguments[1]], *arguments[2:]), parse)
    elif not (script := ROOT / arguments[0]).is_file():
        # Or of a checkout of the harness, with one of our patches.
        patches = (ROOT / "docs" / "upstream" / "patches").glob("*.patch")
        assert any(f"+++ b/{arguments[0]}\n" in each.read_text() for each in patches)
    elif script.parent.name == "benchmarks":
        parse(lambda: runpy.run_path(str(script), run_name="__main__"), *arguments[1:])


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_the_command_is_accepted(command, parse, capsys):
    check(command.words, parse)
    assert "is an old name" not in capsys.readouterr().err


def test_commands_are_found():
    assert {"lm_eval", "lm-eval-pruned", "torchrun"} <= {c.words[0] for c in COMMANDS}


@pytest.mark.parametrize(
    "wrong",
    [
        "lm_eval --model pruned-hf --no_such_option 1",
        "lm_eval --model pruned-hf --model_args rato=2.0 --tasks pruned_demo",
        "lm_eval --model pruned-hf --model_args ratio=2.0 --tasks pruned_domo",
        "lm-eval-pruned sweep --model_args pretrain=x --ratios 2 --tasks boolq --output_path x",
        "torchrun --standalone --nproc 2 -m lm_eval --modle pruned-hf",
        "python benchmarks/load_memory.py --no-such-option",
        "python -m lm_eval_pruned",
        "python benchmarks/gone.py",
        "tox -e gone",
    ],
)
def test_a_command_that_is_wrong_is_not_accepted(wrong, parse):
    with pytest.raises((AssertionError, KeyError, SystemExit)):
        check(tuple(shlex.split(wrong)), parse)


def test_what_the_python_examples_import_is_there():
    for path in PAGES:
        for language, _, lines in blocks(read(path)):
            for node in ast.walk(ast.parse("\n".join(lines) * (language == "python"))):
                if isinstance(node, ast.Import):
                    for alias in node.names:
                        importlib.import_module(alias.name)
                elif isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(str(node.module))
                    assert not [
                        a.name for a in node.names if not hasattr(module, a.name)
                    ]


def test_the_page_of_the_command_line_holds_every_command():
    from lm_eval_pruned.cli import COMMANDS as OURS

    page = runpy.run_path(str(ROOT / "docs" / "site_hooks.py"))["commands"]()
    for name in OURS:
        assert f"\n## {name}\n" in page
        assert f"usage: lm-eval-pruned {name} " in page


def test_a_page_that_loads_from_another_host_is_refused():
    hook = runpy.run_path(str(ROOT / "docs" / "site_hooks.py"))["on_post_page"]
    page = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    harmless = '<a href="https://arxiv.org">x</a><img src="a.svg"><script>1</script>'
    assert hook(harmless, page=page) == harmless
    with pytest.raises(ValueError, match="another host"):
        hook(f"{harmless}<img alt='' src='//images.example/a.png'>", page=page)
