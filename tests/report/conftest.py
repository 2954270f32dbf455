"""One sweep that most tests of reports look at."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.helpers.results_files import losses, offering, spread, write_sweep


N = 80
PERCENTS = (0, 20, 40, 60)
NASTY = "<script>alert('x')<script>|$\\frac{1}{2}$&amp;"
#: Choices, and the shares of right answers before and after.
CHOICES = {
    "mmlu": (4, 0.65, 0.30),
    "arc_challenge": (4, 0.55, 0.32),
    "hellaswag": (4, 0.62, 0.40),
    "piqa": (2, 0.75, 0.65),
    "truthfulqa_mc2": (2, 0.40, 0.60),
    "leaderboard_musr_object_placements": (3, 0.36, 0.37),
    "boolq": (2, 0.50, 0.50),
    NASTY: (3, 0.5, 0.4),
}


def perplexity(level: float, seed: int = 2) -> dict:
    return losses(np.random.default_rng(seed).normal(-level, 0.1, N))


def tasks(percent: int) -> dict:
    done = percent / 60
    made = {}
    for seed, (task, (choices, first, last)) in enumerate(CHOICES.items()):
        rows = {n: offering([f"{n} {c}" for c in range(choices)]) for n in range(N)}
        if task == "boolq":
            rows = {n: offering([" no", " yes"], int(n % 8 < 5)) for n in range(N)}
        values = spread(first + (last - first) * done, N, seed)
        made[task] = {"acc,none": {"values": values, "rows": rows, "stderr": 0.05}}
    made["wikitext"] = {"word_perplexity,none": perplexity(2 + 3 * done, percent)}
    made["gsm8k"] = {"exact_match,strict-match": spread(0.4 * (1 - done), N, 11)}
    return made


@pytest.fixture(scope="session")
def sweep(tmp_path_factory):
    """Folder of a sweep of four sizes with its report; one size failed, and a meter ran."""
    pytest.importorskip("altair", reason="figures need the extra `report`")
    from lm_eval_pruned.report.report import compared, write_report
    from lm_eval_pruned.results.runs import read_sweep

    folder = tmp_path_factory.mktemp("sweep")
    runs = {f"p{each}": (each, tasks(each)) for each in PERCENTS}
    write_sweep(folder, {**runs, "p80": (80, {})}, p80="mmlu")
    record = {"seconds": 20.0, "joules": {"total": 300.0}, "generated_tokens": 1000}
    record["joules_per_processed_token"] = 0.3
    block = {"sources": {"cpu": {"kind": "modelled"}, "gpu": None}}
    block["request_types"] = {"generate_until": record}
    for file in folder.glob("units/*/wikitext/results_*.json"):
        data = json.loads(file.read_text())
        data["config"]["energy"] = block
        file.write_text(json.dumps(data))
    sweep = read_sweep(folder)
    write_report(sweep, compared(sweep))
    return folder
