"""The task groups: found, made of the harness's own tasks, with the study's few-shot counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lm_eval import evaluator
from lm_eval.api.task import ConfigurableTask
from lm_eval.config.task import TaskConfig
from lm_eval.models.dummy import DummyLM
from lm_eval.tasks import TaskManager, _factory, _yaml_loader

from lm_eval_pruned import tasks
from tests.helpers import checkpoints, evaluations


FOLDER = Path(tasks.__file__).parent

#: BENCHMARKS_BASE and BENCHMARKS_INSTRUCT of the study's repository
#: (github.com/peremartra/llama-glu-expansion-pruning, utils.py).
BASE = "wikitext boolq lambada_openai mmlu arc_challenge hellaswag winogrande piqa"
BASE += " truthfulqa_mc1 truthfulqa_mc2 gsm8k ifeval leaderboard_musr"
INSTRUCT = (
    "leaderboard_musr truthfulqa_mc1 truthfulqa_mc2 lambada_openai mmlu gsm8k ifeval"
)
GROUPS = {
    "pruned_truthfulness": ["truthfulqa_mc1", "truthfulqa_mc2"],
    "pruned_instruction_following": ["ifeval"],
    "pruned_reasoning": ["leaderboard_musr"],
    "pruned_knowledge": ["mmlu", "gsm8k", "arc_challenge"],
    "pruned_commonsense": ["hellaswag", "winogrande", "piqa", "boolq"],
    "pruned_language_modeling": ["wikitext", "lambada_openai"],
    "pruned_fairness": ["bbq", "crows_pairs_english"],
    "pruned_dichotomy": BASE.split(),
    "pruned_dichotomy_instruct": INSTRUCT.split(),
    "pruned_probes": ["pruned_probe_knowledge", "pruned_probe_instructions"],
    "pruned_demo": [
        "pruned_demo_truthfulness",
        "pruned_probe_knowledge",
        "pruned_probe_instructions",
    ],
}
#: Members with examples in front of each question; all others have none.
SHOTS = {"mmlu": 5, "gsm8k": 5}
#: Those that are in no group.
ALONE = {"pruned_demo_bias", "pruned_demo_text", "pruned_demo_instruction_following"}
ALONE |= {"pruned_probe_instructions_generated"}
#: Number of tasks in the harness's groups that ours refer to.
LEAVES = {"mmlu": 57, "leaderboard_musr": 3}


@pytest.fixture(scope="module")
def manager():
    return TaskManager()


class UnloadedTask(ConfigurableTask):
    """A task with its resolved configuration and without its data set."""

    def __init__(self, config):
        self._config = TaskConfig(**config)


class Loaded(Exception):
    pass


@pytest.fixture
def resolve(manager, monkeypatch):
    """Return what the harness would evaluate: its own resolution, short of the data."""
    monkeypatch.setattr(_factory, "ConfigurableTask", UnloadedTask)

    def stop(*, task_dict, **_):
        raise Loaded(task_dict)

    monkeypatch.setattr(evaluator, "evaluate", stop)

    def resolve(*names, **options):
        with pytest.raises(Loaded) as caught:
            evaluator.simple_evaluate(
                DummyLM(), tasks=list(names), task_manager=manager, **options
            )
        return caught.value.args[0]

    return resolve


def leaves(loaded, name):
    """Return the tasks below `name`, which may be a task itself."""
    if name in loaded["groups"]:
        return loaded["groups"][name].get_all_tasks()
    return [loaded["tasks"][name]]


@pytest.mark.parametrize(
    ("group", "options"),
    [*((group, {}) for group in GROUPS), ("pruned_dichotomy", {"num_fewshot": 3})],
)
def test_groups_are_the_harness_s_own_tasks_with_the_study_s_shots(
    group, options, resolve
):
    """A zero in a group is not overridden on the command line."""
    loaded, stock = resolve(group, **options), resolve(*GROUPS[group])
    shots = {member: options.get("num_fewshot", n) for member, n in SHOTS.items()}
    assert loaded["group_map"][group] == GROUPS[group]
    found = 0
    for member in GROUPS[group]:
        below = leaves(loaded, member)
        assert len(below) == LEAVES.get(member, 1)
        assert {task.config.num_fewshot for task in below} == {shots.get(member, 0)}
        found += len(below)
    # No task of one member hides one of another.
    assert len(loaded["tasks"]) == found
    assert {*loaded["tasks"]} == {*stock["tasks"]}
    for name, task in loaded["tasks"].items():
        mine, theirs = task.config.to_dict(), stock["tasks"][name].config.to_dict()
        different = {key for key in mine | theirs if mine.get(key) != theirs.get(key)}
        # The check for NLTK's data, from which the harness derives the few-shot configuration.
        check = {"process_docs", "fewshot_config"} if name == "ifeval" else set()
        assert different <= {"num_fewshot"} | check, name


# --- the stock command, in a process of its own

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


def answers_below(folder):
    """Return the samples of the demo's instructions."""
    (samples,) = folder.rglob("samples_*instruction_following*.jsonl")
    return [json.loads(line) for line in samples.read_text("utf-8").splitlines()]


PRUNED = ("--model", "pruned-hf", "--device", "cpu", "--model_args")


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
    assert results["group_subtasks"]["pruned_demo"] == list(GROUPS["pruned_demo"])
    assert set(results["n-shot"].values()) == {0}
    truthfulness = results["results"]["pruned_demo_truthfulness"]
    assert 0 < truthfulness["mc2,none"] < 1
    first = answers_below(tmp_path / "out")[0]
    question = first["doc"]["prompt"] + "\n\nResponse:"
    asked = first["arguments"]["gen_args_0"]["arg_0"]
    assert asked == f"<user>{question}\n<assistant>"


#: One that is checked without NLTK's data, and one that is not.
OWN_IFEVAL = [
    {"instruction_id_list": ["punctuation:no_comma"]},
    {"instruction_id_list": ["length_constraints:number_sentences"]},
]


def test_the_check_lets_pass_what_can_be_scored(monkeypatch):
    path = FOLDER / "nltk_resources.py"
    checks = _yaml_loader._load_module_with_cache(path.resolve())
    monkeypatch.setattr(checks, "punkt_is_installed", lambda: False)
    assert checks.require_punkt(OWN_IFEVAL[:1]) == OWN_IFEVAL[:1]
    with pytest.raises(LookupError, match="punkt_tab"):
        checks.require_punkt(OWN_IFEVAL)
    # Only the first process of a machine downloads, so only that one may judge.
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert checks.require_punkt(OWN_IFEVAL) == OWN_IFEVAL
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setattr(checks, "punkt_is_installed", lambda: True)
    assert checks.require_punkt(OWN_IFEVAL) == OWN_IFEVAL


@pytest.mark.slow
@pytest.mark.parametrize("where", ["elsewhere", "repository", "package"])
def test_everything_is_listed_from_anywhere_and_valid(where, lm_eval, tmp_path):
    places = {"elsewhere": tmp_path, "repository": checkpoints.ROOT, "package": FOLDER}
    listed = lm_eval("ls", "tasks", cwd=places[where]).stdout
    assert all(f"|{name} " in listed for name in [*GROUPS, *ALONE])
    names = ",".join([*GROUPS, *ALONE])
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
