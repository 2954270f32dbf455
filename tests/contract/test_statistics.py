"""What docs/statistics.md promises of ``compare``."""

from __future__ import annotations

import re

import numpy as np
import pytest
from scipy import stats

from tests.contract.commands import compared, in_a_terminal, pruned
from tests.helpers.results_files import losses, spread, write_run, write_two, yes_or_no


N = 80


def soft(seed, level=0.0):
    rng = np.random.default_rng(seed)
    return (0.4 + level + rng.uniform(-0.3, 0.3, size=N)).tolist()


@pytest.fixture
def rows_of(tmp_path):
    """Return the rows that `compare` makes of two runs, by task."""

    def rows_of(base, run, *words, **about):
        paths = write_two(tmp_path, base, run, **about)
        return {row["task"]: row for row in compared(*paths, *words)["rows"]}

    return rows_of


def tasks(share, seed, level=0.0):
    text = losses(np.random.default_rng(seed).normal(-3 + level, 0.2, size=N))
    return {
        "right": {"acc,none": spread(share)},
        "soft": {"mc2,none": soft(seed, level)},
        "text": {"word_perplexity,none": text},
    }


def test_in_a_terminal_the_table_has_at_most_80_columns_and_all_shows_everything(
    tmp_path,
):
    name = "a_task_whose_name_is_longer_than_a_third_of_the_terminal"
    paths = [
        write_run(
            tmp_path / f"run_with_a_long_name_{n}",
            {name: {"acc,none": spread(share), "acc_norm,none": spread(share)}},
        ).parent
        for n, share in enumerate((0.5, 0.3))
    ]

    narrow = in_a_terminal("compare", *paths)
    whole = in_a_terminal("compare", *paths, "--all")
    assert max(map(len, narrow.splitlines())) <= 80
    table = narrow.partition("|")[2]
    assert "restated" not in table and "interval" in table
    assert "\u2026" in narrow and name not in narrow
    markdown = pruned("compare", *paths).out
    # The same as elsewhere, in columns of one width.
    assert re.sub("[ -]", "", whole) == re.sub("[ -]", "", markdown)


def test_swapping_two_runs_reverses_every_sign(rows_of):
    one, other = tasks(0.5, 1), tasks(0.7, 2, 0.1)
    there, back = rows_of(one, other), rows_of(other, one)
    for task, row in there.items():
        assert back[task]["difference"] == pytest.approx(-row["difference"])
        assert back[task]["p"] == pytest.approx(row["p"])
        if task != "text":
            ends = -row["high"], -row["low"]
            assert (back[task]["low"], back[task]["high"]) == pytest.approx(ends)


@pytest.mark.parametrize("level", [0, 0.02, 0.05, 0.1])
def test_p_is_below_5_percent_exactly_if_0_is_outside_the_interval(rows_of, level):
    for row in rows_of(tasks(0.5, 1), tasks(0.5 + level, 2, level)).values():
        assert (row["p"] < 0.05) == (row["low"] > 0 or row["high"] < 0), row
        assert row["low"] <= row["difference"] <= row["high"]


def test_fewer_than_10_documents_that_are_not_right_or_wrong_are_not_tested(rows_of):
    few = [{"soft": {"mc2,none": soft(n)[:9]}} for n in (1, 2)]
    row = rows_of(*few)["soft"]
    assert (row["p"], row["low"], row["verdict"]) == (None, None, "not tested")


def test_without_a_spread_a_score_between_0_and_1_is_tested_and_a_perplexity_is_not(
    rows_of,
):
    moved = [
        {"soft": {"mc2,none": [0.5 + by] * N}, "text": {"p,none": losses([by] * N)}}
        for by in (0.0, 0.25)
    ]
    rows = rows_of(*moved)
    assert (rows["soft"]["verdict"], rows["text"]["verdict"]) == (
        "better",
        "not tested",
    )


@pytest.mark.parametrize("claim", ["--equivalent", "--not_worse"])
def test_a_perplexity_that_is_the_same_for_all_documents_is_equivalent(rows_of, claim):
    text = {"text": {"p,none": losses(np.linspace(-4, -2, 5))}}
    assert rows_of(text, text, claim, "2%")["text"]["verdict"] == claim[2:].replace(
        "_", " "
    )


def test_149_documents_without_a_change_are_needed_for_a_claim_of_2_points(rows_of):
    for documents, verdict in ((148, "undecided"), (150, "not worse")):
        run = {"soft": {"mc2,none": np.linspace(0.2, 0.9, documents).tolist()}}
        assert rows_of(run, run, "--not_worse", "2pt")["soft"]["verdict"] == verdict


def test_without_samples_standard_errors_are_tested(rows_of):
    both = [
        {"t": {"acc,none": {"values": spread(s), "stderr": 0.05}}} for s in (0.3, 0.5)
    ]
    row = rows_of(
        *({**of, "u": {"acc,none": spread(0.5)}} for of in both), samples=False
    )
    assert "unpaired z test on stderrs (weaker)" in row["t"]["method"]
    paired = rows_of(*both)["t"]
    assert row["t"]["p"] == pytest.approx(0.0047, abs=1e-4)
    assert paired["p"] < row["t"]["p"]
    half = stats.norm.isf(0.025) * 0.05 * 2**0.5
    ends = row["t"]["difference"] - half, row["t"]["difference"] + half
    assert (row["t"]["low"], row["t"]["high"]) == pytest.approx(ends)
    assert (row["u"]["p"], row["u"]["q"], row["u"]["verdict"]) == (
        None,
        None,
        "not tested",
    )


def right(share):
    return {"boolq": yes_or_no(share, 200)}


@pytest.mark.parametrize(
    ("base", "run", "kept"), [(0.9, 0.9, 1), (0.9, 0.7, 0.5), (0.9, 0.5, 0)]
)
def test_kept_is_100_percent_for_all_of_it_and_0_percent_for_the_floor(
    rows_of, base, run, kept
):
    floor = rows_of(right(base), right(run))["boolq"]["floor"]
    found = floor["kept"]
    assert found["share"] == pytest.approx(kept)
    assert found["low"] <= found["share"] <= found["high"] < found["low"] + 0.5


def test_where_the_unpruned_model_is_at_its_floor_the_task_cannot_show_a_loss(
    rows_of, tmp_path
):
    floor = rows_of(right(0.52), right(0.5))["boolq"]["floor"]
    assert (floor["base_above_floor"], floor["kept"]) == (False, None)
    table = pruned("compare", tmp_path / "base", tmp_path / "run").out
    (row,) = (line for line in table.splitlines() if "not shown (at floor)" in line)
    assert "|cannot show a loss|" in row.replace("  ", "")


def test_results_after_other_questions_are_a_floor_whatever_else_is_compared(tmp_path):
    blind = {"model": "hf-prefix", "mismatched_questions": True}
    runs = {"base": (0.9, {}), "run": (0.8, {}), "blind": (0.7, {"config": blind})}
    paths = [
        write_run(tmp_path / name, right(share), **about).parent
        for name, (share, about) in runs.items()
    ]
    (row,) = compared(*paths)["rows"]
    assert (row["run"], row["floor"]["floor_name"]) == ("run", "blind")
    assert row["floor"]["floor"] == pytest.approx(0.7)
    assert row["floor"]["kept"]["share"] == pytest.approx(0.5)
