"""Write a pruned model as an ordinary checkpoint: safetensors shards, config with the new sizes,
tokenizer files, model card. Kept weights wait on its disk, not in memory.
"""

import sys

from lm_eval_pruned.cli import model_args as loading
from lm_eval_pruned.pruning.arguments import DECLARED, SIZES, option_row
from lm_eval_pruned.util.options import row


_EXCLUSIVE = SIZES, ("layers", "skip_layers")
_GROUPED = [name for names in _EXCLUSIVE for name in names[1:]]
# fmt: off
_ROWS = {names[0]: [*map(option_row, names)] for names in _EXCLUSIVE} | {"recipe": row(
    "--recipe", "NAME",
    "recipe for the cut: study, fast, best or uneven (default: best, or fast if the model cannot run text)")}
OPTIONS = (
    loading.MODEL_ARGS,
    row("--output_path", "DIR", "folder to write; new or empty", required=True),
    *(_ROWS.get(n, option_row(n)) for n in DECLARED if n not in _GROUPED),
    loading.TRUST_REMOTE_CODE,
    row("--device", None, "device that runs calibration text (default: cpu)",
        default="cpu"),
    row("--max_shard_size", "SIZE", "largest weight file (default: 50GB)", default="50GB"),
    row("--distil", "BUDGET",
        "then train the MLPs to predict what the unpruned model predicts, for a time such as 20m or 1h or "
        "for a number of tokens such as 200k"),
    row("--text", "FILE",
        "text to distil on besides that of this package: JSON Lines, a .txt file or dataset:NAME; it must not "
        "contain text from a benchmark"),
    row("--resume", "", "continue a distillation that was stopped"),
    row("--check", "", "also measure a random cut of the same size"),
    row("--push_to_hub", "REPO", "upload the finished folder to this repository on the Hub"),
)
# fmt: on


def run(arguments) -> None:
    """Write the checkpoint; print what was done, what it cost, and the next command."""
    from lm_eval_pruned.checkpoints import cost
    from lm_eval_pruned.checkpoints.export import export_pruned
    from lm_eval_pruned.checkpoints.planning import SOURCE_ARGUMENTS, suggested_recipe

    source = ("dtype", *SOURCE_ARGUMENTS)
    model_args, pruning = loading.read_with_pruning(arguments, DECLARED, source)
    if not pruning.keys() & {*SIZES}:
        raise ValueError(f"No size was given: pass one of --{', --'.join(SIZES)}.")
    loaded = loading.with_default_model(model_args)
    if not {"recipe", "criterion"} & pruning.keys():
        pruning["recipe"], why = suggested_recipe(pruning, loaded)
        print(f"recipe={pruning['recipe']} was chosen, because {why}.", file=sys.stderr)
    training = _training(arguments)
    measured = [cost.UNPRUNED, cost.PRUNED]
    measured += [cost.DISTILLED] * bool(training)
    measured += [cost.RANDOM_CUT] * arguments.check
    export = export_pruned(
        output=arguments.output_path,
        device=arguments.device,
        max_shard_size=arguments.max_shard_size,
        push_to_hub=arguments.push_to_hub,
        prune_arguments=pruning,
        measured=measured,
        training=training,
        **loaded,
    )
    print(export.record.as_table())
    if export.cost:
        shown = {name: export.cost[name] for name in measured if name in export.cost}
        print(f"\n{cost.cost_table(shown)}\n")
    print(
        f"Wrote {export.weight_bytes:,} bytes of weights in {export.shards} "
        f"file{'s' if export.shards != 1 else ''} to {export.folder}."
    )
    if (record := export.training) is not None:
        losses = record["held_loss"]
        print(
            f"Distilled {record['steps']} steps, {record['tokens_seen']:,} tokens, in "
            f"{record['seconds']:,.0f} s: the divergence from the unpruned model on held text is "
            f"{losses['after']:.3f} nats per token; before the training it was {losses['before']:.3f}."
        )
        if record["interrupted"]:
            print(
                f"It was stopped before step {record['planned_steps']}: the same command with --resume "
                "goes on."
            )
            raise KeyboardInterrupt
        print(f"{training.folder} holds its checkpoints, which may be deleted.")
    before = ",".join(f"{name}={value}" for name, value in loaded.items())
    print(
        "May it be shipped? lm-eval-pruned verdict "
        f"pruned-hf,{before} pruned-hf,pretrained={export.folder}"
    )


def _training(arguments):
    """Return the distillation that was asked for, or None."""
    if arguments.distil is None:
        for name in ("text", "resume"):
            if getattr(arguments, name):
                raise ValueError(
                    f"{name} belongs to a distillation, and none was asked for: add --distil, such as "
                    "--distil 20m."
                )
        return None
    from pathlib import Path

    from lm_eval_pruned.healing.options import Budget, HealingOptions
    from lm_eval_pruned.healing.training import Training
    from lm_eval_pruned.pruning.arguments import OWN_TEXT

    on_cpu = {"use_cpu": True} if arguments.device == "cpu" else {}
    return Training(
        HealingOptions(training_args=on_cpu),
        Path(arguments.output_path),
        [str(OWN_TEXT), *filter(None, [arguments.text])],
        "text",
        Budget.parsed(arguments.distil),
        resume=arguments.resume,
    )
