"""``lm-eval-pruned prune``: a pruned model as an ordinary checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
    parser.add_argument(
        "--pretrained",
        required=True,
        metavar="NAME_OR_FOLDER",
        help="model to prune",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="folder to write; new or empty",
    )
    groups: dict[str, Any] = dict.fromkeys(DECLARED, parser)
    for names in EXCLUSIVE.values():
        group = parser.add_mutually_exclusive_group()
        groups |= dict.fromkeys(names, group)
    for name, group in groups.items():
        add_option(group, name)
    parser.add_argument("--revision", default="main", help="revision on the Hub")
    parser.add_argument("--subfolder", default="", help="folder in the repository")
    parser.add_argument("--gguf_file", help="GGUF file to read instead of safetensors")
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run model code that comes with the model",
    )
    parser.add_argument(
        "--dtype", help="dtype to store weights in (default: as stored)"
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

    given = vars(arguments)
    export = export_pruned(
        arguments.pretrained,
        arguments.output,
        dtype=arguments.dtype,
        device=arguments.device,
        max_shard_size=arguments.max_shard_size,
        push_to_hub=arguments.push_to_hub,
        prune_arguments={name: given[name] for name in DECLARED},
        **{name: given[name] for name in SOURCE_ARGUMENTS},
    )
    print(export.record.as_table())
    print(
        f"Wrote {export.weight_bytes:,} bytes of weights in {export.shards} "
        f"file{'s' if export.shards != 1 else ''} to {export.folder}."
    )
    return 0
