"""What a study finds in made results: the verdict of each combination of its sides, and its claims."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from tests.helpers.results_files import pruning, write_sweep


pytest.importorskip("altair", reason="figures need the extra `report`")

from lm_eval_pruned.compare.margins import Margin
from lm_eval_pruned.report.report import compared, write_report
from lm_eval_pruned.results.groups import SIDES
from lm_eval_pruned.results.runs import read_sweep
from lm_eval_pruned.study.findings import read_findings
from lm_eval_pruned.study.run import checked_families
from lm_eval_pruned.study.sections import (
    claims_of,
    open_questions,
    sentences,
    states_text,
    study_sections,
)


N = 200
STATES = ("falls", "keeps", "rises", "cannot tell")
#: Right answers of the unpruned model and of a cut one, as the first and one after the last of `N`.
#: Of the last, as many become wrong as right: 30 of 200 say nothing about 5 % of the score.
CHANGES = {
    "falls": ((0, 140), (0, 80)),
    "keeps": ((0, 120), (0, 120)),
    "rises": ((0, 100), (0, 160)),
    "cannot tell": ((0, 120), (15, 135)),
    "rises to the floor": ((0, 10), (0, 50)),
    "rises above the floor": ((0, 50), (0, 140)),
    "at the floor": ((0, 50), (0, 20)),
}
#: A family of each side, by the first word of its tasks.
FAMILIES = {
    "facts": "knowledge",
    "prose": "language_modeling",
    "chat": "instruction_following",
}


def right(first, last):
    values = np.zeros(N)
    values[first:last] = 1.0
    return {"acc,none": {"values": values.tolist()}}


def made(folder, tasks, *, sizes=(20, 40), metadata=None, cuts=(), **how):
    """Write a sweep whose tasks change, by name, as `CHANGES` says, and return what was found.

    `cuts` are more (id, pruning, changes by task), the others change as the unpruned model.
    """
    base = {task: right(*CHANGES[change][0]) for task, change in tasks.items()}
    cut = {task: right(*CHANGES[change][1]) for task, change in tasks.items()}
    runs = {"baseline": (0, base), **{f"p{size}": (size, cut) for size in sizes}}
    for name, record, answers in cuts:
        runs[name] = record, base | answers
    runs["floor-constant"] = "constant", dict.fromkeys(tasks, right(0, 50))
    write_sweep(folder, runs, metadata=metadata)
    return found_in(folder, **how)


def found_in(folder, margin="5%", families=None):
    """Return what the sweep in a folder shows."""
    sweep = read_sweep(folder)
    comparison = compared(sweep, margin=Margin("equivalent", margin))
    return read_findings(sweep, comparison, families or {})


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    names = itertools.product(FAMILIES, CHANGES)
    tasks = {f"{kind} {change}".replace(" ", "_"): change for kind, change in names}
    metadata = {
        task: {"family": FAMILIES[task.partition("_")[0]], "version": 1}
        for task in tasks
    }
    return made(tmp_path_factory.mktemp("every"), tasks, metadata=metadata)


def only(found, *names):
    names = [name.replace(" ", "_") for name in names]
    return replace(found, tasks=[each for each in found.tasks if each.task in names])


@pytest.mark.parametrize("states", [*itertools.product(STATES, repeat=3)], ids="-".join)
def test_the_verdict_of_each_combination(states, every):
    names = [f"{kind} {state}" for kind, state in zip(FAMILIES, states, strict=True)]
    verdict = "does not hold"
    if "cannot tell" in states:
        verdict = "cannot be decided"
    elif states[2] != "falls":
        of_falls = ["does not hold", "holds in part", "holds"]
        verdict = of_falls[states[:2].count("falls")]
    facts, prose, chat = (
        f"{state} in {name.replace(' ', '_')}"
        for state, name in zip(states, names, strict=True)
    )
    assert sentences("tiny", only(every, *names))[0] == (
        f"For tiny the dichotomy {verdict}. Knowledge: {facts}; language modelling: {prose}; "
        f"truthfulness and instructions: {chat}."
    )


@pytest.mark.parametrize(
    ("names", "verdict", "words"),
    [
        # One task shows a loss; what keeps or rises must be shown of all that can show it.
        (
            ["chat falls", "chat rises"],
            "does not hold",
            "falls in chat_falls, rises in",
        ),
        (["chat keeps", "chat rises"], "holds", "rises in chat_rises, keeps in"),
        (
            ["chat rises", "chat cannot tell"],
            "cannot be decided",
            "cannot tell in chat",
        ),
        # At its floor, a task can show a rise above it, and nothing else.
        (
            ["chat rises above the floor"],
            "holds",
            "rises in chat_rises_above_the_floor",
        ),
        (["chat rises to the floor"], "cannot be decided", "no task is shown to be"),
        (["chat at the floor"], "cannot be decided", "no task is shown to be above"),
        (["chat at the floor", "chat keeps"], "holds", "keeps in chat_keeps."),
        ([], "cannot be decided", "instructions: cannot tell, because it has no task"),
    ],
)
def test_several_tasks_of_a_side_and_floors(names, verdict, words, every):
    found = only(every, "facts falls", "prose falls", *names)
    sentence = sentences("tiny", found)[0]
    assert found.verdict == verdict
    assert words in sentence.rpartition("; ")[2]


def test_a_task_counts_by_its_metadata_or_by_the_option_and_not_by_its_name(tmp_path):
    tasks = {"mmlu_of_instructions": "falls", "mine": "falls", "ifeval_2": "keeps"}
    metadata = {"mmlu_of_instructions": {"family": "language_modeling"}}
    families = {"mine": "knowledge", "mmlu_of_instructions": "truthfulness"}
    found = made(tmp_path, tasks, metadata=metadata, families=families)
    assert [task.task for task in found.on(SIDES[0])] == ["mine"]
    assert [task.task for task in found.on(SIDES[1])] == ["mmlu_of_instructions"]
    assert found.on(SIDES[2]) == []
    assert any(
        each.startswith("On no side: ifeval_2. Name their families")
        for each in open_questions(found)
    )


def test_the_margin_decides_what_keeps_and_is_told(tmp_path):
    found = made(tmp_path, {"mmlu": "cannot tell"}, families={"mmlu": "knowledge"})
    wide = found_in(tmp_path, margin="20%", families={"mmlu": "knowledge"})
    assert (found.state(SIDES[0]), wide.state(SIDES[0])) == ("cannot tell", "keeps")
    assert "shown to lie within 5% of the unpruned" in sentences("tiny", found)[1]
    assert "shown to lie within 20% of the unpruned" in sentences("tiny", wide)[1]


def test_a_loss_on_text_needs_no_floor(tmp_path):
    rng = np.random.default_rng(0)
    likelihoods = -100 - 20 * rng.random(80)
    values = {0: likelihoods, 20: 1.2 * likelihoods, 40: 1.5 * likelihoods}
    runs = {}
    for size, each in values.items():
        pairs = [(value, 150) for value in each.tolist()]
        how = {"aggregation": "bits", "higher_is_better": False}
        runs[f"p{size}"] = (
            size,
            {"text": {"bits_per_byte,none": {"values": pairs, **how}}},
        )
    write_sweep(tmp_path, runs)
    found = found_in(tmp_path, families={"text": "language_modeling"})
    assert states_text(found, SIDES[1]) == "language modelling: falls in text"


def test_what_is_compared_with_random_cuts_is_shown_against_each_of_them(tmp_path):
    more, less = {"mmlu": right(0, 60)}, {"mmlu": right(0, 199)}
    cuts = [
        ("r0", pruning(20, criterion="random", seed=0), more),
        ("r1", pruning(20, criterion="random", seed=1), {"mmlu": right(0, 119)}),
        ("v20", pruning(20, criterion="vow"), less),
    ]
    found = made(tmp_path, {"mmlu": "keeps"}, sizes=(20,), cuts=cuts)
    assert found.criterion == "maw"
    assert found.against["random"]["mmlu"] == {"not shown"}
    assert found.against["vow"]["mmlu"] == {"worse"}
    assert "Compared with `vow` of the same size, it keeps less in mmlu." in sentences(
        "tiny", found
    )


CLAIMS = {
    "facts": "knowledge",
    "prose": "language_modeling",
    "chat": "instruction_following",
    "musr": "reasoning",
    "truth": "truthfulness",
}


def claimed(found):
    return {claim: [*answer] for claim, *answer in claims_of(found)}


def test_each_claim_of_the_paper_is_named_with_what_is_shown(tmp_path):
    tasks = {"facts": "falls", "prose": "falls", "chat": "rises"}
    tasks |= {"musr": "keeps", "truth": "cannot tell"}
    worse = {"facts": right(0, 60), "prose": right(0, 80), "chat": right(0, 160)}
    cuts = [(f"v{size}", pruning(size, criterion="vow"), worse) for size in (20, 40)]
    cuts += [
        (f"r{size}", pruning(size, criterion="random", seed=0), {}) for size in (20, 40)
    ]
    found = made(tmp_path, tasks, cuts=cuts, families=CLAIMS)
    table = claimed(found)
    assert {claim: row[:2] for claim, row in table.items()} == {
        "knowledge falls": ["v1, v3", "yes"],
        "language modelling falls": ["v1, v3", "yes"],
        "instruction following improves": ["v1", "yes"],
        "multi-step reasoning (MUSR) is robust": ["v1, v3", "yes"],
        "truthfulness improves as knowledge falls": ["v1", "cannot tell"],
        "instruction following improves at the expansion ratio 2.4": ["v3", "yes"],
        "the decline can be predicted from the size": ["v1, v3", "no"],
        "`maw` keeps more than `vow`": ["v3", "yes"],
        "`maw` keeps more than random cuts": ["v3", "in part"],
        "less energy per token": ["v1", "cannot tell"],
        "a single request takes longer": ["v1", "cannot tell"],
    }
    evidence = table["instruction following improves at the expansion ratio 2.4"][2]
    assert evidence == "chat rises: 0.500 to 0.800, floor 0.250 (constant)"
    assert table["less energy per token"][2].endswith("not measured")


TRUTH = "truthfulness improves as knowledge falls"
ROBUST = "multi-step reasoning (MUSR) is robust"


@pytest.mark.parametrize(
    ("claim", "tasks", "shown"),
    [
        (TRUTH, {"facts": "falls", "truth": "rises"}, "yes"),
        (TRUTH, {"facts": "falls", "truth": "keeps"}, "no"),
        (TRUTH, {"facts": "falls", "truth": "falls"}, "no"),
        (TRUTH, {"facts": "falls", "truth": "cannot tell"}, "cannot tell"),
        (TRUTH, {"facts": "keeps", "truth": "rises"}, "cannot tell"),
        # Within the margin, and above the floor.
        (ROBUST, {"musr": "falls"}, "no"),
        (ROBUST, {"musr": "rises"}, "yes"),
        (ROBUST, {"musr": "cannot tell"}, "cannot tell"),
        (ROBUST, {"musr": "at the floor"}, "cannot tell"),
    ],
)
def test_claims_on_truthfulness_and_reasoning(claim, tasks, shown, tmp_path):
    answer, evidence = claimed(made(tmp_path, tasks, families=CLAIMS))[claim][1:]
    assert answer == shown
    if claim == TRUTH:
        assert evidence.startswith(f"truthfulness: {tasks['truth']} in truth")
        both = "facts and truth: r = -1.000 over 3 sizes"
        assert evidence.endswith(both) or answer != "yes"


@pytest.mark.parametrize(
    ("shares", "shown"),
    [
        ((180, 160, 140, 120), "yes"),
        ((180, 80, 70, 60), "no"),
        ((180, 180, 180, 180), "cannot tell"),
        ((100, 120, 140, 160), "no"),
    ],
)
def test_a_decline_is_predictable_where_a_line_meets_each_size(shares, shown, tmp_path):
    runs = {
        f"p{size}": (size, {"facts": right(0, share)})
        for size, share in zip((0, 20, 40, 60), shares, strict=True)
    }
    floor = {"floor-constant": ("constant", {"facts": right(0, 50)})}
    write_sweep(tmp_path, runs | floor)
    found = found_in(tmp_path, families=CLAIMS)
    assert claimed(found)["the decline can be predicted from the size"][1] == shown


def test_energy_and_latency_are_claims_beside_the_others(tmp_path):
    made(tmp_path, {"facts": "falls"}, families=CLAIMS)
    change = {"percent": -7.5, "low": -9.0, "high": -6.0, "verdict": "lower"}
    cell = {"model": "p", "batch_size": 1, "mode": "fixed"}
    cell["deltas"] = {"joules_per_output_token": change, "seconds_end_to_end": change}
    profile = {"models": [{"name": "p", "expansion_ratio": 2.4}], "cells": [cell]}
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "profile.json").write_text(json.dumps(profile))
    table = claimed(found_in(tmp_path))
    assert table["less energy per token"][1] == "yes"
    assert table["less energy per token"][2].endswith("-7.5 % at 2.40 [-9.0, -6.0]")
    assert table["a single request takes longer"][1] == "no"


@pytest.mark.slow
def test_the_report_begins_with_the_study_and_shows_what_was_published(tmp_path):
    tasks = {"mmlu": "falls", "piqa": "falls", "truthfulqa_mc2": "rises"}
    tasks |= {"ifeval": "at the floor", "leaderboard_musr": "keeps"}
    sizes = (10, 20, 30, 40, 50, 60)
    random = [(f"r{p}", pruning(p, criterion="random", seed=0), {}) for p in sizes]
    families = checked_families({})
    found = made(tmp_path, tasks, sizes=sizes, cuts=random, families=families)
    opening = study_sections("Llama-3.2-1B", found)
    sweep = read_sweep(tmp_path)
    comparison = compared(sweep, margin=Margin("equivalent", "5%"))
    files = write_report(sweep, comparison, opening=opening)
    text = files[1].read_text("utf-8")
    headings = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert headings[:4] == [
        "Verdict of the study",
        "Claims of the paper",
        "Scores that the study published",
        "Limits of the study",
    ]
    assert "scores-maw" in {file.stem for file in files}
    assert "|task|metric|0 %|10 %|" in text
    assert "|mmlu|acc,none|0.311|0.251|" in text
    # Its score is at the floor of a model that answers the same to everything.
    assert "ifeval cannot show a loss" in text
    assert "|knowledge falls|v1, v3|yes|knowledge: falls in" in text
    assert "= shown to lie within 5% of the unpruned model's score." in text
