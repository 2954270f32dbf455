"""docs/models.md: which models are pruned, how they are loaded, and what an export is."""

from __future__ import annotations

import json
import resource
import shutil

import pytest

from tests.contract.commands import pruned
from tests.helpers import layouts
from tests.helpers.checkpoints import save_tiny


def prune(source, output, *words):
    """Run ``lm-eval-pruned prune``, by default with the cut of the study."""
    command = ["prune", "--model_args", f"pretrained={source}", "--output_path", output]
    return pruned(*command, *words)


STUDY = ("--prune_percent", 40, "--recipe", "study")


def test_experts_whose_width_the_grouped_product_refuses_run_one_by_one(tmp_path):
    """Before the cut, too, where the export measures what it costs."""
    source, widths = tmp_path / "source", tmp_path / "widths.json"
    save_tiny(source, "deepseek_v3", **layouts.overrides("deepseek_v3", 35))
    widths.write_text(json.dumps({"1": 20}))
    words = ("--widths", widths, "--recipe", "study", "--check")
    done = prune(source, tmp_path / "out", *words)
    assert done.code == 0, done.err
    assert "loss, nats per token" in done.out


@pytest.fixture
def small_files():
    """Let this process write no file above 20 kB, as where a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_export_that_is_killed_leaves_a_folder_that_the_next_one_removes(
    tiny_llama, tmp_path
):
    left = tmp_path / ".out.unfinished-abc"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    assert prune(tiny_llama, tmp_path / "out", *STUDY).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_fills_up_ends_in_one_sentence(tiny_llama, tmp_path, small_files):
    said = prune(tiny_llama, tmp_path / "out", *STUDY).sentence
    assert "The weights cannot be written to" in said and "make room" in said
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("command", ["prune", "heal", "sweep", "sensitivity"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_looked_for(
    command, tmp_path
):
    (tmp_path / "file").touch()
    words = ["--model_args", "pretrained=/nowhere", "--output_path"]
    more = {"prune": STUDY, "heal": ["--data", "texts.jsonl"]}
    more["sweep"] = ["--tasks", "boolq", "--ratios", 2]
    done = pruned(command, *words, tmp_path / "file" / "out", *more.get(command, ()))
    assert "out cannot be written" in done.sentence
    assert "Not a directory" in done.sentence


def test_the_model_card_has_the_size_of_the_weights_and_the_next_command(tmp_path):
    source, out = save_tiny(tmp_path / "A-Base"), tmp_path / "out"
    assert prune(source, out, *STUDY, "--max_shard_size", "100KB").code == 0
    sizes = [path.stat().st_size for path in out.glob("*.safetensors")]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert len(sizes) > 1
    assert f"The weights are {sum(sizes):,} bytes in {len(sizes)} files." in card
    command = "lm-eval-pruned verdict pruned-hf,pretrained=A-Base pruned-hf,pretrained="
    assert command in card
    assert str(tmp_path) not in card


def test_a_folder_without_a_tokenizer_is_told_once_a_line(tmp_path, caplog):
    """The recipe in one line, and that nothing was measured in another."""
    source = save_tiny(tmp_path / "source")
    for path in source.glob("*token*"):
        path.unlink()
    done = prune(source, tmp_path / "out", "--prune_percent", 40)
    assert done.code == 0
    lines = [*done.err.splitlines(), *caplog.messages]
    told = [line for line in lines if "tokenizer" in line]
    assert len(told) == 2, told
    assert told[0].startswith(
        "recipe=fast was chosen, because calibration text needs a"
    )
    assert told[1].startswith(
        "The cost of the cut was not measured: no tokenizer can be"
    )


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("config.json", "config.json"),
        ("*.safetensors", "weights"),
        ("model-00002*", "model-00002-of-00012.safetensors"),
    ],
)
def test_a_damaged_checkpoint_fails_with_one_sentence_that_names_the_file(
    pattern, named, tmp_path, tiny_llama_sharded
):
    source = tmp_path / "source"
    shutil.copytree(tiny_llama_sharded, source)
    paths = [*source.glob(pattern)]
    if named == "weights":
        paths.append(source / "model.safetensors.index.json")
    for path in paths:
        path.unlink()
    said = prune(source, tmp_path / "out", *STUDY).sentence
    assert f"source is a folder without {named}: pass the folder of a" in said
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
