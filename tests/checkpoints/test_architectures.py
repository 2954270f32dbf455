"""The table of architectures says what its script finds."""

from __future__ import annotations

import importlib.util
import re
import sys

import pytest
import torch
import transformers

from lm_eval_pruned import load_pruned
from tests.helpers import checkpoints


TABLE = (checkpoints.ROOT / "docs" / "architectures.md").read_text()


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(
        "make_architectures", checkpoints.ROOT / "docs" / "make_architectures.py"
    )
    module = importlib.util.module_from_spec(spec)
    # Its dataclass looks itself up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def section(title: str) -> set[str]:
    text = TABLE.partition(f"## {title}")[2].partition("\n## ")[0]
    return set(re.findall(r"^\|`([^`]+)`\|", text, flags=re.MULTILINE))


def test_the_table_is_whole():
    pruned, refused = section("Pruned"), section("Refused")
    assert len(pruned) >= 60
    assert {"llama", "phi3", "glm4", "t5", "umt5", "mixtral", "olmoe"} <= pruned
    assert {"gpt2", "bert", "opt", "bitnet"} <= refused


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["cohere", "gemma3", "aria_text", "t5gemma"])
def test_a_listed_architecture_is_pruned(model_type, script):
    rows = {c[0]: c for c in script.candidates()}
    row = script.check(*rows[model_type])
    assert row.outcome == "pruned"
    assert model_type in section("Pruned")


@pytest.mark.parametrize("model_type", ["gpt2", "bitnet"])
def test_a_listed_architecture_is_refused(model_type, script):
    rows = {c[0]: c for c in script.candidates()}
    row = script.check(*rows[model_type])
    assert row.outcome == "refused"
    assert model_type in section("Refused")


def test_the_other_towers_of_multimodal_models_are_untouched(script, tmp_path):
    model = script.tiny_model(
        transformers.AutoModelForCausalLM, script.tiny_config("phi4_multimodal")
    )
    model.save_pretrained(tmp_path)
    pruned = load_pruned(tmp_path, prune_percent=50)
    widths = {"model.layers.": 0, "embed_tokens_extend": 0}
    before = model.state_dict()
    for name, tensor in pruned.state_dict().items():
        for part in widths:
            widths[part] += part in name and tensor.shape != before[name].shape
        if "embed_tokens_extend" in name:
            assert torch.equal(tensor, before[name])
    assert widths == {
        "model.layers.": 2 * pruned.config.num_hidden_layers,
        "embed_tokens_extend": 0,
    }


@pytest.mark.slow
def test_the_table_is_what_the_script_writes_today(script):
    """Every class of the installed transformers either equals slicing by hand or is refused."""
    if f"transformers {transformers.__version__}, " not in TABLE:
        pytest.skip("the table was written with another version of transformers")
    found = {c[0]: script.check(*c).outcome for c in script.candidates()}
    for outcome, title in (("pruned", "Pruned"), ("refused", "Refused")):
        assert {t for t, o in found.items() if o == outcome} == section(title)
