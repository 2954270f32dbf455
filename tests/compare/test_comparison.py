"""What `compare` finds between results as the harness writes them."""

from __future__ import annotations

import numpy as np
import pytest

from lm_eval_pruned.compare import comparison
from lm_eval_pruned.compare.margins import Margin
from lm_eval_pruned.results.documents import TRANSFORMS, Transform
from lm_eval_pruned.results.files import ResultsError
from lm_eval_pruned.results.runs import read_run
from tests.helpers.results_files import pruning, spread, write_run, write_sweep


N = 80
NOISE = np.random.default_rng(0).normal(0, 0.1, size=(6, N))


def acc(share: float, n: int = N) -> dict:
    return {"acc,none": spread(share, n)}


def runs(tmp_path, *tasks, **options):
    return [
        read_run(write_run(tmp_path / str(number), each, **options), str(number))
        for number, each in enumerate(tasks)
    ]


def rows_of(base, *others, **options):
    """Return rows by run and task, of the primary metric."""
    rows = comparison.compare(base, others, **options).rows
    return {(row.run, row.task): row for row in rows if row.primary}


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
    sizes = {f"p{size}": (size, {"tf": acc(1)}) for size in (0, 20, 40, 60)}
    whole = str(write_sweep(tmp_path / "whole", sizes))
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
        values = np.array(spread(0.5, n))
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


def test_a_plain_margin_is_below_the_largest_difference_of_the_metric():
    with pytest.raises(ValueError, match=r"5 allows .* of boolq acc, .* mean 5pt\?"):
        Margin("not_worse", "5").check("boolq", "acc,none")
    for text in ("5pt", "5%", "0.5"):
        Margin("not_worse", text).check("task", "acc,none")
    for metric in ("word_perplexity,none", "bits_per_byte,none", "bleu,none"):
        Margin("not_worse", "5").check("task", metric)
