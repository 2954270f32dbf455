"""What docs/sweeps.md promises of options: configurations, floors, the YAML file, tracking."""

from __future__ import annotations

import json
import re
import shutil
import sys
from importlib.util import find_spec

import pytest
import yaml

from tests.contract.commands import lm_eval, pruned, results_in
from tests.helpers.checkpoints import ROOT
from tests.helpers.sweeping import change, files_of, results_of, write_tasks
from tests.sweeps.conftest import quick  # noqa: F401


PAGE = (ROOT / "docs" / "sweeps.md").read_text("utf-8")


def planned(done):
    """Return the configurations in the table of a dry run."""
    assert done.code == 0, done.err
    names = re.findall(r"(?m)^\|([\w.+-]+)\|", done.out)
    return [name for name in names if name.strip("-")][1:]


def test_each_size_is_combined_with_each_criterion_and_random_with_each_seed(
    tiny_llama, sweep_of, tmp_path
):
    words = ["--prune_percents", "0", "20.0", "--criteria", "ppm", "l2", "random"]
    words += ["--seeds", 1, 2, "--recipes", "best"]
    done = sweep_of(tiny_llama, tmp_path / "sweep", *words, "--dry_run")
    # The model's own size is the baseline.
    assert planned(done) == [
        "baseline",
        "prune_percent-20_recipe-best",
        "prune_percent-20",
        "prune_percent-20_criterion-l2",
        "prune_percent-20_criterion-random_seed-1",
        "prune_percent-20_criterion-random_seed-2",
    ]


def test_a_widths_file_is_known_by_its_content_and_its_width_is_the_mean(
    tiny_llama, sweep_of, tmp_path
):
    files = [tmp_path / "w.json", tmp_path / "else" / "w.json", tmp_path / "w.csv"]
    files[1].parent.mkdir()
    csv = "layer,width\n0,10\n1,20\n2,30\n"
    texts = ("[10, 20, 30]", '{"0": 60, "2": 41}', csv)
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    folder, none = tmp_path / "sweep", ("--prune_percents", "0", "--dry_run")
    done = sweep_of(tiny_llama, folder, "--widths", *files, *none)
    assert len(planned(done)) == 3
    # The second file leaves layer 1 at 88.
    assert re.findall(r"\|widths-.*?\|(\d+)\|", done.out) == ["20", "63"]


def test_a_group_with_a_score_is_one_unit_and_one_that_collects_is_its_members(
    tiny_llama, sweep_of, tmp_path
):
    words = ("--tasks", "tiny_nested", "--prune_percents", 0)
    folder = tmp_path / "sweep"
    assert sweep_of(tiny_llama, folder, *words).code == 0
    units = ["baseline/tiny_scored", "baseline/tiny_sentence"]
    assert sorted(files_of(folder)) == units
    results = results_in(folder / "units" / "baseline" / "tiny_scored")
    assert {*results["groups"]} == {"tiny_scored"}
    # With the settings of the group that collects.
    assert results["n-shot"]["tiny_choice"] == 1


@pytest.mark.slow
def test_use_cache_makes_one_file_for_each_configuration(
    finished, tiny_llama, sweep_of, tmp_path
):
    folder, cache = tmp_path / "sweep", tmp_path / "cache"
    for _ in range(2):
        done = sweep_of(tiny_llama, folder, "--use_cache", cache / "answers")
        assert done.code == 0
        assert results_of(folder) == results_of(finished)
        names = [file.name.split("_")[1] for file in cache.glob("answers_*.db")]
        assert sorted(names) == ["baseline", "prune"]
        shutil.rmtree(folder)


def test_log_samples_is_on_unless_it_is_false(finished, tiny_llama, sweep_of, tmp_path):
    assert all("samples" in "".join(names) for names in files_of(finished).values())
    words = ("--log_samples", "false", "--prune_percents", 0)
    assert sweep_of(tiny_llama, tmp_path, *words).code == 0
    assert not [*tmp_path.rglob("samples_*")]


FLOORS = re.findall(r"(?m)^\| `(floor-[a-z-]+)` \|", PAGE)


@pytest.mark.slow
def test_a_sweep_first_evaluates_four_models_that_know_nothing(
    tiny_llama, sweep_of, tmp_path
):
    folder = tmp_path / "sweep"
    words = ("--floors", "yes", "--tasks", "tiny_choice", "tiny_sentence")
    done = sweep_of(tiny_llama, folder, *words)
    assert done.code == 0
    started = [ln.split()[1] for ln in done.out.splitlines() if "starts" in ln]
    assert [*dict.fromkeys(started)] == [*FLOORS, "baseline", "prune_percent-20"]
    assert len(FLOORS) == 4
    # What they took says nothing of the model's time.
    before = done.out.partition("baseline / tiny_choice starts")[0]
    assert before.count("time left unknown") == 8
    assert "12 done" in sweep_of(tiny_llama, folder, *words, "--dry_run").out

    def score(floor, task, metric):
        return results_in(folder / "units" / floor / task)["results"][task][metric]

    # Two of them guess, and an echo answers with the question.
    guesses = [score(floor, "tiny_choice", "acc,none") for floor in FLOORS[::3]]
    assert guesses[0] == guesses[1]
    assert score(FLOORS[-1], "tiny_sentence", "exact_match,none") == 1.0
    told = json.loads(pruned("compare", folder, "--format", "json").out)
    assert {row["run"] for row in told["rows"]} == {"prune_percent-20"}


@pytest.mark.parametrize(
    ("model", "choice", "sentence"),
    [
        # The answer is that of the task; of three choices, "yes" is right for even numbers.
        ("constant,answer=Is 3 even?,loglikelihood=first", 3 / 5, 1 / 5),
        ("echo,loglikelihood=longest", 0, 1),
    ],
)
def test_lm_eval_runs_models_that_know_nothing(model, choice, sentence, made, tmp_path):
    made = write_tasks(tmp_path / "tasks", documents=5)
    kind, _, arguments = model.partition(",")
    words = ["--model", kind, "--model_args", arguments, "--include_path", made]
    words += ["--tasks", "tiny_choice,tiny_sentence", "--output_path", tmp_path]
    words += ["--apply_chat_template"]
    assert lm_eval("run", *words).code == 0
    scores = results_in(tmp_path)["results"]
    assert scores["tiny_choice"]["acc,none"] == choice
    assert scores["tiny_sentence"]["exact_match,none"] == sentence


def test_the_keys_of_the_file_are_the_options_and_the_command_line_wins(
    sweep_file, tiny_llama, made, tmp_path
):
    (example,) = re.findall(r"```yaml\n(model_args:.*?)```", PAGE, re.DOTALL)
    options = yaml.safe_load(example) | {"include_path": str(made)}
    options["model_args"]["pretrained"] = str(tiny_llama)
    path = sweep_file(
        yaml.safe_dump(options | {"calibration": str(tmp_path / "x.jsonl")})
    )
    (tmp_path / "x.jsonl").write_text('{"text": "one two three"}\n')
    here = ("--tasks", "tiny_choice", "--output_path", tmp_path / "here")
    from_file = pruned("sweep", "--config", path, *here, "--dry_run")
    words = ["--model_args", f"pretrained={tiny_llama}", "dtype=bfloat16"]
    words += ["--prune_percents", 10, 20, 30, 40, 50, 60, "--recipes", "study", "best"]
    words += ["--apply_chat_template", "--batch_size", 16, "--include_path", made]
    words += ["--calibration", tmp_path / "x.jsonl"]
    assert pruned("sweep", *words, *here, "--dry_run").out == from_file.out
    assert len(planned(from_file)) == len(FLOORS) + 1 + 6 * 2


BASE = "tasks: [boolq]\noutput_path: out\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ratio: [2.0]\n" + BASE, "unknown key ratio: did you mean ratios?"),
        (BASE + "ratios: [true]\n", "one or more"),
        (BASE + "limit: -1\n", "limit=-1"),
        (BASE + "num_fewshot: 1.5\n", "whole number"),
        (BASE + "log_samples: maybe\n", "true or false"),
        (BASE + "model_args: [a, b]\n", "key=value"),
        (BASE + "samples: no.json\n", "JSON such as"),
        (BASE + "ray: {a: 1}\n", "or a name"),
        ("[1, 2]\n", "not a YAML mapping"),
        ("a: [\n", "not a YAML mapping"),
        ("output_path: o\n", "tasks was not given"),
        ("tasks: [boolq]\n", "output_path was not given"),
    ],
)
def test_a_misspelt_name_or_value_in_the_file_is_refused(sweep_file, text, message):
    assert message in pruned("sweep", "--config", sweep_file(text)).sentence


def test_the_files_of_the_folder_have_the_keys_of_the_page(finished):
    rows = dict(re.findall(r"(?m)^\| `(\w+\.json)` \| (.*) \|$", PAGE))
    whole = json.loads((finished / "sweep.json").read_text())
    assert {*whole} == {
        *("schema_version", "definition", "sources", "configurations", "tasks")
    }
    keys = re.findall(r"`(\w+)`", rows["sweep.json"])
    assert {*keys} == {*whole, *whole["configurations"][0]}
    unit = json.loads((finished / "units/baseline/tiny_choice/unit.json").read_text())
    assert {*re.findall(r"`(\w+)`", rows["unit.json"])} == {*unit}
    assert {whole["schema_version"], unit["schema_version"]} == {1}


def test_a_unit_is_the_same_while_content_and_settings_are(
    finished, tiny_llama, made, sweep_of, tmp_path
):
    def done(model=tiny_llama, *words):
        said = sweep_of(model, finished, *words, "--dry_run")
        assert said.code == 0, said.err
        return int(re.search(r"(\d) done", said.out)[1])

    model = shutil.copytree(tiny_llama, tmp_path / "model")
    tasks = shutil.copytree(made, tmp_path / "tasks")
    elsewhere = ("--include_path", tasks)
    assert done(model, *elsewhere) == 2
    words = ("--batch_size", 8, "--use_cache", tmp_path / "c", "--device", "cpu")
    assert done(tiny_llama, *words) == 2
    for words in (("--num_fewshot", 1), ("--metadata", "a=1"), ("--seed", 7)):
        assert done(tiny_llama, *words) == 0
    change(tasks, "questions.jsonl", "even", "odd")
    assert done(tiny_llama, *elsewhere) == 0
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (model / "model.safetensors").write_bytes(content)
    assert done(model) == 0


#: A service of tracking: it notes what it is called with, and refuses one project.
SERVICE = """
import json, sys
from pathlib import Path
from unittest.mock import MagicMock

__version__ = "0.99"
run = None
config = MagicMock()
summary, Artifact, Table, Trace = MagicMock(), MagicMock(), MagicMock(), MagicMock()


def note(*what):
    with Path(__file__).with_name("calls.jsonl").open("a") as file:
        file.write(json.dumps(what) + "\\n")


config.update = lambda given, **_: note("config", [*given])


def init(**given):
    if given["project"] == "refused":
        raise RuntimeError("not logged in")
    note("init", given)
    return sys.modules[__name__]


def log(data, **_):
    note("log", [*data])


def log_artifact(artifact):
    pass


def finish():
    note("finish", None)
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Install services of tracking; return a function that reads what one was called with."""
    site = tmp_path / "site"
    for name in ("wandb", "trackio"):
        (site / name / "sdk" / "lib").mkdir(parents=True)
        (site / name / "__init__.py").write_text(SERVICE)
    printer = "from unittest.mock import MagicMock\nnew_printer = MagicMock()\n"
    (site / "wandb" / "sdk" / "lib" / "printer.py").write_text(printer)
    monkeypatch.syspath_prepend(site)

    def calls(name, what):
        lines = (site / name / "calls.jsonl").read_text().splitlines()
        return [given for kind, given in map(json.loads, lines) if kind == what]

    yield calls
    for name in [*sys.modules]:
        if name.partition(".")[0] in ("wandb", "trackio"):
            del sys.modules[name]


@pytest.mark.parametrize("service", ["wandb", "trackio"])
def test_each_finished_unit_becomes_a_run(
    service, calls, tiny_llama, sweep_of, tmp_path
):
    folder, given = tmp_path / "sweep", (f"--{service}_args", "project=secret-p")
    more = ("--wandb_config_args", "cluster=a") if service == "wandb" else ()
    assert sweep_of(tiny_llama, folder, *given, *more).code == 0
    units = ["baseline tiny_choice", "prune_percent-20 tiny_choice"]
    assert [run["name"] for run in calls(service, "init")] == units
    logged = [key for keys in calls(service, "log") for key in keys]
    assert logged.count("tiny_choice/acc") == len(calls(service, "finish")) == 2
    assert (["cluster"] in calls(service, "config")) == bool(more)
    written = folder.rglob("*.json")
    assert not any(b"secret-p" in path.read_bytes() for path in written)
    # A finished unit is not evaluated again because of tracking.
    assert sweep_of(tiny_llama, folder, f"--{service}_args", "project=q").code == 0
    assert len(calls(service, "init")) == 2


@pytest.mark.parametrize("service", ["wandb", "trackio"])
def test_a_failure_of_tracking_is_only_a_warning(
    service, calls, finished, tiny_llama, sweep_of, tmp_path, caplog
):
    given = (f"--{service}_args", "project=refused")
    assert sweep_of(tiny_llama, tmp_path / "sweep", *given).code == 0
    assert results_of(tmp_path / "sweep") == results_of(finished)
    assert "baseline tiny_choice was not logged to" in caplog.text


@pytest.mark.parametrize("service", ["wandb", "trackio"])
def test_a_missing_package_ends_the_command_before_a_model_is_loaded(
    service, tiny_llama, sweep_of, tmp_path
):
    if find_spec(service) is not None:
        pytest.skip(f"{service} is installed")
    given = (f"--{service}_args", "project=p")
    said = sweep_of(tiny_llama, tmp_path / "sweep", *given).sentence
    assert f"run `pip install {service}`" in said
    assert not (tmp_path / "sweep").exists()
