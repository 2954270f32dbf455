"""What the benchmarks share: turns, peaks of memory, separate processes, tables with spread."""

from __future__ import annotations

import json
import math
import platform
import statistics
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar

import psutil
import torch
from lm_eval.api.samplers import FirstNSampler
from lm_eval.tasks import TaskManager

from lm_eval_pruned.model_wrappers.batching.cpu_linear import processor
from lm_eval_pruned.util.tables import markdown_table


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

T = TypeVar("T")

#: Largest difference that rounding explains: of two log-likelihoods in nats, and of the logits of the
#: two likeliest tokens where two texts diverge, by dtype.
NATS = {torch.float32: 1e-3, torch.float16: 0.25, torch.bfloat16: 2.0}
LOGITS = {torch.float32: 1e-3, torch.float16: 0.25, torch.bfloat16: 1.0}


def in_turns(sides: Sequence[T], repeats: int) -> Iterator[T]:
    """Yield every side once for each repeat; another one begins each time."""
    for repeat in range(repeats):
        shift = repeat % len(sides)
        yield from [*sides[shift:], *sides[:shift]]


def spread(values: Sequence[float]) -> str:
    """Return minimum / median / maximum, or the only value."""
    three = (min(values), statistics.median(values), max(values))
    return " / ".join(
        f"{each:,.0f}" if abs(each) >= 1000 else f"{each:.3g}"
        for each in three[: 1 if len(values) == 1 else 3]
    )


def ratios(over: Sequence[float], under: Sequence[float]) -> str:
    """Return the spread of the ratios of values that were measured alternately."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def comparison(figures: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Return a table of all sides, and of how many times the first one's figures the others have.

    Args:
        figures: Values of each repeat, by side and column; all sides have the same columns.
    """
    first, *others = figures
    columns = list(figures[first])
    rows = [
        [name, *(spread(of[column]) for column in columns)]
        for name, of in figures.items()
    ]
    rows += [
        [
            f"{other} / {first}",
            *(ratios(figures[other][c], figures[first][c]) for c in columns),
        ]
        for other in others
    ]
    return markdown_table(["min / median / max", *columns], rows)


def root_mean_square(values: Sequence[float], reference: Sequence[float]) -> float:
    """Return the root mean square of the differences of two equally long lists."""
    return math.dist(values, reference) / math.sqrt(len(values))


def mebibytes(size: float) -> str:
    """Return a number of bytes in MiB."""
    return f"{size / 2**20:,.0f}"


def machine(device: str) -> str:
    """Return processor, device, number of threads and versions."""
    packages = ("lm-eval-pruned", "lm_eval", "transformers", "torch")
    vendor, family = processor()
    return (
        f"{vendor or platform.machine()} family {family}, {device}, "
        f"{torch.get_num_threads()} threads; "
        + ", ".join(f"{name} {version(name)}" for name in packages)
    )


def synchronise(device: torch.device) -> None:
    """Wait for what a CUDA device was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Memory:
    """Memory before, at most in, and after a block, in bytes."""

    before: int
    peak: int = 0
    after: int = 0


@contextmanager
def memory_of(device: torch.device) -> Iterator[Memory]:
    """Measure the block: CUDA's allocator, exactly, or private memory of this process, sampled."""
    if device.type == "cuda":
        found = Memory(torch.cuda.memory_allocated(device))
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found.after = torch.cuda.memory_allocated(device)
        found.peak = torch.cuda.max_memory_allocated(device)
        return
    process, done = psutil.Process(), threading.Event()
    found = Memory(_private(process))

    def watch() -> None:
        while not done.wait(0.002):
            found.peak = max(found.peak, _private(process))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        found.after = _private(process)
        found.peak = max(found.peak, found.before, found.after)


def _private(process: psutil.Process) -> int:
    # Pages of mapped files are shared.
    found = process.memory_info()
    return found.rss - getattr(found, "shared", 0)


def requests_of(
    tasks: list[Any],
    limit: int | None,
    *,
    chat: HFLM | None = None,
    num_fewshot: int | None = None,
    fixed_examples: bool = False,
    max_gen_toks: int | None = None,
) -> list[Instance]:
    """Return the requests of tasks of the harness.

    Args:
        tasks: Names and configs.
        limit: Documents per task; None: all.
        chat: The model whose chat template wraps the prompts.
        num_fewshot, max_gen_toks: In place of the tasks' own.
        fixed_examples: The same few-shot examples in each prompt.
    """
    template: dict[str, Any] = {}
    if chat is not None:
        template = {
            "apply_chat_template": True,
            "chat_template": chat.apply_chat_template,
            "tokenizer_name": chat.tokenizer_name,
        }
    requests: list[Instance] = []
    for task in TaskManager().load(tasks)["tasks"].values():
        if num_fewshot is not None:
            task.set_config("num_fewshot", num_fewshot)
        if fixed_examples:
            # The sampler that the config names was made with the task.
            task.sampler = FirstNSampler(task.sampler.df)
        task.set_fewshot_seed(1234)
        task.build_all_requests(limit=limit, **template)
        requests += task.instances
    for request in requests:
        if request.request_type == "generate_until" and max_gen_toks is not None:
            settings = {**request.args[1], "max_gen_toks": max_gen_toks}
            request.arguments = (request.args[0], settings)
    return requests


class Side:
    """One model type: its answers, times in seconds, and peak memory in bytes.

    CPU seconds are those of all threads: what other processes take does not show in them.
    """

    def __init__(self, name: str, lm: HFLM) -> None:
        self.name = name
        self.lm = lm
        self.answers: list[Any] = []
        self.clear()

    def clear(self) -> None:
        """Forget times and memory."""
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.peak = 0

    def timed(
        self, answer: Callable[..., list[Any]], requests: list[Any], **kwargs: Any
    ) -> list[Any]:
        """Have a method of `lm` answer `requests`; keep and return what it says."""
        with memory_of(self.lm.device) as memory:
            synchronise(self.lm.device)
            begin, cpu_begin = time.perf_counter(), time.process_time()
            self.answers = answer(requests, **kwargs)
            synchronise(self.lm.device)
            self.cpu_seconds.append(time.process_time() - cpu_begin)
            self.seconds.append(time.perf_counter() - begin)
        self.peak = max(self.peak, memory.peak)
        return self.answers


def profiled(device: torch.device) -> torch.profiler.profile:
    """Return a context that notes the operations of a run."""
    kinds = {torch.profiler.ProfilerActivity.CPU}
    kinds.add(getattr(torch.profiler.ProfilerActivity, device.type.upper()))
    return torch.profiler.profile(activities=kinds)


def attention_of(run: Callable[[], object]) -> str:
    """Return which backends torch's attention took in a run, and how often."""
    with profiled(torch.device("cpu")) as profile:
        run()
    prefix = "aten::_scaled_dot_product_"
    return ", ".join(
        f"{event.key.removeprefix(prefix)} {event.count}"
        for event in profile.key_averages()
        if event.key.startswith(prefix)
    )


@contextmanager
def on_the_fast_path(lm: HFLM) -> Iterator[None]:
    """Raise RuntimeError where an `lm` with fast paths took none of them in the block."""
    paths = getattr(lm, "answer_paths", None)

    def answered() -> int:
        counts = [path.requests for path in paths.values()]
        return sum(count.total() - count["plain"] for count in counts)

    before = answered() if paths is not None else 0
    yield
    if paths is not None and answered() == before:
        reasons = [r for path in paths.values() for r in path.by_reason]
        raise RuntimeError(
            f"hf-prefix answered on the plain path: {'; '.join(reasons) or 'its log says why'}."
        )


def agreement(ours: list[Any], theirs: list[Any]) -> str:
    """Say how far the answers of two model types agree; see `worst`."""
    if isinstance(ours[0], str):
        same = sum(a == b for a, b in zip(ours, theirs, strict=True))
        return f"{same} of {len(ours)} texts are the same"
    return f"log-likelihoods differ by at most {worst(ours, theirs):.2g}"


def worst(ours: list[Any], theirs: list[Any]) -> float:
    """Return the largest difference of log-likelihoods, with greedy flags or without."""
    values = (
        [each if isinstance(each, float) else each[0] for each in side]
        for side in (ours, theirs)
    )
    return max(abs(a - b) for a, b in zip(*values, strict=True))


def gap_where_they_part(lm: HFLM, prompt: str, one: str, other: str) -> float:
    """Return how far apart the two likeliest tokens are where two texts diverge, in logits."""
    first, second = (
        lm.tok_encode(each, add_special_tokens=False) for each in (one, other)
    )
    pairs = zip(first, second, strict=False)
    common = next(
        (place for place, (a, b) in enumerate(pairs) if a != b),
        min(len(first), len(second)),
    )
    context = lm.tok_batch_encode([prompt])[0][0].tolist()
    tokens = torch.tensor([context + first[:common]], device=lm.device)
    top = lm._model_call(tokens)[0, -1].float().topk(2).values
    return float(top[0] - top[1])


def in_its_own_process(script: str, *options: str) -> Any:
    """Run a script in a new process; return what its last line says, which is JSON.

    Raises:
        RuntimeError: It failed; the message has its errors.
    """
    run = subprocess.run(
        [sys.executable, script, *options], capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise RuntimeError(f"{' '.join(options)} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])
