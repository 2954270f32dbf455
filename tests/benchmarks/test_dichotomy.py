"""The page of the dichotomy: its commands, its tables from tiny sweeps, and the page as committed."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import re
import shlex
import subprocess

import numpy as np
import pytest

from lm_eval_pruned.cli import profile
from lm_eval_pruned.sweeps import options as sweep_options
from lm_eval_pruned.util.options import add_options
from tests.helpers import checkpoints, results_files


TABLES = checkpoints.ROOT / "docs" / "measurements" / "dichotomy"


@pytest.fixture(scope="module")
def steps(script):
    return script("dichotomy.steps")


@pytest.fixture(scope="module")
def collecting(script):
    return script("dichotomy.collecting")


@pytest.fixture(scope="module")
def make(script):
    """The script `docs/make_dichotomy.py`, as a module."""
    file = checkpoints.ROOT / "docs" / "make_dichotomy.py"
    spec = importlib.util.spec_from_file_location("make_dichotomy", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("model", ["smollm2", "gemma"])
def test_every_step_is_a_command_that_is_accepted(steps, model, tmp_path):
    setting = steps.Setting(
        *(tmp_path, model, "NAME", ("gguf_file=FILE",), "bfloat16", "cpu"),
        samples="{}",
        max_steps="7",
    )
    parsers = {"sweep": argparse.ArgumentParser(), "profile": argparse.ArgumentParser()}
    sweep_options.add_arguments(parsers["sweep"])
    add_options(parsers["profile"], profile.OPTIONS)
    for step in steps.STEPS:
        program, command, *words = steps.words_of(step, setting)
        assert program == "lm-eval-pruned"
        parsed = parsers[command].parse_args(words)
        assert parsed.output_path == str(tmp_path / model / step.name)
        if command == "profile":
            continue
        given = sweep_options.read_options(parsed)
        assert given["tasks"] == list(step.tasks)
        assert given["model_args"]["pretrained"] == "NAME"
        assert given["use_cache"] == str(tmp_path / "answers" / model)
        assert given.get("heal", {}).get("max_steps", 7) == 7
        assert ("apply_chat_template" in words) == ("{template}" in step.options) or (
            "--apply_chat_template" in words
        ) == (model == "smollm2" and "{template}" in step.options)


def test_names_of_steps_are_distinct_and_those_that_are_compared_exist(steps, script):
    names = [step.name for step in steps.STEPS]
    assert len(set(names)) == len(names)
    compared = {
        step
        for contrast in script("dichotomy.contrasts").CONTRASTS
        for step, *_ in (contrast.one, contrast.other)
    }
    pooled = {
        step
        for _, one, other in script("dichotomy.seeds").POOLED
        for step in (*one.steps, *other.steps)
    }
    assert compared | pooled <= set(names)


def test_held_text_and_calibration_share_no_line(steps, tmp_path):
    data = tmp_path / "data.jsonl"
    texts = [str(n) * 3000 for n in range(5)]
    data.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    steps.prepare(data, tmp_path / "work")
    tasks = tmp_path / "work" / "tasks"

    def read(name):
        return [json.loads(line)["text"] for line in (tasks / name).open()]

    assert read("held.jsonl") == [texts[1][:2000], texts[3][:2000]]
    assert read("calibration.jsonl") == [texts[0], texts[2], texts[4]]
    yaml = (tasks / "held_text.yaml").read_text()
    assert f"test: {tasks / 'held.jsonl'}" in yaml
    assert 'doc_to_target: "{{text}}"' in yaml
    assert len(json.loads((tasks / "samples.json").read_text())["boolq"]) == 500


def test_data_that_is_no_text_is_refused(steps, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a"}\n')
    with pytest.raises(
        ValueError, match=r"line 1: not a JSON object with a key 'text'"
    ):
        steps.prepare(data, tmp_path)
    data.write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="holds 1 texts: give at least two"):
        steps.prepare(data, tmp_path)


def write_sweep(folder, runs, tasks, model_args=None, **settings):
    """Write a sweep of the unpruned model and others.

    Args:
        folder: Where.
        runs: By id: arguments of the pruning, and the shift of the scores.
        tasks: By task and metric, the scores of the unpruned model.
        model_args: Of the whole sweep.
        settings: Further ones of its definition.
    """
    runs = {"baseline": ({}, 0.0), **runs}
    folder.mkdir(parents=True)
    definition = {
        "schema_version": 1,
        "definition": {"model_args": model_args or {"dtype": "float32"}, **settings},
        "configurations": [
            {"id": name, "arguments": arguments}
            for name, (arguments, _) in runs.items()
        ],
    }
    (folder / "sweep.json").write_text(json.dumps(definition))
    for name, (arguments, shift) in runs.items():
        for (task, metric), values in tasks.items():
            record = results_files.pruning(
                arguments.get("prune_percent", 0),
                criterion=arguments.get("criterion", "maw"),
                seed=arguments.get("seed"),
            )
            if "drop_layers" in arguments:
                record |= {"layers_dropped": "1", "parameters_after": 890}
            moved = np.clip(np.asarray(values) + shift, 0, 1).tolist()
            results_files.write_run(
                folder / "units" / name / task,
                {task: {metric: {"values": moved, "stderr": 0.02}}},
                pruning=record,
            )


SCORES = np.random.default_rng(0).uniform(0.3, 0.7, 60)
CHOICE = {
    "prune_percent-20": ({"prune_percent": 20, "criterion": "maw"}, -0.2),
    "best": ({"prune_percent": 20, "criterion": "best"}, 0.0),
    **{
        f"random-{seed}": (
            {"prune_percent": 20, "criterion": "random", "seed": seed},
            -0.1 + 0.01 * seed,
        )
        for seed in range(3)
    },
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A work folder in which some steps have data."""
    folder = tmp_path_factory.mktemp("work")
    tasks = {("truthfulqa_mc1", "acc,none"): SCORES, ("boolq", "acc,none"): SCORES}
    write_sweep(folder / "smollm2" / "choice", CHOICE, tasks)
    write_sweep(
        folder / "smollm2" / "choice_skip0",
        {"prune_percent-20": ({"prune_percent": 20, "criterion": "maw"}, -0.05)},
        tasks,
        {"dtype": "float32", "skip_layers": 0},
    )
    depth = {
        "drop_layers-1": ({"drop_layers": 1}, -0.1),
        "p": ({"prune_percent": 18}, -0.2),
        "p_sensitivity": ({"prune_percent": 18, "allocation": "sensitivity"}, -0.05),
        "p_best": ({"prune_percent": 18, "criterion": "best"}, -0.02),
    }
    write_sweep(folder / "smollm2" / "choice_depth", depth, tasks)
    return folder


@pytest.fixture(scope="module")
def tables(collecting, measured):
    return collecting.collect(measured).tables


def test_scores_have_tests_against_the_unpruned_model(tables):
    rows = {
        (row["step"], row["method"], row["seed"]): row
        for row in tables["scores"]
        if row["task"] == "boolq"
    }
    assert rows["choice", "unpruned", None]["percent"] == 0
    assert rows["choice", "unpruned", None].get("p") is None
    cut = rows["choice", "maw", None]
    assert cut["difference"] == pytest.approx(-0.2)
    assert (cut["verdict"], cut["n"], cut["percent"]) == ("falls", 60, 20)
    # Sixty documents without any change do not rule out one of three points.
    assert rows["choice", "best", None]["verdict"] == "undecided"
    assert ("choice_skip0", "maw, layer 0 kept", None) in rows
    depth = rows["choice_depth", "depth", None]
    assert (depth["percent"], depth["parameters"]) == (None, 890)
    assert {key[2] for key in rows if key[1] == "random"} == {0, 1, 2}


@pytest.mark.parametrize(
    ("task", "difference", "q", "q_margin", "verdict"),
    [
        ("boolq", -0.1, 0.01, 0.9, "falls"),
        ("boolq", 0.1, 0.01, 0.9, "rises"),
        ("held_text", 0.1, 0.01, 0.9, "falls"),
        ("boolq", 0.01, 0.6, 0.01, "holds"),
        ("boolq", 0.01, 0.6, 0.06, "undecided"),
        ("boolq", 0.01, None, None, ""),
    ],
)
def test_verdicts_need_a_test(script, task, difference, q, q_margin, verdict):
    row = {"task": task, "difference": difference, "q": q, "q_margin": q_margin}
    assert script("dichotomy.tables").change_verdict(row) == verdict


def test_criteria_are_compared_with_the_mean_of_the_seeds(tables):
    rows = {
        row["criterion"]: row
        for row in tables["chance"]
        if row["task"] == "truthfulqa_mc1"
    }
    assert rows["maw"]["difference"] == pytest.approx(-0.11)
    assert rows["maw"]["verdict"] == "worse"
    assert rows["best"]["difference"] == pytest.approx(0.09)
    assert rows["best"]["verdict"] == "better"
    assert rows["best"]["seeds"] == 3


def test_contrasts_match_sizes_by_percentage_or_by_parameters(tables):
    rows = {
        (row["question"], row["one"]): row
        for row in tables["contrasts"]
        if row["task"] == "boolq"
    }
    assert rows["best", "best"]["difference"] == pytest.approx(0.2)
    assert rows["skip0", "maw, layer 0 kept"]["verdict"] == "better"
    depth = rows["depth", "maw"]
    assert (depth["parameters_one"], depth["parameters_other"]) == (892, 890)
    assert depth["difference"] == pytest.approx(-0.1)
    assert depth["verdict"] == "worse"
    by_sensitivity = rows["depth", "maw, sensitivity"]
    assert by_sensitivity["difference"] == pytest.approx(0.05)
    assert rows["depth", "best"]["difference"] == pytest.approx(0.08)


def test_what_has_several_seeds_is_compared_over_them(collecting, tmp_path):
    arguments = {"prune_percent": 20, "criterion": "maw"}
    tasks = {("boolq", "acc,none"): SCORES}
    for name, gain in (("healed", 0.15), ("distilled", 0.17)):
        for seed in range(3):
            runs = {
                "p-20": (arguments, -0.2),
                "p-20_healed": (arguments, -0.2 + gain + 0.001 * seed),
            }
            trained = {"heal": {"max_steps": 40, "data": "FILE"}}
            write_sweep(tmp_path / "smollm2" / f"{name}_{seed}", runs, tasks, **trained)
    gsm8k = {("gsm8k", "exact_match,strict-match"): SCORES}
    for step, shift in (("reasoning", -0.1), ("reasoning_draw_2", -0.12)):
        runs = {"p-20": (arguments, shift)}
        write_sweep(tmp_path / "smollm2" / step, runs, gsm8k)
    tables = collecting.collect(tmp_path).tables
    said = {row["step"]: row for row in tables["settings"] if row["value"] == "40"}
    assert len(said) == 6
    assert said["distilled_1"]["setting"] == "max_steps"
    rows = {
        (row["question"], row["one"], row["other"]): row for row in tables["contrasts"]
    }
    before, after = "the same before", "next-token loss"
    healed = rows["healed", after, before]
    assert (healed["seeds"], healed["percent"]) == (3, 20)
    assert healed["difference"] == pytest.approx(0.151)
    assert healed["score_other"] == pytest.approx(SCORES.mean() - 0.2)
    assert (healed["verdict"], len(rows)) == ("better", 6)
    assert rows["healed", after, "unpruned"]["verdict"] == "worse"
    assert rows["healed", "distillation", after]["difference"] == pytest.approx(0.02)
    drawn = rows["draws", "maw", "unpruned"]
    assert drawn["seeds"] == 2
    assert drawn["difference"] == pytest.approx(-0.11)


def test_a_step_knows_when_it_is_finished(steps):
    known = {step.name: step for step in steps.STEPS}
    assert steps.cells_of(known["choice"], "smollm2") == 4 * 6 * 9
    assert steps.cells_of(known["choice_sensitivity"], "gemma") == 4 * 6 * 2
    assert steps.cells_of(known["choice_depth"], "gemma") == 4 * (3 * 2 * 2 + 3)
    assert steps.cells_of(known["choice_depth_influence"], "gemma") == 4 * 3
    assert steps.cells_of(known["instructions"], "smollm2") == 6 * 5
    assert steps.cells_of(known["instructions_plain"], "smollm2") == 6


def test_what_cannot_be_read_is_said_and_left_out(collecting, measured, tmp_path):
    with pytest.raises(ValueError, match="holds nothing that the steps have measured"):
        collecting.collect(tmp_path)
    broken = tmp_path / "smollm2" / "choice"
    broken.mkdir(parents=True)
    (broken / "sweep.json").write_text('{"schema_version": 1, "configurations": []}')
    assert (tmp_path / "smollm2").is_dir()
    with pytest.raises(ValueError, match="holds nothing"):
        collecting.collect(tmp_path)


def test_what_the_folder_lacks_stays_as_it_was(collecting, measured, make, tmp_path):
    def write(collected):
        for name, content in collected.files().items():
            (tmp_path / name).write_text(content)
        return make.read_tables(tmp_path)

    before = write(collecting.collect(measured))
    tasks = {("boolq", "acc,none"): SCORES}
    depth = {"drop_layers-1": ({"drop_layers": 1}, -0.3)}
    write_sweep(tmp_path / "work" / "smollm2" / "choice_depth", depth, tasks)
    smaller = collecting.collect(tmp_path / "work")
    smaller.keep(before)
    after = write(smaller)

    def rows(tables, name, **where):
        return [row for row in tables[name] if where.items() <= row.items()]

    for step in ("choice", "choice_skip0"):
        for name in ("scores", "chance", "settings", "mc2"):
            assert rows(after, name, step=step) == rows(before, name, step=step)
    assert after["contrasts"] == before["contrasts"] != []
    assert len(rows(before, "scores", step="choice_depth")) == 10
    assert {row["task"] for row in rows(after, "scores", step="choice_depth")} == {
        "boolq"
    }
    assert "scores.csv: smollm2 choice stays as it was." in smaller.notes
    # A step that is not asked for stays, although the folder holds less of it.
    of_choice = collecting.collect(measured, ["choice"])
    assert {row["step"] for row in of_choice.tables["scores"]} == {"choice"}
    assert {row["question"] for row in of_choice.tables["contrasts"]} == {"best"}
    of_choice.keep(after)
    kept = of_choice.tables["scores"]
    assert sum(row["step"] == "choice_depth" for row in kept) == 2
    # The same folder again changes nothing, in whatever order its steps are brought.
    files = smaller.files()
    again = collecting.collect(tmp_path / "work")
    again.keep(after)
    for step in ("choice", "choice_skip0"):
        alone = collecting.collect(measured, [step])
        alone.keep(after)
        assert again.files() == alone.files() == files
    order = [row["task"] for row in after["contrasts"] if row["question"] == "best"]
    assert order == sorted(order, key=list(collecting.MEASURES).index)
    lines = files["contrasts.csv"].splitlines()
    (tmp_path / "contrasts.csv").write_text("\n".join([lines[0], *lines[:0:-1]]))
    found = make.read_tables(tmp_path)["contrasts"]
    assert [row["task"] for row in found if row["question"] == "best"] == order


def test_the_tables_hold_no_texts(collecting, measured):
    for name, content in collecting.collect(measured).files().items():
        rows = list(csv.reader(content.splitlines()))
        assert len({len(row) for row in rows}) == 1, name
        assert "question" not in content.replace("question,model", ""), name
        assert str(measured) not in content, name


def test_the_page_says_what_the_tests_say(make, collecting, measured, tmp_path):
    for name, content in collecting.collect(measured).files().items():
        (tmp_path / name).write_text(content)
    tables = make.read_tables(tmp_path)
    text = make.page(tables, [], ["scores.svg"])
    assert (
        "`maw` better in 0, worse in 2 of 2; `best` better in 2, worse in 0 of 2"
        in text
    )
    assert "*falls*: TruthfulQA MC1 (at 20 %) and BoolQ (at 20 %)." in text
    beside = "narrower models, beside shallower ones with as many parameters"
    assert f"- {beside.capitalize()}: better in " in text
    assert "\n|maw|worse at 20 %|worse at 20 %|\n" in text
    assert "\n|maw|falls at 20 %|falls at 20 %|\n" in text
    assert "\n|maw|depth|worse at 18 %|worse at 18 %|\n" in text
    assert "|TruthfulQA MC1: 60; BoolQ: 60|`dtype=float32`" in text
    families = text[: text.index("## Width against depth")]
    assert "18 %" not in families
    assert "sensitivity" not in families
    assert "uniform cuts|10 of 216|" in text
    assert "|Gemma-3-270M|the other steps of its command|none|" in text
    assert "Healing" in text


def test_numbers_have_a_page_of_their_own_under_the_same_headings(
    make, collecting, measured, tmp_path
):
    for name, content in collecting.collect(measured).files().items():
        (tmp_path / name).write_text(content)
    tables = make.read_tables(tmp_path)
    numbers = make.tables_page(tables)
    assert "|`maw`|BoolQ|20 %|30.2|41.2|3|**-11.0** (" in numbers
    assert "### Truthfulness" in numbers
    links = re.findall(r"dichotomy-tables\.md#([\w-]+)", make.page(tables, []))
    headings = re.findall(r"^#+ (.+)$", numbers, re.MULTILINE)
    assert links
    assert set(links) <= {
        re.sub(r"[^\w-]", "", each.lower().replace(" ", "-")) for each in headings
    }


def test_the_page_lists_what_is_missing_and_nothing_else(script, steps):
    section = script("dichotomy.page").missing_section
    scores = [
        {"model": model, "step": step.name, "method": "maw"}
        for model in steps.MODELS
        for step in steps.STEPS
        if model in step.models
        for _ in range(steps.cells_of(step, model))
    ]
    latency = [{"model": model} for model in steps.MODELS]
    assert section({"scores": scores, "latency": latency}) == []
    fewer = {"scores": scores[1:], "latency": latency[:1]}
    said = "\n".join(section(fewer))
    whole = steps.cells_of(steps.STEPS[0], "smollm2")
    assert f"uniform cuts|{whole - 1} of {whole}|" in said
    assert "--model gemma --pretrained NAME --only latency" in said


def test_what_is_not_tested_is_not_counted(script, steps):
    row = {
        **dict.fromkeys(script("dichotomy.tables").TABLES["contrasts"], ""),
        "model": "smollm2",
        "one": "A",
        "other": "B",
        "task": "boolq",
        "score_one": "0.5",
        "score_other": "0.4",
        "difference": "0.1",
    }
    section = script("dichotomy.comparisons_page").contrast_section
    assert "|A|B|not tested|" in "".join(section("healed", [row]))
    tested = {**row, "percent": "20", "verdict": "better"}
    assert "|A|B|better at 20 %|" in "".join(section("healed", [row, tested]))
    short = script("dichotomy.short_page").short_section
    nothing = {name: [] for name in script("dichotomy.tables").TABLES}
    of_depth = [{**each, "question": "depth"} for each in (row, tested)]
    assert short({**nothing, "contrasts": of_depth[:1]}) == []
    (*_, bullet) = short({**nothing, "contrasts": of_depth})
    assert bullet.endswith("as many parameters: better in BoolQ (1 of 1).")
    first = {**of_depth[1], "task": "truthfulqa_mc1"}
    in_order = sorted([*of_depth, first], key=steps.place_of)
    (*_, bullet) = short({**nothing, "contrasts": in_order})
    assert bullet.endswith("in TruthfulQA MC1 (1 of 1) and BoolQ (1 of 1).")


@pytest.mark.parametrize(
    ("score", "level", "p", "sentence"),
    [
        ("0.3", "0.25", "0.01", "(30.0) is above what needs no knowledge (25.0"),
        ("0.3", "0.25", "0.2", "(30.0) is not shown to be above what needs no"),
        ("0.3", "0.25", "", "(30.0) is not shown to be above what needs no"),
        ("0", "", "", "solves none of 30, so no score can fall."),
        ("0.1", "", "", None),
    ],
)
def test_where_nothing_is_known_no_score_shows_a_loss(
    script, score, level, p, sentence
):
    row = {"model": "smollm2", "step": "choice", "task": "boolq", "n": "30"}
    row |= {"method": "unpruned", "score": score, "chance": level, "p_levels": p}
    said = "".join(script("dichotomy.families_page").level_sentences([row]))
    short = "".join(
        script("dichotomy.short_page").short_section(
            {name: [] for name in script("dichotomy.tables").TABLES} | {"scores": [row]}
        )
    )
    assert (sentence or "") in said
    assert bool(said) == (sentence is not None)
    assert ("cannot show" in short) == ("not shown" in said or "none of 30" in said)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (["20"], "20 %"),
        (["20", "30"], "20 and 30 %"),
        (["10", "20", "30", "50", "60"], "10 to 30, 50 and 60 %"),
        (["17.78", "40", "57.82"], "17.78, 40 and 57.82 %"),
    ],
)
def test_neighbouring_sizes_are_said_as_one(script, sizes, said):
    assert script("dichotomy.words").sizes_text(sizes) == said


def test_the_page_counts_what_the_mechanisms_show(script, collecting, tmp_path):
    """Two models come closer to their levels; of one the rest is shown, and length lowers scores."""
    run = {
        "model": "smollm2",
        "step": "choice",
        "run": "a",
        "method": "maw",
        "percent": 20,
    }
    numbers = dict.fromkeys(
        ("level", "base", "score", "distance_base", "distance"), 0.4
    )
    mc2 = {**run, **numbers, "toward": "equally likely answers", "n": 9, "moved": 0.5}
    mc2 |= {"explained": 0.01, "closer": -0.1, "closer_q": 0.01, "rest": 0.02}
    split = {**run, "part": "others", "instructions": 20, "prompts": 9, "base": 0.4}
    split |= {"words_base": 80.0, "words": 20.0, "cut": 0.3, "score": 0.35}
    split |= {"total_difference": -0.05, "total_q": 0.2, "length_difference": -0.1}
    split |= {"length_q": 0.01, "rest_difference": 0.05, "rest_q": 0.03}
    found = collecting.Collection()
    found.tables["mc2"] = [{**mc2, "rest_q": 0.01}, {**mc2, "rest_q": 0.6}]
    found.tables["ifeval"] = [split]
    for name, content in found.files().items():
        (tmp_path / name).write_text(content)
    tables = script("dichotomy.words").read_tables(tmp_path)
    page = script("dichotomy.mechanisms_page")
    text = "\n".join(page.mc2_section(tables["mc2"]))
    assert "uniform cuts|equally likely answers|2|2|0|1|" in text
    text = "\n".join(page.mc2_details(tables["mc2"]))
    assert "|**-10.0**|0.50|+1.0|+2.0|" in text
    text = "\n".join(page.ifeval_section(tables["ifeval"]))
    assert "uniform cuts|others|1|0 / 0|0 / 1|1 / 0|" in text
    text = "\n".join(page.ifeval_details(tables["ifeval"]))
    assert "|80 / 20|40.0|35.0|-5.0|**-10.0**|**+5.0**|" in text
    short = "\n".join(script("dichotomy.short_page").short_section(tables))
    assert "all answers equally likely in 2 and away from them in 0 of 2" in short
    assert "of other kinds more often in 0 and less often in 0 of 1" in short


def test_a_method_looks_the_same_in_every_panel(script):
    figures = script("dichotomy.figures")
    by_task = {
        task: [
            {"task": task, "method": method, "percent": percent, "score": "0.2"}
            for method, percent in (("unpruned", "0"), *((each, "20") for each in of))
        ]
        for task, of in {
            "boolq": ("act", "maw", "random"),
            "ifeval": ("maw", "best", "random"),
        }.items()
    }
    spec = figures.panels(by_task).to_dict()
    scales = {
        (tuple(colour["scale"]["domain"]), tuple(colour["scale"]["range"]))
        for panel in spec["concat"]
        for layer in panel["layer"]
        if "scale" in (colour := layer["encoding"]["color"])
    }
    ((methods, colours),) = scales
    assert methods == ("maw", "act", "best", "random")
    assert len(set(colours)) == 4


def test_perplexities_are_shown_beside_the_bits_that_are_tested(script):
    row = {"model": "smollm2", "step": "choice", "seed": "", "method": "unpruned"}
    rows = [
        {**row, "percent": "0", "word_perplexity": "60.23"},
        {
            **row,
            "percent": "20",
            "method": "random",
            "seed": "1",
            "word_perplexity": "99",
        },
        {**row, "percent": "20", "method": "maw", "word_perplexity": ""},
    ]
    blocks = script("dichotomy.families_page").perplexity_table(rows)
    assert "|unpruned|60.2|||||||" in blocks[1]
    assert "|random, seed 1|||99.0|||||" in blocks[1]
    assert "maw" not in blocks[1]
    assert script("dichotomy.families_page").perplexity_table(rows[2:]) == []


def test_a_page_without_data_lists_every_command(make, steps, tmp_path):
    text = make.page(make.read_tables(tmp_path), [])
    for step in steps.STEPS:
        assert f" {step.name}" in text[text.index("```bash\npython docs") :]
    for model in steps.MODELS.values():
        assert f"|{model}|the other steps of its command|none|" in text
    assert "No samples of it yet." in text


@pytest.mark.slow
def test_the_page_is_what_its_tables_say(make):
    with make.STUDY.open(encoding="utf-8", newline="") as lines:
        study = list(csv.DictReader(lines))
    tables = make.read_tables(TABLES)
    figures = sorted(path.name for path in TABLES.glob("*.svg"))
    assert make.PAGE.read_text(encoding="utf-8") == make.page(tables, study, figures)
    assert make.DETAILS.read_text(encoding="utf-8") == make.tables_page(tables)
    assert sorted(make.draw(tables)) == figures
    for name, table in make.tables_of_other_pages(tables).items():
        text = make.PAGE.with_name(name).read_text(encoding="utf-8")
        assert f"{make.BEGIN}{table}{make.END}" in text


def test_every_q_of_the_tables_is_of_the_rows_that_are_there(make):
    """Steps are measured at different times, and a family may lose or gain rows by then."""
    collected = make.Collection()
    collected.keep(make.read_tables(TABLES))
    for name, content in collected.files().items():
        assert content == (TABLES / name).read_text(encoding="utf-8"), name


def test_each_task_is_a_family_and_random_controls_are_one_apart(script):
    module = script("dichotomy.tables")

    def row(task, p, criterion="maw", model="gemma"):
        who = {"model": model, "step": "choice", "criterion": criterion}
        return {**who, "task": task, "p": p, "p_margin": None, "difference": -0.1}

    tables = {name: [] for name in module.TABLES}
    tables["scores"] = [
        *(row("boolq", p) for p in (0.02, "0.04")),
        *(row("held_text", 1e-9) for _ in range(9)),
        *(row("boolq", 1e-9, "random") for _ in range(9)),
        row("boolq", 1e-9, model="smollm2"),
        row("boolq", ""),
    ]
    module.adjust(tables)
    first, second, *_, untested = tables["scores"]
    assert (first["q"], second["q"]) == (0.04, 0.04)
    assert (first["verdict"], untested["q"], untested["verdict"]) == ("falls", None, "")


def test_listing_prints_commands_and_writes_nothing(
    make, tmp_path, capsys, monkeypatch
):
    words = ["make_dichotomy.py", "--list", "--output", str(tmp_path), "--limit", "8"]
    monkeypatch.setattr("sys.argv", [*words, "--only", "choice", "latency"])
    monkeypatch.setattr(make, "render", None)
    assert make.main() == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [line[1] for line in lines] == ["sweep", "profile"]
    assert "--limit" in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("what", "brought"), [("--run", None), ("--collect", ["choice"])]
)
def test_a_run_brings_what_other_steps_have_with_it(
    make, what, brought, tmp_path, monkeypatch
):
    class Asked(Exception):
        pass

    def collect(folder, only):
        assert (folder, only) == (tmp_path, brought)
        raise Asked

    words = ["make_dichotomy.py", what, "--output", str(tmp_path), "--only", "choice"]
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr(make, "_steps", lambda _: 0)
    monkeypatch.setattr(make, "collect", collect)
    with pytest.raises(Asked):
        make.main()


def test_adapters_are_trained_for_one_step_and_used_by_another(
    make, tmp_path, monkeypatch
):
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "A."}\n{"text": "B."}\n')
    trained = tmp_path / "work" / "smollm2" / "distilled_1" / "adapters" / "p-20_healed"
    trained.mkdir(parents=True)
    (trained / "healing.json").write_text("{}")
    words = ["make_dichotomy.py", "--run", "--output", str(tmp_path / "work")]
    words += ["--data", str(data), "--only", "instructions_distilled_1"]
    monkeypatch.setattr("sys.argv", words)
    failed = subprocess.CompletedProcess([], 3)
    monkeypatch.setattr(make.subprocess, "run", lambda *_, **__: failed)
    assert make.main() == 3
    used = trained.parents[2] / "instructions_distilled_1" / "adapters"
    assert (used / "p-20_healed" / "healing.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--run"], "give --output"),
        (["--run", "--output", "x"], "give --data"),
        (["--list", "--output", "x", "--model", "gemma"], "give --pretrained"),
    ],
)
def test_what_is_missing_is_said_at_once(make, words, message, monkeypatch):
    monkeypatch.setattr("sys.argv", ["make_dichotomy.py", *words])
    with pytest.raises(SystemExit, match=message):
        make.main()
