"""The model type ``pruned-hf`` inside the harness, in this process."""

from __future__ import annotations

import logging

import pytest
import torch
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lm_eval_pruned import load_pruned
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from tests.helpers import by_hand, checkpoints
from tests.helpers.checkpoints import TINY, auto_class, byte_tokenizer, tiny_model
from tests.helpers.layouts import ragged, save_family, save_gemma3n
from tests.helpers.ways_to_load import assert_same_model


def family(name, width):
    return lambda folder: save_family(folder, name, width)


def text_tower(folder):
    """Save a Gemma 3 that sees as well."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    vision |= {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model(
        "gemma3", text_config=TINY, vision_config=vision, mm_tokens_per_image=4
    )
    tiny_model(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


#: A checkpoint, what to prune, and the widths of its groups.
HALF = {"prune_percent": 50}
CASES = [
    (family("llama", 88), HALF, [44]),
    (family("llama", 88), {}, [88]),
    (family("llama", 16), {"layers": "1-2", **HALF}, [16, 8]),
    (family("t5", 16), HALF, [8]),
    (family("qwen3_moe", 16), HALF, [24, 8]),
    (lambda folder: save_gemma3n(folder, [16, 24, 20]), HALF, [8, 12, 10]),
    (lambda folder: ragged(folder, [16, 5, 9]), {}, [16, 5, 9]),
    (text_tower, HALF, [44]),
    (None, {"ratio": "1.5"}, [864]),
]
#: Different widths that stock hf cannot build.
ONLY_OURS = ([16, 8], [16, 5, 9])


@pytest.mark.parametrize(
    ("make", "asked", "widths"),
    [CASES[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1:])],
)
def test_a_pruned_model_scores_as_its_saved_self(
    make, asked, widths, tmp_path, evaluate, request
):
    folder, saved = str(tmp_path), str(tmp_path / "saved")
    if make is None:
        folder = request.getfixturevalue("real_model")
    else:
        make(tmp_path)
    config = AutoConfig.from_pretrained(folder)
    backend = {"backend": "seq2seq"} if config.is_encoder_decoder else {}

    def results(kind, folder, **asked):
        told = evaluate(kind, model_args={"pretrained": folder, **asked, **backend})
        scores = {
            (task, metric): score
            for task, metrics in told["results"].items()
            for metric, score in metrics.items()
            if isinstance(score, float)
        }
        return scores, told["config"]

    scores, told = results("pruned-hf", folder, **asked)
    pruning = told["pruning"]
    assert [group["width_after"] for group in pruning["groups"]] == widths
    assert pruning["asked"].items() <= {n: str(v) for n, v in asked.items()}.items()
    model = load_pruned(folder, auto_class=auto_class(config), **asked)
    model.save_pretrained(saved)
    AutoTokenizer.from_pretrained(folder).save_pretrained(saved)
    assert pruning["kept_digest"] == model.prune_record.digest
    stock = "pruned-hf" if widths in ONLY_OURS else "hf"
    again, theirs = results(stock, saved)
    # Where weights lie in memory can choose another kernel: a perplexity then differs in the seventh digit.
    assert scores == pytest.approx(again, rel=1e-5)
    if stock == "pruned-hf":
        assert theirs["answer_paths"] == told["answer_paths"]


@pytest.mark.parametrize(
    "model_args",
    [
        "pretrained={},skip_layers=0,2,prune_percent=50",
        "pretrained={},prune_percent=50,skip_layers=0+2",
        {"skip_layers": [0, 2], "prune_percent": 50},
        {"layers": "1", "prune_percent": 50},
    ],
)
def test_layers_as_the_harness_passes_them(model_args, tiny_llama):
    model, on_cpu = get_model("pruned-hf"), {"device": "cpu"}
    if isinstance(model_args, str):
        lm = model.create_from_arg_string(model_args.format(tiny_llama), on_cpu)
    else:
        model_args = {**model_args, "pretrained": str(tiny_llama)}
        lm = model.create_from_arg_obj(model_args, on_cpu)
    pruning = lm.get_model_info()["pruning"]
    assert pruning["layers_pruned"] == "1"
    assert [group["width_after"] for group in pruning["groups"]] == [88, 44]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_hf_with_narrowed_layers_and_a_table(tiny_llama, dtype, caplog):
    own = {"dtype": dtype, "batch_size": 2, "max_length": 99}
    with caplog.at_level(logging.INFO, "lm_eval"):
        lm = PrunedHFLM(str(tiny_llama), ratio=1, device="cpu", **own)
    assert isinstance(lm, HFLM)
    assert_same_model(lm.model, load_pruned(str(tiny_llama), ratio=1, dtype=dtype))
    assert lm.config.intermediate_size == 32
    assert lm.get_model_info()["pruning"] == lm.model.prune_record.as_dict()
    assert lm.model.prune_record.as_table() in caplog.text
    assert (lm.model.dtype, lm.max_length) == (getattr(torch, dtype), 99)
    assert lm.batch_size == 2


def test_a_loaded_model_is_pruned_in_memory(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    lm = PrunedHFLM(model, ratio=1, tokenizer=byte_tokenizer(), device="cpu")
    assert lm.model is model
    assert_same_model(lm.model, load_pruned(str(tiny_llama), ratio=1))


def test_weights_of_a_delta_are_added_before_scoring(tiny_llama, tmp_path):
    delta = checkpoints.save_tiny(tmp_path / "delta", seed=9)
    lm = PrunedHFLM(str(tiny_llama), delta=str(delta), ratio=1, device="cpu")
    summed = AutoModelForCausalLM.from_pretrained(tiny_llama)
    other = AutoModelForCausalLM.from_pretrained(delta).state_dict()
    for name, parameter in summed.named_parameters():
        parameter.data += other[name]
    assert_same_model(lm.model, by_hand.narrow(summed, by_hand.best(32)))
