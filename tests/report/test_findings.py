"""The sentences on top of a report, and the families that they are about."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lm_eval_pruned.compare.comparison_rows import Comparison, Difference
from lm_eval_pruned.report.findings import findings
from lm_eval_pruned.results.families import FAMILIES, LEFT, TAKEN, family_of
from lm_eval_pruned.results.files import Run
from lm_eval_pruned.util.palette import FAMILIES as COLOURS
from tests.helpers import checkpoints
from tests.helpers.results_files import pruning


SIZES = (10, 20, 30, 40)
#: Groups that are no family: collections of the study, and the demo's.
NO_FAMILY = {"pruned_dichotomy", "pruned_dichotomy_instruct"}


def sizes(criterion="maw", seed=None):
    return [
        Run(
            f"{criterion}{percent}",
            Path(),
            {},
            config={"pruning": pruning(percent, criterion=criterion, seed=seed)},
        )
        for percent in SIZES
    ]


BASE = Run("base", Path(), {}, config={"pruning": pruning(0)})


def row(
    run, task, verdict, difference=0.0, detectable=0.04, metric="acc,none", base=0.5
):
    return Difference(
        run=run,
        task=task,
        metric=metric,
        base_score=base,
        score=base + difference,
        difference=difference,
        relative=None,
        low=None,
        high=None,
        p=0.01,
        q=None if verdict == "not tested" else 0.01,
        smallest_detectable=detectable,
        documents=100,
        method="none: no samples",
        primary=True,
        verdict=verdict,
    )


def rows(task, *verdicts, criterion="maw", **more):
    return [
        row(f"{criterion}{percent}", task, *verdict, **more)
        for percent, verdict in zip(SIZES, verdicts, strict=True)
    ]


def told(*given, runs=None):
    table = tuple(row for rows in given for row in rows)
    comparison = Comparison("base", 0.05, table, (), (), ())
    found = findings([BASE, *(runs or sizes())], comparison)
    return [each.lead + each.rest for each in found]


def test_the_size_from_which_on_a_family_falls():
    verdicts = [("not shown",), ("worse", -0.1), ("worse", -0.2), ("worse", -0.123)]
    (sentence,) = told(rows("mmlu", *verdicts))
    assert sentence == (
        "Knowledge falls from 3.20 on: mmlu, by up to 20.0 points, no difference shown at 3.60 "
        "(4.0 points could have been seen)."
    )


def test_nothing_shown_says_what_could_have_been_seen():
    assert told(rows("truthfulqa_mc1", *[("not shown",)] * 4)) == [
        "Truthfulness: no difference shown: truthfulqa_mc1, 4.0 points could have been seen."
    ]


def test_the_least_sensitive_size_says_what_could_have_been_seen():
    verdicts = [
        ("not shown", 0.0, detectable) for detectable in (0.01, 0.1, 0.02, 0.03)
    ]
    (sentence,) = told(rows("ifeval", *verdicts))
    assert "10.0 points could have been seen" in sentence
    verdicts[2] = ("not shown", 0.0, None)
    (sentence,) = told(rows("ifeval", *verdicts))
    assert "no difference could have been seen with so few documents" in sentence


def test_sizes_that_are_no_range_are_named():
    verdicts = [("worse", -0.1), ("not shown",), ("worse", -0.1), ("not shown",)]
    (sentence,) = told(rows("mmlu", *verdicts))
    assert sentence.startswith("Knowledge falls at 3.60 and 2.80: ")
    verdicts = [("worse", -0.1), ("not shown",), ("worse", -0.1), ("worse", -0.1)]
    (sentence,) = told(rows("mmlu", *verdicts))
    assert sentence.startswith("Knowledge falls at 3.60 and from 2.80 on: ")
    verdicts = [("not shown",)] * 3 + [("worse", -0.1)]
    (sentence,) = told(rows("mmlu", *verdicts))
    assert sentence.startswith("Knowledge falls at 2.40: ")


def test_tasks_of_a_family_that_disagree():
    up = rows("truthfulqa_mc2", *[("better", 0.05)] * 4)
    down = rows("truthfulqa_mc1", *[("not shown",)] * 2, *[("worse", -0.01)] * 2)
    (sentence,) = told(up, down)
    assert sentence == (
        "Truthfulness falls from 2.80 on and rises from 3.60 on: truthfulqa_mc2 rises from 3.60 "
        "on, by up to 5.0 points; truthfulqa_mc1 falls from 2.80 on, by up to 1.0 point, no difference "
        "shown at 3.60 and 3.20 (4.0 points could have been seen)."
    )


@pytest.mark.parametrize(("rise", "written"), [(3.25, "3.25"), (51098.8, "51,099")])
def test_more_perplexity_is_no_fall(rise, written):
    table = rows(
        "wikitext", *[("worse", rise)] * 4, metric="word_perplexity,none", base=20.0
    )
    assert told(table) == [
        (
            "Language modelling gets worse from 3.60 on: wikitext, by up to "
            f"{written} in word_perplexity."
        )
    ]


def test_what_was_not_tested_is_said_to_be_so():
    assert told(rows("mmlu", *[("not tested",)] * 4)) == [
        "Knowledge: not tested: mmlu (no samples)."
    ]
    both = told(
        rows("mmlu", *[("worse", -0.1)] * 4), rows("gsm8k", *[("not tested",)] * 4)
    )
    assert both[0].endswith("; gsm8k is not tested (no samples).")


def test_sizes_pruned_at_random_are_a_control():
    control = sizes("random", 0)
    given = [
        rows("mmlu", *[("worse", -0.1)] * 4, criterion=each)
        for each in ("maw", "random", "max_abs")
    ]
    assert len(told(*given[:2], runs=[*sizes(), *control])) == 1
    assert len(told(given[1], runs=control)) == 1
    several = told(*given, runs=[*sizes(), *control, *sizes("max_abs")])
    assert [each.partition(" falls")[0] for each in several] == [
        "Knowledge (maw)",
        "Knowledge (max_abs)",
    ]


def test_families_come_in_one_order():
    table = rows("ifeval", *[("not shown",)] * 4), rows("mmlu", *[("not shown",)] * 4)
    assert [each.partition(":")[0] for each in told(*table)] == [
        "Knowledge",
        "Instruction following",
    ]


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


def test_the_demo_has_families_too():
    assert family_of("pruned_demo_truthfulness").name == "truthfulness"
    name = family_of("pruned_demo_instruction_following").name
    assert name == "instruction_following"


def test_every_family_has_a_colour_and_a_side():
    assert set(COLOURS) == {family.name for family in FAMILIES}
    sides = {family.name: family.side for family in FAMILIES}
    assert sides["knowledge"] == sides["language_modeling"] == TAKEN
    assert sides["truthfulness"] == sides["instruction_following"] == LEFT
