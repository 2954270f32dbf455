"""``lm-eval-pruned plan``: from a config alone."""

from __future__ import annotations

import csv
import io
import json
import shutil

import pytest
from lm_eval.models.huggingface import HFLM
from transformers import CONFIG_MAPPING

from lm_eval_pruned import load_pruned
from lm_eval_pruned.checkpoints.configs import auto_class_for
from lm_eval_pruned.checkpoints.default_model import _packaged_gguf
from lm_eval_pruned.checkpoints.planning import plan_rows
from lm_eval_pruned.cli import main
from tests.helpers import checkpoints


STUDY = {
    "meta-llama/Llama-3.2-1B": "llama-3.2-1b",
    "meta-llama/Llama-3.2-1B-Instruct": "llama-3.2-1b",
    "meta-llama/Llama-3.2-3B": "llama-3.2-3b",
}
with (checkpoints.DATA / "architectures.csv").open(encoding="utf-8") as file:
    ARCHITECTURES = list(csv.DictReader(file))


def plan(capsys, *arguments) -> str:
    assert main(["plan", *map(str, arguments)]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("model", STUDY)
def test_the_study_s_architectures_come_out_exactly(model, capsys):
    rows = [row for row in ARCHITECTURES if row["base_model"] == model]
    folder = checkpoints.DATA / STUDY[model]
    percents = [row["prune_percent"] for row in rows]
    planned = json.loads(
        plan(
            capsys,
            *("--model_args", f"pretrained={folder}"),
            *("--format", "json"),
            *("--prune_percents", 0, *percents),
        )
    )
    baseline, *pruned = planned
    assert baseline["intermediate_size"] == int(rows[0]["intermediate_size_before"])
    assert baseline["parameters"] == int(rows[0]["parameters_before"])
    assert baseline["reduction"] == 0
    for ours, theirs in zip(pruned, rows, strict=True):
        assert ours["intermediate_size"] == int(theirs["intermediate_size_after"])
        assert ours["parameters"] == int(theirs["parameters_after"])
        assert ours["checkpoint_bytes"] == 2 * ours["parameters"]
        assert ours["expansion_ratio"] == ours["intermediate_size"] / int(
            theirs["hidden_size"]
        )
        assert ours["reduction"] == 1 - ours["parameters"] / baseline["parameters"]


def test_a_plan_is_what_loading_gives(tiny_llama, tmp_path, capsys):
    shutil.copy(tiny_llama / "config.json", tmp_path)
    planned = json.loads(
        plan(
            capsys,
            *("--model_args", f"pretrained={tmp_path}", "--ratios", "1.3", "2.75"),
            *("--multiple_of", 8, "--format", "json"),
        )
    )
    for row, ratio in zip(planned, ("1.3", "2.75"), strict=True):
        record = load_pruned(str(tiny_llama), ratio=ratio, multiple_of=8).prune_record
        assert row["parameters"] == record.parameters_after
        assert row["intermediate_size"] == record.plan.width
        assert row["asked"] == f"ratio={ratio}"


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_a_plan_of_fewer_layers_is_what_loading_gives(family, tmp_path, capsys):
    folder = checkpoints.save_tiny(tmp_path, family, num_hidden_layers=5)
    arguments = ("--model_args", f"pretrained={folder}", "--format", "json")
    alone = json.loads(plan(capsys, *arguments, "--drop_layers", 2, "0+4"))
    both = json.loads(plan(capsys, *arguments, "--drop_layers", 2, "--ratios", 2))
    for row, asked in (
        (alone[0], {"drop_layers": 2}),
        (alone[1], {"drop_layers": "0+4"}),
        (both[0], {"drop_layers": 2, "ratio": 2}),
    ):
        record = load_pruned(str(folder), **asked).prune_record
        assert row["parameters"] == record.parameters_after
        share = 1 - record.parameters_after / record.parameters_before
        assert row["reduction"] == pytest.approx(share)
        assert row["layers_dropped"] == record.as_dict()["layers_dropped"]
    assert both[0]["equal_ratio"] == ""
    narrow = load_pruned(str(folder), ratio=alone[0]["equal_ratio"]).prune_record
    per_neuron = 5 * 3 * 32
    assert abs(narrow.parameters_after - alone[0]["parameters"]) <= per_neuron / 2


@pytest.mark.parametrize(
    "asked",
    [{"layers": "0+3"}, {"skip_layers": 1}, {"layers": "0+2", "drop_layers": "1+4"}],
)
def test_layers_that_are_left_alone_keep_their_parameters(tmp_path, asked):
    folder = str(checkpoints.save_tiny(tmp_path, num_hidden_layers=5))
    (row,) = plan_rows(folder, "ratio", ["2"], **asked)
    record = load_pruned(folder, ratio=2, **asked).prune_record
    assert row.parameters == record.parameters_after


def test_a_plan_without_a_size_is_refused(tiny_llama, capsys):
    assert main(["plan", "--model_args", f"pretrained={tiny_llama}"]) == 2
    assert "--prune_percents, --widths, --drop_layers" in capsys.readouterr().err


def test_a_plan_reads_subfolders(tiny_llama, tmp_path):
    (tmp_path / "inner").mkdir()
    shutil.copy(tiny_llama / "config.json", tmp_path / "inner")
    expected = plan_rows(str(tiny_llama), "ratio", ["2"])
    assert plan_rows(str(tmp_path), "ratio", ["2"], subfolder="inner") == expected


@pytest.mark.slow
def test_a_plan_reads_gguf_files(real_model):
    """As in a profile or a sweep of the default model where no cache can be written."""
    gguf = _packaged_gguf()
    planned = plan_rows(
        str(gguf.parent), "prune_percent", ["0", "40"], gguf_file=gguf.name
    )
    expected = plan_rows(real_model, "prune_percent", ["0", "40"])
    assert [(r.intermediate_size, r.parameters) for r in planned] == [
        (r.intermediate_size, r.parameters) for r in expected
    ]


def test_the_formats_agree(tiny_llama, capsys):
    arguments = (
        "--model_args",
        f"pretrained={tiny_llama}",
        "--ratios",
        "2",
        "1",
        "--format",
    )
    as_json = json.loads(plan(capsys, *arguments, "json"))
    as_csv = list(csv.DictReader(io.StringIO(plan(capsys, *arguments, "csv"))))
    assert as_csv == [
        {key: str(value) for key, value in row.items()} for row in as_json
    ]
    table = plan(capsys, *arguments, "table").splitlines()
    assert len(table) == 4
    assert {line.count("|") for line in table} == {7}
    for line, row in zip(table[2:], as_json, strict=True):
        assert f"|{row['parameters']:,}|" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratios", "9"], "ratio=9 is above the model's own"),
        (["--ratios", "2", "--multiple_of", "100"], "multiple_of=100 is larger"),
        (["--prune_percents", "100"], "prune_percent=100 is outside"),
    ],
)
def test_bad_sizes_end_with_one_sentence(tiny_llama, arguments, message, capsys):
    assert main(["plan", "--model_args", f"pretrained={tiny_llama}", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lm-eval-pruned plan: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "model_type", ["llama", "t5", "mbart", "qwen2_audio", "whisper", "gpt2"]
)
def test_the_auto_class_is_the_one_that_the_harness_takes(model_type):
    config = CONFIG_MAPPING[model_type]()
    lm = object.__new__(HFLM)
    lm._get_backend(config, backend="default", trust_remote_code=False)
    assert auto_class_for(config) is lm.AUTO_MODEL_CLASS


def test_a_model_that_hears_is_planned_as_it_is_pruned(tmp_path, capsys):
    """It has an encoder of sound, and transformers loads it as an encoder-decoder."""
    text = checkpoints.tiny_config("qwen2", intermediate_size=88)
    config = CONFIG_MAPPING["qwen2_audio"](
        text_config=text.to_dict(),
        audio_config={"d_model": 32, "encoder_attention_heads": 4, "encoder_layers": 1},
    )
    assert not config.is_encoder_decoder
    config.save_pretrained(tmp_path)
    (row,) = json.loads(
        plan(
            capsys,
            "--model_args",
            f"pretrained={tmp_path}",
            "--ratios",
            2,
            "--format",
            "json",
        )
    )
    assert row["intermediate_size"] == 2 * text.hidden_size
