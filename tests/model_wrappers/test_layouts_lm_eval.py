"""Every layout through lm-evaluation-harness: the stock command, and its Python entry."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import lm_eval
import pytest
from transformers import AutoConfig

from lm_eval_pruned import load_pruned
from tests.helpers.checkpoints import TINY, auto_class, byte_tokenizer, tiny_model
from tests.helpers.layouts import save_family


SEQ2SEQ = {"t5", "umt5"}
TASK = "pruned_demo_truthfulness"


@functools.cache
def task_manager():
    from importlib.resources import files

    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(files("lm_eval_pruned.tasks")))


def evaluate(model: str, model_args) -> dict:
    """Return the scores and the model information of one evaluation."""
    results = lm_eval.simple_evaluate(
        model,
        model_args=model_args,
        tasks=[TASK],
        limit=2,
        batch_size=2,
        bootstrap_iters=0,
        device="cpu",
        task_manager=task_manager(),
    )
    return {"scores": scores(results), "pruning": results["config"].get("pruning")}


def scores(results: dict) -> dict:
    return {
        key: value
        for key, value in results["results"][TASK].items()
        if isinstance(value, float)
    }


@pytest.mark.slow
@pytest.mark.parametrize("family", ["phi3", "t5", "mixtral", "deepseek_v3"])
def test_a_pruned_layout_scores_like_its_saved_self(family, tmp_path):
    whole = save_family(tmp_path, family, 16)
    pruned = evaluate(
        "pruned-hf",
        {
            "pretrained": str(tmp_path),
            "intermediate_size": 8,
            "backend": "seq2seq" if family in SEQ2SEQ else "causal",
        },
    )
    saved = tmp_path / "saved"
    load_pruned(
        tmp_path, auto_class=auto_class(whole.config), intermediate_size=8
    ).save_pretrained(saved)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (saved / name).write_text((tmp_path / name).read_text())
    stock = evaluate("hf", {"pretrained": str(saved)})
    assert pruned["scores"] == pytest.approx(stock["scores"], abs=1e-5)
    assert pruned["pruning"]["intermediate_size_after"] == 8


@pytest.mark.parametrize(
    "model_args",
    [
        "pretrained={},skip_layers=0,2,prune_percent=50",
        "pretrained={},prune_percent=50,skip_layers=0+2",
        {"skip_layers": [0, 2], "prune_percent": 50},
        {"layers": "1", "prune_percent": 50},
    ],
)
def test_layers_as_the_harness_passes_them(model_args, tmp_path):
    save_family(tmp_path, "llama", 16)
    if isinstance(model_args, str):
        model_args = model_args.format(tmp_path)
    else:
        model_args = {**model_args, "pretrained": str(tmp_path)}
    pruning = evaluate("pruned-hf", model_args)["pruning"]
    assert pruning["layers_pruned"] == "1"
    assert [group["width_after"] for group in pruning["groups"]] == [16, 8]


@pytest.mark.slow
def test_layers_of_different_width_are_evaluated_without_a_size(tmp_path):
    save_family(tmp_path, "llama", 16)
    first = evaluate(
        "pruned-hf",
        {"pretrained": str(tmp_path), "layers": "1-2", "prune_percent": 50},
    )
    saved = tmp_path / "saved"
    load_pruned(tmp_path, layers="1-2", prune_percent=50).save_pretrained(saved)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (saved / name).write_text((tmp_path / name).read_text())
    again = evaluate("pruned-hf", {"pretrained": str(saved)})
    assert again["scores"] == pytest.approx(first["scores"], abs=1e-5)


def run_command(tmp_path, model_args: str, *more: str):
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "lm_eval",
            "--model",
            "pruned-hf",
            "--model_args",
            model_args,
            *("--tasks", TASK, "--limit", "2", "--device", "cpu", "--batch_size", "2"),
            *("--output_path", str(tmp_path / "results.json"), *more),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )


#: What goes beyond a size, on the real model; FILE and ADAPTER are made by the test.
REAL = {
    "layers": "prune_percent=40,skip_layers=[0,29]",
    "calibrated": "prune_percent=40,criterion=act,calibration=FILE,calibration_samples=2",
    "adapter": "prune_percent=40,peft=ADAPTER",
    "merged adapter": "prune_percent=40,peft=ADAPTER,peft_stage=before",
    "quantised": "prune_percent=40,load_in_8bit=true",
    "GGUF": "prune_percent=40,gguf_file=GGUF",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REAL)
def test_the_stock_command_on_the_real_model(case, real_model, tmp_path):
    arguments = REAL[case].replace("FILE", str(tmp_path / "texts.jsonl"))
    (tmp_path / "texts.jsonl").write_text(
        '{"text": "Rivers carry sand to the sea."}\n{"text": "It rained all day."}\n'
    )
    pretrained = real_model
    if "ADAPTER" in arguments:
        percent = 0 if case == "merged adapter" else 40
        adapter = save_adapter(real_model, percent, tmp_path / "adapter")
        arguments = arguments.replace("ADAPTER", str(adapter))
    if "quantised" in case:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    if "GGUF" in case:
        from lm_eval_pruned.checkpoints.default_model import _packaged_gguf

        gguf = _packaged_gguf()
        pretrained, arguments = gguf.parent, arguments.replace("=GGUF", f"={gguf.name}")
    done = run_command(tmp_path, f"pretrained={pretrained},{arguments}")
    assert done.returncode == 0, done.stderr
    pruning = results_of(tmp_path)["config"]["pruning"]
    widths = {group["width_after"] for group in pruning["groups"]}
    assert widths == ({1536, 922} if case == "layers" else {922})


def save_adapter(pretrained: str, percent: int, folder):
    """Write a LoRA adapter of the MLPs, trained on nothing, for a pruned model."""
    from peft import LoraConfig, get_peft_model

    model = load_pruned(pretrained, prune_percent=percent)
    config = LoraConfig(r=2, target_modules=["gate_proj", "down_proj"])
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def results_of(tmp_path) -> dict:
    (file,) = tmp_path.rglob("results*.json")
    return json.loads(file.read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("phi3", ""),
        ("glm4", ""),
        ("t5", ",backend=seq2seq"),
        ("umt5", ",backend=seq2seq"),
        ("mixtral", ""),
        ("qwen2_moe", ""),
        ("qwen3_moe", ""),
        ("olmoe", ""),
        ("deepseek_v3", ""),
        ("llama", ",skip_layers=[0,2]"),
    ],
)
def test_the_stock_command(family, more, tmp_path):
    save_family(tmp_path / "model", family, 16)
    done = run_command(
        tmp_path, f"pretrained={tmp_path}/model,intermediate_size=8{more}"
    )
    assert done.returncode == 0, done.stderr
    pruning = results_of(tmp_path)["config"]["pruning"]
    assert pruning["intermediate_size_after"] == 8


@pytest.mark.slow
def test_the_stock_command_with_a_width_per_layer(tmp_path):
    from tests.checkpoints.test_layouts_layers import save_gemma3n

    save_gemma3n(tmp_path / "model", [16, 24, 20])
    done = run_command(tmp_path, f"pretrained={tmp_path}/model,prune_percent=50")
    assert done.returncode == 0, done.stderr
    groups = results_of(tmp_path)["config"]["pruning"]["groups"]
    assert [group["width_after"] for group in groups] == [8, 12, 10]


@pytest.mark.slow
def test_the_stock_command_prunes_the_text_tower(tmp_path):
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    vision |= {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model(
        "gemma3", text_config=TINY, vision_config=vision, mm_tokens_per_image=4
    )
    tiny_model(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    done = run_command(tmp_path, f"pretrained={tmp_path}/model,prune_percent=50")
    assert done.returncode == 0, done.stderr
    (group,) = results_of(tmp_path)["config"]["pruning"]["groups"]
    assert (group["mlps"], group["width_before"], group["width_after"]) == (3, 88, 44)


@pytest.mark.slow
def test_the_stock_command_opens_layers_of_different_width(tmp_path):
    from tests.checkpoints.test_layouts_layers import ragged

    ragged(tmp_path / "model", [16, 5, 9])
    done = run_command(tmp_path, f"pretrained={tmp_path}/model")
    assert done.returncode == 0, done.stderr
    groups = results_of(tmp_path)["config"]["pruning"]["groups"]
    assert [group["width_after"] for group in groups] == [16, 5, 9]


@pytest.mark.slow
def test_the_stock_command_names_layers_out_of_range(tmp_path):
    save_family(tmp_path / "model", "llama", 16)
    done = run_command(
        tmp_path, f"pretrained={tmp_path}/model,layers=1-9,prune_percent=50"
    )
    assert done.returncode != 0
    assert "names layer 3" in done.stderr
