"""The families of tasks, and the table that counts what was found of each."""

from __future__ import annotations

import pytest
import yaml

from lm_eval_pruned.compare.comparison import compare, split_sweep
from lm_eval_pruned.report.sections import families_section
from lm_eval_pruned.results.groups import FAMILIES, LEFT, TAKEN, family_of
from lm_eval_pruned.results.runs import read_sweep
from lm_eval_pruned.util.palette import FAMILIES as COLOURS
from tests.helpers import checkpoints
from tests.helpers.results_files import pruning, write_sweep


#: Groups that are no family: collections of the study, and the demo's.
NO_FAMILY = {"pruned_dichotomy", "pruned_dichotomy_instruct"}


def tasks(mmlu, mc1, mc2, ifeval):
    """Return scores of 40 documents, of which so many are right."""
    right = {"mmlu": mmlu, "truthfulqa_mc1": mc1, "truthfulqa_mc2": mc2}
    found = {
        task: {"acc,none": [float(n < count) for n in range(40)]}
        for task, count in right.items()
    }
    # A score that its documents do not make up, and no stderr, cannot be tested.
    odd = {"values": [1.0, 0.0], "score": ifeval}
    return {**found, "ifeval": {"f1,none": odd}}


def test_families_by_size(tmp_path):
    folder = write_sweep(
        tmp_path,
        {
            "base": (0, tasks(30, 20, 20, 0.3)),
            "p20": (20, tasks(30, 20, 35, 0.2)),
            "p40": (40, tasks(10, 5, 35, 0.1)),
            "r40": (pruning(40, criterion="random", seed=0), tasks(9, 20, 20, 0.1)),
        },
    )
    base, others = split_sweep(list(read_sweep(folder).runs), "")
    section = families_section([base, *others], compare(base, others))
    assert section.table.columns == ["family", "pruned by", "3.20", "2.40"]
    assert [[cell.text for cell in row] for row in section.table.cells()] == [
        ["Knowledge", "maw", "\u25cb 1 not shown", "\u25bc 1 worse"],
        ["Knowledge", "random, seed 0", "-", "\u25bc 1 worse"],
        ["Truthfulness", "maw", "\u25b2 1 better, \u25cb 1 not shown"]
        + ["\u25b2 1 better, \u25bc 1 worse"],
        ["Truthfulness", "random, seed 0", "-", "\u25cb 2 not shown"],
        ["Instruction following", "maw", *["\u00d7 1 not tested"] * 2],
        ["Instruction following", "random, seed 0", "-", "\u00d7 1 not tested"],
    ]
    marks = [[cell.mark for cell in row] for row in section.table.cells()]
    assert marks[0] == ["", "", "", "worse"]
    assert marks[2] == ["", "", "better", ""]
    assert families_section([base], compare(base, others)) is None


def groups():
    for file in sorted((checkpoints.ROOT / "tasks").glob("pruned_*.yaml")):
        # The tags of functions name code, which nothing here needs.
        lines = file.read_text(encoding="utf-8").splitlines()
        text = "\n".join(line for line in lines if "!function" not in line)
        group = yaml.safe_load(text)
        if group["group"] not in NO_FAMILY:
            yield group


@pytest.mark.parametrize("group", list(groups()), ids=lambda group: group["group"])
def test_families_are_those_of_the_groups(group):
    (family,) = (f for f in FAMILIES if f"pruned_{f.name}" == group["group"])
    for member in group["task"]:
        assert family_of(member.get("task") or member["group"]) is family


def test_every_family_has_a_colour_and_a_side():
    assert set(COLOURS) == {family.name for family in FAMILIES}
    sides = {family.name: family.side for family in FAMILIES}
    assert sides["knowledge"] == sides["language_modeling"] == TAKEN
    assert sides["truthfulness"] == sides["instruction_following"] == LEFT
