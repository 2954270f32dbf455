"""What a report says of sizes that were trained again, and of neurons that were removed at random."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest

from lm_eval_pruned.compare.comparison import compare, split_sweep
from lm_eval_pruned.compare.pairing import DocumentReader
from lm_eval_pruned.compare.statistics import paired_difference
from lm_eval_pruned.report.pairs import healing_section, random_section
from lm_eval_pruned.report.report import as_csv
from lm_eval_pruned.report.sections import scores_section
from lm_eval_pruned.results.groups import series_of
from lm_eval_pruned.results.runs import read_sweep
from tests.helpers.results_files import pruning, write_sweep


HEALING = {
    "method": "lora",
    "teacher": {"weight": 0.5, "temperature": 1.0},
    "data": {"file": "text.jsonl", "sha256": "0" * 64, "texts": 9, "tokens": 99},
    "steps": 200,
    "tokens_seen": 819200,
    "seconds": 1234.5,
    "energy": {
        "meter": "a meter",
        "joules": {"cpu": 400.0, "gpu": None, "ram": 100.0, "total": 51234.0},
        "sources": {"cpu": "modelled", "gpu": "none", "ram": "constant"},
        "notes": [],
    },
}
N = 200


def answers(share: float) -> list[float]:
    order = np.random.default_rng(11).permutation(N)
    return (order < share * N).astype(float).tolist()


def tasks(knows: float, true: float = 0.4) -> dict:
    return {
        "mmlu": {"acc,none": answers(knows)},
        "truthfulqa_mc2": {"acc,none": answers(true)},
    }


@pytest.fixture
def folder(tmp_path):
    runs = {"base": (0, tasks(0.8))}
    for percent, before, after in ((20, 0.6, 0.7), (40, 0.3, 0.5), (60, 0.2, 0.4)):
        runs[f"p{percent}"] = percent, tasks(before)
        runs[f"p{percent}_healed"] = percent, tasks(after)
    write_sweep(tmp_path, runs)
    for file in tmp_path.glob("units/*_healed/*/results_*.json"):
        set_healing(file, HEALING)
    return tmp_path


def set_healing(file, healing):
    results = json.loads(file.read_text())
    results["config"]["healing"] = healing
    file.write_text(json.dumps(results))


def keep(folder, *names):
    """Leave these configurations in a sweep."""
    definition = json.loads((folder / "sweep.json").read_text())
    definition["configurations"] = [{"id": name} for name in ("base", *names)]
    (folder / "sweep.json").write_text(json.dumps(definition))


def runs_of(folder):
    return split_sweep(list(read_sweep(folder).runs), "")


def healing_of(folder):
    return healing_section(runs_of(folder)[1], 0.05, DocumentReader())


def cells(section):
    titles = section.table.columns
    return [
        dict(zip(titles, (cell.text for cell in row), strict=True))
        for row in section.table.cells()
    ]


def test_healed_sizes_are_a_series_of_their_own(folder):
    series = series_of(read_sweep(folder).runs)
    healed = series["maw, healed by lora with teacher 0.5"]
    assert [run.name for run in series["maw"]] == ["base", "p20", "p40", "p60"]
    assert [run.name for run in healed][1:] == [f"p{p}_healed" for p in (20, 40, 60)]


def test_scores_and_csv_tell_them_apart(folder):
    base, others = runs_of(folder)
    comparison = compare(base, others)
    table = scores_section(base, others, comparison).table
    assert "p40_healed (2.40)" in table.columns
    rows = list(csv.DictReader(io.StringIO(as_csv(base, others, comparison))))
    assert {row["run"]: row["healed_by"] for row in rows} == {
        "base": "",
        **{f"p{percent}": "" for percent in (20, 40, 60)},
        **{f"p{p}_healed": "lora with teacher 0.5" for p in (20, 40, 60)},
    }


def test_the_cost(folder):
    nothing = dict.fromkeys(("cpu", "gpu", "ram", "total"))
    energy = {"meter": None, "joules": nothing, "sources": None, "notes": ["no meter"]}
    for file in folder.glob("units/p20_healed/*/results_*.json"):
        set_healing(file, {**HEALING, "energy": energy})
    first, second, _ = healing_of(folder).notes
    start = (
        "lora with teacher 0.5, text text.jsonl, steps 200, tokens_seen 819200, "
        "seconds 1234.5, joules "
    )
    assert first == f"p20_healed (3.20): {start}not measured, no meter"
    end = "51234.0, cpu modelled, gpu none, ram constant"
    assert second == f"p40_healed (2.40): {start}{end}"


def test_after_is_tested_against_before(folder):
    section = healing_of(folder)
    rows = cells(section)
    assert [row["run"] for row in rows[:3]] == [
        f"{after} against p{percent}"
        for after, percent in (
            ("p20_healed (3.20)", 20),
            ("p40_healed (2.40)", 40),
            ("p60_healed (1.60)", 60),
        )
    ]
    assert [rows[1][name] for name in ("task", "base", "score", "difference")] == [
        *("mmlu", "0.3000", "0.5000", "+0.2000")
    ]
    assert rows[1]["verdict"] == "better"
    test = paired_difference(answers(0.3), answers(0.5))
    assert rows[1]["95% interval"] == f"[{test.low:+.4f}, {test.high:+.4f}]"
    assert {row["verdict"] for row in rows[3:]} == {"not shown"}
    assert section.table.cells()[1][-1].mark == "better"


def test_without_samples_the_test_is_that_of_compare(folder):
    for file in folder.glob("units/p20_healed/mmlu/samples_*"):
        file.unlink()
    section = healing_of(folder)
    row = cells(section)[0]
    assert (row["verdict"], row["difference"]) == ("not tested", "+0.1000")
    assert row["q"] == row["95% interval"] == "-"
    assert "none: neither samples nor standard errors" in section.paragraphs[1]


def test_without_the_size_before_there_is_its_cost_alone(folder):
    keep(folder, "p20_healed")
    section = healing_of(folder)
    assert (section.table, len(section.notes)) == (None, 1)


def test_a_sweep_without_healing_says_nothing(folder):
    keep(folder, "p20")
    assert healing_of(folder) is None


def test_a_criterion_is_tested_against_random_cuts_of_its_size(tmp_path):
    chance = {
        f"r{percent}_{seed}": (
            pruning(percent, criterion="random", seed=seed),
            tasks(0.25 + 0.01 * seed),
        )
        for percent in (20, 40)
        for seed in (0, 1)
    }
    runs = {"base": (0, tasks(1.0)), "p20": (20, tasks(0.9)), "p40": (40, tasks(0.27))}
    # No random one has this size.
    runs["p60"] = 60, tasks(0.2)
    _, others = runs_of(write_sweep(tmp_path, runs | chance))
    section = random_section(others, 0.05, DocumentReader())
    names = ("run", "task", "base", "score", "difference", "verdict")
    rows = [[row[name] for name in names] for row in cells(section)]
    assert rows[:4] == [
        [f"{run} against {control}", "mmlu", before, after, difference, verdict]
        for run, control, before, after, difference, verdict in (
            ("p20 (3.20)", "r20_0", "0.2500", "0.9000", "+0.6500", "better"),
            ("p20 (3.20)", "r20_1", "0.2600", "0.9000", "+0.6400", "better"),
            ("p40 (2.40)", "r40_0", "0.2500", "0.2700", "+0.0200", "not shown"),
            ("p40 (2.40)", "r40_1", "0.2600", "0.2700", "+0.0100", "not shown"),
        )
    ]
    assert {row[-1] for row in rows[4:]} == {"not shown"}
    (note,) = section.notes
    assert note.startswith("Nothing of the size of p60 (1.60) was cut at random.")
    assert "--criteria maw random --seeds 0 1 2;" in note
    assert random_section(others[:2] + others[3:], 0.05, DocumentReader()).notes == []
    assert random_section([], 0.05, DocumentReader()) is None
