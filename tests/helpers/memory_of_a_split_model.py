"""Run by torch's launcher: two processes share a model, and one runs out of memory."""

from __future__ import annotations

import os
import sys

from lm_eval.api.instance import Instance

from lm_eval_pruned.model_wrappers.hf_prefix import PrefixHFLM
from tests.model_wrappers.batching.test_slot_refilling import generate, prompts


def main(pretrained: str, path: str) -> None:
    lm = PrefixHFLM(
        pretrained=pretrained,
        tp_plan="auto",
        device="cpu",
        dtype="float32",
        batch_size=8,
        slots=4,
        max_length=64,
    )
    passes = 0

    def short_of_memory(*_):
        nonlocal passes
        passes += 1
        if passes == 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 PiB.")

    if os.environ["RANK"] == "1":
        lm.model.model.layers[1].register_forward_pre_hook(short_of_memory)
    if path == "slots":
        generate(lm, prompts(until=[], max_gen_toks=16))
        return
    pairs = [(f"{number} " * 15, ending) for number in range(40) for ending in "abc"]
    lm.loglikelihood(
        [Instance("loglikelihood", {}, pair, 0) for pair in pairs], disable_tqdm=True
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
