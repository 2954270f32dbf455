"""Run by torch's launcher: two processes share a model and generate in slots."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch.distributed

from lm_eval_pruned.model_wrappers.batching import slot_refilling
from lm_eval_pruned.model_wrappers.hf_prefix import PrefixHFLM
from tests.model_wrappers.batching.test_slot_refilling import generate, prompts


def main(pretrained: str, folder: Path) -> None:
    rank = int(os.environ["RANK"])
    # Free memory differs between processes, the number of slots must not.
    slot_refilling.psutil.virtual_memory = None
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
