"""``pruned-vllm`` and the vLLM loader ``pruned``, held against ``pruned-hf``."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance

from lm_eval_pruned import load_pruned
from lm_eval_pruned.checkpoints.export import export_pruned
from lm_eval_pruned.cli import main
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from lm_eval_pruned.pruning.layouts import UnsupportedModelError
from lm_eval_pruned.sweeps.run import run_sweep
from tests.helpers import checkpoints, sweeping


pytestmark = pytest.mark.vllm

#: vLLM has attention kernels for heads of 32, not for the eight of other tests.
HEADS = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "head_dim": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 4,
    # Without it an engine takes its share of the machine, whatever is free.
    "kv_cache_memory_bytes": 1 << 28,
}
SCORED = [("The capital", " of France"), ("abcabc", "abcab"), ("x", "yz")]


#: Engines that were not ended yet.
STARTED: list = []


@pytest.fixture
def in_this_process(monkeypatch):
    """Without processes of its own an engine starts in a tenth of the time; one is held."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    yield
    end_engines()


def end_engines() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    while STARTED:
        STARTED.pop().close()
    cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return checkpoints.save_tiny(tmp_path_factory.mktemp("llama"), **HEADS)


def pruned_vllm(folder, **arguments):
    from lm_eval_pruned.model_wrappers.pruned_vllm import PrunedVLLM

    end_engines()
    STARTED.append(PrunedVLLM(str(folder), **{**ENGINE, **arguments}))
    return STARTED[-1]


def pruned_hf(folder, **arguments):
    return PrunedHFLM(
        str(folder),
        **{"dtype": "float32", "device": "cpu", "batch_size": 1} | arguments,
    )


def scores(lm) -> list[float]:
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in SCORED]
    return [answer[0] for answer in lm.loglikelihood(requests, disable_tqdm=True)]


def texts(lm) -> list[str]:
    """Return what a model writes, without what the harness's two model types write otherwise.

    vLLM keeps half a character at the end to itself, and the harness has it write out
    special tokens, which it has transformers leave out.
    """
    settings = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    requests = [
        Instance("generate_until", {}, (pair[0], settings), 0) for pair in SCORED
    ]
    answers = lm.generate_until(requests, disable_tqdm=True)
    return [
        re.sub("<(bos|eos|pad)>", "", answer).rstrip("\N{REPLACEMENT CHARACTER}")
        for answer in answers
    ]


@pytest.mark.parametrize(
    ("family", "asked", "more"),
    [
        ("llama", {"ratio": 2.0}, {}),
        ("qwen3", {"ratio": 2, "criterion": "random", "seed": 7, "multiple_of": 8}, {}),
        ("phi3", {"prune_percent": 40, "criterion": "l2"}, {}),
        ("mixtral", {"prune_percent": 40}, EXPERTS),
        ("llama", {}, {}),
    ],
    ids=["separate", "random", "fused", "experts", "baseline"],
)
def test_the_same_neurons_the_same_record_the_same_answers(
    family, asked, more, tmp_path, in_this_process
):
    checkpoints.save_tiny(tmp_path, family, **HEADS, **more)
    ours, theirs = pruned_vllm(tmp_path, **asked), pruned_hf(tmp_path, **asked)
    info, expected = ours.get_model_info(), theirs.get_model_info()
    assert info["pruning"] == expected["pruning"]
    assert info["model_dtype"] == str(expected["model_dtype"])
    assert info["model_num_parameters"] == expected["model_num_parameters"]
    assert scores(ours) == pytest.approx(scores(theirs), abs=1e-3)
    assert texts(ours) == texts(theirs)


def test_activations_are_observed_before_the_engine_loads(
    llama, tmp_path, in_this_process
):
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "Some words to run on."}) + "\n")
    asked = {"ratio": 2.0, "criterion": "maw_act", "calibration": str(text)}
    ours, theirs = pruned_vllm(llama, **asked), pruned_hf(llama, **asked)
    assert ours.get_model_info()["pruning"] == theirs.get_model_info()["pruning"]


def test_a_lora_adapter_of_the_pruned_model(llama, tmp_path, in_this_process):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    adapted = get_peft_model(
        load_pruned(str(llama), ratio=2.0),
        LoraConfig(
            r=8,
            target_modules=["gate_proj", "up_proj", "down_proj", "q_proj"],
            init_lora_weights=False,
        ),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    adapter = str(tmp_path / "adapter")
    ours = pruned_vllm(llama, ratio=2.0, lora_local_path=adapter)
    theirs = pruned_hf(llama, ratio=2.0, peft=adapter)
    # By text: on a CPU vLLM has no log-probabilities of a prompt beside an adapter.
    assert texts(ours) == texts(theirs)
    assert texts(ours) != texts(pruned_hf(llama, ratio=2.0))
    with pytest.raises(ValueError, match=r"lora_local_path=.* was trained on MLPs of"):
        pruned_vllm(llama, ratio=1.5, lora_local_path=adapter)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"ratio": 9}, ValueError, r"ratio=9 is above the model's own"),
        ({"ratio": 2, "prune_percent": 4}, ValueError, r"were given together"),
        ({"ratio": 2, "criterion": "no"}, ValueError, r"criterion=no"),
        (
            {"ratio": 2, "layers": "0"},
            UnsupportedModelError,
            r"a width of its own.*prune all layers alike",
        ),
        (
            {"intermediate_size": 101, "tensor_parallel_size": 2},
            ValueError,
            r"2 processes of tensor_parallel_size: the nearest width that does is 1",
        ),
        ({"ratio": 2, "load_format": "dummy"}, ValueError, r"load_format=dummy"),
        ({"ratio": 2, "trust_remote_code": "off"}, ValueError, r"trust_remote_code"),
    ],
)
def test_errors_come_before_the_engine_starts(
    arguments, error, sentence, llama, monkeypatch
):
    from lm_eval.models.vllm_causallms import VLLM

    monkeypatch.setattr(VLLM, "__init__", lambda *_, **__: pytest.fail("it started"))
    with pytest.raises(error, match=sentence):
        pruned_vllm(llama, **arguments)


def test_a_width_that_is_typed_beside_the_derived_one_is_refused(
    llama, in_this_process
):
    with pytest.raises(ValueError, match=r"intermediate_size=100.*hf_overrides"):
        pruned_vllm(llama, ratio=2.0, hf_overrides={"intermediate_size": 100})


def test_an_exported_checkpoint_is_the_same_model(llama, tmp_path, in_this_process):
    export_pruned(str(llama), tmp_path / "x", prune_arguments={"ratio": 2.0})
    exported = scores(pruned_vllm(tmp_path / "x"))
    assert exported == scores(pruned_vllm(llama, ratio=2.0))


@pytest.mark.parametrize(
    # In bfloat16 logits from 16 to 32 are an eighth apart; summing otherwise moves one by a step.
    ("dtype", "tolerance"),
    [("float32", 1e-2), ("bfloat16", 0.125)],
)
def test_answers_to_real_questions(
    dtype, tolerance, real_model, shared_data, monkeypatch, in_this_process
):
    """TruthfulQA by log-likelihood per token; IFEval and GSM8K by text, where rounding decides
    near-ties: in 16 bits texts part after a while, so only the digest is held equal there.
    """
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(shared_data)
    monkeypatch.setenv("NLTK_DATA", str(shared_data.parent / "nltk_data"))
    work: dict[str, list[Instance]] = {}
    loaded = TaskManager().load(["truthfulqa_mc1", "ifeval", "gsm8k"])["tasks"]
    for name, task in loaded.items():
        task.set_fewshot_seed(1234)
        task.build_all_requests(limit=3)
        for request in task.instances:
            if request.request_type == "generate_until":
                settings = {**request.args[1], "max_gen_toks": 24}
                request.arguments = (request.args[0], settings)
        work[name] = task.instances
    asked = {"prune_percent": 10, "dtype": dtype}
    ours = pruned_vllm(real_model, **asked, max_model_len=2048)
    theirs = pruned_hf(real_model, **asked, max_length=2048)
    digest = [lm.get_model_info()["pruning"]["kept_digest"] for lm in (ours, theirs)]
    assert digest[0] == digest[1]
    for request, a, b in zip(
        work["truthfulqa_mc1"],
        ours.loglikelihood(work["truthfulqa_mc1"]),
        theirs.loglikelihood(work["truthfulqa_mc1"]),
        strict=True,
    ):
        tokens = len(ours.tok_encode(request.args[1]))
        assert abs(a[0] - b[0]) / tokens < tolerance
    for name in ("ifeval", "gsm8k"):
        texts = [lm.generate_until(work[name]) for lm in (ours, theirs)]
        same = sum(a == b for a, b in zip(*texts, strict=True))
        print(f"{name}, {dtype}: {same} of {len(work[name])} texts are the same")
        assert dtype != "float32" or same == len(work[name])


def test_the_stock_command_with_an_engine_of_its_own(llama, tmp_path):
    """The engine loads in another process, as it does for users."""
    more = ",".join(f"{name}={value}" for name, value in ENGINE.items())
    subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "run", "--model", "pruned-vllm"),
            *("--model_args", f"pretrained={llama},ratio=2.0,{more}"),
            *("--tasks", "tiny_choice", "--include_path"),
            str(sweeping.write_tasks(tmp_path / "tasks")),
            *("--output_path", str(tmp_path / "results")),
        ],
        check=True,
    )
    (file,) = (tmp_path / "results").rglob("results_*.json")
    config = json.loads(file.read_text())["config"]
    expected = load_pruned(str(llama), ratio=2.0).prune_record.as_dict()
    assert config["pruning"] == expected
    assert config["model_dtype"] == "torch.float32"


def test_a_sweep_starts_an_engine_for_each_size(llama, tmp_path, in_this_process):
    tasks = sweeping.write_tasks(tmp_path / "tasks")
    options = {
        "model": "pruned-vllm",
        "model_args": {"pretrained": str(llama), **ENGINE},
        "ratios": ["2.0"],
        "tasks": ["tiny_choice"],
        "include_path": str(tasks),
        "output_path": str(tmp_path / "sweep"),
    }
    assert run_sweep(options) == 0
    widths = {}
    for file in (tmp_path / "sweep").glob("units/*/*/results_*.json"):
        results = json.loads(file.read_text())
        assert results["config"]["model"] == "pruned-vllm"
        pruning = results["config"]["pruning"]
        widths[file.parts[-3]] = pruning["intermediate_size_after"]
    assert widths == {"baseline": 176, "ratio-2": 128}


def test_energy_and_tokens_of_each_request_type(llama, in_this_process):
    lm = pruned_vllm(llama, ratio=2.0, energy=True)
    scores(lm)
    texts(lm)
    block = lm.get_model_info()["energy"]
    scored = block["request_types"]["loglikelihood"]
    tokens = sum(len(lm.tok_encode(a + b)) for a, b in SCORED)
    assert scored["requests"] == len(SCORED)
    assert scored["prompt_tokens"] == scored["processed_tokens"] == tokens
    generated = block["request_types"]["generate_until"]
    assert 0 < generated["generated_tokens"] <= 12 * len(SCORED)
    assert set(block["set_up"]) == {"warm_up"}
    with pytest.raises(ValueError, match=r"energy_country=FRA measures nothing"):
        pruned_vllm(llama, energy_country="FRA")


def test_a_profile_of_engines(llama, tmp_path, monkeypatch, in_this_process, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The capital\nOnce upon a time\n")
    more = ",".join(f"{name}={value}" for name, value in ENGINE.items())
    arguments = [
        *("profile", "--model", "pruned-vllm", "--ratios", "2.0", "--repeats", "2"),
        *("--model_args", f"pretrained={llama},{more.replace('dtype=float32,', '')}"),
        *("--dtype", "float32", "--prompts", str(prompts), "--batch_sizes", "2"),
        *("--max_new_tokens", "4", "--output_path", str(tmp_path / "profile")),
    ]
    assert main(arguments) == 0
    profile = json.loads((tmp_path / "profile" / "profile.json").read_text())
    assert [model["intermediate_size"] for model in profile["models"]] == [176, 128]
    assert all(model["model_bytes"] > 0 for model in profile["models"])
    assert profile["models_held"] == "one at a time"
    for cell in profile["cells"]:
        assert cell["peak_host_bytes"] is cell["peak_device_bytes"] is None
        first = cell["seconds_to_first_token"]["mean"]
        assert 0 < first < cell["seconds_end_to_end"]["mean"]
        if cell["mode"] == "fixed":
            assert cell["mean_output_tokens"] == 4


@contextlib.contextmanager
def server(folder: Path, *options: str):
    """`vllm serve` on the loopback address; yields its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [
            *(str(Path(sys.executable).with_name("vllm")), "serve", str(folder)),
            *("--host", "127.0.0.1", "--port", str(port), "--enforce-eager"),
            *("--dtype", "float32", "--max-model-len", "256"),
            *("--kv-cache-memory-bytes", "268435456", *options),
        ]
    )
    try:
        while ask(port, "GET", "/health") is None:
            assert process.poll() is None, "the server ended"
            time.sleep(1)
        yield port
    finally:
        process.terminate()
        process.wait()


def ask(port: int, method: str, path: str, body: dict | None = None) -> str | None:
    """Return what the server answers, None if it does not listen yet or fails."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    try:
        connection.request(
            method, path, json.dumps(body), {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        text = answer.read().decode()
        return text if answer.status == 200 else None
    except OSError:
        return None
    finally:
        connection.close()


def test_a_server_prunes_and_derives_the_narrowed_config(llama):
    prompt = "The capital"
    body = {"model": str(llama), "prompt": prompt, "max_tokens": 12, "temperature": 0}
    with server(
        llama,
        *("--load-format", "pruned"),
        *("--model-loader-extra-config", '{"ratio": 2.0}'),
    ) as port:
        answer = ask(port, "POST", "/v1/completions", body)
    assert answer is not None
    text = json.loads(answer)["choices"][0]["text"]
    lm = pruned_hf(llama, ratio=2.0)
    settings = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    (expected,) = lm.generate_until(
        [Instance("generate_until", {}, (prompt, settings), 0)], disable_tqdm=True
    )
    half = "\N{REPLACEMENT CHARACTER}"
    assert text.rstrip(half) == expected.rstrip(half)
