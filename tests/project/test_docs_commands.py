"""Every command that README and documentation show is one that its program accepts.

The commands are parsed, by the parsers of the programs themselves, and not run: most of them
name models of the Hub, and many need a GPU. An option that no longer exists fails here.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import inspect
import json
import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import yaml

from tests.helpers import checkpoints


if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ROOT = checkpoints.ROOT
NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *NOTEBOOKS]
#: Pages for contributors, and those of the tasks: parts of files stand there, no whole examples.
OTHERS = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "tasks").rglob("*.md"))]
#: Programs of others, whose commands no parser of ours knows, and why that is no loss.
NOT_PARSED = {
    "vllm": "not installed here; tests/model_wrappers/test_vllm_runs.py serves so",
    "pip": "installs; test_packaging.py builds and installs what it would",
    "cd": "a command of the shell",
    "source": "a command of the shell",
    ".": "a command of the shell",
    "echo": "a command of the shell",
    "git": "clones and commits",
    "mkdocs": "builds the site; `tox -e docs` does it",
    "pre-commit": "runs hooks that .pre-commit-config.yaml names",
}
#: What begins a line that is a command, wherever it stands.
PROGRAMS = re.compile(
    r"\s*(?:\$ )?(?:[A-Z_]+=\S+ )*"
    r"(?:lm_eval|lm-eval-pruned|python3?|pip|tox|accelerate|torchrun|srun|sh)\s+[-\w./\"']"
)
#: A command in a cell of a notebook, without where its output goes.
IN_A_CELL = re.compile(r"(?:\w+ = )?!(.+?)(?: 2?> \S+)*")
#: Arguments that HFLM hands on to transformers, in whose signatures they do not stand.
FROM_PRETRAINED = {"load_in_8bit", "tp_plan"}


@dataclass(frozen=True)
class Command:
    """One command of a page."""

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
        python, shell = ["```python"], ["```bash"]
        for line in source.replace("\\\n", " ").splitlines():
            if found := IN_A_CELL.fullmatch(line):
                shell.append(found[1])
            elif not line.startswith("%"):
                python.append(line)
        parts += ["\n".join([*lines, "```"]) for lines in (python, shell)]
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
    assert not fence, "a block that does not end"


def commands(page: str, text: str) -> Iterator[Command]:
    """Give the commands of all shell blocks, one for each part of an ``&&`` chain."""
    for language, start, lines in blocks(text):
        if language not in ("bash", "console", "sh"):
            continue
        joined, begin = "", start
        for number, line in enumerate(lines, start):
            if not joined:
                begin = number
                if language == "console":
                    if not line.startswith("$ "):
                        continue
                    line = line[2:]
            joined += line
            if joined.endswith("\\"):
                joined = joined[:-1]
                continue
            words: list[str] = []
            for word in [*shlex.split(joined, comments=True), "&&"]:
                if word != "&&":
                    words.append(word)
                elif words:
                    yield Command(page, begin, tuple(words))
                    words = []
            joined = ""


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

    def stop(self, args=None, namespace=None):
        raise ParsedError(original(self, args, namespace))

    def parse(call, *arguments: str) -> argparse.Namespace:
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
        try:
            with pytest.raises(ParsedError) as parsed:
                call()
        except SystemExit:
            pytest.fail(f"not accepted: {' '.join(arguments)}")
        finally:
            monkeypatch.setattr(argparse.ArgumentParser, "parse_args", original)
        return parsed.value.args[0]

    return parse


def model_arguments() -> set[str]:
    """Return the names that ``--model_args`` takes for `pruned-hf`."""
    from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM

    return FROM_PRETRAINED | {
        name
        for kind in PrunedHFLM.__mro__
        if "__init__" in vars(kind) and kind is not object
        for name in inspect.signature(vars(kind)["__init__"]).parameters
    }


def check_model_arguments(given) -> None:
    """Fail for an argument of `pruned-hf` that there is not."""
    words = [given] if isinstance(given, str) else given or []
    if isinstance(given, dict):
        names = set(given)
    else:
        pairs = [pair for word in words for pair in word.split(",") if "=" in pair]
        names = {pair.partition("=")[0] for pair in pairs}
    assert names <= model_arguments(), names - model_arguments()


def our_tasks() -> set[str]:
    """Return the names of the tasks and groups that the package adds."""
    named = re.compile(r"^[ -]*(?:task|group): *(\w+)$", re.MULTILINE)
    files = (ROOT / "tasks").rglob("*.yaml")
    return {name for path in files for name in named.findall(path.read_text("utf-8"))}


def check_tasks(given) -> None:
    """Fail for a task of ours that there is not."""
    words = [given] if isinstance(given, str) else given or []
    names = {name for word in words for name in word.split(",")}
    ours = {name for name in names if name.startswith("pruned_")}
    assert ours <= our_tasks(), ours - our_tasks()


def lm_eval():
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


def lm_eval_pruned():
    from lm_eval_pruned.cli import main

    main()


def check(words: tuple[str, ...], parse) -> None:
    """Fail unless the program of the command accepts its arguments."""
    if re.match(r"[A-Z_]+=\$\(", words[0]):  # a variable of the shell
        return
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):  # the environment of the command
        words = words[1:]
        if not words:
            return
    program, arguments = words[0].rpartition("/")[2], words[1:]
    if program in ("lm_eval", "lm-eval"):
        parsed = parse(lm_eval, *arguments)
        if getattr(parsed, "model", None) in ("pruned-hf", "hf-prefix"):
            check_model_arguments(parsed.model_args)
        check_tasks(getattr(parsed, "tasks", None))
    elif program == "lm-eval-pruned":
        parsed = parse(lm_eval_pruned, *arguments)
        check_model_arguments(getattr(parsed, "model_args", None))
        check_tasks(getattr(parsed, "tasks", None))
    elif program in ("accelerate", "torchrun"):
        check(launched(program, arguments), parse)
    elif program == "srun":
        check(arguments, parse)
    elif program in ("python", "python3"):
        check_python(arguments, parse)
    elif program in ("sh", "tox"):
        check_of_the_repository(program, arguments, parse)
    else:
        assert program in NOT_PARSED, f"no parser is known for {program}"


def command_of(module: str) -> str:
    """Return the command that ``python -m MODULE`` is; fail if it can not be run so."""
    found = importlib.util.find_spec(module)
    assert found is not None, module
    if found.submodule_search_locations is not None:
        assert importlib.util.find_spec(f"{module}.__main__"), module
    return {"lm_eval": "lm_eval", "lm_eval_pruned.cli": "lm-eval-pruned"}[module]


def launched(program: str, arguments: tuple[str, ...]) -> tuple[str, ...]:
    """Parse the launcher's own options; return the command that it starts."""
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(arguments)
    else:
        from accelerate.commands.launch import launch_command_parser

        assert arguments[0] == "launch"
        parsed = launch_command_parser().parse_args(arguments[1:])
    started = parsed.training_script
    if parsed.module:
        started = command_of(started)
    elif found := re.fullmatch(r"\$\(which (\S+)\)", started):
        started = found[1]
    return (started, *parsed.training_script_args)


def check_python(arguments: tuple[str, ...], parse) -> None:
    """Fail unless the module or script is there and takes the arguments."""
    if arguments[0] == "-c":
        compile(arguments[1], "documentation", "exec")
        return
    if arguments[0] == "-m":
        if arguments[1] not in ("venv", "pip", "pytest"):
            check((command_of(arguments[1]), *arguments[2:]), parse)
        return
    script = ROOT / arguments[0]
    if not script.is_file():
        # Or of a checkout of the harness, with one of our patches.
        patches = (ROOT / "docs" / "upstream" / "patches").glob("*.patch")
        assert any(f"+++ b/{arguments[0]}\n" in each.read_text() for each in patches)
        return
    if script.parent.name == "benchmarks":
        parse(lambda: runpy.run_path(str(script), run_name="__main__"), *arguments[1:])


def check_of_the_repository(program: str, arguments: tuple[str, ...], parse) -> None:
    """Fail unless the shell script or the environment of tox is there."""
    if program == "sh":
        assert (ROOT / arguments[0]).is_file(), arguments[0]
        twin = str(ROOT / arguments[0]).replace(".sh", ".py")
        if arguments[0].startswith("benchmarks/"):
            parse(lambda: runpy.run_path(twin, run_name="__main__"), *arguments[1:])
    elif arguments[:1] == ("-e",):
        sections = re.findall(
            r"^\[testenv:(.+)\]", (ROOT / "tox.ini").read_text("utf-8"), re.MULTILINE
        )
        names = {name for each in sections for name in re.split(r"[{},]", each)}
        assert {*arguments[1].split(",")} <= names | {"py"}


@pytest.fixture
def beside_the_benchmarks(monkeypatch):
    """Let scripts import their neighbours, as Python does when it runs one."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_the_command_is_accepted(command, parse, beside_the_benchmarks, capsys):
    check(command.words, parse)
    assert "is an old name" not in capsys.readouterr().err


def test_commands_are_found():
    text = "\n".join(
        [
            *(
                "```console",
                "$ lm_eval --tasks \\",
                "    a  # why",
                "a line of output",
                "```",
            ),
            *("```bash", "#!/bin/sh", "python3 -m venv x && x/bin/tox", "", "```"),
            *("```python", "lm_eval = 1", "```"),
        ]
    )
    found = [(each.line, each.words) for each in commands("page", text)]
    assert found == [
        (2, ("lm_eval", "--tasks", "a")),
        (8, ("python3", "-m", "venv", "x")),
        (8, ("x/bin/tox",)),
    ]
    programs = {each.words[0] for each in COMMANDS}
    assert {"lm_eval", "lm-eval-pruned", "python", "torchrun", "accelerate"} <= programs


@pytest.mark.parametrize(
    "wrong",
    [
        "lm_eval --model pruned-hf --no_such_option 1",
        "lm_eval --model pruned-hf --model_args rato=2.0 --tasks pruned_demo",
        "lm_eval --model pruned-hf --model_args ratio=2.0 --tasks pruned_domo",
        "lm-eval-pruned plan --model_args pretrained=NAME --ratio 2.0 --percent 3",
        "lm-eval-pruned prone --pretrained NAME",
        "lm-eval-pruned sweep --model_args pretrain=x --ratios 2 --tasks boolq --output_path x",
        "torchrun --standalone --nproc 2 -m lm_eval --modle pruned-hf",
        "accelerate launch --num_processes 2 -m lm_eval --modle pruned-hf",
        "python benchmarks/load_memory.py --no-such-option",
        "python -m lm_eval --modle pruned-hf",
        "python -m lm_eval_pruned.cli plan --no_such_option",
        "python -m lm_eval_pruned",
        "python benchmarks/gone.py",
        "sh benchmarks/gpu_check.sh --no-such-option",
        "tox -e gone",
        "unheard --of",
    ],
)
def test_a_command_that_is_wrong_is_not_accepted(wrong, parse, beside_the_benchmarks):
    with pytest.raises((AssertionError, KeyError, SystemExit, pytest.fail.Exception)):
        check(tuple(shlex.split(wrong)), parse)


def test_no_command_hides_in_a_block_without_a_language():
    for path in [*PAGES, *OTHERS]:
        for language, start, lines in blocks(read(path)):
            if not language:
                hidden = [line for line in lines if PROGRAMS.match(line)]
                assert not hidden, f"{path.name}:{start}: write ```bash or ```console"


def test_what_the_python_examples_import_is_there():
    for path in PAGES:
        for language, _, lines in blocks(read(path)):
            if language != "python":
                continue
            for node in ast.walk(ast.parse("\n".join(lines))):
                if isinstance(node, ast.Import):
                    for alias in node.names:
                        importlib.import_module(alias.name)
                elif isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(str(node.module))
                    for alias in node.names:
                        assert hasattr(module, alias.name), alias.name


def test_the_links_of_the_readme_lead_somewhere():
    """The site's own are checked by `mkdocs build --strict`."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        if name.startswith("https://"):
            continue
        assert (ROOT / name).is_file(), target
        if anchor:
            titles = re.findall(
                r"^#+ (.+)$", (ROOT / name).read_text("utf-8"), re.MULTILINE
            )
            assert anchor in {re.sub(r"\W+", "-", title.lower()) for title in titles}


def test_titles_tell_pages_apart():
    """By more than a short word such as "by" or "per"."""
    titles = [
        tuple(re.findall(r"\w{4,}", page.read_text("utf-8").partition("\n")[0].lower()))
        for page in (ROOT / "docs").rglob("*.md")
    ]
    assert len(titles) > 30
    assert len(set(titles)) == len(titles)


def test_the_site_can_be_read_without_a_server():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    assert site["use_directory_urls"] is False
    assert "__pycache__/" in site["exclude_docs"].split()


@pytest.fixture(scope="module")
def hooks():
    """What `mkdocs.yml` hooks into the build of the site."""
    return runpy.run_path(str(ROOT / "docs" / "site_hooks.py"))


def test_the_page_of_the_command_line_holds_every_command(hooks):
    page = hooks["commands"]()
    for name in ("plan", "prune", "sweep", "compare", "report", "check", "profile"):
        assert f"\n## {name}\n" in page
        assert f"usage: lm-eval-pruned {name} " in page


@pytest.mark.parametrize(
    "tag",
    [
        '<script src="https://cdn.example/a.js"></script>',
        "<img alt='' src='//images.example/a.png'>",
        '<link rel="stylesheet" href="https://fonts.example/css">',
    ],
)
def test_a_page_that_loads_from_another_host_is_refused(hooks, tag):
    page = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    harmless = '<a href="https://arxiv.org">x</a><img src="a.svg"><script>1</script>'
    assert hooks["on_post_page"](harmless, page=page) == harmless
    with pytest.raises(ValueError, match=r"page\.md loads from another host"):
        hooks["on_post_page"](harmless + tag, page=page)
