"""The stock ``lm_eval`` command in a process of its own."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model

from lm_eval_pruned import load_pruned
from tests.helpers import evaluations, made_tasks


pytestmark = pytest.mark.slow


def test_single_and_sharded_checkpoints_score_alike(
    tiny_llama, tiny_llama_sharded, tmp_path
):
    tasks = made_tasks.write_choice_task(tmp_path / "tasks")
    made_tasks.write_text_tasks(tasks)
    found = []
    for checkpoint in (tiny_llama, tiny_llama_sharded):
        output = tmp_path / checkpoint.name
        run = evaluations.lm_eval(
            *("--model", "pruned-hf", "--device", "cpu"),
            *("--model_args", f"pretrained={checkpoint},ratio=1.5,criterion=l2"),
            *("--tasks", "tiny_choice,tiny_rolling,tiny_generation"),
            *("--include_path", tasks, "--output_path", output),
            cwd=tmp_path,
        )
        assert "|intermediate size|            88|            48|" in run.stderr
        assert "tiny_choice" in run.stdout
        results = evaluations.results(output)
        found.append((results["results"], results["config"]["pruning"]))
    assert found[0] == found[1]
    assert found[0][1]["criterion"] == "l2"


@pytest.mark.parametrize("limit", [40])
def test_the_real_model_on_truthfulqa(real_model, shared_data, limit, tmp_path):
    """The figures of an independent trial on all 817 questions bound what 40 can show."""
    for percent, width, full_set in ((0, 1536, 0.4476), (40, 922, 0.4943)):
        output = tmp_path / str(percent)
        evaluations.lm_eval(
            *("--model", "pruned-hf", "--device", "cpu", "--batch_size", 8),
            *("--model_args", f"pretrained={real_model},prune_percent={percent}"),
            *("--tasks", "truthfulqa_mc2", "--limit", limit, "--output_path", output),
            cwd=shared_data,
        )
        results = evaluations.results(output)
        assert results["config"]["pruning"]["intermediate_size_after"] == width
        score = results["results"]["truthfulqa_mc2"]
        assert abs(score["acc,none"] - full_set) < 4 * score["acc_stderr,none"]


#: What goes beyond a size, on the real model; FILE, ADAPTER and GGUF are made by the test.
REAL = {
    "layers": "skip_layers=[0,29]",
    "calibrated": "criterion=act,calibration=FILE,calibration_samples=2",
    "adapter": "peft=ADAPTER",
    "merged adapter": "peft=ADAPTER,peft_stage=before",
    "quantised": "load_in_8bit=true",
    "GGUF": "gguf_file=GGUF",
}


@pytest.mark.parametrize("case", REAL)
def test_what_goes_beyond_a_size_on_the_real_model(case, real_model, tmp_path):
    arguments, pretrained = REAL[case], real_model
    texts, adapter = tmp_path / "texts.jsonl", tmp_path / "adapter"
    texts.write_text('{"text": "Rivers carry sand."}\n{"text": "It rained all day."}\n')
    if "ADAPTER" in arguments:
        model = load_pruned(
            real_model, prune_percent=0 if "before" in arguments else 40
        )
        lora = LoraConfig(r=2, target_modules=["gate_proj", "down_proj"])
        get_peft_model(model, lora).save_pretrained(adapter)
    if case == "quantised":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    if case == "GGUF":
        from lm_eval_pruned.checkpoints.default_model import _packaged_gguf

        gguf = _packaged_gguf()
        pretrained, arguments = gguf.parent, arguments.replace("=GGUF", f"={gguf.name}")
    arguments = arguments.replace("FILE", str(texts)).replace("ADAPTER", str(adapter))
    evaluations.lm_eval(
        *("--model", "pruned-hf", "--device", "cpu", "--batch_size", "2"),
        *("--model_args", f"pretrained={pretrained},prune_percent=40,{arguments}"),
        *("--tasks", "pruned_demo_truthfulness", "--limit", "2"),
        *("--output_path", tmp_path / "out"),
    )
    pruning = evaluations.results(tmp_path / "out")["config"]["pruning"]
    widths = {group["width_after"] for group in pruning["groups"]}
    assert widths == ({1536, 922} if case == "layers" else {922})
