"""``lm-eval-pruned heal``: training a pruned model again."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from lm_eval_pruned.cli.model_args import add_model_args, with_default_model


if TYPE_CHECKING:
    import argparse


def add(commands) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "heal",
        help="train a pruned model again: an adapter, or all weights",
        description="Train a pruned model on text, by next-token loss or by distillation from the "
        "unpruned model. Writes an adapter that `lm_eval --model pruned-hf --model_args "
        "...,peft=DIR` checks and applies. See docs/healing.md.",
    )
    add_model_args(parser)
    parser.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help='text to train on: JSON Lines, one {"text": ...} a line, or plain text in a file '
        ".txt; no text of a benchmark",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="folder to write, new or empty; checkpoints go to DIR.checkpoints",
    )
    parser.add_argument(
        "--method",
        default="lora",
        help="what is trained: the adapters lora or dora, or full, all weights (default: lora)",
    )
    parser.add_argument(
        "--teacher_weight",
        type=float,
        default=0.0,
        metavar="W",
        help="share of the loss that is the distance to the unpruned model, from 0 to 1 "
        "(default: 0, next-token loss alone)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="what the logits of both are divided by (default: 1)",
    )
    parser.add_argument(
        "--max_length",
        type=int,
        default=512,
        metavar="N",
        help="tokens of each block of text (default: 512)",
    )
    parser.add_argument(
        "--max_steps",
        type=int,
        metavar="N",
        help="steps of the optimiser (default: until the text was seen once)",
    )
    parser.add_argument(
        "--training_args",
        default="",
        metavar="KEY=VALUE,...",
        help="further fields of transformers.TrainingArguments, such as "
        "learning_rate=1e-4,bf16=true,gradient_checkpointing=true,report_to=tensorboard",
    )
    parser.add_argument(
        "--peft_args",
        default="",
        metavar="KEY=VALUE,...",
        help="further fields of peft.LoraConfig (default: r=16,lora_alpha=32,"
        "target_modules=all-linear)",
    )
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
    from lm_eval.utils import simple_parse_args_string

    from lm_eval_pruned.healing.options import HealingOptions
    from lm_eval_pruned.healing.run import heal

    options = HealingOptions(
        method=arguments.method,
        teacher_weight=arguments.teacher_weight,
        temperature=arguments.temperature,
        max_length=arguments.max_length,
        max_steps=arguments.max_steps,
        training_args=simple_parse_args_string(arguments.training_args),
        peft_args=simple_parse_args_string(arguments.peft_args),
    )
    model_args = simple_parse_args_string(arguments.model_args)
    healed = heal(
        with_default_model(model_args, "healing"),
        arguments.data,
        arguments.output,
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
