"""The curves of single layers as a report and ``lm-eval-pruned sensitivity`` show them."""

from __future__ import annotations

import json

import pytest

from lm_eval_pruned.pruning.curves import LayerCurve, Sensitivity
from lm_eval_pruned.report.layers import LayerCurves, layers_section
from lm_eval_pruned.results.files import ResultsError
from lm_eval_pruned.results.runs import read_sweep
from tests.helpers.results_files import write_sweep


def made_curves(
    layers=4, width=100, kept=(50, 90), criteria=("maw", "act"), seeds=(0, 1, 2)
) -> dict:
    """Return the content of ``sensitivity.json``, where ``maw`` misjudges layer 0, and ``act`` no layer.

    A share s of removed neurons costs s at random, 0.1 s more with each seed; by ``maw``
    4 s in layer 0 and 1.05 s elsewhere, by ``act`` 0.1 s.
    """
    loss, known = 3.0, {"maw": (4.0, 1.05), "act": (0.1, 0.1)}
    slopes: list = [(name, None, known[name]) for name in criteria]
    slopes += [("random", seed, (1 + 0.1 * seed,) * 2) for seed in seeds]
    return {
        "format": "lm-eval-pruned sensitivity",
        "version": 2,
        "model": "a model",
        "loss": loss,
        "curves": [
            {"layer": layer, "width_before": width, "criterion": criterion}
            | {"seed": seed, "widths": [*kept]}
            | {"rises": [slope[layer > 0] * (1 - k / width) for k in kept]}
            for layer in range(layers)
            for criterion, seed, slope in slopes
        ],
        "file": "text.jsonl",
        "sha256": "0" * 64,
        "texts": 2,
        "tokens": 256,
    }


def test_what_the_tables_read_is_what_the_measurement_writes(tmp_path):
    """Rooms keep the two apart; the file is what they share."""
    file = tmp_path / "sensitivity.json"
    made = made_curves()
    curves = tuple(LayerCurve(**each) for each in made.pop("curves"))
    del made["format"], made["version"]
    measured = Sensitivity(curves=curves, **made)
    measured.write(file)
    read = LayerCurves.from_json(json.loads(file.read_text()))
    rises = read.rises.set_index(["layer", "criterion", "share"])["rise"]
    assert read.criteria == ("maw", "act")
    for curve in measured.curves:
        for width, rise in zip(curve.widths, curve.rises, strict=True):
            if curve.criterion != "random":
                key = curve.layer, curve.criterion, round(100 - width)
                assert rises[key] == pytest.approx(rise)


def test_rises_are_judged_only_where_there_are_seeds_of_chance():
    """`tests/contract/test_layers.py` has the marks."""
    curves = LayerCurves.from_json(made_curves())
    assert (curves.shares, curves.seeds) == ((10, 50), 3)
    table = curves.table(50)
    assert table.titles == ["layer", "maw", "act", "random, seeds: 3"]
    *_, chance = next(iter(table.cells()))
    assert chance.text == "+0.550 [+0.500, +0.600]"
    text = " ".join(curves.explanation)
    assert "3.000 unpruned, on 2 texts with 256 tokens" in text
    assert "one of 4 layers" in text
    alone = LayerCurves.from_json(made_curves(seeds=()))
    verdicts = {cell.verdict for row in alone.table(50).cells() for cell in row}
    assert (alone.table(50).titles, verdicts) == (["layer", "maw", "act"], {""})
    assert len(alone.explanation) == 1


def test_layers_of_different_widths_share_their_shares():
    data, others = made_curves(width=99, kept=(49, 89)), made_curves()["curves"]
    data["curves"] += [{**each, "layer": each["layer"] + 4} for each in others]
    assert LayerCurves.from_json(data).shares == (10, 50, 51)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("curves"),
        lambda data: data.update(version=9),
        lambda data: data["curves"][0]["widths"].pop(),
    ],
)
def test_damaged_curves_are_refused(damage):
    damage(data := made_curves())
    with pytest.raises(
        ResultsError, match=r"^FILE holds no readable sensitivity curves"
    ):
        LayerCurves.from_json(data, "FILE")


@pytest.mark.parametrize(
    ("made", "share"),
    [
        (made_curves(layers=1, kept=(50,)), 50),
        (made_curves(criteria=()), 10),
    ],
)
def test_the_section_of_a_sweep(tmp_path, made, share):
    pytest.importorskip("altair", reason="plots need the extra `report`")
    write_sweep(tmp_path, {"base": (0, {"boolq": {"acc,none": [0.0, 1.0]}})})
    sweep = read_sweep(tmp_path)
    assert layers_section(sweep) is None
    (tmp_path / "sensitivity.json").write_text(json.dumps(made))
    section = layers_section(sweep)
    assert f"The table is for {share} % removed" in section.paragraphs[-1]
    (plot,) = section.plots
    assert plot.png.startswith(b"\x89PNG")
    assert "nats per token" in plot.svg
