"""Measured curves: those of models that were cut one layer at a time, in memory."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from lm_eval_pruned import cli, load_pruned, prune_model
from lm_eval_pruned.checkpoints.request import LoadRequest
from lm_eval_pruned.checkpoints.sensitivity import measure_sensitivity
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from lm_eval_pruned.pruning.arguments import PruneArguments
from lm_eval_pruned.pruning.criteria import CALIBRATED, CRITERIA
from lm_eval_pruned.pruning.layouts import UnsupportedModelError
from lm_eval_pruned.pruning.measuring import MEASURED_CUTS, LoadedModel
from tests.helpers import checkpoints, layouts
from tests.helpers.layouts import breadth, save_family
from tests.helpers.ways_to_load import TEXTS, write_texts


#: What float32 rounds.
ROUNDING = {"rel": 1e-5, "abs": 1e-5}
#: Kinds of models whose layers get different things.
LAYOUTS = ("llama", "phi3", "glm4", "lfm2", "mixtral", "qwen2_moe", "gpt_oss")
LAYOUTS += ("llama4_text", "gemma2", "gemma3_text", "cohere", "gemma3n_text")


def request_of(folder, auto_class=AutoModelForCausalLM, **arguments) -> LoadRequest:
    return LoadRequest.resolve(auto_class, str(folder), PruneArguments(), arguments)


def saved(folder, family):
    if family in layouts.FAMILIES:
        save_family(folder, family, 48)
        return folder
    more = {}
    if family == "gemma3n_text":
        # The last two of four layers attend to keys and values of those before.
        more = {"num_hidden_layers": 4, "num_kv_shared_layers": 2}
    return checkpoints.save_tiny(folder, family, **more)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lm-eval-pruned" / "sensitivity"


@pytest.fixture
def text(tmp_path):
    return write_texts(tmp_path / "text.jsonl")


@torch.no_grad()
def loss_by_hand(folder, **asked) -> float:
    """Return nats per token of the model that is loaded in full, pruned and run."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = checkpoints.byte_tokenizer()
    if asked:
        prune_model(model, tokenizer=tokenizer, **asked)
    losses = []
    for text in TEXTS:
        tokens = torch.tensor([tokenizer(text)["input_ids"]])
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
        losses.append(
            torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
        )
    return float(torch.cat(losses).double().mean())


def measured(folder, text, criteria=("maw",), **asked):
    return measure_sensitivity(request_of(folder), text, criteria=criteria, **asked)


@pytest.mark.parametrize("family", breadth(LAYOUTS, "llama", "gemma3n_text"))
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
    criteria = (*CRITERIA, "random")
    asked = {"seeds": (0, 5), "prune_percents": (25, 50)}
    found = measured(tiny_llama, text, criteria=criteria, **asked)
    names = [*dict.fromkeys((curve.criterion, curve.seed) for curve in found.curves)]
    assert names == [*((name, None) for name in CRITERIA), ("random", 0), ("random", 5)]
    assert len(found.curves) == 3 * len(names) == 3 * len(list(cache.iterdir()))
    for curve in found.curves:
        asked = {"criterion": curve.criterion, "layers": curve.layer}
        asked["seed"] = curve.seed or 0
        if curve.criterion in CALIBRATED:
            asked["calibration"] = text
        for width, loss in zip(curve.widths, curve.losses, strict=True):
            expected = loss_by_hand(tiny_llama, intermediate_size=width, **asked)
            assert loss == pytest.approx(expected, **ROUNDING)


def test_what_was_measured_is_not_measured_again(tiny_llama, text, cache, monkeypatch):
    first = measured(tiny_llama, text, criteria=("maw", "random"), seeds=(0,))
    # Curves do not depend on what else is measured.
    alone = measured(tiny_llama, text, criteria=("random",), seeds=(0,))
    (tiny,) = {tuple(c for c in first.curves if c.seed == 0)}
    assert alone.curves == tiny
    both = measured(tiny_llama, text, criteria=("random",), seeds=(0, 5)).curves
    assert both[:3] == tiny and {curve.seed for curve in both[3:]} == {5}
    assert all(
        one.losses != other.losses for one, other in zip(tiny, both[3:], strict=True)
    )
    monkeypatch.setattr(LoadedModel, "losses", None)
    assert measured(tiny_llama, text, criteria=("maw", "random"), seeds=(0,)) == first
    for file in cache.iterdir():
        file.unlink()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent.parent))
    assert measured(tiny_llama, text, criteria=("random",), seeds=(0,)) == alone


@pytest.mark.parametrize("asker", ["the harness", "Python"])
def test_curves_of_the_command_are_those_of_an_allocation(
    asker, tiny_llama, text, cache, monkeypatch
):
    """The same model has the same curves, whoever asks for it and in what words."""
    command = ["sensitivity", "--model_args", f"pretrained={tiny_llama},dtype=float32"]
    command += ["--calibration", text, "--criteria", "act"]
    assert cli.main([*command, "--prune_percents", *map(str, MEASURED_CUTS)]) == 0
    monkeypatch.setattr(LoadedModel, "losses", None)
    asked = {"prune_percent": 30, "allocation": "sensitivity", "criterion": "act"}
    asked |= {"calibration": text, "calibration_samples": 3}
    if asker == "Python":
        model = load_pruned(str(tiny_llama), dtype=torch.float32, **asked)
    else:
        lm = PrunedHFLM(str(tiny_llama), device="cpu", dtype="float32", **asked)
        model = lm.model
    assert model.prune_record.as_dict()["allocation"] == "sensitivity"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"dtype": "auto", "revision": "main", "trust_remote_code": False}),
        ({"dtype": "bfloat16"}, {"torch_dtype": torch.float32, "cache_dir": "/else"}),
        ({"device_map": {"": 0}}, {"device_map": "auto", "max_memory": {0: "1GB"}}),
        ({}, {"subfolder": "", "gguf_file": None}),
        ({}, {"load_in_8bit": True, "offload_folder": "/else"}),
    ],
)
def test_one_model_has_one_key_however_it_was_asked_for(one, other, tiny_llama):
    first, second = (request_of(tiny_llama, **each) for each in (one, other))
    assert first.content_key() == second.content_key()
    for change in (
        {"rms_norm_eps": 0.5},
        {"use_safetensors": True},
        {"auto_class": AutoModelForSequenceClassification},
    ):
        changed = request_of(tiny_llama, **one, **change)
        assert first.content_key() != changed.content_key(), change


CHANGES = {
    "weights": (lambda folder, text: checkpoints.save_tiny(folder, seed=1), {}),
    "text": (lambda folder, text: write_texts(text, [*TEXTS[:2], "Other words."]), {}),
    "length": (None, {"calibration_tokens": 5}),
    "widths": (None, {"prune_percents": (10, 25)}),
    "damage": (None, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_other_curves_are_measured_anew(change, tmp_path, text, cache):
    folder = checkpoints.save_tiny(tmp_path / "model")
    first, (edit, asked) = measured(folder, text), CHANGES[change]
    if edit is not None:
        edit(folder, tmp_path / "text.jsonl")
    for file in cache.iterdir() if change == "damage" else ():
        file.write_text("{")
    assert (measured(folder, text, **asked) == first) == (change == "damage")


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        ({"criteria": ()}, "nothing to measure"),
        ({"prune_percents": ()}, "nothing to measure"),
        ({"prune_percents": (0, 25)}, "prune_percents=0 25"),
        ({"prune_percents": (100,)}, "prune_percents=100"),
        ({"prune_percents": ("much",)}, "prune_percents=much"),
        ({"calibration_tokens": 1}, "calibration_tokens=1"),
        ({"calibration_samples": 9}, "holds 3 texts, but 9"),
        ({"criteria": ("nonsense",)}, "criterion=nonsense"),
        ({"seeds": (1,)}, "only the criterion random"),
        ({"criteria": ("random",), "seeds": (-1,)}, "seeds=-1"),
    ],
)
def test_what_cannot_be_measured_is_refused(asked, word, tiny_llama, text):
    with pytest.raises(ValueError, match=word):
        measured(tiny_llama, text, **asked)


def test_texts_and_models_that_cannot_be_measured(tiny_llama, tmp_path, text):
    short = write_texts(tmp_path / "short.jsonl", "aaa")
    with pytest.raises(ValueError, match="one token"):
        measured(tiny_llama, short)
    request = request_of(saved(tmp_path / "t5", "t5"), AutoModelForSeq2SeqLM)
    with pytest.raises(UnsupportedModelError, match="encoder"):
        measure_sensitivity(request, text)


def test_a_cache_that_cannot_be_written_is_no_error(tiny_llama, text, tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert measured(tiny_llama, text).curves
