"""``lm-eval-pruned prune``: a pruned model as an ordinary checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_eval_pruned.cli.model_args import (
    add_model_args,
    add_output_path,
    pruning_of,
    read_model_args,
    refuse_others,
    with_default_model,
)
from lm_eval_pruned.pruning.arguments import DECLARED, EXCLUSIVE, add_option


if TYPE_CHECKING:
    import argparse


def add(commands) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "prune",
        help="write a pruned model as an ordinary checkpoint",
        description="Write a pruned model as an ordinary checkpoint: safetensors shards, config "
        "with the new sizes, tokenizer files, model card. What is kept has to fit in memory.",
    )
    add_model_args(parser)
    add_output_path(parser, "folder to write; new or empty")
    groups: dict[str, Any] = dict.fromkeys(DECLARED, parser)
    for names in EXCLUSIVE.values():
        group = parser.add_mutually_exclusive_group()
        groups |= dict.fromkeys(names, group)
    for name, group in groups.items():
        add_option(group, name)
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run model code that comes with the model",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        help="where calibration text is run through the model (default: cpu)",
    )
    parser.add_argument(
        "--max_shard_size",
        default="50GB",
        metavar="SIZE",
        help="largest weight file (default: 50GB)",
    )
    parser.add_argument(
        "--push_to_hub",
        metavar="REPO",
        help="upload the finished folder to this repository on the Hub",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from lm_eval_pruned.checkpoints.export import export_pruned
    from lm_eval_pruned.checkpoints.planning import SOURCE_ARGUMENTS

    model_args = read_model_args(arguments)
    asked = pruning_of(arguments, model_args)
    if arguments.trust_remote_code:
        model_args["trust_remote_code"] = True
    refuse_others(model_args, ("dtype", *SOURCE_ARGUMENTS), "prune")
    export = export_pruned(
        output=arguments.output_path,
        device=arguments.device,
        max_shard_size=arguments.max_shard_size,
        push_to_hub=arguments.push_to_hub,
        prune_arguments=asked,
        **with_default_model(model_args, "pruning"),
    )
    print(export.record.as_table())
    print(
        f"Wrote {export.weight_bytes:,} bytes of weights in {export.shards} "
        f"file{'s' if export.shards != 1 else ''} to {export.folder}."
    )
    return 0
