"""Compare model types on the same work: which engine for what?

Every model type answers the requests of every task, taking turns, each in a copy of the same
weights; loading is timed separately. The table has a row for each request type, whose requests the
harness hands over together whatever tasks they are of, with the seconds of each model type: the
median between the least and the most of the repeats. Below it the run says how far the answers agree
with those of the last one: by how much log-likelihoods differ at most, and how many texts are the
same.

    python benchmarks/engines.py --tasks truthfulqa_mc1 truthfulqa_mc2 --limit 4
    python benchmarks/engines.py --tasks ifeval --limit 64 --chat --max-gen-toks 128

With ``--models pruned-vllm pruned-hf --model_args ratio=2.0`` it compares pruned models. Each runs
in a separate process, in the environment of the interpreter that runs the script, or, as vLLM
asks for older releases of transformers, in another: ``--interpreters vllm=FOLDER/bin/python``. The
stock tasks read their data from the Hub, or from a folder laid out under the Hub names where
`--data` names one. On a card, add ``--device cuda --dtype bfloat16``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from reporting import (
    agreement,
    in_turns,
    machine,
    requests_of,
    spread,
    synchronise,
)

from lm_eval_pruned.checkpoints.default_model import find_default_model
from lm_eval_pruned.util.tables import markdown_table


if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM

    #: Requests by request type.
    Work = dict[str, list[Instance]]


class Engine:
    """One model type in a separate process: its seconds and answers by request type.

    The process is this script with ``--serve NAME``. It loads the model, says how long that took,
    and answers everything once for each line it reads.
    """

    def __init__(self, name: str, python: str, options: list[str]) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [python, str(Path(__file__).resolve()), *options, "--serve", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        loaded = self.read()
        self.machine: str = loaded["machine"]
        self.load_seconds: float = loaded["seconds"]
        self.seconds: dict[str, list[float]] = {}
        self.answers: dict[str, list[Any]] = {}

    def read(self) -> dict[str, Any]:
        """Return what the process says next."""
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended; its own messages above say why.")
        return json.loads(line)

    def answer(self) -> None:
        """Answer everything once."""
        self.process.stdin.write("answer\n")
        self.process.stdin.flush()
        for key, (seconds, answers) in self.read().items():
            self.seconds.setdefault(key, []).append(seconds)
            self.answers[key] = answers

    def close(self) -> None:
        """End the process, which ends with its input."""
        self.process.stdin.close()
        self.process.wait()


def serve(name: str, arguments: argparse.Namespace) -> None:
    """Load one model type, and answer everything for each line of the standard input."""
    if arguments.data:
        os.environ["HF_DATASETS_OFFLINE"] = "1"
        os.chdir(arguments.data)
    torch.manual_seed(0)
    # What libraries print is not for the one who reads the answers.
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        begin = time.perf_counter()
        lm = load(name, arguments)
        seconds = time.perf_counter() - begin
        work = work_of(arguments, lm)
        said = f"{machine(arguments.device)}, {arguments.dtype}"
        print(json.dumps({"seconds": seconds, "machine": said}), file=out, flush=True)
        for _ in sys.stdin:
            told = {}
            # An engine remembers prompts; the second round would be another work than the first.
            forget = getattr(getattr(lm, "model", None), "reset_prefix_cache", None)
            if forget is not None:
                forget()
            for kind, requests in work.items():
                begin = time.perf_counter()
                answers = getattr(lm, kind)(requests)
                synchronise(torch.device(getattr(lm, "device", None) or "cpu"))
                label = f"{' + '.join(dict.fromkeys(r.task_name for r in requests))}, {kind}"
                told[label] = time.perf_counter() - begin, answers
            print(json.dumps(told), file=out, flush=True)


def load(name: str, arguments: argparse.Namespace) -> LM:
    """Load one model type."""
    from lm_eval.api.registry import get_model
    from lm_eval.utils import simple_parse_args_string

    given = {
        "pretrained": arguments.pretrained or find_default_model(),
        "dtype": arguments.dtype,
        **simple_parse_args_string(arguments.model_args),
    }
    if "vllm" in name:
        given |= simple_parse_args_string(arguments.vllm_args)
    else:
        given |= {"batch_size": arguments.batch_size, "device": arguments.device}
    return get_model(name)(**given)


def work_of(arguments: argparse.Namespace, lm: Any) -> Work:
    """Return the requests by type, as the harness hands them over."""
    work: Work = {}
    for request in requests_of(
        arguments.tasks,
        arguments.limit,
        chat=lm if arguments.chat else None,
        num_fewshot=arguments.num_fewshot,
        max_gen_toks=arguments.max_gen_toks,
    ):
        work.setdefault(request.request_type, []).append(request)
    return work


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--models", nargs="+", default=["vllm", "hf-prefix", "hf"])
    parser.add_argument("--pretrained", help="default: SmolLM2-135M-Instruct")
    parser.add_argument(
        "--model_args", default="", help="arguments of every model type"
    )
    parser.add_argument("--vllm_args", default="", help="arguments of vLLM's alone")
    parser.add_argument("--limit", type=int, help="documents per task; default: all")
    parser.add_argument("--num-fewshot", type=int)
    parser.add_argument("--chat", action="store_true", help="apply the chat template")
    parser.add_argument("--max-gen-toks", type=int)
    parser.add_argument("--batch_size", default="16", help="of the others than vLLM")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", help="folder laid out under the Hub names")
    parser.add_argument(
        "--interpreters",
        nargs="*",
        default=[],
        metavar="MODEL=PYTHON",
        help="Python of another environment for a model type",
    )
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(options)
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    if arguments.serve:
        return serve(arguments.serve, arguments)
    others = dict(each.split("=", 1) for each in arguments.interpreters)
    engines = [
        Engine(name, others.get(name, sys.executable), options)
        for name in arguments.models
    ]
    for engine in in_turns(engines, arguments.repeats):
        engine.answer()
    for engine in engines:
        engine.close()
    for said in dict.fromkeys(engine.machine for engine in engines):
        print(said, end="\n\n")
    last = engines[-1]
    rows = [["loading", "", *(spread([engine.load_seconds]) for engine in engines)]]
    rows += [
        [work, str(len(answers)), *(spread(each.seconds[work]) for each in engines)]
        for work, answers in last.answers.items()
    ]
    header = ["work", "requests", *(f"{engine.name}, s" for engine in engines)]
    print(markdown_table(header, rows), end="\n\n")
    for engine in engines[:-1]:
        for work, answers in last.answers.items():
            said = agreement(engine.answers[work], answers)
            print(f"{engine.name} beside {last.name}, {work}: {said}.")
    return None


if __name__ == "__main__":
    main()
