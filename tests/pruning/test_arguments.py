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
    without_idle,
)
from lm_eval_pruned.sweeps.plan import Sweep


#: What users rely on, whatever the declaration says; None where it is not here.
DEFAULTS = {
    "multiple_of": 1,
    "drop_by": "last",
    "allocation": "uniform",
    "recipe": "study",
    "seed": 0,
}
#: What else each takes, by its qualified name.
CALLED = {
    load_pruned: "pretrained tokenizer device dtype auto_class from_pretrained",
    prune_model: "model tokenizer",
    PrunePlan.from_arguments: "hidden_size width_before available_layers",
    PrunedHFLM.__init__: "self pretrained peft peft_stage quantization_config known_scores kwargs",
}


@pytest.mark.parametrize("called", CALLED)
def test_python_shows_and_explains_them(called):
    parameters = inspect.signature(called).parameters
    assert parameters.keys() == {*DECLARED, *CALLED[called].split()}
    by_name = [
        p for p in parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    defaults = {each.name: each.default for each in by_name}
    assert defaults.items() >= {name: DEFAULTS.get(name) for name in DECLARED}.items()
    args = inspect.getdoc(called).partition("Args:\n")[2].partition("\n\n")[0]
    for name in parameters.keys() - {"self"}:
        assert f"\n    {name}: " in f"\n{args}" or f"\n    **{name}: " in args, name


def test_a_sweep_names_the_option_that_takes_several():
    instead = {"intermediate_size": "ratios"} | {v: k for k, v in SEVERAL.items()}
    for name, option in instead.items():
        with pytest.raises(ValueError, match=rf"{name}=2.* use --{option}\."):
            Sweep({"model_args": {name: 2}, "tasks": ["boolq"]})


@pytest.mark.parametrize(
    ("given", "taken", "rest"),
    [
        (
            {"skip_layers": 0, "4-5": "", "7]": "", "dtype": "x", "9": 1, "ratio": 1},
            {"skip_layers": [0, "4-5", "7]"], "ratio": 1},
            {"dtype": "x", "9": 1},
        ),
        (
            {"drop_layers": 3, "7": "", "ratio": 2, "skip_layers": 0, "15": ""},
            {"drop_layers": [3, 7], "ratio": 2, "skip_layers": [0, "15"]},
            {},
        ),
        ({"4-5": ""}, {}, {"4-5": ""}),
    ],
)
def test_lists_that_the_harness_split_at_commas_are_joined(given, taken, rest):
    assert PruneArguments.taken_from(given) == PruneArguments(**taken)
    assert given == rest


INFLUENCE = {"drop_layers": 2, "drop_by": "block_influence", "calibration": "a"}
OPEN = {"allocation": "sensitivity", "calibration": "a", "ratio": 2}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (INFLUENCE | {"criterion": "act", "multiple_of": 8}, INFLUENCE),
        (INFLUENCE | {"drop_layers": None}, {"drop_layers": None}),
        (INFLUENCE | {"drop_by": "last"}, {"drop_layers": 2, "drop_by": "last"}),
        (OPEN, OPEN),
        ({"calibration": "a", "ratio": 2}, {"ratio": 2}),
        ({"allocation": "sensitivity", "dtype": "auto"}, {"dtype": "auto"}),
    ],
)
def test_what_is_idle_beside_the_others_is_left_out(given, told):
    assert without_idle(given) == told
