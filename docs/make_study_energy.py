"""Write what the study's energy runs show: ``python docs/make_study_energy.py``.

``tests/data/study_energy.csv`` holds the raw runs as they were published with arXiv
2512.22671 (Martra 2025): Llama-3.2-1B on one NVIDIA L4, 7 sizes, 6 workloads, 3 seeds.
Figures only. Columns ``published_...`` keep that name because they are not what the
study calls them. The text is the end of ``docs/energy.md``.
"""

from __future__ import annotations

import csv
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lm_eval_pruned.energy.readings import JOULES_PER_KWH
from lm_eval_pruned.util.atomic import write_atomically
from lm_eval_pruned.util.tables import markdown_table


if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "energy.md"
#: What comes after it on the page is written by this script.
BEGIN = "<!-- written by docs/make_study_energy.py -->\n\n"
#: codecarbon's constants for a processor it does not know (half of 85 W) and for memory.
CPU_WATTS, RAM_WATTS = 42.5, 20.0


@dataclass(frozen=True)
class StudyRun:
    """One run of the study.

    Attributes:
        percent: Share of neurons removed, in percent.
        workload: Task, and batch size 1 (``latency``) or 8 (``throughput``).
        prompts: Prompts that were measured.
        tokens: New tokens in all.
        ms: Mean time to the last token, in milliseconds; None at batch size 8.
        tokens_per_second: The study's own rate, without what its loop adds.
        seconds: Time of the loop, in seconds.
        published: Joules per token as published.
        raw: What the study takes for energy, as if in kWh.
        total: codecarbon's energy, in joules; `cpu` and `gpu` are parts of it.
        cpu: That of the processor.
        gpu: That of the GPU.
    """

    percent: int
    workload: str
    prompts: int
    tokens: int
    ms: float | None
    tokens_per_second: float
    seconds: float
    published: float
    raw: float
    total: float
    cpu: float
    gpu: float

    @property
    def ram(self) -> float:
        """Energy of the memory, in joules."""
        return self.total - self.cpu - self.gpu


def read() -> list[StudyRun]:
    """Return the study's runs."""
    path = ROOT / "tests" / "data" / "study_energy.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return [
            StudyRun(
                int(row["prune_percent"]),
                row["workload"],
                int(row["measured_prompts"]),
                int(row["new_tokens"]),
                float(row["time_to_last_token_ms"])
                if row["time_to_last_token_ms"]
                else None,
                float(row["tokens_per_second"]),
                float(row["loop_seconds"]),
                float(row["published_joules_per_token"]),
                float(row["published_energy_raw"]),
                *(
                    JOULES_PER_KWH * float(row[f"codecarbon_{part}_kwh"])
                    for part in ("total", "cpu", "gpu")
                ),
            )
            for row in csv.DictReader(file)
        ]


@dataclass(frozen=True)
class Subtraction:
    """How the published joules per token follow from emissions.

    Attributes:
        low: Smallest quotient of the raw figure and codecarbon's kWh: kg CO2e per kWh.
        high: The largest one.
        factor: What to multiply the RAM energy with, and to take off, in the unit of the
            raw figure.
        error: Largest deviation of what comes out from the published figure, as a share.
    """

    low: float
    high: float
    factor: float
    error: float

    @classmethod
    def of(cls, runs: list[StudyRun]) -> Subtraction:
        """Find the one factor for all runs, from the sums over them."""
        quotients = [JOULES_PER_KWH * run.raw / run.total for run in runs]
        missing = sum(JOULES_PER_KWH * r.raw - r.published * r.tokens for r in runs)
        factor = missing / sum(run.ram for run in runs)
        return cls(
            min(quotients),
            max(quotients),
            factor,
            max(
                abs(
                    (JOULES_PER_KWH * run.raw - factor * run.ram)
                    / (run.published * run.tokens)
                    - 1
                )
                for run in runs
            ),
        )

    def net(self, run: StudyRun) -> float:
        """Return the energy of a run above the idle power, in joules proper."""
        return run.total - self.factor / self.high * run.ram

    @property
    def idle_watts(self) -> float:
        """The power taken off, in watts, if the memory's constant is `RAM_WATTS`."""
        return self.factor / self.high * RAM_WATTS


def figures(runs: list[StudyRun], workload: str, percent: int) -> dict[str, float]:
    """Return what one cell used and made, as means over its three seeds.

    Returns:
        ``tokens_per_prompt``; ``ms`` to the last token (NaN where the study has none);
        ``tokens_per_second`` over the whole loop; joules per token ``gross``, ``net`` of idle, of the ``gpu``, and as ``published``;
        ``joules_per_prompt``, gross.
    """
    taken_off = Subtraction.of(runs)
    cell = [r for r in runs if (r.workload, r.percent) == (workload, percent)]

    def mean(figure: Callable[[StudyRun], float]) -> float:
        return sum(figure(run) for run in cell) / len(cell)

    return {
        "tokens_per_prompt": mean(lambda r: r.tokens / r.prompts),
        "ms": mean(lambda r: float("nan") if r.ms is None else r.ms),
        "tokens_per_second": mean(lambda r: r.tokens / r.seconds),
        "gross": mean(lambda r: r.total / r.tokens),
        "net": mean(lambda r: taken_off.net(r) / r.tokens),
        "gpu": mean(lambda r: r.gpu / r.tokens),
        "published": mean(lambda r: r.published),
        "joules_per_prompt": mean(lambda r: r.total / r.prompts),
    }


def change(runs: list[StudyRun], workload: str, key: str) -> float:
    """Return how a figure changes from 0 to 60 % pruned, in percent."""
    before, after = (figures(runs, workload, percent)[key] for percent in (0, 60))
    return 100 * (after / before - 1)


def as_markdown() -> str:
    """Return what the study's runs show, every figure computed from them."""
    runs = read()
    taken_off = Subtraction.of(runs)
    quotients = [run.cpu / run.ram for run in runs]
    whole, pruned = (figures(runs, "hellaswag_latency_b1", p) for p in (0, 60))
    sizes = sorted({run.percent for run in runs})
    cells = [figures(runs, "hellaswag_latency_b1", percent) for percent in sizes]
    rates = [cell["tokens_per_second"] for cell in cells]
    headline = {
        key: change(runs, "mmlu_latency_b1", key)
        for key in ("published", "net", "gross", "gpu")
    }
    return "\n\n".join(
        [
            _paragraph(f"""
            **The study's unit is kg CO2e.** The figure that it takes for kWh, divided by codecarbon's kWh, is
            {_both_ends(taken_off.low, taken_off.high, ".5f")} in all {len(runs)} runs: a carbon intensity. It cancels in
            percentages.
            """),
            _paragraph(f"""
            **The published joules per token are net of an idle power.** Subtracting {taken_off.factor:.3f} times the
            RAM energy, which codecarbon counts as a constant power, from those emissions reproduces all {len(runs)} values
            within {100 * taken_off.error:.2f} %. The watts are not in the data, but the processor's energy is
            {_both_ends(min(quotients), max(quotients), ".3f")} times the RAM's in every run, and codecarbon's
            constants are {CPU_WATTS:g} W for a processor that it does not know and {RAM_WATTS:g} W for memory. With these
            constants the idle power is {taken_off.idle_watts:.1f} W, and what remains is energy of the GPU.
            """),
            _paragraph(f"""
            **Both savings are right, for different questions.** At 60 % a token of MMLU takes {-headline["net"]:.1f} % less
            energy net of idle ({-headline["published"]:.1f} % as published), {-headline["gpu"]:.1f} % less on the GPU, and
            {-headline["gross"]:.1f} % less gross. Net is what the model adds on a machine that runs anyway. Gross is what
            the machine draws while the model works; it follows the time where most of the power is idle power.
            """),
            _changes(runs),
            "HellaSwag, batch size 1, at most 20 new tokens; joules from codecarbon's kWh, means of the three seeds:",
            _table(runs, "hellaswag_latency_b1"),
            _paragraph(f"""
            **The "latency penalty" is output length.** On HellaSwag the time to the last token goes from {whole["ms"]:.0f} to
            {pruned["ms"]:.0f} ms because the unpruned model stops after {whole["tokens_per_prompt"]:.1f} of 20 tokens
            and the pruned one after {pruned["tokens_per_prompt"]:.1f}. Tokens per second stay between {min(rates):.1f} and
            {max(rates):.1f}, and a prompt costs {pruned["joules_per_prompt"] / whole["joules_per_prompt"]:.1f} times the
            energy. Joules per token fall partly because one prefill is spread over more tokens.
            """),
        ]
    )


def _both_ends(low: float, high: float, form: str) -> str:
    ends = dict.fromkeys((format(low, form), format(high, form)))
    return " to ".join(ends)


def _paragraph(text: str) -> str:
    return textwrap.fill(
        " ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False
    )


def _table(runs: list[StudyRun], workload: str) -> str:
    columns = {
        "output tokens per prompt": ("tokens_per_prompt", ".1f"),
        "ms to last token": ("ms", ".0f"),
        "tokens/s": ("tokens_per_second", ".1f"),
        "J per token, gross": ("gross", ".2f"),
        "net of idle": ("net", ".3f"),
        "GPU": ("gpu", ".2f"),
        "J per prompt, gross": ("joules_per_prompt", ".1f"),
    }
    rows = []
    for percent in sorted({run.percent for run in runs}):
        found = figures(runs, workload, percent)
        cells = (format(found[key], form) for key, form in columns.values())
        rows.append([f"{percent} %", *cells])
    return markdown_table(["pruned", *columns], rows, "r" * (1 + len(columns)))


def _changes(runs: list[StudyRun]) -> str:
    keys = ("published", "net", "gross", "gpu")
    return markdown_table(
        ["60 % pruned against 0 %, J per token"]
        + ["published", "net of idle", "gross", "GPU"],
        [
            [workload, *(f"{change(runs, workload, key):+.1f} %" for key in keys)]
            for workload in sorted({run.workload for run in runs})
        ],
    )


def main() -> None:
    """Write the end of the page."""
    above, _, _ = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    write_atomically(PAGE, f"{above}{BEGIN}{as_markdown()}\n")


if __name__ == "__main__":
    main()
