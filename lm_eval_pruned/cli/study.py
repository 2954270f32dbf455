"""The study of arXiv 2512.22671 for any model: its sizes and tasks, floors, random cuts with seeds,
energy and latency. The result is a report that begins with whether the dichotomy holds for this model,
and what is shown of the paper's other claims. If interrupted, the same command continues where it
stopped. Needs the extra `report`.
"""

from importlib import import_module

from lm_eval_pruned.cli import sweep
from lm_eval_pruned.cli.compare import UNIT
from lm_eval_pruned.sweeps.options import read_mapping
from lm_eval_pruned.util.options import row


# fmt: off
OPTIONS = (
    row("pretrained", "MODEL", "a folder or Hub name (default: the default model)", nargs="?"),
    row("--kind", None,
        "how the model is prompted: base without a chat template; instruct with it, at fewer sizes and "
        "tasks (default: according to the tokenizer and the name)", choices=("base", "instruct")),
    row("--quick", "",
        "the tasks that come with this package, all their documents, and two sizes: about 16 minutes on "
        "two cores"),
    row("--margin", "MARGIN",
        f"a score within this distance of the unpruned model's counts as kept: {UNIT} (default: 5%%)",
        default="5%"),
    row("--families", "TASK=FAMILY",
        "families of tasks whose YAML file declares none under metadata: knowledge, commonsense, "
        "language_modeling, truthfulness, instruction_following or reasoning", nargs="+"),
    *sweep.OPTIONS,
)
# fmt: on


def run(arguments) -> int:
    """Run the study; return its exit code."""
    if not arguments.dry_run:
        # Needs the extra `report`, which is said before anything is read.
        import_module("lm_eval_pruned.util.figures")
    options, how = sweep.read(arguments, needs=("output_path",))
    from lm_eval_pruned.cli import main
    from lm_eval_pruned.study.run import run_study

    how |= {name: getattr(arguments, name) for name in ("kind", "quick", "margin")}
    families = read_mapping(arguments.families or {}, "--families")
    return run_study(arguments.pretrained, options, main, families=families, **how)
