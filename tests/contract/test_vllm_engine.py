"""What docs/vllm.md promises where vLLM is installed, which ``tox -e vllm`` does."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance

from lm_eval_pruned import load_pruned
from tests.contract.commands import pruned
from tests.helpers import checkpoints, sweeping
from tests.helpers.engines import (
    ENGINE,
    EXPERTS,
    HEADS,
    SCORED,
    end_engine,
    pruned_hf,
    pruned_vllm,
    scores,
    texts,
)


pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(
    ("family", "asked", "more"),
    [
        ("qwen3", {"ratio": 2, "criterion": "random", "seed": 7, "multiple_of": 8}, {}),
        ("phi3", {"prune_percent": 40, "criterion": "l2"}, {}),
        ("phi3", {"prune_percent": 40, "layers": "0,2"}, {}),
        ("mixtral", {"prune_percent": 40}, EXPERTS),
        ("llama", {}, {}),
        ("llama", {"ratio": 2.0, "skip_layers": "1"}, {}),
        ("llama", {"ratio": 2.0}, {}),
    ],
    ids=[
        *("random", "fused", "fused-layers", "experts"),
        *("baseline", "separate-layers", "separate"),
    ],
)
def test_kept_neurons_record_and_answers_are_those_of_pruned_hf(
    family, asked, more, llama, tmp_path, in_this_process
):
    folder = llama
    if family != "llama":
        folder = checkpoints.save_tiny(tmp_path, family, **HEADS, **more)
    ours, theirs = pruned_vllm(folder, **asked), pruned_hf(folder, **asked)
    info, expected = ours.get_model_info(), theirs.get_model_info()
    assert info["pruning"] == expected["pruning"]
    assert info["model_dtype"] == str(expected["model_dtype"])
    assert info["model_num_parameters"] == expected["model_num_parameters"]
    assert scores(ours) == pytest.approx(scores(theirs), abs=1e-3)
    assert texts(ours) == texts(theirs)


def test_an_adapter_that_was_trained_on_the_pruned_model_is_applied(
    llama, tmp_path, in_this_process
):
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
    assert texts(ours) == texts(theirs)
    assert texts(ours) != texts(pruned_hf(llama, ratio=2.0))
    alone = scores(pruned_hf(llama, ratio=2.0))
    for pair, a, b, c in zip(SCORED, scores(ours), scores(theirs), alone, strict=True):
        # As for real questions, where float32 is asked to agree to 0.01 per token.
        near = 1e-2 * len(ours.tok_encode(pair[1]))
        assert abs(a - b) < near < abs(a - c)
    with pytest.raises(ValueError, match=r"lora_local_path=.* was trained on MLPs of"):
        pruned_vllm(llama, ratio=1.5, lora_local_path=adapter)


def test_enable_prefix_caching_false_turns_the_cache_off_and_the_results_say_so(
    llama, in_this_process
):
    ours = pruned_vllm(llama, ratio=2.0, enable_prefix_caching=False)
    assert scores(ours) == pytest.approx(scores(pruned_hf(llama, ratio=2.0)), abs=1e-3)
    path = ours.get_model_info()["answer_paths"]["loglikelihood"]
    assert path["requests"] == {"plain": len(SCORED)}
    assert path["reasons"] == ["enable_prefix_caching is off"]


def test_energy_is_measured_for_each_request_type(llama, in_this_process):
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


def test_each_of_two_processes_keeps_its_part_of_the_kept_neurons(
    llama, tmp_path, two_processes
):
    """The engine loads in other processes, as it does for users; each holds half a layer.

    An odd width is rounded down to one that has halves.
    """
    given = {**ENGINE, "tensor_parallel_size": two_processes}
    more = ",".join(f"{name}={value}" for name, value in given.items())
    subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "run", "--model", "pruned-vllm"),
            *(
                "--model_args",
                f"pretrained={llama},intermediate_size=101,multiple_of=2,{more}",
            ),
            *("--tasks", "tiny_choice", "--include_path"),
            str(sweeping.write_tasks(tmp_path / "tasks")),
            *("--output_path", str(tmp_path / "results"), "--log_samples"),
        ],
        check=True,
    )
    (file,) = (tmp_path / "results").rglob("results_*.json")
    config = json.loads(file.read_text())["config"]
    theirs = pruned_hf(llama, intermediate_size=101, multiple_of=2)
    assert config["pruning"] == theirs.get_model_info()["pruning"]
    assert config["model_dtype"] == "torch.float32"
    (file,) = (tmp_path / "results").rglob("samples_*.jsonl")
    for line in file.read_text().splitlines():
        sample = json.loads(line)
        asked = [tuple(each.values()) for each in sample["arguments"].values()]
        requests = [Instance("loglikelihood", {}, pair, 0) for pair in asked]
        expected = [answer[0] for answer in theirs.loglikelihood(requests)]
        found = [float(answer[0]) for answer in sample["filtered_resps"]]
        assert found == pytest.approx(expected, abs=1e-3)


KILLS = """\


def kill_the_engine_once(doc):
    import multiprocessing
    import os
    import signal
    import threading

    # Not beside the tasks, whose files decide whether a unit is done.
    killed = Path(__file__).parents[1] / "killed"
    children = multiprocessing.active_children()
    engines = [child for child in children if "Engine" in child.name]
    # A task reads its first document before there is an engine.
    if engines and not killed.exists():
        killed.touch()
        (engine,) = engines
        # It takes requests and answers none, so that it dies while an answer is waited for.
        os.kill(engine.pid, signal.SIGSTOP)
        threading.Timer(3, os.kill, (engine.pid, signal.SIGKILL)).start()
    return doc["question"]
"""


def test_an_engine_that_dies_fails_one_unit_and_retry_failed_runs_it_again(
    llama, tmp_path, monkeypatch
):
    end_engine()
    # A process that is forked cannot use the threads that torch has started in this one.
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    tasks = sweeping.write_tasks(tmp_path / "tasks")
    utils, choice = tasks / "utils.py", tasks / "choice.yaml"
    utils.write_text(utils.read_text() + KILLS)
    choice.write_text(
        choice.read_text().replace(
            'doc_to_text: "{{question}}"',
            "doc_to_text: !function utils.kill_the_engine_once",
        )
    )
    sweep = tmp_path / "sweep"
    words = ["--ratios", 2, "--tasks", "tiny_choice", "--include_path", tasks]
    words += ["--floors", "no"]
    engine = [f"{name}={value}" for name, value in ENGINE.items()]
    first_words = ["sweep", "--model", "pruned-vllm", "--output_path", sweep, *words]
    first_words += ["--model_args", f"pretrained={llama}", *engine]
    assert pruned(*first_words).code == 1
    (error,) = sweep.glob("units/baseline/*/error.json")
    message = json.loads(error.read_text())["message"]
    assert message.startswith("The engine of vLLM ended while it worked on requests")
    (done,) = sweep.glob("units/*/*/results_*.json")
    assert done.parts[-3] == "ratio-2"
    first = done.read_bytes()

    assert pruned(*first_words, "--retry_failed").code == 0
    widths = {}
    for file in sweep.glob("units/*/*/results_*.json"):
        results = json.loads(file.read_text())
        assert results["config"]["model"] == "pruned-vllm"
        pruning = results["config"]["pruning"]
        widths[file.parts[-3]] = pruning["intermediate_size_after"]
    assert widths == {"baseline": 176, "ratio-2": 128}
    assert done.read_bytes() == first

    gate = ["--baseline", tmp_path / "gate.json"]
    assert pruned("check", sweep, *gate, "--update").code == 0
    assert pruned("check", sweep, *gate).code == 0
    # The scores of pruned-hf are the same to a gate.
    model = ["--model_args", f"pretrained={llama}", "dtype=float32"]
    done = pruned("sweep", "--output_path", tmp_path / "hf", *model, *words)
    assert done.code == 0, done.err
    assert pruned("check", tmp_path / "hf", *gate).code == 0


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


def test_vllm_serve_prunes_with_the_same_loader(llama, two_processes):
    prompt = "The capital"
    body = {"model": str(llama), "prompt": prompt, "max_tokens": 12, "temperature": 0}
    with server(
        llama,
        *("--load-format", "pruned"),
        *(
            "--model-loader-extra-config",
            '{"intermediate_size": 101, "multiple_of": 2}',
        ),
        *("--tensor-parallel-size", str(two_processes)),
    ) as port:
        answer = ask(port, "POST", "/v1/completions", body)
    assert answer is not None
    text = json.loads(answer)["choices"][0]["text"]
    lm = pruned_hf(llama, intermediate_size=100)
    settings = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    (expected,) = lm.generate_until(
        [Instance("generate_until", {}, (prompt, settings), 0)], disable_tqdm=True
    )
    half = "\N{REPLACEMENT CHARACTER}"
    assert text.rstrip(half) == expected.rstrip(half)
