"""Evaluate a model at several sizes on several tasks, the unpruned model first. Every finished unit
is kept at once; the same command goes on where it stopped.
"""

from lm_eval_pruned.sweeps import options


OPTIONS = (options.add_arguments,)


def run(arguments) -> int:
    """Run the sweep; return its exit code."""
    asked = options.read_options(arguments)
    shard = options.parse_shard(arguments.shard) if arguments.shard else None
    from lm_eval.utils import setup_logging

    from lm_eval_pruned.sweeps.run import run_sweep

    setup_logging()
    how = {"retry_failed": arguments.retry_failed, "dry_run": arguments.dry_run}
    return run_sweep(asked, shard=shard, **how)
