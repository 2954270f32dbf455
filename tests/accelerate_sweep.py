"""Runs a sweep under `accelerate launch` on CPUs, for the tests.

HFLM takes several processes on GPUs only. Telling it that these are GPUs is enough
for evaluation, which wraps no model and only gathers.
"""

import functools
import json
import sys

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from lm_eval import tasks


def main() -> int:
    tasks.TaskManager = functools.partial(tasks.TaskManager, include_defaults=False)
    real = Accelerator.distributed_type.fget
    Accelerator.distributed_type = property(
        lambda self: (
            DistributedType.MULTI_GPU
            if real(self) == DistributedType.MULTI_CPU
            else real(self)
        )
    )
    Accelerator.prepare_model = lambda self, model, **kwargs: model
    torch.set_num_threads(1)
    options = json.loads(sys.argv[1])
    from lm_eval_pruned.sweep import run_sweep

    return run_sweep(options)


if __name__ == "__main__":
    sys.exit(main())
