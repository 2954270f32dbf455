"""``lm-eval-pruned profile``: latency, throughput, memory and energy over sizes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from lm_eval_pruned.cli.model_args import (
    add_model_args,
    read_model_args,
    with_default_model,
)
from lm_eval_pruned.pruning.arguments import SEVERAL, SEVERAL_SIZES, add_option


if TYPE_CHECKING:
    import argparse


def add(commands) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "profile",
        help="latency, throughput, memory and energy at several sizes",
        description="Measure the unpruned model and pruned ones side by side: prefill and "
        "decode apart, at a fixed and at the natural output length.",
    )
    parser.add_argument(
        "--model",
        choices=("pruned-hf", "pruned-vllm"),
        default="pruned-hf",
        help="what the models run in: transformers (default) or vLLM",
    )
    add_model_args(parser)
    for name in SEVERAL_SIZES:
        add_option(parser, name, several=True)
    parser.add_argument(
        "--multiple_of",
        nargs="+",
        type=int,
        default=[1],
        metavar="N",
        help="measure each size at its widths rounded down to these multiples (default: 1)",
    )
    add_option(parser, "criterion")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1], metavar="B")
    parser.add_argument(
        "--max_new_tokens", type=int, default=50, metavar="N", help="default: 50"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="default: 5"
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help='.jsonl with a key "prompt", or .txt with one prompt a line (default: the demo set)',
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="use the first N prompts only"
    )
    parser.add_argument(
        "--apply_chat_template",
        action="store_true",
        help="wrap each prompt as a turn of the user",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--output_path", required=True, metavar="DIR")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from pathlib import Path

    import torch

    from lm_eval_pruned.checkpoints.load import load_pruned
    from lm_eval_pruned.energy.meter import CodecarbonMeter
    from lm_eval_pruned.energy.monitor import EnergyMonitor
    from lm_eval_pruned.profiling import measure as profiling, report as profile_report
    from lm_eval_pruned.profiling.engine import EngineModel
    from lm_eval_pruned.profiling.prompts import demo_prompts, read_prompts

    model_args = read_model_args(arguments)
    taken = {SEVERAL.get(option, option): option for option in vars(arguments)}
    for name, value in model_args.items():
        if name in taken:
            raise ValueError(
                f"{name}={value} stands in --model_args: pass --{taken[name]} instead."
            )
    model_args = with_default_model(model_args, "profiling")
    prompts = (
        demo_prompts()
        if arguments.prompts is None
        else read_prompts(Path(arguments.prompts))
    )
    if arguments.limit is not None:
        if arguments.limit < 1:
            raise ValueError(
                f"limit={arguments.limit} leaves no prompt: pass at least 1."
            )
        prompts = prompts[: arguments.limit]
    request = profiling.ProfileRequest(
        pretrained=str(model_args.pop("pretrained")),
        **{name: tuple(getattr(arguments, name) or ()) for name in SEVERAL_SIZES},
        multiple_of=tuple(arguments.multiple_of),
        batch_sizes=tuple(arguments.batch_sizes),
        max_new_tokens=arguments.max_new_tokens,
        repeats=arguments.repeats,
        seed=arguments.seed,
        criterion=arguments.criterion,
        device=arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=model_args.pop("dtype", None),
        apply_chat_template=arguments.apply_chat_template,
        load_arguments=model_args,
    )
    why = profile_report.plots_missing()
    if why is not None:
        print(f"There will be no plots: {why}.", file=sys.stderr)
    folder = Path(arguments.output_path)
    profile = profiling.profile(
        request,
        prompts,
        monitor=EnergyMonitor(CodecarbonMeter()),
        load=EngineModel if arguments.model == "pruned-vllm" else load_pruned,
        on_repeat=lambda so_far: profile_report.write_json(so_far, folder),
    )
    paths = profile_report.write(profile, folder)
    print(profile_report.as_markdown(profile))
    print(f"Written to {', '.join(str(path) for path in paths)}.", file=sys.stderr)
    if profile["interrupted"]:
        print("Interrupted: the files hold what was finished before.", file=sys.stderr)
        return 130
    return 0
