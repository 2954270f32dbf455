"""The task groups: found, made of the harness's own tasks, with the study's few-shot counts."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml
from lm_eval import evaluator
from lm_eval.api.task import ConfigurableTask
from lm_eval.config.task import TaskConfig
from lm_eval.models.dummy import DummyLM
from lm_eval.tasks import TaskManager, _factory

from lm_eval_pruned import tasks
from tests.helpers import checkpoints


FOLDER = Path(tasks.__file__).parent
REPOSITORY = checkpoints.ROOT

#: BENCHMARKS_BASE and BENCHMARKS_INSTRUCT of the study's repository
#: (github.com/peremartra/llama-glu-expansion-pruning, utils.py).
BASE = {
    "wikitext": 0,
    "boolq": 0,
    "lambada_openai": 0,
    "mmlu": 5,
    "arc_challenge": 0,
    "hellaswag": 0,
    "winogrande": 0,
    "piqa": 0,
    "truthfulqa_mc1": 0,
    "truthfulqa_mc2": 0,
    "gsm8k": 5,
    "ifeval": 0,
    "leaderboard_musr": 0,
}
INSTRUCT = {
    "leaderboard_musr": 0,
    "truthfulqa_mc1": 0,
    "truthfulqa_mc2": 0,
    "lambada_openai": 0,
    "mmlu": 5,
    "gsm8k": 5,
    "ifeval": 0,
}
GROUPS = {
    "pruned_truthfulness": {"truthfulqa_mc1": 0, "truthfulqa_mc2": 0},
    "pruned_instruction_following": {"ifeval": 0},
    "pruned_reasoning": {"leaderboard_musr": 0},
    "pruned_knowledge": {"mmlu": 5, "gsm8k": 5, "arc_challenge": 0},
    "pruned_commonsense": {"hellaswag": 0, "winogrande": 0, "piqa": 0, "boolq": 0},
    "pruned_language_modeling": {"wikitext": 0, "lambada_openai": 0},
    "pruned_dichotomy": BASE,
    "pruned_dichotomy_instruct": INSTRUCT,
    "pruned_demo": {
        "pruned_demo_truthfulness": 0,
        "pruned_demo_instruction_following": 0,
    },
}
DEMO_TASKS = set(GROUPS["pruned_demo"])
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


def test_groups_and_tasks_are_in_the_index(manager):
    assert set(GROUPS) <= set(manager.all_groups)
    assert {name for name in manager.all_groups if name.startswith("pruned_")} == set(
        GROUPS
    )
    ours = {name for name in manager.all_subtasks if name.startswith("pruned_")}
    assert ours == DEMO_TASKS


@pytest.mark.parametrize("group", GROUPS)
def test_few_shot_counts_are_those_of_the_study(group, resolve):
    loaded = resolve(group)
    assert loaded["group_map"][group] == list(GROUPS[group])
    found = 0
    for member, count in GROUPS[group].items():
        below = leaves(loaded, member)
        assert len(below) == LEAVES.get(member, 1)
        assert {task.config.num_fewshot for task in below} == {count}, member
        found += len(below)
    # No task of one member hides one of another.
    assert len(loaded["tasks"]) == found


def test_every_subject_of_mmlu_is_kept_and_draws_from_its_own_examples(resolve):
    loaded = resolve("pruned_knowledge")
    subjects = leaves(loaded, "mmlu")
    assert len({task.config.dataset_name for task in subjects}) == 57
    assert {task.config.fewshot_split for task in subjects} == {"dev"}
    subgroups = {"mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities"}
    assert set(loaded["group_map"]["mmlu"]) == subgroups


@pytest.mark.parametrize("group", sorted(set(GROUPS) - {"pruned_demo"}))
def test_tasks_are_the_harness_s_own(group, resolve):
    """Nothing but the few-shot count, and the check for NLTK's data, is changed."""
    ours = resolve(group)
    stock = resolve(*GROUPS[group])
    assert set(ours["tasks"]) == set(stock["tasks"])
    for name, task in ours["tasks"].items():
        mine, theirs = task.config.to_dict(), stock["tasks"][name].config.to_dict()
        different = {key for key in mine | theirs if mine.get(key) != theirs.get(key)}
        # The harness derives the few-shot configuration from process_docs.
        check = {"process_docs", "fewshot_config"} if name == "ifeval" else set()
        assert different <= {"num_fewshot"} | check, name


def test_a_zero_in_a_group_is_not_overridden_on_the_command_line(resolve):
    loaded = resolve("pruned_dichotomy", num_fewshot=3)
    for member, count in BASE.items():
        shots = {task.config.num_fewshot for task in leaves(loaded, member)}
        assert shots == {3 if count else 0}


def test_the_six_topics_make_up_the_dichotomy(resolve):
    topics = set(GROUPS) - {
        "pruned_demo",
        "pruned_dichotomy",
        "pruned_dichotomy_instruct",
    }
    together = resolve(*sorted(topics))
    assert set(together["tasks"]) == set(resolve("pruned_dichotomy")["tasks"])


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.yaml")), ids=lambda p: p.stem)
def test_configurations_follow_the_conventions(path):
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    config = yaml.load(path.read_text(encoding="utf-8"), Loader)  # noqa: S506
    assert isinstance(config["metadata"]["version"], float)
    name = config.get("group") or config["task"]
    assert path.stem == name
    readme = (path.parent / "README.md").read_text(encoding="utf-8")
    assert f"`{name}`" in readme


@pytest.fixture(scope="module")
def demo_utils():
    from lm_eval.tasks._yaml_loader import _load_module_with_cache

    return _load_module_with_cache((FOLDER / "demo" / "utils.py").resolve())


@pytest.mark.parametrize(
    "items",
    [
        [[True, False], [True], [False, True, True]],
        [True, False, True, False, True, True],
        # The harness's branch for 0.5 hands on a list of one value as that value.
        [[True, False], True, [False, True, True]],
        ([1, 0], 1.0, (0, 1, 1)),
    ],
    ids=["by prompt", "flattened", "partly flattened", "numbers"],
)
def test_the_mean_over_instructions_takes_what_the_harness_hands_on(items, demo_utils):
    assert demo_utils.mean_over_instructions(items) == 4 / 6


def test_the_mean_over_instructions_is_the_harness_s(demo_utils):
    generator = random.Random(0)
    for _ in range(20):
        items = [
            [generator.random() < 0.4 for _ in range(generator.randint(1, 3))]
            for _ in range(generator.randint(1, 99))
        ]
        theirs = demo_utils._ifeval().agg_inst_level_acc(items)
        assert demo_utils.mean_over_instructions(items) == theirs


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
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE)
    home = tmp_path / "home"
    home.mkdir()
    empty = tmp_path / "nltk_data"
    empty.mkdir()

    def run(*arguments, cwd=tmp_path, **environment):
        return subprocess.run(
            [Path(sys.executable).with_name("lm_eval"), *map(str, arguments)],
            cwd=cwd,
            env={
                **os.environ,
                "PYTHONPATH": str(site),
                "PYTHONDONTWRITEBYTECODE": "1",
                "HOME": str(home),
                "HF_HOME": str(home / "huggingface"),
                "HF_HUB_OFFLINE": "1",
                "NLTK_DATA": str(empty),
                "OMP_NUM_THREADS": "1",
                **environment,
            },
            capture_output=True,
            check=False,
            text=True,
            timeout=900,
        )

    return run


def contents(folder):
    return {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts
    }


def results_in(folder):
    (path,) = folder.rglob("results_*.json")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "chat",
    [
        pytest.param(False, id="raw"),
        pytest.param(True, id="chat", marks=pytest.mark.slow),
    ],
)
def test_demo_runs_without_network_and_leaves_the_package_alone(
    chat, lm_eval, tiny_llama, tmp_path
):
    before = contents(FOLDER)
    done = lm_eval(
        "--model", "pruned-hf",
        "--model_args", f"pretrained={tiny_llama},ratio=2.0",
        "--tasks", "pruned_demo",
        "--limit", "2",
        "--log_samples",
        "--output_path", tmp_path / "out",
        *(["--apply_chat_template"] if chat else []),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert contents(FOLDER) == before
    assert not (tmp_path / "home" / "huggingface" / "datasets").exists()
    assert "nltk" not in done.stderr + done.stdout

    results = results_in(tmp_path / "out")
    assert results["group_subtasks"]["pruned_demo"] == list(GROUPS["pruned_demo"])
    assert set(results["n-shot"].values()) == {0}
    truthfulness = results["results"]["pruned_demo_truthfulness"]
    assert 0 <= truthfulness["mc1,none"] <= 1
    assert 0 < truthfulness["mc2,none"] < 1
    following = results["results"]["pruned_demo_instruction_following"]
    assert 0 <= following["inst_level_loose_acc,none"] <= 1

    (samples,) = (tmp_path / "out").rglob("samples_*instruction_following*.jsonl")
    first = json.loads(samples.read_text(encoding="utf-8").splitlines()[0])
    context = first["arguments"]["gen_args_0"]["arg_0"]
    question = first["doc"]["prompt"] + "\n\nResponse:"
    expected = f"<user>{question}\n<assistant>" if chat else question
    assert context == expected


OWN_IFEVAL = [
    {
        "key": 1,
        "prompt": "Say hello without a comma.",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{"num_sentences": None, "relation": None}],
    },
    {
        "key": 2,
        "prompt": "Say hello in at least two sentences.",
        "instruction_id_list": ["length_constraints:number_sentences"],
        "kwargs": [{"num_sentences": 2, "relation": "at least"}],
    },
]


@pytest.mark.slow
def test_a_missing_nltk_resource_ends_the_run_with_one_message(
    lm_eval, tiny_llama, tmp_path
):
    # `datasets` takes a folder of the data set's Hub name before the Hub.
    folder = tmp_path / "google" / "IFEval"
    folder.mkdir(parents=True)
    (folder / "data.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in OWN_IFEVAL)
    )
    done = lm_eval(
        "--model", "pruned-hf",
        "--model_args", f"pretrained={tiny_llama},ratio=2.0",
        "--tasks", "pruned_instruction_following",
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    message = done.stderr.strip().splitlines()[-1]
    for part in ("punkt_tab", "python -m nltk.downloader punkt_tab", "NLTK_DATA"):
        assert part in message
    assert "length_constraints:number_sentences" in message
    assert "Running generate_until" not in done.stderr


@pytest.fixture(scope="module")
def nltk_resources():
    from lm_eval.tasks._yaml_loader import _load_module_with_cache

    return _load_module_with_cache((FOLDER / "nltk_resources.py").resolve())


def test_the_check_lets_pass_what_can_be_scored(nltk_resources, monkeypatch):
    monkeypatch.setattr(nltk_resources, "punkt_is_installed", lambda: False)
    assert nltk_resources.require_punkt(OWN_IFEVAL[:1]) == OWN_IFEVAL[:1]
    with pytest.raises(LookupError, match="punkt_tab"):
        nltk_resources.require_punkt(OWN_IFEVAL)
    # Only the first process of a machine downloads, so only that one may judge.
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert nltk_resources.require_punkt(OWN_IFEVAL) == OWN_IFEVAL
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setattr(nltk_resources, "punkt_is_installed", lambda: True)
    assert nltk_resources.require_punkt(OWN_IFEVAL) == OWN_IFEVAL


def test_the_error_is_caught_like_an_error_and_ends_like_an_exit(nltk_resources):
    error = nltk_resources.MissingNLTKDataError("why")
    assert isinstance(error, Exception)
    program = textwrap.dedent(
        f"""
        import runpy
        names = runpy.run_path({str(FOLDER / "nltk_resources.py")!r})
        raise names["MissingNLTKDataError"]("why")
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=False, text=True
    )
    assert (done.returncode, done.stderr.strip()) == (1, "why")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["groups", "tasks", "subtasks"])
@pytest.mark.parametrize("where", ["elsewhere", "repository", "package"])
def test_everything_is_listed_from_anywhere(what, where, lm_eval, tmp_path):
    cwd = {"elsewhere": tmp_path, "repository": REPOSITORY, "package": FOLDER}[where]
    done = lm_eval("ls", what, cwd=cwd)
    assert done.returncode == 0, done.stderr
    names = set() if what == "subtasks" else set(GROUPS)
    names |= set() if what == "groups" else DEMO_TASKS
    assert all(f"|{name} " in done.stdout for name in names)


@pytest.mark.slow
def test_validate_accepts_the_groups(lm_eval):
    done = lm_eval("validate", "--tasks", ",".join([*GROUPS, *DEMO_TASKS]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All tasks found and valid" in done.stdout


@pytest.mark.slow
def test_real_data_run_through_the_groups(lm_eval, tiny_llama, shared_data, tmp_path):
    done = lm_eval(
        "--model", "pruned-hf",
        "--model_args", f"pretrained={tiny_llama},ratio=2.0",
        "--tasks", "pruned_truthfulness,pruned_instruction_following",
        "--gen_kwargs", "max_gen_toks=8",
        "--limit", "3",
        "--output_path", tmp_path / "out",
        cwd=shared_data,
        NLTK_DATA=str(shared_data.parent / "nltk_data"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = results_in(tmp_path / "out")
    assert set(results["results"]) >= {"truthfulqa_mc1", "truthfulqa_mc2", "ifeval"}


@pytest.mark.slow
def test_demo_on_the_real_model_gives_answers(lm_eval, real_model, tmp_path):
    """The literal command, but for the model's folder and the output path."""
    done = lm_eval(
        "--model", "pruned-hf",
        "--model_args", f"pretrained={real_model},ratio=2.0",
        "--tasks", "pruned_demo",
        "--output_path", tmp_path / "out",
        "--log_samples",
        OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "2"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = results_in(tmp_path / "out")["results"]
    assert 0.1 < results["pruned_demo_truthfulness"]["mc1,none"] < 0.6
    assert 0.2 < results["pruned_demo_truthfulness"]["mc2,none"] < 0.7
    (samples,) = (tmp_path / "out").rglob("samples_*instruction_following*.jsonl")
    rows = [
        json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()
    ]
    answered = sum(bool(row["resps"][0][0].strip()) for row in rows)
    assert answered > 0.9 * len(rows)
