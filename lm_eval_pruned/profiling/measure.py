"""``lm-eval-pruned profile``: latency, throughput, memory and energy over sizes.

Prefill and decode are told apart, and each model is measured at a *fixed* output
length and at its *natural* one. A model that stops earlier is not a faster model:
only the fixed length compares speed, and the natural one is printed with the mean
output length beside it.

All models are measured once in each repeat, in an order that rotates, so that a
machine that gets slower does so for all of them. Differences are taken within a
repeat.
"""

from __future__ import annotations

import contextlib
import functools
import re
import time
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import release_memory

from lm_eval_pruned.checkpoints.load import load_pruned
from lm_eval_pruned.energy.readings import ratio
from lm_eval_pruned.model_wrappers.batching.generation import (
    count_generated,
    end_tokens,
)
from lm_eval_pruned.profiling.options import ProfileRequest, plan_models
from lm_eval_pruned.profiling.prompts import Batch, make_batches
from lm_eval_pruned.profiling.summary import ENERGY_WINDOW_SECONDS, MODES, summarise


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedModel

    from lm_eval_pruned.energy.monitor import EnergyMonitor

#: Share of the free memory that all models together may take.
MEMORY_SHARE = 0.6


def profile(
    request: ProfileRequest,
    prompts: Sequence[str],
    *,
    monitor: EnergyMonitor,
    clock: Callable[[], float] = time.perf_counter,
    load: Callable[..., Any] = load_pruned,
    on_repeat: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Measure; see the module's docstring.

    Args:
        request, prompts: What to measure, on which texts.
        monitor: Measures the energy.
        clock: Returns seconds; for tests.
        load: Loads a model: `load_pruned`, or
            `lm_eval_pruned.profiling.engine.EngineModel`.
        on_repeat: Called with what there is so far after each repeat.

    Returns:
        What ``profile.json`` holds; see `lm_eval_pruned.profiling.summary.summarise`. After
        an interrupt from the keyboard, what was finished, with ``interrupted`` set.

    Raises:
        ValueError: A size is out of range, or a prompt is too long for the model.
        KeyboardInterrupt: Before anything was finished.
    """
    from tqdm import tqdm

    models = plan_models(request)
    interrupted = False
    if torch.device(request.device).type != "cpu":
        # Energy without that of the GPU is then no total.
        monitor.required.add("gpu")
    monitor.start()
    with contextlib.ExitStack() as ending:
        ending.callback(monitor.stop)
        profiler = Profiler(request, models, prompts, monitor, clock, load)
        ending.callback(profiler.release)
        total = request.repeats * len(models) * len(request.batch_sizes)
        bar = ending.enter_context(tqdm(total=total, desc="Profiling", unit="pass"))
        try:
            for repeat in range(request.repeats):
                shift = repeat % len(models)
                turn, sizes = models[shift:] + models[:shift], request.batch_sizes
                order = list(product(turn, sizes))
                if profiler.together:
                    # Passes that are compared follow one another.
                    order = [(model, size) for size, model in product(sizes, turn)]
                for model, size in order:
                    bar.set_postfix_str(f"{model['name']}, batch size {size}")
                    profiler.measure(repeat, model, size)
                    bar.update()
                if on_repeat is not None:
                    on_repeat(profiler.result(interrupted))
        except KeyboardInterrupt:
            if not profiler.passes:
                raise
            interrupted = True
    return profiler.result(interrupted)


class Profiler:
    """Runs one model after the other on the same batches.

    Attributes:
        together: Whether all models are in memory at once; else each is loaded in its turn.
        warm_up_batches: Batches that ran before a measurement.
        timings: One row for each batch that was measured: what `generate` returns, with
            model, batch size, mode and repeat.
        passes: One row for each pass over all batches: what it took in joules and bytes.
    """

    def __init__(
        self,
        request: ProfileRequest,
        models: list[dict[str, Any]],
        prompts: Sequence[str],
        monitor: EnergyMonitor,
        clock: Callable[[], float],
        load: Callable[..., Any],
    ) -> None:
        from transformers import AutoTokenizer

        self.warm_up_batches = 0
        self.timings: list[dict[str, Any]] = []
        self.passes: list[dict[str, Any]] = []
        self._request, self._models, self._monitor = request, models, monitor
        self._clock, self._load = clock, load
        where = request.source()
        tokenizer = AutoTokenizer.from_pretrained(request.pretrained, **where)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._pad = int(tokenizer.pad_token_id or 0)
        chat = request.apply_chat_template
        self._batches = {
            size: make_batches(tokenizer, prompts, size, request.device, chat=chat)
            for size in request.batch_sizes
        }
        first, *others = models
        baseline = self._loaded(first)
        self._held = {first["name"]: baseline}
        each = first["model_bytes"] / first["parameters"]
        more = each * sum(model["parameters"] for model in others)
        # Each engine takes the memory that is left for its cache.
        self.together = not _in_engine(baseline) and (
            more <= MEMORY_SHARE * free_bytes(baseline.device)
        )

    def measure(self, repeat: int, spec: dict[str, Any], size: int) -> None:
        """Measure one model at one batch size: a prefill, and a pass in each mode."""
        name = spec["name"]
        if name not in self._held:
            if not self.together:
                self.release()
            self._held[name] = self._loaded(spec)
        model = self._held[name]
        timings, passes, tokens = [], [], self._request.max_new_tokens
        # What an engine allocates is in other processes.
        watch: Any = contextlib.nullcontext({})
        if not _in_engine(model):
            watch = _peak_memory(model.device, spec["model_bytes"])
        with watch as peaks:
            prefill = self._prefill(model, size)
            for mode in MODES:
                key = {"batch_size": size, "mode": mode, "model": name}
                key["repeat"] = repeat
                self._monitor.begin_window(mode)
                timings += [
                    {**key, **self._generate(model, batch, mode, tokens)}
                    for batch in self._batches[size]
                ]
                reading = self._monitor.end_window(mode)
                taken = {f"both_{k}": j for k, j in reading.joules.as_dict().items()}
                passes.append({**key, **prefill, **taken, "reading": reading})
        # Of a pass that was interrupted, nothing counts.
        self.timings += timings
        self.passes += [{**row, **peaks} for row in passes]

    def result(self, interrupted: bool) -> dict[str, Any]:
        """Return what `profile` does, of what was measured so far."""
        return summarise(
            *(self._request, self._models, self._monitor, self.timings, self.passes),
            models_held="together" if self.together else "one at a time",
            warm_up_batches=self.warm_up_batches,
            interrupted=interrupted,
        )

    def release(self) -> None:
        """Let go of the models."""
        for model in self._held.values():
            if _in_engine(model):
                model.close()
        self._held.clear()
        release_memory()

    def _loaded(self, spec: dict[str, Any]) -> Any:
        """Load a model, and run it until it is warm.

        Raises:
            ValueError: A prompt and its output do not fit into it.
        """
        request, tokens = self._request, self._request.max_new_tokens
        arguments = {**request.load_arguments, **spec["asked"]}
        if spec["asked"]:
            arguments |= {"criterion": request.criterion, "seed": request.seed}
        torch.manual_seed(request.seed)
        model = self._load(
            request.pretrained, device=request.device, dtype=request.dtype, **arguments
        )
        spec["model_bytes"] = int(model.get_memory_footprint())
        longest = max(b.ids.shape[1] for many in self._batches.values() for b in many)
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and longest + tokens > limit:
            raise ValueError(
                f"max_new_tokens={tokens} after a prompt of {longest} tokens does not fit into "
                f"the model's {limit} positions: use shorter prompts or fewer tokens."
            )
        for batches in self._batches.values():
            for batch in batches[:2]:
                self._generate(model, batch, "fixed", min(8, tokens))
                self.warm_up_batches += 1
        return model

    def _generate(
        self, model: Any, batch: Batch, mode: str, tokens: int
    ) -> dict[str, Any]:
        run = functools.partial(generate, model, pad_token=self._pad)
        run = model.timed_generation if _in_engine(model) else run
        return run(batch, tokens, fixed=mode == "fixed", clock=self._clock)

    def _prefill(self, model: Any, size: int) -> dict[str, float | None]:
        """Return joules of one prefill of all batches, by component."""
        passes = 0
        self._monitor.begin_window("prefill")
        start = self._clock()
        while passes == 0 or self._clock() - start < ENERGY_WINDOW_SECONDS:
            for batch in self._batches[size]:
                self._generate(model, batch, "fixed", 1)
            passes += 1
        joules = self._monitor.end_window("prefill").joules.as_dict()
        return {f"prefill_{name}": ratio(each, passes) for name, each in joules.items()}


def _in_engine(model: Any) -> bool:
    return hasattr(model, "timed_generation")


def generate(
    model: PreTrainedModel,
    batch: Batch,
    max_new_tokens: int,
    *,
    fixed: bool,
    pad_token: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Generate greedily and take the time of the first and the last token.

    Args:
        model, batch: The model, and its prompts.
        max_new_tokens: Most output tokens.
        fixed: Whether the end of text is forbidden, so that there are exactly as many.
        pad_token: Id that fills rows which have ended.
        clock: Returns seconds.

    Returns:
        ``rows``, the number of prompts; ``prompt_tokens`` without padding; ``output_tokens``
        up to the end of text of each row; ``steps``, the output length of the longest row;
        and the seconds until the ``first`` token and in ``total``.
    """
    from transformers import GenerationConfig, StoppingCriteriaList

    device, ends = batch.ids.device, end_tokens(model)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        min_new_tokens=max_new_tokens if fixed else None,
        eos_token_id=ends or None,
        pad_token_id=pad_token,
        use_cache=True,
    )
    times: list[float] = []

    def look_at_clock() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(clock())

    def stop(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        # This criterion never stops: it is what is called after the first token.
        if len(times) == 1:
            look_at_clock()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=device)

    look_at_clock()
    with torch.inference_mode():
        output = model.generate(  # type: ignore[operator]
            input_ids=batch.ids,
            attention_mask=batch.mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([stop]),
        )
    look_at_clock()
    start, first, end = times
    tokens = output[:, batch.ids.shape[1] :]
    return {
        "rows": tokens.shape[0],
        "prompt_tokens": int(batch.mask.sum()),
        "output_tokens": tokens.numel() if fixed else count_generated(tokens, ends),
        "steps": tokens.shape[1],
        "first": first - start,
        "total": end - start,
    }


def free_bytes(device: torch.device) -> int:
    """Return how much memory of a device is free, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


@contextlib.contextmanager
def _peak_memory(device: torch.device, held: int) -> Iterator[dict[str, int]]:
    """Yield what holds the most bytes in use, once the block is left.

    ``peak_device_bytes``, on CUDA, are those of the block and of a model of `held` bytes;
    ``peak_host_bytes``, on Linux, are those of the whole process.
    """
    peaks: dict[str, int] = {}
    cleared, before = 0, 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError):
        # Starts the system's record of the peak anew (man 5 proc).
        cleared = Path("/proc/self/clear_refs").write_text("5")
    yield peaks
    if device.type == "cuda":
        above = torch.cuda.max_memory_allocated(device) - before
        peaks["peak_device_bytes"] = above + held
    status = Path("/proc/self/status").read_text() if cleared else ""
    if found := re.search(r"VmHWM:\s*(\d+) kB", status):
        peaks["peak_host_bytes"] = int(found[1]) * 1024
