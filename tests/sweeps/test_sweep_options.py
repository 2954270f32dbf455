"""The options of a sweep: the same on the command line and in YAML, with clear errors."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys

import pytest

from lm_eval_pruned.sweeps.options import (
    OF_HARNESS,
    OPTIONS,
    add_arguments,
    parse_number,
    parse_shard,
    read_options,
)


def _read(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return read_options(parser.parse_args([str(word) for word in words]))


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "sweep.yaml"
        path.write_text(text)
        return path

    return write


BASE = "tasks: [boolq]\noutput_path: out\n"


def test_command_line():
    options = _read(
        "--model_args", "pretrained=m,dtype=bfloat16", "max_length=64",
        "--ratios", "4.0", "3.6,2", "--criteria", "maw", "l2", "--tasks", "a,b", "c",
        "--output_path", "out", "--limit", "10", "--batch_size", "auto:4",
        "--apply_chat_template", "--fewshot_as_multiturn", "false", "--num_fewshot", "0",
        "--gen_kwargs", "temperature=0,until=['a','b']", "--seed", "1,2,3,4",
        "--trust_remote_code",
    )  # fmt: skip
    assert options == {
        "model_args": {"pretrained": "m", "dtype": "bfloat16", "max_length": 64},
        "ratios": ["4.0", "3.6", "2"],
        "criteria": ["maw", "l2"],
        "tasks": ["a", "b", "c"],
        "output_path": "out",
        "limit": 10.0,
        "batch_size": "auto:4",
        "apply_chat_template": True,
        "fewshot_as_multiturn": False,
        "num_fewshot": 0,
        "gen_kwargs": {"temperature": 0, "until": ["a", "b"]},
        "seed": "1,2,3,4",
        "trust_remote_code": True,
    }


def test_file_says_the_same_as_the_command_line(file):
    path = file(
        "model_args:\n  pretrained: m\n  dtype: bfloat16\nratios: [4.0, 3.6, 2]\n"
        "tasks: a,b\noutput_path: out\nlimit: 10\nseed: [1, 2, 3, 4]\nlog_samples: false\n"
        "ray: true\ngpus_per_unit: 0.5\nprune_percents: 40\nnum_fewshot:\n"
    )
    assert _read("--config", path) == _read(
        "--model_args", "pretrained=m,dtype=bfloat16", "--ratios", "4.0", "3.6", "2",
        "--tasks", "a", "b", "--output_path", "out", "--limit", "10", "--seed", "1,2,3,4",
        "--log_samples", "false", "--ray", "--gpus_per_unit", "0.5",
        "--prune_percents", "40",
    )  # fmt: skip


def test_samples_from_json_or_a_file(tmp_path):
    base = ["--tasks", "a", "--output_path", "o", "--samples"]
    file = tmp_path / "samples.json"
    file.write_text('{"a": [0, 2]}')
    for text in (file, file.read_text()):
        assert _read(*base, text)["samples"] == {"a": [0, 2]}
    for text in ("{", "[1]", "no.json", tmp_path):
        with pytest.raises(ValueError, match="--samples is"):
            _read(*base, text)


def test_command_line_wins_over_the_file(file):
    options = _read("--config", file(BASE + "limit: 3\n"), "--limit", "0.5")
    assert options["limit"] == 0.5
    assert options["tasks"] == ["boolq"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ratio: [2.0]\n" + BASE, "unknown key ratio: did you mean ratios?"),
        ("zzz: 1\n" + BASE, "unknown key zzz: known: model, model_args, ratios"),
        ("1: 1\n" + BASE, "unknown key 1"),
        (BASE + "ratios: many\n", "not a mistake"),
        (
            BASE + "ratios: [true]\n",
            "ratios in .* is \\[True\\]: pass one or more numbers",
        ),
        (BASE + "ratios: {a: 1}\n", "pass one or more numbers"),
        (BASE + "ratios: []\n", "pass one or more numbers"),
        (BASE + "limit: all\n", "limit in .* is 'all'"),
        (BASE + "limit: -1\n", "limit in .* is -1"),
        (BASE + "limit: .nan\n", "limit in .* is nan"),
        (BASE + "num_fewshot: 1.5\n", "pass a whole number"),
        (BASE + "log_samples: maybe\n", "pass true or false"),
        (BASE + "trust_remote_code: yes please\n", "pass true or false"),
        (BASE + "model_args: [a, b]\n", "expected `key=value`"),
        (BASE + "model_args: 3\n", "pass key=value pairs"),
        (BASE + "ray: {a: 1}\n", "pass true, false or a name"),
        (BASE + "batch_size: {a: 1}\n", "pass one value"),
        ("tasks: [true]\noutput_path: o\n", "pass one or more names"),
        ("[1, 2]\n", "holds a list"),
        ("", "holds a NoneType"),
        ("a: [\n", "is not valid YAML"),
        ("output_path: o\n", "tasks was not given"),
        ("tasks: a\n", "output_path was not given"),
    ],
    ids=lambda value: value[-30:].strip(),
)
def test_errors_of_the_file(file, text, message):
    if message == "not a mistake":
        # A word may still be a fraction; the plan refuses what is no number.
        assert _read("--config", file(text))["ratios"] == ["many"]
        return
    with pytest.raises(ValueError, match=message):
        _read("--config", file(text))


def test_file_that_is_not_there():
    with pytest.raises(OSError, match=re.escape("no.yaml")):
        _read("--config", "no.yaml")


@pytest.mark.parametrize(
    "text", ["", "1", "/", "1/", "/2", "a/2", "-1/2", "0/0", "2/2", "1.0/2"]
)
def test_shards_that_are_none(text):
    with pytest.raises(ValueError, match="--shard"):
        parse_shard(text)


def test_shards():
    assert [parse_shard(f"{part}/3") for part in range(3)] == [(0, 3), (1, 3), (2, 3)]


def test_numbers_are_those_of_model_args():
    from lm_eval._cli.utils import handle_cli_value_string

    for text in ("4", "4.0", "3.6", "40", "8/3"):
        expected = handle_cli_value_string(text)
        assert parse_number(text) == expected
        assert type(parse_number(text)) is type(expected)


def test_options_exist_in_lm_eval_run():
    """Every option under the heading of `lm_eval run` is one of its options."""
    from lm_eval._cli.run import Run

    parser = argparse.ArgumentParser()
    run = Run(parser.add_subparsers())
    names = {action.dest for action in run._parser._actions}
    ours = set(OF_HARNESS)
    assert ours <= names
    assert "ratios" not in ours


def test_help_imports_neither_torch_nor_the_harness():
    code = (
        "import sys\nfrom lm_eval_pruned.cli import main\n"
        "try:\n    main(['sweep', '--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'lm_eval', 'ray', 'yaml'} & set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert out.endswith("[]\n")
    for option in OPTIONS:
        assert f"--{option.name}" in out
