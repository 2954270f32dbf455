"""`lm-eval-pruned prune`: what lies beside the weights, whole or not at all."""

from __future__ import annotations

import json
import shutil

import pytest
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_pruned import load_pruned
from lm_eval_pruned.checkpoints.checkpoint import Checkpoint
from lm_eval_pruned.checkpoints.export import export_pruned
from lm_eval_pruned.cli import main
from lm_eval_pruned.pruning import slicing
from tests.helpers.checkpoints import edit_config, save_tiny
from tests.helpers.layouts import save_family
from tests.helpers.ways_to_load import assert_state


HALF = {"prune_arguments": {"ratio": 2}}


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("family", "key"), [("phi3", "intermediate_size"), ("t5", "d_ff")]
)
def test_only_the_width_changes(family, key, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    save_family(source, family, 88)
    # Settings that nobody knows are kept.
    edit_config(source, a_key_nobody_knows={"kept": [1, None]})
    export_pruned(str(source), out, prune_arguments={"ratio": "1.5"})
    before, after = config_of(source), config_of(out)
    assert (before.pop(key), after.pop(key)) == (88, 48)
    assert after == before
    old, new = (load_file(folder / "model.safetensors") for folder in (source, out))
    assert old.keys() == new.keys()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert (out / "generation_config.json").is_file()
    AutoTokenizer.from_pretrained(out)


def test_a_dtype_that_the_config_does_not_name_is_written_out(tmp_path):
    folder = save_tiny(tmp_path / "in")
    config = config_of(folder)
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    export_pruned(str(folder), tmp_path / "out", dtype="float16", **HALF)
    assert config_of(tmp_path / "out")["dtype"] == "float16"


def test_model_card(tmp_path):
    folder, out = save_tiny(tmp_path / "A-Base"), tmp_path / "out"
    fields = "license: other\nlicense_name: a-licence\nlanguage:\n- en\ndatasets:\n- x"
    (folder / "README.md").write_text(f"---\n{fields}\n---\nHello")
    (folder / "LICENSE.txt").write_text("terms")
    export = export_pruned(str(folder), out, **HALF)
    card = ModelCard.load(out / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "a-licence")
    assert (card.data.library_name, card.data.datasets) == ("transformers", None)
    for word in (export.record.digest, "A-Base", "ratio=2", "`maw`"):
        assert word in card.text
    assert str(tmp_path) not in card.content
    assert (out / "LICENSE.txt").read_text() == "terms"


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"widths": {0: 11}}, "model.layers.0.mlp keeps"),
        ({"ratio": "0.25", "layers": "0,2"}, "Each of 2 GLU-MLPs keeps"),
    ],
)
def test_what_stock_transformers_cannot_open_is_told(tmp_path, caplog, asked, named):
    save_family(tmp_path / "source", "llama", 16)
    out = tmp_path / "out"
    export_pruned(str(tmp_path / "source"), out, prune_arguments=asked)
    (message,) = caplog.messages
    assert message.startswith(named) and "cannot build MLPs" in message
    assert "lm_eval --model pruned-hf" in (out / "README.md").read_text()
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(out)


def test_an_interrupted_export_leaves_nothing(tiny_llama, tmp_path, monkeypatch):
    def broken(*arguments, **more):
        (unfinished,) = tmp_path.iterdir()
        assert list(unfinished.glob("out/*.safetensors"))
        raise KeyboardInterrupt

    monkeypatch.setattr("lm_eval_pruned.checkpoints.export.model_card", broken)
    with pytest.raises(KeyboardInterrupt):
        export_pruned(str(tiny_llama), tmp_path / "out", **HALF)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("raised", "seen", "words"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
        (SafetensorError("no space"), OSError, r"cannot be written .*make room"),
    ],
)
def test_what_ends_an_export_between_two_layers_leaves_nothing(
    raised, seen, words, tiny_llama, tmp_path, monkeypatch
):
    written, write = [], slicing.save_file

    def second_fails(tensors, file):
        if written:
            raise raised
        written.append(file)
        write(tensors, file)

    monkeypatch.setattr(slicing, "save_file", second_fails)
    with pytest.raises(seen, match=words or None):
        export_pruned(str(tiny_llama), tmp_path / "out", **HALF)
    assert tmp_path in written[0].parents and list(tmp_path.iterdir()) == []


def test_output_must_be_new_or_empty(tiny_llama, tmp_path):
    taken, empty, link = (tmp_path / name for name in ("taken", "empty", "link"))
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"output_path=.*taken exists"):
        export_pruned("no/such-model", taken, **HALF)
    assert [path.name for path in taken.iterdir()] == ["notes.txt"]
    empty.mkdir()
    link.symlink_to(empty, target_is_directory=True)
    export_pruned(str(tiny_llama), link, **HALF)
    assert link.is_symlink() and (empty / "config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"prune_arguments": {"prune_percent": 0}}, "prune_percent=0 keeps all 88"),
        ({"prune_arguments": {}}, "no size keeps all 88"),
        ({"max_shard_size": "big"}, "max_shard_size=big"),
        ({"max_shard_size": 0}, "max_shard_size=0"),
        ({"dtype": "int8"}, "dtype=int8"),
        ({"dtype": "float31"}, "dtype=float31"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    tiny_llama, tmp_path, arguments, word
):
    with pytest.raises(ValueError, match=word):
        export_pruned(str(tiny_llama), tmp_path / "out", **{**HALF, **arguments})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("asked", "known"),
    [
        ({"ratio": 2}, True),
        # Only the loss tells how many neurons each layer keeps.
        ({"ratio": 2, "criterion": "maw", "allocation": "sensitivity"}, False),
    ],
)
def test_a_full_disk_is_noticed_before_the_model_is_loaded_if_its_size_is_known(
    asked, known, tiny_llama, tmp_path, monkeypatch
):
    whole = export_pruned(str(tiny_llama), tmp_path / "a", prune_arguments=asked)
    weights = load_file(tmp_path / "a" / "model.safetensors").values()
    needed = sum(each.numel() * each.itemsize for each in weights)
    assert needed < whole.weight_bytes < needed + 10_000
    usage, loads, load = shutil.disk_usage(tmp_path), [], Checkpoint.load_stored
    monkeypatch.setattr(
        Checkpoint, "load_stored", lambda *a, **k: loads.append(1) or load(*a, **k)
    )
    monkeypatch.setattr(
        "shutil.disk_usage", lambda folder: usage._replace(free=needed - 1)
    )
    short = f"needs {needed:,} bytes, but only {needed - 1:,} are free"
    with pytest.raises(OSError, match=short):
        export_pruned(str(tiny_llama), tmp_path / "b", prune_arguments=asked)
    assert bool(loads) is not known
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_command(tiny_llama, tmp_path, capsys):
    command = ["prune", "--model_args", f"pretrained={tiny_llama}", "--output_path"]
    command += [str(tmp_path / "out"), "--prune_percent", "50", "--recipe", "study"]
    assert main([*command, "--multiple_of", "8", "--max_shard_size", "20KB"]) == 0
    assert "kept digest" in capsys.readouterr().out
    files = [*(tmp_path / "out").glob("*.safetensors")]
    assert len(files) > 1 and all(file.stat().st_size < 40_000 for file in files)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = load_pruned(str(tiny_llama), prune_percent=50, multiple_of=8)
    assert_state(opened, expected.state_dict())
