from __future__ import annotations

import pytest

from lm_eval_pruned import cli
from lm_eval_pruned.checkpoints.checkpoint import Checkpoint


@pytest.fixture
def command(tiny_llama, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "The first, of some tokens."}\n{"text": "Another!"}\n')
    words = ["sensitivity", "--model_args", f"pretrained={tiny_llama}"]
    return [*words, "--calibration", str(text)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--criterion nonsense", "criterion=nonsense is unknown"),
        ("--prune_percents 0 25", "prune_percents=0 25"),
        ("--prune_percents 100", "prune_percents=100"),
        ("--calibration nowhere.jsonl", "nowhere.jsonl cannot be read"),
        ("--device nonsense:7", "device=nonsense:7 is not a device of this machine"),
        ("--device cuda:7", "device=cuda:7 is not a device of this machine"),
        ("--model_args pretrained=x,ratio=2", "model_args has ratio=2"),
        ("--model_args pretrained=x,allocation=uniform", "has allocation=uniform"),
    ],
)
def test_what_is_refused_before_a_weight_is_read(
    words, message, command, monkeypatch, capsys
):
    monkeypatch.setattr(Checkpoint, "_built", None)
    assert cli.main([*command, *words.split()]) == 2
    assert message in capsys.readouterr().err
