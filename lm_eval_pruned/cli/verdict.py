"""May CANDIDATE be served in place of BASE, of which it is a pruned, quantised or otherwise smaller
form? Evaluate both on the same documents and answer: ship, do not ship, or not decided and what it
would take. Without --tasks, use the documents on which BASE was evaluated, or those of the demo. If
interrupted, the same command continues where it stopped.

Exit code 0: ship. 1: do not ship, a score is shown to be worse. 3: not decided. 2: input that cannot
be used. 70: an error of lm-eval-pruned.
"""

from pathlib import Path

from lm_eval_pruned.cli import say
from lm_eval_pruned.cli.compare import UNIT
from lm_eval_pruned.sweeps.options import GROUPS, SweepOptions
from lm_eval_pruned.util.options import row


_LEFT_OUT = ("output_path", "log_samples", "predict_only")
_EVALUATION = [*GROUPS["evaluation, as in lm_eval run"]]
# fmt: off
OPTIONS = (
    row("base", "BASE", "path of results, or TYPE,key=value,... as in lm_eval --model TYPE "
        "--model_args key=value,... with hf, pruned-hf, vllm or pruned-vllm"),
    row("candidate", "CANDIDATE", "the same"),
    row("--margin", "[NAME=]MARGIN", "how much worse a score may be, for one task or metric or for "
        f"all: {UNIT} (default: 5%% of a score with an exact floor, so that 95 %% are kept; 2pt for "
        "scores from 0 to 1, 15pt for a bias; 2%% for others)", nargs="+", default=[]),
    row("--measure", "METRIC", "judge this metric where a task has it (default: a score with an exact floor, else "
        "the probability of the right answer, mc2 or choice_prob, else the score that counts)"),
    row("--text", "FILE", "plain text on which loss and divergence from the base are measured, in place of the "
        "demo's or beside --tasks"),
    row("--context", "N", "tokens of each long text of the demo (default: 2048, or what the config of BASE allows)", type=int),
    row("--output_path", "DIR", "folder of results and pages (default: verdict)", default="verdict"),
    row("--no_texts", "", "leave the texts of documents and answers out of the pages"),
    row("--push_to_hub", "REPO", "the candidate's repository on the Hub: write the verdict into its model card, "
        "and upload its scores"),
    *(SweepOptions.row(name) for name in _EVALUATION if name not in _LEFT_OUT),
)
# fmt: on


def run(arguments) -> int:
    """Evaluate what is not evaluated yet, write the pages and return the exit code."""
    from lm_eval_pruned.verdict.decision import decide, read_margins

    margins, measure = read_margins(arguments.margin), arguments.measure
    _check_margins_of_demo(arguments, margins)

    from lm_eval.utils import setup_logging

    from lm_eval_pruned.verdict.hub import check_repository, push_verdict, without_paths
    from lm_eval_pruned.verdict.models import both_runs
    from lm_eval_pruned.verdict.page import card_section, headline, write_pages

    chosen = SweepOptions.parsed(arguments)
    read = SweepOptions.of(chosen, "verdict")
    if repository := arguments.push_to_hub:
        check_repository(repository)
    options = {name: getattr(read, name) for name in chosen}
    setup_logging()
    models, folder = (arguments.base, arguments.candidate), Path(arguments.output_path)
    # A folder is known as one while it is there.
    published = without_paths(models[0])
    base, candidate, floors = both_runs(
        *models, options, folder, margins, measure, arguments.text, arguments.context
    )
    subtitle, texts = f"{models[1]} in place of {models[0]}", not arguments.no_texts
    verdict = decide(base, candidate, margins, floors, measure=measure)
    say(f"{headline(verdict)}\n")
    say(write_pages(verdict, folder, subtitle, texts=texts))
    say(f"The page is {folder / 'verdict.html'}.")
    if repository:
        section = card_section(verdict, published)
        kept = {
            row.case.key: row.floor.kept_text
            for row in verdict.rows
            if row.floor and row.primary
        }
        say(push_verdict(repository, section, candidate.path, folder / "hub", kept))
    return verdict.code


def _check_margins_of_demo(arguments, margins) -> None:
    """Raise ValueError for a margin that scores from 0 to 1 cannot have, where the tasks are the demo's.

    They have such scores. It takes seconds to import the harness, and more to read its tasks.
    """
    from lm_eval_pruned.compare.margins import Margin

    paths = map(Path, (arguments.base, arguments.candidate))
    if arguments.tasks is None and not any(path.exists() for path in paths):
        for name, text in margins.items():
            Margin("margin", text).check("pruned_demo", name or "acc")
