"""Train a pruned model on text, by next-token loss or by distillation from the unpruned model.
Writes an adapter that `lm_eval --model pruned-hf --model_args ...,peft=DIR` checks and applies.
"""

import sys

from lm_eval_pruned.cli import model_args as loading
from lm_eval_pruned.healing.options import HealingOptions
from lm_eval_pruned.util.options import row


# fmt: off
OPTIONS = (
    loading.MODEL_ARGS,
    row("--data", "FILE",
        'text to train on: JSON Lines with one {"text": ...} per line, or a .txt file; it must not '
        "contain text from a benchmark", required=True),
    row("--output_path", "DIR",
        "folder to write, new or empty; checkpoints go to DIR.checkpoints", required=True),
    HealingOptions.add_to,
    row("--resume", "", "continue from the last checkpoint"),
    row("--merge", "",
        "also write the model with the adapter merged, as an ordinary checkpoint in DIR/merged"),
)
# fmt: on


def run(arguments) -> int:
    """Train the model; return the exit code, 130 where training was stopped."""
    from accelerate import PartialState

    from lm_eval_pruned.healing.run import heal

    options = HealingOptions.of(HealingOptions.parsed(arguments), "heal")
    model_args = loading.with_default_model(loading.read(arguments), "healing")
    where = (arguments.data, arguments.output_path)
    how = {"resume": arguments.resume, "merge": arguments.merge}
    healed = heal(model_args, *where, options, **how)
    steps, tokens = healed.record["steps"], healed.record["tokens_seen"]
    told = f"Trained {steps} steps on {tokens:,} tokens; wrote {healed.folder}."
    if not healed.finished:
        told = f"Stopped after {steps} steps: repeat the command with --resume to continue."
    if PartialState().is_main_process:
        print(told, file=sys.stdout if healed.finished else sys.stderr)
    return 0 if healed.finished else 130
