"""What the harness does around requests keeps working on the fast paths."""

from __future__ import annotations

import json
import re
import sys

import pytest
from lm_eval.models.huggingface import HFLM

from lm_eval_pruned.model_wrappers.hf_prefix import PrefixHFLM
from tests.helpers import checkpoints, evaluations
from tests.helpers.answering import GENERATED


def loaded(cls, pretrained, **arguments):
    arguments = {"device": "cpu", "max_length": 256, "batch_size": 1} | arguments
    return cls(str(pretrained), **arguments)


def near(value):
    """Return `value` with its floats as what two float32 paths agree on."""
    text = json.dumps(value, default=str)
    return json.loads(text, parse_float=lambda n: pytest.approx(float(n), 1e-4, 1e-4))


def exact(value):
    return json.loads(json.dumps(value, default=str))


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "chat"), [(1, True), ("auto:2", False)])
def test_samples_and_scores_are_those_of_hf(
    tiny_llama, evaluate, batch_size, chat, share_however_little
):
    lm = loaded(PrefixHFLM, tiny_llama, batch_size=batch_size, max_batch_size=2)
    got, expected = (
        evaluate(each, num_fewshot=0, apply_chat_template=chat)
        for each in (lm, loaded(HFLM, tiny_llama))
    )
    for part in ("results", "samples"):
        assert exact(got[part]) == near(expected[part])
    paths = got["config"]["answer_paths"]
    assert paths["loglikelihood"]["requests"] == {"shared": 12}
    assert paths["loglikelihood_rolling"]["requests"].keys() == {"shared"}
    assert paths["generate_until"]["requests"] == {"slots": 4}
    (prompt, _) = got["samples"]["tiny_generation"][0]["arguments"][0]
    assert prompt.endswith("<assistant>") == chat


@pytest.mark.slow
def test_two_processes(tiny_llama, made_folder, tmp_path):
    """Each process shares prefixes and refills slots for the documents that fall to it."""
    found = []
    for name, launch, size in (
        ("true", evaluations.TWO_PROCESSES, "auto"),
        ("false", [sys.executable], "1"),
    ):
        model_args = f"pretrained={tiny_llama},ratio=2"
        done = evaluations.run(
            [
                *(*launch, "-m", "lm_eval", "--model", "pruned-hf", "--model_args"),
                f"{model_args},prefix_sharing={name},slot_refilling={name}",
                *("--tasks", "tiny_choice,tiny_rolling,tiny_generation"),
                *("--include_path", made_folder, "--device", "cpu", "--log_samples"),
                *("--output_path", tmp_path / name, "--batch_size", size),
                *("--max_batch_size", "2", "--seed", "1"),
            ],
            tmp_path,
            check=True,
            ACCELERATE_USE_CPU="true",
        )
        assert "not shared" not in done.stderr and "not refilled" not in done.stderr
        (texts,) = (tmp_path / name).rglob("samples_tiny_generation*.jsonl")
        rows = map(json.loads, texts.read_text().splitlines())
        texts = sorted((r["doc_id"], *r["filtered_resps"]) for r in rows)
        results = evaluations.results(tmp_path / name)["results"]
        found.append([results, texts])
    assert exact(found[0]) == near(found[1])


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
    module = [*evaluations.TWO_PROCESSES, "-m", "tests.helpers.split_model"]
    command, root = [*module, tiny_llama, tmp_path, short], checkpoints.ROOT
    done = evaluations.run(command, root, check=advice is None)
    if advice:
        assert re.search(f"RuntimeError: Out of memory {advice}", done.stderr)
        assert "SIGABRT" not in done.stderr
        return
    first, second = (json.loads((tmp_path / rank).read_text()) for rank in "01")
    assert first == second
    answers, record = first
    assert answers == GENERATED.ask(loaded(HFLM, tiny_llama, max_length=64))
    assert record["requests"] == {"slots": record["slots"]} == {"slots": len(answers)}
