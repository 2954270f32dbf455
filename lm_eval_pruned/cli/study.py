"""The study of arXiv 2512.22671 for any model: its sizes and tasks, floors, random cuts with seeds,
energy and latency. It ends with one page: does the dichotomy hold for this model? The same command
goes on where it stopped. Needs the extra `report`.
"""

from lm_eval_pruned.sweeps import options
from lm_eval_pruned.util.options import row


# fmt: off
OPTIONS = (
    row("models", "MODEL", "folders or Hub names (default: the default model)", nargs="*"),
    row("--kind", None,
        "how the study asks a model: base without a chat template, instruct with it, at fewer sizes "
        "and tasks (default: as the tokenizer and the name say)", choices=("base", "instruct")),
    row("--quick", "",
        "few documents, three sizes, one seed: about 15 minutes for the default model on two cores"),
    options.add_arguments,
)
# fmt: on


def run(arguments) -> int:
    """Run the study; return its exit code."""
    given = options.read_options(arguments, needs=("output_path",))
    shard = options.parse_shard(arguments.shard) if arguments.shard else None
    from lm_eval.utils import setup_logging

    from lm_eval_pruned.cli import main
    from lm_eval_pruned.study.run import run_study

    setup_logging()
    names = ("kind", "quick", "retry_failed", "dry_run")
    how = {name: getattr(arguments, name) for name in names}
    return run_study(arguments.models, given, main, shard=shard, **how)
