"""What `benchmarks/engines.py` prints, on a tiny checkpoint and tasks of made data."""

from __future__ import annotations

import importlib

import pytest

from tests.helpers import checkpoints


@pytest.fixture(scope="module")
def engines():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(checkpoints.ROOT / "benchmarks"))
        yield importlib.import_module("engines")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["pruned_demo_truthfulness"], "log-likelihoods differ by at most "),
        (
            ["pruned_demo_instruction_following", "--max-gen-toks", "4"],
            "2 of 2 texts are the same",
        ),
    ],
)
def test_the_table_has_loading_and_each_piece_of_work(
    options, said, engines, tiny_llama, capsys
):
    engines.main(
        ["--models", "hf-prefix", "hf", "--pretrained", str(tiny_llama)]
        + ["--limit", "2", "--repeats", "2", "--tasks", *options]
    )
    lines = capsys.readouterr().out.splitlines()
    heads, _, loading, work, *_ = (line for line in lines if line.startswith("|"))
    assert heads == "|work|requests|hf-prefix|hf|"
    assert loading.startswith("|loading||")
    assert work.startswith(f"|{options[0]}, ")
    assert work.count(" s (") == 2
    assert any("hf-prefix beside hf, " in line and said in line for line in lines)


def test_only_one_repeat_has_no_range(engines):
    assert engines.seconds([1.25]) == "1.2 s"
    assert engines.seconds([3.0, 1.0, 2.0]) == "2.0 s (1.0-3.0)"
