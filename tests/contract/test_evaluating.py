"""What docs/evaluating.md promises."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
import torch

from lm_eval_pruned import load_pruned
from tests.contract.commands import pruned
from tests.helpers import checkpoints


with (checkpoints.DATA / "architectures.csv").open(encoding="utf-8") as file:
    ARCHITECTURES = list(csv.DictReader(file))
STUDY = sorted({row["base_model"] for row in ARCHITECTURES})


def planned(folder, *words):
    """Return the rows of ``plan``."""
    source = ("--model_args", f"pretrained={folder}", "--format", "json")
    return json.loads(pruned("plan", *source, *words).out)


def test_half_of_the_ratio_of_llama_has_the_width_and_the_parameters_of_the_page():
    (row,) = planned("meta-llama/Llama-3.2-1B", "--ratios", "2.0")
    assert (row["intermediate_size"], row["parameters"]) == (4096, 833_161_216)


@pytest.mark.parametrize("model", STUDY)
def test_the_study_s_architectures_come_out_exactly(model):
    rows = [row for row in ARCHITECTURES if row["base_model"] == model]
    percents = [row["prune_percent"] for row in rows]
    baseline, *cut = planned(model, "--prune_percents", 0, *percents)
    assert baseline["intermediate_size"] == int(rows[0]["intermediate_size_before"])
    assert baseline["parameters"] == int(rows[0]["parameters_before"])
    assert baseline["reduction"] == 0
    for ours, theirs in zip(cut, rows, strict=True):
        width, parameters = ours["intermediate_size"], ours["parameters"]
        assert width == int(theirs["intermediate_size_after"])
        assert parameters == int(theirs["parameters_after"])
        assert ours["checkpoint_bytes"] == 2 * parameters
        assert ours["expansion_ratio"] == width / int(theirs["hidden_size"])


def test_sizes_are_compared_before_any_weights_are_loaded(tiny_llama, tmp_path):
    shutil.copy(tiny_llama / "config.json", tmp_path)
    assert planned(tmp_path, "--ratios", 2, 1) == planned(tiny_llama, "--ratios", 2, 1)


def test_two_runs_with_equal_digests_evaluated_the_same_neurons(tiny_llama):
    sizes = {"prune_percent": 50}, {"intermediate_size": 44}, {"ratio": 1}
    one, same, other = (load_pruned(str(tiny_llama), **size) for size in sizes)
    assert one.prune_record.digest == same.prune_record.digest
    weights = same.state_dict()
    assert all(torch.equal(w, weights[name]) for name, w in one.state_dict().items())
    assert one.prune_record.digest != other.prune_record.digest


def test_without_a_size_the_unpruned_model_is_loaded(tiny_llama):
    record = load_pruned(str(tiny_llama)).prune_record
    assert record.parameters_after == record.parameters_before
    assert record.digest is None
