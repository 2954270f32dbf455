"""Where models come from: folders, subfolders, revisions, model code, GGUF files."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_pruned import load_pruned
from lm_eval_pruned.checkpoints.default_model import _packaged_gguf
from lm_eval_pruned.checkpoints.export import export_pruned
from lm_eval_pruned.checkpoints.planning import plan_rows
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from tests.helpers import checkpoints, evaluations
from tests.helpers.comparing import assert_same_model
from tests.helpers.layouts import logits


_MODEL_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class ShiftedConfig(LlamaConfig):
    model_type = "shifted-llama"

    def __init__(self, shift=0.0, **kwargs):
        self.shift = shift
        super().__init__(**kwargs)


class ShiftedForCausalLM(LlamaForCausalLM):
    config_class = ShiftedConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.roll(int(self.config.shift), dims=-1)
        return output
"""


def add_code(folder: Path) -> str:
    """Turn a Llama checkpoint into one whose model class comes with it."""
    (folder / "modeling_shifted.py").write_text(_MODEL_CODE)
    of_class = {
        "AutoConfig": "modeling_shifted.ShiftedConfig",
        "AutoModelForCausalLM": "modeling_shifted.ShiftedForCausalLM",
    }
    checkpoints.edit_config(
        folder, model_type="shifted-llama", shift=3, auto_map=of_class
    )
    checkpoints.edit_config(folder, architectures=["ShiftedForCausalLM"])
    return str(folder)


def test_a_subfolder(tiny_llama, tmp_path):
    folder, out = str(tmp_path / "repository"), tmp_path / "out"
    shutil.copytree(tiny_llama, Path(folder, "inner"))
    inner, plain = {"subfolder": "inner"}, load_pruned(str(tiny_llama), ratio=2)
    model = PrunedHFLM(folder, ratio=2, device="cpu", **inner).model
    assert torch.equal(logits(model), logits(plain))
    export_pruned(folder, out, prune_arguments={"ratio": 2}, **inner)
    assert_same_model(AutoModelForCausalLM.from_pretrained(out), plain)
    assert (out / "tokenizer.json").is_file()
    expected = plan_rows(str(tiny_llama), "ratio", ["2"])
    assert plan_rows(folder, "ratio", ["2"], **inner) == expected


def test_model_code_that_comes_with_the_model(tiny_llama, tmp_path):
    folder, out = tmp_path / "coded", tmp_path / "out"
    folder = add_code(Path(shutil.copytree(tiny_llama, folder)))
    with pytest.raises(ValueError, match="trust_remote_code"):
        PrunedHFLM(folder, ratio=2, device="cpu")
    trusted = {"trust_remote_code": True}
    model = PrunedHFLM(folder, ratio=2, device="cpu", **trusted).model
    assert type(model).__name__ == "ShiftedForCausalLM"
    plain = load_pruned(str(tiny_llama), ratio=2, trust_remote_code=False)
    assert model.prune_record.digest == plain.prune_record.digest
    assert torch.equal(logits(model), logits(plain).roll(3, dims=-1))
    export_pruned(folder, out, prune_arguments={"ratio": 2}, **trusted)
    opened = AutoModelForCausalLM.from_pretrained(out, **trusted)
    assert torch.equal(logits(opened), logits(model))


_FROM_THE_HUB = """
import json
from pathlib import Path
from lm_eval_pruned.checkpoints.export import export_pruned
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM

found = {}
for revision in ("main", "old"):
    model = PrunedHFLM("org/name", revision=revision, ratio=2, device="cpu")
    found[revision] = model.model.prune_record.digest
    exported = export_pruned(
        "org/name", f"out-{revision}", revision=revision, prune_arguments={"ratio": 2}
    )
    assert exported.record.digest == found[revision]
    assert Path(f"out-{revision}/tokenizer.json").is_file()
try:
    PrunedHFLM("org/name", revision="none", ratio=2, device="cpu")
except OSError as error:
    found["none"] = str(error)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_revisions_of_a_model_on_the_hub(tmp_path):
    """A cache as the Hub client fills it, with two revisions, and no network."""
    repository = tmp_path / "hub" / "models--org--name"
    expected = {}
    for seed, revision in enumerate(("main", "old")):
        commit = str(seed) * 40
        snapshot = checkpoints.save_tiny(
            repository / "snapshots" / commit, seed=seed, max_shard_size="60KB"
        )
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        expected[revision] = load_pruned(str(snapshot), ratio=2).prune_record.digest
    command = [sys.executable, "-c", _FROM_THE_HUB]
    done = evaluations.run(command, tmp_path, check=True, HF_HOME=tmp_path)
    found = json.loads(done.stdout.splitlines()[-1])
    assert "couldn't find them in the cached files" in found.pop("none")
    assert found == expected
    card = (tmp_path / "out-old" / "README.md").read_text()
    assert "base_model: org/name" in card and "revision old" in card


@pytest.mark.slow
def test_a_gguf_file(real_model):
    """The default model is converted from it."""
    gguf, asked = _packaged_gguf(), {"prune_percent": 40}
    more = {"gguf_file": gguf.name, "device": "cpu", "dtype": "float32"}
    model = PrunedHFLM(str(gguf.parent), **more, **asked).model
    plain = load_pruned(real_model, **asked)
    assert plain.config.intermediate_size == 922
    assert model.prune_record.digest == plain.prune_record.digest
    assert_same_model(load_pruned(str(gguf.parent), **more, **asked), plain)


@pytest.mark.slow
def test_the_second_real_model_prunes_and_answers(second_model):
    """Gemma-3-270M: GeGLU, sliding windows, a norm behind each MLP."""
    file = {"gguf_file": checkpoints.GEMMA_FILE}
    model = load_pruned(str(second_model), prune_percent=30, dtype="float32", **file)
    assert model.config.intermediate_size == 1434
    record = model.prune_record
    assert record.parameters_before - record.parameters_after == 18 * 614 * 3 * 640
    tokenizer = AutoTokenizer.from_pretrained(second_model, **file)
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**tokens, max_new_tokens=8, do_sample=False)
    new = answer[0, tokens["input_ids"].shape[1] :]
    assert len(new) == 8 and len(tokenizer.decode(new).strip()) > 8
