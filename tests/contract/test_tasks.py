"""tasks/README.md: the groups and the demo, as the stock command sees them."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from tests.helpers import evaluations
from tests.helpers.checkpoints import ROOT


FOLDER = ROOT / "tasks"
PAGE = (FOLDER / "README.md").read_text("utf-8")
GROUPS = re.findall(r"(?m)^\| `(pruned_\w+)` \|", PAGE)
PRUNED = ("--model", "pruned-hf", "--device", "cpu", "--model_args")
DEMO_TASKS = re.findall(r"(?m)^\* `(pruned_demo_\w+)`:", PAGE)


@pytest.mark.parametrize("group", GROUPS)
def test_the_table_has_what_a_group_holds(group):
    """`tests/tasks/test_tasks.py` resolves the groups as the harness does."""
    (file,) = FOLDER.rglob(f"{group}.yaml")
    data = yaml.safe_load(file.read_text("utf-8").replace("!function ", ""))
    entries = [e if isinstance(e, dict) else {"task": e} for e in data["task"]]
    members = [entry.get("task") or entry["group"] for entry in entries]
    shots = [entry.get("num_fewshot", 0) for entry in entries]
    row = re.search(rf"(?m)^\| `{group}` \| (.*) \| (.*) \| (.*) \|$", PAGE)
    listed = re.search(rf"\* `{group}`: ((?:`\w+`[,.]\s+)+)", PAGE) or row
    # The probes are described, not named.
    assert re.findall(r"`(\w+)`", listed[1]) in (members, [])
    exceptions = re.findall(r"`(\w+)`", row[2])
    counts = [int(count) for count in re.findall(r"\b\d+\b", row[2])]
    if exceptions:
        five, none = counts
        counts = [five if member in exceptions else none for member in members]
    assert shots == (counts * len(members) if len(counts) == 1 else counts)
    assert ("aggregate_metric_list" in data) == ("mean" in row[3])


def members_of(group):
    """Return the tasks of a group, and the harness's groups in it by their names."""
    files = [*FOLDER.rglob(f"{group}.yaml")]
    data = yaml.safe_load(files[0].read_text("utf-8").replace("!function ", ""))
    entries = [e if isinstance(e, dict) else {"task": e} for e in data["task"]]
    names = [entry.get("task") or entry["group"] for entry in entries]
    return {
        leaf
        for name in names
        for leaf in (members_of(name) if name in GROUPS else [name])
    }


def test_groups_that_share_tasks_are_refused_and_some_can_be_combined_freely():
    """The demo holds the probes, which need no network."""
    pair = ["pruned_demo", "pruned_probes"]
    start, end = re.search(
        r'"(Duplicate task)\s+\.\.\. (found in both) \.\.\."', PAGE
    ).groups()
    with pytest.raises(ValueError, match=f"{start} .* {end} .*{pair[0]}.*{pair[1]}"):
        evaluations.task_manager().load(pair)
    (sentence,) = re.findall(r"fails\.\s([^.]*)can\s+be\s+combined\s+freely\.", PAGE)
    *six, demo, probes = re.findall(r"`(\w+)`", sentence)
    assert [demo, probes] == pair
    tasks = [name for group in (*six, demo) for name in members_of(group)]
    assert len(tasks) == len({*tasks})
    assert {n for group in six for n in members_of(group)} == members_of(
        "pruned_dichotomy"
    )
    assert members_of("pruned_dichotomy") & members_of("pruned_knowledge")


def test_the_version_of_all_groups_and_tasks_is_1():
    assert re.search(r"### Changelog\s+version 1\.0: first version of all groups", PAGE)
    files = [*FOLDER.rglob("*.yaml")]
    versions = {re.search(r"version: (.*)", f.read_text("utf-8"))[1] for f in files}
    assert versions == {"1.0"}


SITE = """
import socket


def refuse(*_, **__):
    raise OSError("this test has no network")


socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = refuse
"""


@pytest.fixture
def lm_eval(tmp_path):
    """Run the stock command without network, in a fresh home, in `cwd`."""
    home, empty = tmp_path / "home", tmp_path / "nltk_data"
    for folder in (home, empty):
        folder.mkdir()
    (home / "sitecustomize.py").write_text(SITE)
    environment = {
        "PYTHONPATH": home,
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": home,
        "HF_HOME": home / "huggingface",
        "NLTK_DATA": empty,
    }

    def run(*arguments, cwd=tmp_path, check=True, **more):
        return evaluations.lm_eval(
            *arguments, cwd=cwd, check=check, timeout=900, **environment | more
        )

    return run


def write_data(folder, name, rows):
    """Write a data set where `datasets` looks for one before the Hub: a folder of its name."""
    (folder / name).mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / name / "train.jsonl").write_text(lines)


@pytest.mark.slow
def test_ifeval_stops_before_anything_is_generated_and_says_what_to_do(
    lm_eval, tiny_llama, tmp_path
):
    kwargs = {"num_sentences": 3, "relation": "at least"}
    row = {"key": 1, "prompt": "Write.", "kwargs": [kwargs]}
    row["instruction_id_list"] = ["length_constraints:number_sentences"]
    write_data(tmp_path, "google/IFEval", [row])
    done = lm_eval(
        *PRUNED, f"pretrained={tiny_llama},ratio=2.0",
        "--tasks", "pruned_instruction_following",
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Running generate_until" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "run `python -m nltk.downloader punkt_tab` where there is a network" in last
    assert "or set NLTK_DATA to a folder that contains tokenizers/punkt_tab" in last


def answers_below(folder):
    """Return the samples of the demo's instructions."""
    (samples,) = folder.rglob("samples_*instruction_following*.jsonl")
    return [json.loads(line) for line in samples.read_text("utf-8").splitlines()]


@pytest.mark.slow
def test_demo_runs_without_network_and_leaves_the_package_alone(
    lm_eval, tiny_llama, tmp_path
):
    files = [p for p in FOLDER.rglob("*") if "__pycache__" not in p.parts]
    before = {path: path.stat().st_mtime_ns for path in files}
    done = lm_eval(
        *PRUNED, f"pretrained={tiny_llama},ratio=2.0",
        "--tasks", "pruned_demo,pruned_demo_instruction_following",
        "--limit", "2",
        "--log_samples",
        "--output_path", tmp_path / "out",
        "--apply_chat_template",
    )  # fmt: skip
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert not (tmp_path / "home" / "huggingface" / "datasets").exists()
    assert "nltk" not in done.stderr + done.stdout
    results = evaluations.results(tmp_path / "out")
    assert results["config"]["pruning"]["criterion"] == "maw"
    assert results["group_subtasks"]["pruned_demo"] == [
        "pruned_demo_truthfulness",
        "pruned_probe_knowledge",
        "pruned_probe_instructions",
    ]
    assert set(results["n-shot"].values()) == {0}
    truthfulness = results["results"]["pruned_demo_truthfulness"]
    assert 0 < truthfulness["mc2,none"] < 1
    first = answers_below(tmp_path / "out")[0]
    question = first["doc"]["prompt"] + "\n\nResponse:"
    asked = first["arguments"]["gen_args_0"]["arg_0"]
    assert asked == f"<user>{question}\n<assistant>"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["elsewhere", "repository", "package"])
def test_everything_is_listed_from_anywhere_and_valid(where, lm_eval, tmp_path):
    places = {"elsewhere": tmp_path, "repository": ROOT, "package": FOLDER}
    listed = lm_eval("ls", "tasks", cwd=places[where]).stdout
    assert all(f"|{name} " in listed for name in [*GROUPS, *DEMO_TASKS])
    names = ",".join([*GROUPS, *DEMO_TASKS])
    done = lm_eval("validate", "--tasks", names, cwd=places[where])
    assert "All tasks found and valid" in done.stdout


@pytest.mark.slow
def test_real_data_run_through_the_groups(lm_eval, tiny_llama, shared_data, tmp_path):
    lm_eval(
        *PRUNED, f"pretrained={tiny_llama},ratio=2.0",
        "--tasks", "pruned_truthfulness,pruned_instruction_following",
        "--gen_kwargs", "max_gen_toks=8",
        "--limit", "3",
        "--output_path", tmp_path / "out",
        cwd=shared_data,
        NLTK_DATA=str(shared_data.parent / "nltk_data"),
    )  # fmt: skip
    results = evaluations.results(tmp_path / "out")
    assert set(results["results"]) >= {"truthfulqa_mc1", "truthfulqa_mc2", "ifeval"}
