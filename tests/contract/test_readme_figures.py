"""README.md: every measured figure is that of a cell in the CSV files of the measurements."""

from __future__ import annotations

import csv
import re

import pytest

from tests.helpers.checkpoints import ROOT


PAGE = (ROOT / "README.md").read_text("utf-8")
PROSE = " ".join(PAGE.split())
LIFT = {"model": "SmolLM2", "level": "all", "metric": "lift"}
TRUTHFULQA = {"section": "engines", "work": "TruthfulQA, 265 requests"}
DISTILLED = {"table": "distilled", "model": "SmolLM2", "percent": "40"}
CUT, HOUR = (
    {**DISTILLED, "method": f"uneven, {what}"}
    for what in (
        "cut and repaired",
        "MLPs for 60 minutes, passages of BoolQ and 60 speeches too",
    )
)


def rows(stem, **words):
    """Return the rows of a file that have these words in their columns."""
    folder = "lm_eval_pruned/study" if stem.startswith("study") else "docs/measurements"
    lines = (ROOT / folder / f"{stem}.csv").read_text("utf-8").splitlines()
    chosen = [
        row
        for row in csv.DictReader(line for line in lines if line[0] != "#")
        if words.items() <= row.items()
    ]
    assert chosen, (stem, words)
    return chosen


def cell(stem, column, number=0, **words):
    """Return one number of the first row with these words, such as the second of `347 and 150`."""
    (first, *_) = rows(stem, **words)
    return float(re.findall(r"\d+(?:\.\d+)?", first[column])[number])


def share(stem, column, **words):
    return 100 * cell(stem, column, **words)


def kept(probe, method, percent):
    """Return the share of a probe's lift that is kept, and its interval."""
    words = {**LIFT, "probe": probe, "method": method, "percent": percent}
    columns = ("kept", "kept_low", "kept_high")
    return [share("probes_kept", column, **words) for column in columns]


def loss(method, removed):
    return cell("recipes", "mean", model="SmolLM2", method=method, removed=removed)


def seconds(engine):
    return cell("performance", "value", figure=f"seconds, {engine}", **TRUTHFULQA)


UNPRUNED = loss("unpruned", "0")
BEST20, LOW, HIGH = (100 - lost for lost in kept("knowledge", "best", "20"))
RANDOM = [
    100 * float(row["kept"])
    for row in rows(
        "probes_kept", **LIFT, probe="knowledge", method="random", percent="10"
    )
]
#: What the study's cut and recipe=best lose of what the demo's probe shows above its floor.
FLOOR, WHOLE, STUDY, BEST = (
    share("demo", column, task="pruned_probe_knowledge")
    for column in ("floor", "unpruned", "study", "best")
)
#: Sentences of the page, with a group for each figure, and the figures in the data.
SENTENCES = {
    r"The study's cut lost (\d+) of the (\d+) points of knowledge above the floor, "
    r"`recipe=best` (\d+)\.": [WHOLE - STUDY, WHOLE - FLOOR, WHOLE - BEST],
    r"\| half a second, ([\d.]+) GB of memory \| .*? ([\d.]+) GB of memory for": [
        cell("performance", "value", section="1B", work=f"{shape}, {work}")
        for shape in ("shape of Llama-3.2-1B, random",)
        for work in ("recipe=study, 40 %", "recipe=best, prune")
    ],
    r"\| a few seconds, (\d+) GB \| (\d+) CPU hours, (\d+) GB for `prune`, (\d+) GB": [
        cell("performance", "value", section="8B", work="recipe=study"),
        *(
            cell("performance", "value", number, section="8B", work="recipe=best")
            for number in range(3)
        ),
    ],
    r"it takes (\d+) CPU seconds, and (\d+) for each further candidate": [
        cell("performance", "value", number, section="verdict") for number in range(2)
    ],
    r"TruthfulQA is (\d+) to (\d+) times faster": [
        cell("performance", "value", figure="hf / hf-prefix", **TRUTHFULQA),
        seconds("hf") / seconds("hf-prefix"),
    ],
    r"SmolLM2 keeps (\d+) % \((\d+) to (\d+)\) of the knowledge": kept(
        "knowledge", "maw", "10"
    ),
    r"random cuts keep (\d+) to (\d+) %": [min(RANDOM), max(RANDOM)],
    r"`recipe=best` (\d+) % \((\d+) to (\d+)\)": kept("knowledge", "best", "10"),
    r"raises the loss from (\d\.\d+) to (\d\.\d+) nats per token on seven kinds of text, "
    r"random cuts to (\d\.\d+)": [UNPRUNED, loss("maw", "10"), loss("random", "10")],
    r"`recipe=best` raises it by (\d\.\d), the study's cut by (\d\.\d)": [
        loss("best", "30") - UNPRUNED,
        loss("maw", "30") - UNPRUNED,
    ],
    r"study's cut, too\*\*: to (\d+) % \((\d+) to (\d+)\) at 20 %": kept(
        "instructions", "maw", "20"
    ),
    r"knowledge falls to (\d+) % \((\d+) to (\d+)\)": kept("knowledge", "best", "50"),
    r"SmolLM2 keeps (\d+) %\. An hour .* raises that to (\d+) %, and instructions fall "
    r"from (\d+) to (\d+) %": [
        share("price", "value", **words, task=f"{probe} kept, share of lift")
        for probe in ("knowledge", "instructions")
        for words in (CUT, HOUR)
    ],
    r"`Yes` to every prompt scores (\d+\.\d), and the study's 1B model starts at "
    r"(\d+\.\d)": [
        share("dichotomy", "score", task="ifeval", n="541", method="answer Yes"),
        share(
            "study_benchmarks",
            "value",
            base_model="Llama-3.2-1B",
            prune_percent="0",
            metric="inst_level_strict_acc,none",
        ),
    ],
    r"`recipe=best` loses (\d+) % of it at 20 % \((\d+) to (\d+)\)": [
        BEST20,
        HIGH,
        LOW,
    ],
    r"on the seven kinds of text, (\d\.\d+) instead of (\d\.\d+),": [
        loss("best", "20"),
        UNPRUNED,
    ],
}


@pytest.mark.parametrize("sentence", SENTENCES)
def test_figures_of_a_sentence_are_those_of_the_data(sentence):
    (shown,) = re.findall(sentence, PROSE)
    for figure, number in zip(shown, SENTENCES[sentence], strict=True):
        # Halves are rounded either way.
        unit = 10.0 ** -len(figure.partition(".")[2])
        assert abs(float(figure) - number) <= 0.5 * unit + 1e-9, (figure, number)


def test_no_other_sentence_has_a_decimal_or_an_interval():
    page = re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)
    prose = " ".join(re.sub(r"(?m)^(?:!|\| (?:truth|instr|know)).*$", "", page).split())
    for sentence in SENTENCES:
        prose = re.sub(sentence, "", prose)
    # Arguments and links; versions, the study and its ratios; `test_readme` has the loss of a random cut.
    prose = re.sub(r"`[^`]*`|\]\(\S*\)|3\.1[03]|2\.0|2\.67|7\.58", "", prose)
    assert re.findall(r"\d+\.\d+|\(\d+ to \d+\)", prose) == []


def test_the_table_of_the_demo_is_that_of_the_data():
    names = {
        "truthfulness, MC1": "truthfulness",
        "instructions": "instructions",
        "knowledge": "knowledge",
    }
    for label, task in names.items():
        (line,) = re.findall(rf"(?m)^\| {label} \| (.*) \|$", PAGE)
        floor, *scores = map(float, line.split(" | "))
        (row,) = (row for row in rows("demo") if row["task"].endswith(task))
        columns = ("unpruned", "study", "best")
        assert scores == [float(row[column]) for column in columns]
        assert floor == round(float(row["floor"]), 3)
        if probe := re.findall("knowledge|instructions", task):
            (known,) = rows(
                "probes", model="SmolLM2", probe=probe[0], level="all", family="all"
            )
            assert (row["unpruned"], row["floor"]) == (
                f"{float(known['acc']):.4f}",
                f"{float(known['floor']):.4f}",
            )
        # The first command printed the score of the study's cut.
        (printed,) = re.findall(rf"(?m)^\| - {row['task']}\b.*?(0\.\d+)\|±", PAGE)
        assert float(printed) == float(row["study"])
