"""`docs/quickstart.ipynb` runs and shows what it gives."""

from __future__ import annotations

import platform
import re
import runpy

import nbformat
import pytest

from tests.helpers.checkpoints import ROOT


NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
#: One answer of 120 may tip where another processor rounds otherwise.
TOLERANCE = {"mc1": 1.5 / 120, "mc2": 0.002}


@pytest.fixture(scope="module")
def kept():
    """The notebook with the outputs that are kept in the repository."""
    return nbformat.read(NOTEBOOK, as_version=4)


def outputs(notebook, kind: str) -> list[str]:
    """Return the outputs of one kind, such as ``text/html``; ``stdout`` is what was printed."""
    return [
        output.text if "text" in output else output.data[kind]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if kind == output.get("name") or kind in output.get("data", {})
    ]


def scores(notebook) -> list[dict[str, str]]:
    """Return the rows of the table of differences."""
    (table,) = outputs(notebook, "text/html")
    header, *rows = (
        re.findall(r"<t[hd]>(.*?)</t[hd]>", row)
        for row in re.findall(r"<tr.*?</tr>", table, re.DOTALL)
    )
    return [dict(zip(header, row, strict=True)) for row in rows]


@pytest.mark.slow
def test_a_fresh_run_gives_what_the_notebook_shows(kept, real_model, tmp_path):
    """`python docs/make_quickstart.py` keeps the outputs of a new run."""

    def widths(notebook):
        # What a pruned model stammers hangs on the last digits of its logits.
        text = "".join(outputs(notebook, "stdout"))
        return re.findall(r"[\d,]+ neurons .* parameters", text)

    make = runpy.run_path(str(ROOT / "docs" / "make_quickstart.py"))
    fresh = make["executed"](tmp_path)
    assert outputs(fresh, "text/markdown") == outputs(kept, "text/markdown")
    for now, then in zip(scores(fresh), scores(kept), strict=True):
        assert (now["run"], now["metric"]) == (then["run"], then["metric"])
        for column in ("base_score", "score"):
            about = pytest.approx(float(then[column]), abs=TOLERANCE[now["metric"]])
            assert float(now[column]) == about
    assert widths(fresh) == widths(kept)
    assert len(widths(kept)) == 3
    assert "is Paris" in "".join(outputs(fresh, "stdout"))


def test_the_kept_outputs_are_of_one_whole_run_and_tell_nothing_of_the_machine(kept):
    cells = [cell for cell in kept.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    shown = str([cell.outputs for cell in cells])
    assert not re.search(r"/(?:home|root|tmp|usr|Users|work)/|[A-Z]:\\\\", shown)
    assert platform.node() not in shown
