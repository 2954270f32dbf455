"""What a report says of neurons that were removed at random."""

from __future__ import annotations

import json

from lm_eval_pruned.compare.comparison import Comparison
from lm_eval_pruned.report.sections import random_section
from lm_eval_pruned.results.groups import series_of
from lm_eval_pruned.results.runs import read_sweep
from tests.helpers.results_files import pruning, spread, write_sweep


NOTHING = Comparison("base", 0.05, (), (), (), ())


def tasks(knows):
    made = {"mmlu": spread(knows, 200), "truthfulqa_mc2": spread(0.4, 200)}
    return {task: {"acc,none": values} for task, values in made.items()}


def set_arguments(folder, name, **arguments):
    for file in folder.glob(f"units/{name}/*/results_*.json"):
        results = json.loads(file.read_text())
        results["config"]["model_args"] |= arguments
        file.write_text(json.dumps(results))


def cells(section, *titles):
    """Return the texts in these columns of a section's table."""
    places = [[c.title for c in section.table.columns].index(title) for title in titles]
    return [[row[place].text for place in places] for row in section.table.cells]


def test_a_recipe_is_called_what_was_typed(tmp_path):
    """Like `sweep --recipes best study --criteria max_abs`, whose records have criteria of their own."""
    ways = (("best", "obs"), ("study", "maw"), (None, "max_abs"))
    runs = {"base": (0, tasks(1.0))}
    runs |= {c: (pruning(20, criterion=c), tasks(0.9)) for _, c in ways}
    write_sweep(tmp_path, runs)
    for recipe, criterion in ways[:2]:
        set_arguments(tmp_path, criterion, recipe=recipe)
    _, others = read_sweep(tmp_path).split()
    assert [*series_of(others)] == ["recipe=best", "recipe=study", "max_abs"]
    (note,) = random_section(others, NOTHING).notes
    assert "--recipes best study --criteria max_abs random --seeds 0 1 2;" in note


def test_a_criterion_is_tested_against_random_cuts_of_its_size(tmp_path):
    runs = {"base": (0, tasks(1.0)), "p20": (20, tasks(0.9)), "p40": (40, tasks(0.27))}
    # No random one has this size.
    runs["p60"] = 60, tasks(0.2)
    for percent in (20, 40):
        for seed in (0, 1):
            chance = pruning(percent, criterion="random", seed=seed)
            runs[f"r{percent}_{seed}"] = chance, tasks(0.25 + 0.01 * seed)
    _, others = read_sweep(write_sweep(tmp_path, runs)).split()
    section = random_section(others, NOTHING)
    rows = cells(section, "run", "base", "score", "verdict")
    assert rows[:4] == [
        ["p20 (3.20) against r20_0", "0.2500", "0.9000", "better"],
        ["p20 (3.20) against r20_1", "0.2600", "0.9000", "better"],
        ["p40 (2.40) against r40_0", "0.2500", "0.2700", "not shown"],
        ["p40 (2.40) against r40_1", "0.2600", "0.2700", "not shown"],
    ]
    assert {row[-1] for row in rows[4:]} == {"not shown"}
    (note,) = section.notes
    assert note.startswith("No random cut has the size of p60 (1.60).")
    assert "--criteria maw random --seeds 0 1 2;" in note
    assert random_section(others[:2] + others[3:], NOTHING).notes == []
    assert random_section([], NOTHING) is None
