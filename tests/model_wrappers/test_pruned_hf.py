"""The model type ``pruned-hf`` inside the harness, in this process."""

from __future__ import annotations

import logging

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lm_eval_pruned import load_pruned
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from tests.helpers import by_hand, checkpoints, made_tasks
from tests.helpers.checkpoints import TINY, auto_class, byte_tokenizer, tiny_model
from tests.helpers.comparing import assert_same_model
from tests.helpers.layouts import ragged, save_family, save_gemma3n


TASKS = ["tiny_choice", "tiny_rolling", "tiny_generation"]


@pytest.fixture(scope="module")
def task_manager(tmp_path_factory):
    folder = made_tasks.write_choice_task(tmp_path_factory.mktemp("tasks"))
    made_tasks.write_text_tasks(folder)
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture
def evaluate(task_manager):
    def evaluate(model, tasks=TASKS, **model_args):
        found = simple_evaluate(
            model=model,
            model_args=model_args,
            tasks=tasks,
            task_manager=task_manager,
            bootstrap_iters=0,
            device="cpu",
        )
        return found["results"], found["config"]

    return evaluate


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


def case(make, asked, widths, **options):
    marks = () if options.pop("fast", False) else pytest.mark.slow
    return pytest.param(make, asked, widths, options, marks=marks)


#: A checkpoint, what to prune, the widths of its groups, and whether stock hf opens the result.
CASES = [
    case(family("llama", 88), {"prune_percent": 50}, [44], fast=True),
    case(family("llama", 88), {}, [88]),
    case(family("llama", 16), {"layers": "1-2", "prune_percent": 50}, [16, 8], stock=False),
    *(
        case(family(name, 16), {"intermediate_size": 8}, None, tasks=["tiny_choice"])
        for name in ("phi3", "glm4", "t5", "umt5", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
        + ("deepseek_v3",)
    ),
    case(lambda folder: save_gemma3n(folder, [16, 24, 20]), {"prune_percent": 50}, [8, 12, 10]),
    case(lambda folder: ragged(folder, [16, 5, 9]), {}, [16, 5, 9], stock=False),
    case(text_tower, {"prune_percent": 50}, [44], tasks=["tiny_choice"]),
    case(None, {"ratio": "1.5"}, [864]),
]  # fmt: skip


@pytest.mark.parametrize(("make", "asked", "widths", "options"), CASES)
def test_a_pruned_model_scores_as_its_saved_self(
    make, asked, widths, options, tmp_path, evaluate, request
):
    folder = str(tmp_path)
    if make is None:
        folder = request.getfixturevalue("real_model")
    else:
        make(tmp_path)
    config = AutoConfig.from_pretrained(folder)
    backend = {"backend": "seq2seq"} if config.is_encoder_decoder else {}
    tasks = options.get("tasks", TASKS)
    results, told = evaluate("pruned-hf", tasks, pretrained=folder, **asked, **backend)
    pruning = told["pruning"]
    if widths is None:
        assert pruning["intermediate_size_after"] == 8
    else:
        assert [group["width_after"] for group in pruning["groups"]] == widths
    assert pruning["asked"].items() <= {n: str(v) for n, v in asked.items()}.items()
    saved = str(tmp_path / "saved")
    model = load_pruned(folder, auto_class=auto_class(config), **asked)
    model.save_pretrained(saved)
    AutoTokenizer.from_pretrained(folder).save_pretrained(saved)
    assert pruning["kept_digest"] == model.prune_record.digest
    stock = "hf" if options.get("stock", True) else "pruned-hf"
    again, theirs = evaluate(stock, tasks, pretrained=saved, **backend)
    assert results == again
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


@pytest.mark.parametrize(
    "arguments", [{"ratio": 2, "prune_percent": 10}, {"ratio": 50}, {"layers": "1-9"}]
)
def test_nothing_is_left_behind_after_an_error(tiny_llama, arguments):
    arguments = {"ratio": 1, **arguments}
    with pytest.raises(ValueError, match=r"ratio|layer 3"):
        PrunedHFLM(str(tiny_llama), device="cpu", **arguments)
    assert PrunedHFLM.AUTO_MODEL_CLASS is HFLM.AUTO_MODEL_CLASS
    lm = PrunedHFLM(str(tiny_llama), ratio=1, device="cpu")
    assert lm.config.intermediate_size == 32
