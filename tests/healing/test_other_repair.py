from __future__ import annotations

import pytest

from lm_eval_pruned.healing.options import HealingOptions
from lm_eval_pruned.healing.run import heal
from tests.helpers.ways_to_load import write_texts


@pytest.mark.slow
def test_a_checkpoint_of_another_repair_is_not_resumed(tiny_llama, tmp_path):
    """The kept neurons are the same: only the record tells."""
    data = write_texts(tmp_path / "data.jsonl", ["The tide comes in. " * 20] * 4)
    training = {"use_cpu": True, "save_steps": 1, "disable_tqdm": True}
    how = HealingOptions(max_length=32, max_steps=1, training_args=training)
    given = {"pretrained": str(tiny_llama), "prune_percent": 40}
    heal(given, data, tmp_path / "healed", how, metered=False)
    (tmp_path / "healed").rename(tmp_path / "moved")
    given |= {"repair": "least_squares", "calibration": data}
    with pytest.raises(ValueError, match=r"repair=None, but .* repair=least_squares"):
        heal(given, data, tmp_path / "healed", how, resume=True, metered=False)
