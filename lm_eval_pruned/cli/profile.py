"""``lm-eval-pruned profile``: latency, throughput, memory and energy over sizes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from lm_eval_pruned.cli.model_args import (
    add_model_args,
    read_model_args,
    with_default_model,
)
from lm_eval_pruned.profiling.options import ProfileRequest
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
    add_option(parser, "criterion")
    ProfileRequest.add_to(parser)
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help='.txt with one prompt a line, or .jsonl with a key "prompt" (default: the demo set)',
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="use the first N prompts only"
    )
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument(
        "--output_path", required=True, metavar="DIR", help="folder to write"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from pathlib import Path

    import torch

    from lm_eval_pruned.checkpoints.load import load_pruned
    from lm_eval_pruned.energy.meter import CodecarbonMeter
    from lm_eval_pruned.energy.monitor import EnergyMonitor
    from lm_eval_pruned.profiling import report as profile_report
    from lm_eval_pruned.profiling.engine import EngineModel
    from lm_eval_pruned.profiling.measure import profile
    from lm_eval_pruned.profiling.prompts import demo_prompts, read_prompts
    from lm_eval_pruned.util.palette import plots_missing

    model_args = read_model_args(arguments)
    taken = {SEVERAL.get(option, option): option for option in vars(arguments)}
    for name, value in model_args.items():
        if name in taken:
            raise ValueError(
                f"{name}={value} stands in --model_args: pass --{taken[name]} instead."
            )
    model_args = with_default_model(model_args, "profiling")
    file, limit = arguments.prompts, arguments.limit
    prompts = (demo_prompts() if file is None else read_prompts(Path(file)))[:limit]
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} leaves no prompt: pass at least 1.")
    request = ProfileRequest.of(
        ProfileRequest.parsed(arguments),
        "profile",
        pretrained=str(model_args.pop("pretrained")),
        **{name: getattr(arguments, name) or () for name in SEVERAL_SIZES},
        criterion=arguments.criterion,
        device=arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=model_args.pop("dtype", None),
        load_arguments=model_args,
    )
    why = plots_missing()
    if why is not None:
        print(f"There will be no plots: {why}.", file=sys.stderr)
    folder = Path(arguments.output_path)
    found = profile(
        request,
        prompts,
        monitor=EnergyMonitor(CodecarbonMeter()),
        load=EngineModel if arguments.model == "pruned-vllm" else load_pruned,
        on_repeat=lambda so_far: profile_report.write_json(so_far, folder),
    )
    paths = profile_report.write(found, folder)
    print(profile_report.as_markdown(found))
    print(f"Written to {', '.join(str(path) for path in paths)}.", file=sys.stderr)
    if found["interrupted"]:
        print("Interrupted: the files hold what was finished before.", file=sys.stderr)
        return 130
    return 0
