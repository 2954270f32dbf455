"""One scoring for all widths: scores that outlive a load."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lm_eval_pruned import load_pruned
from lm_eval_pruned.checkpoints.load import load_request
from lm_eval_pruned.checkpoints.planning import plan_rows
from lm_eval_pruned.checkpoints.request import LoadRequest
from lm_eval_pruned.pruning import measuring
from lm_eval_pruned.pruning.arguments import PruneArguments
from tests.helpers.comparing import assert_same_model


PERCENTS = [0, 10, 20, 30, 40, 50, 60]


@pytest.fixture
def load():
    """`load_pruned`, whose calls know the scores of those before them."""
    known_scores = {}

    def load(folder, **arguments):
        asked = PruneArguments.taken_from(arguments)
        request = LoadRequest.resolve(AutoModelForCausalLM, folder, asked, arguments)
        return load_request(request, known_scores=known_scores)

    return load


@pytest.fixture
def scored(monkeypatch):
    """The names of the MLPs that are scored from now on."""
    names = []

    def counted(*args, name, score=measuring.score_neurons, **kwargs):
        names.append(name)
        return score(*args, name=name, **kwargs)

    monkeypatch.setattr(measuring, "score_neurons", counted)
    return names


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text(json.dumps({"text": "The tide comes in twice a day."}) + "\n")
    return str(file)


@pytest.mark.parametrize("criterion", ["maw", "l2", "random"])
def test_seven_widths_are_cut_by_one_scoring(tiny_llama, scored, criterion, load):
    expected = [
        load_pruned(str(tiny_llama), prune_percent=p, criterion=criterion)
        for p in PERCENTS
    ]
    scored.clear()
    for percent, model in zip(PERCENTS, expected, strict=True):
        again = load(str(tiny_llama), prune_percent=percent, criterion=criterion)
        assert_same_model(again, model)
        assert again.prune_record.digest == model.prune_record.digest
    assert len(scored) == len(set(scored)) == 3, "each of three layers is scored once"


@pytest.mark.parametrize("criterion", ["maw_act", "act"])
def test_seven_widths_take_one_calibration(
    tiny_llama, texts, scored, monkeypatch, criterion, load
):
    arguments = {"criterion": criterion, "calibration": texts}
    expected = [
        load_pruned(str(tiny_llama), prune_percent=p, **arguments) for p in PERCENTS
    ]
    scored.clear()
    passes = []
    monkeypatch.setattr(
        measuring,
        "calibrate",
        lambda *args, run=measuring.calibrate: passes.append(args) or run(*args),
    )
    for percent, model in zip(PERCENTS, expected, strict=True):
        again = load(str(tiny_llama), prune_percent=percent, **arguments)
        assert_same_model(again, model)
        assert again.prune_record.as_dict() == model.prune_record.as_dict()
    assert len(passes) == 1
    assert len(scored) == 3


@pytest.fixture
def passes(monkeypatch, tmp_path):
    """Count the passes of text over a whole model, each by what it is for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found: Counter[str] = Counter()
    for module, name in (
        (measuring, "calibrate"),
        (measuring.LoadedModel, "losses"),
        (measuring, "block_influence"),
    ):
        original = getattr(module, name)

        def counted(*args, run=original, name=name):
            found[name] += 1
            return run(*args)

        monkeypatch.setattr(module, name, counted)
    return found


BEST = {"criterion": "best", "criteria_tried": "maw+act+maw_act"}


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_sizes_with_the_best_criterion_take_one_calibration(
    tiny_llama, texts, load, passes, cached
):
    if cached:
        load_pruned(str(tiny_llama), prune_percent=30, calibration=texts, **BEST)
        passes.clear()
    models = [
        load(str(tiny_llama), prune_percent=percent, calibration=texts, **BEST)
        for percent in PERCENTS
    ]
    if cached:
        assert passes == {"calibrate": 1}
    else:
        assert passes == {"calibrate": 1, "losses": 3}
    for percent, model in zip(PERCENTS, models, strict=True):
        alone = load_pruned(
            str(tiny_llama), prune_percent=percent, calibration=texts, **BEST
        )
        assert_same_model(model, alone)
        assert model.prune_record.as_dict() == alone.prune_record.as_dict()


DEPTH = {"drop_by": "block_influence"}


def test_depths_take_one_pass_of_text(tiny_llama, texts, load, passes):
    models = [
        load(str(tiny_llama), drop_layers=count, calibration=texts, **DEPTH)
        for count in (1, 2)
    ]
    assert passes == {"block_influence": 1}
    for count, model in zip((1, 2), models, strict=True):
        alone = load_pruned(
            str(tiny_llama), drop_layers=count, calibration=texts, **DEPTH
        )
        assert_same_model(model, alone)
        assert model.prune_record.as_dict() == alone.prune_record.as_dict()


def test_the_plan_of_several_sizes_takes_one_pass_of_text(tiny_llama, texts, passes):
    asked = {"calibration": texts}
    plan_rows(str(tiny_llama), "drop_layers", [1, 2], **DEPTH, **asked)
    assert passes == {"block_influence": 1}
    passes.clear()
    plan_rows(str(tiny_llama), "prune_percent", [20, 40], **BEST, **asked)
    assert passes == {"calibrate": 1, "losses": 3}


def test_nothing_is_remembered_outside(tiny_llama, scored, load):
    load(str(tiny_llama), ratio=1)
    scored.clear()
    load_pruned(str(tiny_llama), ratio=2)
    assert len(scored) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"criterion": "l1"},
        {"criterion": "random", "seed": 7},
    ],
)
def test_what_decides_the_scores_is_told_apart(tiny_llama, scored, change, load):
    load(str(tiny_llama), ratio=1, criterion="random")
    load(str(tiny_llama), ratio=1)
    scored.clear()
    changed = load(str(tiny_llama), ratio=1, **change)
    assert len(scored) == 3
    assert_same_model(changed, load_pruned(str(tiny_llama), ratio=1, **change))


def test_one_scoring_serves_all_dtypes(tiny_llama, scored, load):
    load(str(tiny_llama), ratio=1)
    for dtype in (torch.bfloat16, torch.float16):
        again = load(str(tiny_llama), ratio=2, dtype=dtype)
        assert_same_model(again, load_pruned(str(tiny_llama), ratio=2, dtype=dtype))
    assert len(scored) == 3 + 2 * 3, "those of load_pruned are its own"


def test_a_checkpoint_that_changed_is_scored_again(tiny_llama, tmp_path, scored, load):
    folder = shutil.copytree(tiny_llama, tmp_path / "copy")
    load(str(folder), ratio=1)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "gate_proj" in name:
            tensors[name] = tensor.flip(0)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    scored.clear()
    changed = load(str(folder), ratio=1)
    assert len(scored) == 3
    assert_same_model(changed, load_pruned(str(folder), ratio=1))


def test_layers_that_were_spared_before_are_scored_when_needed(
    tiny_llama, scored, load
):
    load(str(tiny_llama), ratio=1, layers="0")
    both = load(str(tiny_llama), ratio=1, layers="0-1")
    assert scored == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert_same_model(both, load_pruned(str(tiny_llama), ratio=1, layers="0-1"))
