"""What the harness does around requests keeps working where prefixes are shared."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lm_eval_pruned.model_wrappers.batching import prefix_sharing
from lm_eval_pruned.model_wrappers.hf_prefix import PrefixHFLM
from tests.helpers import evaluations, made_tasks


LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    made_tasks.write_choice_task(folder)
    made_tasks.write_text_tasks(folder)
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(lm, tasks, **arguments):
    return simple_evaluate(
        model=lm,
        tasks=["tiny_choice", "tiny_rolling"],
        task_manager=tasks,
        num_fewshot=0,
        bootstrap_iters=0,
        **arguments,
    )


def loaded(cls, folder, **arguments):
    arguments = {"device": "cpu", "batch_size": 4, **arguments}
    return cls(pretrained=str(folder), **arguments)


def plain(value):
    """Return `value` with its floats rounded to what two float32 paths agree on."""
    if isinstance(value, float):
        return pytest.approx(value, rel=1e-4, abs=1e-4)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def as_json(value):
    return json.loads(json.dumps(value, default=str))


def not_called(*_, **__):
    raise AssertionError("called")


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, "auto", "auto:2"])
def test_samples_and_scores_are_those_of_hf(tiny_llama, tasks, batch_size):
    arguments = {"batch_size": batch_size, "max_batch_size": 2, "max_length": 128}
    expected = evaluate(loaded(HFLM, tiny_llama, **arguments), tasks)
    lm = loaded(PrefixHFLM, tiny_llama, **arguments)
    got = evaluate(lm, tasks)
    assert lm.token_counts.processed > 0
    assert as_json(got["results"]) == plain(as_json(expected["results"]))
    assert as_json(got["samples"]) == plain(as_json(expected["samples"]))


def test_sharing_looks_for_no_batch_size(tiny_llama, monkeypatch):
    lm = loaded(PrefixHFLM, tiny_llama, batch_size="auto")
    monkeypatch.setattr(lm, "_detect_batch_size", not_called)
    requests = [(None, [1, 2, 3, 4], [n]) for n in range(5)]
    assert len(lm._loglikelihood_tokens(requests, disable_tqdm=True)) == 5


def test_no_pass_exceeds_a_batch_of_one(tiny_llama, monkeypatch):
    # The floor of a pass is for the speed of real models.
    monkeypatch.setattr(
        "lm_eval_pruned.model_wrappers.batching.prefix_sharing._FEWEST_TOKENS", 1
    )
    lm = loaded(PrefixHFLM, tiny_llama, batch_size=1)
    assert lm._can_take(lm._sharing)
    passes, heads, cached = [], [], []

    def watch(_module, _inputs, kwargs):
        passes.append(kwargs["input_ids"].numel())
        cache = kwargs.get("past_key_values")
        cached.append(0 if cache is None else cache.length)

    lm.model.register_forward_pre_hook(watch, with_kwargs=True)
    lm.model.lm_head.register_forward_pre_hook(
        lambda _, inputs: heads.append(inputs[0].shape[:-1].numel())
    )
    preamble = list(range(100))
    requests = [
        (None, [*preamble, question, *range(20)], [answer] * 5)
        for question in range(12)
        for answer in range(3)
    ]
    lm._loglikelihood_tokens(requests, disable_tqdm=True)
    longest = 100 + 1 + 20 + 5 - 1
    assert max(passes) <= longest
    assert max(heads) <= longest
    assert max(cached) <= longest
    # The preamble once, and each question with its answers once.
    assert sum(passes) < 100 + 12 * (21 + 3 * 4) * 1.5


@pytest.mark.slow
def test_the_cache_answers_the_second_time(tiny_llama, tasks, tmp_path, monkeypatch):
    cache = str(tmp_path / "answers")
    expected = evaluate(loaded(HFLM, tiny_llama), tasks)
    first = evaluate(loaded(PrefixHFLM, tiny_llama), tasks, use_cache=cache)
    lm = loaded(PrefixHFLM, tiny_llama)
    monkeypatch.setattr(lm, "_loglikelihood_tokens", not_called)
    second = evaluate(lm, tasks, use_cache=cache)
    assert as_json(second["results"]) == as_json(first["results"])
    assert as_json(first["results"]) == plain(as_json(expected["results"]))


def test_a_broken_run_resumes_from_the_cache(tiny_llama, tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(prefix_sharing, "_FEWEST_TOKENS", 32)
    cache = str(tmp_path / "answers")
    lm = loaded(PrefixHFLM, tiny_llama, batch_size=1)
    run_pack, passes = prefix_sharing.run_pack, []

    def breaks(*arguments):
        if len(passes) == 2:
            raise KeyboardInterrupt
        passes.append(1)
        run_pack(*arguments)

    assert lm._can_take(lm._sharing)
    monkeypatch.setattr(prefix_sharing, "run_pack", breaks)
    with pytest.raises(KeyboardInterrupt):
        evaluate(lm, tasks, use_cache=cache)
    monkeypatch.setattr(prefix_sharing, "run_pack", run_pack)
    lm = loaded(PrefixHFLM, tiny_llama)
    asked = []
    tokens = lm._loglikelihood_tokens

    def watched(requests, **arguments):
        asked.append(len(requests))
        return tokens(requests, **arguments)

    monkeypatch.setattr(lm, "_loglikelihood_tokens", watched)
    got = evaluate(lm, tasks, use_cache=cache)
    assert 0 < asked[0] < 12
    expected = evaluate(loaded(HFLM, tiny_llama), tasks)
    assert as_json(got["results"]) == plain(as_json(expected["results"]))


def test_the_progress_bar_counts_requests(tiny_llama, capsys):
    lm = loaded(PrefixHFLM, tiny_llama)
    requests = [(None, [1, 2, 3, 4], [n % 3]) for n in range(7)]
    lm._loglikelihood_tokens(requests)
    err = capsys.readouterr().err
    assert "Running loglikelihood requests" in err
    assert "7/7" in err


def test_processes_agree_on_how_batch_sizes_are_found(tiny_llama, monkeypatch):
    # A detection is a meeting of all processes, and what a process can share differs.
    lm = loaded(PrefixHFLM, tiny_llama, batch_size="auto", max_length=64)
    assert lm._can_take(lm._sharing)
    lm._world_size = 2
    monkeypatch.setattr(lm, "_detect_batch_size", not_called)
    nothing_in_common = [(None, [n, 1, 2, 3], [4]) for n in range(3)]
    expected = loaded(HFLM, tiny_llama)._loglikelihood_tokens(
        nothing_in_common, disable_tqdm=True
    )
    got = lm._loglikelihood_tokens(nothing_in_common, disable_tqdm=True)
    assert as_json(got) == plain(expected)
    # Beyond a window.
    lm.model.config.sliding_window = 3
    again = lm._loglikelihood_tokens(nothing_in_common, disable_tqdm=True)
    assert as_json(again) == plain(as_json(got))


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", ["2", "auto"])
def test_two_processes(tiny_llama, tmp_path, batch_size):
    """Each process shares prefixes among the documents that fall to it."""
    tasks = made_tasks.write_choice_task(tmp_path / "tasks", questions=7)
    scores = {}
    for name, launch, sharing in (("two", LAUNCH, "true"), ("one", ["-m"], "false")):
        model_args = f"pretrained={tiny_llama},ratio=2,prefix_sharing={sharing}"
        command = [
            *(sys.executable, *launch, "lm_eval", "--model", "pruned-hf"),
            *("--model_args", model_args, "--tasks", "tiny_choice"),
            *("--include_path", str(tasks), "--device", "cpu", "--log_samples"),
            *("--batch_size", batch_size, "--max_batch_size", "2"),
            *("--output_path", str(tmp_path / name)),
        ]
        done = evaluations.run(command, tmp_path, ACCELERATE_USE_CPU="true")
        assert done.returncode == 0, done.stderr
        assert "Prefixes are not shared" not in done.stderr
        answers, _ = evaluations.read(tmp_path / name)
        scores[name] = by_score(answers)
    for one, other in zip(scores["one"], scores["two"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def by_score(answers) -> list[torch.Tensor]:
    """Return the log-likelihoods of each document; processes mix their order."""
    tensors = [torch.tensor([float(value) for value, _ in a]) for a in answers]
    return sorted(tensors, key=lambda tensor: tensor.tolist())
