"""The figure of a report: what is drawn, and what a browser makes of the page."""

from __future__ import annotations

import csv
import itertools
import json
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, strategies as st

from lm_eval_pruned.util import palette
from tests.helpers.chromium import chromium_page, find_chromium
from tests.helpers.results_files import offering, write_sweep


for module in ("matplotlib", "vl_convert"):
    pytest.importorskip(module, reason="figures need the extra `report`")

from lm_eval_pruned.compare.comparison import compare, split_sweep
from lm_eval_pruned.report import report
from lm_eval_pruned.report.figure_data import AXES, MEASURES, curves_of
from lm_eval_pruned.report.figure_labels import spread
from lm_eval_pruned.report.figure_spec import panels_of
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
    for number, percent in enumerate(PERCENTS):
        (file,) = folder.glob(f"units/p{percent}/gsm8k/results_*.json")
        data = json.loads(file.read_text())
        data["config"]["energy"] = {
            "request_types": {
                "generate_until": {
                    "seconds": 20.0 - number,
                    "joules": {"total": 300.0},
                    "generated_tokens": 1000,
                    # The smallest model is not the cheapest one.
                    "joules_per_processed_token": 0.3 - 0.02 * (number % 4),
                }
            }
        }
        file.write_text(json.dumps(data))
    report.write_report(folder)
    return folder


@pytest.fixture(scope="module")
def drawn(sweep):
    base, others = split_sweep(list(read_sweep(sweep).runs), str(sweep))
    ((_, members),) = series_of([base, *others]).items()
    known = {(task, "acc,none"): Levels(1 / CHOICES[task][0]) for task in CHOICES}
    known["boolq", "acc,none"] = Levels(0.5, 0.625)
    return curves_of(members, base, compare(base, others), known)


def point(curves, task, run):
    (found,) = (
        p for p in curves.points if (p["task"], p["configuration"]) == (task, run)
    )
    return found


def test_scores_by_each_measure(drawn):
    mmlu = point(drawn, "mmlu", "p60")
    assert mmlu["raw"] == pytest.approx(30)
    assert mmlu["relative"] == pytest.approx(100 * 0.3 / 0.65)
    assert mmlu["above_chance"] == pytest.approx(100 * 0.05 / 0.40)
    for measure in MEASURES:
        assert mmlu[f"{measure}_low"] < mmlu[measure] < mmlu[f"{measure}_high"]
    base = point(drawn, "mmlu", "p0")
    assert base["mark"] == "unpruned"
    assert base["relative_low"] == base["relative_high"] == base["relative"] == 100
    assert base["above_chance"] == pytest.approx(100)


def test_perplexities_are_inverted_and_keep_their_unit(drawn):
    wikitext = point(drawn, "wikitext", "p60")
    assert wikitext["unit"] == "word_perplexity"
    assert wikitext["relative"] == pytest.approx(100 * np.exp(-3), rel=0.1)
    assert wikitext["relative_low"] < wikitext["relative"] < wikitext["relative_high"]
    assert "above_chance" not in wikitext
    units = [
        set(map(str, panel.specs["ratio"]["layer"]))
        for panel in panels_of(drawn, "raw")
    ]
    assert sum("word_perplexity" in str(each) for each in units) == 1


def test_a_task_at_chance_has_nothing_to_lose(drawn):
    assert "above_chance" not in point(drawn, "boolq", "p60")
    assert any("boolq is not drawn above chance" in note for note in drawn.notes)


def test_a_level_is_drawn_of_what_is_known(drawn):
    levels = {(each["task"], each["kind"]): each["raw"] for each in drawn.levels}
    assert levels["boolq", "majority"] == 62.5
    assert levels["mmlu", "chance"] == 25
    assert {task for task, _ in levels} == {*CHOICES, "boolq"}


def test_the_axes_are_those_that_the_sweep_has(drawn):
    assert drawn.axes() == list(AXES)
    costs = [point(drawn, "mmlu", f"p{each}") for each in PERCENTS]
    assert [each["milliseconds"] for each in costs] == [20, 19, 18, 17, 16, 15, 14]
    assert costs[1]["joules"] == pytest.approx(0.28)
    assert costs[6]["parameters"] == pytest.approx(640e-6)


def test_a_cost_that_some_sizes_lack_is_no_axis(sweep):
    runs = list(read_sweep(sweep).runs)
    runs[2].energy.clear()
    base, others = split_sweep(runs, str(sweep))
    ((_, members),) = series_of(runs).items()
    found = curves_of(members, base, compare(base, others), {})
    assert found.axes() == ["ratio", "parameters"]


def test_what_pruning_takes_stands_next_to_what_it_leaves(drawn):
    assert [panel.title for panel in panels_of(drawn, "relative")] == [
        "Knowledge, Commonsense, Language modelling",
        "Truthfulness, Multi-step reasoning",
        "The rest",
    ]
    scales = {
        str(layer["encoding"]["y"]["scale"]["domain"])
        for panel in panels_of(drawn, "relative")
        for layer in panel.specs["ratio"]["layer"]
    }
    assert len(scales) == 1


@given(
    st.lists(st.tuples(st.floats(0, 300), st.sampled_from((13, 26, 39))), max_size=15)
)
def test_names_are_spread_and_keep_their_order(names):
    places, heights = ([each[n] for each in sorted(names)] for n in (0, 1))
    apart = [(a + b) / 2 for a, b in itertools.pairwise(heights)]

    def far_enough(found, room=0.0):
        steps = (b - a for a, b in itertools.pairwise(found))
        return all(step >= gap - room for step, gap in zip(steps, apart, strict=True))

    found = spread(places, heights)
    assert far_enough(found, 1e-6)
    if far_enough(places):
        assert found == pytest.approx(places)


def test_files_beside_the_page_are_in_the_colours_of_paper(sweep):
    names = {path.stem for path in sweep.glob("report/plots/*.svg")}
    assert {"capabilities-maw", "scores-maw", "above-chance-maw"} <= names
    for name in ("capabilities-maw", "scores-maw", "above-chance-maw"):
        text = (sweep / f"report/plots/{name}.svg").read_text(encoding="utf-8")
        ElementTree.fromstring(text)  # noqa: S314
        assert "var(" not in text
        assert palette.FAMILIES["light"]["knowledge"] in text
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
        *((20,), (1e-5,), (None,), lost, lost - 0.2, lost + 0.2),
        {"acc,none": (0.0, 0.3)},
    )
    (file,) = folder.glob("units/p60/mmlu/results_*.json")
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, "stopping": record.as_dict()}))
    report.write_report(folder)
    return folder


def test_a_partial_score_is_drawn_with_the_documents_it_has(stopped):
    base, others = split_sweep(list(read_sweep(stopped).runs), str(stopped))
    ((_, members),) = series_of([base, *others]).items()
    comparison = compare(base, others)
    curves = curves_of(members, base, comparison, {("mmlu", "acc,none"): Levels(0.25)})
    full, partial = (point(curves, "mmlu", name) for name in ("p20", "p60"))
    assert (full["shape"], partial["shape"]) == (full["mark"], "partial")
    assert full["n"] == str(N)
    assert partial["n"] == f"partial: 20 of {N}"
    assert partial["mark"] == "significant"
    # Its interval is that of the look, and all of it is of the same documents.
    (row,) = (each for each in comparison.rows if each.run == "p60")
    assert partial["raw"] == 0
    assert row.base_score + row.low < partial["raw_low"] == 0
    assert partial["raw_high"] == pytest.approx(100 * (row.base_score + row.high))
    assert partial["relative_high"] == pytest.approx(
        100 * (1 + row.high / row.base_score)
    )
    chance = 100 * (0 - 0.25) / (row.base_score - 0.25)
    assert partial["above_chance"] == pytest.approx(chance)


def test_a_partial_score_has_a_mark_of_its_own_in_every_format(stopped, sweep):
    legend = "diamonds: partial"
    for measure in ("capabilities", "scores"):
        name = f"report/plots/{measure}-maw.svg"
        assert legend in "".join(ElementTree.parse(stopped / name).getroot().itertext())  # noqa: S314
        assert legend not in (sweep / name).read_text(encoding="utf-8")
    for name in ("report.html", "report.md"):
        text = (stopped / "report" / name).read_text(encoding="utf-8")
        assert "Diamonds are partial" in text
        assert f"partial: 20 of {N}" in text
        assert "Diamonds" not in (sweep / "report" / name).read_text(encoding="utf-8")
    rows = list(csv.DictReader((stopped / "report/results.csv").open()))
    (partial,) = (row for row in rows if row["of"])
    assert (partial["documents"], partial["of"]) == ("20", str(N))
    assert (partial["score_low"], partial["score_high"]) == ("0.0", "0.3")
    assert "McNemar mid-p, group sequential." in text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_stand_out(scheme):
    page = palette.PAGE[scheme]
    grounds = page["ground"], page["band"]
    texts = [page[name] for name in ("ink", "quiet", "better", "worse")]
    for colour in [*texts, *palette.FAMILIES[scheme].values()]:
        assert min(palette.contrast(colour, ground) for ground in grounds) >= 4.5
    for colour in [page["edge"], *palette.LINES[scheme]]:
        assert palette.contrast(colour, page["ground"]) >= 3


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
    "document.querySelector('.panels')?.getAttribute('aria-busy') === 'false' "
    "&& document.querySelectorAll('.panels .role-mark').length > 9"
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
    } else if (element.matches(".swatch")) note("mark", style.backgroundColor, element.parentElement);
  }
  return Object.keys(found);
})()
"""
#: Names at the ends of lines that stand on each other.
OVERLAPS = """
[...document.querySelectorAll(".panels > div")].flatMap((panel) => {
  const names = new Set(JSON.parse(document.getElementById("figure-data").textContent)
    .series.maw.points.map((point) => point.task));
  const boxes = [...panel.querySelectorAll("text")]
    .filter((text) => names.has(text.textContent)).map((text) => [text.textContent, text.getBoundingClientRect()]);
  return boxes.flatMap(([one, a], n) => boxes.slice(n + 1)
    .filter(([, b]) => Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3)
    .map(([other]) => `${one} / ${other}`));
})
"""


def redrawn(page, name, value):
    """Choose something in the figure and wait until it is drawn anew."""
    page.run("document.querySelector('.panels').firstElementChild.dataset.old = 1")
    page.run(f"document.querySelector('[name={name}][value={value}]').click()")
    page.wait(f"!document.querySelector('.panels [data-old]') && {READY}")


def as_hex(colour):
    parts = colour.removeprefix("rgb(").removeprefix("rgba(").rstrip(")").split(",")
    return "#" + "".join(f"{int(part):02x}" for part in parts[:3])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("measure", "scheme"), [("raw", "light"), ("relative", "dark")]
)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_browser_shows_it(shown, tmp_path, width, measure, scheme):
    import matplotlib.image

    shown.look(width, scheme=scheme)
    shown.wait(READY)
    if not shown.run(f"document.querySelector('[value={measure}]').checked"):
        redrawn(shown, "measure", measure)
    widths = "[document.documentElement.scrollWidth, innerWidth]"
    assert shown.run(widths) == [width, width]
    assert shown.run(OVERLAPS) == []
    shot = tmp_path / "page.png"
    shown.screenshot(shot, 2000)
    pixels = matplotlib.image.imread(shot)[..., :3]
    assert pixels.shape[1] == width

    def share(colour):
        wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        return (np.abs(pixels - wanted).max(axis=2) < 0.02).sum()

    page = palette.PAGE[scheme]
    assert share(page["ground"]) > 0.5 * pixels.shape[0] * width
    assert share(page["ink"]) > 1000
    for family in ("knowledge", "commonsense", "truthfulness", "reasoning"):
        assert share(palette.FAMILIES[scheme][family]) > 100, family


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_no_name_of_a_task_is_cut(shown, width):
    shown.look(width)
    shown.wait(READY)
    texts = shown.run(
        "[...document.querySelectorAll('.panels text')].map(e => e.textContent)"
    )
    assert set(CHOICES) <= set(texts)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_table_that_is_cut_off_has_a_shadow_there(shown, tmp_path, width, scheme):
    import matplotlib.image

    shown.look(width, scheme=scheme)

    def edge(name):
        shot = tmp_path / f"{name}.png"
        shown.run("document.querySelector('[aria-label=Scores]').scrollIntoView()")
        box = shown.run(
            "((b) => [b.right, b.top, b.bottom])"
            "(document.querySelector('[aria-label=Scores]').getBoundingClientRect())"
        )
        right, top, bottom = map(round, box)
        shown.screenshot(shot)
        pixels = matplotlib.image.imread(shot)[top : min(bottom, 900), :, :3]
        # More of a table is ground than letters.
        return np.median(pixels[:, right - 5 : right - 2], axis=(0, 1))

    scroll = "(x) => document.querySelector('[aria-label=Scores]').scrollTo(x, 0)"
    shown.run(f"({scroll})(0)")
    wide = shown.run(
        "((e) => e.scrollWidth > e.clientWidth)(document.querySelector('[aria-label=Scores]'))"
    )
    cut = edge("start")
    shown.run(f"({scroll})(1e6)")
    whole = edge("end")
    shown.run(f"({scroll})(0)")
    assert wide == (width < 1280)
    assert (np.abs(cut - whole).max() > 0.1) == wide


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
    assert len(found) > 15
    for kind, colour, ground in found:
        least = 4.5 if kind == "text" else 3
        assert palette.contrast(as_hex(colour), as_hex(ground)) >= least, (kind, colour)


@pytest.mark.slow
def test_families_are_chosen_with_keys(shown):
    def lines():
        return shown.run("document.querySelectorAll('.panels .mark-line path').length")

    shown.look()
    shown.wait(READY)
    before = lines()
    shown.run("document.querySelector('[name=family][value=commonsense]').focus()")
    shown.key(" ")
    shown.wait(
        f"document.querySelectorAll('.panels .mark-line path').length < {before}"
    )
    shown.key(" ")
    shown.wait(
        f"document.querySelectorAll('.panels .mark-line path').length == {before}"
    )


@pytest.mark.slow
def test_every_control_is_reached_with_the_tab_key(shown):
    shown.look()
    shown.run("document.activeElement.blur(); scrollTo(0, 0)")
    seen = set()
    for _ in range(60):
        shown.key("Tab")
        seen.add(
            shown.run(
                "((e) => e.name || e.download || e.ariaLabel || e.tagName)"
                "(document.activeElement)"
            )
        )
    wanted = {"measure", "axis", "family", "results.csv", "SUMMARY", "Scores"}
    assert wanted <= seen


@pytest.mark.slow
def test_a_measure_and_an_axis_are_chosen_with_arrows(shown):
    shown.look()
    shown.run("document.querySelector('[name=axis]').focus()")
    shown.run("document.querySelector('[name=axis]').click()")
    for axis in list(AXES)[1:]:
        shown.key("ArrowRight")
        title = json.dumps(AXES[axis])
        shown.wait(
            f"[...document.querySelectorAll('.panels text')].some((text) => text.textContent === {title})"
        )
    redrawn(shown, "axis", "ratio")


@pytest.mark.slow
def test_who_points_at_a_point_is_told_its_numbers(shown):
    shown.look()
    shown.wait(READY)
    shown.run("new Promise((done) => setTimeout(done, 500))")
    shown.run("document.querySelector('.panels').scrollIntoView()")
    x, y = shown.run(
        "((box) => [box.x + box.width / 2, box.y + box.height / 2])"
        "(document.querySelector('.panels .mark-symbol path').getBoundingClientRect())"
    )
    # A browser takes the first move for the mouse having been there.
    shown.point(x - 3, y)
    shown.point(x, y)
    shown.wait("document.querySelector('#vg-tooltip-element.visible') !== null")
    told = shown.run("document.querySelector('#vg-tooltip-element').innerText")
    for word in ("interval", "documents (n)", "smallest detectable", "q", "verdict"):
        assert word in told
    assert str(N) in told
    shown.point(0, 0)


@pytest.mark.slow
def test_it_is_printed_dark_on_white_whatever_the_screen(shown):
    shown.look(scheme="dark", media="print")
    assert shown.run("getComputedStyle(document.body).backgroundColor") == (
        "rgb(255, 255, 255)"
    )
    assert (
        shown.run("getComputedStyle(document.querySelector('form')).display") == "none"
    )
    assert shown.run("document.querySelectorAll('.panels svg').length") >= 2
    shown.look()


@pytest.mark.slow
def test_a_browser_tells_a_partial_score_apart(shown, stopped):
    shown.look()
    one = READY.replace("> 9", "> 1")
    shown.open(stopped / "report/report.html")
    shown.wait(one)
    shapes = shown.run(
        "[...document.querySelectorAll('.panels .mark-symbol path')]"
        ".filter((path) => getComputedStyle(path).opacity > 0)"
        ".map((path) => path.getAttribute('d').includes('A') ? 'circle' : 'diamond')"
    )
    assert sorted(shapes) == ["circle", "diamond"]
