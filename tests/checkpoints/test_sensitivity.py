"""Measured curves: those of models that were cut one layer at a time, in memory."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.llama.modeling_llama import LlamaMLP

from lm_eval_pruned import cli, load_pruned, prune_model
from lm_eval_pruned.checkpoints.request import LoadRequest
from lm_eval_pruned.checkpoints.sensitivity import measure_sensitivity
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from lm_eval_pruned.pruning.arguments import PruneArguments
from lm_eval_pruned.pruning.layouts import UnsupportedModelError
from lm_eval_pruned.pruning.measuring import MEASURED_CUTS as REMOVED, LoadedModel
from tests.helpers import checkpoints
from tests.helpers.layouts import save_family


TEXTS = ("The tide comes in twice a day.", "A loaf rises.", "Bridges expand in summer.")
#: What float32 rounds.
ROUNDING = {"rel": 1e-5, "abs": 1e-5}

#: Kinds of models whose layers get different things.
PLAIN = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "glm4",
    "olmo2",
    "granite",
    "cohere",
    "smollm3",
    "stablelm",
    "lfm2",
)
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text")


def request_of(folder, **arguments) -> LoadRequest:
    return LoadRequest.resolve(
        AutoModelForCausalLM, str(folder), PruneArguments(), arguments
    )


#: The last two of four layers attend to keys and values of those before.
SHARED_KEYS = {"num_hidden_layers": 4, "num_kv_shared_layers": 2}


def saved(folder, family):
    if family == "gemma3n_text":
        return checkpoints.save_tiny(folder, family, **SHARED_KEYS)
    if family in ("llama", "phi3", "glm4", "lfm2", *EXPERTS):
        save_family(folder, family, 48)
        return folder
    return checkpoints.save_tiny(folder, family)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lm-eval-pruned" / "sensitivity"


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": each}) + "\n" for each in TEXTS))
    return str(file)


@torch.no_grad()
def loss_by_hand(folder, length=128, **asked) -> float:
    """Return nats per token of the model that is loaded in full, pruned and run."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = checkpoints.byte_tokenizer()
    if asked:
        prune_model(model, tokenizer=tokenizer, **asked)
    losses = []
    for text in TEXTS:
        tokens = torch.tensor([tokenizer(text)["input_ids"][:length]])
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
        losses.append(
            torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
        )
    return float(torch.cat(losses).double().mean())


def measured(folder, text, criteria=("maw",), **asked):
    return measure_sensitivity(request_of(folder), text, criteria=criteria, **asked)


@pytest.mark.slow
@pytest.mark.parametrize("family", [*PLAIN, *EXPERTS, "gemma3n_text"])
def test_a_curve_holds_the_losses_of_models_cut_in_one_layer(family, tmp_path, text):
    folder = saved(tmp_path / "model", family)
    found = measured(folder, text, prune_percents=(25, 50))
    assert found.loss == pytest.approx(loss_by_hand(folder), **ROUNDING)
    for curve in found.curves:
        assert curve.criterion == "maw" and len(curve.widths) == 2
        for percent, loss in zip((50, 25), curve.losses, strict=True):
            expected = loss_by_hand(folder, prune_percent=percent, layers=curve.layer)
            assert loss == pytest.approx(expected, **ROUNDING)


@pytest.mark.slow
def test_every_criterion_has_curves_and_random_one_for_each_seed(
    tiny_llama, text, cache
):
    found = measured(
        tiny_llama, text, criteria=("act", "random", "maw_act", "l2"), seeds=(0, 5)
    )
    names = [*dict.fromkeys((curve.criterion, curve.seed) for curve in found.curves)]
    alone = [("maw_act", None), ("l2", None)]
    assert names == [("act", None), ("random", 0), ("random", 5), *alone]
    assert len(found.curves) == 3 * 5
    for curve in found.curves:
        asked = {"criterion": curve.criterion, "layers": curve.layer}
        if curve.seed is not None:
            asked["seed"] = curve.seed
        if curve.criterion.endswith("act"):
            asked["calibration"] = text
        for width, loss in zip(curve.widths, curve.losses, strict=True):
            expected = loss_by_hand(tiny_llama, intermediate_size=width, **asked)
            assert loss == pytest.approx(expected, **ROUNDING)
    assert len(list(cache.iterdir())) == 5


def test_what_was_measured_is_not_measured_again(tiny_llama, text, cache, monkeypatch):
    first = measured(tiny_llama, text, criteria=("maw", "random"), seeds=(0,))

    monkeypatch.setattr(LoadedModel, "losses", None)
    assert measured(tiny_llama, text, criteria=("random", "maw"), seeds=(0,)).curves
    again = measured(tiny_llama, text, criteria=("maw", "random"), seeds=(0,))
    assert again == first


@pytest.mark.parametrize("asker", ["the harness", "Python"])
def test_curves_of_the_command_are_those_of_an_allocation(
    asker, tiny_llama, text, cache, monkeypatch
):
    """The same model has the same curves, whoever asks for it and in what words."""
    code = cli.main(
        ["sensitivity", "--model_args", f"pretrained={tiny_llama},dtype=float32"]
        + ["--calibration", text, "--criteria", "maw", "act"]
        + ["--prune_percents", *map(str, REMOVED)]
    )
    assert code == 0

    monkeypatch.setattr(LoadedModel, "losses", None)
    asked = {"prune_percent": 30, "allocation": "sensitivity", "criterion": "best"}
    asked |= {"calibration": text, "calibration_samples": 3}
    if asker == "Python":
        model = load_pruned(str(tiny_llama), dtype=torch.float32, **asked)
    else:
        model = PrunedHFLM(str(tiny_llama), device="cpu", dtype="float32", **asked)
        model = model.model
    assert model.prune_record.as_dict()["allocation"] == "sensitivity"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"dtype": "auto", "revision": "main", "trust_remote_code": False}),
        ({"dtype": "bfloat16"}, {"torch_dtype": torch.float32, "cache_dir": "/else"}),
        ({}, {"device_map": {"": "cpu"}, "subfolder": "", "gguf_file": None}),
        ({"device_map": {"": 0}}, {"device_map": "auto", "max_memory": {0: "1GB"}}),
        ({}, {"load_in_8bit": True, "offload_folder": "/else"}),
    ],
)
def test_one_model_has_one_key_however_it_was_asked_for(one, other, tiny_llama):
    first, second = (request_of(tiny_llama, **each) for each in (one, other))
    assert first.content_key() == second.content_key()
    changed = request_of(tiny_llama, **one, rms_norm_eps=0.5)
    assert first.content_key() != changed.content_key()


def test_curves_do_not_depend_on_what_else_is_measured(tiny_llama, text, cache):
    both = measured(tiny_llama, text, criteria=("maw", "l2"))
    for file in cache.iterdir():
        file.unlink()
    alone = measured(tiny_llama, text, criteria=("l2",))
    assert alone.curves == tuple(c for c in both.curves if c.criterion == "l2")
    assert alone.loss == both.loss


@pytest.mark.slow
@pytest.mark.parametrize("change", ["weights", "text", "length", "widths", "damage"])
def test_other_curves_are_measured_anew(change, tmp_path, text, cache):
    folder = checkpoints.save_tiny(tmp_path / "model")
    first = measured(folder, text)
    asked = {}
    if change == "weights":
        checkpoints.save_tiny(folder, seed=1)
    elif change == "text":
        texts = [*TEXTS[:2], "Other words."]
        with open(text, "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": each}) + "\n" for each in texts)
    elif change == "length":
        asked["calibration_tokens"] = 5
    elif change == "widths":
        asked["prune_percents"] = (10, 25)
    else:
        for file in cache.iterdir():
            file.write_text("{")
    other = measured(folder, text, **asked)
    assert (other == first) == (change == "damage")


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"criteria": ()}, "nothing to measure"),
        ({"prune_percents": ()}, "nothing to measure"),
        ({"prune_percents": (0, 25)}, "prune_percents=0 25 .* nothing to measure"),
        ({"prune_percents": (100,)}, "prune_percents=100 .* nothing to measure"),
        ({"prune_percents": ("much",)}, "prune_percents=much is not a finite number"),
        ({"calibration_tokens": 1}, "calibration_tokens=1 leave nothing to measure"),
        ({"calibration_samples": 9}, "holds 3 texts, but 9 were asked for"),
        ({"criteria": ("nonsense",)}, "criterion=nonsense is unknown"),
        ({"seeds": (1,)}, "only the criterion random has any"),
        ({"criteria": ("random",), "seeds": (-1,)}, "seeds=-1 is not a whole number"),
    ],
)
def test_what_cannot_be_measured_is_refused(asked, says, tiny_llama, text):
    with pytest.raises(ValueError, match=says):
        measured(tiny_llama, text, **asked)


def test_a_text_of_one_token_is_refused(tiny_llama, tmp_path):
    file = tmp_path / "short.jsonl"
    file.write_text('{"text": "a"}\n' * 3)
    with pytest.raises(ValueError, match="one token"):
        measured(tiny_llama, str(file))


def test_an_encoder_is_refused(tmp_path, text):
    folder = tmp_path / "model"
    save_family(folder, "t5", 48)
    request = LoadRequest.resolve(
        AutoModelForSeq2SeqLM, str(folder), PruneArguments(), {}
    )
    with pytest.raises(UnsupportedModelError, match="encoder"):
        measure_sensitivity(request, text)


def test_a_cache_that_cannot_be_written_is_no_error(tiny_llama, text, tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert measured(tiny_llama, text).curves


@pytest.fixture
def token_layers(monkeypatch):
    """Return a counter of how many tokens went through a layer of Llama."""
    counted = [0]
    forward = LlamaMLP.forward

    def counting(self, hidden):
        counted[0] += hidden.shape[0] * hidden.shape[1]
        return forward(self, hidden)

    monkeypatch.setattr(LlamaMLP, "forward", counting)
    return counted


def passes(layers: int, widths: int) -> int:
    """Return through how many layers a text goes for one criterion (docs/allocation.md)."""
    return layers + widths * layers * (layers + 1) // 2


@pytest.mark.parametrize("layers", [1, 3, 7])
def test_the_work_is_what_the_documentation_says(tmp_path, text, token_layers, layers):
    """Half of a whole forward pass for each cut."""
    small = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": layers}
    folder = checkpoints.save_tiny(tmp_path / "model", **small)
    tokens = [len(checkpoints.byte_tokenizer()(each)["input_ids"]) for each in TEXTS]
    found = measured(folder, text, prune_percents=REMOVED)
    assert found.tokens == sum(tokens)
    assert {len(curve.widths) for curve in found.curves} == {len(REMOVED)}
    assert token_layers[0] == sum(tokens) * passes(layers, len(REMOVED))
    token_layers[0] = 0
    measured(folder, text, prune_percents=REMOVED)
    assert token_layers[0] == 0


def test_a_criterion_more_costs_a_pass_over_the_variants_more(
    tiny_llama, text, token_layers
):
    tokens = [len(checkpoints.byte_tokenizer()(each)["input_ids"]) for each in TEXTS]
    measured(tiny_llama, text, criteria=("maw", "l2", "act"), prune_percents=REMOVED)
    # Activations are those of the unpruned model, in one pass for all criteria.
    observed = 3 * sum(tokens)
    assert token_layers[0] == 3 * sum(tokens) * passes(3, len(REMOVED)) + observed
