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
from tests.helpers.checkpoints import ROOT, save_tiny
from tests.helpers.evaluations import TWO_PROCESSES
from tests.helpers.ways_to_load import forbid_reading


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


def test_tensor_parallelism_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    narrow = str(save_tiny(tmp_path, intermediate_size=2))
    monkeypatch.setenv("WORLD_SIZE", "2")
    forbid_reading(monkeypatch)
    with pytest.raises(ValueError, match="2 processes of tp_plan: pass multiple_of=2"):
        PrunedHFLM(narrow, device="cpu", tp_plan="auto", intermediate_size=1)


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


def sorted_pairs(responses) -> list[torch.Tensor]:
    """Return the log-likelihoods of each document; processes mix their order."""
    tensors = [torch.tensor([float(value) for value, _ in each]) for each in responses]
    return sorted(tensors, key=lambda tensor: tensor.tolist())


@pytest.mark.slow
@pytest.mark.parametrize("shared", ["documents", "neurons"])
def test_two_processes_score_as_one(tiny_llama, tmp_path, shared):
    """Each prunes for itself; each takes half of the documents, or of the kept neurons."""
    model_args, output = f"pretrained={tiny_llama},ratio=2", tmp_path / "two"
    more, environment = ",tp_plan=auto", {}
    # Batches are formed within a process, and their size decides how sums round.
    close = {"rtol": 1e-4, "atol": 1e-4}
    if shared == "documents":
        more, environment = "", {"ACCELERATE_USE_CPU": "true"}
        close = {"rtol": 1e-6, "atol": 0}
    arguments = evaluations.command("pruned-hf", model_args + more, output, limit=5)
    command = [*TWO_PROCESSES, "-m", *arguments]
    evaluations.run(command, tmp_path, check=True, **environment)
    alone, config = evaluations.evaluate("pruned-hf", model_args, limit=5)
    # Where neurons are shared, both write what they found.
    samples = [*output.rglob("samples_*.jsonl")]
    assert samples and (shared == "neurons" or len(samples) == 1)
    for file in samples:
        found = [json.loads(line) for line in file.read_text().splitlines()]
        scores = sorted_pairs(sample["filtered_resps"] for sample in found)
        for one, other in zip(scores, sorted_pairs(alone), strict=True):
            torch.testing.assert_close(one, other, **close)
    for file in output.rglob("results_*.json"):
        pruning = json.loads(file.read_text())["config"]["pruning"]
        assert pruning == json.loads(json.dumps(config["pruning"]))
