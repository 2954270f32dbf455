"""Curves of sensitivity as data."""

from __future__ import annotations

import json
import subprocess
import sys

from lm_eval_pruned.pruning.curves import LayerCurve, Sensitivity


def test_a_file_holds_what_was_found():
    curve = LayerCurve(2, 80, (40, 60), (0.5, 0.25))
    cut = ("obs", "least_squares")
    text = ("t.jsonl", "0" * 64, 16, 2048)
    curves = Sensitivity("some/model", 3.2, (curve,), *cut, *text)
    content = json.loads(curves.as_json())
    assert (content["version"], content["loss"]) == (3, 3.2)
    assert (content["criterion"], content["repair"]) == cut
    assert content["curves"] == [
        {"layer": 2, "width_before": 80, "widths": [40, 60], "rises": [0.5, 0.25]}
    ]


def test_reading_curves_imports_no_torch():
    code = (
        "import sys, lm_eval_pruned.pruning.curves; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
