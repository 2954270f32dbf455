from __future__ import annotations

import random
import string

import pytest
import torch

from lm_eval_pruned import load_pruned
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
