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
    _add_prune(commands)
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


def _add_prune(commands) -> None:
    parser = commands.add_parser(
        "prune",
        help="write a pruned model as an ordinary checkpoint",
        description="Write a pruned model as an ordinary checkpoint: safetensors shards, config "
        "with the new width, tokenizer files, model card. The weights are streamed, so the model "
        "may be larger than the memory.",
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
    sizes = parser.add_mutually_exclusive_group(required=True)
    sizes.add_argument("--ratio", metavar="R", help="expansion ratio to keep")
    sizes.add_argument(
        "--prune_percent", metavar="P", help="share of neurons to remove, in percent"
    )
    sizes.add_argument(
        "--intermediate_size", metavar="K", help="kept width, in neurons"
    )
    parser.add_argument(
        "--multiple_of",
        default="1",
        metavar="N",
        help="round the kept width down to a multiple of N (default: 1)",
    )
    layers = parser.add_mutually_exclusive_group()
    layers.add_argument("--layers", help="layers to prune, such as 4-11 (default: all)")
    layers.add_argument("--skip_layers", help="layers to leave as they are")
    parser.add_argument(
        "--criterion", default="maw", help="importance score (default: maw)"
    )
    parser.add_argument("--seed", default="0", help="seed of the criterion random")
    parser.add_argument(
        "--calibration",
        metavar="FILE.jsonl",
        help="text for the criteria that look at activations",
    )
    parser.add_argument(
        "--calibration_samples",
        metavar="N",
        help="use its first N texts (default: all)",
    )
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
        "--device", default="cpu", help="where neurons are ranked (default: cpu)"
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
    parser.set_defaults(run=_run_prune)


def _run_prune(arguments: argparse.Namespace) -> int:
    from lm_eval_pruned.export import export_pruned

    given = vars(arguments)
    sizes = ("ratio", "prune_percent", "intermediate_size")
    others = ("multiple_of", "criterion", "seed", "layers", "skip_layers")
    text = ("calibration", "calibration_samples")
    source = ("revision", "subfolder", "gguf_file", "trust_remote_code")
    export = export_pruned(
        arguments.pretrained,
        arguments.output,
        dtype=arguments.dtype,
        device=arguments.device,
        max_shard_size=arguments.max_shard_size,
        push_to_hub=arguments.push_to_hub,
        prune_arguments={name: given[name] for name in (*sizes, *others, *text)},
        **{name: given[name] for name in source},
    )
    print(export.record.as_table())
    print(
        f"Wrote {export.weight_bytes:,} bytes of weights in {export.shards} "
        f"file{'s' if export.shards != 1 else ''} to {export.folder}."
    )
    return 0
