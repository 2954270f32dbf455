"""The distance to a teacher and its gradient: in parts, beside the formula on all logits.

A batch of random logits is taken; both sides take turns, see that they agree, and leave the
gradient of the logits. CPU time is that of the process; on CUDA it is the time until the device
is done. Memory is the peak above what the logits of model and teacher take.

    OMP_NUM_THREADS=1 python benchmarks/distillation.py --vocabulary 262144 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time

import psutil
import torch
from reporting import machine, peak_memory, spread
from torch.nn.functional import kl_div, log_softmax

from lm_eval_pruned.healing.distillation import distillation_loss


def formula(
    logits: torch.Tensor, expected: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return the distance by autograd, with float32 copies of all logits."""
    ours, theirs = (
        log_softmax(each[:, :-1].flatten(0, 1).float() / temperature, dim=-1)
        for each in (logits, expected)
    )
    divergence = kl_div(ours, theirs, reduction="batchmean", log_target=True)
    return temperature**2 * divergence


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    shape = (arguments.rows, arguments.tokens, arguments.vocabulary)
    ours, theirs = (
        torch.randn(shape, dtype=getattr(torch, arguments.dtype), device=device)
        for _ in range(2)
    )
    ours.requires_grad_()
    print(f"machine   {machine(arguments.device)}")
    print(f"logits    {shape}, {arguments.dtype}, {ours.nbytes / 2**20:.0f} MiB")
    found: dict[str, list[tuple[float, int, float]]] = {}
    gradients = {}
    for _ in range(arguments.repeats):
        for loss_of in (formula, distillation_loss):
            ours.grad = None
            gc.collect()
            before = (
                torch.cuda.memory_allocated(device)
                if device.type == "cuda"
                else psutil.Process().memory_info().rss
            )
            clock = time.perf_counter if device.type == "cuda" else time.process_time
            with peak_memory(device) as peaks:
                begin = clock()
                loss = loss_of(ours, theirs, 1.0)
                loss.backward()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                spent = clock() - begin
            peak = max(peaks) - before
            name = "formula" if loss_of is formula else "in parts"
            found.setdefault(name, []).append((spent, peak, float(loss.detach())))
            gradients[name] = ours.grad[:, ::16].clone()
    whole, parts = found["formula"], found["in parts"]
    assert abs(whole[0][2] - parts[0][2]) < 1e-4 * abs(whole[0][2])
    torch.testing.assert_close(*gradients.values(), atol=1e-7, rtol=1e-2)
    for name, runs in found.items():
        peak = statistics.median(run[1] for run in runs) / 2**20
        print(f"{name:9} {spread([run[0] for run in runs])} s, {peak:.0f} MiB at most")
    for place, what in ((0, "time"), (1, "memory")):
        ratios = [a[place] / b[place] for a, b in zip(whole, parts, strict=True)]
        print(f"{what:9} formula / in parts: {spread(ratios)}")


if __name__ == "__main__":
    main()
