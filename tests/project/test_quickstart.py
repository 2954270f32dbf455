"""`docs/quickstart.ipynb` runs and shows what it gives."""

from __future__ import annotations

import platform
import re
import runpy

import nbformat
import pytest

from tests.helpers.checkpoints import ROOT


NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


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


def row(table: str, name: str) -> list[float]:
    """Return the numbers in the first row of that name, without those of intervals."""
    line, *_ = re.findall(rf"(?m)^\|{name} *\|(.*)\|$", table)
    return [
        float(cell) for cell in re.findall(r"(?<=\|) *(\d+\.\d+) *(?=\|)", f"|{line}|")
    ]


@pytest.mark.slow
def test_a_fresh_run_gives_what_the_notebook_shows(kept, real_model, tmp_path):
    """`python docs/make_quickstart.py` keeps the outputs of a new run."""
    make = runpy.run_path(str(ROOT / "docs" / "make_quickstart.py"))
    now, then = (
        outputs(each, "text/markdown") for each in (make["executed"](tmp_path), kept)
    )
    assert now[0] == then[0]
    # Another processor rounds otherwise.
    unpruned, pruned, random = row(now[1], "loss, nats per token")
    expected = row(then[1], "loss, nats per token")
    assert [unpruned, pruned, random] == pytest.approx(expected, abs=0.02)
    assert unpruned < pruned < random - 1
    assert "Do not ship" in now[2] and "Do not ship" in then[2]
    scores, before = (row(each[2], "pruned_demo_truthfulness") for each in (now, then))
    assert scores == pytest.approx(before, abs=1.5 / 120)


def test_the_kept_outputs_are_of_one_whole_run_and_tell_nothing_of_the_machine(kept):
    cells = [cell for cell in kept.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    shown = str([cell.outputs for cell in cells])
    assert not re.search(r"/(?:home|root|tmp|usr|Users|work)/|[A-Z]:\\\\", shown)
    assert platform.node() not in shown


def test_the_notebook_imports_public_names_alone(kept):
    code = "\n".join(cell.source for cell in kept.cells if cell.cell_type == "code")
    assert "from lm_eval_pruned import" in code
    assert not re.search(r"lm_eval_pruned\.", code)
