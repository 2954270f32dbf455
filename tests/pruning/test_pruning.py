"""Pruning in memory: what it leaves alone, what it records and what it says."""

from __future__ import annotations

import copy
import hashlib
import struct

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.pruning.layouts import UnsupportedModelError
from tests.helpers import by_hand, checkpoints
from tests.helpers.layouts import logits, save_family
from tests.helpers.ways_to_load import Source, assert_one_model


@pytest.fixture
def model(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama)


def test_the_digest_is_what_its_docstring_says(tiny_llama):
    record = load_pruned(str(tiny_llama), ratio=1).prune_record
    packed = b"".join(struct.pack("<q", i) for kept in record.kept for i in kept)
    assert record.digest == hashlib.sha256(packed).hexdigest()
    group = {"kind": "dense", "config_key": "intermediate_size", "mlps": 3}
    assert record.as_dict() == {
        "criterion": "maw",
        "asked": {"ratio": "1"},
        "multiple_of": 1,
        "layers": 3,
        "hidden_size": 32,
        "intermediate_size_before": 88,
        "intermediate_size_after": 32,
        "expansion_ratio_before": 2.75,
        "expansion_ratio_after": 1.0,
        "parameters_before": record.parameters_after + 3 * 3 * 56 * 32,
        "parameters_after": record.parameters_after,
        "kept_digest": record.digest,
        "groups": [group | {"width_before": 88, "width_after": 32}],
        "config_expresses_widths": True,
    }


def test_the_record_tells_kinds_apart(tmp_path):
    save_family(tmp_path, "deepseek_v3", 16)
    record = load_pruned(tmp_path, prune_percent=50).prune_record
    assert record.layers == 2
    assert [
        (g.kind, g.config_key, g.mlps, g.width_before, g.width_after)
        for g in record.groups
    ] == [
        ("dense", "intermediate_size", 1, 48, 24),
        ("expert", "moe_intermediate_size", 3, 16, 8),
        ("shared", "moe_intermediate_size", 1, 32, 16),
    ]


@pytest.mark.parametrize(
    ("asked", "after", "last"),
    [
        ({"ratio": 1, "layers": "0,2"}, (1.0, 32), ["criterion=maw", "(0,2 pruned)"]),
        ({"widths": {0: 20}}, (2.0417, 65.3333), ["widths by layer 0:20"]),
        ({}, (2.75, 88), ["baseline, nothing removed", "kept digest none"]),
    ],
)
def test_the_table_of_a_record_says_what_was_done(tiny_llama, asked, after, last):
    record = load_pruned(str(tiny_llama), **asked).prune_record
    rows = [line.strip("|").split("|") for line in record.as_table().splitlines()]
    ratio, width, parameters = (
        [float(cell.replace(",", "")) for cell in row[1:]] for row in rows[2:5]
    )
    assert (ratio, width) == ([2.75, after[0]], [88, after[1]])
    assert parameters == [record.parameters_before, record.parameters_after]
    assert all(word in record.as_table() for word in last)
    assert (record.digest or "none")[:12] in record.as_table()


def test_the_baseline_records_that_nothing_was_removed(tiny_llama):
    record = load_pruned(str(tiny_llama)).prune_record
    assert record.digest is record.as_dict()["criterion"] is None
    assert record.parameters_before == record.parameters_after


@pytest.mark.parametrize("way", ["in memory", "one file"])
def test_the_pruned_model_can_be_pruned_again(tmp_path, way, tiny_llama):
    source = Source(tiny_llama)
    source.load(ratio=2).save_pretrained(tmp_path / "once")
    state, _ = by_hand.sliced(source.whole(), by_hand.best(32))
    assert_one_model(Source(tmp_path / "once"), {"ratio": 1}, state, tmp_path, [way])


def test_what_is_not_pruned_keeps_its_very_parameters(model, caplog):
    before = dict(model.named_parameters())
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    prune_model(model, ratio=1, layers=1)
    for name, parameter in model.named_parameters():
        assert (parameter is before[name]) is ("layers.1.mlp" not in name), name
        assert parameter.requires_grad is ("layers.1.mlp.up_proj" not in name)
        assert parameter.is_leaf
    caplog.clear()
    prune_model(model, ratio=1)
    assert not caplog.messages
    model(torch.arange(12)[None]).logits.sum().backward()
    down = model.model.layers[1].mlp.down_proj.weight
    assert down.grad.shape == down.shape == (32, 32)


@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_an_error_leaves_the_model_whole(model, projection, bad):
    getattr(model.model.layers[1].mlp, projection).weight.data[3, 5] = bad
    before = copy.deepcopy(model)
    name = rf"model\.layers\.1\.mlp\.{projection}\.weight holds 1 NaN or infinite"
    with pytest.raises(ValueError, match=name):
        prune_model(model, ratio=1)
    assert model.config.intermediate_size == 88
    for one, other in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


def test_a_quantised_model_is_refused(model):
    class Linear4bit(torch.nn.Module):
        weight = torch.zeros(88, 32, dtype=torch.int8)

    model.model.layers[2].mlp.up_proj = Linear4bit()
    with pytest.raises(UnsupportedModelError, match="Linear4bit"):
        prune_model(model, ratio=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_run_one_by_one_just_where_their_rows_are_unaligned(dtype, caplog):
    sizes = {"num_hidden_layers": 1, "intermediate_size": 24, "num_local_experts": 2}
    config = checkpoints.tiny_config("mixtral", **sizes)
    full = checkpoints.tiny_model(config).to(dtype)
    assert full.config._experts_implementation == "grouped_mm"
    multiple = {torch.float32: 4, torch.bfloat16: 8}[dtype]
    for width in range(1, 25):
        caplog.clear()
        pruned = prune_model(copy.deepcopy(full), intermediate_size=width)
        aligned = width % multiple == 0
        chosen = pruned.config._experts_implementation
        assert chosen == ("grouped_mm" if aligned else "eager"), width
        assert len(caplog.messages) == (0 if aligned else 1)
        for message in caplog.messages:
            assert f"multiple_of={multiple}" in message
        assert logits(pruned).isfinite().all()
    caplog.clear()
    for implementation in ("batched_mm", "eager", "sonicmoe"):
        full.set_experts_implementation(implementation)
        pruned = prune_model(copy.deepcopy(full), intermediate_size=7)
        assert pruned.config._experts_implementation == implementation
    assert not caplog.messages


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        # Of 88 neurons.
        ({"prune_percent": 40}, ("53 neurons", "multiple_of=8 ")),
        ({"prune_percent": 40, "multiple_of": 3}, ("51 neurons", "multiple_of=24 ")),
        ({"prune_percent": 40, "multiple_of": 8}, ()),
        ({"prune_percent": 40, "dtype": "float32"}, ()),
        ({"intermediate_size": 80}, ()),
        # What keeps its width is not spoken of.
        ({"intermediate_size": 80, "layers": "0"}, ()),
        ({}, ()),
    ],
)
def test_widths_that_are_slow_on_cuda_are_told(
    asked, said, tiny_llama, monkeypatch, caplog
):
    on_cuda = property(lambda model: torch.device("cuda"))
    monkeypatch.setattr(PreTrainedModel, "device", on_cuda)
    load_pruned(str(tiny_llama), **{"dtype": "bfloat16", **asked})
    notices = [each for each in caplog.messages if each.endswith("for speed.")]
    assert len(notices) == bool(said)
    assert all(word in notices[0] for word in said)
