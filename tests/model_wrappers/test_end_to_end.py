"""The stock ``lm_eval`` command in a separate process."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model

from lm_eval_pruned import load_pruned
from tests.helpers import evaluations


pytestmark = pytest.mark.slow


def run(output, pretrained, model_args, tasks, *more, **options):
    """Return what the command printed, and what it wrote to `output`."""
    model_args = f"pretrained={pretrained},{model_args}"
    done = evaluations.lm_eval(
        *("--model", "pruned-hf", "--model_args", model_args, "--device", "cpu"),
        *("--tasks", tasks, "--output_path", output, *more),
        **options,
    )
    return done, evaluations.results(output)


def test_the_real_model_on_truthfulqa(real_model, shared_data, tmp_path):
    """The figures of an independent trial on all 817 questions bound what 40 can show."""
    for percent, width, full_set in ((0, 1536, 0.4476), (40, 922, 0.4943)):
        size, few = f"prune_percent={percent}", ("--limit", 40, "--batch_size", 8)
        _, results = run(
            *(tmp_path / size, real_model, size, "truthfulqa_mc2", *few),
            cwd=shared_data,
        )
        assert results["config"]["pruning"]["intermediate_size_after"] == width
        score = results["results"]["truthfulqa_mc2"]
        assert abs(score["acc,none"] - full_set) < 4 * score["acc_stderr,none"]


#: What goes beyond a size, on the real model; FILE and ADAPTER are made by the test.
REAL = {
    "layers": "skip_layers=[0,29]",
    "calibrated": "criterion=act,calibration=FILE,calibration_samples=2",
    "adapter": "peft=ADAPTER",
    "merged adapter": "peft=ADAPTER,peft_stage=before",
    "quantised": "load_in_8bit=true",
}


@pytest.mark.parametrize("case", REAL)
def test_what_goes_beyond_a_size_on_the_real_model(case, real_model, tmp_path):
    arguments = REAL[case]
    texts, adapter = tmp_path / "texts.jsonl", tmp_path / "adapter"
    texts.write_text('{"text": "Rivers carry sand."}\n{"text": "It rained all day."}\n')
    if "ADAPTER" in arguments:
        whole = "before" in arguments
        model = load_pruned(real_model, prune_percent=0 if whole else 40)
        lora = LoraConfig(r=2, target_modules=["gate_proj", "down_proj"])
        get_peft_model(model, lora).save_pretrained(adapter)
    if case == "quantised":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    arguments = arguments.replace("FILE", str(texts)).replace("ADAPTER", str(adapter))
    _, results = run(
        *(tmp_path / "out", real_model, f"prune_percent=40,{arguments}"),
        *("pruned_demo_truthfulness", "--limit", "2", "--batch_size", "2"),
    )
    pruning = results["config"]["pruning"]
    widths = {group["width_after"] for group in pruning["groups"]}
    assert widths == ({1536, 922} if case == "layers" else {922})
