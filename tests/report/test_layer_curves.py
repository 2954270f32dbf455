from __future__ import annotations

import copy
import json
import math

import pytest

from lm_eval_pruned.pruning.curves import FORMAT, VERSION, read_sensitivity
from lm_eval_pruned.report import layers
from lm_eval_pruned.report.layers import (
    LayerCurves,
    explanation,
    layer_plots,
    rises_table,
)
from lm_eval_pruned.results.files import ResultsError
from tests.helpers.results_files import write_sweep
from tests.helpers.sensitivities import made_curves


@pytest.fixture
def curves():
    return LayerCurves.of(made_curves())


def test_what_the_tables_read_is_what_the_measurement_writes(tmp_path):
    """Rooms keep the two apart; the file is what they share."""
    file = tmp_path / "sensitivity.json"
    file.write_text(json.dumps(made_curves()))
    measured = read_sensitivity(file)
    measured.write(file)
    read = LayerCurves.of(json.loads(file.read_text()))
    assert json.loads(file.read_text())["format"] == FORMAT
    assert layers.VERSION == VERSION
    rises = read.rises.set_index(["layer", "criterion", "share"])["rise"]
    assert {*read.rises["layer"]} == {curve.layer for curve in measured.curves}
    assert ("random", *read.criteria) == ("random", "maw", "act")
    for curve in measured.curves:
        for width, rise in zip(curve.widths, measured.rises(curve), strict=True):
            if curve.criterion != "random":
                key = curve.layer, curve.criterion, round(100 - width)
                assert rises[key] == pytest.approx(rise)


def row(curves, *key):
    """Return the row of a layer, a criterion and a share."""
    (found,) = curves.rises[
        (curves.rises[["layer", "criterion", "share"]] == list(key)).all(axis=1)
    ].to_dict("records")
    return found


def test_shares_rises_and_chance(curves):
    assert curves.shares == (10, 50)
    assert curves.seeds == 3
    assert row(curves, 0, "maw", 50)["rise"] == pytest.approx(2.0)
    assert row(curves, 1, "random", 50)["rise"] == pytest.approx(0.55)
    maw = row(curves, 1, "maw", 50)
    assert (maw["low"], maw["high"]) == pytest.approx((0.5, 0.6))
    # Every seed is the zero line.
    assert row(curves, 0, "maw", 10)["verdict"] == "worse"
    assert row(curves, 0, "act", 10)["verdict"] == "better"
    assert row(curves, 1, "maw", 50)["verdict"] == ""
    assert row(curves, 1, "random", 50)["verdict"] == ""


def test_the_table_marks_what_is_worse_than_chance(curves):
    table = rises_table(curves, 50)
    assert table.columns == ["layer", "maw", "act", "random, 3 seeds"]
    first = [cell.text for cell in table.cells()[0]]
    assert first == ["0", "+2.000 \u25bc", "+0.050 \u25b2", "+0.550 [+0.500, +0.600]"]


def test_the_sentences_say_what_chance_does(curves):
    text = " ".join(explanation(curves))
    assert "3.000 unpruned, on 2 texts with 256 tokens" in text
    assert "one of 4 layers" in text


def test_without_random_nothing_is_judged():
    curves = LayerCurves.of(made_curves(seeds=()))
    assert rises_table(curves, 50).columns == ["layer", "maw", "act"]
    assert "add random to --criteria" in explanation(curves)[1]


def test_layers_of_different_widths_share_their_shares():
    data = made_curves(width=99, kept=(49, 89))
    data["curves"] += [
        {**curve, "layer": curve["layer"] + 4} for curve in made_curves()["curves"]
    ]
    assert LayerCurves.of(data).shares == (10, 50, 51)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("curves"),
        lambda data: data.update(version=9),
        lambda data: data.update(curves=[]),
        lambda data: data.update(loss=math.nan),
        lambda data: data["curves"][0].pop("layer"),
        lambda data: data["curves"][0]["widths"].pop(),
        lambda data: data["curves"][0].update(width_before=0),
    ],
)
def test_damaged_curves_are_refused(damage):
    data = copy.deepcopy(made_curves())
    damage(data)
    with pytest.raises(ResultsError, match=r"^FILE holds no sensitivity curves"):
        LayerCurves.of(data, "FILE")


class TestFigures:
    @pytest.fixture(autouse=True)
    def _altair(self):
        pytest.importorskip("altair", reason="plots need the extra `report`")

    @pytest.mark.parametrize(
        "made", [{}, {"seeds": ()}, {"layers": 1, "kept": (50,)}, {"criteria": ()}]
    )
    def test_they_are_drawn(self, made):
        curves = LayerCurves.of(made_curves(**made))
        for plot in layer_plots(curves):
            assert plot.png.startswith(b"\x89PNG")
            assert "nats per token" in plot.svg

    def test_losses_that_fall_are_drawn(self):
        curves = LayerCurves.of(made_curves() | {"loss": 9.0})
        assert all(plot.svg for plot in layer_plots(curves))

    @pytest.mark.slow
    def test_a_report_shows_the_curves_of_its_sweep(self, tmp_path):
        from lm_eval_pruned.report.report import write_report

        scores = {"boolq": {"acc,none": [0.0, 1.0] * 20}}
        sweep = write_sweep(tmp_path / "s", {"base": (0, scores), "p20": (20, scores)})
        write_report(sweep)
        assert "## Layers" not in (sweep / "report/report.md").read_text()
        (sweep / "sensitivity.json").write_text(json.dumps(made_curves()))
        files = {file.name for file in write_report(sweep)}
        assert {"sensitivity-by-layer.svg", "sensitivity-by-layer.png"} <= files
        text = (sweep / "report/report.md").read_text()
        assert "The table is of 10 % removed" in text
        assert "plots/sensitivity-by-layer.png" in text
        (sweep / "sensitivity.json").write_text("{}")
        with pytest.raises(
            ResultsError, match=r"sensitivity\.json holds no sensitivity"
        ):
            write_report(sweep)
