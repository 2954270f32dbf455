from __future__ import annotations

import re

import pytest

from lm_eval_pruned.util.tables import csv_table, markdown_table
from tests.helpers.checkpoints import ROOT


def test_a_table():
    assert markdown_table(["task", "n"], [["a", 1], ["b", 20]], "lr") == (
        "|task|n|\n|---|---:|\n|a|1|\n|b|20|"
    )


def test_words_come_first_unless_something_else_is_said():
    rows = [["a", 1, 2]]
    table = markdown_table(["task", "n", "m"], rows)
    assert table == markdown_table(["task", "n", "m"], rows, "lrr")
    assert table != markdown_table(["task", "n", "m"], rows, "llr")


def test_a_padded_table_lines_up():
    assert markdown_table(
        ["task", "n"], [["a|b", 1], ["b", 20_000]], padded=True
    ).splitlines() == [
        "|task|    n|",
        "|----|----:|",
        r"|a\|b|    1|",
        "|b   |20000|",
    ]


def test_nothing_else_writes_tables():
    folders = ("lm_eval_pruned", "model_wrappers", "tasks", "benchmarks", "docs")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    by_hand = {
        file.relative_to(ROOT).as_posix()
        for file in files
        if re.search(r"\| ?:?--", file.read_text(encoding="utf-8"))
    }
    assert by_hand == {"lm_eval_pruned/util/tables.py"}


@pytest.mark.parametrize("text", ["a|b", "a\nb", "|", "\r\n", "a\\", "a\\|b"])
def test_no_cell_ends_early_or_breaks_its_row(text):
    table = markdown_table(["x", text], [["1", text]], "ll")
    lines = table.splitlines()
    assert len(lines) == 3
    assert all(re.sub(r"\\.", "", line).count("|") == 3 for line in lines)


@pytest.mark.parametrize(
    ("rows", "align"), [([["a"]], "lr"), ([["a", 1, 2]], "lr"), ([["a", 1]], "l")]
)
def test_a_table_that_does_not_fit_is_refused(rows, align):
    with pytest.raises(ValueError, match=r"argument \d is (shorter|longer)"):
        markdown_table(["task", "n"], rows, align)


def test_csv_quotes_what_would_end_a_cell():
    rows = [{"task": 'a,"b"', "n": None}, {"n": 1, "task": "c"}]
    assert csv_table(("task", "n"), rows) == 'task,n\n"a,""b""",\nc,1\n'
