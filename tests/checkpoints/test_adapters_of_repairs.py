from __future__ import annotations

import json

import pytest
from peft import LoraConfig, get_peft_model

from lm_eval_pruned import load_pruned
from lm_eval_pruned.checkpoints.adapters import HEALING
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"text": "two"}, r"repair=least_squares on \d+ tokens of .*other weights"),
        ({"repair": "none"}, r"this model has .* repair=none.*pass .*repair=least_squ"),
    ],
)
def test_an_adapter_of_another_repair_is_refused(tiny_llama, tmp_path, other, message):
    """The kept neurons agree: only the record tells."""
    for name in ("one", "two"):
        lines = (json.dumps({"text": f"{n} {name} " * 40}) for n in range(8))
        (tmp_path / name).write_text("\n".join(lines))

    def asked(text="one", repair="least_squares"):
        given = {"calibration": str(tmp_path / text)} if repair != "none" else {}
        return {"prune_percent": 40, "repair": repair, **given}

    model = load_pruned(str(tiny_llama), **asked())
    record = {"pruning": model.prune_record.as_dict()}
    lora = LoraConfig(r=2, target_modules=["up_proj"])
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / HEALING).write_text(json.dumps(record))
    given = {"device": "cpu", "peft": str(tmp_path / "adapter")}
    PrunedHFLM(str(tiny_llama), **given, **asked())
    with pytest.raises(ValueError, match=message):
        PrunedHFLM(str(tiny_llama), **given, **asked(**other))
