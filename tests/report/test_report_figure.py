"""The figure of a report: what is drawn, and what a browser makes of the page."""

from __future__ import annotations

import csv
import json
import time
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from lm_eval_pruned.util import palette
from tests.helpers.chromium import chromium_page, find_chromium
from tests.helpers.results_files import offering, write_sweep


for module in ("altair", "vl_convert"):
    pytest.importorskip(module, reason="figures need the extra `report`")

from lm_eval_pruned.compare.comparison import compare, split_sweep
from lm_eval_pruned.report import report
from lm_eval_pruned.report.figure import measure_chart, points_of
from lm_eval_pruned.results.documents import Levels
from lm_eval_pruned.results.groups import series_of
from lm_eval_pruned.results.runs import read_sweep
from lm_eval_pruned.results.stopping_record import Stopping


N = 80
PERCENTS = (0, 10, 20, 30, 40, 50, 60)
WIDTHS = (390, 800, 1280)
#: Lines of single letters, of lines that cross, and of those that are on top of each other.
CHOICES = {
    "mmlu": (4, 0.65, 0.30),
    "arc_challenge": (4, 0.55, 0.32),
    "hellaswag": (4, 0.62, 0.40),
    "winogrande": (2, 0.60, 0.55),
    "piqa": (2, 0.75, 0.65),
    "truthfulqa_mc1": (5, 0.26, 0.28),
    "truthfulqa_mc2": (2, 0.40, 0.60),
    "leaderboard_musr_object_placements": (3, 0.36, 0.37),
    "a_task_of_ones_own": (3, 0.5, 0.4),
}


def answers(share, seed):
    order = np.random.default_rng(seed).permutation(N)
    return (order < share * N).astype(float).tolist()


def tasks(percent):
    done = percent / 60
    made = {}
    for seed, (task, (choices, first, last)) in enumerate(CHOICES.items()):
        rows = {n: offering([f"{n} {c}" for c in range(choices)]) for n in range(N)}
        values = answers(first + (last - first) * done, seed)
        made[task] = {"acc,none": {"values": values, "rows": rows, "stderr": 0.05}}
    yes = {n: offering([" no", " yes"], int(n % 8 < 5)) for n in range(N)}
    made["boolq"] = {
        "acc,none": {"values": answers(0.5, 9), "rows": yes, "stderr": 0.05}
    }
    made["wikitext"] = {
        "word_perplexity,none": {
            "values": np.random.default_rng(percent)
            .normal(-2 - 3 * done, 0.1, N)
            .tolist(),
            "aggregation": "perplexity",
            "higher_is_better": False,
        }
    }
    made["gsm8k"] = {"exact_match,strict-match": answers(0.4 * (1 - done), 10)}
    return made


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    write_sweep(folder, {f"p{each}": (each, tasks(each)) for each in PERCENTS})
    report.write_report(folder)
    return folder


def points(sweep, levels):
    base, others = split_sweep(list(read_sweep(sweep).runs), str(sweep))
    ((_, members),) = series_of([base, *others]).items()
    return points_of(members, base, compare(base, others), levels)


@pytest.fixture(scope="module")
def drawn(sweep):
    known = {(task, "acc,none"): Levels(1 / CHOICES[task][0]) for task in CHOICES}
    known["boolq", "acc,none"] = Levels(0.5, 0.625)
    return points(sweep, known)


def point(drawn, measure, task, run):
    """Return the point of a task and a size by a measure, None where there is none."""
    here = (drawn[["line", "measure", "run"]] == [task, measure, run]).all(axis=1)
    found = drawn[here].to_dict("records")
    assert len(found) < 2
    return found[0] if found else None


@pytest.mark.parametrize(
    ("measure", "value"),
    [("raw", 30), ("relative", 100 * 0.3 / 0.65), ("above_chance", 100 * 0.05 / 0.4)],
)
def test_scores_by_each_measure(drawn, measure, value):
    mmlu = point(drawn, measure, "mmlu", "p60")
    assert mmlu["value"] == pytest.approx(value)
    assert mmlu["low"] < value < mmlu["high"]
    assert mmlu["ratio"] == 1.6
    assert (mmlu["mark"], mmlu["filled"]) == ("tested", True)
    base = point(drawn, measure, "mmlu", "p0")
    assert base["mark"] == "unpruned"
    assert base["low"] == base["high"] == base["value"]
    assert base["value"] == pytest.approx(65 if measure == "raw" else 100)


def test_perplexities_are_inverted_and_keep_their_unit(drawn):
    wikitext = point(drawn, "relative", "wikitext", "p60")
    assert wikitext["value"] == pytest.approx(100 * np.exp(-3), rel=0.1)
    assert wikitext["low"] < wikitext["value"] < wikitext["high"]
    assert point(drawn, "raw", "wikitext", "p60")["unit"] == "word_perplexity"
    assert point(drawn, "above_chance", "wikitext", "p60") is None


def test_a_level_is_drawn_of_what_is_known(drawn):
    # A task at chance has nothing to lose.
    assert point(drawn, "above_chance", "boolq", "p60") is None
    boolq, mmlu, gsm8k = (
        point(drawn, "raw", task, "p60") for task in ("boolq", "mmlu", "gsm8k")
    )
    assert (boolq["chance"], boolq["majority"]) == (50, 62.5)
    assert mmlu["chance"] == 25
    assert np.isnan([mmlu["majority"], gsm8k["chance"]]).all()


@pytest.mark.slow
def test_what_pruning_takes_is_next_to_what_it_leaves(drawn):
    def titles(measure):
        of = drawn[drawn["measure"] == measure]
        spec = measure_chart(of, measure).to_dict()
        layers = json.dumps([panel["layer"][-1] for panel in spec["concat"]])
        assert "var(--family-knowledge)" in layers
        return [
            next(y["title"] for y in _values(panel, "y") if y.get("title"))
            for panel in spec["concat"]
        ]

    assert titles("relative") == [
        [families, "relative to unpruned (%)"]
        for families in (
            "Knowledge, Commonsense, Language modelling",
            "Truthfulness, Multi-step reasoning",
            "The rest",
        )
    ]
    assert ["Language modelling", "word_perplexity"] in titles("raw")


def _values(tree, key):
    """Return what a key has anywhere in a specification, the innermost last."""
    if isinstance(tree, list):
        return [found for each in tree for found in _values(each, key)]
    if not isinstance(tree, dict):
        return []
    here = [tree[key]] if isinstance(tree.get(key), dict) else []
    return here + _values(list(tree.values()), key)


def test_files_beside_the_page_are_in_the_colours_of_paper(sweep):
    names = {path.stem for path in sweep.glob("report/plots/*.svg")}
    assert {"capabilities-maw", "scores-maw", "above-chance-maw"} <= names
    for name in ("capabilities-maw", "scores-maw", "above-chance-maw"):
        text = (sweep / f"report/plots/{name}.svg").read_text(encoding="utf-8")
        ElementTree.fromstring(text)  # noqa: S314
        assert "var(" not in text
        assert palette.FAMILIES["knowledge"][0] in text
        png = (sweep / f"report/plots/{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A sweep of which one unit was decided after 20 documents of `N`."""
    folder = tmp_path_factory.mktemp("stopped")
    before, after = answers(0.7, 1), [0.0] * 20
    write_sweep(
        folder,
        {
            "p0": (0, {"mmlu": {"acc,none": before}}),
            "p20": (20, {"mmlu": {"acc,none": answers(0.6, 2)}}),
            "p60": (60, {"mmlu": {"acc,none": after}}),
        },
    )
    lost = -sum(before[:20]) / 20
    record = Stopping(
        *("decided", "mmlu", N, 0.05, 2, "acc,none", "difference"),
        *((20,), 1e-4, 1.0, lost),
        {"acc,none": (0.0, 0.3)},
    )
    (file,) = folder.glob("units/p60/mmlu/results_*.json")
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, "stopping": record.as_dict()}))
    report.write_report(folder)
    return folder


def test_a_partial_score_is_drawn_with_the_documents_it_has(stopped):
    found = points(stopped, {("mmlu", "acc,none"): Levels(0.25)})
    full, partial = (point(found, "raw", "mmlu", name) for name in ("p20", "p60"))
    assert (full["mark"], partial["mark"]) == ("tested", "partial")
    assert full["documents"] == str(N)
    assert partial["documents"] == f"partial: 20 of {N}"
    assert partial["filled"]
    # Its interval is that of the look, and all of it is of the same documents.
    base, others = split_sweep(list(read_sweep(stopped).runs), str(stopped))
    (row,) = (each for each in compare(base, others).rows if each.run == "p60")
    assert partial["value"] == 0
    assert row.base_score + row.low < partial["low"] == 0
    assert partial["high"] == pytest.approx(100 * (row.base_score + row.high))
    relative = point(found, "relative", "mmlu", "p60")
    assert relative["high"] == pytest.approx(100 * (1 + row.high / row.base_score))
    chance = 100 * (0 - 0.25) / (row.base_score - 0.25)
    above = point(found, "above_chance", "mmlu", "p60")
    assert above["value"] == pytest.approx(chance)


def test_a_partial_score_says_so_in_every_format(stopped):
    for name in ("report.html", "report.md"):
        text = (stopped / "report" / name).read_text(encoding="utf-8")
        assert f"partial: 20 of {N}" in text
        assert "McNemar mid-p, group sequential." in text
    rows = list(csv.DictReader((stopped / "report/results.csv").open()))
    (partial,) = (row for row in rows if row["of"])
    assert (partial["documents"], partial["of"]) == ("20", str(N))
    assert (partial["score_low"], partial["score_high"]) == ("0.0", "0.3")


def contrast(one, other):
    """Return the contrast of two colours, from 1 to 21, by WCAG 2.2."""

    def luminance(colour):
        parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
            for part in parts
        ]
        return np.dot((0.2126, 0.7152, 0.0722), linear)

    lower, higher = sorted((luminance(one), luminance(other)))
    return (higher + 0.05) / (lower + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_stand_out(scheme):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    colours = palette.variables(scheme)
    families = [hue for name, hue in colours.items() if name.startswith("family-")]
    assert len(families) == len(palette.FAMILIES)
    texts = [colours[name] for name in ("ink", "quiet", "better", "worse")]
    for ground in (colours["ground"], colours["band"]):
        for colour in [*texts, *families]:
            assert contrast(colour, ground) >= 4.5
    assert contrast(colours["edge"], colours["ground"]) >= 3


@pytest.fixture(scope="module")
def browser(sweep, tmp_path_factory):
    if find_chromium() is None:
        pytest.skip("no Chromium to look at the page with")
    with chromium_page(tmp_path_factory.mktemp("browser")) as page:
        page.open(sweep / "report/report.html")
        yield page
        assert page.errors == []


@pytest.fixture
def shown(browser):
    """The page as it is when it is opened, whatever the test before did to it."""
    browser.look()
    browser.run("window.before = 1")
    browser.send("Page.reload")
    browser.wait(f"!window.before && {READY}")
    return browser


READY = (
    "document.querySelector('.drawing')?.getAttribute('aria-busy') === 'false' "
    "&& document.querySelectorAll('.drawing .role-mark').length > 9"
)
#: Colours of all texts and marks of the page, with those behind them.
COLOURS = """
(() => {
  const found = {};
  const paper = Object.assign(document.createElement("canvas"), {width: 1, height: 1});
  const ink = paper.getContext("2d");
  const ground = (element) => {
    // Some are translucent: all that is behind is painted, the outermost first.
    const all = [];
    for (let each = element; each; each = each.parentElement) all.unshift(getComputedStyle(each).backgroundColor);
    all.forEach((colour) => { ink.fillStyle = colour; ink.fillRect(0, 0, 1, 1); });
    return `rgb(${ink.getImageData(0, 0, 1, 1).data.slice(0, 3)})`;
  };
  const note = (kind, colour, element) => {
    if (colour.startsWith("rgb")) found[[kind, colour, ground(element)].join("|")] = 1;
  };
  for (const element of document.querySelectorAll("body *")) {
    const style = getComputedStyle(element);
    if (element.closest("script, [hidden]")) continue;
    if (element.ownerSVGElement) {
      if (element.tagName === "text" && element.textContent) note("text", style.fill, element);
      const mark = element.closest(".mark-line, .mark-symbol, .mark-rule.role-mark");
      if (mark && style.opacity > 0 && style.stroke !== "none") note("mark", style.stroke, element);
    } else if ([...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())) {
      note("text", style.color, element);
    }
  }
  return Object.keys(found);
})()
"""


def chosen(page, control, value):
    """Choose something in the figure and wait until the page is drawn."""
    page.run(
        f"((e) => {{ e.value = {value!r}; e.dispatchEvent(new Event('input', {{bubbles: true}}));"
        " e.dispatchEvent(new Event('change', {bubbles: true})); })"
        f"(document.querySelector({control!r}))"
    )
    page.wait(READY)


def as_hex(colour):
    parts = colour.removeprefix("rgb(").removeprefix("rgba(").rstrip(")").split(",")
    return "#" + "".join(f"{int(part):02x}" for part in parts[:3])


TEXTS = "[...document.querySelectorAll('.drawing text')].map((e) => e.textContent)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plot", "scheme"), [("scores-maw", "light"), ("capabilities-maw", "dark")]
)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_browser_shows_it(shown, tmp_path, width, plot, scheme):
    shown.look(width, scheme=scheme)
    chosen(shown, "figure select", plot)
    widths = "[document.documentElement.scrollWidth, innerWidth]"
    assert shown.run(widths) == [width, width]
    # No name of a task is cut.
    assert set(CHOICES) <= set(shown.run(TEXTS))
    pixels = picture(shown, tmp_path, 3400 if width < 600 else 2200)
    assert pixels.shape[1] == width

    def share(colour):
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        return (np.abs(pixels - np.array(wanted)).max(axis=2) < 5).sum()

    colours = palette.variables(scheme)
    assert share(colours["ground"]) > 0.4 * pixels.shape[0] * width
    assert share(colours["ink"]) > 1000
    for family in ("knowledge", "commonsense", "truthfulness", "reasoning"):
        assert share(colours[f"family-{family}"]) > 100, family


def picture(page, folder, height=None):
    """Return what a page looks like as red, green and blue."""
    page.screenshot(folder / "page.png", height)
    with Image.open(folder / "page.png") as image:
        return np.asarray(image.convert("RGB"), dtype=int)


@pytest.mark.slow
def test_scores_are_seen_on_a_telephone(shown):
    shown.look(390)
    cut = shown.run(
        "[...document.querySelectorAll('.wide')].filter((e) => {"
        " const cell = e.querySelector('tbody td:not(.text)');"
        " return cell && cell.getBoundingClientRect().right > e.getBoundingClientRect().right; })"
        ".map((e) => e.ariaLabel)"
    )
    assert cut == []
    shown_scores = shown.run(
        "((e) => [...e.querySelectorAll('tbody tr:first-child td:not(.text)')]"
        ".filter((c) => c.getBoundingClientRect().right <= e.getBoundingClientRect().right)"
        ".map((c) => c.textContent))(document.querySelector('[aria-label^=Differences]'))"
    )
    assert len(shown_scores) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_a_browser_shows_stands_out(shown, scheme):
    shown.look(scheme=scheme)
    shown.wait(READY)
    found = [each.split("|") for each in shown.run(COLOURS)]
    assert {kind for kind, *_ in found} == {"text", "mark"}
    assert len(found) > 10
    for kind, colour, ground in found:
        least = 4.5 if kind == "text" else 3
        assert contrast(as_hex(colour), as_hex(ground)) >= least, (kind, colour)


@pytest.mark.slow
def test_a_family_is_chosen(shown):
    shown.look()
    lines = "document.querySelectorAll('.drawing .mark-line.role-mark path').length"
    before = shown.run(lines)
    chosen(shown, "[name=families]", "commonsense")
    shown.wait(f"{lines} < {before}")
    chosen(shown, "[name=families]", "all")
    shown.wait(f"{lines} == {before}")


@pytest.mark.slow
def test_every_control_is_reached_with_the_tab_key(shown):
    shown.look()
    shown.run("document.activeElement.blur(); scrollTo(0, 0)")
    seen = set()
    for _ in range(30):
        shown.key("Tab")
        seen.add(
            shown.run(
                "((e) => e.name || e.download || e.ariaLabel || e.tagName)"
                "(document.activeElement)"
            )
        )
    assert {"families", "SELECT", "results.csv", "SUMMARY", "Scores"} <= seen


@pytest.mark.slow
def test_who_points_at_a_point_is_told_its_numbers(shown):
    shown.look()
    shown.run("document.querySelector('.drawing').scrollIntoView()")
    x, y = shown.run(
        "((box) => [box.x + box.width / 2, box.y + box.height / 2])"
        "(document.querySelector('.drawing .mark-symbol.role-mark path').getBoundingClientRect())"
    )
    # A browser takes the first move for the mouse having been there.
    for place in (x - 3, x, x - 1):
        shown.point(place, y)
        time.sleep(0.1)
    shown.wait("document.querySelector('#vg-tooltip-element.visible') !== null")
    told = shown.run("document.querySelector('#vg-tooltip-element').innerText")
    for word in ("interval", "documents", "smallest detectable", "q", "verdict"):
        assert word in told
    assert str(N) in told
    shown.point(0, 0)


@pytest.mark.slow
def test_a_browser_tells_a_partial_score_apart(shown, stopped):
    shown.look()
    one = READY.replace("> 9", "> 1")
    shown.open(stopped / "report/report.html")
    shown.wait(one)
    shapes = shown.run(
        "[...document.querySelectorAll('.drawing .mark-symbol.role-mark path')]"
        ".filter((path) => getComputedStyle(path).opacity > 0)"
        ".map((path) => path.getAttribute('d').includes('A') ? 'circle' : 'diamond')"
    )
    assert sorted(shapes) == ["circle", "diamond"]
