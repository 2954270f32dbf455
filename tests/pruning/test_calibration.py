"""Criteria that look at what neurons do on calibration text."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, strategies as st

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.cli import main
from lm_eval_pruned.pruning.calibration import calibrate, read_texts
from lm_eval_pruned.pruning.layouts import UnsupportedModelError, find_glu_mlps
from tests.helpers import checkpoints, evaluations


TEXTS = [
    "The tide comes in twice a day.",
    "A loaf rises because yeast makes gas.",
    "Bridges expand in summer.",
    "He counted the steps, and lost count at ninety.",
]


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(file)


def by_hand(folder, texts=TEXTS):
    """Return {layer: (gate, up, down, [x of each text])} with x of shape (tokens, I)."""
    model = load_pruned(str(folder))
    tokenizer = checkpoints.byte_tokenizer()
    seen: dict[int, list[torch.Tensor]] = {}

    def watch(index):
        def hook(module, inputs):
            seen.setdefault(index, []).append(inputs[0][0].detach().clone())

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(watch(index))
    with torch.no_grad():
        for text in texts:
            model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]))
    return {
        index: (
            layer.mlp.gate_proj.weight.detach(),
            layer.mlp.up_proj.weight.detach(),
            layer.mlp.down_proj.weight.detach(),
            seen[index],
        )
        for index, layer in enumerate(model.model.layers)
    }


def top(scores: torch.Tensor, width: int) -> list[int]:
    return sorted(scores.topk(width).indices.tolist())


def test_act_is_column_norm_times_activation_norm(tiny_llama, texts):
    loaded = load_pruned(str(tiny_llama), ratio=1, criterion="act", calibration=texts)
    for index, (_, _, down, values) in by_hand(tiny_llama).items():
        x = torch.cat(values).double()
        wanda = down.double().abs() * x.square().sum(dim=0).sqrt()
        scores = wanda.square().sum(dim=0).sqrt()
        assert loaded.prune_record.kept[index].tolist() == top(scores, 32)


def test_maw_act_is_the_documented_formula(tiny_llama, texts):
    loaded = load_pruned(
        str(tiny_llama), ratio=1, criterion="maw_act", calibration=texts
    )
    for index, (gate, up, down, values) in by_hand(tiny_llama).items():
        s = sum(x.double().square().sum(dim=0).sqrt() for x in values)
        structure = 0
        for rows in (gate.double(), up.double(), down.double().T):
            peaks = rows.max(dim=1).values + rows.min(dim=1).values.abs()
            structure = structure + peaks / peaks.max()
        assert loaded.prune_record.kept[index].tolist() == top(structure * s, 32)


@pytest.mark.parametrize("percent", [10, 40, 75])
@pytest.mark.parametrize("seed", [0, 1])
def test_maw_act_keeps_what_optipfair_keeps(tmp_path, texts, percent, seed):
    from optipfair.pruning.mlp_glu import prune_model_mlp_glu

    folder = checkpoints.save_tiny(tmp_path / "model", seed=seed)
    ours = load_pruned(
        str(folder), prune_percent=percent, criterion="maw_act", calibration=texts
    )
    tokenizer = checkpoints.byte_tokenizer()
    batches = [tokenizer(text, return_tensors="pt") for text in TEXTS]
    theirs = prune_model_mlp_glu(
        load_pruned(str(folder)),
        neuron_selection_method="MAW",
        pruning_percentage=percent,
        dataloader=[
            {k: batch[k] for k in ("input_ids", "attention_mask")} for batch in batches
        ],
        show_progress=False,
    )
    for name, weight in theirs.state_dict().items():
        assert torch.equal(weight, ours.state_dict()[name]), name


def test_prune_model_observes_the_model_it_gets_and_leaves_no_hook(tiny_llama, texts):
    model = load_pruned(str(tiny_llama)).train()
    pruned = prune_model(
        model,
        ratio=2,
        criterion="act",
        calibration=texts,
        calibration_samples=2,
        tokenizer=checkpoints.byte_tokenizer(),
    )
    assert pruned.training
    assert not any(module._forward_hooks for module in pruned.modules())
    record = pruned.prune_record.as_dict()["calibration"]
    assert record["texts"] == 2
    assert record["tokens"] == sum(len(text.encode()) for text in TEXTS[:2])
    assert record["file"] == "texts.jsonl" and len(record["sha256"]) == 64
    assert json.dumps(record)


@pytest.mark.parametrize("model_type", ["qwen2", "phi3", "gemma2"])
def test_other_layouts(tmp_path, texts, model_type):
    folder = checkpoints.save_tiny(tmp_path / "model", model_type)
    loaded = load_pruned(str(folder), ratio=2, criterion="act", calibration=texts)
    assert {mlp.width for mlp in find_glu_mlps(loaded)} == {64}


def test_chats_go_through_the_template(tiny_llama, tmp_path):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    tokenizer = checkpoints.byte_tokenizer()
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": chat}) + "\n\n")
    model = load_pruned(str(tiny_llama))
    observed = calibrate(model, tokenizer, str(file))
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    file.write_text(json.dumps({"text": rendered}))
    again = calibrate(model, tokenizer, str(file))
    assert observed.measured_on["tokens"] == again.measured_on["tokens"]
    for name, activity in observed.activity.items():
        assert torch.equal(activity.norm, again.activity[name].norm)


def test_long_texts_are_cut_at_the_models_positions(tmp_path, texts):
    folder = checkpoints.save_tiny(tmp_path / "model", max_position_embeddings=8)
    loaded = load_pruned(str(folder), ratio=2, criterion="act", calibration=texts)
    assert loaded.prune_record.calibration.measured_on["tokens"] == 8 * len(TEXTS)


def test_scores_do_not_depend_on_the_order_of_texts(tiny_llama, tmp_path, texts):
    backwards = tmp_path / "backwards.jsonl"
    backwards.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS[::-1]))
    for criterion in ("act", "maw_act"):
        one, other = (
            load_pruned(
                str(tiny_llama), ratio=1, criterion=criterion, calibration=str(file)
            )
            for file in (texts, backwards)
        )
        assert one.prune_record.digest == other.prune_record.digest


@given(silent=st.sets(st.integers(0, 87), min_size=1, max_size=60))
def test_silent_neurons_go_first(tiny_llama, tmp_path_factory, silent):
    file = tmp_path_factory.mktemp("texts") / "t.jsonl"
    file.write_text(json.dumps({"text": TEXTS[0]}))
    model = load_pruned(str(tiny_llama))
    # gate = 0 makes silu(gate) * up = 0, whatever up and down are.
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight[sorted(silent)] = 0
            layer.mlp.up_proj.weight[sorted(silent)] *= 100
    for criterion in ("act", "maw_act"):
        observed = prune_model(
            copy.deepcopy(model),
            intermediate_size=88 - len(silent),
            criterion=criterion,
            calibration=str(file),
            tokenizer=checkpoints.byte_tokenizer(),
        )
        for kept in observed.prune_record.kept:
            assert not silent & set(kept.tolist())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot be read"),
        (b"", r"holds 0 texts, but 3 were asked for"),
        (b"\n  \n", r"holds 0 texts"),
        (
            b'{"text": "a"}',
            r"holds 1 texts, but 3 were asked for.*smaller calibration_s",
        ),
        (b'{"text": "a"}\n{"text": ', r"line 2 is no JSON object"),
        (b'{"text": ""}\n', r'line 1 is no JSON object with "text"'),
        (b'{"prompt": "a"}\n', r"line 1 is no JSON object"),
        (b'["a"]\n', r"line 1 is no JSON object"),
        (b'{"messages": []}\n', r"line 1 is no JSON object"),
        (b'{"messages": ["a"]}\n', r"line 1 is no JSON object"),
        (b"\xff\xfe", r"cannot be read"),
    ],
)
def test_bad_files_are_refused_before_the_weights_are_read(
    tiny_llama, tmp_path, monkeypatch, content, message
):
    file = tmp_path / "texts.jsonl"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setattr(
        "lm_eval_pruned.checkpoints.request.LoadRequest.load",
        lambda *a: pytest.fail("weights were read"),
    )
    with pytest.raises(ValueError, match=message):
        load_pruned(
            str(tiny_llama),
            ratio=2,
            criterion="act",
            calibration=str(file),
            calibration_samples=3,
        )


def test_models_that_cannot_be_observed(tmp_path, texts, monkeypatch):
    moe = checkpoints.save_tiny(tmp_path / "moe", "mixtral", num_local_experts=3)
    monkeypatch.setattr(
        "lm_eval_pruned.checkpoints.request.LoadRequest.load",
        lambda *a: pytest.fail("weights were read"),
    )
    with pytest.raises(UnsupportedModelError, match="stacked with others"):
        load_pruned(str(moe), ratio=2, criterion="act", calibration=texts)


def test_overflowing_activations_are_named(tmp_path, texts):
    folder = checkpoints.save_tiny(tmp_path / "model")
    model = load_pruned(str(folder))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight *= 1e30
        model.model.layers[1].mlp.gate_proj.weight *= 1e30
    with pytest.raises(ValueError, match=r"layers\.1\.mlp produce NaN or infinite"):
        prune_model(
            model,
            ratio=2,
            criterion="act",
            calibration=texts,
            tokenizer=checkpoints.byte_tokenizer(),
        )
    assert model.config.intermediate_size == 88


def test_a_tokenizer_is_needed(tiny_llama, texts):
    with pytest.raises(ValueError, match="no tokenizer to read it with"):
        prune_model(
            load_pruned(str(tiny_llama)), ratio=2, criterion="act", calibration=texts
        )


@pytest.mark.slow
def test_through_the_harness_and_the_export(tiny_llama, tmp_path, texts):
    scores, config = evaluations.evaluate(
        "pruned-hf",
        f"pretrained={tiny_llama},ratio=2,criterion=act,calibration={texts}",
    )
    assert config["pruning"]["calibration"]["texts"] == len(TEXTS)
    output = tmp_path / "out"
    command = [
        "prune",
        "--model_args",
        f"pretrained={tiny_llama}",
        "--output_path",
        str(output),
    ]
    command += ["--ratio", "2", "--criterion", "act", "--calibration", texts]
    assert main(command) == 0
    exported, _ = evaluations.evaluate("hf", f"pretrained={output}")
    assert exported == scores
    assert config["pruning"]["kept_digest"] in (output / "README.md").read_text()


def test_samples_are_the_first_lines(texts):
    assert read_texts(texts, 2) == TEXTS[:2]
    assert read_texts(texts) == TEXTS
