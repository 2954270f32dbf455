"""`docs/quickstart.ipynb` runs, shows what it gives, and becomes a page of the site."""

from __future__ import annotations

import copy
import html
import platform
import re
import runpy
from types import SimpleNamespace

import nbformat
import pytest

from tests.helpers import checkpoints


ROOT = checkpoints.ROOT
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
#: One answer of 120 may tip where another processor rounds otherwise.
TOLERANCE = {"mc1": 1.5 / 120, "mc2": 0.002}


@pytest.fixture(scope="module")
def kept():
    """The notebook with the outputs that are kept in the repository."""
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def hook():
    return runpy.run_path(str(ROOT / "docs" / "notebook_hook.py"))


def outputs(notebook, kind: str) -> list[str]:
    """Return the outputs of one kind, such as ``text/html``; ``stdout`` is what was printed."""
    return [
        output.text if "text" in output else output.data[kind]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if kind == output.get("name") or kind in output.get("data", {})
    ]


def plan(notebook) -> str:
    (table,) = outputs(notebook, "text/markdown")
    return table


def comparison(notebook) -> list[dict[str, str]]:
    """Return the rows of the table of differences."""
    (table,) = outputs(notebook, "text/html")
    header, *rows = (
        [html.unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)]
        for row in re.findall(r"<tr.*?</tr>", table, re.DOTALL)
    )
    return [dict(zip(header, row, strict=True)) for row in rows]


def widths(notebook) -> list[str]:
    """Return width and parameters of each model, without the text that it generated.

    What a pruned model stammers hangs on the last digits of its logits.
    """
    return re.findall(
        r"[\d,]+ neurons .* parameters", "".join(outputs(notebook, "stdout"))
    )


def assert_same_figures(fresh, kept):
    """Fail unless widths are the same, and scores within `TOLERANCE`."""
    assert plan(fresh) == plan(kept)
    assert len(comparison(fresh)) == len(comparison(kept)) == 4
    for now, then in zip(comparison(fresh), comparison(kept), strict=True):
        assert (now["run"], now["metric"]) == (then["run"], then["metric"])
        for column in ("base_score", "score"):
            about = pytest.approx(float(then[column]), abs=TOLERANCE[now["metric"]])
            assert float(now[column]) == about
    assert widths(fresh) == widths(kept)
    assert len(widths(kept)) == 3
    for notebook in (fresh, kept):
        assert "is Paris" in "".join(outputs(notebook, "stdout"))
    assert len(outputs(fresh, "image/svg+xml")) == 1


@pytest.mark.slow
def test_a_fresh_run_gives_what_the_notebook_shows(kept, real_model, tmp_path):
    """A hang fails too.

    `python docs/make_quickstart.py` keeps the outputs of a new run.
    """
    make = runpy.run_path(str(ROOT / "docs" / "make_quickstart.py"))
    assert_same_figures(make["executed"](tmp_path), kept)


@pytest.mark.parametrize(
    ("kind", "was", "is_"),
    [
        ("text/markdown", "1,383", "1,384"),
        ("text/html", "<td>0.300</td>", "<td>0.350</td>"),
        ("text/html", "<td>0.344</td>", "<td>0.347</td>"),
        ("text/html", "ratio-2.4", "ratio-2.2"),
        ("stdout", "114,608,448", "114,608,449"),
        ("stdout", "Paris", "Rome"),
    ],
)
def test_other_figures_are_noticed(kept, kind, was, is_):
    changed = copy.deepcopy(kept)
    cells = [cell for cell in changed.cells if cell.cell_type == "code"]
    for output in (output for cell in cells for output in cell.outputs):
        if kind == output.get("name"):
            output.text = output.text.replace(was, is_)
        elif kind in output.get("data", {}):
            output.data[kind] = output.data[kind].replace(was, is_)
    assert_same_figures(kept, kept)
    with pytest.raises(AssertionError):
        assert_same_figures(changed, kept)


def test_the_kept_outputs_are_of_one_whole_run(kept):
    nbformat.validate(kept)
    cells = [cell for cell in kept.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1))
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    assert kinds <= {"stream", "execute_result", "display_data"}


def test_the_kept_outputs_tell_nothing_of_the_machine(kept):
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 200_000
    for cell in kept.cells:
        shown = str(cell.get("outputs", ""))
        assert not re.search(r"/(?:home|root|tmp|usr|Users|work)/|[A-Z]:\\\\", shown)
        assert platform.node() not in shown
        assert "Warning" not in shown
    assert kept.metadata.kernelspec.name == "python3"
    assert kept.metadata.language_info == {"name": "python"}


def test_the_page_shows_text_code_and_outputs(kept, hook):
    page, plots = hook["as_markdown"](kept, "quickstart")
    assert list(plots) == ["quickstart-1.svg"]
    assert re.search(r"!\[[^\]]{40,}\]\(quickstart-1\.svg\)", page)
    for cell in kept.cells:
        assert cell.source in page
    assert plan(kept) in page
    assert "<table>" in page
    assert "<style" not in page
    # The page's own anchors, links and blocks are those that Markdown of the site has.
    assert page.count("```") % 2 == 0


def test_a_page_is_added_beside_the_notebook(hook):
    made = {}

    class File:
        src_uri = "quickstart.ipynb"
        content_string = NOTEBOOK.read_text(encoding="utf-8")

        @classmethod
        def generated(cls, config, src_uri, *, content):
            made[src_uri] = content
            return SimpleNamespace(src_uri=src_uri)

    files = hook["on_files"]([File(), SimpleNamespace(src_uri="a.md")], config=None)
    assert [each.src_uri for each in files] == [
        *("quickstart.ipynb", "a.md", "quickstart.md", "quickstart-1.svg")
    ]
    assert "[download it](quickstart.ipynb)" in made["quickstart.md"]
    assert made["quickstart-1.svg"].startswith("<svg")


def not_executed(cell):
    cell.execution_count = None


def failed(cell):
    cell.outputs = [nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])]


def without_alternative(cell):
    cell.metadata.pop("alt")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (not_executed, "was not executed"),
        (failed, "gives"),
        (without_alternative, "has no alt"),
    ],
)
def test_a_notebook_that_cannot_be_shown_is_refused(kept, hook, damage, message):
    damaged = copy.deepcopy(kept)
    damage([cell for cell in damaged.cells if cell.cell_type == "code"][-1])
    with pytest.raises(ValueError, match=message):
        hook["as_markdown"](damaged, "quickstart")
