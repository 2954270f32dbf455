"""What `benchmarks/engines.py` prints, on a tiny checkpoint and tasks of made data."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def engines(script):
    return script("engines")


@pytest.mark.slow
def test_the_table_has_loading_and_each_piece_of_work(engines, tiny_llama, capfd):
    tasks = ["pruned_demo_truthfulness", "pruned_demo_instruction_following"]
    engines.main(
        ["--models", "hf-prefix", "hf", "--pretrained", str(tiny_llama)]
        + ["--limit", "2", "--repeats", "2", "--max-gen-toks", "4", "--tasks", *tasks]
    )
    lines = capfd.readouterr().out.splitlines()
    heads, _, loading, *work = (line for line in lines if line.startswith("|"))
    assert heads == "|work|requests|hf-prefix, s|hf, s|"
    assert loading.startswith("|loading||")
    for task, said in zip(
        tasks,
        ("log-likelihoods differ by at most ", "2 of 2 texts are the same"),
        strict=True,
    ):
        (row,) = (line for line in work if line.startswith(f"|{task}, "))
        assert row.count(" / ") == 4
        about = f"hf-prefix beside hf, {task}"
        assert any(line.startswith(about) and said in line for line in lines)
