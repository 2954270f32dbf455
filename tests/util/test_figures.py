"""One look for all figures: those of reports, of profiles and of the documentation."""

from __future__ import annotations

import pytest


pytest.importorskip("altair", reason="plots need the extra `report`")

import altair as alt
import pandas as pd

from lm_eval_pruned.util.figures import Plot, line_look, lines, over_ratios
from lm_eval_pruned.util.palette import FAMILIES
from tests.helpers.checkpoints import ROOT


def plot() -> Plot:
    points = pd.DataFrame({"line": "maw", "ratio": [4.0, 2.0], "score": [0.5, 0.25]})
    chart = lines(points, over_ratios(), alt.Y("score:Q"), line_look(["maw"]))
    return Plot("one", "A title", "What it shows.", chart)


def test_the_same_figure_gives_the_same_files():
    files = [(each.svg, each.png) for each in (plot(), plot())]
    assert files[0] == files[1]
    assert files[0][1].startswith(b"\x89PNG")


def test_a_file_is_on_paper_and_a_page_has_its_own_colours():
    drawn = plot()
    hue, _ = FAMILIES["knowledge"]
    assert hue in drawn.svg
    assert "var(" not in drawn.svg
    assert "What it shows." in drawn.svg
    assert "var(--family-knowledge)" in drawn.inline
    assert hue not in drawn.inline


def test_ratios_fall_to_the_right():
    assert over_ratios().to_dict()["scale"]["reverse"]


def test_no_two_of_many_lines_look_alike():
    names = [str(number) for number in range(42)]
    look = line_look(names)
    ranges = [look[key].to_dict()["scale"]["range"] for key in ("color", "strokeDash")]
    assert len({(hue, *dash) for hue, dash in zip(*ranges, strict=True)}) == 42
    same = line_look(names[:6], dict.fromkeys(names, "#000000"))
    dashes = same["strokeDash"].to_dict()["scale"]["range"]
    assert len(set(map(tuple, dashes))) == 6


def test_every_figure_is_made_in_this_style():
    folders = ("lm_eval_pruned", "model_wrappers", "tasks", "benchmarks", "docs")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    for file in files:
        assert "matplotlib" not in file.read_text(encoding="utf-8"), file
