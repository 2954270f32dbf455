"""What the harness does around requests keeps working on the fast paths."""

from __future__ import annotations

import copy
import json
import re
import sys

import pytest
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lm_eval_pruned.model_wrappers.hf_prefix import PrefixHFLM
from tests.helpers import checkpoints, evaluations, made_tasks
from tests.helpers.answering import GENERATED, SCORED


TASKS = ["tiny_choice", "tiny_rolling", "tiny_generation"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = made_tasks.write_choice_task(tmp_path_factory.mktemp("tasks"))
    return made_tasks.write_text_tasks(folder)


@pytest.fixture(scope="module")
def manager(folder):
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(lm, manager, **arguments):
    found = simple_evaluate(
        model=lm,
        **{"tasks": TASKS, "num_fewshot": 0, "bootstrap_iters": 0} | arguments,
        task_manager=manager,
    )
    return copy.deepcopy(
        {name: found[name] for name in ("results", "samples", "config")}
    )


def loaded(cls, pretrained, **arguments):
    return cls(str(pretrained), **{"device": "cpu", "max_length": 256} | arguments)


def near(value):
    """Return `value` with its floats rounded to what two float32 paths agree on."""
    value = json.loads(json.dumps(value, default=str), parse_float=approximately)
    return {name: each for name, each in value.items() if name != "config"}


def approximately(text):
    return pytest.approx(float(text), rel=1e-4, abs=1e-4)


def exact(value):
    return json.loads(json.dumps(value, default=str))


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "chat"), [(1, True), ("auto:2", False)])
def test_samples_and_scores_are_those_of_hf(
    tiny_llama, manager, batch_size, chat, share_however_little
):
    arguments = {"apply_chat_template": chat}
    expected = evaluate(loaded(HFLM, tiny_llama, batch_size=1), manager, **arguments)
    lm = loaded(PrefixHFLM, tiny_llama, batch_size=batch_size, max_batch_size=2)
    got = evaluate(lm, manager, **arguments)
    for part in ("results", "samples"):
        assert exact(got[part]) == near(expected[part])
    paths = got["config"]["answer_paths"]
    assert paths["loglikelihood"]["requests"] == {"shared": 12}
    assert paths["loglikelihood_rolling"]["requests"].keys() == {"shared"}
    assert paths["generate_until"]["requests"] == {"slots": 4}
    (prompt, _) = got["samples"]["tiny_generation"][0]["arguments"][0]
    assert prompt.endswith("<assistant>") == chat


@pytest.mark.parametrize(
    ("fast", "task", "requests", "passes"),
    [
        (SCORED, "tiny_choice", 12, 2),
        pytest.param(GENERATED, "tiny_generation", 4, 12, marks=pytest.mark.slow),
    ],
    ids=["shared", "slots"],
)
def test_a_broken_run_resumes_from_the_cache(
    fast, task, requests, passes, tiny_llama, manager, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "lm_eval_pruned.model_wrappers.batching.prefix_sharing._FEWEST_TOKENS", 32
    )
    arguments = {"use_cache": str(tmp_path / "answers"), "tasks": [task]}
    lm, seen = loaded(PrefixHFLM, tiny_llama, batch_size=1, slots=1), []

    def breaks(*_):
        seen.append(1)
        if len(seen) > passes:
            raise KeyboardInterrupt

    lm.model.model.embed_tokens.register_forward_pre_hook(breaks)
    with pytest.raises(KeyboardInterrupt):
        evaluate(lm, manager, **arguments)
    lm = loaded(PrefixHFLM, tiny_llama)
    got = evaluate(lm, manager, **arguments)
    (again,) = got["config"]["answer_paths"][fast.request_type]["requests"].values()
    assert 0 < again < requests
    expected = evaluate(loaded(HFLM, tiny_llama, batch_size=1), manager, tasks=[task])
    assert exact(got["results"]) == near(expected["results"])


@pytest.mark.slow
def test_two_processes(tiny_llama, folder, tmp_path):
    """Each process shares prefixes and refills slots for the documents that fall to it."""
    answers = {}
    for name, launch, fast in (
        ("two", evaluations.TWO_PROCESSES, "true"),
        ("one", [sys.executable], "false"),
    ):
        model_args = f"pretrained={tiny_llama},ratio=2"
        done = evaluations.run(
            [
                *(*launch, "-m", "lm_eval", "--model", "pruned-hf", "--model_args"),
                f"{model_args},prefix_sharing={fast},slot_refilling={fast}",
                *("--tasks", ",".join(TASKS), "--include_path", folder),
                *("--device", "cpu", "--log_samples", "--output_path", tmp_path / name),
                *("--batch_size", "auto" if fast == "true" else "1"),
                *("--max_batch_size", "2", "--seed", "1"),
            ],
            tmp_path,
            check=True,
            ACCELERATE_USE_CPU="true",
        )
        assert "not shared" not in done.stderr and "not refilled" not in done.stderr
        answers[name] = {"results": evaluations.results(tmp_path / name)["results"]}
        (texts,) = (tmp_path / name).rglob("samples_tiny_generation*.jsonl")
        rows = map(json.loads, texts.read_text().splitlines())
        answers[name]["texts"] = sorted(
            (r["doc_id"], *r["filtered_resps"]) for r in rows
        )
    assert exact(answers["two"]) == near(answers["one"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("short", "advice"),
    [
        ("none", None),
        ("slots", "with 4 requests at once, .* give slots=2"),
        ("shared", "with 512 tokens at once, .* give a smaller batch_size"),
    ],
)
def test_two_processes_that_share_a_model(tiny_llama, tmp_path, short, advice):
    """They have to run the same passes: one that is short of memory cannot go on alone."""
    done = evaluations.run(
        [
            *(*evaluations.TWO_PROCESSES, "-m", "tests.helpers.split_model"),
            *(tiny_llama, tmp_path, short),
        ],
        checkpoints.ROOT,
        check=advice is None,
    )
    if advice:
        assert re.search(f"RuntimeError: Out of memory {advice}", done.stderr)
        assert "SIGABRT" not in done.stderr
        return
    first, second = (json.loads((tmp_path / rank).read_text()) for rank in "01")
    assert first == second
    answers, record = first
    alone = loaded(HFLM, tiny_llama, batch_size=1, max_length=64)
    assert answers == GENERATED.ask(alone)
    assert record["requests"] == {"slots": record["slots"]} == {"slots": len(answers)}
