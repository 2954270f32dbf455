"""What `compare` finds between results as the harness writes them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from lm_eval_pruned.compare import comparison
from lm_eval_pruned.compare.margins import Margin
from lm_eval_pruned.results.documents import TRANSFORMS, Transform
from lm_eval_pruned.results.files import ResultsError
from lm_eval_pruned.results.runs import read_run
from tests.helpers.results_files import pruning, write_run, write_sweep


N = 80
NOISE = np.random.default_rng(0).normal(0, 0.1, size=(6, N))


def answers(share: float, n: int = N) -> list[float]:
    """Return n zeros and ones; a higher share keeps the ones of a lower share."""
    order = np.random.default_rng(7).permutation(n)
    return (order < share * n).astype(float).tolist()


def acc(share: float, n: int = N) -> dict:
    return {"acc,none": answers(share, n)}


def perplexity(shift: float, noise: int = 0) -> dict:
    """Return a perplexity that rises where `shift` falls."""
    values = list(NOISE[0] - 3 + shift + NOISE[noise] / 9)
    return {"values": values, "aggregation": "perplexity", "higher_is_better": False}


def runs(tmp_path, *tasks, **options):
    return [
        read_run(write_run(tmp_path / str(number), each, **options), str(number))
        for number, each in enumerate(tasks)
    ]


def rows_of(base, *others, **options):
    """Return rows by run and task, of the primary metric."""
    rows = comparison.compare(base, others, **options).rows
    return {(row.run, row.task): row for row in rows if row.primary}


def sweep(tmp_path):
    shares = {0: (0.8, 0.2), 20: (0.6, 0.3), 40: (0.5, 0.6), 60: (0.3, 0.5)}
    found = {
        f"p{percent}": (percent, {"mmlu": acc(knows), "tf": acc(true)})
        for percent, (knows, true) in shares.items()
    }
    # Log perplexity falls linearly with the share of right answers.
    for _, tasks in found.values():
        level = np.mean(tasks["mmlu"]["acc,none"])
        tasks["wikitext"] = {"word_perplexity,none": perplexity(20 * level - 20)}
    return write_sweep(tmp_path, found)


def test_documents_are_matched_by_hash_not_by_place(tmp_path):
    base, run = runs(tmp_path, {"tf": acc(0.4)}, {"tf": acc(0.6)})
    before = rows_of(base, run)
    rows = [json.loads(line) for line in run.samples["tf"].read_text().splitlines()]
    lines = [json.dumps(row | {"doc_id": N - row["doc_id"]}) for row in rows[::-1]]
    run.samples["tf"].write_text("\n".join(lines) + "\n")
    assert rows_of(base, run) == before


def test_a_level_is_between_0_and_1(tmp_path):
    base, run = runs(tmp_path, {"tf": acc(0.4)}, {"tf": acc(0.4)})
    for alpha in (0, 1, float("nan")):
        with pytest.raises(ValueError, match="alpha="):
            comparison.compare(base, [run], alpha=alpha)


def test_comparands(tmp_path):
    write_sweep(tmp_path / "sweep", {"p20": (20, {"tf": acc(1)})})
    with pytest.raises(ResultsError, match="no finished run of the unpruned model"):
        comparison.read_comparands([str(tmp_path / "sweep")])
    paths = [
        str(write_run(tmp_path / each, {"tf": acc(1)}).parent)
        for each in ("a/x", "b/x")
    ]
    with pytest.raises(ResultsError, match="nothing to compare"):
        comparison.read_comparands(paths[:1])
    whole = str(sweep(tmp_path / "whole"))
    base, others = comparison.read_comparands([*paths, whole])
    names = ["x", paths[1], "p20", "p40", "p60"]
    assert [base.name, *(run.name for run in others)] == names
    base, others = comparison.read_comparands([whole, paths[0]])
    assert [base.name, *(run.name for run in others)] == ["p0", "x"]


def test_what_only_one_run_has_is_named(tmp_path):
    base, run = runs(tmp_path, {"tf": acc(0.4), "ifeval": acc(0.3)}, {"tf": acc(0.4)})
    (lacking,) = comparison.compare(base, [run]).notes
    assert "1 has no results for ifeval, which 0 has" in lacking
    assert comparison.compare(base, [base]).notes == ()


@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_without_samples_each_metric_has_the_normal_interval_of_its_stderrs(
    tmp_path, alpha
):
    def tasks(*shares):
        scores = {"values": answers(shares[0]), "stderr": 0.03}
        normed = {"values": answers(shares[1]), "stderr": 0.04}
        return {"arc": {"acc,none": scores, "acc_norm,none": normed}}

    base, run = runs(tmp_path, tasks(0.5, 0.4), tasks(0.3, 0.45), samples=False)
    rows = comparison.compare(base, [run], alpha=alpha).rows
    assert {row.metric: row.primary for row in rows} == {
        "acc,none": False,
        "acc_norm,none": True,
    }
    for row, stderr in zip(rows, (0.03, 0.04), strict=True):
        half = stats.norm.isf(alpha / 2) * stderr * 2**0.5
        assert (row.low, row.high) == pytest.approx(
            (row.difference - half, row.difference + half)
        )
        z = abs(row.difference) / stderr / 2**0.5
        assert row.p == pytest.approx(2 * stats.norm.sf(z))


@pytest.mark.smoke
@pytest.mark.parametrize("samples", [True, False])
def test_a_sweep_is_compared_with_its_baseline(tmp_path, monkeypatch, samples):
    folder = sweep(tmp_path)
    for file in folder.glob("units/p40/*/samples_*.jsonl"):
        file.unlink() if not samples else None
    for name in ("default_rng", "RandomState", "Generator"):
        monkeypatch.delattr(np.random, name)
    result = comparison.compare(*comparison.read_comparands([str(folder)]))
    assert len(result.rows) == 9
    pairs = {each.tasks: each for each in result.correlations}
    one, other = ("mmlu", "acc,none"), ("wikitext", "word_perplexity,none")
    assert pairs[one, other].pearson == pytest.approx(-1)
    trends = {each.task: each for each in result.trends}
    slopes = {task: each.slope for task, each in trends.items()}
    assert slopes["mmlu"] > 0 > slopes["tf"]
    assert slopes["wikitext"] == pytest.approx(-20 * slopes["mmlu"])
    mmlu = trends["mmlu"]
    assert (mmlu.n, mmlu.series) == (4, "maw")
    tested = mmlu.p is not None and mmlu.p < mmlu.q < 1e-6
    assert (tested, "needs logged samples" in mmlu.method) == (
        samples,
        not samples,
    )


@pytest.mark.parametrize("margin", [None, Margin("not_worse", "15pt")])
def test_other_tasks_and_random_controls_are_no_part_of_the_family(tmp_path, margin):
    shares = {0: 0.5, 10: 0.4, 20: 0.48, 30: 0.47, 40: 0.1, 50: 0.1}

    def rows(name, certain: int, largest: str):
        found = []
        for percent, share in shares.items():
            held = {f"held{n}": acc(0.1 if percent else 0.9) for n in range(certain)}
            of = pruning(percent, criterion=largest if percent >= 40 else "maw")
            folder = tmp_path / name / str(percent)
            file = write_run(folder, {"asked": acc(share), **held}, pruning=of)
            found.append(read_run(file, str(percent)))
        rows = rows_of(*found, margin=margin)
        return {run: row for (run, task), row in rows.items() if task == "asked"}

    alone = rows("alone", 0, "maw")
    assert rows("beside", 3, "maw") == alone
    one, other = alone["10"], rows("random", 0, "random")["10"]
    # Where the two that lost for certain were cut at random, only three are asked about.
    assert (one.p, one.q) == pytest.approx((other.p, 5 / 3 * one.p))
    assert other.q == pytest.approx(3 * other.p)
    if margin is not None:
        assert one.claim.q == pytest.approx(5 / 3 * other.claim.q)


@pytest.mark.parametrize("claim", ["equivalent", "not_worse"])
def test_the_same_and_better_and_worse_and_not_known(tmp_path, claim):
    n = 1200

    def nearly(changed: int) -> dict:
        """Return half of the answers right, of which as many changed in each direction."""
        values = np.array(answers(0.5, n))
        for old in (0.0, 1.0):
            values[np.flatnonzero(values == old)[: changed // 2]] = 1 - old
        return {"acc,none": values.tolist()}

    after = {"up": acc(0.7, n), "down": acc(0.3, n), "same": nearly(20)}
    after |= {"few": nearly(600), "little": acc(0.51, n)}
    base, run = runs(tmp_path, {task: acc(0.5, n) for task in after}, after)
    rows = rows_of(base, run, margin=Margin(claim, "2pt"))
    assert {task: row.verdict for (_, task), row in rows.items()} == {
        "up": "better",
        "down": "worse",
        "same": claim.replace("_", " "),
        "few": "undecided",
        # Certain, and within the margin.
        "little": "equivalent" if claim == "equivalent" else "better",
    }
    assert {row.claim.margin for row in rows.values()} == {0.02}


@pytest.mark.parametrize(
    "text", ["", "pt", "-1pt", "0", "0pt", "1 point", "nan", "inf%"]
)
def test_what_is_no_margin(text):
    with pytest.raises(ValueError, match="is not a margin"):
        Margin("equivalent", text)


@pytest.mark.parametrize("form", [Transform(100.0), Transform(2.0, exponential=True)])
def test_one_row_makes_a_metric_comparable(tmp_path, monkeypatch, form):
    monkeypatch.setitem(TRANSFORMS, "new", form)
    scored = [
        {"values": [*each], "score": float(form.score(each.mean()))}
        for each in 3 + NOISE[:2]
    ]
    base, run = runs(tmp_path, *({"t": {"new,none": each}} for each in scored))
    (row,) = comparison.compare(base, [run]).rows
    assert row.method == "Gaffke's test over documents"
    assert row.difference == pytest.approx(row.score - row.base_score)
    assert row.low < row.difference < row.high
