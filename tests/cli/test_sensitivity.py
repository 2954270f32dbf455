from __future__ import annotations

import csv
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_pruned import cli, prune_model
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


def loss_of(model, tokenizer):
    nats, count = 0.0, 0
    with torch.no_grad():
        for each in TEXTS:
            tokens = tokenizer(each, return_tensors="pt")["input_ids"]
            number = tokens.shape[1] - 1
            nats += float(model(input_ids=tokens, labels=tokens).loss) * number
            count += number
    return nats / count


def test_each_loss_is_that_of_a_model_pruned_in_one_layer(measured, tiny_llama, text):
    found = read_sensitivity(measured / "sensitivity.json")
    names = {(curve.layer, curve.name) for curve in found.curves}
    ranked = ("maw", "act", "random:0", "random:5")
    assert names == {(layer, name) for layer in range(3) for name in ranked}
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    whole = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert found.loss == pytest.approx(loss_of(whole, tokenizer), abs=1e-5)
    for layer, criterion, seed, percent in (
        (0, "maw", None, 25),
        (1, "act", None, 50),
        (2, "random", 5, 50),
    ):
        arguments = {} if seed is None else {"seed": seed}
        if criterion == "act":
            arguments["calibration"] = str(text)
        model = prune_model(
            AutoModelForCausalLM.from_pretrained(tiny_llama),
            tokenizer=tokenizer,
            prune_percent=percent,
            layers=layer,
            criterion=criterion,
            **arguments,
        )
        width = model.get_submodule(f"model.layers.{layer}.mlp.down_proj").in_features
        curve = found.curve(layer, criterion, seed)
        loss = dict(zip(curve.widths, curve.losses, strict=True))[width]
        assert loss == pytest.approx(loss_of(model, tokenizer), abs=1e-5)


def test_the_files(measured):
    pytest.importorskip("matplotlib", reason="plots need the extra `report`")
    assert {file.name for file in measured.iterdir()} == {
        "sensitivity.json",
        "sensitivity.csv",
        *(
            f"{name}.{suffix}"
            for name in ("sensitivity", "sensitivity-by-layer")
            for suffix in ("png", "svg")
        ),
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
        (["--prune_percents", "100"], "prune_percents has 100, which removes all"),
        (["--prune_percents", "much"], "prune_percents=much is not a finite number"),
        (["--seeds", "-1"], "seeds=-1 is not a whole number"),
        (["--calibration_samples", "9"], "holds 2 texts, but 9 were asked for"),
        (["--calibration_tokens", "1"], "calibration_tokens=1 leaves nothing"),
        (
            ["--calibration", "nowhere.jsonl"],
            "calibration=nowhere.jsonl cannot be read",
        ),
        (["--model_args", "pretrained=x,ratio=2"], "model_args has ratio=2"),
    ],
)
def test_what_is_refused_before_a_weight_is_read(
    words, message, text, monkeypatch, capsys
):
    monkeypatch.setattr(
        "lm_eval_pruned.checkpoints.sensitivity.measure_sensitivity",
        lambda *arguments, **named: pytest.fail("something was measured"),
    )
    command = ["sensitivity", "--model_args", "pretrained=x"]
    command += ["--calibration", str(text), *words]
    assert cli.main(command) == 2
    assert message in capsys.readouterr().err
