"""Run by torch's launcher: two processes share a model; one may run out of memory."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch.distributed

from lm_eval_pruned.model_wrappers.hf_prefix import PrefixHFLM
from tests.helpers.answering import GENERATED, SCORED


def main(pretrained: str, folder: str, short: str) -> None:
    rank, passes = os.environ["RANK"], []
    given = {"batch_size": "auto"} if short == "none" else {"batch_size": 8, "slots": 4}
    given |= {"tp_plan": "auto", "device": "cpu", "dtype": "float32"}
    lm = PrefixHFLM(pretrained, max_length=64, **given)

    def run_out(*_):
        passes.append(1)
        if len(passes) == 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 PiB.")

    if short != "none" and rank == "1":
        lm.model.model.layers[1].register_forward_pre_hook(run_out)
    if short == "shared":
        SCORED.ask(lm, [(f"{n} " * 15, ending) for n in range(40) for ending in "abc"])
    answers = GENERATED.ask(lm)
    Path(folder, rank).write_text(json.dumps([answers, GENERATED.record(lm)]))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
