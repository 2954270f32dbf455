"""Flips: which answers changed, the table of them, and a report that may be published."""

from __future__ import annotations

import csv
import json

import pytest

from lm_eval_pruned.compare.comparison import split_sweep
from lm_eval_pruned.report.flips import find_flips
from lm_eval_pruned.report.flips_page import script_json
from lm_eval_pruned.results.files import ResultsError
from lm_eval_pruned.results.runs import read_run
from lm_eval_pruned.results.sweep_results import read_sweep
from tests.helpers.results_files import pruning, write_run, write_sweep
from tests.results.test_answers import choices


HOSTILE = (
    "</script><script>document.title='run'</script>",
    "<!--<script>",
    "<img src=x onerror=\"document.title='run'\">",
    "]]>&lt;&amp;{{ 7*7 }}{% raw %}",
    "\u2028\u2029\ud800\x00\x1b",
    "=HYPERLINK(0)|`$x$`",
)


def picks(answers, *, target=0, prompt="Which?", endings=(" one", " two", " three")):
    """Return a task of multiple choice in which a model picked `answers`."""
    rows = {
        number: choices(
            f"{prompt} {number}",
            list(endings),
            [-1.0 if index == answer else -2.0 for index in range(len(endings))],
            target=str(target),
        )
        for number, answer in enumerate(answers)
    }
    return {"values": [float(answer == target) for answer in answers], "rows": rows}


def writes(texts, right):
    """Return a task of free text."""
    rows = {
        number: {
            "arguments": {"gen_args_0": {"arg_0": f"Write {number}", "arg_1": {}}},
            "resps": [[text]],
            "filtered_resps": [text.strip()],
        }
        for number, text in enumerate(texts)
    }
    return {"values": [float(each) for each in right], "rows": rows}


def sweep_of(folder, before, after):
    return write_sweep(folder, {"base": (0, before), "p40": (40, after)})


def flips_of(folder):
    base, others = split_sweep(list(read_sweep(folder).runs), str(folder))
    return find_flips(base, others)


def test_a_score_that_stays_hides_answers_that_change(tmp_path):
    sweep_of(
        tmp_path,
        {"quiz": {"acc,none": picks([0, 0, 1, 1, 0, 2])}},
        {"quiz": {"acc,none": picks([0, 1, 0, 2, 0, 2])}},
    )
    counts = flips_of(tmp_path)
    (row,) = counts.rows
    assert (row.run, row.task, row.metric, row.documents) == (
        *("p40", "quiz", "acc,none"),
        6,
    )
    assert (row.right_to_wrong, row.wrong_to_right, row.changed) == (1, 1, 3)
    assert row.flipped_share == pytest.approx(2 / 6)
    assert row.changed_share == pytest.approx(0.5)
    assert [(each.question.number, each.kind) for each in counts.changed] == [
        ("1", "right to wrong"),
        ("2", "wrong to right"),
        ("3", "another wrong answer"),
    ]
    assert counts.changed[0].before.chosen == "0"
    assert counts.changed[0].after.chosen == "1"


def test_documents_are_matched_whatever_their_order(tmp_path):
    sweep_of(
        tmp_path,
        {"quiz": {"acc,none": picks([0, 1, 1])}},
        {"quiz": {"acc,none": picks([0, 1, 1])}},
    )
    (file,) = tmp_path.glob("units/p40/quiz/samples_*.jsonl")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(reversed(lines)))
    (row,) = flips_of(tmp_path).rows
    assert (row.documents, row.changed) == (3, 0)


def test_free_text_may_change_and_stay_right(tmp_path):
    sweep_of(
        tmp_path,
        {"write": {"exact_match,none": writes(["a ", "b", "c"], [1, 1, 0])}},
        {"write": {"exact_match,none": writes(["a", "x", "c"], [1, 1, 0])}},
    )
    counts = flips_of(tmp_path)
    assert [each.kind for each in counts.changed] == ["another right answer"]
    assert counts.rows[0].changed_share == pytest.approx(1 / 3)


def test_samples_that_do_not_name_the_answer(tmp_path):
    sweep_of(
        tmp_path,
        {"quiz": {"acc,none": [1.0, 0.0, 0.0]}},
        {"quiz": {"acc,none": [0.0, 0.0, 1.0]}},
    )
    (row,) = flips_of(tmp_path).rows
    assert (row.right_to_wrong, row.wrong_to_right, row.changed) == (1, 1, None)
    assert row.changed_share is None


def test_tasks_without_right_and_wrong_take_another_metric_or_none(tmp_path):
    def tasks(mass, right):
        return {
            "mc2": {"acc,none": mass},
            "low": {"toxic,none": {"values": right, "higher_is_better": False}},
            "both": {"f1,none": mass, "em,none": right},
        }

    sweep_of(tmp_path, tasks([0.3, 0.6], [1.0, 0.0]), tasks([0.4, 0.5], [1.0, 1.0]))
    counts = flips_of(tmp_path)
    assert [(row.task, row.metric) for row in counts.rows] == [("both", "em,none")]
    assert set(counts.not_counted) == {"mc2", "low"}


def test_a_group_is_counted_over_its_members(tmp_path):
    for name, percent, answers in (("base", 0, [0, 1]), ("p40", 40, [1, 1])):
        write_run(
            tmp_path / name,
            {task: {"acc,none": picks(answers)} for task in ("a", "b")},
            pruning=pruning(percent),
            groups={"both": ["a", "b"]},
            group_scores={"both": {"acc,none": 0.5}},
        )
    runs = [read_run(tmp_path / name) for name in ("base", "p40")]
    counts = find_flips(runs[0], runs[1:])
    (row,) = counts.rows
    assert (row.task, row.documents, row.right_to_wrong) == ("both", 4, 2)
    assert {each.leaf for each in counts.changed} == {"a", "b"}


def test_without_samples(tmp_path):
    for name, percent in (("base", 0), ("p40", 40)):
        tasks = {"quiz": {"acc,none": [1.0]}}
        write_run(tmp_path / name, tasks, pruning=pruning(percent), samples=False)
    base, other = (read_run(tmp_path / name) for name in ("base", "p40"))
    counts = find_flips(base, [other])
    assert (counts.rows, counts.not_logged) == ((), ("quiz",))


def test_samples_that_were_cut_off(tmp_path):
    sweep_of(
        tmp_path,
        {"quiz": {"acc,none": picks([0, 0])}},
        {"quiz": {"acc,none": picks([0, 1])}},
    )
    (file,) = tmp_path.glob("units/p40/quiz/samples_*.jsonl")
    file.write_text(file.read_text()[:-40])
    with pytest.raises(ResultsError, match="not whole JSON"):
        flips_of(tmp_path)


@pytest.mark.parametrize("text", HOSTILE)
def test_json_in_a_script_element_is_data(text):
    written = script_json({"text": [text]})
    assert not set("<>&\u2028\u2029") & set(written)
    written.encode("utf-8")
    assert json.loads(written) == {"text": [text]}


class TestReport:
    """The files of a report on changed answers."""

    WORD = "sesame"

    @pytest.fixture
    def sweep(self, tmp_path):
        endings = [f" {self.WORD}-choice {index}" for index in range(3)]
        asked = {"prompt": f"{self.WORD}-prompt", "endings": endings}
        free = [f"{self.WORD}-answer {number}" for number in range(3)]

        def tasks(answers, ends):
            written = writes([text + ends for text in free], [1, 0, 1])
            for row in written["rows"].values():
                row["target"] = f"{self.WORD}-target"
            docs = {number: {"q": f"{self.WORD}-doc {number}"} for number in range(4)}
            return {
                "quiz": {"acc,none": {**picks(answers, **asked), "docs": docs}},
                "free": {"em,none": written},
            }

        return sweep_of(
            tmp_path / "sweep", tasks([0, 0, 1, 2], "."), tasks([0, 1, 2, 0], "!")
        )

    @pytest.fixture
    def write(self):
        pytest.importorskip("altair", reason="plots need the extra `report`")
        from lm_eval_pruned.report.report import write_report

        return write_report

    def test_table_csv_and_link(self, sweep, write):
        write(sweep)
        text = (sweep / "report/report.md").read_text(encoding="utf-8")
        assert "|quiz|acc|4|\u22121 +1, 75%|" in text
        assert "](flips.html)" in text
        assert "](flips.csv)" in text
        assert "arXiv 2407.09141" in text
        page = (sweep / "report/report.html").read_text(encoding="utf-8")
        assert '<a href="flips.html">' in page
        with (sweep / "report/flips.csv").open(encoding="utf-8", newline="") as file:
            rows = {row["task"]: row for row in csv.DictReader(file)}
        assert rows["quiz"] == {
            "run": "p40",
            "expansion_ratio": "2.4",
            "task": "quiz",
            "metric": "acc,none",
            "documents": "4",
            "right_to_wrong": "1",
            "wrong_to_right": "1",
            "flipped_share": "0.5",
            "changed": "3",
            "changed_share": "0.75",
        }

    def test_texts_stand_in_the_page_alone(self, sweep, write):
        found = {
            file.name
            for file in write(sweep)
            if self.WORD.encode() in file.read_bytes()
        }
        assert found == {"flips.html"}

    def test_no_texts_leaves_every_text_out(self, sweep, write, capsys):
        from lm_eval_pruned.cli import main

        # Those of an earlier report go, too.
        write(sweep)
        assert main(["report", str(sweep), "--no_texts"]) == 0
        files = [path for path in (sweep / "report").rglob("*") if path.is_file()]
        assert len(files) > 4
        for file in files:
            assert self.WORD.encode() not in file.read_bytes(), file
        page = (sweep / "report/flips.html").read_text(encoding="utf-8")
        (samples,) = sweep.glob("units/base/quiz/samples_*.jsonl")
        line = samples.read_text().splitlines()[1]
        assert json.loads(line)["doc_hash"][:16] in page
        assert (sweep / "report/flips.csv").read_text().count("\n") == 3

    def test_a_report_without_samples_leaves_no_old_page(self, sweep, write):
        write(sweep)
        for file in sweep.glob("units/*/*/samples_*.jsonl"):
            file.unlink()
        write(sweep, texts=False)
        assert not (sweep / "report/flips.html").exists()
        assert not (sweep / "report/flips.csv").exists()
        assert "flips.html" not in (sweep / "report/report.html").read_text()
