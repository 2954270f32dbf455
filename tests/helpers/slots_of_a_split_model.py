"""Run by torch's launcher: two processes share a model and have unequal memory."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch.distributed

from lm_eval_pruned.model_wrappers.batching import memory
from lm_eval_pruned.model_wrappers.hf_prefix import PrefixHFLM
from tests.model_wrappers.batching.test_slot_refilling import generate, prompts


def main(pretrained: str, folder: Path) -> None:
    rank = int(os.environ["RANK"])
    # Room for two rows of 64 tokens on one side, for all requests on the other.
    row = 3 * 2 * 1 * 8 * 4 * 64
    memory._free_memory = lambda _: 3 * row * (1000, 2)[rank]
    lm = PrefixHFLM(
        pretrained=pretrained,
        tp_plan="auto",
        device="cpu",
        dtype="float32",
        batch_size="auto",
        max_length=64,
    )
    answers = generate(lm, prompts(until=[], max_gen_toks=16))
    path = vars(lm.answer_paths.of("generate_until"))
    folder.joinpath(f"{rank}.json").write_text(json.dumps([answers, path]))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
