"""``lm-eval-pruned check``: results held against a committed baseline."""

from __future__ import annotations

from lm_eval_pruned.cli.compare import add_margins


_NEW = "with --update, rule for metrics new to the baseline: "


def add(commands) -> None:
    """Declare the command and its options."""
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
    forms = ("text", "json", "junit", "github")
    parser.add_argument("--format", choices=forms, default="text")
    parser.add_argument(
        "--update",
        action="store_true",
        help="write the results to the baseline file instead; rules that it has stay",
    )
    rules = parser.add_mutually_exclusive_group()
    for kind, letter, text in (
        (
            "absolute",
            "T",
            f"{_NEW}worse by at most T, in the metric's own unit (default: 0)",
        ),
        ("relative", "T", "the same, worse by at most T times the expected score"),
        (
            "alpha",
            "A",
            "the same, not significantly worse at level A; needs --log_samples",
        ),
    ):
        rules.add_argument(f"--{kind}", type=float, metavar=letter, help=text)
    add_margins(rules, ", as a rule with --update; needs --log_samples")
    parser.set_defaults(run=run)


def run(arguments) -> int:
    """Run the command; return its exit code."""
    from pathlib import Path

    from lm_eval_pruned.gate import baseline as files, check as gate
    from lm_eval_pruned.gate.findings import FORMATS, exit_code

    options = {kind: getattr(arguments, kind) for kind in files.RULES}
    rules = [files.Rule(*each) for each in options.items() if each[1] is not None]
    if rules and not arguments.update:
        raise ValueError(
            f"--{rules[0].kind} {rules[0].value} makes rules for a new baseline: give it together "
            "with --update, or edit the rules in the baseline file."
        )
    runs, file = gate.read_results(arguments.results), arguments.baseline
    if not arguments.update:
        baseline = files.read_baseline(file)
        findings = gate.check(runs, baseline)
        print(FORMATS[arguments.format](findings, gate.notes(runs, baseline)), end="")
        return exit_code(findings)
    previous = files.read_baseline(file) if Path(file).exists() else None
    rule = rules[0] if rules else files.Rule("absolute", 0.0)
    baseline = gate.make_baseline(runs, rule, previous)
    files.write_baseline(file, baseline)
    for finding in gate.check(runs, baseline):
        if finding.status == "undecided":
            print(f"NOTE     {finding.title}: {finding.message}")
    print(f"Wrote {len(baseline.rules)} expected scores to {file}.")
    return 0
