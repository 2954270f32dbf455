"""Evaluate a model at several sizes on several tasks, the unpruned model first. Finished units
are saved immediately; if interrupted, the same command continues where it stopped.
"""

from pathlib import Path
from typing import Any

from lm_eval_pruned.sweeps import options
from lm_eval_pruned.util.atomic import check_writable


OPTIONS = (options.add_arguments,)


def read(arguments, **needs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of a sweep, and how its units are run; log as `lm_eval` does."""
    chosen = options.read_options(arguments, **needs)
    shard = options.parse_shard(arguments.shard) if arguments.shard else None
    if arguments.config and not arguments.dry_run:
        # `main` has checked what is on the command line.
        check_writable(Path(chosen["output_path"]))
    from lm_eval.utils import setup_logging

    setup_logging()
    how = {"retry_failed": arguments.retry_failed, "dry_run": arguments.dry_run}
    return chosen, {"shard": shard, **how}


def run(arguments) -> int:
    """Run the sweep; return its exit code."""
    chosen, how = read(arguments)
    from lm_eval_pruned.sweeps.plan import plan_sweep
    from lm_eval_pruned.sweeps.run import run_sweep

    return run_sweep(plan_sweep(chosen), **how)
