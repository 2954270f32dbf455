"""The options of a study."""

from __future__ import annotations

import pytest


pytest.importorskip("altair", reason="figures need the extra `report`")

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
