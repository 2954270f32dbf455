"""A study from its command to its page: its options, what it will take, what it found."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.helpers.meters import Clock
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
    """Write the sweep of a study, with random cuts and a floor, and return what was found."""
    from lm_eval_pruned.results.runs import read_sweep
    from lm_eval_pruned.study.findings import read_findings
    from lm_eval_pruned.study.preset import checked_families

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
    return read_findings(read_sweep(folder), families=checked_families({}))


@pytest.mark.slow
def test_the_page_is_short_and_shows_floors_and_what_was_published(tmp_path):
    from lm_eval_pruned.study.page import write_study

    tasks = FALLS | RISES | RISES_BELOW | {"gsm8k": (0.3, 0.0, 0.0)}
    tasks |= dict.fromkeys(("boolq", "hellaswag", "winogrande"), (0.6, 0.4, 0.5))
    tasks |= dict.fromkeys(("arc_challenge", "lambada_openai"), (0.5, 0.3, 0.2))
    tasks |= {"truthfulqa_mc1": (0.3, 0.4, 0.2), "leaderboard_musr": (0.4, 0.4, 0.3)}
    found = studied(tmp_path, tasks, (0, 10, 20, 30, 40, 50, 60))
    page, text, *plots = write_study(tmp_path / "page", {"Llama-3.2-1B": found})
    assert "## All models" not in text.read_text("utf-8")
    told = text.read_text("utf-8")
    assert len(told.split()) < 2500
    assert {plot.stem for plot in plots} >= {"capabilities-llama-3-2-1b"}
    # Its score, at the floor of a model that answers the same to everything, and the study's.
    assert "|ifeval|maw|0.400 (constant)|0.100 ≤|" in told
    assert "|mmlu|as published|-|0.311|0.251|" in told
    assert "ifeval cannot show a loss" in told
    assert (
        "ifeval goes from 0.100 to 0.350 at 60 %, not shown to be above its floor"
        in told
    )
    assert page.read_text("utf-8").count("<figure") == 2
    assert "|knowledge falls|v1, v3|yes|knowledge: falls in" in told
    of_two = write_study(tmp_path / "two", {"1B": found, "3B": found})[1]
    line = f"Of 2 models, the dichotomy {found.verdict} for 2 (1B and 3B)."
    assert f"\n## All models\n\n{line}\n" in of_two.read_text("utf-8")


def test_a_page_says_which_figure_nothing_is_left_for(tmp_path):
    from lm_eval_pruned.study.page import write_study

    found = studied(tmp_path, {"mmlu": (0.25, 0.2, 0.25)})
    page, text, *plots = write_study(tmp_path / "page", {"Llama-3.2-1B": found})
    assert {plot.stem for plot in plots} == {"capabilities-llama-3-2-1b"}
    told = text.read_text("utf-8")
    assert "What is kept: not drawn, because no task is left." in told
    assert "What is kept: not drawn" in page.read_text("utf-8")


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
    from lm_eval_pruned.study.preset import options_of

    given = {"output_path": "out", **given}
    (options,) = options_of([str(tiny_llama)], given, kind, quick).values()
    assert {name: options.get(name) for name in expected} == expected
    assert options["output_path"] == f"out/{tiny_llama.name}"


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

    from lm_eval_pruned.study.preset import options_of

    LlamaConfig(hidden_size=hidden, intermediate_size=width).save_pretrained(tmp_path)
    given = {"output_path": "out"}
    (options,) = options_of([str(tmp_path)], given, "base", True).values()
    assert options.get("ratios") == ratios
    assert options["prune_percents"] == ["10", "40"]


def test_the_estimate_counts_documents_tokens_hours_and_bytes(
    tiny_llama, tmp_path, monkeypatch
):
    full = SimpleNamespace(free=0)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: full)
    from lm_eval_pruned.study.estimate import estimate
    from lm_eval_pruned.study.preset import options_of

    size = SimpleNamespace(parameters=10**9)
    tasks = [SimpleNamespace(name=name) for name in ("mmlu", "ifeval", "mine")]
    planned = SimpleNamespace(tasks=tasks, baseline=size, configurations=[size] * 3)
    given = {"output_path": str(tmp_path), "limit": 10.0}
    ((name, options),) = options_of([str(tiny_llama)], given, "base", False).items()
    told = estimate(name, options, planned, 1e12)
    assert "|mmlu|570|427,500|0|" in told and "|ifeval|10|600|12,800|" in told
    # 2 x 3e9 parameters x (427,500 + 600 + 5 x 12,800) tokens / (0.4 x 1e12 a second).
    assert "About 2.1 hours" in told and "Not counted: mine." in told
    assert f"; {tmp_path} has only 0.0 GB free." in told


class Machine(TorchFunctionMode):
    """Computes no matrix product, and moves a clock on by what one takes at a speed."""

    def __init__(self, speed):
        super().__init__()
        self.speed, self.clock = speed, Clock()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not torch.Tensor.matmul:
            return function(*args, **kwargs or {})
        tokens, weight = args
        self.clock.sleep(2 * len(tokens) * weight.numel() / self.speed)
        return tokens


@pytest.mark.parametrize("speed", [1e7, 1e9, 3e10, 1e11, 2e12, 1e15])
def test_the_speed_is_measured_in_less_than_a_second(speed):
    """From float16 on a processor that converts each number, to a card."""
    from lm_eval_pruned.study.estimate import operations_per_second

    with Machine(speed) as machine:
        found = operations_per_second("cpu", "float16", machine.clock)
    assert found == pytest.approx(speed)
    assert machine.clock.now < 1
