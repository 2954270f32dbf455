"""The model type ``pruned-hf`` inside the harness, in this process."""

from __future__ import annotations

import logging

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, PreTrainedModel

from lm_eval_pruned import load_pruned
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from tests.helpers import by_hand, checkpoints, made_tasks
from tests.helpers.comparing import assert_same_model


TASKS = ["tiny_choice", "tiny_rolling", "tiny_generation"]


@pytest.fixture(scope="module")
def task_manager(tmp_path_factory):
    folder = made_tasks.write_choice_task(tmp_path_factory.mktemp("tasks"))
    made_tasks.write_text_tasks(folder)
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(task_manager, model, **model_args):
    return simple_evaluate(
        model=model,
        model_args=model_args or None,
        tasks=TASKS,
        task_manager=task_manager,
        bootstrap_iters=0,
        device="cpu",
    )


def test_it_is_hf_with_narrowed_layers(tiny_llama):
    lm = PrunedHFLM(str(tiny_llama), ratio=1, device="cpu")
    assert isinstance(lm, HFLM)
    assert_same_model(lm.model, load_pruned(str(tiny_llama), ratio=1))
    assert lm.config.intermediate_size == 32
    assert lm.get_model_info()["pruning"] == lm.model.prune_record.as_dict()


def test_the_results_say_what_was_done(tiny_llama, task_manager):
    results = evaluate(
        task_manager, "pruned-hf", pretrained=str(tiny_llama), prune_percent=50
    )
    pruning = results["config"]["pruning"]
    assert pruning["criterion"] == "maw"
    assert pruning["asked"] == {"prune_percent": "50"}
    assert pruning["intermediate_size_after"] == 44
    assert len(pruning["kept_digest"]) == 64


@pytest.mark.slow
def test_the_baseline_scores_as_hf_does(tiny_llama, task_manager):
    ours = evaluate(task_manager, "pruned-hf", pretrained=str(tiny_llama))
    theirs = evaluate(task_manager, "hf", pretrained=str(tiny_llama))
    assert ours["results"] == theirs["results"]


def test_a_saved_model_scores_as_hf_does(tiny_llama, task_manager, tmp_path):
    load_pruned(str(tiny_llama), ratio=1).save_pretrained(tmp_path)
    checkpoints.byte_tokenizer().save_pretrained(tmp_path)
    ours = evaluate(task_manager, "pruned-hf", pretrained=str(tiny_llama), ratio=1)
    theirs = evaluate(task_manager, "hf", pretrained=str(tmp_path))
    assert ours["results"] == theirs["results"]
    baseline = evaluate(task_manager, "hf", pretrained=str(tiny_llama))
    assert ours["results"] != baseline["results"]


@pytest.mark.slow
def test_layers_of_different_width_score_alike_once_saved(
    tiny_llama, task_manager, tmp_path
):
    (tmp_path / "a.csv").write_text("layer,width\n0,60\n2,21\n")
    widths = str(tmp_path / "a.csv")
    model = load_pruned(str(tiny_llama), widths=widths)
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    checkpoints.byte_tokenizer().save_pretrained(saved)
    asked = evaluate(
        task_manager, "pruned-hf", pretrained=str(tiny_llama), widths=widths
    )
    pruning = asked["config"]["pruning"]
    assert pruning["asked"] == {"widths": "a.csv"}
    assert pruning["layer_widths"] == {"0": 60, "1": 88, "2": 21}
    assert pruning["kept_digest"] == model.prune_record.digest
    again = evaluate(task_manager, "pruned-hf", pretrained=str(saved))
    assert again["results"] == asked["results"]
    # Nor does it matter to the choice of a path that the layers differ.
    assert again["config"]["answer_paths"] == asked["config"]["answer_paths"]
    assert set(again["config"]["answer_paths"]["generate_until"]["requests"]) == {
        "slots"
    }


def test_a_loaded_model_is_pruned_in_memory(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    lm = PrunedHFLM(
        model, ratio=1, tokenizer=checkpoints.byte_tokenizer(), device="cpu"
    )
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


def test_the_table_is_logged(tiny_llama, caplog):
    with caplog.at_level(logging.INFO, "lm_eval"):
        PrunedHFLM(str(tiny_llama), ratio=1, device="cpu")
    assert "|intermediate size|            88|            32|" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 2, "prune_percent": 10}, "ratio=2 and prune_percent=10"),
        ({"ratio": 2, "criterion": "nope"}, "criterion=nope is unknown"),
        ({"ratio": 50}, "ratio=50 is above"),
    ],
)
def test_nothing_is_left_behind_after_an_error(tiny_llama, arguments, message):
    original = PreTrainedModel.__dict__["_load_pretrained_model"]
    with pytest.raises(ValueError, match=message):
        PrunedHFLM(str(tiny_llama), device="cpu", **arguments)
    assert PreTrainedModel.__dict__["_load_pretrained_model"] is original
    assert PrunedHFLM.AUTO_MODEL_CLASS is HFLM.AUTO_MODEL_CLASS
    assert (
        PrunedHFLM(str(tiny_llama), ratio=1, device="cpu").config.intermediate_size
        == 32
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hf_s_own_arguments_still_apply(tiny_llama, dtype):
    lm = PrunedHFLM(
        str(tiny_llama), ratio=1, device="cpu", dtype=dtype, batch_size=2, max_length=99
    )
    assert lm.model.dtype == getattr(torch, dtype)
    assert lm.max_length == 99
    assert lm.batch_size == 2
