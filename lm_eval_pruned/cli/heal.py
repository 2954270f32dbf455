"""``lm-eval-pruned heal``: training a pruned model again."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from lm_eval_pruned.cli.model_args import (
    add_model_args,
    add_output_path,
    read_model_args,
    with_default_model,
)
from lm_eval_pruned.healing.options import HealingOptions


if TYPE_CHECKING:
    import argparse


def add(commands) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "heal",
        help="train a pruned model again: an adapter, or all weights",
        description="Train a pruned model on text, by next-token loss or by distillation from the "
        "unpruned model. Writes an adapter that `lm_eval --model pruned-hf --model_args "
        "...,peft=DIR` checks and applies.",
    )
    add_model_args(parser)
    parser.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help='text to train on: JSON Lines, one {"text": ...} a line, or plain text in a file '
        ".txt; no text of a benchmark",
    )
    add_output_path(
        parser, "folder to write, new or empty; checkpoints go to DIR.checkpoints"
    )
    HealingOptions.add_to(parser)
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint"
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="also write the model with the adapter merged, as an ordinary checkpoint in DIR/merged",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from accelerate import PartialState

    from lm_eval_pruned.healing.run import heal

    options = HealingOptions.of(HealingOptions.parsed(arguments), "heal")
    healed = heal(
        with_default_model(read_model_args(arguments), "healing"),
        arguments.data,
        arguments.output_path,
        options,
        resume=arguments.resume,
        merge=arguments.merge,
    )
    if not PartialState().is_main_process:
        return 0 if healed.finished else 130
    if not healed.finished:
        print(
            f"Stopped after {healed.record['steps']} steps, which are kept in {healed.folder}: the "
            "same command with --resume goes on.",
            file=sys.stderr,
        )
        return 130
    print(
        f"Trained {healed.record['steps']} steps on {healed.record['tokens_seen']:,} tokens; wrote "
        f"{healed.folder}."
    )
    return 0
