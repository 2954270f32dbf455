"""``pruned-vllm`` on real questions, and how its process ends."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

from lm_eval_pruned.checkpoints.export import export_pruned
from tests.helpers.engines import ENGINE, end_engine, pruned_hf, pruned_vllm


if TYPE_CHECKING:
    from lm_eval.api.instance import Instance


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
