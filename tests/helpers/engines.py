"""Engines of vLLM for tests, and what is compared with models of transformers."""

from __future__ import annotations

import re

from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from tests.helpers import answering


#: vLLM has attention kernels for heads of 32, not for the eight of other tests.
HEADS = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "head_dim": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 4,
    # Without it an engine takes its share of the machine, whatever is free.
    "kv_cache_memory_bytes": 1 << 28,
}
SCORED = [("The capital", " of France"), ("abcabc", "abcab"), ("x", "yz")]

#: The engine of the last test, if it was not ended yet, by what it was asked for.
STARTED: dict = {}


def end_engine() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    while STARTED:
        STARTED.popitem()[1].close()
    cleanup_dist_env_and_memory()


def pruned_vllm(folder, **arguments):
    """Return an engine; tests that ask for the same one after the other share it."""
    from lm_eval_pruned.model_wrappers.pruned_vllm import PrunedVLLM

    key = str((folder, sorted(arguments.items())))
    if key not in STARTED:
        end_engine()
        STARTED[key] = PrunedVLLM(str(folder), **{**ENGINE, **arguments})
    return STARTED[key]


def pruned_hf(folder, **arguments):
    arguments = {"dtype": "float32", "device": "cpu", "batch_size": 1} | arguments
    return PrunedHFLM(str(folder), **arguments)


def scores(lm) -> list[float]:
    return [value for value, _ in answering.SCORED.ask(lm, SCORED)]


def texts(lm) -> list[str]:
    """Return what a model writes, without what the harness's two model types write otherwise.

    vLLM keeps half a character at the end to itself, and the harness has it write out
    special tokens, which it has transformers leave out.
    """
    prompts = [prompt for prompt, _ in SCORED]
    asked = answering.greedy(*prompts, until=["\n\n"], do_sample=False)
    return [
        re.sub("<(bos|eos|pad)>", "", answer).rstrip("\N{REPLACEMENT CHARACTER}")
        for answer in answering.GENERATED.ask(lm, asked)
    ]
