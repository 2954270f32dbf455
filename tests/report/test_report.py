from __future__ import annotations

import base64
import csv
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from lm_eval_pruned import cli
from lm_eval_pruned.results.files import ResultsError
from tests.helpers.results_files import write_sweep


for module in ("altair", "vl_convert"):
    pytest.importorskip(module, reason="figures need the extra `report`")

from lm_eval_pruned.report import report


N = 60
NASTY = "<script>alert('x')<script>|$\\frac{1}{2}$&amp;"


def answers(share: float) -> list[float]:
    order = np.random.default_rng(11).permutation(N)
    return (order < share * N).astype(float).tolist()


def perplexity(level: float) -> dict:
    values = np.random.default_rng(2).normal(-level, 0.3, size=N).tolist()
    return {"values": values, "aggregation": "perplexity", "higher_is_better": False}


def tasks(knows: float, true: float, level: float) -> dict:
    return {
        "mmlu": {"acc,none": answers(knows)},
        "truthfulqa_mc2": {"acc,none": answers(true)},
        "wikitext": {"word_perplexity,none": perplexity(level)},
        NASTY: {"acc,none": answers(knows)},
    }


def make_sweep(folder):
    write_sweep(
        folder,
        {
            "base": (0, tasks(0.8, 0.3, 2.0)),
            "p20": (20, tasks(0.5, 0.45, 2.6)),
            "p40": (40, tasks(0.4, 0.6, 3.1)),
            "p60": (60, tasks(0.3, 0.7, 3.9)),
            "p80": (80, {}),
        },
        p80="mmlu",
    )
    for number, file in enumerate(
        sorted(folder.glob("units/*/wikitext/results_*.json"))
    ):
        data = json.loads(file.read_text())
        data["config"]["energy"] = {
            "sources": {"cpu": {"kind": "modelled"}, "gpu": None},
            "notes": ["a note of the meter"],
            "request_types": {
                "generate_until": {
                    "seconds": 20.0 - number,
                    "joules": {"cpu": 1.0, "total": 300.0 - number},
                    "generated_tokens": 1000,
                    "joules_per_processed_token": 0.3,
                },
                "damaged": "not a mapping",
            },
        }
        file.write_text(json.dumps(data))
    return folder


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = make_sweep(tmp_path_factory.mktemp("sweep"))
    report.write_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(sweep):
    return (sweep / "report" / "report.html").read_text(encoding="utf-8")


class Elements(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def elements(page):
    parser = Elements()
    parser.feed(page)
    return parser.found


def points(page):
    """Return the rows that the page's figure draws."""
    texts = re.findall(r'application/json" id=.*?>(.*?)</script>', page, re.DOTALL)
    specs = [json.loads(text, parse_constant=pytest.fail) for text in texts]
    data = [rows for spec in specs for rows in spec["datasets"].values()]
    return [row for rows in data for row in rows if "mark" in row]


def test_the_files(sweep):
    written = {
        str(p.relative_to(sweep / "report"))
        for p in sweep.rglob("report/**/*")
        if p.is_file()
    }
    assert written == {
        "report.html",
        "report.md",
        "results.csv",
        "flips.html",
        "flips.csv",
        *(
            f"plots/{name}.{suffix}"
            for name in (
                "capabilities-maw",
                "scores-maw",
                "knowledge-truthfulness-maw",
            )
            for suffix in ("png", "svg")
        ),
    }
    assert (sweep / "report/plots/scores-maw.png").read_bytes().startswith(b"\x89PNG")
    for file in sweep.glob("report/plots/*.svg"):
        ElementTree.parse(file)  # noqa: S314


def test_the_page_needs_nothing_from_elsewhere(page):
    for tag, attributes in elements(page):
        assert tag not in {"link", "iframe", "img", "object", "embed"}
        if tag == "a" and "download" in attributes:
            assert attributes["href"].startswith("data:text/csv;")
            continue
        for name in ("src", "href", "xlink:href", "action"):
            value = attributes.get(name) or "#"
            assert value.startswith("#") or value in {"flips.html", "flips.csv"}
    styles = "".join(re.findall(r"<style>(.*?)</style>", page, re.DOTALL))
    assert "@import" not in styles
    assert "url(" not in styles
    # What the library would load if it were told to, the browser refuses.
    (policy,) = (a for tag, a in elements(page) if "http-equiv" in a)
    rules = dict(rule.split(None, 1) for rule in policy["content"].split("; "))
    assert rules.pop("default-src") == "'none'"
    scripts = rules.pop("script-src")
    assert re.fullmatch(r"'sha256-[\w+/]+=' 'sha256-[\w+/]+='", scripts)
    assert rules == {
        "style-src": "'unsafe-inline'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_the_page_does_not_run_what_results_say(page, sweep):
    scripts = re.findall(r"<script[^>]*>(.*?)</script", page, re.DOTALL)
    assert len(scripts) == page.count("<script") == 4
    *data, library, own = scripts
    assert NASTY in {point["line"] for point in points(page)}
    assert "alert('x')" not in library + own
    assert "<" not in "".join(data)
    assert "&lt;script&gt;" in page
    text = (sweep / "report/report.md").read_text(encoding="utf-8")
    before_code, _, _ = text.partition("```json")
    assert "<script" not in before_code
    assert "&lt;script>alert('x')&lt;script>\\|$" in before_code
    for file in sweep.glob("report/plots/*.svg"):
        assert "<script" not in file.read_text(encoding="utf-8")


def test_the_page_hands_on_its_scores(page, sweep):
    (link,) = (a for tag, a in elements(page) if "download" in a)
    kind, _, content = link["href"].partition("base64,")
    assert link["download"] == "results.csv"
    assert kind == "data:text/csv;charset=utf-8;"
    assert base64.b64decode(content) == (sweep / "report/results.csv").read_bytes()


def test_verdicts_have_colours(page):
    assert '<td class=" worse">0.5000 \u25bc</td>' in page
    assert '<td class=" better">\u25b2 1 better</td>' in page
    assert '<td class=" better">better</td>' in page


def test_the_definition_is_folded_away(page):
    (folded,) = re.findall(r"<details>(.*?)</details>", page, re.DOTALL)
    assert folded.startswith("<summary>Versions, settings")
    assert "configurations" in folded


def test_ids_of_the_plots_do_not_collide(page):
    ids = [attributes["id"] for _, attributes in elements(page) if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:url\(#|href="#)([^")]+)', page)
    assert set(used) <= set(ids)


def test_the_page_follows_light_and_dark(page):
    assert "prefers-color-scheme: dark" in page
    written = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    drawings = re.findall(r"<svg.*?</svg>", written, re.DOTALL)
    assert len(drawings) == 2
    for drawing in drawings:
        assert "var(--ink)" in drawing
        assert set(re.findall(r"#[0-9a-fA-F]{6}\b", drawing)) == set()


def test_every_plot_has_a_text_alternative_and_units(page, sweep):
    drawn, *figures = [a for tag, a in elements(page) if tag == "figure"]
    assert len(figures) == 1
    assert all(a["role"] == "img" and len(a["aria-label"]) > 40 for a in figures)
    assert drawn["aria-label"] == "What pruning takes, and what it leaves"
    assert "Filled points differ significantly" in page.partition("<figcaption")[2]
    for label in (
        "expansion ratio (intermediate size / hidden size)",
        "relative to unpruned (%)",
        "J / processed token",
        "ms / generated token",
    ):
        assert label in page


@pytest.mark.slow
def test_what_was_not_tested_has_a_mark_of_its_own(tmp_path):
    def metrics(share):
        return {
            "acc,none": {"values": answers(share), "score": 0.1 + share},
            "acc_norm,none": answers(share),
        }

    write_sweep(
        tmp_path,
        {
            f"p{percent}": (
                percent,
                {
                    # A score that its documents do not make up, and no stderr.
                    "odd": {"f1,none": {"values": answers(0.5), "score": 0.2 + share}},
                    "arc": metrics(share),
                    "same": {"acc,none": answers(0.5)},
                },
            )
            for percent, share in ((0, 0.5), (20, 0.45), (40, 0.4))
        },
    )
    report.write_report(tmp_path)
    text = (tmp_path / "report/report.md").read_text(encoding="utf-8")
    (odd,) = [line for line in text.splitlines() if line.startswith("|odd|f1 \u2191|")]
    assert odd.count("\u00d7") == 2
    (restated,) = [
        line for line in text.splitlines() if line.startswith("|arc|acc \u2191")
    ]
    assert restated.startswith("|arc|acc \u2191 \u2020|")
    assert "\u00d7" not in restated
    (same,) = [line for line in text.splitlines() if line.startswith("|same|acc")]
    assert "\u00d7" not in same
    assert same.count("\u25cb") == 2
    rows = [line for line in text.splitlines() if "|same|acc,none|0.5" in line]
    assert [row.endswith("|not shown|") for row in rows] == [True, True]
    assert "only a perfect order" not in text
    assert "not tested|" in text
    page = (tmp_path / "report/report.html").read_text(encoding="utf-8")
    marks = {(p["line"], p["run"]): p["mark"] for p in points(page)}
    assert marks["odd", "p20"] == "not tested"
    assert marks["same", "p20"] == "tested"
    assert marks["same", "p0"] == "unpruned"
    with (tmp_path / "report/results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    verdicts = {(r["task"], r["metric"]): r["verdict"] for r in rows if r["verdict"]}
    assert verdicts["odd", "f1,none"] == "not tested"
    assert verdicts["arc", "acc,none"] == "restated"
    assert verdicts["same", "acc,none"] == "not shown"


def test_failures_energy_and_definition_are_told(sweep):
    text = (sweep / "report/report.md").read_text(encoding="utf-8")
    assert "mmlu failed on p80: out of memory" in text
    assert "CPU: modelled" in text
    assert "a note of the meter" in text
    assert '"configurations"' in text
    assert "|Pearson r|95% interval|" in text
    assert re.search(r"truthfulqa_mc2 acc,none\|4\|-0\.9\d\d\|", text)


@pytest.mark.slow
def test_a_report_is_deterministic(sweep, tmp_path):
    report.write_report(sweep, tmp_path)
    for file in tmp_path.rglob("*"):
        if file.is_file():
            again = sweep / "report" / file.relative_to(tmp_path)
            assert file.read_bytes() == again.read_bytes(), file.name


def test_a_small_sweep(tmp_path):
    # Two configurations, no knowledge task, a baseline that scores nothing.
    zero, some = [0.0] * N, answers(0.4)
    write_sweep(
        tmp_path,
        {
            "base": (0, {"ifeval": {"acc,none": zero}}),
            "p20": (20, {"ifeval": {"acc,none": some}}),
        },
    )
    report.write_report(tmp_path)
    text = (tmp_path / "report/report.md").read_text(encoding="utf-8")
    assert "plots/scores-maw.png" in text
    assert "plots/capabilities" not in text
    assert "Knowledge against" not in text


def test_a_baseline_alone(tmp_path):
    write_sweep(tmp_path, {"base": (0, {"ifeval": {"acc,none": answers(0.4)}})})
    report.write_report(tmp_path)
    assert "|ifeval|acc \u2191|0.4000|" in (tmp_path / "report/report.md").read_text()


def test_runs_without_a_shared_task_are_named(tmp_path):
    write_sweep(
        tmp_path,
        {
            "base": (0, {"a": {"acc,none": answers(0.4)}}),
            "p20": (20, {"b": {"acc,none": [1.0]}}),
        },
    )
    report.write_report(tmp_path)
    text = (tmp_path / "report/report.md").read_text()
    assert "p20 shares no task with the unpruned model" in text


def test_without_baseline(tmp_path):
    write_sweep(tmp_path, {"p20": (20, {"a": {"acc,none": [1.0]}})})
    with pytest.raises(ResultsError, match="unpruned model"):
        report.write_report(tmp_path)


def test_the_command(sweep, tmp_path, capsys):
    assert cli.main(["report", str(sweep), "--output_path", str(tmp_path / "r")]) == 0
    assert capsys.readouterr().out.splitlines()[0] == str(
        tmp_path / "r" / "report.html"
    )
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "sweep.json" in capsys.readouterr().err
