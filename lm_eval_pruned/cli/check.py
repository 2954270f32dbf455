"""Compare results with a baseline file.

Exit code 0: every expected score is there and no worse than its rule allows. 1: one is missing,
worse, not a number, or from another version of its task. 3: nothing worse was seen, but something
could not be decided: documents, shots, templates or widths differ from the baseline's, or there
are too few documents for a test. 2: input cannot be read. 70: an error of lm-eval-pruned.
"""

from pathlib import Path
from typing import Any

from lm_eval_pruned.cli import say
from lm_eval_pruned.cli.compare import margins
from lm_eval_pruned.util.options import row


#: What stands for the usual margin of each metric.
USUAL = "usual"
# fmt: off
OPTIONS = (
    row("results", "RESULTS",
        "results file, folder that `lm_eval --output_path` filled, or sweep folder"),
    row("--baseline", "FILE", "baseline file", required=True),
    row("--format", None, "form of the output (default: text)",
        choices=("text", "json", "github"), default="text"),
    row("--update", "",
        "write the results to the baseline file instead; rules already in it are kept"),
    [
        row("--absolute", "T", "with --update, rule for metrics new to the baseline: worse by at most "
            "T, in the metric's own unit (default: 0)", type=float),
        row("--relative", "T", "the same, worse by at most T times the expected score", type=float),
        *(
            (name, how | {"nargs": "?", "const": USUAL})
            for name, how in margins(
                "; with --update, the rule of what verdict judges in each task. Needs --log_samples. "
                "Without a margin, the usual one of verdict"
            )
        ),
    ],
)
# fmt: on


def run(arguments) -> int:
    """Check the results, or write them as the baseline; return the exit code."""
    from lm_eval_pruned.compare import baseline as files, check as gate

    kind: str = "absolute"
    value: Any = 0.0
    for name in files.OPTIONS:
        if (limit := getattr(arguments, name)) is not None:
            kind, value = name, None if limit == USUAL else limit
            if not arguments.update:
                raise ValueError(
                    f"--{name} {limit} sets the rule for a new baseline: pass it together with "
                    "--update, or edit the rules in the baseline file."
                )
    if value is not None:
        files.Rule(kind, value)
    runs, file = gate.read_results(arguments.results), arguments.baseline
    if not arguments.update:
        baseline = files.read_baseline(file)
        findings = gate.check(runs, baseline)
        text = gate.FORMATS[arguments.format](findings, gate.notes(runs, baseline))
        say(text.removesuffix("\n"))
        return gate.exit_code(findings)
    previous = files.read_baseline(file) if Path(file).exists() else None
    baseline = gate.make_baseline(
        runs, kind, value, previous, gate.floors_in(arguments.results)
    )
    files.write_baseline(file, baseline)
    for note in gate.notes(runs, baseline):
        print(f"NOTE     {note}")
    for finding in gate.check(runs, baseline):
        if finding.status == "undecided":
            print(f"NOTE     {finding.title}: {finding.message}")
    print(f"Wrote {len(baseline.rules)} expected scores to {file}.")
    return 0
