from __future__ import annotations

import re

import pytest

from lm_eval_pruned.util.tables import Column, Table, csv_table, markdown_table


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, r"|task|n| |---|---:| |a\|b|1| |b|20000|"),
        ({"align": "ll"}, r"|task|n| |---|---| |a\|b|1| |b|20000|"),
        ({"padded": True}, r"|task|    n| |----|----:| |a\|b|    1| |b   |20000|"),
    ],
)
def test_a_table(how, expected):
    table = markdown_table(["task", "n"], [["a|b", 1], ["b", 20_000]], **how)
    assert table == expected.replace("| |", "|\n|")


@pytest.mark.parametrize("text", ["a|b", "a\nb", "|", "\r\n", "a\\", "a\\|b"])
def test_no_cell_ends_early_or_breaks_its_row(text):
    lines = markdown_table(["x", text], [["1", text]], "ll").splitlines()
    assert [re.sub(r"\\.", "", line).count("|") for line in lines] == [3, 3, 3]


def test_csv_quotes_what_would_end_a_cell():
    rows = [{"task": 'a,"b"', "n": None}, {"n": 1, "task": "c"}]
    risky = [{"name": text} for text in ("=HYPERLINK(1)", "+1", "-1", "@x", "a=1")]
    assert csv_table(risky) == "name\n'=HYPERLINK(1)\n'+1\n'-1\n'@x\na=1\n"
    assert csv_table([{"score": -1.5}]) == "score\n-1.5\n"
    assert csv_table(rows) == 'task,n\n"a,""b""",\nc,1\n'


def test_what_a_row_says_is_asked_once_however_often_a_table_is_shown():
    values = []
    column = Column("n", lambda row: values.append(row) or row, "d")
    table = Table("Numbers", [column], [1, 2])
    shown = table.markdown(), table.markdown(padded=True), table.is_wide
    assert shown[0] == "|n|\n|---:|\n|1|\n|2|"
    assert values == [1, 2]
