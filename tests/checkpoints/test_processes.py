"""Several processes, several devices: the same kept set, the same scores."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import torch.utils.backend_registration

from lm_eval_pruned import load_pruned
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from tests.helpers import evaluations
from tests.helpers.checkpoints import ROOT
from tests.helpers.evaluations import TWO_PROCESSES


pytestmark = pytest.mark.usefixtures("one_thread")


def by_limit(folder, offload):
    more = {"parallelize": True, "max_cpu_memory": "100KB", "offload_folder": offload}
    return PrunedHFLM(folder, ratio=2, device="cpu", **more).model


def by_map(folder, offload):
    whole = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    device_map = dict.fromkeys((*whole, "model.layers.0"), "cpu")
    device_map |= dict.fromkeys(("model.layers.1", "model.layers.2"), "disk")
    model = load_pruned(folder, ratio=2, device_map=device_map, offload_folder=offload)
    assert model.hf_device_map == device_map
    return model


@torch.no_grad()
def answers(model) -> torch.Tensor:
    return model(input_ids=torch.arange(1, 40).view(3, 13)).logits


@pytest.mark.parametrize("placed", [by_limit, by_map])
def test_what_goes_to_disk_is_narrow(tiny_llama_sharded, tmp_path, placed):
    model = placed(str(tiny_llama_sharded), str(tmp_path))
    assert "disk" in model.hf_device_map.values()
    plain = load_pruned(str(tiny_llama_sharded), ratio=2)
    assert model.prune_record.digest == plain.prune_record.digest
    assert torch.equal(answers(model), answers(plain))
    (gate,) = tmp_path.glob("*layers.1.mlp.gate_proj.weight*")
    assert gate.stat().st_size < 88 * 32 * 4


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(
        torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"
    ),
    reason="this torch cannot simulate a device in Python",
)
def test_no_tensor_of_another_device_slips_in():
    command = [sys.executable, "-m", "pytest", "-q", "tests/helpers/on_the_card.py"]
    evaluations.run(command, ROOT, check=True, timeout=None)


@pytest.mark.slow
def test_two_processes_that_share_the_neurons_score_as_one(tiny_llama, tmp_path):
    """Each prunes for itself; `test_runs` shares the documents."""
    model_args, output = f"pretrained={tiny_llama},ratio=2", tmp_path / "two"
    asked = ("pruned-hf", f"{model_args},tp_plan=auto", output)
    command = [*TWO_PROCESSES, "-m", *evaluations.command(*asked, limit=5)]
    evaluations.run(command, tmp_path, check=True)
    alone, config = evaluations.evaluate("pruned-hf", model_args, limit=5)
    expected = [float(value) for each in alone for value, _ in each]
    samples = [*output.rglob("samples_*.jsonl")]
    assert samples
    for file in samples:
        found = [json.loads(line) for line in file.read_text().splitlines()]
        found = [float(v) for each in found for v, _ in each["filtered_resps"]]
        # Sums round by the width of the parts.
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
    for file in output.rglob("results_*.json"):
        pruning = json.loads(file.read_text())["config"]["pruning"]
        assert pruning == json.loads(json.dumps(config["pruning"]))
