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
from lm_eval_pruned.checkpoints.planning import plan_rows
from lm_eval_pruned.cli import main
from lm_eval_pruned.pruning.layouts import UnsupportedModelError
from tests.helpers import checkpoints


with (checkpoints.DATA / "architectures.csv").open(encoding="utf-8") as file:
    ARCHITECTURES = list(csv.DictReader(file))
STUDY = sorted({row["base_model"] for row in ARCHITECTURES})


@pytest.fixture
def plan(capsys):
    """Run the command for a folder, and return what it prints, read if it is JSON."""

    def run(folder, *arguments, form="json"):
        command = ["plan", "--model_args", f"pretrained={folder}", "--format", form]
        assert main([*command, *map(str, arguments)]) == 0
        printed = capsys.readouterr().out
        return json.loads(printed) if form == "json" else printed

    return run


@pytest.mark.parametrize("model", STUDY)
def test_a_plan_of_the_study_needs_no_file_of_its_models(model, plan):
    counts = {
        int(row["parameters_after"])
        for row in ARCHITECTURES
        if row["base_model"] == model
    }
    rows = plan(model, "--prune_percents", 10, 60)
    assert {row["parameters"] for row in rows} <= counts


def test_a_plan_refuses_a_quantised_model_as_loading_does(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "model")
    stored = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    checkpoints.edit_config(tmp_path / "model", quantization_config=stored)
    for attempt in (
        lambda folder: plan_rows(folder, "ratio", ["2"]),
        lambda folder: load_pruned(folder, ratio=2),
    ):
        with pytest.raises(UnsupportedModelError, match="quantised already"):
            attempt(str(tmp_path / "model"))


#: As the command is asked, and as loading is.
SIZES = {
    "--ratios 1.3": {"ratio": "1.3"},
    "--prune_percents 40 --multiple_of 8": {"prune_percent": 40, "multiple_of": 8},
    "--ratios 2 --layers 0+3": {"ratio": 2, "layers": "0+3"},
    "--ratios 2 --skip_layers 1": {"ratio": 2, "skip_layers": 1},
}


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_a_plan_is_what_loading_gives(family, tmp_path, plan):
    """The plan reads the config alone."""
    folder, alone = tmp_path / "a", tmp_path / "b"
    checkpoints.save_tiny(folder, family, num_hidden_layers=4)
    alone.mkdir()
    shutil.copy(folder / "config.json", alone)
    for asked, arguments in SIZES.items():
        (row,) = plan(alone, *asked.split())
        record = load_pruned(str(folder), **arguments).prune_record
        assert row["parameters"] == record.parameters_after
        share = 1 - record.parameters_after / record.parameters_before
        assert row["reduction"] == pytest.approx(share)


def test_the_formats_agree(tiny_llama, plan):
    rows = plan(tiny_llama, "--ratios", 2, 1)
    as_csv = plan(tiny_llama, "--ratios", 2, 1, form="csv")
    assert [*csv.DictReader(io.StringIO(as_csv))] == [
        {key: str(value) for key, value in row.items()} for row in rows
    ]
    table = plan(tiny_llama, "--ratios", 2, 1, form="table")
    assert all(f"|{row['parameters']:,}|" in table for row in rows)


@pytest.mark.parametrize(
    "model_type", ["llama", "t5", "mbart", "qwen2_audio", "whisper", "gpt2"]
)
def test_the_auto_class_is_the_one_that_the_harness_takes(model_type):
    config, lm = CONFIG_MAPPING[model_type](), object.__new__(HFLM)
    lm._get_backend(config, backend="default", trust_remote_code=False)
    assert auto_class_for(config) is lm.AUTO_MODEL_CLASS


@pytest.mark.parametrize(
    "change", [{"head_dim": "8"}, {"dtype": {}}, {"vocab_size": 0}]
)
def test_a_config_that_is_not_plain_is_left_to_transformers(
    change, tiny_llama, tmp_path, capsys
):
    shutil.copy(tiny_llama / "config.json", tmp_path)
    checkpoints.edit_config(tmp_path, **change)
    words = ["plan", "--model_args", f"pretrained={tmp_path}", "--ratios", "1"]
    main(words)
    assert "Traceback" not in capsys.readouterr().err
