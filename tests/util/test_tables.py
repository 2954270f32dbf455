from __future__ import annotations

import re

import pytest

from lm_eval_pruned.util.tables import markdown_table


def test_a_table():
    assert markdown_table(["task", "n"], [["a", 1], ["b", 20]], "lr") == (
        "|task|n|\n|---|---:|\n|a|1|\n|b|20|"
    )


@pytest.mark.parametrize("text", ["a|b", "a\nb", "|", "\r\n", "a\\", "a\\|b"])
def test_no_cell_ends_early_or_breaks_its_row(text):
    table = markdown_table(["x", text], [["1", text]], "ll")
    lines = table.splitlines()
    assert len(lines) == 3
    assert all(re.sub(r"\\.", "", line).count("|") == 3 for line in lines)


@pytest.mark.parametrize(
    ("rows", "align", "message"),
    [
        ([["a"]], "lr", "row 1 is for 1 columns of 2"),
        ([["a", 1, 2]], "lr", "row 1 is for 3 columns of 2"),
        ([["a", 1]], "l", "align is for 1 columns of 2"),
        ([["a", 1]], "lc", "align='lc' has other letters than l, r"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(rows, align, message):
    with pytest.raises(ValueError, match=message):
        markdown_table(["task", "n"], rows, align)
