"""Compare model types on the same work: which engine for what?

Every model type answers the requests of every task, taking turns, each in a copy of the same
weights; loading is timed apart. The table has a row for each task and request type with the
median seconds of each model type, and below it the run says how far the answers agree with those
of the last one: by how much log-likelihoods differ at most, and how many texts are the same.

    python benchmarks/engines.py --tasks truthfulqa_mc1 truthfulqa_mc2 --limit 20
    python benchmarks/engines.py --tasks ifeval --limit 64 --chat --max-gen-toks 128

With ``--models pruned-vllm pruned-hf --model_args ratio=2.0`` it compares pruned models. vLLM
has to be installed for ``vllm`` and ``pruned-vllm``; elsewhere name other model types. The stock
tasks read their data from the Hub, or from a folder laid out under the Hub names where `--data`
names one. On a card, add ``--device cuda`` and ``--dtype bfloat16``.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from reporting import machine

from lm_eval_pruned.util.tables import markdown_table


if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM

    #: Requests by task and request type.
    Work = dict[tuple[str, str], list[Instance]]


@dataclass
class Engine:
    """One model type: its seconds and answers by task and request type."""

    name: str
    lm: LM
    load_seconds: float
    seconds: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    answers: dict[tuple[str, str], list[Any]] = field(default_factory=dict)

    def answer(self, work: Work) -> None:
        """Answer everything once."""
        for key, requests in work.items():
            begin = time.perf_counter()
            self.answers[key] = getattr(self.lm, key[1])(requests)
            self.seconds.setdefault(key, []).append(time.perf_counter() - begin)


def load(name: str, arguments: argparse.Namespace) -> Engine:
    """Load one model type."""
    from lm_eval.api.registry import get_model
    from lm_eval.utils import simple_parse_args_string

    from lm_eval_pruned.checkpoints.default_model import find_default_model

    given = {
        "pretrained": arguments.pretrained or find_default_model().pretrained,
        "dtype": arguments.dtype,
        **simple_parse_args_string(arguments.model_args),
    }
    if "vllm" in name:
        given |= simple_parse_args_string(arguments.vllm_args)
    else:
        given |= {"batch_size": arguments.batch_size, "device": arguments.device}
    begin = time.perf_counter()
    lm = get_model(name)(**given)
    return Engine(name, lm, time.perf_counter() - begin)


def work_of(arguments: argparse.Namespace, lm: Any) -> Work:
    """Return the requests of the tasks, the length of generated answers set as asked."""
    from lm_eval.tasks import TaskManager

    work: Work = {}
    template = {
        "apply_chat_template": True,
        "chat_template": lm.apply_chat_template,
        "tokenizer_name": lm.tokenizer_name,
    }
    for name, task in TaskManager().load(arguments.tasks)["tasks"].items():
        if arguments.num_fewshot is not None:
            task.set_config("num_fewshot", arguments.num_fewshot)
        task.set_fewshot_seed(1234)
        task.build_all_requests(
            limit=arguments.limit, **(template if arguments.chat else {})
        )
        for request in task.instances:
            if request.request_type == "generate_until" and arguments.max_gen_toks:
                settings = {**request.args[1], "max_gen_toks": arguments.max_gen_toks}
                request.arguments = (request.args[0], settings)
            work.setdefault((name, request.request_type), []).append(request)
    return work


def agreement(ours: list[Any], theirs: list[Any]) -> str:
    """Say how far the answers of two model types agree."""
    if isinstance(ours[0], str):
        same = sum(a == b for a, b in zip(ours, theirs, strict=True))
        return f"{same} of {len(ours)} texts are the same"
    pairs = [
        (a[0], b[0]) if isinstance(a, tuple) else (a, b)
        for a, b in zip(ours, theirs, strict=True)
    ]
    return f"log-likelihoods differ by at most {max(abs(a - b) for a, b in pairs):.2g}"


def main() -> None:
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
    arguments = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    if arguments.data:
        os.environ["HF_DATASETS_OFFLINE"] = "1"
        os.chdir(arguments.data)
    torch.manual_seed(0)
    engines = [load(name, arguments) for name in arguments.models]
    work = work_of(arguments, engines[-1].lm)
    for repeat in range(arguments.repeats):
        shift = repeat % len(engines)
        for engine in engines[shift:] + engines[:shift]:
            engine.answer(work)
    print(machine(arguments.device))
    names = [engine.name for engine in engines]
    rows: list[list[str]] = [
        ["loading", "", *(f"{engine.load_seconds:.1f} s" for engine in engines)]
    ]
    rows += [
        [
            f"{task}, {kind}",
            str(len(work[task, kind])),
            *(f"{statistics.median(e.seconds[task, kind]):.1f} s" for e in engines),
        ]
        for task, kind in work
    ]
    print(markdown_table(["work", "requests", *names], rows))
    for engine in engines[:-1]:
        for key in work:
            said = agreement(engine.answers[key], engines[-1].answers[key])
            print(f"{engine.name} beside {names[-1]}, {key[0]}: {said}.")


if __name__ == "__main__":
    main()
