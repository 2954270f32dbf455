"""The options of a sweep: the same on the command line and in YAML, with clear errors."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest
from lm_eval._cli.run import Run

from lm_eval_pruned.sweeps.options import (
    OF_HARNESS,
    OPTIONS,
    add_arguments,
    parse_shard,
    read_options,
)


BASE = "tasks: [boolq]\noutput_path: out\n"


def read(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return read_options(parser.parse_args([str(word) for word in words]))


@pytest.mark.parametrize(
    ("text", "words", "value"),
    [
        ("model_args: {a: m, b: 64}", ["a=m", "b=64"], {"a": "m", "b": 64}),
        ("ratios: [4.0, 3.6, 2]", ["4.0", "3.6,2"], ["4.0", "3.6", "2"]),
        ("limit: 10", ["10"], 10.0),
        ("seed: [1, 2, 3, 4]", ["1,2,3,4"], "1,2,3,4"),
        ("log_samples: false", ["no"], False),
        ("ray: true", [], True),
        ("num_fewshot: 0", ["0"], 0),
        ("trust_remote_code: true", [], True),
        ("metadata: {of: {a: true}}", ['{"of": {"a": true}}'], {"of": {"a": True}}),
    ],
)
def test_file_and_command_line_say_the_same(sweep_file, text, words, value):
    name, path = text.partition(":")[0], sweep_file(f"{BASE}{text}\ndevice:\n")
    expected = {"tasks": ["boolq"], "output_path": "out", name: value}
    assert read("--config", path) == expected
    base = ["--tasks", "boolq", "--output_path", "out"]
    assert read(*base, f"--{name}", *words) == expected
    assert read("--config", path, "--tasks", "a,b")["tasks"] == ["a", "b"]


def test_samples_are_json_or_a_file_of_it(sweep_file):
    for text in (sweep_file('{"a": [0, 2]}'), '{"a": [0, 2]}'):
        found = read("--tasks", "a", "--output_path", "o", "--samples", text)
        assert found["samples"] == {"a": [0, 2]}


@pytest.mark.parametrize("text", ["", "1", "-1/2", "2/2", "1.0/2"])
def test_shards_count_from_zero(text):
    assert parse_shard("1/3") == (1, 3)
    with pytest.raises(ValueError, match="--shard"):
        parse_shard(text)


def test_options_of_the_harness_are_those_of_lm_eval_run():
    run = Run(argparse.ArgumentParser().add_subparsers())
    assert {*OF_HARNESS} <= {action.dest for action in run._parser._actions}


def test_help_imports_neither_torch_nor_the_harness():
    code = (
        "import sys\nfrom lm_eval_pruned.cli import main\n"
        "try:\n    main(['sweep', '--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'lm_eval', 'ray', 'yaml'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.endswith("[]\n")
    assert all(f"--{option.name}" in out for option in OPTIONS)
