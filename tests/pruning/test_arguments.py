"""The arguments of pruning are declared once, and everything that takes them agrees."""

from __future__ import annotations

import ast
import inspect
import runpy
from pathlib import Path

import pytest

from lm_eval_pruned import PrunePlan, load_pruned, prune_model
from lm_eval_pruned.cli import parser
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from lm_eval_pruned.pruning.arguments import DECLARED, SEVERAL, PruneArguments
from lm_eval_pruned.sweeps.plan import Sweep
from tests.helpers.checkpoints import ROOT


#: What users rely on, whatever the declaration says; None where it is not here.
DEFAULTS = {
    "multiple_of": 1,
    "drop_by": "last",
    "allocation": "uniform",
    "recipe": "study",
    "seed": 0,
}
CALLED = {
    load_pruned: "pretrained tokenizer device dtype auto_class from_pretrained",
    prune_model: "model tokenizer",
    PrunePlan.from_arguments: "hidden_size width_before available_layers",
    PrunedHFLM: "pretrained peft peft_stage quantization_config known_scores kwargs",
}


@pytest.mark.parametrize("called", CALLED)
def test_python_takes_and_explains_them(called):
    parameters = inspect.signature(called).parameters
    assert parameters.keys() == {*DECLARED, *CALLED[called].split()}
    for name in DECLARED:
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default == DEFAULTS.get(name), name
    documented = inspect.getdoc(called.__init__ if called is PrunedHFLM else called)
    args = documented.partition("Args:\n")[2].partition("\n\n")[0]
    for name in parameters:
        assert f"\n    {name}: " in f"\n{args}" or f"\n    **{name}: " in args, name
    assert max(map(len, args.splitlines())) <= 96


@pytest.mark.parametrize("called", CALLED)
def test_the_site_shows_what_python_shows(called):
    hooks = runpy.run_path(str(ROOT / "docs" / "site_hooks.py"))
    function = called.__init__ if called is PrunedHFLM else called
    source = Path(inspect.getsourcefile(function)).read_text("utf-8")
    (shown,) = (
        node
        for node in ast.walk(ast.parse(hooks["with_prune_arguments"](source)))
        if isinstance(node, ast.FunctionDef)
        and node.name == function.__name__
        and node.decorator_list
    )
    assert ast.get_docstring(shown) == inspect.getdoc(function)
    taken = inspect.signature(called).parameters.values()
    by_name = [p for p in taken if p.kind is inspect.Parameter.KEYWORD_ONLY]
    assert [each.arg for each in shown.args.kwonlyargs] == [p.name for p in by_name]
    defaults = map(ast.literal_eval, shown.args.kw_defaults)
    assert list(defaults) == [p.default for p in by_name]


@pytest.mark.parametrize(
    ("command", "words", "names"),
    [
        ("prune", ["--output_path", "x"], {*DECLARED}),
        ("plan", [], {*DECLARED} - {"ratio", "prune_percent", "intermediate_size"}),
        ("sweep", [], {*SEVERAL} | {*DECLARED} - {*SEVERAL.values()}),
    ],
)
def test_commands_take_them(command, words, names):
    parsed = vars(parser().parse_args([command, *words]))
    names -= {"intermediate_size"} if command == "sweep" else set()
    assert names <= parsed.keys()
    assert {parsed[name] for name in names} == {None}


def test_a_sweep_names_the_option_that_takes_several():
    instead = {"intermediate_size": "ratios"} | {v: k for k, v in SEVERAL.items()}
    for name, option in instead.items():
        with pytest.raises(ValueError, match=rf"{name}=2.* use --{option}\."):
            Sweep({"model_args": {name: 2}, "tasks": ["boolq"]})


@pytest.mark.parametrize(
    ("called", "places"),
    [
        (load_pruned, ["nowhere"]),
        (prune_model, [None]),
        (PrunePlan.from_arguments, [32, 88]),
        (PrunedHFLM, ["nowhere"]),
    ],
)
def test_several_of_one_kind_are_as_wrong_everywhere(called, places):
    with pytest.raises(ValueError, match="ratio=1 and prune_percent=2"):
        called(*places, ratio=1, prune_percent=2)


def test_what_the_harness_split_at_commas_is_joined():
    given = {"skip_layers": 0, "4-5": "", "7]": "", "dtype": "float32", "9": 1}
    given["ratio"] = 1
    assert PruneArguments.taken_from(given).skip_layers == [0, "4-5", "7]"]
    assert given == {"dtype": "float32", "9": 1}
    without = {"4-5": ""}
    assert PruneArguments.taken_from(without) == PruneArguments()
    assert without == {"4-5": ""}
    both = {"ratio": 1, "layers": 0, "skip_layers": 3, "4-5": ""}
    with pytest.raises(ValueError, match=r"layers=0 and skip_layers=\[3, '4-5'\]"):
        PruneArguments.taken_from(both)
