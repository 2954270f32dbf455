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
    _add_profile(commands)
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


def _add_profile(commands) -> None:
    parser = commands.add_parser(
        "profile",
        help="latency, throughput, memory and energy at several expansion ratios",
        description="Measure the unpruned model and pruned ones side by side: prefill and "
        "decode apart, at a fixed and at the natural output length.",
    )
    parser.add_argument(
        "--model_args",
        default="",
        metavar="KEY=VALUE,...",
        help="pretrained=NAME_OR_FOLDER and other arguments of loading "
        "(default: SmolLM2-135M-Instruct)",
    )
    parser.add_argument(
        "--ratios",
        nargs="+",
        required=True,
        metavar="R",
        help="expansion ratios to measure beside the unpruned model",
    )
    parser.add_argument(
        "--multiple_of",
        nargs="+",
        type=int,
        default=[1],
        metavar="N",
        help="measure each ratio at its width rounded down to these multiples (default: 1)",
    )
    parser.add_argument(
        "--criterion", default="maw", help="importance score (default: maw)"
    )
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
    parser.add_argument("--dtype", help="weight dtype (default: the checkpoint's)")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--output_path", required=True, metavar="DIR")
    parser.set_defaults(run=_run_profile)


def _run_profile(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    import torch
    from lm_eval.utils import simple_parse_args_string

    from lm_eval_pruned import profile_report, profiling
    from lm_eval_pruned.codecarbon_meter import CodecarbonMeter
    from lm_eval_pruned.default_model import find_default_model
    from lm_eval_pruned.energy import EnergyMonitor

    model_args = simple_parse_args_string(arguments.model_args)
    taken = {
        "ratio": "--ratios",
        "multiple_of": "--multiple_of",
        "criterion": "--criterion",
        "seed": "--seed",
        "dtype": "--dtype",
        "device": "--device",
    }
    for name, option in taken.items():
        if name in model_args:
            raise ValueError(
                f"{name}={model_args[name]} stands in --model_args: pass {option} instead."
            )
    pretrained = model_args.pop("pretrained", None)
    if pretrained is None:
        default = find_default_model()
        pretrained = default.pretrained
        if default.gguf_file is not None:
            model_args["gguf_file"] = default.gguf_file
        print(f"pretrained was not given: profiling {default.source}.", file=sys.stderr)
    prompts = (
        profiling.demo_prompts()
        if arguments.prompts is None
        else profiling.read_prompts(Path(arguments.prompts))
    )
    if arguments.limit is not None:
        if arguments.limit < 1:
            raise ValueError(
                f"limit={arguments.limit} leaves no prompt: pass at least 1."
            )
        prompts = prompts[: arguments.limit]
    request = profiling.ProfileRequest(
        pretrained=str(pretrained),
        ratios=tuple(arguments.ratios),
        multiple_of=tuple(arguments.multiple_of),
        batch_sizes=tuple(arguments.batch_sizes),
        max_new_tokens=arguments.max_new_tokens,
        repeats=arguments.repeats,
        seed=arguments.seed,
        criterion=arguments.criterion,
        device=arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=arguments.dtype,
        apply_chat_template=arguments.apply_chat_template,
        load_arguments=model_args,
    )
    why = profile_report.plots_missing()
    if why is not None:
        print(f"There will be no plots: {why}.", file=sys.stderr)
    folder = Path(arguments.output_path)
    try:
        profile = profiling.profile(
            request,
            prompts,
            monitor=EnergyMonitor(CodecarbonMeter()),
            on_repeat=lambda so_far: profile_report.write_json(so_far, folder),
        )
    except KeyboardInterrupt:
        print("Interrupted before anything was measured.", file=sys.stderr)
        return 130
    paths = profile_report.write(profile, folder)
    print(profile_report.as_markdown(profile))
    print(f"Written to {', '.join(str(path) for path in paths)}.", file=sys.stderr)
    if profile.interrupted:
        print("Interrupted: the files hold what was finished before.", file=sys.stderr)
        return 130
    return 0
