"""Run by torch's launcher: two processes work on requests and meet at HFLM's barrier."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch.distributed

from lm_eval_pruned.energy.monitor import EnergyMonitor, meters_the_machine
from lm_eval_pruned.model_wrappers.batching.answer_paths import TokenCounts
from lm_eval_pruned.model_wrappers.energy_windows import EnergyLog
from lm_eval_pruned.model_wrappers.pruned_hf import EnergyLoggingHFLM
from tests.helpers.meters import Clock, FakeMeter


def main(output: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank = int(os.environ["LOCAL_RANK"])
    clock = Clock()
    monitor = EnergyMonitor(FakeMeter(clock, {"cpu": 7.0}), clock)
    lm = EnergyLoggingHFLM.__new__(EnergyLoggingHFLM)
    lm._rank, lm._world_size = rank, 2
    lm.token_counts = TokenCounts()
    lm._energy = EnergyLog(monitor if meters_the_machine() else None)

    def wait_for_everyone():
        torch.distributed.barrier()
        # The first process waits for the second: its machine is busy all the same.
        clock.sleep(2.0)

    lm.accelerator = SimpleNamespace(wait_for_everyone=wait_for_everyone)
    key = "request_types", "loglikelihood"
    with lm._energy.window(*key, lm=lm, requests=rank + 1, left_open=True):
        clock.sleep(1.0)
        lm.token_counts.prompt += 10 * (rank + 1)
    lm.barrier()
    lm.barrier()
    if rank == 0:
        output.write_text(json.dumps(lm._energy.finish()))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
