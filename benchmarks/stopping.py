"""What `sweep --stop_when decided` errs and saves: ``python benchmarks/stopping.py errors study``.

``errors``: sweeps of seven sizes without any difference, and how many decide one wrongly. ``study``:
the differences that the study of Llama-3.2 published (a CSV file as
``tests/data/study_benchmarks.csv``), drawn document by document, and how often stopping comes to
the verdict of all documents, after how many.

The tables are in ``docs/measurements/stopping.md``. Nothing is drawn twice: the same options print
the same.
"""

from __future__ import annotations

import argparse
import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from lm_eval_pruned.compare.stopping import LEAST_OF_MEANS, LEVEL
from lm_eval_pruned.results.stopping_record import spent
from lm_eval_pruned.sweeps.stopping import LEAST, LOOKS
from lm_eval_pruned.util.tables import markdown_table


STUDY_FILE = Path(__file__).parents[1] / "tests/data/study_benchmarks.csv"
#: Documents of the study's tasks, and the metric that decides.
STUDY_TASKS = {
    "arc_challenge": (1172, "acc_norm,none"),
    "boolq": (3270, "acc,none"),
    "gsm8k": (1319, "exact_match,strict-match"),
    "hellaswag": (10042, "acc_norm,none"),
    "ifeval": (541, "prompt_level_strict_acc,none"),
    "leaderboard_musr": (756, "acc_norm,none"),
    "mmlu": (14042, "acc,none"),
    "piqa": (1838, "acc_norm,none"),
    "truthfulqa_mc1": (817, "acc,none"),
    "truthfulqa_mc2": (817, "acc,none"),
    "winogrande": (1267, "acc,none"),
}


def _levels(documents: int, tests: int) -> tuple[np.ndarray, np.ndarray]:
    """Return looks and the levels of p at them, for one of `tests` sizes."""
    counts = [math.ceil(share * documents) for share in LOOKS]
    counts = [count for count in counts if count >= min(LEAST, documents)]
    shares = np.diff([spent(count, documents) for count in counts], prepend=0)
    return np.array(counts), LEVEL / tests * shares


def mid_p(up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Return McNemar's two-sided mid-p, as `compare` makes it."""
    few, both = np.minimum(up, down), up + down
    tail = stats.binom.cdf(few, both, 0.5) - stats.binom.pmf(few, both, 0.5) / 2
    return np.clip(2 * tail, 0.0, 1.0)


def mean_p(gains: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return p of the mean of the first documents, shape (..., looks); gains (..., n).

    As `lm_eval_pruned.compare.stopping` makes it where documents are not right or wrong.
    """
    n = counts.astype(float)
    first, second = (
        (gains.astype(float) ** power).cumsum(axis=-1)[..., counts - 1] / n
        for power in (1, 2)
    )
    spread = np.sqrt(np.maximum(second - first**2, 1e-60))
    p = 2 * stats.t.sf(np.abs(first) / spread * np.sqrt(n - 1), n - 1)
    return np.where(counts < LEAST_OF_MEANS, 1.0, p)


def decided(p: np.ndarray, documents: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which sizes show a difference, and after how many documents each stopped.

    Args:
        p: Shape (sweeps, sizes, looks).
        documents: How many there are.
    """
    counts, levels = _levels(documents, p.shape[1])
    below = p < levels
    shown = below.any(axis=-1)
    return shown, counts[np.where(shown, below.argmax(axis=-1), len(counts) - 1)]


def holm(p: np.ndarray) -> np.ndarray:
    """Return which of a family are shown after Holm at `LEVEL`, shape as `p` (..., sizes)."""
    order = np.argsort(p, axis=-1)
    bounds = LEVEL / np.arange(p.shape[-1], 0, -1)
    passed = np.minimum.accumulate(
        np.take_along_axis(p, order, axis=-1) < bounds, axis=-1
    )
    shown = np.zeros(p.shape, dtype=bool)
    np.put_along_axis(shown, order, passed, axis=-1)
    return shown


def errors(times: int) -> str:
    """Simulate sweeps without any difference, and count those that decide one."""
    rows = []
    for documents, changed in ((541, 0.1), (817, 0.2), (3270, 0.07), (14042, 0.4)):
        rng = np.random.default_rng(documents)
        p = _null_p(rng, documents, changed, times)
        rows.append(_error_row(f"right or wrong, {changed:.0%} change", documents, p))
    noises = {
        "beta(1/2, 1/2), less another": lambda rng, shape: (
            rng.beta(0.5, 0.5, shape) - rng.beta(0.5, 0.5, shape)
        ),
        "normal": lambda rng, shape: rng.standard_normal(shape, dtype=np.float32),
        "one in ten changes, up or down": lambda rng, shape: (
            (rng.random(shape) < 0.1) * rng.standard_normal(shape)
        ),
        "exponential, skewed": lambda rng, shape: (
            rng.standard_exponential(shape, dtype=np.float32) - 1
        ),
    }
    for name, noise in noises.items():
        rng = np.random.default_rng(7)
        documents = 817
        counts, _ = _levels(documents, 7)
        parts = [
            mean_p(noise(rng, (min(250, times), 7, documents)), counts)
            for _ in range(-(-times // 250))
        ]
        rows.append(_error_row(name, documents, np.concatenate(parts)[:times]))
    columns = ["differences of documents", "documents", "sweeps", "decided wrongly"]
    return markdown_table([*columns, "95 % interval"], rows, "lrrrr")


def _null_p(
    rng: np.random.Generator, documents: int, changed: float, times: int, sizes: int = 7
) -> np.ndarray:
    counts, _ = _levels(documents, sizes)
    steps = np.diff(counts, prepend=0)
    flips = rng.binomial(steps, changed, size=(times, sizes, len(counts)))
    up = rng.binomial(flips, 0.5).cumsum(axis=-1)
    return mid_p(up, flips.cumsum(axis=-1) - up)


def _error_row(name: str, documents: int, p: np.ndarray) -> list[str]:
    shown, _ = decided(p, documents)
    wrong = int(shown.any(axis=-1).sum())
    interval = stats.binomtest(wrong, len(p)).proportion_ci()
    ends = f"{interval.low:.2%} to {interval.high:.2%}"
    return [name, str(documents), str(len(p)), f"{wrong / len(p):.2%}", ends]


@dataclass(frozen=True)
class Case:
    """One model and task of the study."""

    model: str
    task: str
    documents: int
    base: float
    scores: tuple[float, ...]


def read_study(file: Path) -> list[Case]:
    """Read the scores of the study's models, by model and task."""
    scores: dict[tuple[str, str], dict[int, float]] = {}
    with file.open(encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            task = row["task"]
            if task in STUDY_TASKS and row["metric"] == STUDY_TASKS[task][1]:
                of_model = scores.setdefault((row["base_model"], task), {})
                of_model[int(row["prune_percent"])] = float(row["value"])
    return [
        Case(
            model,
            task,
            STUDY_TASKS[task][0],
            found[0],
            tuple(score for percent, score in sorted(found.items()) if percent),
        )
        for (model, task), found in scores.items()
    ]


@dataclass(frozen=True)
class Replay:
    """How stopping did on the sizes of one task, over many sweeps.

    Attributes:
        shown: Share of sweeps in which all documents show a difference, by size.
        same: Share of sweeps with the same verdict, by size.
        same_fdr: The same, held against Benjamini-Hochberg on all documents.
        saving: Median of documents / documents used, by size.
        used: Mean of documents used, by size.
    """

    task: str
    documents: int
    shown: np.ndarray
    same: np.ndarray
    same_fdr: np.ndarray
    saving: np.ndarray
    used: np.ndarray


def replayed(task: str, documents: int, p: np.ndarray, full: np.ndarray) -> Replay:
    """Compare stopping with the verdicts of all documents.

    Args:
        p: Shape (sweeps, sizes, looks).
        full: p on all documents, shape (sweeps, sizes).
    """
    shown, used = decided(p, documents)
    whole = holm(full)
    fdr = stats.false_discovery_control(full, axis=-1) < LEVEL
    return Replay(
        task,
        documents,
        whole.mean(axis=0),
        (shown == whole).mean(axis=0),
        (shown == fdr).mean(axis=0),
        np.median(documents / used, axis=0),
        used.mean(axis=0),
    )


def study(cases: list[Case], times: int, correlation: float) -> list[Replay]:
    """Draw the documents of the study's tasks with the differences that it saw.

    Args:
        cases: From `read_study`.
        times: Sweeps for each.
        correlation: Between a document's being right before and after pruning, which says
            how many answers change in both directions; bounded by what the two scores
            allow.
    """
    rng = np.random.default_rng(1)
    found = []
    for case in cases:
        counts, _ = _levels(case.documents, len(case.scores))
        steps = np.diff(counts, prepend=0)
        p = np.empty((times, len(case.scores), len(counts)))
        for size, score in enumerate(case.scores):
            spread = case.base * (1 - case.base) * score * (1 - score)
            right = case.base * score + correlation * np.sqrt(spread)
            right = min(right, case.base, score)
            gained, lost = score - right, case.base - right
            flips = rng.binomial(steps, gained + lost, size=(times, len(counts)))
            share = gained / (gained + lost) if gained + lost else 0.5
            up = rng.binomial(flips, share).cumsum(axis=-1)
            p[:, size] = mid_p(up, flips.cumsum(axis=-1) - up)
        found.append(replayed(case.task, case.documents, p, p[..., -1]))
    return found


def as_table(found: list[Replay]) -> str:
    """Return one row per task, over models and sizes, and one for all."""
    groups = {
        task: [each for each in found if each.task == task]
        for task in dict.fromkeys(each.task for each in found)
    }
    rows = [_row(task, group) for task, group in sorted(groups.items())]
    if len(groups) > 1:
        rows.append(_row("all", found))
    columns = ["task", "documents", "units", "differences shown by all documents"]
    columns += ["same verdict", "same as Benjamini-Hochberg", "median saving"]
    columns += ["median where shown", "all documents / used"]
    return markdown_table(columns, rows, "lrrrrrrrr")


def _row(name: str, group: list[Replay]) -> list[str]:
    def joined(attribute: str) -> np.ndarray:
        return np.concatenate([getattr(each, attribute) for each in group])

    shown, saving, used = joined("shown"), joined("saving"), joined("used")
    clear = saving[shown > 0.5]
    whole = sum(each.documents * len(each.used) for each in group)
    documents = {each.documents for each in group}
    return [
        name,
        str(documents.pop()) if len(documents) == 1 else "-",
        str(len(shown)),
        str(int((shown > 0.5).sum())),
        f"{joined('same').mean():.1%}",
        f"{joined('same_fdr').mean():.1%}",
        f"{np.median(saving):.1f}",
        f"{np.median(clear):.1f}" if len(clear) else "-",
        f"{whole / used.sum():.1f}",
    ]


def main(argv: list[str] | None = None) -> None:
    """Print the parts that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("errors", "study")
    parser.add_argument("parts", nargs="+", choices=parts)
    parser.add_argument("--times", type=int, default=10_000, help="sweeps of errors")
    parser.add_argument("--study-times", type=int, default=500, help="sweeps of study")
    parser.add_argument("--study-file", type=Path, default=STUDY_FILE)
    parser.add_argument(
        "--correlations", type=float, nargs="+", default=[0.2, 0.45, 0.8]
    )
    arguments = parser.parse_args(argv)
    for part in arguments.parts:
        if part == "errors":
            print(f"{errors(arguments.times)}\n")
        else:
            cases = read_study(arguments.study_file)
            for correlation in arguments.correlations:
                found = study(cases, arguments.study_times, correlation)
                print(f"correlation {correlation:g}\n\n{as_table(found)}\n")


if __name__ == "__main__":
    main()
