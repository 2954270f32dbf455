"""What is asked of a profile, and what it found, as data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.pruning.arguments import PruneArguments


if TYPE_CHECKING:
    from lm_eval_pruned.energy.readings import EnergyReading
    from lm_eval_pruned.pruning.arguments import Number

#: Version of the JSON; raised when a key changes its meaning.
SCHEMA_VERSION = 1


MODES = ("fixed", "natural")


CONFIDENCE = 0.95
#: A prefill pass is repeated until its energy window is this long, in seconds.
ENERGY_WINDOW_SECONDS = 1.0


@dataclass(frozen=True)
class ProfileRequest:
    """What to measure.

    Attributes:
        pretrained: Folder or Hub name of the unpruned model.
        ratios: Expansion ratios to measure beside the unpruned model.
        prune_percents: Shares of neurons to remove, for one more model each.
        widths: Files with the width of each layer, as
            `lm_eval_pruned.pruning.argument_values` reads them, for one more model each.
        multiple_of: Each size is measured at its widths rounded down to each of these.
        batch_sizes: Prompts per batch.
        max_new_tokens: Output tokens of the fixed length, and most of the natural one.
        repeats: How often everything is measured.
        seed: Seed of torch and of the criterion ``random``.
        criterion: Importance score; see `lm_eval_pruned.pruning.criteria`.
        device: Where the models run.
        dtype: Weight dtype; None keeps the checkpoint's.
        apply_chat_template: Whether prompts are wrapped as a user's turn.
        load_arguments: Anything else `lm_eval_pruned.load_pruned` takes.
    """

    pretrained: str
    ratios: tuple[Number, ...] = ()
    prune_percents: tuple[Number, ...] = ()
    widths: tuple[str, ...] = ()
    multiple_of: tuple[int, ...] = (1,)
    batch_sizes: tuple[int, ...] = (1,)
    max_new_tokens: int = 50
    repeats: int = 5
    seed: int = 0
    criterion: str = PruneArguments.criterion
    device: str = "cpu"
    dtype: str | None = None
    apply_chat_template: bool = False
    load_arguments: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ValueError for a number that is out of range, and where no size is named."""
        if not (self.ratios or self.prune_percents or self.widths):
            raise ValueError(
                "No size was given to measure beside the unpruned model: pass ratios, "
                "prune_percents or widths."
            )
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
        intermediate_size: Kept width, in neurons; the mean where the layers differ.
        expansion_ratio: Kept width / hidden size.
        parameters: Number of parameters; tied ones count once.
        model_bytes: Weights and buffers in memory, in bytes; None before it was loaded.
        layer_widths: Kept width of each layer, such as ``0:1200,1-29:900``; empty where
            all are alike.
    """

    name: str
    asked: dict[str, Any]
    intermediate_size: int | float
    expansion_ratio: float
    parameters: int
    model_bytes: int | None = None
    layer_widths: str = ""


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
class ProfileCell:
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
    cells: list[ProfileCell]

    def as_json(self) -> str:
        """Return the profile as JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"


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
class Job:
    """One model at one batch size in one repeat: a prefill and a pass in each mode."""

    repeat: int
    model: str
    batch_size: int
    prefill: EnergyReading | None = None
    prefill_passes: int = 0
    passes: dict[str, tuple[list[Timing], EnergyReading]] = field(default_factory=dict)
    peak_device_bytes: int | None = None
    peak_host_bytes: int | None = None
