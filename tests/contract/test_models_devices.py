"""What docs/models.md promises of experts, adapters, quantised models, other tools, processes and devices."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import transformers
from lm_eval.api.registry import get_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, TorchAoConfig

from lm_eval_pruned import load_pruned
from tests.contract.commands import pruned
from tests.helpers import evaluations
from tests.helpers.checkpoints import (
    edit_weights,
    save_tiny,
    tiny_config,
    tiny_model,
)
from tests.helpers.evaluations import TWO_PROCESSES, exact, near
from tests.helpers.gguf_files import write_gguf
from tests.helpers.layouts import logits, save_family
from tests.helpers.made_tasks import write_made_tasks
from tests.helpers.ways_to_load import assert_same_model, assert_state


pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_size_refers_to_the_experts(tmp_path):
    save_family(tmp_path, "mixtral", 64)
    words = ("plan", "--model_args", f"pretrained={tmp_path}", "--format", "json")
    before, after = (
        json.loads(pruned(*words, *size).out)[0]
        for size in (("--prune_percents", 0), ("--ratios", 1))
    )
    # The width of an expert divided by the hidden size.
    assert before["expansion_ratio"] == 64 / 32
    assert (after["intermediate_size"], after["expansion_ratio"]) == (32, 1)
    source = AutoModelForCausalLM.from_pretrained(tmp_path)
    cut = load_pruned(str(tmp_path), ratio=1)
    for one, other in zip(source.model.layers, cut.model.layers, strict=True):
        assert other.mlp.experts.down_proj.shape[2] == 32
        # The router stays as it is.
        assert torch.equal(one.mlp.gate.weight, other.mlp.gate.weight)


def test_with_before_an_adapter_is_merged_into_the_full_model(tiny_llama, tmp_path):
    adapter, full = tmp_path / "adapter", tmp_path / "full"
    config = LoraConfig(target_modules=["gate_proj", "q_proj"], init_lora_weights=False)
    get_peft_model(tiny_model(tiny_config()), config).save_pretrained(adapter)
    whole = AutoModelForCausalLM.from_pretrained(tiny_llama)
    PeftModel.from_pretrained(whole, adapter).merge_and_unload().save_pretrained(full)
    given = {"peft": str(adapter), "peft_stage": "before", "prune_percent": 40}
    model = get_model("pruned-hf")(str(tiny_llama), device="cpu", **given).model
    # The harness cuts the vocabulary to that of the tokenizer, where there is an adapter.
    expected = load_pruned(str(full), prune_percent=40).model.layers
    assert_same_model(model.model.layers, expected)


def test_mlps_of_another_width_are_refused_with_ignore_mismatched_sizes_too(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    source = save_tiny(tmp_path / "source")
    edit_weights(source, lambda tensors: tensors.update({name: torch.ones(9, 32)}))
    with pytest.raises(ValueError, match=name):
        load_pruned(str(source), prune_percent=40, ignore_mismatched_sizes=True)


def torchao_int8():
    pytest.importorskip("torchao", reason="torchao is not installed (extra 'test')")
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def bitsandbytes(**arguments):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return transformers.BitsAndBytesConfig(**arguments)


EIGHT = {"load_in_8bit": True}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
#: What makes the config, and how the harness's command line asks for it.
KINDS = {
    "torchao-int8": (torchao_int8, None),
    "bitsandbytes-8bit": (lambda: bitsandbytes(**EIGHT), EIGHT),
    "bitsandbytes-nf4": (lambda: bitsandbytes(**NF4), NF4),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Folder of a checkpoint whose rows are whole blocks of every kind of quantising."""
    sizes = {"hidden_size": 64, "intermediate_size": 256, "head_dim": 16}
    more = {"num_hidden_layers": 12, "dtype": torch.bfloat16, "max_shard_size": "100KB"}
    return save_tiny(tmp_path_factory.mktemp("source"), **sizes, **more)


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "pruned"
    words = ("--ratio", 2, "--recipe", "study", "--output_path", folder)
    assert pruned("prune", "--model_args", f"pretrained={source}", *words).code == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("config", "written"), KINDS.values(), ids=KINDS)
def test_what_is_kept_is_quantised_and_equals_the_export_quantised(
    source, exported, config, written
):
    given = written or {
        "quantization_config": json.loads(json.dumps(config().to_dict()))
    }
    load = get_model("pruned-hf")
    quantised = load(str(source), ratio=2, device="cpu", **given).model
    stock = AutoModelForCausalLM.from_pretrained(exported, quantization_config=config())
    gate, expected = (m.model.layers[0].mlp.gate_proj for m in (quantised, stock))
    assert type(gate) is type(expected)
    assert type(gate.weight) is type(expected.weight)
    assert gate.out_features == 128
    assert torch.equal(logits(quantised), logits(stock))
    # Neurons are ranked by the unquantised weights.
    plain = load_pruned(str(source), ratio=2)
    assert quantised.prune_record.digest == plain.prune_record.digest
    assert not torch.equal(logits(quantised), logits(plain))


@pytest.mark.slow
def test_an_export_is_quantised_saved_and_evaluated(exported, tmp_path):
    int8 = torchao_int8()
    model = AutoModelForCausalLM.from_pretrained(exported, quantization_config=int8)
    model.save_pretrained(tmp_path / "int8")
    for name in ("hf", "hf-prefix"):
        load = get_model(name)
        lm = load(str(tmp_path / "int8"), tokenizer=str(exported), device="cpu")
        gate = lm.model.model.layers[0].mlp.gate_proj
        assert gate.out_features == 128
        assert type(gate.weight) is not torch.nn.Parameter
        assert torch.equal(logits(lm.model), logits(model))


@pytest.mark.slow
def test_transformers_reads_an_export_back_from_gguf_with_the_same_weights(
    exported, tmp_path
):
    pytest.importorskip("gguf", reason="gguf is not installed (extra 'test')")
    plain = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    write_gguf(plain, tmp_path / "pruned.gguf")
    given = {"gguf_file": "pruned.gguf", "dtype": torch.float32}
    again = AutoModelForCausalLM.from_pretrained(tmp_path, **given)
    assert again.config.intermediate_size == 128
    assert_state(again, plain.state_dict())


def by_limit(folder, offload):
    more = {"parallelize": True, "max_cpu_memory": "100KB", "offload_folder": offload}
    return get_model("pruned-hf")(folder, ratio=2, device="cpu", **more).model


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
def test_only_the_kept_neurons_reach_the_disk(tiny_llama_sharded, tmp_path, placed):
    model = placed(str(tiny_llama_sharded), str(tmp_path))
    assert "disk" in model.hf_device_map.values()
    plain = load_pruned(str(tiny_llama_sharded), ratio=2)
    assert model.prune_record.digest == plain.prune_record.digest
    assert torch.equal(answers(model), answers(plain))
    (gate,) = tmp_path.glob("*layers.1.mlp.gate_proj.weight*")
    assert gate.stat().st_size < 88 * 32 * 4


@pytest.mark.slow
def test_two_processes_that_split_the_documents_score_as_one(tiny_llama, tmp_path):
    made, found = write_made_tasks(tmp_path / "tasks"), []
    for name, launch, size in (
        ("true", TWO_PROCESSES, "auto"),
        ("false", [sys.executable], "1"),
    ):
        done = evaluations.run(
            [
                *(*launch, "-m", "lm_eval", "--model", "pruned-hf", "--model_args"),
                f"pretrained={tiny_llama},ratio=2,prefix_sharing={name}"
                + f",slot_refilling={name}",
                *("--tasks", "tiny_choice,tiny_rolling,tiny_generation"),
                *("--include_path", made, "--device", "cpu", "--log_samples"),
                *("--output_path", tmp_path / name, "--batch_size", size),
                *("--max_batch_size", "2", "--seed", "1"),
            ],
            tmp_path,
            check=True,
            ACCELERATE_USE_CPU="true",
        )
        assert "answered as by hf" not in done.stderr
        (texts,) = (tmp_path / name).rglob("samples_tiny_generation*.jsonl")
        rows = map(json.loads, texts.read_text().splitlines())
        texts = sorted((r["doc_id"], *r["filtered_resps"]) for r in rows)
        found.append([evaluations.results(tmp_path / name)["results"], texts])
    assert exact(found[0]) == near(found[1])


@pytest.mark.slow
def test_two_processes_that_share_the_neurons_by_tp_plan_score_as_one(
    tiny_llama, tmp_path
):
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


def test_widths_that_do_not_divide_among_the_processes_are_refused(
    tiny_llama, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = {"tp_plan": "auto", "intermediate_size": 51, "device": "cpu"}
    with pytest.raises(ValueError, match="pass multiple_of=2"):
        get_model("pruned-hf")(str(tiny_llama), **given)
