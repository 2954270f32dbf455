from __future__ import annotations

import csv

import pytest

from lm_eval_pruned import cli
from lm_eval_pruned.checkpoints.request import LoadRequest
from lm_eval_pruned.pruning.curves import read_sensitivity


@pytest.fixture
def command(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "The first, of some tokens."}\n{"text": "Another!"}\n')
    words = ["sensitivity", "--model_args", f"pretrained={tiny_llama}"]
    return [*words, "--calibration", str(text)]


def test_every_layer_has_a_curve_by_every_criterion_and_seed(command, tmp_path, capsys):
    pytest.importorskip("altair", reason="plots need the extra `report`")
    command += ["--criteria", "ppm", "act", "random", "--seeds", "0", "5"]
    command += ["--prune_percents", "25", "50", "--output_path", str(tmp_path / "out")]
    assert cli.main(command) == 0
    first = capsys.readouterr().out
    assert "|layer|" in first
    found = read_sensitivity(tmp_path / "out/sensitivity.json")
    names = {(curve.layer, curve.criterion, curve.seed) for curve in found.curves}
    ranked = (("maw", None), ("act", None), ("random", 0), ("random", 5))
    assert names == {(layer, *way) for layer in range(3) for way in ranked}
    assert (found.file, found.texts) == ("text.jsonl", 2)
    plots = {f"sensitivity-by-layer.{kind}" for kind in ("png", "svg")}
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {"sensitivity.json", "sensitivity.csv", *plots}
    with (tmp_path / "out/sensitivity.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3 * len(ranked) * 2
    assert cli.main(command) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--criteria nonsense", "criterion=nonsense is unknown"),
        ("--criteria maw --seeds 1", "only the criterion random"),
        ("--prune_percents 100", "prune_percents=100"),
        ("--calibration nowhere.jsonl", "nowhere.jsonl cannot be read"),
        ("--device nonsense:7", "device=nonsense:7 is not a device of this machine"),
        ("--device cuda:7", "device=cuda:7 is not a device of this machine"),
        ("--model_args pretrained=x,ratio=2", "model_args has ratio=2"),
    ],
)
def test_what_is_refused_before_a_weight_is_read(
    words, message, command, monkeypatch, capsys
):
    monkeypatch.setattr(LoadRequest, "load", None)
    assert cli.main([*command, *words.split()]) == 2
    assert message in capsys.readouterr().err
