"""The figure of a report: what is drawn, and what a browser makes of the page."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from PIL import Image

from lm_eval_pruned.compare.comparison import compare
from lm_eval_pruned.results.groups import series_of
from lm_eval_pruned.results.runs import read_sweep
from lm_eval_pruned.util import palette
from tests.helpers.results_files import answered, pruning, write_sweep
from tests.report.conftest import CHOICES, NASTY, N


pytest.importorskip("altair", reason="figures need the extra `report`")

from lm_eval_pruned.report.figure import (
    MEASURES,
    NATS,
    NATS_OF_BYTES,
    figure_section,
    measure_chart,
    points_of,
)


def points(sweep):
    base, others = read_sweep(sweep).split()
    ((_, members),) = series_of([base, *others]).items()
    return points_of(members, base, compare(base, others))


@pytest.fixture(scope="module")
def drawn(sweep):
    return points(sweep)


def point(drawn, measure, task, run):
    """Return the point of a task and a size by a measure, None where there is none."""
    here = (drawn[["line", "measure", "run"]] == [task, measure, run]).all(axis=1)
    found = drawn[here].to_dict("records")
    assert len(found) < 2
    return found[0] if found else None


@pytest.mark.parametrize(
    ("measure", "value"),
    [("raw", 30), ("kept", 100 * 0.05 / 0.4)],
)
def test_scores_by_each_measure(drawn, measure, value):
    mmlu = point(drawn, measure, "mmlu", "p60")
    assert mmlu["value"] == pytest.approx(value)
    assert mmlu["low"] < value < mmlu["high"]
    assert (mmlu["ratio"], mmlu["mark"], mmlu["filled"]) == (1.6, "tested", True)
    base = point(drawn, measure, "mmlu", "p0")
    assert base["mark"] == "unpruned"
    assert base["low"] == base["high"] == base["value"]
    assert base["value"] == pytest.approx(65 if measure == "raw" else 100)


def test_perplexities_keep_their_unit(drawn):
    wikitext = point(drawn, "raw", "wikitext", "p60")
    assert wikitext["low"] < wikitext["value"] < wikitext["high"]
    assert wikitext["unit"] == "word_perplexity"
    # Text has no floor: how many nats its loss rises.
    kept = point(drawn, "kept", "wikitext", "p60")
    assert kept["value"] == pytest.approx(3, abs=0.1)
    assert kept["low"] < kept["value"] < kept["high"]
    assert point(drawn, "kept", "wikitext", "p0")["value"] == 0


@pytest.mark.parametrize(
    ("task", "floor"), [("boolq", 62.5), ("mmlu", 25), ("gsm8k", np.nan)]
)
def test_the_best_score_without_knowledge_is_drawn_where_it_is_known(
    drawn, task, floor
):
    known = point(drawn, "raw", task, "p60")
    np.testing.assert_array_equal(known["highest floor"], floor)
    # A task at its floor, or without one, has nothing to lose.
    kept = point(drawn, "kept", task, "p60")
    assert (kept is None) == (task != "mmlu")


KEPT = MEASURES["kept"][2]


@pytest.mark.parametrize(
    ("measure", "titles"),
    [
        (
            "raw",
            [
                ["Knowledge, Commonsense", "score (%)"],
                ["Language modelling", "word_perplexity"],
                ["Truthfulness, Multi-step reasoning", "score (%)"],
                ["The rest", "score (%)"],
            ],
        ),
        (
            "kept",
            [
                ["Knowledge, Commonsense", KEPT],
                ["Language modelling", NATS],
                ["The rest", KEPT],
            ],
        ),
    ],
)
def test_what_pruning_takes_is_next_to_what_it_leaves(drawn, measure, titles):
    spec = measure_chart(drawn[drawn["measure"] == measure], measure).to_dict()
    layers = [panel["layer"][-1]["layer"][-1] for panel in spec["concat"]]
    told = {each["field"] for each in layers[0]["encoding"]["tooltip"]}
    assert {"interval", "documents", "q", "verdict"} <= told
    assert [layer["encoding"]["y"]["title"] for layer in layers] == titles


def test_an_interval_extends_an_axis_by_as_much_as_the_lines_take_at_most(drawn):
    """Truthfulness with few documents would leave a flat line of what it lost."""
    wide = drawn[(drawn["measure"] == "raw") & (drawn["unit"] == "%")].copy()
    truth = wide["side"] == "truthfulness and instructions"
    wide.loc[truth, ["low", "high"]] = [-900.0, 5000.0]
    spec = measure_chart(wide, "raw").to_dict()
    assert spec["resolve"]["scale"] == {"y": "independent"}
    for panel, (_, rows) in zip(spec["concat"], wide.groupby("side"), strict=False):
        layers = panel["layer"][-1]["layer"]
        low, high = layers[-1]["encoding"]["y"]["scale"]["domain"]
        assert low <= rows["value"].min() and rows["value"].max() <= high
        assert high - low < 600
        assert [e["mark"]["clip"] for e in layers if e["mark"]["type"] == "area"] == [
            True
        ]


def test_bits_per_byte_are_drawn_as_nats_more_than_unpruned(tmp_path):
    losses = {"aggregation": "bits_per_byte", "higher_is_better": False}
    rng = np.random.default_rng(0)

    def text(bits):
        values = -math.log(2) * (bits + rng.normal(0, 0.05, N))
        return {
            "pruned_text": {
                "bits_per_byte,none": {"values": [[v, 1.0] for v in values], **losses}
            }
        }

    runs = {f"p{size}": (size, text(1 + size / 100)) for size in (0, 20, 40)}
    drawn = points(write_sweep(tmp_path, runs))
    lost = point(drawn, "kept", "pruned_text", "p40")
    assert lost["value"] == pytest.approx(0.4 * math.log(2), abs=0.02)
    assert lost["unit"] == NATS_OF_BYTES and lost["low"] < lost["value"] < lost["high"]
    assert point(drawn, "kept", "pruned_text", "p0")["value"] == 0


def test_random_cuts_are_thin_lines_beside_what_is_kept(tmp_path):
    def of(share):
        rights = [n % 2 for n in range(N)]
        picks = [r if n < share * N else 1 - r for n, r in enumerate(rights)]
        return {"boolq": answered(picks, rights)}

    sizes = {f"p{size}": (size, of(1 - size / 100)) for size in (0, 20, 40)}
    random = {
        f"r{size}-{seed}": (
            pruning(size, criterion="random", seed=seed),
            of(0.95 - size / 100),
        )
        for size in (20, 40)
        for seed in (0, 1)
    }
    base, *others = read_sweep(write_sweep(tmp_path, sizes | random)).runs
    section = figure_section(base, [base, *others], compare(base, others))
    plots = {plot.name: plot.chart.to_dict() for plot in section.plots}
    layers = plots["kept-maw"]["concat"][0]["layer"]
    (thin,) = (e for e in layers if e.get("encoding", {}).get("detail"))
    names = [
        each["control"] for each in plots["kept-maw"]["datasets"][thin["data"]["name"]]
    ]
    assert sorted(names) == ["random, seed 0"] * 2 + ["random, seed 1"] * 2
    assert "random" not in json.dumps(plots["scores-maw"])


READY = (
    "document.querySelector('.drawing')?.getAttribute('aria-busy') === 'false' "
    "&& document.querySelectorAll('.drawing .role-mark').length > 1"
)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_a_browser_shows_it(sweep, browser, tmp_path, width, scheme):
    browser.open(sweep / "report/report.html")
    browser.wait(READY)
    browser.look(width, scheme=scheme)
    browser.choose("figure select", "scores-maw")
    browser.wait(READY)
    assert browser.run("document.documentElement.scrollWidth") == width
    # No name of a task is cut.
    texts = "[...document.querySelectorAll('.drawing text')].map((e) => e.textContent)"
    known = {*CHOICES} - {"boolq", "leaderboard_musr_object_placements", NASTY}
    assert known <= {*browser.run(texts)}
    browser.screenshot(tmp_path / "page.png", width, 2400)
    with Image.open(tmp_path / "page.png") as image:
        pixels = np.asarray(image.convert("RGB"), dtype=int)
    colours = palette.VARIABLES[scheme]
    for name, least in {"ground": 0.4 * 2400 * width, "family-knowledge": 100}.items():
        hue = [*bytes.fromhex(colours[name][1:])]
        assert (np.abs(pixels - hue).max(axis=2) < 5).sum() > least, name
    assert browser.errors == []
