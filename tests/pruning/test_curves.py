"""Curves of sensitivity as data: lookups, files, and what is no such file."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import subprocess
import sys

import pytest

from lm_eval_pruned.pruning.curves import (
    LayerCurve,
    Sensitivity,
    read_sensitivity,
)


def curves() -> Sensitivity:
    return Sensitivity(
        "some/model",
        3.2,
        (
            LayerCurve(0, 88, "maw", None, (44, 66), (5.5, 4.25)),
            LayerCurve(0, 88, "random", 0, (44, 66), (3.75, 3.5)),
            LayerCurve(0, 88, "random", 1, (44, 66), (3.7, 3.55)),
            LayerCurve(2, 80, "maw", None, (40,), (3.1,)),
        ),
        "text.jsonl",
        "0" * 64,
        16,
        2048,
    )


def test_a_curve_is_found_by_layer_criterion_and_seed():
    found = curves()
    assert found.curve(2, "maw").losses == (3.1,)
    assert found.curve(0, "random", 1).losses == (3.7, 3.55)


def test_rises_may_be_negative():
    found = curves()
    assert found.rises(found.curve(2, "maw")) == pytest.approx((-0.1,))


def test_losses_that_are_not_finite_are_refused():
    curve = LayerCurve(0, 88, "maw", None, (10,), (float("nan"),))
    with pytest.raises(ValueError, match="with one layer cut, is NaN"):
        dataclasses.replace(curves(), curves=(curve,))


def test_a_file_gives_back_what_was_written(tmp_path):
    file = tmp_path / "new" / "curves.json"
    curves().write(file)
    assert read_sensitivity(file) == curves()
    assert [each.name for each in file.parent.iterdir()] == ["curves.json"]


def test_csv_has_a_row_for_each_point():
    rows = list(csv.DictReader(io.StringIO(curves().as_csv())))
    assert len(rows) == 7
    assert rows[2] == {
        "layer": "0",
        "width": "44",
        "criterion": "random",
        "seed": "0",
        "loss": "3.75",
        "rise": str(3.75 - 3.2),
    }
    assert rows[0]["seed"] == ""


def _edited(**changes):
    return json.dumps(curves().as_dict() | changes)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        _edited(format="x"),
        _edited(version=2),
        _edited(curves=[1]),
        _edited(curves=[{"layer": 0}]),
        _edited(loss="3"),
        _edited(loss=float("inf")),
    ],
)
def test_a_file_that_holds_no_curves_is_refused_in_one_sentence(tmp_path, content):
    file = tmp_path / "curves.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="cannot be read as sensitivity") as error:
        read_sensitivity(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_sensitivity(tmp_path / "none.json")


def test_reading_curves_imports_no_torch():
    code = (
        "import sys, lm_eval_pruned.pruning.curves; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
