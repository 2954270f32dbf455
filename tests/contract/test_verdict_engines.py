"""What docs/verdict.md promises of quantised candidates and adapters: each is evaluated, and its sizes are shown.

`tox -e engines` installs what some of them need.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.contract.commands import pruned
from tests.helpers.checkpoints import save_tiny
from tests.helpers.gguf_files import write_gguf
from tests.helpers.sweeping import write_tasks
from tests.sweeps.conftest import quick  # noqa: F401


pytestmark = [pytest.mark.slow, pytest.mark.engines]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint of random weights whose rows are whole blocks of every kind of quantising."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}
    widths = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    return save_tiny(tmp_path_factory.mktemp("tiny"), **widths, **heads)


def stored(folder):
    return sum(file.stat().st_size for file in folder.glob("*model*.safetensors"))


def packed(scheme, group=None):
    """Return what writes a checkpoint by llm-compressor, without text to calibrate on."""

    def write(source, folder):
        reason = "{} is not installed: run `tox -e engines`"
        for name in ("compressed_tensors", "llmcompressor"):
            pytest.importorskip(name, reason=reason.format(name))
        from compressed_tensors.quantization import preset_name_to_scheme
        from llmcompressor import oneshot
        from llmcompressor.modifiers.quantization import QuantizationModifier

        of = preset_name_to_scheme(scheme, ["Linear"])
        if group:
            # 128 numbers share a scale by default, which 576 columns of SmolLM2 are no multiple of.
            of.weights.group_size = group
        recipe = QuantizationModifier(config_groups={"all": of}, ignore=["lm_head"])
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        oneshot(model=model, recipe=recipe)
        model.save_pretrained(folder, save_compressed=True)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        # The package computes NVFP4 in bfloat16 whatever is asked.
        dtype = "bfloat16" if scheme.startswith("NVFP4") else "float32"
        return f"pretrained={folder},dtype={dtype}", stored(folder)

    return write


def gguf_file(kind):
    def write(source, folder):
        pytest.importorskip("gguf", reason="gguf is not installed (extra 'test')")
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        folder.mkdir()
        size = write_gguf(model, folder / "m.gguf", kind).stat().st_size
        how = f"gguf_file=m.gguf,tokenizer={source},dtype=float32"
        return f"pretrained={folder},{how}", size

    return write


def quantised(package, **arguments):
    """Return what has a package quantise the base while it loads."""

    def write(source, folder):
        reason = f"{package} is not installed (extra 'test')"
        pytest.importorskip(package, reason=reason)
        shown = [
            f"{n}={json.dumps(v) if isinstance(v, dict) else v}"
            for n, v in arguments.items()
        ]
        given = ",".join([f"pretrained={source}", "dtype=float32", *shown])
        return given, stored(source)

    return write


def torchao(kind, **data):
    how = {"default": {"_type": kind, "_version": 2, "_data": data}}
    config = {"quant_method": "torchao", "quant_type": how}
    return quantised("torchao", quantization_config=config)


def adapter(merged):
    def write(source, folder):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        tuned = get_peft_model(model, config)
        if not merged:
            tuned.save_pretrained(folder)
            both = stored(source) + stored(folder)
            return f"pretrained={source},peft={folder},dtype=float32", both
        tuned.merge_and_unload().save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        return f"pretrained={folder},dtype=float32", stored(folder)

    return write


#: torchao's own int4 wants a card; this one packs nothing.
INT4 = {
    "weight_dtype": {"_type": "torch.dtype", "_data": "int4"},
    "granularity": {"_type": "PerGroup", "_version": 1, "_data": {"group_size": 64}},
    "scale_dtype": None,
}
#: By name: what writes the candidate, and the bytes in memory as a share of the base's, at least and at most.
ENGINES = {
    "W8A8": (packed("W8A8"), 0.9, 1.1),
    "FP8_DYNAMIC": (packed("FP8_DYNAMIC"), 0.9, 1.1),
    "W4A16": (packed("W4A16", 64), 0.9, 1.1),
    "NVFP4A16": (packed("NVFP4A16"), 0.4, 0.7),
    "bitsandbytes nf4": (
        quantised("bitsandbytes", load_in_4bit="true", bnb_4bit_quant_type="nf4"),
        0.1,
        0.4,
    ),
    "bitsandbytes int8": (quantised("bitsandbytes", load_in_8bit="true"), 0.2, 0.5),
    "torchao int8": (torchao("Int8WeightOnlyConfig"), 0.2, 0.5),
    "torchao int4": (torchao("IntxWeightOnlyConfig", **INT4), 0.2, 0.5),
    "GGUF Q8_0": (gguf_file("Q8_0"), 0.9, 1.1),
    "GGUF Q4_0": (gguf_file("Q4_0"), 0.9, 1.1),
    "GGUF Q4_K": (gguf_file("Q4_K"), 0.9, 1.1),
    "LoRA": (adapter(merged=False), 1.0, 1.2),
    "LoRA, merged": (adapter(merged=True), 0.9, 1.1),
}


@pytest.mark.parametrize("model", ["tiny", "real_model"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_candidate_of_each_engine_is_evaluated_with_its_bytes_in_memory_and_on_disk(
    engine, model, tmp_path, request
):
    source = Path(request.getfixturevalue(model))
    write, least, most = ENGINES[engine]
    candidate, size = write(source, tmp_path / "candidate")
    made = write_tasks(tmp_path / "tasks", documents=12)
    words = "--tasks", "tiny_choice", "--include_path", made, "--device", "cpu"
    words = *words, "--margin", "10pt", "--output_path", tmp_path / "out"
    base = f"hf,pretrained={source},dtype=float32"
    done = pruned("verdict", base, f"hf,{candidate}", *words)
    # Twelve documents decide nothing, and weights nobody trained are at the floor.
    assert done.code in (1, 3), done.err
    rows = re.findall(
        r"\|(base|candidate) *\| *[\d,]+\| *([\d,]+)\| *([\d,]+)\|", done.out
    )
    (memory, disk), (of_memory, on_disk) = (
        [int(number.replace(",", "")) for number in row[1:]] for row in rows
    )
    assert (disk, on_disk) == (stored(source), size)
    assert least <= of_memory / memory <= most
