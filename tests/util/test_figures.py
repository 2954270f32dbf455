"""One look for all figures: those of reports, of profiles and of the documentation."""

from __future__ import annotations

import pytest


pytest.importorskip("altair", reason="plots need the extra `report`")

import altair as alt
import pandas as pd

from lm_eval_pruned.util.figures import Plot, line_look, lines, over_ratios
from lm_eval_pruned.util.palette import FAMILIES


def plot() -> Plot:
    points = pd.DataFrame({"line": "maw", "ratio": [4.0, 2.0], "score": [0.5, 0.25]})
    chart = lines(points, over_ratios(), alt.Y("score:Q"), line_look(["maw"]))
    return Plot("one", "A title", "What it shows.", chart)


def test_a_file_is_on_paper_and_a_page_has_its_own_colours():
    drawn, again = plot(), plot()
    assert (drawn.svg, drawn.png) == (again.svg, again.png)
    hue, _ = FAMILIES["knowledge"]
    assert hue in drawn.svg
    assert "var(" not in drawn.svg
    assert "What it shows." in drawn.svg
    assert "var(--family-knowledge)" in drawn.inline
    assert hue not in drawn.inline


def test_no_two_of_many_lines_look_alike():
    names = [str(number) for number in range(42)]
    for shown, hues in ((names, None), (names[:6], dict.fromkeys(names, "#000000"))):
        look = line_look(shown, hues)
        of = (look[key].to_dict()["scale"]["range"] for key in ("color", "strokeDash"))
        assert len({(hue, *dash) for hue, dash in zip(*of, strict=True)}) == len(shown)
