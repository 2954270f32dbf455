"""Everything that needs a CUDA card, in one command and one Markdown page.

    sh benchmarks/gpu_check.sh --quick

takes at most 15 minutes on a card of 16 GB or more, and writes ``docs/measurements/gpu-CARD.md``: whether the
fast paths answer as `hf` does, what pruning on load takes, and how fast prefix sharing and slot refilling
are beside `hf`, at the shape of Llama-3.2-1B and, where it fits, of Llama-3.1-8B; how fast ``pruned-vllm`` is
where vLLM is installed; and whether scores of several cards are those of one, where several are visible.
Without ``--quick`` there are more questions and repeats. Weights are random, so nothing is
downloaded; cards below compute capability 8.0 run in float16, others in bfloat16.

Each part runs in a separate process, with a time limit, and the page is written after each. A part
that fails is reported with its error, one that cannot run here as skipped, with the reason.
The exit code is 1 if one failed.

Without a card, ``--device cpu`` runs the same code on a shape of a few thousand
weights. It shows that the script works, and measures nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from lm_eval_pruned.util.atomic import write_atomically
from lm_eval_pruned.util.tables import markdown_table


ROOT = Path(__file__).resolve().parents[1]
#: Seconds that all parts of ``--quick`` may take together.
QUICK = 900
#: Exit code of a part that cannot run here.
SKIPPED = 77


class Part(NamedTuple):
    """A part of the page: a method of `gpu_parts.Parts`, its shape, and its limit in seconds."""

    heading: str
    name: str
    shape: str
    seconds: int


def parts(quick: bool, rehearsed: bool) -> list[Part]:
    """Return what is run, in order."""
    small, *large = ["tiny"] if rehearsed else ["1B", "8B"]
    times = 1 if quick else 6
    found = [
        Part("Answers equal to those of hf", "equality", small, 150 * times),
        Part(f"Load, {small}", "load", small, 150 * times),
        Part(f"Speed, {small}", "speed", small, 240 * times),
        *(Part(f"Speed, {shape}", "speed", shape, 240 * times) for shape in large),
        Part(f"pruned-vllm, {small}", "engine", small, 240 * times),
        Part(f"Distillation, {small}", "distillation", small, 180 * times),
        Part(f"Several cards, {small}", "cards", small, 180 * times),
    ]
    if not quick:
        found += [Part(f"Load, {shape}", "load", shape, 1800) for shape in large]
    return found


def run(part: Part, options: list[str], seconds: float) -> tuple[str, str]:
    """Run a part in a separate process; nothing else touches the card.

    Returns:
        ``passed``, ``failed`` or ``skipped``, and the Markdown that it wrote until then.
    """
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "part.md")
        words = [sys.executable, str(Path(__file__).with_name("gpu_parts.py"))]
        words += [*options, "--part", part.name, "--shape", part.shape]
        process = subprocess.Popen(
            [*words, "--page", str(page)], start_new_session=True
        )
        note = ""
        try:
            code = process.wait(seconds)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
            # Launchers start processes in other sessions, which a signal to the group does not reach.
            for each in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
            # The part is in a session, which Ctrl-C does not reach, and would keep the card.
            if isinstance(error, KeyboardInterrupt):
                raise
            note = f"**Failed**: it took more than {seconds:.0f} s."
        text = page.read_text(encoding="utf-8") if page.exists() else ""
        if code not in (0, SKIPPED) and "**Failed**" not in text + note:
            note = f"**Failed**: its process ended with {code}."
        status = {0: "passed", SKIPPED: "skipped"}.get(code, "failed")
        return status, f"{text}{note}".strip()


def page(facts: dict[str, str], outcomes: dict[str, tuple[str, str]]) -> str:
    """Return the Markdown of what there is so far."""
    results = [(heading, status) for heading, (status, _) in outcomes.items()]
    chunks = [
        f"# GPU check: {facts['card'].split(',')[0]}",
        markdown_table(("", ""), list(facts.items()), "ll"),
        markdown_table(("part", "result"), results, "ll"),
        *(f"## {heading}\n\n{text}" for heading, (_, text) in outcomes.items()),
    ]
    return "\n\n".join(chunks) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the parts and write the page; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="at most 15 minutes")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, help="of the page")
    parser.add_argument("--folder", help="for checkpoints: 3 GB, or 20 without --quick")
    arguments = parser.parse_args(argv)
    began = time.monotonic()
    given = [*["--quick"] * arguments.quick, "--device", arguments.device]
    status, said = run(Part("", "facts", "", 0), given, 300)
    if status != "passed":
        parser.error(
            f"--device {arguments.device} cannot be used here ({said}): "
            "--device cpu tries the script without a card."
        )
    facts = json.loads(said)
    facts["command"] = f"`sh benchmarks/gpu_check.sh {' '.join(given)}`"
    facts["date"] = datetime.date.today().isoformat()
    name = facts["card"].split(",")[0].lower()
    slug = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    output = arguments.output or ROOT / "docs" / "measurements" / f"gpu-{slug}.md"
    outcomes: dict[str, tuple[str, str]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        options = [*given, "--folder", str(arguments.folder or temporary)]
        for part in parts(arguments.quick, rehearsed=arguments.device == "cpu"):
            left = QUICK + began - time.monotonic() if arguments.quick else part.seconds
            if left <= 0:
                outcome = "skipped", f"Skipped: the {QUICK / 60:.0f} minutes are over."
            else:
                outcome = run(part, options, min(left, part.seconds))
                print(f"{part.heading}: {outcome[0]}", flush=True)
            outcomes[part.heading] = outcome
            write_atomically(output, page(facts, outcomes))
    print(f"The page is {output}.")
    return int(any(status == "failed" for status, _ in outcomes.values()))


if __name__ == "__main__":
    raise SystemExit(main())
