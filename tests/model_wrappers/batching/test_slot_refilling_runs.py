"""What the harness does around generation keeps working where slots are refilled."""

from __future__ import annotations

import json
import re
import sys

import pytest
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lm_eval_pruned.model_wrappers.batching import slot_refilling
from lm_eval_pruned.model_wrappers.hf_prefix import PrefixHFLM
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from tests.helpers import checkpoints, evaluations, made_tasks
from tests.model_wrappers.batching.test_slot_refilling import generate, prompts


TASK = "tiny_generation"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made_tasks.write_text_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def tasks(folder):
    return TaskManager(include_path=str(folder), include_defaults=False)


def loaded(cls, folder, **arguments):
    return cls(
        pretrained=str(folder), **{"device": "cpu", "batch_size": 2, **arguments}
    )


def evaluate(lm, tasks, **arguments):
    results = simple_evaluate(
        model=lm,
        tasks=[TASK],
        task_manager=tasks,
        num_fewshot=0,
        bootstrap_iters=0,
        **arguments,
    )
    samples = sorted(results["samples"][TASK], key=lambda sample: sample["doc_id"])
    answers = [
        (sample["arguments"][0], sample["resps"], sample["exact_match"])
        for sample in samples
    ]
    return answers, results["results"][TASK], results["config"]


@pytest.fixture
def slots_used(monkeypatch):
    """The numbers of rows of the passes in slots."""
    rows = []
    run = slot_refilling.run_rows

    def watched(forward, cache, work):
        rows.append(len(work))
        return run(forward, cache, work)

    monkeypatch.setattr(slot_refilling, "run_rows", watched)
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True])
def test_samples_and_scores_are_those_of_hf(tiny_llama, tasks, chat, slots_used):
    expected = evaluate(
        loaded(HFLM, tiny_llama, batch_size=1), tasks, apply_chat_template=chat
    )
    lm = loaded(PrefixHFLM, tiny_llama, slots=2)
    got = evaluate(lm, tasks, apply_chat_template=chat)
    assert got[:2] == expected[:2]
    assert max(slots_used) == 2
    assert got[0][0][0][0].endswith("<assistant>") == chat


@pytest.mark.slow
def test_a_broken_run_resumes_from_the_cache(tiny_llama, tasks, tmp_path, monkeypatch):
    cache = str(tmp_path / "answers")
    expected = evaluate(loaded(HFLM, tiny_llama, batch_size=1), tasks)
    lm = loaded(PrefixHFLM, tiny_llama, batch_size=1)
    generate = lm._generate

    def breaks(jobs):
        for done, job in enumerate(generate(jobs)):
            if done == 2:
                raise KeyboardInterrupt
            yield job

    monkeypatch.setattr(lm, "_generate", breaks)
    with pytest.raises(KeyboardInterrupt):
        evaluate(lm, tasks, use_cache=cache)
    lm = loaded(PrefixHFLM, tiny_llama)
    asked = []
    jobs_of = lm._jobs

    def watched(requests):
        asked.append(len(requests))
        return jobs_of(requests)

    monkeypatch.setattr(lm, "_jobs", watched)
    got = evaluate(lm, tasks, use_cache=cache)
    assert asked == [2]
    assert got[:2] == expected[:2]


@pytest.mark.slow
def test_energy_counts_what_slots_generate(tiny_llama, tasks, slots_used):
    lm = loaded(PrunedHFLM, tiny_llama, ratio=2, energy=True, slots=1)
    _, _, config = evaluate(lm, tasks)
    counted = config["energy"]["request_types"]["generate_until"]
    assert counted["generated_tokens"] == len(slots_used)
    plain = loaded(
        PrunedHFLM,
        tiny_llama,
        ratio=2,
        energy=True,
        batch_size=1,
        slot_refilling=False,
    )
    _, _, config = evaluate(plain, tasks)
    expected = config["energy"]["request_types"]["generate_until"]
    for tokens in ("prompt_tokens", "generated_tokens"):
        assert counted[tokens] == expected[tokens]


@pytest.mark.slow
def test_two_processes(tiny_llama, folder, tmp_path):
    """Each process generates the documents that fall to it, in slots of its own."""
    answers = {}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, before, refilling in (("two", launch, "true"), ("one", [], "false")):
        model_args = f"pretrained={tiny_llama},ratio=2,slot_refilling={refilling}"
        command = [
            *(sys.executable, *before, "-m", "lm_eval", "--model", "pruned-hf"),
            *("--model_args", model_args, "--tasks", TASK, "--batch_size", "1"),
            *("--include_path", str(folder), "--device", "cpu", "--log_samples"),
            *("--gen_kwargs", "max_gen_toks=160", "--seed", "1"),
            *("--output_path", str(tmp_path / name)),
        ]
        done = evaluations.run(command, tmp_path, ACCELERATE_USE_CPU="true")
        assert done.returncode == 0, done.stderr
        assert "Slots are not refilled" not in done.stderr
        found, _ = evaluations.read(tmp_path / name)
        answers[name] = sorted(map(tuple, found))
    assert answers["two"] == answers["one"]
    assert len(answers["two"]) == 4


@pytest.mark.slow
def test_two_processes_that_share_a_model(tiny_llama, tmp_path):
    """They have to run the same passes, whatever memory each has."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", "2", "-m", "tests.helpers.slots_of_a_split_model"),
        *(str(tiny_llama), str(tmp_path)),
    ]
    done = evaluations.run(command, checkpoints.ROOT)
    assert done.returncode == 0, done.stderr
    first, second = (
        json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)
    )
    assert first == second
    alone = loaded(HFLM, tiny_llama, batch_size=1, max_length=64)
    answers, path = first
    assert answers == generate(alone, prompts(until=[], max_gen_toks=16))
    assert path["requests"] == {"slots": len(answers)}
    assert path["slots"] == len(answers)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "advice"),
    [
        ("slots", "with 4 requests at once, .* give slots=2"),
        ("shared", "with 512 tokens at once, .* give a smaller batch_size"),
    ],
)
def test_a_process_that_runs_out_of_memory_alone_says_so(tiny_llama, path, advice):
    """A pass of its own size would meet the passes of the other process."""
    command = [
        *evaluations.TWO_PROCESSES,
        *("-m", "tests.helpers.memory_of_a_split_model"),
        *(str(tiny_llama), path),
    ]
    done = evaluations.run(command, checkpoints.ROOT)
    assert done.returncode != 0
    assert re.search(f"RuntimeError: Out of memory {advice}", done.stderr), done.stderr
    assert "SIGABRT" not in done.stderr
