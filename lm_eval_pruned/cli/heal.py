"""Train a pruned model on text, by distillation from the unpruned model or by next-token loss.
Writes an ordinary checkpoint, or an adapter that `--model pruned-hf --model_args ...,peft=DIR` checks and
applies.
"""

from lm_eval_pruned.cli import model_args as loading
from lm_eval_pruned.healing.options import HealingOptions
from lm_eval_pruned.util.options import row


# fmt: off
OPTIONS = (
    loading.MODEL_ARGS,
    row("--data", "FILE",
        'text to train on: JSON Lines with one {"text": ...} per line, a .txt file or dataset:NAME; it must '
        "not contain text from a benchmark (default: the text of this package)"),
    row("--output_path", "DIR",
        "folder to write, new or empty; checkpoints go to DIR.checkpoints", required=True),
    *HealingOptions.rows(),
    row("--resume", "", "continue from the last checkpoint"),
    row("--merge", "",
        "also write the model with the adapter merged, as an ordinary checkpoint in DIR/merged"),
)
# fmt: on


def run(arguments) -> None:
    """Train the model, and print what was done."""
    from accelerate import PartialState

    from lm_eval_pruned.healing.run import heal

    options = HealingOptions.of(HealingOptions.parsed(arguments), "heal")
    record = heal(
        loading.with_default_model(loading.read(arguments)),
        arguments.data,
        arguments.output_path,
        options,
        resume=arguments.resume,
        merge=arguments.merge,
    )
    if PartialState().is_main_process:
        print(
            f"Trained {record['steps']} steps on {record['tokens_seen']:,} tokens; "
            f"wrote {arguments.output_path}."
        )
    if record["interrupted"]:
        print("The training was stopped early: the same command with --resume goes on.")
        raise KeyboardInterrupt
