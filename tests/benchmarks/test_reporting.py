"""What the benchmarks measure and print alike, and the comparisons with `hf`."""

from __future__ import annotations

import re

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from lm_eval_pruned.model_wrappers.hf_prefix import PrefixHFLM
from tests.helpers import checkpoints
from tests.helpers.answering import SCORED


@pytest.fixture(scope="module")
def reporting(script):
    return script("reporting")


def made(cls, pretrained, **arguments):
    model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32)
    tokenizer = checkpoints.byte_tokenizer()
    return cls(model, tokenizer=tokenizer, batch_size=1, **arguments)


def test_sides_take_turns_and_each_begins_once(reporting):
    assert "".join(reporting.in_turns("abc", 3)) == "abcbcacab"


def test_a_table_has_the_spread_of_figures_and_of_ratios_by_pairs(reporting):
    sides = {"ours": {"s": [1.0, 2.0, 4.0]}, "hf": {"s": [3.0, 2.0, 1200.0]}}
    *_, ours, hf, ratio = reporting.comparison(sides).splitlines()
    assert ours == "|ours|1 / 2 / 4|"
    assert hf == "|hf|2 / 3 / 1,200|"
    assert ratio == "|hf / ours|1 / 3 / 300|"


def test_differences_are_of_values_with_flags_or_without(reporting):
    assert reporting.worst([(-1.0, True), (-2.0, True)], [[-1.5, 1], [-2.0, 0]]) == 0.5
    assert reporting.worst([-1.0], [-1.25]) == 0.25
    assert reporting.agreement(["a", "b"], ["a", "c"]).startswith("1 of 2 ")
    assert reporting.root_mean_square([1, 2], [4, 6]) == pytest.approx(12.5**0.5)


def test_memory_is_what_a_block_takes_and_keeps(reporting):
    with reporting.memory_of(torch.device("cpu")) as memory:
        kept = torch.ones(2**23)
        torch.ones(2**24).sum()
    assert memory.peak - memory.before > 90 * 2**20
    assert memory.after - memory.before == pytest.approx(kept.nbytes, abs=8 * 2**20)


def test_the_gap_is_that_of_the_place_where_texts_part(reporting, tiny_llama):
    lm = made(HFLM, tiny_llama)
    found = reporting.gap_where_they_part(lm, "abc", "xyz", "xyw")
    with torch.no_grad():
        logits = lm.model(torch.tensor([lm.tok_encode("abcxy")])).logits[0, -1]
    first, second = logits.topk(2).values.tolist()
    assert found == pytest.approx(first - second, abs=1e-5)


def test_a_model_that_is_not_shared_is_an_error(reporting, tiny_llama):
    lm = made(PrefixHFLM, tiny_llama, prefix_sharing=False)
    with (
        pytest.raises(RuntimeError, match="plain path: prefix_sharing=false"),
        reporting.on_the_fast_path(lm),
    ):
        SCORED.ask(lm, [("aaaa", "b"), ("aaaa", "c")])


BESIDE_HF = ["hf, batch size 1", "hf, batch size 8", r" / hf-prefix\|(.* / .*){4}\|"]
TASKS = ["pruned_demo_truthfulness", "pruned_demo_instruction_following"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, words, printed",
    [
        (
            "faster",
            "--hf-batch-sizes 1,8 --tasks demo",
            [*BESIDE_HF, "0 greedy flags differ"],
        ),
        (
            "engines",
            f"--models hf-prefix hf --max-gen-toks 4 --tasks {' '.join(TASKS)}",
            [
                *(r"^\|work\|requests\|hf-prefix, s\|hf, s\|$", r"^\|loading\|\|"),
                *(rf"^\|{task}, (.* / .*){{4}}\|$" for task in TASKS),
                rf"^hf-prefix beside hf, {TASKS[0]}.*log-likelihoods differ by at most ",
                rf"^hf-prefix beside hf, {TASKS[1]}.*2 of 2 texts are the same",
            ],
        ),
    ],
)
def test_a_comparison_prints_times_and_agreement(
    script, tiny_llama, capsys, name, words, printed
):
    common = ["--pretrained", str(tiny_llama), "--limit", "2", "--repeats", "2"]
    script(name).main([*common, *words.split()])
    out = capsys.readouterr().out
    for pattern in printed:
        assert re.search(pattern, out, re.MULTILINE), pattern


@pytest.mark.slow
def test_rounding_has_three_distances_by_dtype_and_size(
    script, tiny_llama, capsys, monkeypatch
):
    # Whether sharing lies further off is tested below; a tiny model decides it by chance.
    monkeypatch.setattr(script("rounding"), "LIMIT", 99)
    script("rounding").main(["--pretrained", str(tiny_llama), "--limit", "2"])
    lines = re.findall(r"^\|(.*)\|$", capsys.readouterr().out, re.MULTILINE)
    heads, _, *rows = ([cell.strip() for cell in line.split("|")] for line in lines)
    assert heads[2:5] == ["hf, batch size 1", "hf, batch size 8", "hf-prefix"]
    found = {(dtype, size): [*map(float, of)] for dtype, size, *of in rows}
    assert all(0 < value < 99 for of in found.values() for value in of)
    # float16 has eight times the precision of bfloat16.
    for size in ("0", "40"):
        assert found["float16", size][2] < found["bfloat16", size][2] / 3


def test_rounding_fails_where_sharing_lies_further_off(script, tiny_llama, monkeypatch):
    rounding = script("rounding")
    found = {"hf, batch size 1": 1.0, "hf, batch size 8": 1.0, "hf-prefix": 1.26}
    monkeypatch.setattr(rounding, "distances", lambda *_: found)
    monkeypatch.setattr(rounding, "requests_of", lambda *_: [])
    with pytest.raises(SystemExit, match=r"1\.26 times as far"):
        rounding.main(["--pretrained", str(tiny_llama), "--limit", "1"])
