"""What the harness does around requests keeps working on the fast paths."""

from __future__ import annotations

import json
import re
import sys

import pytest
from lm_eval.models.huggingface import HFLM

from tests.helpers import checkpoints, evaluations
from tests.helpers.answering import GENERATED
from tests.helpers.evaluations import exact, near


def loaded(cls, pretrained, **arguments):
    arguments = {"device": "cpu", "max_length": 256, "batch_size": 1} | arguments
    return cls(str(pretrained), **arguments)


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
