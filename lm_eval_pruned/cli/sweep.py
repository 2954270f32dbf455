"""``lm-eval-pruned sweep``: many configurations by many tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import argparse


def add(commands) -> None:
    """Declare the command and its options."""
    from lm_eval_pruned.sweeps import options as sweep_options

    parser = commands.add_parser(
        "sweep",
        help="many sizes by many tasks, resumable",
        description="Evaluate a model at several sizes on several tasks, the unpruned model "
        "first. Every finished unit is kept at once; the same command goes on where it "
        "stopped.",
    )
    sweep_options.add_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from lm_eval_pruned.sweeps import options as sweep_options

    options = sweep_options.read_options(arguments)
    shard = sweep_options.parse_shard(arguments.shard) if arguments.shard else None
    from lm_eval.utils import setup_logging

    from lm_eval_pruned.sweeps.run import run_sweep

    setup_logging()
    return run_sweep(
        options,
        shard=shard,
        retry_failed=arguments.retry_failed,
        dry_run=arguments.dry_run,
    )
