"""May CANDIDATE be served in place of BASE? Evaluate both on the same documents, and say ship, do
not ship, or not decided and what it would take. CANDIDATE is BASE however compressed: pruned,
quantised, distilled.

Exit code 0: ship. 1: do not ship, some score is shown to be worse. 2: not decided, or input that
cannot be used. The same command goes on where it stopped.
"""

from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

from lm_eval_pruned.cli.compare import UNIT
from lm_eval_pruned.sweeps.options import GROUPS
from lm_eval_pruned.util.options import DeclaredOptions, row


_LEFT_OUT = ("output_path", "log_samples", "predict_only")
_OF_HARNESS = {
    name: each
    for name, each in GROUPS["evaluation, as in lm_eval run"].items()
    if name not in _LEFT_OUT
}
Evaluation: Any = make_dataclass(
    "Evaluation",
    [(name, Any, each) for name, each in _OF_HARNESS.items()],
    bases=(DeclaredOptions,),
)
_WHAT = "TYPE,key=value,... as in lm_eval --model TYPE --model_args key=value,..., or the path of results"
# fmt: off
OPTIONS = (
    row("base", "BASE", f"the model of today: {_WHAT}"),
    row("candidate", "CANDIDATE", "the one that may replace it, given in the same way"),
    row("--margin", "[NAME=]MARGIN",
        f"how much worse a score may be, for all or for one task or metric: {UNIT} (default: 2pt; "
        "2%% of perplexities and scores that are no shares; 1%% of bits per byte)",
        nargs="+", default=[]),
    row("--output_path", "DIR", "folder of both evaluations and the pages (default: verdict)",
        default="verdict"),
    row("--format", None, "what to print (default: text)", choices=("text", "markdown"),
        default="text"),
    row("--no_texts", "", "leave the texts of documents and answers out of the pages"),
    Evaluation.add_to,
)
# fmt: on


def run(arguments) -> int:
    """Evaluate what is not evaluated yet, write the pages and return the exit code."""
    from lm_eval.utils import setup_logging

    from lm_eval_pruned.verdict import page
    from lm_eval_pruned.verdict.decision import decide, read_margins
    from lm_eval_pruned.verdict.models import both_runs

    read_margins(arguments.margin)
    given = Evaluation.parsed(arguments)
    options = vars(Evaluation.of(given, "verdict"))
    setup_logging()
    texts, folder = (arguments.base, arguments.candidate), Path(arguments.output_path)
    runs = both_runs(*texts, {name: options[name] for name in given}, folder)
    verdict = decide(*runs, arguments.margin)
    subtitle = f"{texts[1]} in place of {texts[0]}"
    files = page.write_pages(verdict, folder, subtitle, texts=not arguments.no_texts)
    if arguments.format == "markdown":
        print(files[1].read_text(encoding="utf-8"), end="")
    else:
        print(page.as_text(verdict), end="")
        print(f"\nWritten to {' and '.join(map(str, files))}.")
    return verdict.code
