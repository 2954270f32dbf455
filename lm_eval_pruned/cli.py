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
    _add_compare(commands)
    _add_report(commands)
    _add_check(commands)
    _add_sweep(commands)
    _add_profile(commands)
    _add_study_energy(commands)
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
    from lm_eval_pruned.checkpoints import planning

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


def _add_compare(commands) -> None:
    parser = commands.add_parser(
        "compare",
        help="paired statistics of runs against a base",
        description="Compare runs with a base, task by task: paired differences with interval and "
        "p from the logged samples, adjusted over the table; across expansion ratios also "
        "correlations and trends.",
    )
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="RESULTS",
        help="the base, then the runs: results files, folders that `lm_eval --output_path` filled, "
        "or sweep folders; one sweep folder alone is compared with its own baseline",
    )
    parser.add_argument(
        "--alpha",
        type=float,
        default=0.05,
        metavar="A",
        help="level of the tests; intervals cover 1 - A (default: 0.05)",
    )
    parser.add_argument(
        "--subtasks",
        action="store_true",
        help="compare the members of groups too, such as the subjects of MMLU",
    )
    parser.add_argument("--format", choices=("table", "csv", "json"), default="table")
    parser.set_defaults(run=_run_compare)


def _run_compare(arguments: argparse.Namespace) -> int:
    from lm_eval_pruned.analysis import comparison

    base, runs = comparison.read_comparands(arguments.paths)
    result = comparison.compare(
        base, runs, alpha=arguments.alpha, subtasks=arguments.subtasks
    )
    print(comparison.FORMATS[arguments.format](result), end="")
    return 0


def _add_check(commands) -> None:
    parser = commands.add_parser(
        "check",
        help="hold results against a committed baseline, for CI",
        description="Hold results against a baseline file. Exit code 0: every expected score is "
        "there and no worse than its rule allows. 1: one is missing, worse, not a number, or of "
        "another version of its task. 2: nothing worse was seen, but something could not be "
        "decided: other documents, shots, templates or widths than the baseline's, too few "
        "documents for alpha, or input that cannot be read.",
    )
    parser.add_argument(
        "results",
        metavar="RESULTS",
        help="results file, folder that `lm_eval --output_path` filled, or sweep folder",
    )
    parser.add_argument(
        "--baseline", required=True, metavar="FILE", help="baseline file"
    )
    parser.add_argument(
        "--format", choices=("text", "json", "junit", "github"), default="text"
    )
    parser.add_argument(
        "--update",
        action="store_true",
        help="write the results to the baseline file instead; rules that it has stay",
    )
    rules = parser.add_mutually_exclusive_group()
    rules.add_argument(
        "--absolute",
        type=float,
        metavar="T",
        help="with --update, rule for metrics new to the baseline: worse by at most T, in the "
        "metric's own unit (default: 0)",
    )
    rules.add_argument(
        "--relative",
        type=float,
        metavar="T",
        help="the same, worse by at most T times the expected score",
    )
    rules.add_argument(
        "--alpha",
        type=float,
        metavar="A",
        help="the same, not significantly worse at level A; needs --log_samples",
    )
    parser.set_defaults(run=_run_check)


def _run_check(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from lm_eval_pruned.analysis import gate as regression

    given = [
        regression.Rule(kind, getattr(arguments, kind))
        for kind in regression.RULES
        if getattr(arguments, kind) is not None
    ]
    if given and not arguments.update:
        raise ValueError(
            f"--{given[0].kind} {given[0].value:g} makes rules for a new baseline: give it together "
            "with --update, or edit the rules in the baseline file."
        )
    runs = regression.read_results(arguments.results)
    if not arguments.update:
        baseline = regression.read_baseline(arguments.baseline)
        findings = regression.check(runs, baseline)
        notes = regression.notes(runs, baseline)
        print(regression.FORMATS[arguments.format](findings, notes), end="")
        return regression.exit_code(findings)
    previous = (
        regression.read_baseline(arguments.baseline, earlier=True)
        if Path(arguments.baseline).exists()
        else None
    )
    rule = given[0] if given else regression.Rule("absolute", 0.0)
    baseline = regression.make_baseline(runs, rule, previous)
    regression.write_baseline(arguments.baseline, baseline)
    notes = regression.update_notes(runs, baseline, previous) if previous else []
    for note in [*notes, *regression.unusable_rules(runs, baseline)]:
        print(f"NOTE     {note}")
    print(
        f"Wrote {len(baseline.expectations)} expected scores to {arguments.baseline}."
    )
    return 0


def _add_report(commands) -> None:
    parser = commands.add_parser(
        "report",
        help="a sweep as Markdown, CSV, HTML and plots",
        description="Write report.md, results.csv, a self-contained report.html and plots from a "
        "sweep folder. Needs the extra `report`.",
    )
    parser.add_argument("folder", metavar="DIR", help="sweep folder")
    parser.add_argument(
        "--output_path",
        metavar="DIR",
        help="where to write (default: `report` in the sweep folder)",
    )
    parser.add_argument(
        "--alpha",
        type=float,
        default=0.05,
        metavar="A",
        help="level of the tests; intervals cover 1 - A (default: 0.05)",
    )
    parser.set_defaults(run=_run_report)


def _run_report(arguments: argparse.Namespace) -> int:
    from lm_eval_pruned.analysis import report

    for file in report.write_report(
        arguments.folder, arguments.output_path, alpha=arguments.alpha
    ):
        print(file)
    return 0


def _add_sweep(commands) -> None:
    from lm_eval_pruned.sweeps import options as sweep_options

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

    from lm_eval_pruned.checkpoints.default_model import find_default_model
    from lm_eval_pruned.energy.codecarbon_meter import CodecarbonMeter
    from lm_eval_pruned.energy.monitor import EnergyMonitor
    from lm_eval_pruned.profiling import measure as profiling, report as profile_report

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
    if "pretrained" not in model_args:
        default = find_default_model()
        model_args |= default.model_args()
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
        pretrained=str(model_args.pop("pretrained")),
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


def _add_study_energy(commands) -> None:
    parser = commands.add_parser(
        "study-energy",
        help="the published energy runs of arXiv 2512.22671, gross and net",
        description="Print what the energy runs published with arXiv 2512.22671 show, gross and "
        "net of idle, as Markdown. Every figure is computed from the runs, which are part "
        "of this package.",
    )
    parser.set_defaults(run=_run_study_energy)


def _run_study_energy(arguments: argparse.Namespace) -> int:
    from lm_eval_pruned.energy import study as study_energy

    print(study_energy.as_markdown())
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
    parser.set_defaults(run=_run_prune)


def _run_prune(arguments: argparse.Namespace) -> int:
    from lm_eval_pruned.checkpoints.export import export_pruned
    from lm_eval_pruned.checkpoints.planning import SOURCE_ARGUMENTS

    given = vars(arguments)
    sizes = ("ratio", "prune_percent", "intermediate_size")
    others = ("multiple_of", "criterion", "seed", "layers", "skip_layers")
    text = ("calibration", "calibration_samples")
    export = export_pruned(
        arguments.pretrained,
        arguments.output,
        dtype=arguments.dtype,
        device=arguments.device,
        max_shard_size=arguments.max_shard_size,
        push_to_hub=arguments.push_to_hub,
        prune_arguments={name: given[name] for name in (*sizes, *others, *text)},
        **{name: given[name] for name in SOURCE_ARGUMENTS},
    )
    print(export.record.as_table())
    print(
        f"Wrote {export.weight_bytes:,} bytes of weights in {export.shards} "
        f"file{'s' if export.shards != 1 else ''} to {export.folder}."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
