from __future__ import annotations

import re

import numpy as np
import pytest

from lm_eval_pruned import cli
from lm_eval_pruned.compare.power import documents_for, power_of_means, power_of_shares
from lm_eval_pruned.compare.statistics import POWER, paired_difference
from tests.helpers.results_files import write_run


def counted(n: int, changed: float, margin: float, alpha: float, both: bool) -> float:
    """The same from every outcome, by the test itself."""
    from scipy import stats

    total = 0.0
    for count in range(n + 1):
        for ups in range(count + 1):
            chance = stats.binom.pmf(count, n, changed) * stats.binom.pmf(
                ups, count, 0.5
            )
            if chance < 1e-9:
                continue
            base, run = np.zeros(n), np.zeros(n)
            run[:ups] = base[ups:count] = 1
            p = paired_difference(base, run).p_outside(
                -margin, margin if both else np.inf
            )
            total += chance * (p < alpha)
    return total


@pytest.mark.parametrize(("changed", "margin"), [(0.1, 0.2), (0.3, 0.25)])
@pytest.mark.parametrize("both", [True, False])
def test_power_of_shares_is_that_of_the_test_counted_out(changed, margin, both):
    n = 24
    power = power_of_shares(changed, n, margin, 0.05)[0 if both else 1]
    assert power == pytest.approx(counted(n, changed, margin, 0.05, both), abs=1e-5)


@pytest.mark.parametrize("both", [True, False])
def test_power_of_means_is_that_of_the_test_simulated(both):
    n, margin, times = 60, 0.3, 600
    rng = np.random.default_rng(0)
    shown = sum(
        paired_difference(np.zeros(n), rng.normal(size=n)).p_outside(
            -margin, margin if both else np.inf
        )
        < 0.05
        for _ in range(times)
    )
    power = power_of_means(n**-0.5, n - 1, margin, 0.05)[0 if both else 1]
    assert shown / times == pytest.approx(power, abs=4 * (0.25 / times) ** 0.5)


@pytest.mark.parametrize("margin", [0.016, 0.02, 0.03])
def test_many_changes_are_as_good_as_normal(margin):
    n, changed = 2000, 0.099
    exact, *_ = power_of_shares(changed, n, margin, 0.05)
    normal, *_ = power_of_means((changed / n) ** 0.5, n - 1, margin, 0.05)
    assert exact == pytest.approx(normal, abs=0.01)


def test_power_rises_with_documents_and_documents_for_is_where_it_has_80_percent():
    def power(n):
        return power_of_shares(0.1, n, 0.05, 0.05)

    assert power(50)[0] < power(200)[0] < power(800)[0]
    needed = documents_for(power, 0, 10)
    assert power(needed)[0] >= POWER > power(int(needed * 0.85))[0]
    assert documents_for(lambda n: [0.5], 0, 10) is None


@pytest.fixture
def pair(tmp_path):
    rng = np.random.default_rng(1)
    before = (rng.random(300) < 0.5).astype(float)
    after = np.where(rng.random(300) < 0.1, 1 - before, before)
    soft = rng.random(300)
    return [
        str(
            write_run(
                tmp_path / name,
                {
                    "boolq": {"acc,none": acc.tolist()},
                    "tf": {"mc2,none": (soft + noise).tolist()},
                },
            )
        )
        for name, acc, noise in (
            ("a", before, 0),
            ("b", after, rng.normal(0, 0.05, size=300)),
        )
    ]


@pytest.mark.parametrize("task", ["boolq", "tf"])
def test_the_command(pair, capsys, task):
    assert cli.main(["power", task, *pair, "--margin", "0.02"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line[:1] == "|"][
        2:
    ]
    assert [re.split(r"\|", row)[6] for row in rows] == [
        "equivalent",
        "not worse",
        "better or worse",
    ]
    fewer = [int(row.split("|")[8].rstrip("%")) for row in rows]
    assert (
        cli.main(["power", task, *pair, "--margin", "0.02", "--documents", "3000"]) == 0
    )
    rows = [line for line in capsys.readouterr().out.splitlines() if line[:1] == "|"][
        2:
    ]
    more = [int(row.split("|")[8].rstrip("%")) for row in rows]
    assert all(x <= y for x, y in zip(fewer, more, strict=True))
    # To be equivalent is more than to be not worse.
    assert fewer[0] <= fewer[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["gsm8k", "--margin", "1pt"],
            "no results of gsm8k in common, but of boolq, tf",
        ),
        (["boolq", "--margin", "much"], "margin=much is no margin"),
        (["boolq", "--margin", "1pt", "--documents", "1"], "documents=1 are too few"),
        (["boolq", "--margin", "1pt", "--alpha", "0.7"], "alpha=0.7 is not between"),
    ],
)
def test_what_cannot_be_asked(pair, capsys, options, words):
    assert cli.main(["power", options[0], *pair, *options[1:]]) == 2
    assert words in capsys.readouterr().err


def test_the_current_folder_is_the_default(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["power", "boolq", "--margin", "1pt"]) == 2
    assert "power: error" in capsys.readouterr().err
