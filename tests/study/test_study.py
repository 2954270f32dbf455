"""A study from its options to how its report begins."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.results_files import pruning, write_sweep


pytest.importorskip("altair", reason="figures need the extra `report`")

N = 80
#: Shares of right answers of the unpruned model and of the smallest, by task, and that of a model
#: that answers the same to everything.
FALLS = {"mmlu": (0.6, 0.3, 0.25), "piqa": (0.8, 0.6, 0.5)}
RISES = {"truthfulqa_mc2": (0.4, 0.7, 0.3)}
RISES_BELOW = {"ifeval": (0.1, 0.35, 0.4)}


def answers(share, seed):
    order = np.random.default_rng(seed).permutation(N)
    return {"acc,none": {"values": (order < share * N).astype(float).tolist()}}


def studied(folder, tasks, percents=(0, 20, 40, 60)):
    """Write the sweep of a study, with random cuts and a floor, and return its report and its files."""
    from lm_eval_pruned.compare.margins import Margin
    from lm_eval_pruned.report.report import compared, write_report
    from lm_eval_pruned.results.runs import read_sweep
    from lm_eval_pruned.study.findings import read_findings
    from lm_eval_pruned.study.run import checked_families
    from lm_eval_pruned.study.sections import study_sections

    def at(done):
        shares = {task: a + (b - a) * done for task, (a, b, _) in tasks.items()}
        return {task: answers(each, n) for n, (task, each) in enumerate(shares.items())}

    runs = {f"p{p}": (p, at(p / percents[-1])) for p in percents}
    for p in percents[1:]:
        cut = pruning(p, criterion="random", seed=0)
        runs[f"p{p}_random"] = (cut, at(1.8 * p / percents[-1]))
    floor = {
        task: answers(share, n) for n, (task, (*_, share)) in enumerate(tasks.items())
    }
    write_sweep(folder, {**runs, "floor-constant": ("constant", floor)})
    sweep = read_sweep(folder)
    comparison = compared(sweep, margin=Margin("equivalent", "5%"))
    findings = read_findings(sweep, comparison, checked_families({}))
    opening = study_sections("Llama-3.2-1B", findings)
    files = write_report(sweep, comparison, opening=opening)
    return files[1].read_text("utf-8"), files


@pytest.mark.slow
def test_the_report_begins_with_the_study_and_shows_what_was_published(tmp_path):
    tasks = FALLS | RISES | RISES_BELOW | {"gsm8k": (0.3, 0.0, 0.0)}
    tasks |= dict.fromkeys(("boolq", "hellaswag", "winogrande"), (0.6, 0.4, 0.5))
    tasks |= dict.fromkeys(("arc_challenge", "lambada_openai"), (0.5, 0.3, 0.2))
    tasks |= {"truthfulqa_mc1": (0.3, 0.4, 0.2), "leaderboard_musr": (0.4, 0.4, 0.3)}
    text, files = studied(tmp_path, tasks, (0, 10, 20, 30, 40, 50, 60))
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
    assert "ifeval cannot show a loss" in text
    assert "|knowledge falls|v1, v3|yes|knowledge: falls in" in text
    # Its score is at the floor of a model that answers the same to everything.
    assert "= shown to lie within 5% of the unpruned model's score." in text


BASE = {"tasks": ["pruned_dichotomy", "pruned_probes"], "seeds": ["0", "1", "2"]}
PERCENTS = ["10", "20", "30", "40", "50", "60"]
QUICK = {
    "tasks": ["pruned_demo", "pruned_demo_text"],
    "prune_percents": ["10", "40"],
    "criteria": ["maw", "random"],
    "seeds": ["0", "1", "2"],
    "limit": None,
}


@pytest.mark.parametrize(
    ("given", "kind", "quick", "expected"),
    [
        ({}, "base", False, BASE | {"prune_percents": PERCENTS}),
        ({}, "instruct", False, {"prune_percents": ["10", "40", "60"]}),
        ({}, None, False, {"apply_chat_template": True}),
        ({}, "base", True, QUICK),
        ({"ratios": ["1.5", "1.0"]}, "base", False, {"prune_percents": None}),
        ({"prune_percents": ["30"]}, "base", False, {"ratios": None}),
        ({"criteria": ["l2"]}, "base", False, {"seeds": None}),
    ],
)
def test_what_is_given_wins_over_the_study(given, kind, quick, expected, tiny_llama):
    from lm_eval_pruned.study.run import options_of

    given = {"output_path": "out", **given}
    options = options_of(str(tiny_llama), given, kind, quick)
    assert {name: options.get(name) for name in expected} == expected
    assert options["output_path"] == "out"


@pytest.mark.parametrize(
    ("hidden", "width", "ratios"),
    [
        # SmolLM2-135M and Llama-3.2-3B, where 10 % leave 2.4, and Llama-3.2-1B, where 40 % do.
        (576, 1536, None),
        (3072, 8192, None),
        (2048, 8192, None),
        # Gemma-3-270M, where neither does; models that are as narrow before.
        (640, 2048, ["2.4"]),
        (960, 2304, None),
        (960, 1920, None),
    ],
)
def test_the_expansion_ratio_2_4_is_among_the_sizes(hidden, width, ratios, tmp_path):
    from transformers import LlamaConfig

    from lm_eval_pruned.study.run import options_of

    LlamaConfig(hidden_size=hidden, intermediate_size=width).save_pretrained(tmp_path)
    given = {"output_path": "out"}
    options = options_of(str(tmp_path), given, "base", True)
    assert options.get("ratios") == ratios
    assert options["prune_percents"] == ["10", "40"]
