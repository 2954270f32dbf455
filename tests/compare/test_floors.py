"""What is said of a score beside its floor: standing, collapse, agreement with the unpruned model."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lm_eval_pruned.compare import comparison, pairing
from lm_eval_pruned.results.files import ResultsError
from lm_eval_pruned.results.samples import Samples
from tests.helpers.results_files import (
    answered,
    pruning,
    write_run,
    write_sweep,
    written,
)


N = 80
RIGHTS = [int(n % 5 < 3) for n in range(N)]


def knowing(share: float) -> list[int]:
    """Return picks of which a share is right."""
    return [r if n < share * N else 1 - r for n, r in enumerate(RIGHTS)]


def tasks(picks, right, text: str) -> dict:
    texts = [f"{text} {n}" for n in range(N)]
    return {
        "boolq": answered(picks, RIGHTS),
        "ifeval": written(texts, [float(n < right * N) for n in range(N)]),
    }


CONSTANT = {
    "boolq": answered([0] * N, RIGHTS),
    "ifeval": written(["Yes"] * N, [float(n < 30) for n in range(N)]),
}


def sweep(folder, floors=True, ifeval=0.3):
    runs = {
        "base": (0, tasks(knowing(0.9), ifeval, "A")),
        "p20": (20, tasks(knowing(0.8), 0.8, "A")),
        "p40": (40, tasks([1] * N, 0.35, "B")),
        "random": (pruning(40, criterion="random"), tasks([0] * N, 0.3, "C")),
    }
    return write_sweep(
        folder, runs | ({"floor-yes": ("constant", CONSTANT)} if floors else {})
    )


def rows_of(folder, **options):
    found = comparison.compare(*comparison.read_comparands([str(folder)]), **options)
    return found, {(row.run, row.task): row for row in found.rows}


def test_floors_change_nothing_but_what_is_said_of_them(tmp_path):
    found, rows = rows_of(sweep(tmp_path / "with"))
    _, without = rows_of(sweep(tmp_path / "without", floors=False))
    assert rows.keys() == without.keys()
    for key, row in rows.items():
        other = without[key]
        assert (row.p, row.q, row.low) == (other.p, other.q, other.low)
        assert row.answers == other.answers
    # Free texts have no floor but that of the run, and the samples tell the others.
    of_samples = {(run, "boolq") for run in ("p20", "p40", "random")}
    assert {key for key, row in without.items() if row.floor} == of_samples
    assert rows["p20", "ifeval"].said == "better"
    assert rows["p40", "ifeval"].said == "not shown (at floor)"
    notes = "\n".join(found.notes)
    assert (
        "ifeval: base is not shown to be above the floor (0.3000, and the floor is 0.3750"
        in notes
    )
    assert (
        "boolq: the answers collapse to one. Share of the commonest answer: 60% of base"
        in notes
    )
    assert rows["p20", "boolq"].floor.above_floor
    # Two runs are asked about, the random control apart.
    p = [rows[run, "ifeval"].floor.p_floor for run in ("p20", "p40")]
    assert rows["p20", "ifeval"].floor.q_floor == pytest.approx(2 * min(p))
    random = rows["random", "ifeval"].floor
    assert random.p_floor == random.q_floor
    assert [each.above_floor for each in found.floors] == [True, False]


def test_agreement_sees_what_scores_do_not(tmp_path):
    _, rows = rows_of(sweep(tmp_path))
    boolq, ifeval = (rows["p40", task].answers for task in ("boolq", "ifeval"))
    base = np.array(knowing(0.9))
    assert boolq.equal_answers == pytest.approx(np.mean(base == 1))
    # Log-likelihoods are -1 and -2, so that a changed choice has one divergence.
    p = np.exp([-1, -2]) / np.exp([-1, -2]).sum()
    changed = stats.entropy(p, p[::-1])
    assert boolq.kl == pytest.approx(changed * np.mean(base != 1))
    assert (boolq.base_commonest, boolq.commonest) == (np.mean(base), 1)
    assert (ifeval.equal_answers, ifeval.kl) == (0, None)
    assert ifeval.beginning is not None and boolq.beginning is None
    assert rows["p20", "ifeval"].answers.equal_answers == 1


@pytest.mark.parametrize("seed", range(5))
def test_divergence(seed):
    one, other = np.random.default_rng(seed).normal(-20, 9, size=(2, seed + 2))

    def divergence(before, after):
        pair = (Samples.of([None], [x], [None], [""], [()]) for x in (before, after))
        return pairing.divergence(*pair).item()

    found = divergence(one, other)
    p, q = (np.exp(each - each.max()) for each in (one, other))
    assert found == pytest.approx(stats.entropy(p, q))
    assert divergence(one - 700, other + 3) == pytest.approx(found)
    assert divergence(one, one) == 0
    never = [-math.inf, *one[1:]]
    assert math.isfinite(divergence(never, other))
    assert divergence(one, never) == math.inf
    assert math.isnan(divergence(one, [0.0]))


@pytest.mark.parametrize(
    ("score", "better", "samples", "stderr", "above"),
    [
        (0.9, True, True, None, True),
        (0.9, True, False, 0.05, True),
        (0.6, True, False, 0.2, False),
        (0.9, True, False, None, None),
        (0.5, True, False, None, False),
        (0.1, False, True, None, True),
        (0.9, False, True, None, False),
        (0.9, None, True, None, "no floor"),
    ],
)
def test_a_base_against_a_floor(tmp_path, score, better, samples, stderr, above):
    def run(name, share, **more):
        values = [float(n % 10 < 10 * share) for n in range(N)]
        task = {"values": values, "higher_is_better": better, **more}
        about = {"config": {"model": "echo"}} if name == "floor" else {}
        about["samples"] = samples
        return str(write_run(tmp_path / name, {"t": {"f1,none": task}}, **about))

    stderrs = {} if stderr is None else {"stderr": stderr}
    paths = run("base", score, **stderrs), run("run", 0.5), run("floor", 0.5)
    found = comparison.compare(*comparison.read_comparands(paths))
    assert [each.above_floor for each in found.floors] == [above][: above != "no floor"]


def test_a_perfect_score_is_above_chance(tmp_path):
    folder = write_sweep(
        tmp_path,
        {f"p{size}": (size, {"boolq": answered(RIGHTS, RIGHTS)}) for size in (0, 20)},
    )
    (floor,) = rows_of(folder)[0].floors
    assert (floor.p_floor, floor.above_floor) == (pytest.approx(0.6**N), True)


def test_a_floor_of_other_documents_is_refused(tmp_path):
    folder = sweep(tmp_path, floors=False)
    few = {"boolq": answered([1] * 9, [1] * 9)}
    floor = write_run(tmp_path / "few", few, config={"model": "constant"})
    with pytest.raises(ResultsError, match="different documents"):
        comparison.compare(*comparison.read_comparands([str(folder), str(floor)]))


def test_where_less_is_better_a_model_is_above_its_floor_with_a_lower_score(tmp_path):
    losses = {"base": [0.5, 1.5] * 30, "low": [1.0, 2.0] * 30, "high": [4.0, 5.0] * 30}
    paths = []
    for name, values in losses.items():
        of = {"task": {"loss,none": {"values": values, "higher_is_better": False}}}
        configs = {"task": {"metadata": {"floors": {"loss": 3.0}}}}
        paths.append(str(write_run(tmp_path / name, of, configs=configs).parent))
    rows = comparison.compare(*comparison.read_comparands(paths)).rows
    assert [row.floor.base_above_floor for row in rows] == [True, True]
    assert [row.floor.above_floor for row in rows] == [True, False]
    assert [row.floor.kept.share for row in rows] == pytest.approx([0.75, -0.75])
