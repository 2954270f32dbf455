"""What a report says of sizes that were trained again."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest

from lm_eval_pruned.compare.comparison import compare, split_sweep
from lm_eval_pruned.compare.pairing import DocumentReader
from lm_eval_pruned.compare.statistics import paired_difference
from lm_eval_pruned.report.findings import findings
from lm_eval_pruned.report.formats import as_csv, as_markdown
from lm_eval_pruned.report.healing import healing_sections
from lm_eval_pruned.report.sections import scores_section
from lm_eval_pruned.results.groups import series_of
from lm_eval_pruned.results.runs import read_sweep
from tests.helpers.results_files import write_sweep


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


def tasks(knows: float, true: float) -> dict:
    return {
        "mmlu": {"acc,none": answers(knows)},
        "truthfulqa_mc2": {"acc,none": answers(true)},
    }


@pytest.fixture
def folder(tmp_path):
    runs = {"base": (0, tasks(0.8, 0.4))}
    for percent, before, after in ((20, 0.6, 0.7), (40, 0.3, 0.5), (60, 0.2, 0.4)):
        runs[f"p{percent}"] = percent, tasks(before, 0.4)
        runs[f"p{percent}_healed"] = percent, tasks(after, 0.4)
    write_sweep(tmp_path, runs)
    for file in tmp_path.glob("units/*_healed/*/results_*.json"):
        set_healing(file, HEALING)
    return tmp_path


def set_healing(file, healing):
    results = json.loads(file.read_text())
    results["config"]["healing"] = healing
    file.write_text(json.dumps(results))


def sections_of(folder):
    base, others = split_sweep(list(read_sweep(folder).runs), "")
    return healing_sections(base, others, 0.05, DocumentReader())


def test_healed_sizes_are_a_series_of_their_own(folder):
    series = series_of(read_sweep(folder).runs)
    assert {
        name: [run.name for run in members] for name, members in series.items()
    } == {
        "maw": ["base", "p20", "p40", "p60"],
        "maw, healed by lora with teacher 0.5": [
            "base",
            "p20_healed",
            "p40_healed",
            "p60_healed",
        ],
    }


def test_findings_say_it_of_both(folder):
    base, others = split_sweep(list(read_sweep(folder).runs), "")
    found = [each.lead for each in findings([base, *others], compare(base, others))]
    assert "Knowledge (maw) falls from 3.20 on" in found
    assert (
        "Knowledge (maw, healed by lora with teacher 0.5) falls from 3.20 on" in found
    )


def test_scores_and_csv_tell_them_apart(folder):
    base, others = split_sweep(list(read_sweep(folder).runs), "")
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
    cost, _ = sections_of(folder)
    assert [cell.text for cell in cost.table.cells()[0]] == [
        "p20_healed (3.20)",
        "lora with teacher 0.5",
        "text.jsonl",
        "200",
        "819,200",
        "1,234.5",
        "51,234",
    ]
    assert "CPU: modelled; GPU: none; RAM: constant" in cost.paragraphs[0]
    assert not cost.notes


def test_what_was_not_metered_is_said_to_be_so(folder):
    nothing = dict.fromkeys(("cpu", "gpu", "ram", "total"))
    energy = {"meter": None, "joules": nothing, "sources": None, "notes": ["no meter"]}
    for file in folder.glob("units/p20_healed/*/results_*.json"):
        set_healing(file, {**HEALING, "energy": energy})
    for file in folder.glob("units/p40_healed/*/results_*.json"):
        set_healing(file, {k: v for k, v in HEALING.items() if k != "energy"})
    cost, _ = sections_of(folder)
    assert [row[-1].text for row in cost.table.cells()] == [
        "not measured",
        "not measured",
        "51,234",
    ]
    assert cost.notes == [
        "p20_healed: no meter",
        "p40_healed: its training was not metered",
    ]


def test_after_is_tested_against_before(folder):
    _, section = sections_of(folder)
    rows = [[cell.text for cell in row] for row in section.table.cells()]
    assert [row[2] for row in rows[:3]] == ["p20 (3.20)", "p40 (2.40)", "p60 (1.60)"]
    assert rows[1][3:7] == ["0.8000", "0.3000", "0.5000", "+0.2000"]
    assert rows[1][7] == "\u25b2 significant"
    test = paired_difference(answers(0.3), answers(0.5))
    assert rows[1][8] == f"[{test.low:+.4f}, {test.high:+.4f}]"
    assert {row[7] for row in rows[3:]} == {"\u25cb no difference shown"}
    assert section.table.cells()[1][7].mark == "better"
    assert "## Healing: after against before" in as_markdown("", "", [section])


def test_without_samples_nothing_is_tested(folder):
    for file in folder.glob("units/p20_healed/mmlu/samples_*"):
        file.unlink()
    _, section = sections_of(folder)
    row = [cell.text for cell in section.table.cells()[0]]
    assert row[7] == "\u00d7 not tested: no samples of the same documents"
    assert row[4:7] == ["0.6000", "0.7000", "+0.1000"]
    assert row[10] == "-"


def test_without_the_size_before_there_is_its_cost_alone(folder):
    definition = json.loads((folder / "sweep.json").read_text())
    definition["configurations"] = [{"id": "base"}, {"id": "p20_healed"}]
    (folder / "sweep.json").write_text(json.dumps(definition))
    assert [each.heading for each in sections_of(folder)] == ["Healing: cost"]


def test_a_sweep_without_healing_says_nothing(folder):
    definition = json.loads((folder / "sweep.json").read_text())
    definition["configurations"] = [{"id": "base"}, {"id": "p20"}]
    (folder / "sweep.json").write_text(json.dumps(definition))
    assert sections_of(folder) == []
