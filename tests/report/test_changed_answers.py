"""Answers that changed: their counts, the page that shows them, and a report that may be published."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest

from lm_eval_pruned.compare.comparison import split_sweep
from lm_eval_pruned.report.changed_answers import (
    CSV,
    KINDS,
    LONGEST_PROMPT,
    PAGE,
    changed_answers,
)
from lm_eval_pruned.results.files import ResultsError
from lm_eval_pruned.results.runs import read_run, read_sweep
from tests.helpers.chromium import chromium_page, find_chromium
from tests.helpers.results_files import choices, pruning, write_run, write_sweep


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


def read(base, others, **options):
    """Return the section, the rows of the CSV, and the data of the page."""
    section, files = changed_answers("A model", base, others, **options)
    if section is None:
        return None, [], {}
    rows = list(csv.DictReader(io.StringIO(files[CSV])))
    (data,) = re.findall(r'id="data">(.*?)</script>', files[PAGE], re.DOTALL)
    return section, rows, json.loads(data)


def read_folder(folder, **options):
    base, others = split_sweep(list(read_sweep(folder).runs), str(folder))
    return read(base, others, **options)


def test_a_score_that_stays_hides_answers_that_change(tmp_path):
    sweep_of(
        tmp_path,
        {"quiz": {"acc,none": picks([0, 0, 1, 1, 0, 2])}},
        {"quiz": {"acc,none": picks([0, 1, 0, 2, 0, 2])}},
    )
    section, rows, data = read_folder(tmp_path)
    assert rows == [
        {
            "run": "p40",
            "expansion_ratio": "2.4",
            "task": "quiz",
            "metric": "acc,none",
            "documents": "6",
            "right_to_wrong": "1",
            "wrong_to_right": "1",
            "flipped_share": str(2 / 6),
            "changed": "3",
            "changed_share": "0.5",
        }
    ]
    assert section.table.rows == [
        ["p40 (2.40)", "quiz", "acc,none", "6", "1", "1", "50%"]
    ]
    documents = data["documents"]
    changes = [
        (documents[index]["number"], documents[index]["before"], kind, after)
        for index, _, kind, after in data["changes"]
    ]
    assert changes == [
        ("1", "one", "right to wrong", "two"),
        ("2", "two", "wrong to right", "one"),
        ("3", "two", "another wrong answer", "three"),
    ]
    assert documents[0]["expected"] == "0"


def test_documents_are_matched_whatever_their_order(tmp_path):
    answers = {"quiz": {"acc,none": picks([0, 1, 1])}}
    sweep_of(tmp_path, answers, answers)
    (file,) = tmp_path.glob("units/p40/quiz/samples_*.jsonl")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(reversed(lines)))
    _, (row,), data = read_folder(tmp_path)
    assert (row["documents"], row["changed"], data["changes"]) == ("3", "0", [])


def test_free_text_may_change_and_stay_right(tmp_path):
    sweep_of(
        tmp_path,
        {"write": {"exact_match,none": writes(["a ", "b", "c"], [1, 1, 0])}},
        {"write": {"exact_match,none": writes(["a", " x", "c"], [1, 1, 0])}},
    )
    _, (row,), data = read_folder(tmp_path)
    ((_, run, kind, after),) = data["changes"]
    assert (run, kind) == ("p40 (2.40)", "another right answer")
    assert after == "x\n\nTaken from:  x"
    assert float(row["changed_share"]) == pytest.approx(1 / 3)


def test_samples_that_do_not_name_the_answer(tmp_path):
    sweep_of(
        tmp_path,
        {"quiz": {"acc,none": [1.0, 0.0, 0.0]}},
        {"quiz": {"acc,none": [0.0, 0.0, 1.0]}},
    )
    section, (row,), _ = read_folder(tmp_path)
    assert (row["right_to_wrong"], row["wrong_to_right"]) == ("1", "1")
    assert row["changed"] == row["changed_share"] == ""
    assert section.table.rows[0][-1] == "-"


def test_tasks_without_right_and_wrong_take_another_metric_or_none(tmp_path):
    def tasks(mass, right):
        return {
            "mc2": {"acc,none": mass},
            "low": {"toxic,none": {"values": right, "higher_is_better": False}},
            "both": {"f1,none": mass, "em,none": right},
        }

    sweep_of(tmp_path, tasks([0.3, 0.6], [1.0, 0.0]), tasks([0.4, 0.5], [1.0, 1.0]))
    section, rows, _ = read_folder(tmp_path)
    assert [(row["task"], row["metric"]) for row in rows] == [("both", "em,none")]
    assert section.notes[0].endswith(": low, mc2.")


def test_a_group_is_counted_over_its_members(tmp_path):
    for name, percent, answers in (("base", 0, [0, 1]), ("p40", 40, [1, 1])):
        write_run(
            tmp_path / name,
            {task: {"acc,none": picks(answers)} for task in ("a", "b")},
            pruning=pruning(percent),
            groups={"both": ["a", "b"]},
            group_scores={"both": {"acc,none": 0.5}},
        )
    base, other = (read_run(tmp_path / name) for name in ("base", "p40"))
    _, (row,), data = read(base, [other])
    assert (row["task"], row["documents"], row["right_to_wrong"]) == ("both", "4", "2")
    assert {each["leaf"] for each in data["documents"]} == {"a", "b"}


def test_without_samples(tmp_path):
    for name, percent in (("base", 0), ("p40", 40)):
        tasks = {"quiz": {"acc,none": [1.0]}}
        write_run(tmp_path / name, tasks, pruning=pruning(percent), samples=False)
    base, other = (read_run(tmp_path / name) for name in ("base", "p40"))
    assert changed_answers("A model", base, [other]) == (None, {})


def test_samples_that_were_cut_off(tmp_path):
    answers = {"quiz": {"acc,none": picks([0, 0])}}
    sweep_of(tmp_path, answers, answers)
    (file,) = tmp_path.glob("units/p40/quiz/samples_*.jsonl")
    file.write_text(file.read_text()[:-40])
    with pytest.raises(ResultsError, match="not whole JSON"):
        read_folder(tmp_path)


def test_a_document_is_kept_once_with_the_end_of_its_prompt(tmp_path):
    before = {"quiz": {"acc,none": picks([0], prompt="shot " * 999)}}
    after = {"quiz": {"acc,none": picks([1], prompt="shot " * 999)}}
    runs = {"base": (0, before), "p20": (20, after), "p40": (40, after)}
    _, _, data = read_folder(write_sweep(tmp_path, runs))
    (document,) = data["documents"]
    assert len(data["changes"]) == 2
    assert len(document["prompt"]) == LONGEST_PROMPT
    assert document["prompt"].endswith("shot  0")


MANY = 1000


def many(folder, **options):
    """Return the file of a page: of 1,000 documents of two tasks every tenth is on herons."""
    animals = ["heron" if number % 10 == 0 else "otter" for number in range(MANY)]

    def tasks(answer):
        found = {}
        for task in ("birds", "beasts"):
            asked = picks([answer(number) for number in range(MANY // 2)])
            for number, row in asked["rows"].items():
                row["arguments"] = choices(
                    f"Question {number}: where does an {animals[number]} live?",
                    [" by the river", " in the sky", " here"],
                    [-1.0] * 3,
                )["arguments"]
            found[task] = {"acc,none": asked}
        return found

    sweep_of(folder, tasks(lambda number: number % 2), tasks(lambda number: 2))
    base, others = split_sweep(list(read_sweep(folder).runs), "")
    _, files = changed_answers("A model", base, others, **options)
    file = folder / PAGE
    file.write_text(files[PAGE], encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium_page(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return many(tmp_path_factory.mktemp("many"))


def test_the_page_needs_nothing_and_runs_one_script_alone(file):
    page = file.read_text(encoding="utf-8")
    assert len(re.findall(r"<script", page)) == 2
    assert set(re.findall(r'(?:src|href)="([^"]*)"', page)) == {"report.html"}
    assert "default-src 'none'" in page
    assert "innerHTML" not in page
    assert re.findall(r"script-src '(sha256-[^']+=)'", page)


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium to look with")
class TestPage:
    def choose(self, browser, **values):
        """Set filters as somebody would who clicks and types."""
        for name, value in values.items():
            browser.run(
                f"(() => {{ const e = document.forms[0].elements[{name!r}];"
                f" e.value = {json.dumps(value)};"
                f" e.dispatchEvent(new Event('input', {{bubbles: true}})); }})()"
            )

    def count(self, browser):
        text = browser.run("document.querySelector('output').textContent")
        return int(text.split(" of ")[0])

    def rows(self, browser):
        return browser.run(
            "[...document.querySelectorAll('tbody tr')].map(e => e.textContent)"
        )

    def test_filters_and_search(self, browser, file):
        browser.errors.clear()
        browser.open(file)
        assert self.count(browser) == MANY
        assert len(self.rows(browser)) == 200
        first = self.rows(browser)[0]
        assert first.startswith("right to wrong")
        for text in ("Question 0", "by the river", "here", "p40 (2.40)", "beasts"):
            assert text in first
        self.choose(browser, task="beasts")
        assert self.count(browser) == MANY // 2
        self.choose(browser, kind=KINDS[2])
        assert self.count(browser) == MANY // 4
        self.choose(browser, run="p40 (2.40)", words="HERON")
        assert self.count(browser) == 0
        self.choose(browser, task="", run="", kind="")
        assert self.count(browser) == MANY // 10
        self.choose(browser, words="heron 490:")
        assert len(self.rows(browser)) == 2
        assert not browser.errors

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("width", [390, 1280])
    def test_nothing_is_cut_off(self, browser, file, scheme, width):
        browser.open(file, width=width, height=844, scheme=scheme)
        root = "document.documentElement"
        assert browser.run(f"{root}.scrollWidth == {root}.clientWidth")
        ground = browser.run("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(255, 255, 255)") == (scheme == "light")

    @pytest.mark.parametrize("hostile", HOSTILE)
    def test_texts_are_never_markup(self, browser, tmp_path, hostile):
        asked = {"prompt": hostile, "endings": (f"{hostile} 1", f"{hostile} 2")}
        free = [hostile, hostile + "2"]

        def tasks(answer):
            return {
                "quiz": {"acc,none": picks([answer], **asked)},
                "free": {"em,none": writes([free[answer]], [1 - answer])},
            }

        sweep_of(tmp_path, tasks(0), tasks(1))
        base, others = split_sweep(list(read_sweep(tmp_path).runs), "")
        _, files = changed_answers(f"A model {hostile}", base, others)
        file = tmp_path / PAGE
        # A title of a half character cannot be written.
        file.write_text(files[PAGE], encoding="utf-8", errors="replace")
        browser.errors.clear()
        browser.requests.clear()
        browser.open(file)
        assert self.count(browser) == 2
        assert browser.run("document.querySelectorAll('script, img').length") == 2
        assert browser.run("document.title").startswith("Changed answers: A model")
        written = browser.run(
            "[...document.querySelectorAll('.text')].map(e => e.textContent.trim())"
        )
        assert hostile.strip() in written or hostile.strip() + " 1" in written
        assert not browser.errors
        assert set(browser.requests) == {file.as_uri()}

    def test_without_texts_filters_still_work(self, browser, tmp_path):
        browser.open(many(tmp_path, texts=False))
        self.choose(browser, task="birds")
        assert self.count(browser) == MANY // 2
        page = browser.run("document.body.innerText")
        assert "--no_texts" in page
        assert "heron" not in page


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

    @pytest.mark.slow
    def test_table_link_and_the_one_page_with_texts(self, sweep, write):
        files = write(sweep)
        found = {f.name for f in files if self.WORD.encode() in f.read_bytes()}
        assert found == {"flips.html"}
        text = (sweep / "report/report.md").read_text(encoding="utf-8")
        assert "|p40 (2.40)|quiz|acc,none|4|1|1|75%|" in text
        assert "](flips.html)" in text
        assert "](flips.csv)" in text
        assert "arXiv 2407.09141" in text
        page = (sweep / "report/report.html").read_text(encoding="utf-8")
        assert '<a href="flips.html">' in page

    @pytest.mark.slow
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

    @pytest.mark.slow
    def test_a_report_without_samples_leaves_no_old_page(self, sweep, write):
        write(sweep)
        for file in sweep.glob("units/*/*/samples_*.jsonl"):
            file.unlink()
        write(sweep, texts=False)
        assert not (sweep / "report/flips.html").exists()
        assert not (sweep / "report/flips.csv").exists()
        assert "flips.html" not in (sweep / "report/report.html").read_text()
