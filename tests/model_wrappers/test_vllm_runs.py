"""``pruned-vllm`` as users run it: real questions, commands, processes that end."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from lm_eval.api.instance import Instance

from lm_eval_pruned.checkpoints.export import export_pruned
from lm_eval_pruned.cli import main
from lm_eval_pruned.sweeps.run import run_sweep
from tests.helpers import sweeping
from tests.helpers.engines import ENGINE, end_engine, pruned_hf, pruned_vllm


pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_to_real_questions(
    dtype, real_model, shared_data, monkeypatch, tmp_path, in_this_process
):
    """TruthfulQA by log-likelihood; IFEval and GSM8K by text.

    In float32 the answers are those of `pruned-hf`. In bfloat16 each engine rounds in its own
    way on each processor, so they are those of stock vLLM on the exported checkpoint, exactly.
    """
    from lm_eval.models.vllm_causallms import VLLM
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
    questions = work.pop("truthfulqa_mc1")

    def answers(lm) -> tuple[np.ndarray, list[str]]:
        scores = np.array([score for score, _ in lm.loglikelihood(questions)])
        return scores, [
            text for each in work.values() for text in lm.generate_until(each)
        ]

    asked, engine = {"prune_percent": 10}, {"dtype": dtype, "max_model_len": 2048}
    # Stock vLLM scores without its prefix cache.
    cached = {} if dtype == "float32" else {"enable_prefix_caching": False}
    lm = pruned_vllm(real_model, **asked, **engine, **cached)
    digest = lm.get_model_info()["pruning"]["kept_digest"]
    tokens = np.array([len(lm.tok_encode(each.args[1])) for each in questions])
    scores, texts = answers(lm)
    if dtype == "float32":
        theirs = pruned_hf(real_model, **asked, max_length=2048)
        assert theirs.get_model_info()["pruning"]["kept_digest"] == digest
        expected = answers(theirs)
        assert np.abs((scores - expected[0]) / tokens).max() < 1e-2
    else:
        end_engine()
        export_pruned(
            str(real_model), tmp_path / "x", prune_arguments=asked, dtype=dtype
        )
        stock = VLLM(str(tmp_path / "x"), **{**ENGINE, **engine})
        expected = answers(stock)
        stock.model.llm_engine.engine_core.shutdown()
        assert np.array_equal(scores, expected[0])
    assert texts == expected[1]


def test_a_profile_of_engines(llama, tmp_path, monkeypatch, in_this_process, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The capital\nOnce upon a time\n")
    more = ",".join(f"{name}={value}" for name, value in ENGINE.items())
    arguments = [
        *("profile", "--model", "pruned-vllm", "--ratios", "2.0", "--repeats", "2"),
        *("--model_args", f"pretrained={llama},{more}"),
        *("--prompts", str(prompts), "--batch_sizes", "2"),
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


def test_the_stock_command_with_an_engine_of_two_processes(
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


EXITS = """\
import atexit
import json
import sys
import threading
import time

NAME = "EngineCoreOutputQueueThread"


def names():
    return [thread.name for thread in threading.enumerate()]


if __name__ == "__main__":
    # The first that is registered is the last that runs, before the interpreter is taken down.
    atexit.register(lambda: print("at the end:", NAME in names()))

import zmq
from lm_eval.api.instance import Instance

from lm_eval_pruned.model_wrappers.pruned_vllm import PrunedVLLM

close = zmq.Socket.close


def close_late(socket, linger=None):
    if threading.current_thread().name == NAME:
        time.sleep(5)
    close(socket, linger)


if __name__ == "__main__":
    zmq.Socket.close = close_late
    lm = PrunedVLLM(sys.argv[1], prune_percent=50, **json.loads(sys.argv[2]))
    lm.loglikelihood([Instance("loglikelihood", {}, ("The capital", " of France"), 0)])
    print("at work:", NAME in names())
"""


def test_no_thread_that_holds_answers_outlives_the_interpreter(llama, tmp_path):
    """A thread that frees tensors while the interpreter is taken down aborts the process, after
    all its work: exit status 134 of a command that had succeeded. It is held up here, as a busy
    machine holds it up now and then.
    """
    end_engine()
    script = tmp_path / "exits.py"
    script.write_text(EXITS)
    said = subprocess.run(
        [sys.executable, str(script), str(llama), json.dumps(ENGINE)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    assert [line for line in said.splitlines() if line.startswith("at ")] == [
        "at work: True",
        "at the end: False",
    ]


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


def test_a_sweep_outlives_an_engine_and_check_reads_its_results(
    llama, tmp_path, monkeypatch, capsys
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
    options = {
        "model": "pruned-vllm",
        "model_args": {"pretrained": str(llama), **ENGINE},
        "ratios": ["2.0"],
        "tasks": ["tiny_choice"],
        "include_path": str(tasks),
        "output_path": str(sweep),
        "floors": False,
    }
    assert run_sweep(options) == 1
    (error,) = sweep.glob("units/baseline/*/error.json")
    message = json.loads(error.read_text())["message"]
    assert message.startswith("The engine of vLLM ended while it worked on requests")
    (done,) = sweep.glob("units/*/*/results_*.json")
    assert done.parts[-3] == "ratio-2"
    first = done.read_bytes()

    assert run_sweep(options, retry_failed=True) == 0
    widths = {}
    for file in sweep.glob("units/*/*/results_*.json"):
        results = json.loads(file.read_text())
        assert results["config"]["model"] == "pruned-vllm"
        pruning = results["config"]["pruning"]
        widths[file.parts[-3]] = pruning["intermediate_size_after"]
    assert widths == {"baseline": 176, "ratio-2": 128}
    assert done.read_bytes() == first

    gate = ["check", str(sweep), "--baseline", str(tmp_path / "gate.json")]
    assert main([*gate, "--update"]) == 0
    assert main(gate) == 0
    # The scores of pruned-hf are the same to a gate.
    options |= {"model": "pruned-hf", "output_path": str(tmp_path / "hf")}
    options["model_args"] = {"pretrained": str(llama), "dtype": "float32"}
    assert run_sweep(options) == 0
    assert main([*gate[:1], str(tmp_path / "hf"), *gate[2:]]) == 0


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


def test_a_server_prunes_and_derives_the_narrowed_config(llama, two_processes):
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
