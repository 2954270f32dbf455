"""The command ``lm-eval-pruned``: what surrounds one run of ``lm_eval``."""

from __future__ import annotations

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code.

    Args:
        argv: Arguments without the program's name; default: those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="lm-eval-pruned",
        description="Width pruning around lm-evaluation-harness. To evaluate a pruned model, "
        "run `lm_eval --model pruned-hf --model_args ratio=2.0 --tasks ...`.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_plan(commands)
    _add_sweep(commands)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"lm-eval-pruned {arguments.command}: error: {error}", file=sys.stderr)
        return 2


def _add_plan(commands) -> None:
    parser = commands.add_parser(
        "plan",
        help="widths and parameters at several sizes, from a config alone",
        description="Print kept width, expansion ratio, parameters and checkpoint bytes at "
        "several sizes. Reads the config of a model, never its weights.",
    )
    parser.add_argument(
        "--pretrained",
        required=True,
        metavar="NAME_OR_FOLDER",
        help="model to plan for",
    )
    sizes = parser.add_mutually_exclusive_group(required=True)
    sizes.add_argument(
        "--ratios",
        nargs="+",
        metavar="R",
        help="expansion ratios to keep, such as 3.6 2.0",
    )
    sizes.add_argument(
        "--prune_percents",
        nargs="+",
        metavar="P",
        help="shares of neurons to remove, in percent",
    )
    parser.add_argument(
        "--multiple_of",
        default="1",
        metavar="N",
        help="round kept widths down to a multiple of N (default: 1)",
    )
    parser.add_argument("--revision", default="main", help="revision on the Hub")
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run model code that comes with the model",
    )
    parser.add_argument("--format", choices=("table", "csv", "json"), default="table")
    parser.set_defaults(run=_run_plan)


def _run_plan(arguments: argparse.Namespace) -> int:
    from lm_eval_pruned import planning

    argument = "ratio" if arguments.ratios else "prune_percent"
    rows = planning.plan_rows(
        arguments.pretrained,
        argument,
        arguments.ratios or arguments.prune_percents,
        multiple_of=arguments.multiple_of,
        revision=arguments.revision,
        trust_remote_code=arguments.trust_remote_code,
    )
    print(planning.FORMATS[arguments.format](rows), end="")
    return 0


def _add_sweep(commands) -> None:
    from lm_eval_pruned import sweep_options

    parser = commands.add_parser(
        "sweep",
        help="many sizes by many tasks, resumable",
        description="Evaluate a model at several sizes on several tasks, the unpruned model "
        "first. Every finished unit is kept at once; the same command goes on where it "
        "stopped. See docs/sweeps.md.",
    )
    sweep_options.add_arguments(parser)
    parser.set_defaults(run=_run_sweep)


def _run_sweep(arguments: argparse.Namespace) -> int:
    from lm_eval_pruned import sweep_options

    options = sweep_options.read_options(arguments)
    shard = sweep_options.parse_shard(arguments.shard) if arguments.shard else None
    from lm_eval.utils import setup_logging

    from lm_eval_pruned.sweep import run_sweep

    setup_logging()
    return run_sweep(
        options,
        shard=shard,
        retry_failed=arguments.retry_failed,
        dry_run=arguments.dry_run,
    )
