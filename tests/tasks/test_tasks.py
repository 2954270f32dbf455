"""The task groups: found, made of the harness's own tasks, with the study's few-shot counts."""

from __future__ import annotations

from pathlib import Path

import pytest
from lm_eval import evaluator
from lm_eval.api.task import ConfigurableTask
from lm_eval.config.task import TaskConfig
from lm_eval.models.dummy import DummyLM
from lm_eval.tasks import TaskManager, _factory, _yaml_loader

from lm_eval_pruned import tasks


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
    # In lm-eval 0.5 a task loads no data before it is asked for documents.
    monkeypatch.setattr(_factory, "ConfigurableTask", UnloadedTask, raising=False)

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
