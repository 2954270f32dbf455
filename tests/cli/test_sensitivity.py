from __future__ import annotations

import csv
import json

import pytest

from lm_eval_pruned import cli
from lm_eval_pruned.checkpoints.request import LoadRequest
from lm_eval_pruned.pruning.curves import read_sensitivity


TEXTS = ["The first text, of some tokens.", "Another one!"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    file.write_text("".join(json.dumps({"text": each}) + "\n" for each in TEXTS))
    return file


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def measured(tiny_llama, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    code = cli.main(
        ["sensitivity", "--model_args", f"pretrained={tiny_llama}"]
        + ["--calibration", str(text), "--output_path", str(folder)]
        + ["--criteria", "ppm", "act", "random", "--seeds", "0", "5"]
        + ["--prune_percents", "25", "50"]
    )
    assert code == 0
    return folder


def test_every_layer_has_a_curve_by_every_criterion_and_seed(measured):
    found = read_sensitivity(measured / "sensitivity.json")
    names = {(curve.layer, curve.criterion, curve.seed) for curve in found.curves}
    ranked = (("maw", None), ("act", None), ("random", 0), ("random", 5))
    assert names == {(layer, *way) for layer in range(3) for way in ranked}
    assert (found.file, found.texts) == ("text.jsonl", len(TEXTS))


def test_the_files(measured):
    pytest.importorskip("altair", reason="plots need the extra `report`")
    assert {file.name for file in measured.iterdir()} == {
        "sensitivity.json",
        "sensitivity.csv",
        "sensitivity-by-layer.png",
        "sensitivity-by-layer.svg",
    }
    with (measured / "sensitivity.csv").open() as file:
        rows = list(csv.DictReader(file))
    # 3 layers, 4 rankings, 2 widths.
    assert len(rows) == 24
    assert {row["layer"] for row in rows} == {"0", "1", "2"}


def test_the_same_command_prints_the_same(tiny_llama, text, capsys):
    command = ["sensitivity", "--model_args", f"pretrained={tiny_llama}"]
    command += ["--calibration", str(text), "--criteria", "maw"]
    command += ["--prune_percents", "50"]
    assert cli.main(command) == 0
    first = capsys.readouterr().out
    assert "|layer|" in first
    assert "add random to --criteria" in first
    assert cli.main(command) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--criteria", "nonsense"], "criterion=nonsense is unknown"),
        (["--criteria", "maw", "--seeds", "1"], "only the criterion random has any"),
        (["--prune_percents", "100"], "prune_percents=100 and"),
        (["--calibration_samples", "9"], "holds 2 texts, but 9 were asked for"),
        (
            ["--calibration", "nowhere.jsonl"],
            "calibration=nowhere.jsonl cannot be read",
        ),
        (["--model_args", "pretrained=x,ratio=2"], "model_args has ratio=2"),
    ],
)
def test_what_is_refused_before_a_weight_is_read(
    words, message, text, tiny_llama, monkeypatch, capsys
):
    monkeypatch.setattr(LoadRequest, "load", None)
    command = ["sensitivity", "--model_args", f"pretrained={tiny_llama}"]
    command += ["--calibration", str(text), *words]
    assert cli.main(command) == 2
    assert message in capsys.readouterr().err
