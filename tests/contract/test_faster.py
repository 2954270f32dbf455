"""What docs/faster.md promises."""

from __future__ import annotations

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from tests.helpers.checkpoints import save_tiny
from tests.helpers.evaluations import exact, near
from tests.helpers.made_tasks import write_made_tasks
from tests.sweeps.conftest import quick  # noqa: F401


TASKS = ["tiny_choice", "tiny_rolling", "tiny_generation"]
TYPES = ["loglikelihood", "loglikelihood_rolling", "generate_until"]


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    """The made tasks alone: reading those of the harness takes longer than all tests here."""
    made = write_made_tasks(tmp_path_factory.mktemp("tasks"))
    return TaskManager(include_path=str(made), include_defaults=False)


@pytest.fixture(scope="module")
def evaluated(manager, tiny_llama):
    """Return a function that evaluates a model type on the made tasks."""

    def evaluated(model, more="", *, folder=tiny_llama, tasks=TASKS, **named):
        named = {"batch_size": 2, "num_fewshot": 0, **named}
        return simple_evaluate(
            model=model,
            model_args=f"pretrained={folder},dtype=float32{more}",
            tasks=tasks,
            task_manager=manager,
            bootstrap_iters=0,
            device="cpu",
            **named,
        )

    return evaluated


@pytest.fixture(scope="module")
def hf(evaluated):
    return evaluated("hf")


@pytest.fixture(scope="module")
def fast(evaluated):
    return evaluated("hf-prefix")


def paths_of(results):
    return results["config"]["answer_paths"]


def answers_of(results):
    """Return what the model answered, by task and document."""
    return {
        task: [sample["filtered_resps"] for sample in samples]
        for task, samples in results["samples"].items()
    }


@pytest.mark.parametrize(
    "named",
    [
        {},
        {"apply_chat_template": True},
        pytest.param(
            {"batch_size": "auto:2", "max_batch_size": 2}, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_replace_hf_by_hf_prefix_and_keep_everything_else(evaluated, named):
    """Flags and texts are equal, log-likelihoods what two float32 paths agree on."""
    found, expected = (evaluated(model, **named) for model in ("hf-prefix", "hf"))
    for part in ("results", "samples"):
        assert exact(found[part]) == near(expected[part])
    (prompt, _) = found["samples"]["tiny_generation"][0]["arguments"][0]
    assert prompt.endswith("<assistant>") == ("apply_chat_template" in named)
    used = {name: {*paths_of(found)[name]["requests"]} for name in TYPES}
    assert used == dict(zip(TYPES, ({"shared"}, {"shared"}, {"slots"}), strict=True))


def test_pruned_hf_includes_the_same_code(evaluated, fast):
    whole = evaluated("pruned-hf")
    assert answers_of(whole) == answers_of(fast)
    assert paths_of(evaluated("pruned-hf", ",prune_percent=40")) == paths_of(fast)


def test_each_shared_token_is_computed_once(fast):
    prefixes, tokens = set(), 0
    for sample in fast["samples"]["tiny_choice"]:
        for context, choice in sample["arguments"]:
            # A token is a byte. The last one of a text is scored and is no input.
            text = (context + choice)[:-1]
            prefixes |= {text[: end + 1] for end in range(len(text))}
            tokens += len(text)
    record = paths_of(fast)["loglikelihood"]
    assert record["tokens_computed"] == {"shared": len(prefixes)}
    assert 3 * len(prefixes) < tokens


@pytest.mark.parametrize(
    ("argument", "off"), [("prefix_sharing", TYPES[:2]), ("slot_refilling", TYPES[2:])]
)
def test_with_false_a_path_answers_as_hf_does(evaluated, hf, argument, off):
    found = evaluated("hf-prefix", f",{argument}=false")
    for task, name in zip(TASKS, TYPES, strict=True):
        record = paths_of(found)[name]
        assert (record["requests"].keys() == {"plain"}) == (name in off)
        assert record["reasons"] == [f"{argument}=false"] * (name in off)
        if name in off:
            # Bit for bit: the same code computes them.
            assert answers_of(found)[task] == answers_of(hf)[task]


@pytest.mark.parametrize(
    ("more", "slots"),
    # Four answers are to be generated, of 91 to 95 tokens with their prompts.
    [("", 4), (",slots=1", 1), (",slots=3", 3)],
)
def test_slots_generates_so_many_answers_at_once(evaluated, hf, more, slots):
    found = evaluated("hf-prefix", more, tasks=TASKS[2:])
    assert paths_of(found)["generate_until"]["slots"] == slots
    assert answers_of(found)[TASKS[2]] == answers_of(hf)[TASKS[2]]


@pytest.fixture(scope="module")
def checkpoint(tiny_llama, tmp_path_factory):
    """Return a function that makes a checkpoint of an architecture."""

    def checkpoint(name):
        folder = tmp_path_factory.mktemp("checkpoint")
        if name == "windowed":
            return save_tiny(folder, "mistral", sliding_window=24)
        if name == "bloom":
            return save_tiny(folder, name, n_head=4)
        return tiny_llama

    return checkpoint


@pytest.mark.parametrize(
    ("name", "settings", "task", "reason"),
    [
        ("bloom", "", 0, "bloom is not among the model types that were tried"),
        ("bloom", "", 2, "bloom is not among the model types that were tried"),
        ("windowed", "", 0, "it is longer than 24 tokens"),
        ("llama", "do_sample=true,temperature=0.7", 2, "do_sample is asked for"),
        ("llama", "num_beams=2", 2, "num_beams=2 is asked for"),
    ],
)
def test_a_request_that_the_fast_path_could_answer_wrongly_takes_the_path_of_hf(
    evaluated, checkpoint, name, settings, task, reason, caplog
):
    how = {"folder": checkpoint(name), "tasks": [TASKS[task]], "gen_kwargs": settings}
    expected = evaluated("hf", **how)
    found = evaluated("hf-prefix", **how)
    assert answers_of(found) == answers_of(expected)
    record = paths_of(found)[TYPES[task]]
    asked = sum(len(each["arguments"]) for each in found["samples"][TASKS[task]])
    assert record["requests"] == {"plain": asked}
    (why,) = record["reasons"]
    assert reason in why
    lines = [line for line in caplog.messages if why in line]
    assert len(lines) == 1, "the log says so once"
