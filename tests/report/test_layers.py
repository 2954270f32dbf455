"""The curves of single layers as a report and ``lm-eval-pruned sensitivity`` show them."""

from __future__ import annotations

import json

import pytest

from lm_eval_pruned.pruning.curves import Sensitivity
from lm_eval_pruned.results.files import ResultsError
from lm_eval_pruned.results.runs import read_sweep
from tests.helpers.results_files import write_sweep


def made_curves(layers=4, width=100, kept=(50, 90)) -> dict:
    """Return the content of ``sensitivity.json``: a share s of layer n costs (n + 1) s."""
    return {
        "format": "lm-eval-pruned sensitivity",
        "version": 3,
        "model": "a model",
        "loss": 3.0,
        "criterion": "obs",
        "repair": "least_squares",
        "curves": [
            {"layer": layer, "width_before": width, "widths": [*kept]}
            | {"rises": [(layer + 1) * (1 - k / width) for k in kept]}
            for layer in range(layers)
        ],
        "file": "text.jsonl",
        "sha256": "0" * 64,
        "texts": 2,
        "tokens": 1256,
    }


def test_layers_of_different_widths_have_a_dash_at_the_shares_of_others():
    data, others = made_curves(width=99, kept=(49, 89)), made_curves()["curves"]
    data["curves"] += [{**curve, "layer": curve["layer"] + 4} for curve in others]
    table = Sensitivity.of(data).table()
    assert [c.title for c in table.columns][1:] == [
        f"{share} % removed" for share in (10, 50, 51)
    ]
    assert [cell.text for cell in table.cells[0]][2] == "-"


def test_shares_of_one_whole_percent_have_a_column_each():
    """`--prune_percents 10 10.3` once ended, after the measurement, with a table that cannot be."""
    table = Sensitivity.of(made_curves(layers=1, width=1000, kept=(897, 900))).table()
    titles = [column.title for column in table.columns]
    assert titles == ["layer", "10 % removed", "10.3 % removed"]
    assert [cell.text for cell in table.cells[0]] == ["0", "+0.100", "+0.103"]


@pytest.fixture
def sweep(tmp_path):
    """The folder of a sweep."""
    return write_sweep(tmp_path, {"base": (0, {"boolq": {"acc,none": [0.0, 1.0]}})})


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("curves"),
        lambda data: data.update(version=9),
        lambda data: data["curves"][0]["widths"].pop(),
        lambda data: data.update(loss="much"),
    ],
)
def test_damaged_curves_are_refused(damage, sweep):
    figure = pytest.importorskip("lm_eval_pruned.report.figure")
    damage(data := made_curves())
    (file := sweep / "sensitivity.json").write_text(json.dumps(data))
    with pytest.raises(
        ResultsError, match=rf"^{file} holds no readable sensitivity curves"
    ):
        figure.layers_section(read_sweep(sweep))


def test_the_section_of_a_sweep(sweep):
    figure = pytest.importorskip("lm_eval_pruned.report.figure")
    assert figure.layers_section(read_sweep(sweep)) is None
    (sweep / "sensitivity.json").write_text(json.dumps(made_curves()))
    section = figure.layers_section(read_sweep(sweep))
    assert [c.title for c in section.table.columns][-1] == "50 % removed"
    (plot,) = section.plots
    assert plot.png.startswith(b"\x89PNG")
    assert "nats per token" in plot.svg
