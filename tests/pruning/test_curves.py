"""Curves of sensitivity as data: lookups, files, and files that are refused."""

from __future__ import annotations

import dataclasses
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


def test_losses_that_are_not_finite_are_refused():
    curve = LayerCurve(0, 88, "maw", None, (10,), (float("nan"),))
    with pytest.raises(ValueError, match="with one layer cut, is NaN"):
        dataclasses.replace(curves(), curves=(curve,))


def test_a_file_gives_back_what_was_written(tmp_path):
    file = tmp_path / "new" / "curves.json"
    curves().write(file)
    found = read_sensitivity(file)
    assert found == curves()
    assert [each.name for each in file.parent.iterdir()] == ["curves.json"]
    assert found.curve(2, "maw").losses == (3.1,)
    assert found.curve(0, "random", 1).losses == (3.7, 3.55)


def _edited(**changes):
    return json.dumps(curves().as_dict() | changes)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", _edited(version=2), _edited(curves=[1]), _edited(loss="3")],
)
def test_a_file_that_holds_no_curves_is_refused_in_one_sentence(tmp_path, content):
    file = tmp_path / "curves.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="cannot be read as sensitivity") as error:
        read_sensitivity(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_reading_curves_imports_no_torch():
    code = (
        "import sys, lm_eval_pruned.pruning.curves; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
