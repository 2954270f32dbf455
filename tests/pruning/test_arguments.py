"""The arguments of pruning are declared once, and everything that takes them agrees."""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import runpy
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from lm_eval_pruned import PrunePlan, load_pruned, prune_model
from lm_eval_pruned.cli import plan as plan_command, prune as prune_command
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from lm_eval_pruned.pruning.arguments import PruneArguments
from lm_eval_pruned.sweeps.options import OPTIONS, add_arguments, read_file
from lm_eval_pruned.sweeps.plan import Sweep
from tests.helpers.checkpoints import ROOT


#: What users rely on, whatever the declaration says.
DEFAULTS = {
    "ratio": None,
    "prune_percent": None,
    "intermediate_size": None,
    "widths": None,
    "multiple_of": 1,
    "layers": None,
    "skip_layers": None,
    "drop_layers": None,
    "drop_by": "last",
    "allocation": "uniform",
    "min_width": None,
    "criterion": "maw",
    "criteria_tried": None,
    "seed": 0,
    "calibration": None,
    "calibration_samples": None,
}
#: Options that take several values.
SEVERAL = {
    "drop_layers": "drop_layers",
    "ratios": "ratio",
    "prune_percents": "prune_percent",
    "widths": "widths",
    "allocations": "allocation",
    "criteria": "criterion",
    "seeds": "seed",
}
CALLED = [load_pruned, prune_model, PrunePlan.from_arguments, PrunedHFLM]


def options_of(add) -> dict[str, argparse.Action]:
    """Return the options that a command declares, by name."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    add(commands)
    (command,) = commands.choices.values()
    return {action.dest: action for action in command._actions}


def test_python_and_the_model_type_take_them_by_name():
    for called in (PruneArguments, *CALLED):
        parameters = inspect.signature(called).parameters
        taken = {name: parameters[name] for name in DEFAULTS}
        assert {n: p.default for n, p in taken.items()} == DEFAULTS, called
        assert {p.kind for p in taken.values()} == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize(
    ("called", "more"),
    [
        (load_pruned, "pretrained tokenizer device dtype auto_class from_pretrained"),
        (prune_model, "model tokenizer"),
        (PrunePlan.from_arguments, "hidden_size width_before available_layers"),
        (
            PrunedHFLM,
            "pretrained peft peft_stage quantization_config known_scores kwargs",
        ),
    ],
)
def test_help_names_and_explains_all_that_is_taken(called, more):
    assert inspect.signature(called).parameters.keys() == {*DEFAULTS, *more.split()}
    documented = inspect.getdoc(called.__init__ if called is PrunedHFLM else called)
    args = documented.partition("Args:\n")[2].partition("\n\n")[0]
    for name in inspect.signature(called).parameters:
        assert f"\n    {name}: " in f"\n{args}" or f"\n    **{name}: " in args, name
    assert "..." not in args.replace("energy...", "").replace("bnb_4bit_...", "")
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


def test_a_name_that_there_is_not_is_refused():
    for called, places in ((prune_model, [None]), (PrunePlan.from_arguments, [32, 88])):
        with pytest.raises(
            TypeError, match="unexpected keyword argument 'prune_precent'"
        ):
            called(*places, prune_precent=40)


def test_the_command_prune_takes_them():
    options = options_of(prune_command.add)
    assert {name: options[name].default for name in DEFAULTS} == DEFAULTS
    documented = " ".join(inspect.getdoc(load_pruned).split())
    for name, value in DEFAULTS.items():
        line, default = options[name].help.partition(" (default: ")[::2]
        assert f" {name}: {line[0].upper()}{line[1:]}." in documented
        assert default == ("" if value is None else f"{value})")


def test_the_command_plan_takes_several_sizes():
    options = options_of(plan_command.add)
    assert [name for name in SEVERAL if name in options] == [
        "drop_layers",
        "ratios",
        "prune_percents",
        "widths",
    ]
    assert [options[name].default for name in ("ratios", "multiple_of")] == [None, 1]
    assert options["ratios"].help == "expansion ratio to keep; one model each"
    assert (
        options["multiple_of"].help == options_of(prune_command.add)["multiple_of"].help
    )


def test_a_sweep_takes_several_of_them_and_the_others_as_model_arguments(tmp_path):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    named = {option.name for option in OPTIONS}
    assert named >= SEVERAL.keys()
    assert not named & ({*SEVERAL.values(), "intermediate_size"} - {*SEVERAL, "seed"})
    written = {name: ["1", "2"] for name in SEVERAL}
    words = [
        word for name, values in written.items() for word in (f"--{name}", *values)
    ]
    assert written.items() <= vars(parser.parse_args(words)).items()
    (tmp_path / "sweep.yaml").write_text(json.dumps(written))
    assert read_file(str(tmp_path / "sweep.yaml")) == written
    instead = {"intermediate_size": "ratios"} | {v: k for k, v in SEVERAL.items()}
    for name, option in instead.items():
        with pytest.raises(
            ValueError, match=rf"model_args has {name}=2.* use --{option}\."
        ):
            Sweep({"model_args": {name: 2}, "tasks": ["boolq"]})


def test_several_of_one_kind_are_as_wrong_everywhere(tmp_path):
    message = "ratio=1 and prune_percent=2 were given together"
    for called, places in (
        (load_pruned, [str(tmp_path)]),
        (prune_model, [None]),
        (PrunePlan.from_arguments, [32, 88]),
        (PrunedHFLM, [str(tmp_path)]),
    ):
        with pytest.raises(ValueError, match=message):
            called(*places, ratio=1, prune_percent=2)


def test_what_the_harness_split_at_commas_is_joined():
    given = {"skip_layers": 0, "4-5": "", "7]": "", "dtype": "float32", "9": 1}
    taken = PruneArguments.taken_from(given | {"ratio": 1})
    assert taken.skip_layers == [0, "4-5", "7]"]
    left = given | {"ratio": 1}
    PruneArguments.taken_from(left)
    assert left == {"dtype": "float32", "9": 1}
    without = {"4-5": ""}
    assert PruneArguments.taken_from(without) == PruneArguments()
    assert without == {"4-5": ""}


def test_pieces_of_one_of_two_lists_of_layers_are_no_reason_to_forget_the_other():
    given = {"ratio": 1, "layers": 0, "skip_layers": 3, "4-5": ""}
    with pytest.raises(ValueError, match=r"layers=0 and skip_layers=\[3, '4-5'\] were"):
        PruneArguments.taken_from(given)


def test_what_was_checked_stays_as_it_is():
    with pytest.raises(FrozenInstanceError):
        PruneArguments(ratio=1).ratio = "none"


#: The declaration; the arithmetic of each size; what is made of the arguments, which bears their
#: names; and the request of a profile, which has several multiples and a seed for all.
EXPECTED = {
    ("pruning/arguments.py", "PruneArguments"),
    ("pruning/arguments.py", "SIZES"),
    ("pruning/record.py", "PruneRecord"),
    ("pruning/curves.py", "LayerCurve"),
    ("pruning/plan.py", "PrunePlan"),
    ("report/report.py", "as_csv"),
    ("results/groups.py", "series_name"),
    ("profiling/options.py", "ProfileRequest"),
}


def spelled_out(node: ast.AST) -> set[str]:
    """Return the arguments of pruning that one signature, call or literal lists."""
    match node:
        case ast.arguments():
            names = [a.arg for a in (*node.posonlyargs, *node.args, *node.kwonlyargs)]
        case ast.Call():
            names = [keyword.arg for keyword in node.keywords]
        case ast.ClassDef():
            fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
            names = [ast.unparse(each.target) for each in fields]
        case ast.Dict():
            names = [getattr(key, "value", None) for key in node.keys]
        case ast.Tuple() | ast.List() | ast.Set():
            names = [getattr(each, "value", None) for each in node.elts]
        case _:
            names = []
    return {name for name in names if isinstance(name, str)} & DEFAULTS.keys()


def test_nothing_else_lists_them():
    """Three in one place are a list that has to be kept true by hand."""
    found = set()
    for folder in ("lm_eval_pruned", "model_wrappers"):
        for path in (ROOT / folder).rglob("*.py"):
            for top in ast.parse(path.read_text("utf-8")).body:
                if any(len(spelled_out(node)) > 2 for node in ast.walk(top)):
                    name = getattr(top, "name", None) or ast.unparse(top.targets[0])
                    found.add((path.relative_to(ROOT / folder).as_posix(), name))
    assert found == EXPECTED
