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
import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import release_memory

from lm_eval_pruned.model_wrappers.batching.generation import (
    count_generated,
    end_tokens,
)
from lm_eval_pruned.profiling.memory import MEMORY_SHARE, free_bytes, peak_memory
from lm_eval_pruned.profiling.model import (
    ENERGY_WINDOW_SECONDS,
    MODES,
    Job,
    Profile,
    ProfiledModel,
    ProfileRequest,
    Timing,
)
from lm_eval_pruned.profiling.prompts import Batch, make_batches
from lm_eval_pruned.profiling.summary import summarise
from lm_eval_pruned.pruning.argument_values import written_source


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lm_eval_pruned.energy.monitor import EnergyMonitor
    from lm_eval_pruned.energy.readings import EnergyReading


logger = logging.getLogger("lm_eval.pruned.profiling")


def plan_models(request: ProfileRequest) -> list[ProfiledModel]:
    """Resolve the sizes to widths, without reading weights; the baseline comes first.

    Sizes that come to the widths of one before them are left out, with a line in the log.

    Raises:
        ValueError: A size or multiple is out of range.
        UnsupportedModelError: The model cannot be pruned.
        OSError: The config cannot be read.
    """
    models = [_plan(request, "baseline", {"prune_percent": 0})]
    models[0] = replace(models[0], asked={})
    for name, asked in _sizes(request):
        model = _plan(request, name, asked)
        for other in models:
            widths = (model.intermediate_size, model.layer_widths)
            if widths == (other.intermediate_size, other.layer_widths):
                logger.info(
                    "%s has the width of %s, %s: it is measured once.",
                    name,
                    other.name,
                    model.layer_widths or model.intermediate_size,
                )
                break
        else:
            models.append(model)
    return models


def _sizes(request: ProfileRequest) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return name and arguments of each model but the baseline."""
    files = [written_source(file) for file in request.widths]
    named: list[tuple[str, str, Any]] = [("ratio", str(r), r) for r in request.ratios]
    named += [("prune_percent", str(p), p) for p in request.prune_percents]
    for name, file in zip(files, request.widths, strict=True):
        # Files in different folders may have one name.
        named.append(("widths", name if files.count(name) == 1 else str(file), file))
    for argument, written, value in named:
        for multiple in request.multiple_of:
            rounded = f" multiple_of={multiple}" if multiple != 1 else ""
            asked = {argument: value, "multiple_of": multiple}
            yield f"{argument}={written}{rounded}", asked


def _plan(request: ProfileRequest, name: str, asked: dict[str, Any]) -> ProfiledModel:
    from lm_eval_pruned.checkpoints.planning import plan_rows

    (argument, value), *others = asked.items()
    given = {**dict(others), **_source(request)}
    (row,) = plan_rows(request.pretrained, argument, [value], **given)
    return ProfiledModel(
        name,
        asked,
        row.intermediate_size,
        row.expansion_ratio,
        row.parameters,
        # A file may give all layers one width.
        layer_widths=row.layer_widths if "," in row.layer_widths else "",
    )


def profile(
    request: ProfileRequest,
    prompts: Sequence[str],
    *,
    monitor: EnergyMonitor,
    clock: Callable[[], float] = time.perf_counter,
    load: Callable[..., Any] | None = None,
    on_repeat: Callable[[Profile], None] | None = None,
) -> Profile:
    """Measure; see the module's docstring.

    Args:
        request: What to measure.
        prompts: Texts.
        monitor: Measures the energy.
        clock: Returns seconds; for tests.
        load: Loads a model. Default: `lm_eval_pruned.load_pruned`.
        on_repeat: Called with what there is so far after each repeat.

    Returns:
        The profile. After an interrupt from the keyboard, what was finished, with
        ``interrupted`` set.

    Raises:
        ValueError: An argument is out of range, or a prompt is too long for the model.
        KeyboardInterrupt: Before anything was finished.
    """
    from tqdm import tqdm

    from lm_eval_pruned.checkpoints.load import load_pruned

    request.check()
    models = plan_models(request)
    tokenizer = _tokenizer(request)
    batches = {
        size: make_batches(
            tokenizer,
            prompts,
            size,
            request.device,
            chat=request.apply_chat_template,
        )
        for size in request.batch_sizes
    }
    shelf = _Shelf(request, models, load or load_pruned)
    shelf.check_length(max(b.ids.shape[1] for many in batches.values() for b in many))
    bench = _Bench(request, tokenizer, monitor, clock, shelf, batches)
    jobs: list[Job] = []
    interrupted = False

    def result() -> Profile:
        return summarise(request, shelf, bench, jobs, interrupted, monitor)

    if torch.device(request.device).type != "cpu":
        # Energy without that of the GPU is then no total.
        monitor.required.add("gpu")
    monitor.start()
    order = bench.order(models)
    bar = tqdm(total=request.repeats * len(order), desc="Profiling", unit="pass")
    try:
        for repeat in range(request.repeats):
            shift = repeat % len(models)
            for model, size in bench.order(models[shift:] + models[:shift]):
                bar.set_postfix_str(f"{model.name}, batch size {size}")
                jobs.append(bench.run(repeat, model, size))
                bar.update()
            if on_repeat is not None:
                on_repeat(result())
    except KeyboardInterrupt:
        if not jobs:
            raise
        interrupted = True
    finally:
        bar.close()
        monitor.stop()
        shelf.clear()
    return result()


def generate(
    model: PreTrainedModel,
    batch: Batch,
    max_new_tokens: int,
    *,
    fixed: bool,
    pad_token: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Generate greedily and take the time of the first and the last token.

    Args:
        model: The model.
        batch: Prompts.
        max_new_tokens: Most output tokens.
        fixed: Whether the end of text is forbidden, so that there are exactly as many.
        pad_token: Id that fills rows which have ended.
        clock: Returns seconds.
    """
    from transformers import GenerationConfig, StoppingCriteriaList

    ends = end_tokens(model)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        min_new_tokens=max_new_tokens if fixed else None,
        eos_token_id=ends or None,
        pad_token_id=pad_token,
        use_cache=True,
    )
    first = _FirstToken(clock, batch.ids.device)
    _synchronise(batch.ids.device)
    start = clock()
    with torch.inference_mode():
        output = model.generate(  # type: ignore[operator]
            input_ids=batch.ids,
            attention_mask=batch.mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([first]),
        )
    _synchronise(batch.ids.device)
    end = clock()
    tokens = output[:, batch.ids.shape[1] :]
    assert first.time is not None
    return Timing(
        rows=tokens.shape[0],
        prompt_tokens=batch.tokens,
        output_tokens=tokens.numel() if fixed else count_generated(tokens, ends),
        steps=tokens.shape[1],
        first=first.time - start,
        total=end - start,
    )


class _FirstToken:
    """A stopping criterion that never stops: it looks at the clock after the first token."""

    def __init__(self, clock: Callable[[], float], device: torch.device) -> None:
        self.time: float | None = None
        self._clock = clock
        self._device = device

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if self.time is None:
            _synchronise(self._device)
            self.time = self._clock()
        return torch.zeros(
            input_ids.shape[0], dtype=torch.bool, device=input_ids.device
        )


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _source(request: ProfileRequest) -> dict[str, Any]:
    from lm_eval_pruned.checkpoints.planning import SOURCE_ARGUMENTS

    return {
        name: request.load_arguments[name]
        for name in SOURCE_ARGUMENTS
        if name in request.load_arguments
    }


def _tokenizer(request: ProfileRequest) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(request.pretrained, **_source(request))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if request.apply_chat_template and not tokenizer.chat_template:
        raise ValueError(
            f"apply_chat_template: the tokenizer of {request.pretrained} has no chat template; "
            "leave it out."
        )
    return tokenizer


def _is_engine(model: Any) -> bool:
    return hasattr(model, "timed_generation")


class _Shelf:
    """The models: all in memory, or the one that is needed."""

    def __init__(
        self,
        request: ProfileRequest,
        models: list[ProfiledModel],
        load: Callable[..., Any],
    ) -> None:
        self.models = {model.name: model for model in models}
        self._request = request
        self._load = load
        self._held: dict[str, Any] = {}
        self.together = True
        self.loads = dict.fromkeys(self.models, 0)
        first = self.get("baseline")
        size = self.models["baseline"].model_bytes or 0
        per_parameter = size / self.models["baseline"].parameters
        more = per_parameter * sum(m.parameters for m in models[1:])
        # Each engine takes the memory that is left for its cache.
        self.together = not _is_engine(first) and (
            more <= MEMORY_SHARE * free_bytes(first.device)
        )

    def get(self, name: str) -> Any:
        """Return a model, loading it if it is not held."""
        if name not in self._held:
            if self._held and not self.together:
                self.clear()
                release_memory()
            self._held[name] = self._loaded(name)
        return self._held[name]

    def clear(self) -> None:
        """Let go of the models."""
        for model in self._held.values():
            if _is_engine(model):
                model.close()
        self._held.clear()

    def check_length(self, prompt_length: int) -> None:
        """Raise ValueError if a prompt and its output do not fit into the model."""
        limit = getattr(self.get("baseline").config, "max_position_embeddings", None)
        needed = prompt_length + self._request.max_new_tokens
        if limit is not None and needed > limit:
            raise ValueError(
                f"max_new_tokens={self._request.max_new_tokens} after a prompt of "
                f"{prompt_length} tokens does not fit into the model's {limit} positions: use "
                "shorter prompts or fewer tokens."
            )

    def _loaded(self, name: str) -> Any:
        request = self._request
        spec = self.models[name]
        arguments = {**request.load_arguments, **spec.asked}
        if spec.asked:
            arguments |= {"criterion": request.criterion, "seed": request.seed}
        torch.manual_seed(request.seed)
        self.loads[name] += 1
        model = self._load(
            request.pretrained, device=request.device, dtype=request.dtype, **arguments
        )
        if spec.model_bytes is None:
            self.models[name] = replace(
                spec, model_bytes=int(model.get_memory_footprint())
            )
        return model.eval()


class _Bench:
    """Runs one model after the other on the same batches."""

    def __init__(
        self,
        request: ProfileRequest,
        tokenizer: PreTrainedTokenizerBase,
        monitor: EnergyMonitor,
        clock: Callable[[], float],
        shelf: _Shelf,
        batches: dict[int, list[Batch]],
    ) -> None:
        self.warm_up_batches = 0
        self._request = request
        self._pad = int(tokenizer.pad_token_id or 0)
        self._monitor = monitor
        self._clock = clock
        self._shelf = shelf
        self._batches = batches
        self._warmed: set[tuple[str, int, int]] = set()

    def order(self, models: list[ProfiledModel]) -> list[tuple[ProfiledModel, int]]:
        """Return the jobs of one repeat: neighbours differ in the model if they can."""
        sizes = self._request.batch_sizes
        if self._shelf.together:
            return [(model, size) for size in sizes for model in models]
        return [(model, size) for model in models for size in sizes]

    def run(self, repeat: int, spec: ProfiledModel, size: int) -> Job:
        """Measure one model at one batch size."""
        model = self._shelf.get(spec.name)
        self._warm_up(spec.name, model, size)
        job = Job(repeat, spec.name, size)
        # What an engine allocates is in other processes.
        hidden = _is_engine(model)
        with contextlib.nullcontext() if hidden else peak_memory(job, model.device):
            job.prefill, job.prefill_passes = self._prefill(model, size)
            for mode in MODES:
                self._monitor.begin_window(mode)
                timings = [
                    self._generate(model, batch, self._request.max_new_tokens, mode)
                    for batch in self._batches[size]
                ]
                job.passes[mode] = timings, self._monitor.end_window(mode)
        if job.peak_device_bytes is not None:
            job.peak_device_bytes += self._shelf.models[spec.name].model_bytes or 0
        return job

    def _generate(
        self, model: PreTrainedModel, batch: Batch, tokens: int, mode: str
    ) -> Timing:
        if _is_engine(model):
            return model.timed_generation(  # type: ignore[operator]
                batch, tokens, fixed=mode == "fixed", clock=self._clock
            )
        return generate(
            model,
            batch,
            tokens,
            fixed=mode == "fixed",
            pad_token=self._pad,
            clock=self._clock,
        )

    def _warm_up(self, name: str, model: PreTrainedModel, size: int) -> None:
        # A model that was loaded again is cold again.
        key = (name, self._shelf.loads[name], size)
        if key in self._warmed:
            return
        self._warmed.add(key)
        for batch in self._batches[size][:2]:
            self._generate(model, batch, min(8, self._request.max_new_tokens), "fixed")
            self.warm_up_batches += 1

    def _prefill(self, model: PreTrainedModel, size: int) -> tuple[EnergyReading, int]:
        passes = 0
        self._monitor.begin_window("prefill")
        start = self._clock()
        while passes == 0 or self._clock() - start < ENERGY_WINDOW_SECONDS:
            for batch in self._batches[size]:
                self._generate(model, batch, 1, "fixed")
            passes += 1
        return self._monitor.end_window("prefill"), passes
