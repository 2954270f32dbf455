"""The arguments of pruning are declared once, and everything that takes them agrees."""

from __future__ import annotations

import inspect

import pytest

from lm_eval_pruned import PrunePlan, load_pruned, prune_model
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from lm_eval_pruned.pruning.arguments import (
    DECLARED,
    SEVERAL,
    PruneArguments,
    PruneKeywords,
    take_prune_arguments,
    without_idle,
)
from lm_eval_pruned.sweeps.plan import plan_sweep


#: What users rely on, whatever the declaration says; None where it is not here.
DEFAULTS = {
    "multiple_of": 1,
    "recipe": "study",
    "seed": 0,
}


def test_defaults_are_those_that_users_rely_on():
    defaults = {name: declared.default for name, declared in DECLARED.items()}
    assert defaults == {name: DEFAULTS.get(name) for name in DECLARED}


def test_they_are_explained_and_named_for_those_who_take_them_by_name():
    assert PruneKeywords.__annotations__.keys() == DECLARED.keys()
    assert all(PruneArguments.row(name)[1]["help"] for name in DECLARED)
    for function in (load_pruned, prune_model, PrunePlan.from_arguments, PrunedHFLM):
        explained = inspect.getdoc(
            function.__init__ if function is PrunedHFLM else function
        )
        assert "lm_eval_pruned.pruning.arguments.PruneArguments" in explained
    assert PrunedHFLM.argument_names() >= {*DECLARED}


def test_a_sweep_names_the_option_that_takes_several():
    instead = {"intermediate_size": "ratios"} | {v: k for k, v in SEVERAL.items()}
    for name, option in instead.items():
        with pytest.raises(ValueError, match=rf"{name}=2.* use --{option}\."):
            plan_sweep({"model_args": {name: 2}, "tasks": ["boolq"]})


@pytest.mark.parametrize(
    ("given", "taken", "rest"),
    [
        (
            {"skip_layers": 0, "4-5": "", "7]": "", "dtype": "x", "9": 1, "ratio": 1},
            {"skip_layers": [0, "4-5", "7]"], "ratio": 1},
            {"dtype": "x", "9": 1},
        ),
        (
            {"layers": 3, "7": "", "ratio": 2},
            {"layers": [3, "7"], "ratio": 2},
            {},
        ),
        ({"4-5": ""}, {}, {"4-5": ""}),
    ],
)
def test_lists_that_the_harness_split_at_commas_are_joined(given, taken, rest):
    assert PruneArguments(**take_prune_arguments(given)) == PruneArguments(**taken)
    assert given == rest


OPEN = {"allocation": "sensitivity", "calibration": "a", "ratio": 2}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"criterion": "act", "calibration": "a", "multiple_of": 8}, {}),
        (OPEN, OPEN),
        ({"calibration": "a", "ratio": 2}, {"ratio": 2}),
        ({"allocation": "sensitivity", "dtype": "auto"}, {"dtype": "auto"}),
    ],
)
def test_what_is_idle_beside_the_others_is_left_out(given, told):
    assert without_idle(given) == told


def test_the_uneven_recipe_is_the_best_with_shared_widths():
    best, uneven = (
        PruneArguments(prune_percent=20, recipe=name) for name in ("best", "uneven")
    )
    assert (best.allocation, uneven.allocation) == ("uniform", "sensitivity")
    assert (best.criterion, best.repair) == (uneven.criterion, uneven.repair)
    some = PruneArguments(prune_percent=20, recipe="uneven", layers="1+2")
    assert some.allocation == "sensitivity"
    # There is nothing to share, or the user says how.
    for asked in ({}, {"widths": {0: 8}}, {"ratio": 1, "allocation": "uniform"}):
        assert PruneArguments(recipe="uneven", **asked).allocation == "uniform"
