"""``lm-eval-pruned profile``: latency, throughput, memory and energy over expansion ratios.

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
import gc
import json
import logging
import platform
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lm_eval_pruned.energy.monitor import COMPONENTS, EnergyReading, ratio
from lm_eval_pruned.model_wrappers.batching.generation import (
    count_generated,
    end_tokens,
)


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lm_eval_pruned.energy.monitor import EnergyMonitor
    from lm_eval_pruned.pruning.plan import Number

#: Version of the JSON; raised when a key changes its meaning.
SCHEMA_VERSION = 1
MODES = ("fixed", "natural")
CONFIDENCE = 0.95
#: A prefill pass is repeated until its energy window is this long, in seconds.
ENERGY_WINDOW_SECONDS = 1.0
#: Share of the free memory that all models together may take.
_MEMORY_SHARE = 0.6

logger = logging.getLogger("lm_eval.pruned.profiling")


@dataclass(frozen=True)
class ProfileRequest:
    """What to measure.

    Attributes:
        pretrained: Folder or Hub name of the unpruned model.
        ratios: Expansion ratios to measure beside the unpruned model.
        multiple_of: Each ratio is measured at its width rounded down to each of these.
        batch_sizes: Prompts per batch.
        max_new_tokens: Output tokens of the fixed length, and most of the natural one.
        repeats: How often everything is measured.
        seed: Seed of torch and of the criterion ``random``.
        criterion: Importance score; see `lm_eval_pruned.criteria`.
        device: Where the models run.
        dtype: Weight dtype; None keeps the checkpoint's.
        apply_chat_template: Whether prompts are wrapped as a user's turn.
        load_arguments: Anything else `lm_eval_pruned.load_pruned` takes.
    """

    pretrained: str
    ratios: tuple[Number, ...]
    multiple_of: tuple[int, ...] = (1,)
    batch_sizes: tuple[int, ...] = (1,)
    max_new_tokens: int = 50
    repeats: int = 5
    seed: int = 0
    criterion: str = "maw"
    device: str = "cpu"
    dtype: str | None = None
    apply_chat_template: bool = False
    load_arguments: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ValueError for a number that is out of range."""
        for name in ("max_new_tokens", "repeats"):
            least = 2 if name == "max_new_tokens" else 1
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name}={getattr(self, name)} measures nothing: pass at least {least}."
                )
        for size in self.batch_sizes:
            if size < 1:
                raise ValueError(f"batch_sizes={size} is no batch: pass at least 1.")


@dataclass(frozen=True)
class ProfiledModel:
    """One model of the table.

    Attributes:
        name: ``baseline`` or such as ``ratio=2.4 multiple_of=64``.
        asked: Arguments of `load_pruned` that make it; empty for the baseline.
        intermediate_size: Kept width, in neurons.
        expansion_ratio: Kept width / hidden size.
        parameters: Number of parameters; tied ones count once.
        model_bytes: Weights and buffers in memory, in bytes; None before it was loaded.
    """

    name: str
    asked: dict[str, Any]
    intermediate_size: int
    expansion_ratio: float
    parameters: int
    model_bytes: int | None = None


@dataclass(frozen=True)
class Distribution:
    """Samples of a latency.

    Attributes:
        n: Number of samples; one is a batch in one repeat.
        mean: Arithmetic mean.
        sd: Standard deviation (n - 1), or None for one sample.
        p50: Median.
        p90: 90th percentile, interpolated.
        p99: 99th percentile, interpolated; below 100 samples it is close to the largest.
    """

    n: int
    mean: float
    sd: float | None
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Estimate:
    """Mean of one number per repeat, with its confidence interval.

    Attributes:
        n: Number of repeats.
        mean: Arithmetic mean.
        low: Lower end of the 95 % interval (Student's t), or None for one repeat.
        high: Upper end.
    """

    n: int
    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Delta:
    """Difference to the baseline, from pairs measured in the same repeat.

    Attributes:
        percent: Difference in percent of the baseline (geometric mean of the ratios).
        low: Lower end of the 95 % interval of the mean (Student's t on log ratios), in
            percent; None for one repeat.
        high: Upper end.
        verdict: ``no difference seen`` where the interval holds 0, ``higher``, ``lower``,
            or ``one repeat, no interval``.
    """

    percent: float
    low: float | None
    high: float | None
    verdict: str


@dataclass(frozen=True)
class Cell:
    """One model at one batch size and output length.

    Attributes:
        model: Name of a `ProfiledModel`.
        batch_size: Prompts per batch.
        mode: ``fixed`` or ``natural``.
        repeats: Repeats in it.
        prompts: Prompts in one repeat.
        prompt_tokens: Tokens of all prompts in one repeat, without padding.
        mean_output_tokens: Output tokens per prompt, the end-of-text token included.
        seconds_to_first_token: From handing over the ids to the first token, in seconds.
        seconds_per_output_token: Time after the first token per further step of the
            batch, in seconds; None if no batch made a second token.
        seconds_end_to_end: From handing over the ids to the last token, in seconds.
        latency_estimates: Mean of these three latencies over the repeats, with intervals.
        prefill_tokens_per_second: Prompt tokens per second to the first token.
        decode_tokens_per_second: Tokens after the first one of each row, per second.
        joules: Mean energy of one pass over all prompts, by component, in joules:
            ``prefill``, ``decode`` (generation less prefill) and ``both``; None where it
            was not measured.
        joules_per_prompt_token: Energy of the prefill per prompt token.
        joules_per_decode_token: Energy of the decoding per token after the first.
        joules_per_output_token: All energy per output token.
        peak_device_bytes: Most memory that this model held on the CUDA device: its
            weights and what it allocated on top, in bytes; None without one.
        peak_host_bytes: Most memory of the process while it ran (resident set, with the
            other models it holds), in bytes; None where the system does not tell.
        deltas: Differences to the baseline of the same batch size and mode, by metric;
            empty for the baseline.
    """

    model: str
    batch_size: int
    mode: str
    repeats: int
    prompts: int
    prompt_tokens: int
    mean_output_tokens: float
    seconds_to_first_token: Distribution
    seconds_per_output_token: Distribution | None
    seconds_end_to_end: Distribution
    latency_estimates: dict[str, Estimate]
    prefill_tokens_per_second: Estimate
    decode_tokens_per_second: Estimate | None
    joules: dict[str, dict[str, float | None]]
    joules_per_prompt_token: Estimate | None
    joules_per_decode_token: Estimate | None
    joules_per_output_token: Estimate | None
    peak_device_bytes: int | None
    peak_host_bytes: int | None
    deltas: dict[str, Delta]


@dataclass(frozen=True)
class Profile:
    """The result, as it is written to JSON.

    Attributes:
        schema_version: See `SCHEMA_VERSION`.
        request: The `ProfileRequest`.
        environment: Versions, device and threads.
        models_held: ``together`` (all in memory at once) or ``one at a time`` (reloaded
            in each repeat).
        warm_up_batches: Batches that ran before the measurement and count nowhere.
        interrupted: Whether it was stopped before all repeats were done.
        energy: Meter, scope, source of each component, and what went wrong.
        models: The rows.
        cells: The measurements.
    """

    schema_version: int
    request: dict[str, Any]
    environment: dict[str, Any]
    models_held: str
    warm_up_batches: int
    interrupted: bool
    energy: dict[str, Any]
    models: list[ProfiledModel]
    cells: list[Cell]

    def as_json(self) -> str:
        """Return the profile as JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"


@dataclass(frozen=True)
class Batch:
    """Prompts that run together, left-padded.

    Attributes:
        ids: Token ids, shape (rows, length).
        mask: 1 for a token and 0 for padding, shape (rows, length).
    """

    ids: torch.Tensor
    mask: torch.Tensor

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return int(self.mask.sum())


@dataclass(frozen=True)
class Timing:
    """One batch that was generated.

    Attributes:
        rows: Prompts in it.
        prompt_tokens: Their tokens, without padding.
        output_tokens: Tokens generated, up to the end of text of each row.
        steps: Steps of the batch: output length of its longest row.
        first: Seconds until the first token.
        total: Seconds until the last one.
    """

    rows: int
    prompt_tokens: int
    output_tokens: int
    steps: int
    first: float
    total: float


@dataclass
class _Job:
    """One model at one batch size in one repeat: a prefill and a pass in each mode."""

    repeat: int
    model: str
    batch_size: int
    prefill: EnergyReading | None = None
    prefill_passes: int = 0
    passes: dict[str, tuple[list[Timing], EnergyReading]] = field(default_factory=dict)
    peak_device_bytes: int | None = None
    peak_host_bytes: int | None = None


def plan_models(request: ProfileRequest) -> list[ProfiledModel]:
    """Resolve the ratios to widths, without reading weights; the baseline comes first.

    Sizes that come to the width of one before them are left out, with a line in the log.

    Raises:
        ValueError: A ratio or multiple is out of range.
        UnsupportedModelError: The model cannot be pruned.
        OSError: The config cannot be read.
    """
    from lm_eval_pruned.checkpoints.planning import plan_rows

    known = _source(request)
    (row,) = plan_rows(request.pretrained, "prune_percent", [0], **known)
    models = [
        ProfiledModel(
            "baseline", {}, row.intermediate_size, row.expansion_ratio, row.parameters
        )
    ]
    for value in request.ratios:
        for multiple in request.multiple_of:
            (row,) = plan_rows(
                request.pretrained, "ratio", [value], multiple_of=multiple, **known
            )
            name = f"ratio={value}" + (
                f" multiple_of={multiple}" if multiple != 1 else ""
            )
            same = [m for m in models if m.intermediate_size == row.intermediate_size]
            if same:
                logger.info(
                    "%s has the width of %s, %d: it is measured once.",
                    name,
                    same[0].name,
                    row.intermediate_size,
                )
                continue
            models.append(
                ProfiledModel(
                    name,
                    {"ratio": value, "multiple_of": multiple},
                    row.intermediate_size,
                    row.expansion_ratio,
                    row.parameters,
                )
            )
    return models


def read_prompts(path: Path) -> list[str]:
    """Read prompts from ``.jsonl`` (key ``prompt``) or ``.txt`` (one prompt a line).

    Raises:
        ValueError: The file has another ending, a line without a prompt, or no prompt.
        OSError: The file cannot be read.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".txt":
        prompts = [line for line in lines if line.strip()]
    elif path.suffix == ".jsonl":
        prompts = []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                prompts.append(_text(json.loads(line)["prompt"]))
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"prompts={path}: line {number} is no JSON object with a text under the "
                    'key "prompt".'
                ) from None
    else:
        raise ValueError(
            f"prompts={path} ends in {path.suffix or 'nothing'}: pass a .jsonl file with a key "
            '"prompt" in each line, or a .txt file with one prompt a line.'
        )
    if not prompts:
        raise ValueError(f"prompts={path} holds no prompt.")
    return prompts


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def demo_prompts() -> list[str]:
    """Return the prompts of the demo task for instruction following."""
    import lm_eval_pruned.tasks

    folder = Path(lm_eval_pruned.tasks.__path__[0])
    return read_prompts(folder / "demo" / "instructions.jsonl")


def profile(
    request: ProfileRequest,
    prompts: Sequence[str],
    *,
    monitor: EnergyMonitor,
    clock: Callable[[], float] = time.perf_counter,
    load: Callable[..., PreTrainedModel] | None = None,
    on_repeat: Callable[[Profile], None] | None = None,
) -> Profile:
    """Measure; see the module's docstring.

    Args:
        request: What to measure.
        prompts: Texts.
        monitor: Measures the energy.
        clock: Returns seconds; for tests.
        load: Loads a model; for tests. Default: `lm_eval_pruned.load_pruned`.
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
    jobs: list[_Job] = []
    interrupted = False

    def result() -> Profile:
        return _summarise(request, shelf, bench, jobs, interrupted, monitor)

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
    return result()


def make_batches(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    batch_size: int,
    device: str,
    *,
    chat: bool = False,
) -> list[Batch]:
    """Tokenise prompts into left-padded batches, in their order."""
    if chat:
        prompts = [
            tokenizer.apply_chat_template(  # type: ignore[misc]
                [{"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
            )
            for prompt in prompts
        ]
    batches = []
    for start in range(0, len(prompts), batch_size):
        encoded = tokenizer(
            list(prompts[start : start + batch_size]),
            padding=True,
            padding_side="left",
            add_special_tokens=not chat,
            return_tensors="pt",
        )
        batches.append(
            Batch(encoded["input_ids"].to(device), encoded["attention_mask"].to(device))
        )
    return batches


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


class _Shelf:
    """The models: all in memory, or the one that is needed."""

    def __init__(
        self,
        request: ProfileRequest,
        models: list[ProfiledModel],
        load: Callable[..., PreTrainedModel],
    ) -> None:
        self.models = {model.name: model for model in models}
        self._request = request
        self._load = load
        self._held: dict[str, PreTrainedModel] = {}
        self.together = True
        self.loads = dict.fromkeys(self.models, 0)
        first = self.get("baseline")
        size = self.models["baseline"].model_bytes or 0
        per_parameter = size / self.models["baseline"].parameters
        more = per_parameter * sum(m.parameters for m in models[1:])
        self.together = more <= _MEMORY_SHARE * _free_bytes(first.device)

    def get(self, name: str) -> PreTrainedModel:
        """Return a model, loading it if it is not held."""
        if name not in self._held:
            if self._held and not self.together:
                self._held.clear()
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            self._held[name] = self._loaded(name)
        return self._held[name]

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

    def _loaded(self, name: str) -> PreTrainedModel:
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
            self.models[name] = ProfiledModel(
                **{
                    **asdict(spec),
                    "model_bytes": int(model.get_memory_footprint()),
                }
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

    def run(self, repeat: int, spec: ProfiledModel, size: int) -> _Job:
        """Measure one model at one batch size."""
        model = self._shelf.get(spec.name)
        self._warm_up(spec.name, model, size)
        job = _Job(repeat, spec.name, size)
        with _peak_memory(job, model.device):
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


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


@contextlib.contextmanager
def _peak_memory(job: _Job, device: torch.device) -> Iterator[None]:
    """Fill in the peaks of `job`: on CUDA above what was allocated before, on the host whole."""
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    known = _reset_peak_host()
    yield
    if device.type == "cuda":
        job.peak_device_bytes = torch.cuda.max_memory_allocated(device) - before
    if known:
        job.peak_host_bytes = _peak_host()


def _reset_peak_host() -> bool:
    """Start the system's record of peak memory afresh; Linux only (man 5 proc)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_host() -> int | None:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def distribution(values: Sequence[float]) -> Distribution:
    """Describe samples; see `Distribution`."""
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    return Distribution(
        len(values),
        float(np.mean(values)),
        float(np.std(values, ddof=1)) if len(values) > 1 else None,
        float(p50),
        float(p90),
        float(p99),
    )


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean and its 95 % interval."""
    mean = float(np.mean(values))
    low, high = _interval(values)
    return Estimate(len(values), mean, low, high)


def delta(values: Sequence[float], baseline: Sequence[float]) -> Delta | None:
    """Compare pairs of the same repeat; None where a number is not positive."""
    if not values or min(*values, *baseline) <= 0:
        return None
    logs = np.log(values) - np.log(baseline)

    def percent(log: float) -> float:
        return 100 * float(np.expm1(log))

    middle = percent(float(np.mean(logs)))
    low, high = _interval(logs)
    if low is None or high is None:
        return Delta(middle, None, None, "one repeat, no interval")
    verdict = "higher" if low > 0 else "lower" if high < 0 else "no difference seen"
    return Delta(middle, percent(low), percent(high), verdict)


def _interval(values: Any) -> tuple[float | None, float | None]:
    from scipy import stats

    if len(values) < 2:
        return None, None
    mean = float(np.mean(values))
    if np.ptp(values) == 0:
        return mean, mean
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, mean, stats.sem(values))
    return float(low), float(high)


def _summarise(
    request: ProfileRequest,
    shelf: _Shelf,
    bench: _Bench,
    jobs: list[_Job],
    interrupted: bool,
    monitor: EnergyMonitor,
) -> Profile:
    cells = []
    for size in request.batch_sizes:
        for mode in MODES:
            figures = {
                name: {
                    job.repeat: _figures(job, mode)
                    for job in jobs
                    if job.model == name and job.batch_size == size
                }
                for name in shelf.models
            }
            for name in shelf.models:
                mine = [j for j in jobs if j.model == name and j.batch_size == size]
                if mine:
                    cells.append(_cell(mine, mode, figures[name], figures["baseline"]))
    return Profile(
        SCHEMA_VERSION,
        asdict(request),
        _environment(request),
        "together" if shelf.together else "one at a time",
        bench.warm_up_batches,
        interrupted,
        _energy_block(monitor, jobs),
        list(shelf.models.values()),
        cells,
    )


_LATENCIES = (
    "seconds_to_first_token",
    "seconds_per_output_token",
    "seconds_end_to_end",
)
#: Metrics that are compared with the baseline.
_COMPARED = (
    *_LATENCIES,
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "joules_per_prompt_token",
    "joules_per_decode_token",
    "joules_per_output_token",
    "mean_output_tokens",
)


def _figures(job: _Job, mode: str) -> dict[str, float | None]:
    """Return one number per metric for one repeat."""
    timings, reading = job.passes[mode]
    prompt = sum(t.prompt_tokens for t in timings)
    output = sum(t.output_tokens for t in timings)
    rows = sum(t.rows for t in timings)
    first = sum(t.first for t in timings)
    after = sum(t.total - t.first for t in timings)
    decoded = output - rows
    steps = sum(t.steps - 1 for t in timings)
    prefill, decode, both = (
        _energy(job, reading)[phase]["total"] for phase in ("prefill", "decode", "both")
    )
    return {
        "seconds_to_first_token": first / len(timings),
        "seconds_per_output_token": ratio(after, steps),
        "seconds_end_to_end": (first + after) / len(timings),
        "prefill_tokens_per_second": ratio(prompt, first),
        "decode_tokens_per_second": ratio(decoded, after) if decoded else None,
        "joules_per_prompt_token": ratio(prefill, prompt),
        "joules_per_decode_token": ratio(decode, decoded),
        "joules_per_output_token": ratio(both, output),
        "mean_output_tokens": output / rows,
    }


def _energy(job: _Job, reading: EnergyReading) -> dict[str, dict[str, float | None]]:
    """Return joules of one pass by phase and component."""
    prefill: dict[str, float | None] = {}
    decode: dict[str, float | None] = {}
    both = reading.joules.as_dict()
    for name in (*COMPONENTS, "total"):
        once = getattr(job.prefill.joules, name) if job.prefill is not None else None
        once = ratio(once, job.prefill_passes)
        whole = both[name]
        prefill[name] = once
        decode[name] = None if once is None or whole is None else whole - once
    return {"prefill": prefill, "decode": decode, "both": both}


def _cell(
    jobs: list[_Job],
    mode: str,
    figures: dict[int, dict[str, float | None]],
    baseline: dict[int, dict[str, float | None]],
) -> Cell:
    timings = [timing for job in jobs for timing in job.passes[mode][0]]
    once = jobs[0].passes[mode][0]
    energies = [_energy(job, job.passes[mode][1]) for job in jobs]

    def series(metric: str) -> list[float] | None:
        values = [figures[repeat][metric] for repeat in sorted(figures)]
        return None if None in values else values  # type: ignore[return-value]

    def estimated(metric: str) -> Estimate | None:
        values = series(metric)
        return None if values is None else estimate(values)

    deltas = {}
    if jobs[0].model != "baseline":
        for metric in _COMPARED:
            pairs = [
                (figures[repeat][metric], baseline[repeat][metric])
                for repeat in sorted(figures)
                if repeat in baseline
            ]
            if pairs and all(None not in pair for pair in pairs):
                change = delta(*zip(*pairs, strict=True))  # type: ignore[arg-type]
                if change is not None:
                    deltas[metric] = change
    per_token = [(t.total - t.first) / (t.steps - 1) for t in timings if t.steps > 1]
    prefill_rate = estimated("prefill_tokens_per_second")
    assert prefill_rate is not None
    return Cell(
        model=jobs[0].model,
        batch_size=jobs[0].batch_size,
        mode=mode,
        repeats=len(jobs),
        prompts=sum(t.rows for t in once),
        prompt_tokens=sum(t.prompt_tokens for t in once),
        mean_output_tokens=sum(t.output_tokens for t in timings)
        / sum(t.rows for t in timings),
        seconds_to_first_token=distribution([t.first for t in timings]),
        seconds_per_output_token=distribution(per_token) if per_token else None,
        seconds_end_to_end=distribution([t.total for t in timings]),
        latency_estimates={
            metric: found
            for metric in _LATENCIES
            if (found := estimated(metric)) is not None
        },
        prefill_tokens_per_second=prefill_rate,
        decode_tokens_per_second=estimated("decode_tokens_per_second"),
        joules={
            phase: {
                name: _mean([energy[phase][name] for energy in energies])
                for name in (*COMPONENTS, "total")
            }
            for phase in ("prefill", "decode", "both")
        },
        joules_per_prompt_token=estimated("joules_per_prompt_token"),
        joules_per_decode_token=estimated("joules_per_decode_token"),
        joules_per_output_token=estimated("joules_per_output_token"),
        peak_device_bytes=_largest([job.peak_device_bytes for job in jobs]),
        peak_host_bytes=_largest([job.peak_host_bytes for job in jobs]),
        deltas=deltas,
    )


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if values and len(known) == len(values) else None


def _largest(values: list[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _energy_block(monitor: EnergyMonitor, jobs: list[_Job]) -> dict[str, Any]:
    meter = monitor.describe()
    notes = list(monitor.failures)
    for job in jobs:
        for mode, (_, reading) in job.passes.items():
            notes += reading.notes
            decode = _energy(job, reading)["decode"]["total"]
            if decode is not None and decode < 0:
                notes.append(
                    f"{job.model}, batch size {job.batch_size}, {mode}: generation took less "
                    "energy than its prefill alone in some repeat, so the decode energy is noise"
                )
            if reading.seconds is not None and reading.seconds < ENERGY_WINDOW_SECONDS:
                notes.append(
                    f"batch size {job.batch_size}, {mode}: energy windows shorter than "
                    f"{ENERGY_WINDOW_SECONDS:g} s are unreliable; use more prompts or tokens"
                )
    return {
        "meter": meter and meter.name,
        "scope": meter and meter.scope,
        "sources": meter and {k: asdict(source) for k, source in meter.sources.items()},
        "hardware": meter and meter.hardware,
        "notes": list(dict.fromkeys(notes)),
    }


def _environment(request: ProfileRequest) -> dict[str, Any]:
    device = torch.device(request.device)
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{
            package: version(package)
            for package in ("torch", "transformers", "lm-eval-pruned")
        },
        "device": request.device,
        "device_name": name,
        "threads": torch.get_num_threads(),
    }
