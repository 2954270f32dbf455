"""One scoring for all widths: scores that outlive a load."""

from __future__ import annotations

import shutil
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM

from lm_eval_pruned import load_pruned
from lm_eval_pruned.checkpoints.load import load_request
from lm_eval_pruned.checkpoints.planning import plan_rows
from lm_eval_pruned.checkpoints.request import LoadRequest
from lm_eval_pruned.pruning import measuring
from lm_eval_pruned.pruning.arguments import PruneArguments
from lm_eval_pruned.pruning.criteria import CALIBRATED, CRITERIA, RANDOM
from tests.helpers.checkpoints import edit_weights
from tests.helpers.comparing import assert_same_model
from tests.helpers.ways_to_load import write_texts


PERCENTS = [0, 10, 20, 30, 40, 50, 60]
BEST = {"criterion": "best", "criteria_tried": "maw+act+maw_act"}
DEPTH = {"drop_by": "block_influence"}


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_texts(tmp_path / "texts.jsonl")


@pytest.fixture
def work(monkeypatch):
    """List what is computed: MLPs that are scored, and passes of text by what they are for."""
    found: list[str] = []
    for module, name in (
        (measuring, "score_neurons"),
        (measuring, "calibrate"),
        (measuring, "block_influence"),
        (measuring.LoadedModel, "losses"),
    ):
        original = getattr(module, name)

        def counted(*args, run=original, what=name, **named):
            found.append(what)
            return run(*args, **named)

        monkeypatch.setattr(module, name, counted)
    return found


@pytest.fixture
def load(tiny_llama, work):
    """Load with the scores of earlier calls; fail unless it is what `load_pruned` gives."""
    known_scores = {}

    def load(folder=tiny_llama, **given):
        arguments = dict(given)
        asked = PruneArguments.taken_from(arguments)
        auto = AutoModelForCausalLM
        request = LoadRequest.resolve(auto, str(folder), asked, arguments)
        model = load_request(request, known_scores=known_scores)
        counted = [*work]
        alone = load_pruned(str(folder), **given)
        assert_same_model(model, alone)
        assert model.prune_record.as_dict() == alone.prune_record.as_dict()
        work[:] = counted

    return load


@pytest.mark.parametrize("criterion", [*CRITERIA, RANDOM])
def test_seven_widths_are_cut_by_one_scoring(criterion, load, work, text):
    asked = {"calibration": text} if criterion in CALIBRATED else {}
    for percent in PERCENTS:
        load(prune_percent=percent, criterion=criterion, **asked)
    passes = {"calibrate": 1} if criterion in CALIBRATED else {}
    assert Counter(work) == {"score_neurons": 3, **passes}, (
        "each of three layers is scored once"
    )


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_sizes_with_the_best_criterion_take_one_calibration(
    tiny_llama, text, load, work, cached
):
    if cached:
        load_pruned(str(tiny_llama), prune_percent=30, calibration=text, **BEST)
        work.clear()
    for percent in PERCENTS:
        load(prune_percent=percent, calibration=text, **BEST)
    assert work.count("calibrate") == 1
    assert work.count("losses") == (0 if cached else 3)


def test_depths_take_one_pass_of_text(text, load, work):
    for count in (1, 2):
        load(drop_layers=count, calibration=text, **DEPTH)
    assert Counter(work) == {"block_influence": 1}


def test_the_plan_of_several_sizes_takes_one_pass_of_text(tiny_llama, text, work):
    asked = {"calibration": text}
    plan_rows(str(tiny_llama), "drop_layers", [1, 2], **DEPTH, **asked)
    assert Counter(work) == {"block_influence": 1}
    plan_rows(str(tiny_llama), "prune_percent", [20, 40], **BEST, **asked)
    assert (work.count("calibrate"), work.count("losses")) == (1, 3)


@pytest.mark.parametrize("change", [{"criterion": "l1"}, {"seed": 7}])
def test_what_decides_the_scores_is_told_apart(change, load, work):
    load(ratio=1, criterion=RANDOM)
    load(ratio=1)
    load(ratio=1, **{"criterion": RANDOM, **change})
    assert Counter(work) == {"score_neurons": 3 * 3}


def test_one_scoring_serves_all_dtypes_and_layers_are_added(load, work):
    load(ratio=1, layers="0")
    load(ratio=1, layers="0-1")
    assert Counter(work) == {"score_neurons": 2}
    for dtype in (torch.bfloat16, torch.float16):
        load(ratio=2, dtype=dtype)
    assert Counter(work) == {"score_neurons": 3}


def test_a_checkpoint_that_changed_is_scored_again(tiny_llama, tmp_path, work, load):
    folder = shutil.copytree(tiny_llama, tmp_path / "copy")
    load(folder, ratio=1)

    def flip(tensors):
        for name in tensors:
            tensors[name] = tensors[name].flip(0)

    edit_weights(folder, flip)
    load(folder, ratio=1)
    assert Counter(work) == {"score_neurons": 2 * 3}
