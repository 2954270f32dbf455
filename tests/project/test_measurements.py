"""Figures in the tables of measurements are in the CSV files beside them."""

import csv
import re
from collections import defaultdict
from statistics import fmean

import pytest

from lm_eval_pruned.pruning.criteria import CHANCE_BEATS
from tests.helpers.checkpoints import ROOT


FOLDER = ROOT / "docs" / "measurements"
PAGES = {
    "latency": ROOT / "docs" / "energy.md",
    "recipes": ROOT / "docs" / "pruning-well.md",
    "probes_kept": FOLDER / "dichotomy.md",
}
#: Files whose figures a page shows as well.
BESIDE = {
    "recipes": ("price_nats",),
    "first_layer": ("dichotomy", "recipes"),
    "dichotomy": ("recipes", "probes_kept"),
    "price": ("recipes", "price_nats"),
    "probes_kept": ("recipes", "dichotomy"),
}
#: Sections whose tables rest on what others published, or on data that were not kept.
OTHERS = r"## (?:The study's|Compare with a published)(?:.*\n)+?(?=## |\Z)"


def rows_of(stem):
    """Return model, percent, words of the method and values of the rows of a file."""
    lines = (FOLDER / f"{stem}.csv").read_text("utf-8").splitlines()
    for row in csv.DictReader(line for line in lines if line[0] != "#"):
        run = row.get("run", "")
        percent = row.get("percent") or row.get("removed")
        percent = float(percent or "".join(re.findall(r"(\d+) %", run)) or 0)
        words = {*re.findall(r"\w+", row.get("method", run))}
        numbers = [float(v) for v in row.values() if re.fullmatch(r"[+-]?\d+\.\d+", v)]
        yield row.get("model", run.split(" ")[0]), f"{percent:.0f}", words, numbers


@pytest.mark.parametrize(
    "stem",
    [
        path.stem
        for path in FOLDER.glob("*.csv")
        if path.stem.partition("_")[0]
        not in ("coverage", "demo", "documents", "performance")
        and path.stem != "price_nats"
    ],
)
def test_figures_in_tables_are_those_of_the_data(stem):
    rows = [row for of in (stem, *BESIDE.get(stem, ())) for row in rows_of(of)]
    known = set().union(*(words for _, _, words, _ in rows))
    page = PAGES.get(stem, FOLDER / f"{stem}.md").read_text("utf-8")
    for table in re.findall(r"(?m)(?:^\|.*\n)+", re.sub(OTHERS, "", page)):
        head, _, *body = (line.split("|")[1:-1] for line in table.splitlines())
        model = share = label = ""  # of the row above, for cells that are left empty
        for cells in body:
            first = "".join(cells[:2])
            label = first if cells[0].strip() or "`" in first else label
            for title, cell in zip(head, cells, strict=True):
                model, *_ = *re.findall("SmolLM2|Gemma-3", title + first), model
                share, *_ = *re.findall(r"(\d+) %", title + "".join(cells[:4])), share
                names = {*re.findall(r"`(\w+)`", title + label)} & known
                figures = re.findall(r"(?<![\w.])[+-]?\d+\.\d+(?!\w)", cell)
                for figure in figures if title.strip() != "floor" else ():
                    near = 0.51 * 10 ** -len(figure.partition(".")[2])
                    assert any(
                        abs(number * scale - float(figure)) < near
                        for of, cut, words, numbers in rows
                        if model in (of, "")
                        if cut == "0" or (share in (cut, "") and names <= words)
                        for number in numbers
                        for scale in (1, 100)
                    ), (title, label, share, figure)


@pytest.mark.parametrize("page", ["measurements/performance.md", "faster.md"])
def test_figures_of_performance_are_those_of_the_data(page):
    data = (FOLDER / "performance.csv").read_text("utf-8")
    known = {*re.findall(r"\d+\.\d+", data)}
    tables = re.findall(r"(?m)^\|.*", (ROOT / "docs" / page).read_text("utf-8"))
    figures = {*re.findall(r"(?<![\w.-])\d+\.\d+", "\n".join(tables))}
    assert figures
    assert figures <= known


def test_the_table_of_documents_needed_is_that_of_the_data():
    lines = (FOLDER / "documents_needed.csv").read_text("utf-8").splitlines()
    needed = {
        (row["candidate"], row["metric"], row["task"]): [
            f"{int(row[name]):,}" if row[name] else "-"
            for name in ("needed if equal", "needed if it differs so")
        ]
        for row in csv.DictReader(lines)
    }
    page = (ROOT / "docs" / "statistics.md").read_text("utf-8")
    (table,) = re.findall(r"(?m)^\| candidate \| knowledge.*\n(?:\|.*\n)+", page)
    columns = [
        ("lift", "pruned_probe_knowledge"),
        ("lift", "pruned_probe_instructions"),
        ("mc2", "pruned_demo_truthfulness"),
        ("mc1", "pruned_demo_truthfulness"),
        ("bias", "pruned_demo_bias"),
        ("bits_per_byte", "pruned_demo_text"),
    ]
    for line in table.splitlines()[2:]:
        first, *cells = (cell.strip() for cell in line.split("|")[1:-1])
        name = re.sub(
            r"[`% ]", "", first.split("(")[0].split(" by ")[0].split(" in ")[0]
        )
        for cell, key in zip(cells, columns, strict=True):
            expected = needed.get((name, *key), ["not measured"])
            assert cell == " / ".join(expected), (name, key)


def losses():
    """Return the losses by CSV file, model, method and percent; seeds are one method."""
    found = defaultdict(list)
    for stem, column in (("recipes", "mean"), ("dichotomy", "score")):
        lines = (FOLDER / f"{stem}.csv").read_text("utf-8").splitlines()
        for row in csv.DictReader(line for line in lines if line[0] != "#"):
            first = (row.get("question"), row.get("task"))
            if stem == "dichotomy" and first != ("unpruned", "held_text"):
                continue
            percent = row.get("percent") or row.get("removed")
            method = row["method"].partition(", seed")[0]
            found[stem, row["model"], method, int(percent)] += [float(row[column])]
    return {key: fmean(values) for key, values in found.items()}


@pytest.mark.parametrize("cut", CHANCE_BEATS)
def test_where_chance_beats_a_criterion_is_what_the_data_say(cut):
    stem = "recipes" if cut.startswith("maw") else "dichotomy"
    method = "fast" if "skip_layers" in cut else cut
    by, measured = losses(), {}
    for model in ("SmolLM2-135M-Instruct", "Gemma-3-270M"):
        cuts = {
            k[2:]: v for k, v in by.items() if model.startswith(k[1]) and k[0] == stem
        }
        percents = [n for name, n in cuts if name == method]
        assert len(percents) >= 5
        worse = tuple(n for n in percents if cuts[method, n] > cuts["random", n])
        measured |= {model: worse} if worse else {}
    assert measured == CHANCE_BEATS[cut]
