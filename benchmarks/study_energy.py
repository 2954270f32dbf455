"""Read the energy runs of arXiv 2512.22671 again: ``python benchmarks/study_energy.py FILE.csv``.

Prints two Markdown tables from the raw runs (`tests/data/energy_llama32_1b_l4.csv`):
energy from codecarbon's total kWh over all new tokens of the three seeds, output
length and decode rate beside it, and the study's own figure for comparison.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path


JOULES_PER_KWH = 3.6e6
COLUMNS = (
    "pruned|output tokens per prompt|ms to last token|tokens/s|J per token, total"
    "|J per token, GPU|J per prompt, total"
)


def read(path: Path) -> list[dict[str, str]]:
    """Return the runs as rows of strings."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def quotient_of_raw_and_total(runs: list[dict[str, str]]) -> tuple[float, float]:
    """Return the smallest and the largest published "energy" / total kWh of all runs."""
    quotients = [
        float(run["published_energy_raw"]) / float(run["codecarbon_total_kwh"])
        for run in runs
    ]
    return min(quotients), max(quotients)


def figures(
    runs: list[dict[str, str]], workload: str, percent: int
) -> dict[str, float]:
    """Return what one cell used and made, over its three seeds.

    Returns:
        ``tokens_per_prompt``; ``ms`` to the last token (mean; NaN where the study has
        none); ``tokens_per_second`` over the whole loop; ``joules_per_token`` in total
        and ``gpu_joules_per_token``; ``joules_per_prompt``; ``published``, the study's
        joules per token (mean of the seeds).
    """
    cell = [
        run
        for run in runs
        if run["workload"] == workload and int(run["prune_percent"]) == percent
    ]

    def total(column: str) -> float:
        return sum(float(run[column]) for run in cell)

    def mean(column: str) -> float:
        return sum(float(run[column] or "nan") for run in cell) / len(cell)

    tokens = total("new_tokens")
    joules = JOULES_PER_KWH * total("codecarbon_total_kwh")
    return {
        "tokens_per_prompt": tokens / total("measured_prompts"),
        "ms": mean("time_to_last_token_ms"),
        "tokens_per_second": tokens / total("loop_seconds"),
        "joules_per_token": joules / tokens,
        "gpu_joules_per_token": JOULES_PER_KWH * total("codecarbon_gpu_kwh") / tokens,
        "joules_per_prompt": joules / total("measured_prompts"),
        "published": mean("published_joules_per_token"),
    }


def table(runs: list[dict[str, str]], workload: str) -> str:
    """Return one workload at all sizes as a Markdown table."""
    lines = [f"|{COLUMNS}|", "|" + "--:|" * (COLUMNS.count("|") + 1)]
    for percent in sorted({int(run["prune_percent"]) for run in runs}):
        f = figures(runs, workload, percent)
        lines.append(
            f"|{percent} %|{f['tokens_per_prompt']:.1f}|{f['ms']:.0f}"
            f"|{f['tokens_per_second']:.1f}|{f['joules_per_token']:.2f}"
            f"|{f['gpu_joules_per_token']:.2f}|{f['joules_per_prompt']:.1f}|"
        )
    return "\n".join(lines)


def changes(runs: list[dict[str, str]], workload: str, percent: int) -> str:
    """Return the study's change of J per token and the recomputed ones, as a table row."""
    before, after = (figures(runs, workload, p) for p in (0, percent))
    return (
        f"|{workload}|"
        + "|".join(
            f"{100 * (after[key] / before[key] - 1):+.1f} %"
            for key in ("published", "joules_per_token", "gpu_joules_per_token")
        )
        + "|"
    )


def main(path: Path) -> None:
    """Print the tables."""
    runs = read(path)
    low, high = quotient_of_raw_and_total(runs)
    print(
        f"published energy / total kWh: {low:.5f} to {high:.5f} in {len(runs)} runs\n"
    )
    for workload in ("hellaswag_latency_b1", "mmlu_latency_b1"):
        print(f"{workload}\n\n{table(runs, workload)}\n")
    print(
        "|60 % pruned against 0 %|published J per token|total J per token|GPU J per token|"
    )
    print("|---|--:|--:|--:|")
    for workload in sorted({run["workload"] for run in runs}):
        print(changes(runs, workload, 60))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
