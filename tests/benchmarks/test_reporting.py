"""What the benchmarks measure and print alike, and the two comparisons with `hf`."""

from __future__ import annotations

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from lm_eval_pruned.model_wrappers.hf_prefix import PrefixHFLM
from tests.helpers import checkpoints


@pytest.fixture(scope="module")
def reporting(script):
    return script("reporting")


def test_sides_take_turns_and_each_begins_once(reporting):
    assert "".join(reporting.in_turns("abc", 3)) == "abcbcacab"


def test_a_table_has_the_spread_of_figures_and_of_ratios_by_pairs(reporting):
    sides = {"ours": {"s": [1.0, 2.0, 4.0]}, "hf": {"s": [3.0, 2.0, 1200.0]}}
    *_, ours, hf, ratio = reporting.comparison(sides).splitlines()
    assert ours == "|ours|1 / 2 / 4|"
    assert hf == "|hf|2 / 3 / 1,200|"
    assert ratio == "|hf / ours|1 / 3 / 300|"
    assert reporting.spread([1.25]) == "1.25"


def test_differences_are_of_values_with_flags_or_without(reporting):
    assert reporting.worst([(-1.0, True), (-2.0, True)], [[-1.5, 1], [-2.0, 0]]) == 0.5
    assert reporting.worst([-1.0], [-1.25]) == 0.25
    assert reporting.agreement(["a", "b"], ["a", "c"]).startswith("1 of 2 ")
    assert reporting.root_mean_square([1.0, 2.0], [4.0, 6.0]) == pytest.approx(
        12.5**0.5
    )


def test_memory_is_what_a_block_takes_and_keeps(reporting):
    with reporting.memory_of(torch.device("cpu")) as memory:
        kept = torch.ones(2**23)
        torch.ones(2**24).sum()
    assert memory.peak - memory.before > 90 * 2**20
    assert memory.after - memory.before == pytest.approx(kept.nbytes, abs=8 * 2**20)


def test_the_gap_is_that_of_the_place_where_texts_part(reporting, tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    lm = HFLM(model, tokenizer=checkpoints.byte_tokenizer(), batch_size=1)
    found = reporting.gap_where_they_part(lm, "abc", "xyz", "xyw")
    tokens = lm.tok_encode("abcxy")
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, -1].sort().values
    assert found == pytest.approx(float(logits[-1] - logits[-2]), abs=1e-5)


def test_a_model_that_is_not_shared_is_an_error(reporting, tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    lm = PrefixHFLM(
        model,
        tokenizer=checkpoints.byte_tokenizer(),
        prefix_sharing=False,
        batch_size=1,
    )
    requests = [
        Instance("loglikelihood", {}, ("aaaa", c), i) for i, c in enumerate("bc")
    ]
    with (
        pytest.raises(RuntimeError, match="plain path: prefix_sharing=false"),
        reporting.on_the_fast_path(lm),
    ):
        lm.loglikelihood(requests, disable_tqdm=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, words, agrees",
    [
        ("loglikelihood", ["--task", "demo"], "0 greedy flags differ"),
        ("generation", ["--task", "uniform", "--max-gen-toks", "4"], "2 of 2 texts"),
    ],
)
def test_both_comparisons_choose_a_batch_size_and_find_agreement(
    script, tiny_llama, capsys, name, words, agrees
):
    words += ["--pretrained", str(tiny_llama), "--limit", "2", "--repeats", "2"]
    script(name).main([*words, "--hf-batch-sizes", "1,8"])
    printed = capsys.readouterr().out
    assert "hf, batch size 1" in printed
    assert "hf, batch size 8" in printed
    (ratio,) = (line for line in printed.splitlines() if " / hf-prefix|" in line)
    assert ratio.count(" / ") == 5
    assert agrees in printed
