"""Several processes, several devices: the same kept set, the same scores."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from lm_eval_pruned import load_pruned
from lm_eval_pruned.checkpoints.load import check_divides
from lm_eval_pruned.checkpoints.request import LoadRequest
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from lm_eval_pruned.pruning.arguments import PruneArguments
from tests.helpers import evaluations
from tests.helpers.checkpoints import save_tiny
from tests.helpers.evaluations import TWO_PROCESSES
from tests.helpers.ways_to_load import forbid_reading


pytestmark = pytest.mark.usefixtures("one_thread")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 40).view(3, 13)).logits


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


@pytest.mark.parametrize("placed", [by_limit, by_map])
def test_what_goes_to_disk_is_narrow(tiny_llama_sharded, tmp_path, placed):
    model = placed(str(tiny_llama_sharded), str(tmp_path))
    assert "disk" in model.hf_device_map.values()
    plain = load_pruned(str(tiny_llama_sharded), ratio=2)
    assert model.prune_record.digest == plain.prune_record.digest
    assert torch.equal(logits(model), logits(plain))
    (gate,) = tmp_path.glob("*layers.1.mlp.gate_proj.weight*")
    assert gate.stat().st_size < 88 * 32 * 4


@pytest.mark.parametrize(
    ("asked", "refused"),
    [
        ({"intermediate_size": 64}, ""),
        ({"intermediate_size": 63}, "63 gives model.layers.0.mlp 63 .* multiple_of=4,"),
        ({"intermediate_size": 54, "multiple_of": 6}, "54 neurons.* multiple_of=12,"),
        ({"prune_percent": 40, "layers": "1"}, "model.layers.1.mlp 53 neurons"),
        ({"widths": {1: 27}}, "model.layers.1.mlp 27 neurons"),
        # What an allocation finds is not known yet; the mean is.
        ({"intermediate_size": 52, "allocation": "global"}, "pass multiple_of=4,"),
        ({"intermediate_size": 54, "allocation": "global", "multiple_of": 4}, ""),
    ],
)
def test_widths_that_do_not_divide_are_refused_with_advice(tiny_llama, asked, refused):
    request = LoadRequest.resolve(
        AutoModelForCausalLM, str(tiny_llama), PruneArguments(**asked), {}
    )
    if not refused:
        check_divides(request, 4, "tp_plan")
        return
    with pytest.raises(ValueError, match=refused):
        check_divides(request, 4, "tp_plan")


def test_tensor_parallelism_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    narrow = str(save_tiny(tmp_path, intermediate_size=2))
    monkeypatch.setenv("WORLD_SIZE", "2")
    forbid_reading(monkeypatch)
    with pytest.raises(ValueError, match="2 processes of tp_plan: pass multiple_of=2"):
        PrunedHFLM(narrow, device="cpu", tp_plan="auto", intermediate_size=1)


def sorted_pairs(answers) -> list[torch.Tensor]:
    """Return the log-likelihoods of each document; processes mix their order."""
    tensors = [
        torch.tensor([float(loglikelihood) for loglikelihood, _ in answer])
        for answer in answers
    ]
    return sorted(tensors, key=lambda tensor: tensor.tolist())


@pytest.mark.slow
@pytest.mark.parametrize("shared", ["documents", "neurons"])
def test_two_processes_score_as_one(tiny_llama, tmp_path, shared):
    """Each prunes for itself; each takes half of the documents, or of the kept neurons."""
    model_args = f"pretrained={tiny_llama},ratio=2"
    more, environment = ",tp_plan=auto", {}
    # Batches are formed within a process, and their size decides how sums round.
    close = {"rtol": 1e-4, "atol": 1e-4}
    if shared == "documents":
        more, environment = "", {"ACCELERATE_USE_CPU": "true"}
        close = {"rtol": 1e-6, "atol": 0}
    output = tmp_path / "two"
    arguments = evaluations.command("pruned-hf", model_args + more, output, limit=5)
    command = [*TWO_PROCESSES, "-m", *arguments]
    evaluations.run(command, tmp_path, check=True, **environment)
    alone, alone_config = evaluations.evaluate("pruned-hf", model_args, limit=5)
    # Where neurons are shared, both write what they found.
    samples = [*output.rglob("samples_*.jsonl")]
    assert samples and (shared == "neurons" or len(samples) == 1)
    for file in samples:
        found = [json.loads(line) for line in file.read_text().splitlines()]
        scores = [sample["filtered_resps"] for sample in found]
        for one, other in zip(sorted_pairs(scores), sorted_pairs(alone), strict=True):
            torch.testing.assert_close(one, other, **close)
    for file in output.rglob("results_*.json"):
        pruning = json.loads(file.read_text())["config"]["pruning"]
        assert pruning == json.loads(json.dumps(alone_config["pruning"]))


_RANKS = """
import json, os, sys
import torch

from lm_eval_pruned import load_pruned
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM

source, what, folder = sys.argv[1:]
found = {"rank": int(os.environ["RANK"])}
if what == "data":
    model = PrunedHFLM(source, ratio=2, device="cpu")
    found |= {"rank": model.rank, "world_size": model.world_size}
    model = model.model
else:
    model = load_pruned(source, ratio=2, tp_plan="auto")
    gate = model.model.layers[0].mlp.gate_proj.weight
    found["local"] = list(gate.to_local().shape)
with torch.no_grad():
    tokens = torch.arange(1, 40).view(3, 13)
    found["logits"] = model(input_ids=tokens).logits.tolist()
found["digest"] = model.prune_record.digest
with open(f"{folder}/{os.environ['RANK']}.json", "w") as file:
    json.dump(found, file)
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["data", "tensors"])
def test_each_process_prunes_the_same_kept_set(tiny_llama, tmp_path, what):
    script = tmp_path / "ranks.py"
    script.write_text(_RANKS)
    command = [*TWO_PROCESSES, script, tiny_llama, what, tmp_path]
    evaluations.run(command, tmp_path, check=True, ACCELERATE_USE_CPU="true")
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    plain = load_pruned(str(tiny_llama), ratio=2)
    assert [found["rank"] for found in ranks] == [0, 1]
    for found in ranks:
        assert found["digest"] == plain.prune_record.digest
        own = torch.tensor(found["logits"])
        if what == "data":
            assert found["world_size"] == 2
            assert torch.equal(own, logits(plain))
        else:
            # Each process holds half of the 64 kept neurons, and sums are split in two.
            assert found["local"] == [32, 32]
            torch.testing.assert_close(own, logits(plain), rtol=1e-4, atol=1e-4)
