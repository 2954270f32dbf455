from __future__ import annotations

import random
import string
from collections import defaultdict

import pytest
import torch

from lm_eval_pruned import load_pruned
from lm_eval_pruned.pruning.layouts import find_glu_mlps
from lm_eval_pruned.pruning.stacked import StackedInputs, one_by_one
from tests.helpers.checkpoints import byte_tokenizer
from tests.helpers.layouts import save_family
from tests.helpers.ways_to_load import write_texts


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text"])
def test_the_best_recipe_repairs_stacked_experts_on_load(family, tmp_path):
    """Every expert sees more tokens than it keeps neurons; what repair does shows on the text."""
    draw = random.Random(0)
    texts = ["".join(draw.choices(string.printable, k=300)) for _ in range(4)]
    text = write_texts(tmp_path / "text.jsonl", texts)
    whole = save_family(tmp_path / "model", family, 64)
    cut = {"prune_percent": 40, "calibration": text}
    best, plain = (
        load_pruned(str(tmp_path / "model"), **cut, **asked)
        for asked in ({"recipe": "best"}, {"criterion": "obs"})
    )
    ids = torch.tensor(byte_tokenizer()(texts)["input_ids"])
    with torch.no_grad():
        expected, near, far = (m(input_ids=ids).logits for m in (whole, best, plain))
    assert (near - expected).norm() < (far - expected).norm()
    record = best.prune_record.as_dict()
    assert record["mlps_repaired"] == len(best.prune_record.kept)


def test_the_bias_of_stacked_experts_makes_up_for_what_is_lost_on_average(tmp_path):
    draw = random.Random(0)
    texts = ["".join(draw.choices(string.printable, k=300)) for _ in range(4)]
    whole = save_family(tmp_path / "model", "gpt_oss", 64)
    best = load_pruned(
        str(tmp_path / "model"),
        prune_percent=40,
        recipe="best",
        calibration=write_texts(tmp_path / "text.jsonl", texts),
    )
    seen = defaultdict(list)
    mlps, kept = find_glu_mlps(whole), best.prune_record.kept
    note = StackedInputs(mlps, lambda mlp, x: seen[mlp.name].append(x))
    with torch.no_grad(), one_by_one(whole, mlps), note:
        for text in texts:
            whole(input_ids=torch.tensor([byte_tokenizer()(text)["input_ids"]]))
    for before, after, stays in zip(mlps, find_glu_mlps(best), kept, strict=True):
        mean = torch.cat(seen[before.name]).mean(0)
        expected = before.weight("down_proj") @ mean + before.down_bias
        found = after.weight("down_proj") @ mean[stays] + after.down_bias
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
        assert not torch.equal(before.down_bias, after.down_bias)
