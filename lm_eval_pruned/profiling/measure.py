"""Measure models side by side: prefill and decode, at a fixed and at the natural output length.

Each repeat measures all models once, in an order that rotates, so that a machine that gets slower
does so for all of them. Only the fixed length compares speed: who stops earlier is not faster.
"""

from __future__ import annotations

import platform
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import release_memory

from lm_eval_pruned.checkpoints.load import load_pruned
from lm_eval_pruned.energy.readings import ratio
from lm_eval_pruned.model_wrappers.batching.generation import (
    count_generated,
    end_tokens,
)
from lm_eval_pruned.profiling.memory import free_bytes, peak_memory
from lm_eval_pruned.profiling.options import ProfileRequest, plan_models
from lm_eval_pruned.profiling.prompts import make_batches
from lm_eval_pruned.profiling.summary import MODES, cells_of


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import BatchEncoding, PreTrainedModel

    from lm_eval_pruned.energy.monitor import EnergyMonitor

#: Version of the JSON; raised when a key changes its meaning.
SCHEMA_VERSION = 1
#: Share of the free memory that all models together may take.
MEMORY_SHARE = 0.6
#: A prefill pass is repeated until its energy window is this long, in seconds.
ENERGY_WINDOW_SECONDS = 1.0


def profile(
    request: ProfileRequest,
    prompts: Sequence[str],
    *,
    monitor: EnergyMonitor,
    clock: Callable[[], float] = time.perf_counter,
    load: Callable[..., Any] = load_pruned,
    on_repeat: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Measure the models of `request` on `prompts`.

    Args:
        request, prompts, monitor: What to measure, on which texts, and the energy with what.
        clock: Returns seconds; for tests.
        load: `load_pruned`, or `lm_eval_pruned.profiling.engine.EngineModel`.
        on_repeat: Called with what there is so far after each repeat.

    Returns:
        What ``profile.json`` holds (JSON types only): the request, the environment, how it was
        measured, ``energy`` (meter, scope, source of each component, and what went wrong),
        ``models`` (see `plan_models`) and ``cells`` (see `cells_of`). After an interrupt from the
        keyboard, what was finished, with ``interrupted`` set.

    Raises:
        ValueError: A size is out of range, or a prompt is too long for the model.
        KeyboardInterrupt: Before anything was finished.
    """
    from tqdm import tqdm

    if torch.device(request.device).type != "cpu":
        # Energy without that of the GPU is then no total.
        monitor.required.add("gpu")
    profiler = _Profiler(request, plan_models(request), monitor, clock, load)
    profiler.read(prompts)
    passes = request.repeats * len(profiler.models) * len(request.batch_sizes)
    try:
        monitor.start()
        profiler.load_baseline()
        with tqdm(total=passes, desc="Profiling", unit="pass") as bar:
            for repeat in range(request.repeats):
                for spec, size in profiler.order(repeat):
                    profiler.measure(repeat, spec, size)
                    bar.update()
                if on_repeat is not None:
                    on_repeat(profiler.result())
    except KeyboardInterrupt:
        if not profiler.rows:
            raise
        profiler.interrupted = True
    finally:
        profiler.release()
        monitor.stop()
    return profiler.result()


@dataclass
class _Profiler:
    """Runs one model after the other on the same batches, and keeps a row for each batch."""

    request: ProfileRequest
    models: list[dict[str, Any]]
    monitor: EnergyMonitor
    clock: Callable[[], float]
    load: Callable[..., Any]
    batches: dict[int, list[BatchEncoding]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    held: dict[str, Any] = field(default_factory=dict)
    together: bool = False
    warm_up_batches: int = 0
    interrupted: bool = False

    def read(self, prompts: Sequence[str]) -> None:
        """Tokenise the prompts for each batch size."""
        from transformers import AutoTokenizer

        request = self.request
        source = request.source()
        tokenizer = AutoTokenizer.from_pretrained(request.pretrained, **source)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.pad_token = int(tokenizer.pad_token_id or 0)
        for size in request.batch_sizes:
            self.batches[size] = make_batches(
                *(tokenizer, prompts, size, request.device),
                chat=request.apply_chat_template,
            )

    def load_baseline(self) -> None:
        """Load the baseline, and decide whether the others fit into memory beside it."""
        first, *others = self.models
        device = self.loaded(first).device
        each = first["model_bytes"] / first["parameters"]
        more = each * sum(model["parameters"] for model in others)
        # Each engine takes the memory that is left for its cache.
        if device is not None:
            self.together = more <= MEMORY_SHARE * free_bytes(device)

    def order(self, repeat: int) -> list[tuple[dict[str, Any], int]]:
        """Return the models and batch sizes of a repeat, one after the other."""
        shift = repeat % len(self.models)
        turn = self.models[shift:] + self.models[:shift]
        if not self.together:
            return list(product(turn, self.batches))
        # Passes that are compared follow one another.
        return [(model, size) for size, model in product(self.batches, turn)]

    def measure(self, repeat: int, spec: dict[str, Any], size: int) -> None:
        """Measure one model at one batch size: a prefill, and a pass in each mode."""
        model, rows = self.loaded(spec), []
        with peak_memory(model.device, spec["model_bytes"]) as peaks:
            least = ENERGY_WINDOW_SECONDS
            _, prefill = self.window(model, size, 1, fixed=True, least=least)
            for mode in MODES:
                tokens, fixed = self.request.max_new_tokens, mode == "fixed"
                timed, both = self.window(model, size, tokens, fixed=fixed)
                key = {"batch_size": size, "mode": mode, "model": spec["name"]}
                key["repeat"] = repeat
                key |= {f"prefill_{part}": joules for part, joules in prefill.items()}
                key |= {f"both_{part}": joules for part, joules in both.items()}
                rows += [{**key, **each} for each in timed]
                if (ratio(both["total"], prefill["total"]) or 1) < 1:
                    self.notes.append(
                        f"{spec['name']}, batch size {size}, {mode}: generation took less energy "
                        "than its prefill alone in some repeat, so the decode energy is noise"
                    )
        # Of a pass that was interrupted, nothing counts.
        self.rows += [{**row, **peaks} for row in rows]

    def window(
        self, model: Any, size: int, tokens: int, *, fixed: bool, least: float = 0
    ) -> tuple[list[dict[str, Any]], dict[str, float | None]]:
        """Generate for all batches, until `least` seconds are over; add the joules of a batch."""
        timed: list[dict[str, Any]] = []
        self.monitor.begin_window("pass")
        start = self.clock() if least else 0.0
        while not timed or (least and self.clock() - start < least):
            for batch in self.batches[size]:
                run = partial(model.timed_generation, fixed=fixed, clock=self.clock)
                timed.append(run(batch, tokens))
        reading = self.monitor.end_window("pass")
        self.notes += reading.notes
        if (reading.seconds or 0.0) < ENERGY_WINDOW_SECONDS:
            self.notes.append(
                f"energy windows at batch size {size} are shorter than "
                f"{ENERGY_WINDOW_SECONDS:g} s and unreliable; use more prompts or tokens"
            )
        joules = reading.joules.as_dict().items()
        return timed, {part: ratio(each, len(timed)) for part, each in joules}

    def loaded(self, spec: dict[str, Any]) -> Any:
        """Return a model that is warm; load it where it is not held."""
        if spec["name"] in self.held:
            return self.held[spec["name"]]
        if not self.together:
            self.release()
        request, tokens = self.request, self.request.max_new_tokens
        arguments = {**request.load_arguments, **spec["asked"]}
        if spec["asked"]:
            arguments |= {"criterion": request.criterion, "seed": request.seed}
        torch.manual_seed(request.seed)
        model = self.load(
            request.pretrained, device=request.device, dtype=request.dtype, **arguments
        )
        self.held[spec["name"]] = model
        if not hasattr(model, "timed_generation"):
            model.timed_generation = partial(generate, model, pad_token=self.pad_token)
        spec["model_bytes"] = int(model.get_memory_footprint())
        every = [batch for batches in self.batches.values() for batch in batches]
        longest = max(batch["input_ids"].shape[1] for batch in every)
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and longest + tokens > limit:
            raise ValueError(
                f"max_new_tokens={tokens} after a prompt of {longest} tokens does not fit into "
                f"the model's {limit} positions: use shorter prompts or fewer tokens."
            )
        for batches in self.batches.values():
            for batch in batches[:2]:
                few = min(8, tokens)
                model.timed_generation(batch, few, fixed=True, clock=self.clock)
                self.warm_up_batches += 1
        return model

    def release(self) -> None:
        """Let go of the models."""
        for model in self.held.values():
            if model.device is None:
                model.close()
        self.held.clear()
        release_memory()

    def result(self) -> dict[str, Any]:
        """Return what `profile` does, of what was measured so far."""
        name, meter = (
            platform.processor() or platform.machine(),
            self.monitor.describe(),
        )
        if torch.device(self.request.device).type == "cuda":
            name = torch.cuda.get_device_name(self.request.device)
        return {
            "schema_version": SCHEMA_VERSION,
            "request": asdict(self.request),
            "environment": {
                "python": platform.python_version(),
                "platform": platform.platform(),
                **{p: version(p) for p in ("torch", "transformers", "lm-eval-pruned")},
                "device": self.request.device,
                "device_name": name,
                "threads": torch.get_num_threads(),
            },
            "models_held": "together" if self.together else "one at a time",
            "warm_up_batches": self.warm_up_batches,
            "interrupted": self.interrupted,
            "energy": {
                "meter": meter and meter.name,
                "scope": meter and meter.scope,
                "sources": meter and {k: asdict(s) for k, s in meter.sources.items()},
                "hardware": meter and meter.hardware,
                "notes": list(dict.fromkeys([*self.monitor.failures, *self.notes])),
            },
            "models": self.models,
            "cells": cells_of(self.rows, [model["name"] for model in self.models]),
        }


def generate(
    model: PreTrainedModel,
    batch: BatchEncoding,
    max_new_tokens: int,
    *,
    fixed: bool,
    pad_token: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Generate greedily and take the time of the first and the last token.

    Where `fixed`, the end of text is forbidden, so that there are exactly `max_new_tokens`; else
    rows that have ended are filled with `pad_token`.

    Returns:
        ``rows``, the number of prompts; ``prompt_tokens`` without padding; ``output_tokens``
        up to the end of text of each row; ``steps``, the output length of the longest row;
        and the seconds until the ``first`` token and in ``total``.
    """
    from transformers import GenerationConfig, StoppingCriteriaList

    ids, ends = batch["input_ids"], end_tokens(model)
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
        if ids.device.type == "cuda":
            torch.cuda.synchronize(ids.device)
        times.append(clock())

    def stop(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        # This criterion never stops: it is what is called after the first token.
        if len(times) == 1:
            look_at_clock()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=ids.device)

    look_at_clock()
    with torch.inference_mode():
        output = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=batch["attention_mask"],
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([stop]),
        )
    look_at_clock()
    start, first, end = times
    tokens = output[:, ids.shape[1] :]
    return {
        "rows": len(tokens),
        "prompt_tokens": int(batch["attention_mask"].sum()),
        "output_tokens": tokens.numel() if fixed else count_generated(tokens, ends),
        "steps": tokens.shape[1],
        "first": first - start,
        "total": end - start,
    }
