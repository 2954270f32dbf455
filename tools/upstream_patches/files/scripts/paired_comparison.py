"""Compare two runs on the documents that both were scored on.

Reads what `lm_eval --log_samples --output_path FOLDER` has written and evaluates nothing:

    python scripts/paired_comparison.py BASE RUN

Documents are matched by `doc_hash`. Independent documents that are right or wrong get
McNemar's mid-p test, everything else a paired t test over documents or, where several
documents ask about one text, over texts. p values are adjusted over the tasks (Benjamini
and Hochberg). No random numbers are drawn, and numpy is all that is needed.

Sources: Fagerland, Lydersen and Laake 2013, BMC Medical Research Methodology 13:91 (mid-p);
Tango 1998, Statistics in Medicine 17:891 (the interval beside it);
Miller 2024, arXiv 2411.00640 (paired differences, clusters); Cochran 1977, Sampling
Techniques, chapters 5 and 6 (strata, ratios); Benjamini and Hochberg 1995, Journal of the
Royal Statistical Society B 57:289.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import operator
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from lm_eval_pruned.analysis.results_file import is_number


class ResultsError(ValueError):
    """What cannot be compared; the message says why."""


@dataclass(frozen=True)
class Run:
    """A results file.

    Attributes:
        file: Its path.
        data: What it holds.
    """

    file: Path
    data: dict[str, Any]

    @functools.cached_property
    def scores(self) -> dict[tuple[str, str], float]:
        """Scores by task and metric, the metric with its filter, such as `acc,none`."""
        return {
            (task, metric): float(value)
            for task, metrics in self.data["results"].items()
            for metric, value in metrics.items()
            if "," in metric
            and not metric.partition(",")[0].endswith("_stderr")
            and is_number(value)
        }

    def stderr(self, task: str, metric: str) -> float | None:
        """Return the standard error of a score, or None."""
        name, _, filter_name = metric.partition(",")
        value = self.data["results"][task].get(f"{name}_stderr,{filter_name}")
        return float(value) if is_number(value) else None

    def members(self, task: str) -> list[str]:
        """Return `task` and all its subtasks, at any depth, each once."""
        found: dict[str, None] = {}
        waiting = [task]
        while waiting:
            name = waiting.pop(0)
            if name not in found:
                found[name] = None
                waiting.extend(self.data.get("group_subtasks", {}).get(name, ()))
        return list(found)

    def leaves(self, task: str) -> list[str]:
        """Return the tasks without subtasks at or below `task`."""
        groups = self.data.get("group_subtasks", {})
        return [name for name in self.members(task) if not groups.get(name)]

    def tasks(self, subtasks: bool) -> list[str]:
        """Return the tasks that have scores, with or without the members of groups."""
        tasks = list(dict.fromkeys(task for task, _ in self.scores))
        members = {name for task in tasks for name in self.members(task)[1:]}
        return tasks if subtasks else [task for task in tasks if task not in members]

    def samples(self, task: str) -> Path:
        """Return where the samples of a task lie, if they were logged."""
        date = self.file.stem.removeprefix("results_")
        return self.file.with_name(f"samples_{task}_{date}.jsonl")


def read_run(path: str) -> Run:
    """Read a results file, or the only one in a folder.

    Raises:
        ResultsError: There is none, or several, or it is no results file.
    """
    file = Path(path)
    if file.is_dir() or not file.exists():
        files = sorted(file.rglob("results_*.json"))
        if len(files) != 1:
            raise ResultsError(
                f"{path} holds {len(files)} files results_*.json: name one results file."
            )
        file = files[0]
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ResultsError(f"{file} is not whole JSON ({error}).") from None
    if not isinstance(data, dict) or not isinstance(data.get("results"), dict):
        raise ResultsError(f"{file} is no results file: it has no object 'results'.")
    return Run(file, data)


@functools.cache
def read_samples(file: Path) -> list[dict[str, Any]]:
    """Read a file of samples, in the order of the documents."""
    rows, number = [], 0
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                row = json.loads(line)
                rows.append((row["doc_id"], number, row["doc_hash"], row))
    except (OSError, ValueError, TypeError, KeyError) as error:
        why = f"{file}, line {number}: not a whole sample of lm-eval ({error!r})."
        raise ResultsError(why) from None
    return [row for *_, row in sorted(rows, key=lambda item: item[:2])]


@dataclass(frozen=True)
class Documents:
    """Scores of one task and metric, document by document.

    Attributes:
        keys: Task, `doc_hash` and, where documents repeat, which repetition it is.
        values: Shape (n,); the score is `TRANSFORMS[transform]` of their weighted mean.
        weights: Shape (n,).
        clusters: The text that each document asks about.
        transform: A name in `TRANSFORMS`.
        prompts: `prompt_hash` of each document.
    """

    keys: list[tuple[str, str, int]]
    values: np.ndarray
    weights: np.ndarray
    clusters: list[str]
    transform: str
    prompts: list[str | None]


from lm_eval_pruned.analysis.samples import (
    CLUSTER_FIELDS,
    TRANSFORMS,
    _readings,
    _same,
)


def read_documents(run: Run, task: str, metric: str) -> Documents | None:
    """Read the scores of single documents.

    The reported score is rebuilt from them: a mean, a mean over the items of all documents
    (IFEval's instructions), a perplexity, bits per byte, or a group's mean weighted by
    documents or not.

    Returns:
        None where samples are missing, or where none of these gives the reported score, as
        for F1 or BLEU.
    """
    name, _, filter_name = metric.rpartition(",")
    raw, keys, clusters, prompts, sizes = [], [], [], [], []
    for leaf in run.leaves(task):
        file = run.samples(leaf)
        if not file.is_file():
            return None
        field = next((f for of, f in CLUSTER_FIELDS.items() if of.search(leaf)), None)
        rows = [row for row in read_samples(file) if row.get("filter") == filter_name]
        expected = run.data.get("n-samples", {}).get(leaf, {}).get("effective")
        if (leaf, metric) in run.scores and expected not in (None, len(rows)):
            raise ResultsError(
                f"{file} holds {len(rows)} documents of {leaf}, and the results file says "
                f"{expected}: one of them is incomplete."
            )
        rows = [row for row in rows if row.get(name) is not None]
        seen: dict[str, int] = {}
        for number, row in enumerate(rows):
            document = row["doc_hash"]
            seen[document] = seen.get(document, -1) + 1
            keys.append((leaf, document, seen[document]))
            text = row["doc"].get(field) if isinstance(row.get("doc"), dict) else None
            clusters.append(f"{leaf}\0{number if text is None else text}")
            prompts.append(row.get("prompt_hash"))
            raw.append(row[name])
        sizes += [float(len(rows))] * len(rows)
        if not rows:
            return None
    for values, weights in _readings(raw):
        weightings = [weights]
        if len(run.leaves(task)) > 1:
            weightings.append(weights / np.array(sizes))
        for weighting in weightings:
            for transform, function in TRANSFORMS.items():
                with np.errstate(over="ignore"):
                    score = function(np.average(values, weights=weighting))
                if _same(float(score), run.scores[task, metric]):
                    return Documents(
                        keys, values, weighting, clusters, transform, prompts
                    )
    return None


def paired_documents(
    base: Run, run: Run, task: str, metric: str
) -> tuple[Documents, Documents] | None:
    """Return the documents of two runs in one order, or None without usable samples.

    Raises:
        ResultsError: The runs saw different documents or versions of the task.
    """
    for leaf in base.leaves(task):
        versions = [each.data.get("versions", {}).get(leaf) for each in (base, run)]
        if None not in versions and versions[0] != versions[1]:
            raise ResultsError(
                f"{leaf} has version {versions[0]} in {base.file} and {versions[1]} in "
                f"{run.file}: scores of different versions of a task cannot be compared."
            )
    one, other = (read_documents(each, task, metric) for each in (base, run))
    if one is None or other is None:
        return None
    position = {key: number for number, key in enumerate(other.keys)}
    only_base = sum(key not in position for key in one.keys)
    only_run = len(other.keys) - len(one.keys) + only_base
    if only_base or only_run:
        raise ResultsError(
            f"{task} was evaluated on different documents (by doc_hash): {only_base} of "
            f"{len(one.keys)} only in {base.file}, {only_run} of {len(other.keys)} only in "
            f"{run.file}; evaluate both with the same --limit and data."
        )
    order = [position[key] for key in one.keys]
    other = replace(
        other,
        keys=one.keys,
        values=other.values[order],
        weights=other.weights[order],
        prompts=[other.prompts[index] for index in order],
    )
    alike = one.transform == other.transform and np.allclose(one.weights, other.weights)
    return (one, other) if alike else None


def incomplete_beta(a: float, b: float, x: np.ndarray | float) -> np.ndarray:
    """Return the regularised incomplete beta function I_x(a, b) for a, b > 0.

    Source: its continued fraction, DLMF 8.17.22, evaluated by Lentz's method.
    """
    x = np.asarray(x, dtype=float)
    # The fraction converges fast below the mean; above it, 1 - I_(1-x)(b, a) is taken.
    above = x > (a + 1) / (a + b + 2)
    a_, b_ = np.where(above, b, a), np.where(above, a, b)
    x_ = np.where(above, 1 - x, x)
    with np.errstate(divide="ignore"):
        scale = a_ * np.log(x_) + b_ * np.log1p(-x_)
    scale = np.exp(scale + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)) / a_
    tiny = 1e-300
    c = np.ones_like(x_)
    d = 1 - (a_ + b_) / (a_ + 1) * x_
    d = 1 / np.where(d == 0, tiny, d)
    value = d
    for m in range(1, 100_000):
        for term in (
            m * (b_ - m) / ((a_ + 2 * m - 1) * (a_ + 2 * m)),
            -(a_ + m) * (a_ + b_ + m) / ((a_ + 2 * m) * (a_ + 2 * m + 1)),
        ):
            d, c = 1 + term * x_ * d, 1 + term * x_ / c
            d, c = 1 / np.where(d == 0, tiny, d), np.where(c == 0, tiny, c)
            value = value * (step := d * c)
        if (np.abs(step - 1) < 1e-13).all():
            break
    return np.where(above, 1 - scale * value, scale * value)


def root(rising, low: float, high: float) -> float:
    """Return where a rising function is 0 between `low` and `high`, by bisection."""
    for _ in range(45):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2


def student_tail(t: float, degrees: int) -> float:
    """Return P(T > t) of Student's distribution for t >= 0."""
    if t * t < 1:
        within = incomplete_beta(0.5, degrees / 2, t * t / (degrees + t * t))
        return float(1 - within) / 2
    return float(incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))) / 2


def student_quantile(tail: float, degrees: int) -> float:
    """Return the t for which P(T > t) is `tail` < 1/2."""
    high = 1.0
    while student_tail(high, degrees) > tail:
        high *= 2
    return root(lambda t: tail - student_tail(t, degrees), 0.0, high)


@dataclass(frozen=True)
class PairedTest:
    """A difference between two runs, and what can be said about it.

    Attributes:
        low: Lower end of the interval, or None where none can be given.
        high: Upper end.
        p: Two-sided p of "there is no difference", or None where no test was made.
        method: What was done, in words.
    """

    low: float | None
    high: float | None
    p: float | None
    method: str


from lm_eval_pruned.analysis.statistics.mcnemar import _score_interval
from lm_eval_pruned.analysis.statistics.paired_test import agreeing


def mcnemar(up: int, down: int, n: int, alpha: float) -> PairedTest:
    """Test `up` documents that became right and `down` that became wrong, of `n`."""
    few, changed = min(up, down), up + down
    below, ways = 0, 1
    for k in range(few):
        below += ways
        ways = ways * (changed - k) // (k + 1)
    # Twice P(X < few) + P(X = few) / 2 of X ~ Binomial(changed, 1/2), in whole numbers.
    p = 1.0 if up == down else (2 * below + ways) / 2**changed
    interval = _score_interval(up, down, n, alpha)
    interval = agreeing(interval, (up - down) / n, p, alpha)
    return PairedTest(*interval, p, "McNemar mid-p")


from lm_eval_pruned.analysis.statistics.moments import Moments, moments_of
from lm_eval_pruned.analysis.statistics.paired_test import LEAST_UNITS
from lm_eval_pruned.analysis.statistics.student import _transformed_interval


def paired_t(moments: Moments, transform: str, alpha: float) -> PairedTest:
    """Test the difference of two means over units, on the scale of the score."""
    unit, units = moments.unit, moments.units
    if moments.difference == 0 and moments.alike:
        return PairedTest(None, None, 1.0, f"none: all {unit} equal")
    if units < LEAST_UNITS:
        why = f"none: {units} {unit} are too few for a test of their mean"
        return PairedTest(None, None, None, why)
    if moments.alike:
        # No spread to compare with: the signs alone, as McNemar's mid-p counts them.
        return PairedTest(
            None, None, 0.5**units, f"sign test: all {unit} changed alike"
        )
    t = abs(moments.difference) / math.sqrt(moments.variance)
    critical = student_quantile(alpha / 2, moments.degrees)
    return PairedTest(
        *_transformed_interval(moments, TRANSFORMS[transform], critical, transform),
        min(1.0, 2 * student_tail(t, moments.degrees)),
        f"paired t test over {unit}",
    )


def paired_test(one: Documents, other: Documents, alpha: float) -> PairedTest:
    """Test two runs on the same documents.

    Subtasks of a group, such as the subjects of MMLU, are strata: another draw of
    documents would have the same. p < alpha exactly where 0 is outside the interval.
    """
    clusters = one.clusters if len(set(one.clusters)) < len(one.keys) else None
    strata = [task for task, *_ in one.keys]
    before, after, weights = one.values, other.values, one.weights
    if (
        clusters is None
        and one.transform == "mean"
        and (weights == 1).all()
        and np.isin(before, (0, 1)).all()
        and np.isin(after, (0, 1)).all()
    ):
        up, down = int((after > before).sum()), int((after < before).sum())
        return mcnemar(up, down, len(before), alpha)
    sums = np.stack([weights * before, weights * after, weights])
    if np.abs(sums).max() > 1e140:
        return PairedTest(None, None, None, "none: values too large to be squared")
    return paired_t(moments_of(sums, clusters, strata), one.transform, alpha)


def unpaired_test(
    difference: float, stderrs: tuple[float, float], alpha: float
) -> PairedTest:
    """Test two scores from their standard errors, as if of different documents."""
    stderr = math.hypot(*stderrs)
    if stderr == 0:
        return PairedTest(None, None, None, "none: stderr is 0")
    half = NormalDist().inv_cdf(1 - alpha / 2) * stderr
    p = 2 * NormalDist().cdf(-abs(difference) / stderr)
    method = "unpaired z test on stderrs (weaker)"
    return PairedTest(difference - half, difference + half, p, method)


def false_discovery_rate(p_values: list[float | None]) -> list[float | None]:
    """Adjust p values after Benjamini and Hochberg; None is a test that was not made."""
    made = sorted((p for p in p_values if p is not None), reverse=True)
    adjusted, least = {}, 1.0
    for rank, p in zip(range(len(made), 0, -1), made, strict=True):
        least = min(least, p * len(made) / rank)
        adjusted[p] = least
    return [None if p is None else adjusted[p] for p in p_values]


@dataclass(frozen=True)
class Row:
    """One task and metric.

    Attributes:
        task: Task or group.
        metric: Metric with filter.
        base: Score of the base.
        run: Score of the run.
        difference: `run` - `base`.
        low: Lower end of the interval of the difference.
        high: Upper end.
        p: p of the single test.
        q: p adjusted over the tasks, for one metric of each: `acc_norm`, else the first. The
            others restate the same answers.
        documents: Documents that both were scored on.
        test: Test that was made, or why none was.
        verdict: better, worse or different (q < alpha), not shown, not tested, not comparable,
            or restated for what is not the one metric of its task.
    """

    task: str
    metric: str
    base: float
    run: float
    difference: float
    low: float | None
    high: float | None
    p: float | None
    q: float | None
    documents: int | None
    test: str
    verdict: str


def compare(
    base: Run, run: Run, alpha: float = 0.05, subtasks: bool = False
) -> tuple[list[Row], list[str]]:
    """Compare two runs, task by task.

    Args:
        base: What the other is compared with.
        run: The other.
        alpha: Level of the tests; intervals have confidence 1 - `alpha`.
        subtasks: Whether to compare the members of groups that have scores too.

    Returns:
        The rows, and notes on what the reader has to know.

    Raises:
        ResultsError: The runs have no task in common, or saw different documents.
    """
    notes = []
    for one, other in ((base, run), (run, base)):
        missing = [t for t in one.tasks(subtasks) if t not in other.tasks(True)]
        if missing:
            notes.append(f"{other.file} has no results for {', '.join(missing)}.")
    shared = [task for task in base.tasks(subtasks) if task in run.tasks(True)]
    if not shared:
        raise ResultsError(f"{base.file} and {run.file} have no task in common.")
    rows = []
    for task in shared:
        keys = [key for key in base.scores if key[0] == task and key in run.scores]
        finite = [
            key
            for key in keys
            if math.isfinite(base.scores[key]) and math.isfinite(run.scores[key])
        ]
        finite.sort(key=lambda key: not key[1].startswith("acc_norm,"))
        for key in keys:
            verdict = "not tested" if key in finite else "not comparable"
            if key in finite[1:]:
                verdict = "restated"
            pair = paired_documents(base, run, *key)
            rows.append(_row(base, run, key, pair, verdict, alpha))
            others = (
                sum(map(operator.ne, pair[0].prompts, pair[1].prompts)) if pair else 0
            )
            if others and key == keys[0]:
                notes.append(
                    f"{others} of {rows[-1].documents} documents of {task} had another prompt "
                    f"(prompt_hash) in {run.file} than in {base.file}."
                )
    adjusted = false_discovery_rate(
        [None if row.verdict == "restated" else row.p for row in rows]
    )
    rows = [
        row if q is None else replace(row, q=q, verdict=_verdict(base, row, q, alpha))
        for row, q in zip(rows, adjusted, strict=True)
    ]
    weaker = sorted({row.task for row in rows if "weaker" in row.test})
    if weaker:
        notes.append(
            f"Without usable samples, {', '.join(weaker)} had to be tested on the standard "
            "errors, as if the runs had seen different documents: evaluate with --log_samples."
        )
    return rows, notes


def _row(
    base: Run,
    run: Run,
    key: tuple[str, str],
    pair: tuple[Documents, Documents] | None,
    verdict: str,
    alpha: float,
) -> Row:
    before, after = base.scores[key], run.scores[key]
    stderrs = base.stderr(*key), run.stderr(*key)
    if verdict == "not comparable":
        named = zip(("base", "run"), (before, after), strict=True)
        bad = " and ".join(name for name, score in named if not math.isfinite(score))
        why = f"none: the score of {bad} is no finite number"
        test = PairedTest(None, None, None, why)
    elif pair:
        test = paired_test(*pair, alpha)
    elif None in stderrs:
        why = "none: neither samples nor standard errors"
        test = PairedTest(None, None, None, why)
    else:
        test = unpaired_test(after - before, stderrs, alpha)
    documents = len(pair[0].keys) if pair else None
    interval = test.low, test.high, test.p
    scores = before, after, after - before
    return Row(*key, *scores, *interval, None, documents, test.method, verdict)


def _verdict(base: Run, row: Row, q: float, alpha: float) -> str:
    if q >= alpha:
        return "not shown"
    directions = base.data.get("higher_is_better", {}).get(row.task, {})
    higher_is_better = directions.get(row.metric.partition(",")[0])
    if higher_is_better is None:
        return "different"
    return "better" if (row.difference > 0) == higher_is_better else "worse"


def as_table(rows: list[Row], notes: list[str], alpha: float) -> str:
    """Return rows and notes as Markdown."""

    def p_text(p: float | None) -> str:
        if p is None:
            return "-"
        return "<0.0001" if p < 0.0001 else f"{p:.4f}"

    header = ["task", "metric", "base", "run", "difference"]
    header += [f"{1 - alpha:.0%} interval", "p", "q", "documents", "test", "verdict"]
    lines = [header, ["---"] * 2 + ["---:"] * 7 + ["---"] * 2]
    for row in rows:
        interval = "-" if row.low is None else f"[{row.low:+.4f}, {row.high:+.4f}]"
        cells = [row.task, row.metric, f"{row.base:.4f}", f"{row.run:.4f}"]
        cells += [f"{row.difference:+.4f}", interval, p_text(row.p), p_text(row.q)]
        cells += [str(row.documents or "-"), row.test, row.verdict]
        lines.append(cells)
    table = "\n".join(f"|{'|'.join(cells)}|" for cells in lines)
    return "\n\n".join([table, *(f"Note: {note}" for note in notes)])


def as_json(rows: list[Row], notes: list[str], alpha: float) -> str:
    """Return rows and notes as JSON; numbers that are not finite become null."""

    def finite(value: Any) -> Any:
        return value if not isinstance(value, float) or math.isfinite(value) else None

    table = [{k: finite(v) for k, v in asdict(row).items()} for row in rows]
    return json.dumps({"alpha": alpha, "rows": table, "notes": notes}, indent=2)


def main(arguments: list[str] | None = None) -> None:
    """Compare what the command line names."""
    parser = argparse.ArgumentParser(
        description="Compare two runs on the documents that both were scored on."
    )
    parser.add_argument(
        "base", help="results file, or folder of `lm_eval --output_path`"
    )
    parser.add_argument("run", help="what to compare with it, likewise")
    parser.add_argument(
        "--alpha",
        type=float,
        default=0.05,
        help="level of the tests; intervals cover 1 - ALPHA (default: 0.05)",
    )
    parser.add_argument(
        "--subtasks",
        action="store_true",
        help="compare the members of groups too, such as the subjects of MMLU",
    )
    parser.add_argument("--format", choices=("table", "json"), default="table")
    args = parser.parse_args(arguments)
    if not 0 < args.alpha < 1:
        parser.error(f"--alpha {args.alpha} is not between 0 and 1.")
    try:
        base, run = read_run(args.base), read_run(args.run)
        rows, notes = compare(base, run, args.alpha, args.subtasks)
    except ResultsError as error:
        sys.exit(f"error: {error}")
    print({"table": as_table, "json": as_json}[args.format](rows, notes, args.alpha))


if __name__ == "__main__":
    main()
