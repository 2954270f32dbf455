"""What the energy hooks cost: ``python benchmarks/energy_overhead.py [--seconds 60]``.

The same requests run in one process with the hooks on and off, in turns (on, off,
off, on, ...), until each side took the time asked for. Printed: wall time and CPU
time of the process, on against off, as the geometric mean over the pairs with its
95 % interval; on a shared machine CPU time is the steadier one. Each turn opens and
closes windows and starts and stops codecarbon, which a real run does once.

Because neighbours on the machine make the difference of two long runs vague, the CPU
time of what the hooks add is also measured by itself: that of codecarbon's threads
while nothing else runs, and that of one window. What codecarbon needs to find out the
hardware is printed apart: it happens while the model loads.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
from lm_eval.api.instance import Instance
from scipy import stats

from lm_eval_pruned.energy.meter import CodecarbonMeter
from lm_eval_pruned.energy.monitor import EnergyMonitor
from lm_eval_pruned.model_wrappers.energy_windows import EnergyLog
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from lm_eval_pruned.profiling.prompts import demo_prompts


def requests(count: int) -> tuple[list[Instance], list[Instance]]:
    """Return requests to score and to generate for the first `count` demo prompts."""
    prompts = demo_prompts()[:count]
    settings = {"until": [], "max_gen_toks": 16, "do_sample": False}
    scored = [
        Instance("loglikelihood", {}, (prompt, " It is true."), 0, ("demo", i, 1))
        for i, prompt in enumerate(prompts)
    ]
    generated = [
        Instance("generate_until", {}, (prompt, settings), 0, ("demo", i, 1))
        for i, prompt in enumerate(prompts)
    ]
    return scored, generated


def turn(lm: PrunedHFLM, log: EnergyLog | None, work) -> tuple[float, float]:
    """Run the work once; return wall and CPU seconds of the process."""
    lm._energy = log
    wall, cpu = time.perf_counter(), time.process_time()
    lm.loglikelihood(work[0], disable_tqdm=True)
    lm.generate_until(work[1], disable_tqdm=True)
    if log is not None:
        log.finish()
    return time.perf_counter() - wall, time.process_time() - cpu


def alone(seconds: float) -> tuple[float, float, float]:
    """Return CPU seconds per second of codecarbon's threads, per window, per start and stop."""
    monitor = EnergyMonitor(CodecarbonMeter())
    monitor.start()
    before = time.process_time()
    time.sleep(seconds)
    background = (time.process_time() - before) / seconds
    before, windows = time.process_time(), 200
    for _ in range(windows):
        monitor.begin_window("w")
        monitor.end_window("w")
    window = (time.process_time() - before) / windows
    monitor.stop()
    before, starts = time.process_time(), 10
    for _ in range(starts):
        monitor.start()
        monitor.begin_window("w")
        monitor.end_window("w")
        monitor.stop()
    start = (time.process_time() - before) / starts - window
    return background, window, start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="of each side")
    parser.add_argument("--prompts", type=int, default=4, help="of one turn")
    parser.add_argument("--pretrained", help="default: SmolLM2-135M-Instruct")
    arguments = parser.parse_args()

    lm = PrunedHFLM(arguments.pretrained, device="cpu", batch_size=4)
    work = requests(arguments.prompts)
    start = time.perf_counter()
    log = EnergyLog(EnergyMonitor(CodecarbonMeter()))
    log.monitor.start()
    start = time.perf_counter() - start
    turn(lm, log, work)
    turn(lm, None, work)

    on, off = [], []
    while sum(wall for wall, _ in off) < arguments.seconds:
        sides = [(log, on), (None, off)]
        if len(on) % 2:
            sides.reverse()
        for side, times in sides:
            times.append(turn(lm, side, work))

    print(
        f"{len(on)} turns of {np.mean([w for w, _ in off]):.2f} s on each side, interleaved"
    )
    for column, name in enumerate(("wall time", "CPU time")):
        logs = np.log([t[column] for t in on]) - np.log([t[column] for t in off])
        low, high = stats.t.interval(
            0.95, len(logs) - 1, np.mean(logs), stats.sem(logs)
        )
        middle, low, high = (100 * np.expm1(x) for x in (np.mean(logs), low, high))
        print(
            f"{name}: {middle:+.2f} % with the hooks on, 95 % interval {low:+.2f} to {high:+.2f} %"
        )
    print(f"finding out the hardware, once and while the model loads: {start:.2f} s")
    background, window, start = alone(max(20.0, arguments.seconds / 3))
    print(
        f"CPU time by themselves: {100 * background:.3f} % of one core for codecarbon's threads, "
        f"{1000 * window:.2f} ms for a window, {1000 * start:.2f} ms to start again and stop; so "
        f"{100 * (background + (3 * window + start) / 60):.3f} % of a run of a minute with all "
        "three request types"
    )
    print(json.dumps(log.finish(), indent=2))


if __name__ == "__main__":
    main()
