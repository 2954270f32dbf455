"""``lm-eval-pruned study-energy``: the study's energy runs, gross and net of idle."""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import argparse


def add(commands) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "study-energy",
        help="the published energy runs of arXiv 2512.22671, gross and net",
        description="Print what the energy runs published with arXiv 2512.22671 show, gross and "
        "net of idle, as Markdown. Every figure is computed from the runs, which are part "
        "of this package.",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from lm_eval_pruned.energy import study as study_energy

    print(study_energy.as_markdown())
    return 0
