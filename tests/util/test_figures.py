"""One look for all figures: those of reports, of profiles and of the documentation."""

from __future__ import annotations

import pytest


pytest.importorskip("matplotlib", reason="plots need the extra `report`")

from matplotlib.figure import Figure

from lm_eval_pruned.util.figures import as_png, as_svg, line_look, over_ratios, style
from tests.helpers.checkpoints import ROOT


def figure_of(name: str) -> Figure:
    with style(name):
        figure = Figure()
        axes = figure.subplots()
        axes.plot([4, 2], [0.5, 0.25], **line_look(0))
        over_ratios(axes, [2, 4])
        return figure


def test_the_same_figure_gives_the_same_files():
    with style("one"):
        files = [(as_svg(figure_of("one")), as_png(figure_of("one"))) for _ in "ab"]
    assert files[0] == files[1]
    assert files[0][1].startswith(b"\x89PNG")


def test_ratios_fall_to_the_right():
    axes = figure_of("one").axes[0]
    assert axes.xaxis_inverted()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2.00", "4.00"]


def test_no_two_of_many_lines_look_alike():
    looks = {tuple(line_look(number).items()) for number in range(84)}
    assert len(looks) == 84


def test_every_figure_is_made_in_this_style():
    folders = ("lm_eval_pruned", "model_wrappers", "tasks", "benchmarks", "docs")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    own_style = {
        file.relative_to(ROOT).as_posix()
        for file in files
        if any(
            word in file.read_text(encoding="utf-8")
            for word in ("savefig", "rc_context", "rcParams", "pyplot")
        )
    }
    assert own_style == {"lm_eval_pruned/util/figures.py"}
