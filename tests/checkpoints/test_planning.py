"""``lm-eval-pruned plan``: from a config alone."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys

import pytest
from hypothesis import given, settings, strategies as st
from lm_eval.models.huggingface import HFLM
from transformers import CONFIG_MAPPING

from lm_eval_pruned import load_pruned
from lm_eval_pruned.checkpoints.configs import auto_class_for
from lm_eval_pruned.checkpoints.planning import plan_rows
from lm_eval_pruned.cli import main
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
def test_a_plan_of_the_study_imports_neither_torch_nor_transformers(model):
    code = "import sys; sys.modules.update(torch=None, transformers=None)\n"
    code += "from lm_eval_pruned.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "plan", "--prune_percents", "10", "60"]
    command += ["--model_args", f"pretrained={model}"]
    command += ["--format", "json"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    counts = {
        int(row["parameters_after"])
        for row in ARCHITECTURES
        if row["base_model"] == model
    }
    assert {row["parameters"] for row in json.loads(run.stdout)} <= counts


@settings(max_examples=25)
@given(
    model_type=st.sampled_from(["llama", "mistral", "qwen2"]),
    heads=st.sampled_from([(4, 4), (4, 2), (2, 1)]),
    sizes=st.tuples(st.integers(1, 9), st.integers(2, 90), st.integers(1, 4)),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    head_dim=st.sampled_from([None, 6]),
    kinds=st.sampled_from([None, ["full_attention"], ["sliding_attention"], ["x"], 7]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    asked=st.sampled_from(
        [
            {"argument": "prune_percent", "values": ["0", "40", "99"]},
            {"argument": "prune_percent", "values": ["30"], "multiple_of": 4},
            {"argument": "ratio", "values": ["0.2"], "skip_layers": "0"},
            {"argument": "widths", "values": [{0: 1}]},
        ]
    ),
)
def test_the_short_way_gives_the_rows_of_the_model(
    model_type, heads, sizes, flags, head_dim, kinds, dtype, asked, tmp_path_factory
):
    """A model that is built by transformers, as for `trust_remote_code`."""
    hidden, width, layers = sizes
    names = ("tie_word_embeddings", "attention_bias", "mlp_bias")
    config = {"model_type": model_type, "vocab_size": 300, "num_hidden_layers": layers}
    config |= {"hidden_size": 8 * hidden, "intermediate_size": width, "dtype": dtype}
    config |= dict(
        zip(("num_attention_heads", "num_key_value_heads"), heads, strict=True)
    )
    config |= dict(zip(names, flags, strict=True))
    config |= {"head_dim": head_dim} if head_dim else {}
    if kinds:
        config["layer_types"] = kinds * layers if isinstance(kinds, list) else kinds
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_text(json.dumps(config))
    found = []
    for source in ({}, {"trust_remote_code": True}):
        try:
            found.append(plan_rows(str(folder), **asked, **source))
        except ValueError as refusal:
            found.append(str(refusal))
    assert found[0] == found[1]


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
