"""Show what it costs to cut one layer, for each layer and a few widths, in nats per token. Prints a
table; with --output_path also JSON, CSV and plots.
"""

import sys
from pathlib import Path

from lm_eval_pruned.cli import model_args as loading
from lm_eval_pruned.pruning.argument_values import SENSITIVITY as ALLOCATION
from lm_eval_pruned.pruning.arguments import (
    CALIBRATION,
    SIZES,
    PruneArguments,
    option_row,
)
from lm_eval_pruned.util.atomic import write_atomically
from lm_eval_pruned.util.options import row


#: How each layer is cut.
_CUT = ("recipe", "criterion", "repair", "seed", *CALIBRATION)
_RECIPE = "recipe for the cut of each layer: study, fast or best (default: best)"
# fmt: off
OPTIONS = (
    loading.MODEL_ARGS,
    row("--prune_percents", "P", "shares of a layer to remove, in percent (default: 10 25 50)",
        nargs="+", default=(10, 25, 50)),
    row("--recipe", "NAME", _RECIPE),
    *map(option_row, _CUT[1:]),
    loading.TRUST_REMOTE_CODE,
    row("--device", None, "such as cuda:0 (default: cpu)", default="cpu"),
    row("--output_path", "DIR", "folder for sensitivity.json, sensitivity.csv and the plots"),
)
# fmt: on


def run(arguments) -> None:
    """Print the table, and write files where that is asked."""
    from transformers import AutoModelForCausalLM

    from lm_eval_pruned.checkpoints.checkpoint import Checkpoint
    from lm_eval_pruned.checkpoints.load import measure_sensitivity
    from lm_eval_pruned.checkpoints.planning import SOURCE_ARGUMENTS
    from lm_eval_pruned.results.runs import SENSITIVITY

    output = arguments.output_path and Path(arguments.output_path)
    if output:
        output.mkdir(parents=True, exist_ok=True)
    source = ("dtype", *SOURCE_ARGUMENTS)
    model_args, pruning = loading.read_with_pruning(arguments, _CUT, source)
    for name in pruning.keys() & {*SIZES, "allocation"}:
        raise ValueError(
            f"model_args has {name}={pruning[name]}, but each layer is cut in turn: leave it out, and "
            "use --prune_percents."
        )
    if not {"recipe", "criterion"} & pruning.keys():
        pruning["recipe"] = "best"
    model_args = loading.with_default_model(model_args)
    # The size counts for no curve.
    asked = PruneArguments(prune_percent=50, allocation=ALLOCATION, **pruning)
    pretrained = str(model_args.pop("pretrained"))
    checkpoint = Checkpoint.of(
        pretrained, asked, model_args, AutoModelForCausalLM, arguments.device
    )
    measured = measure_sensitivity(checkpoint, arguments.prune_percents)
    print(f"The curves were measured on {measured.device}.", file=sys.stderr)
    print(f"{measured.explanation}\n\n{measured.table().markdown(padded=True)}")
    if not output:
        return
    files: dict[str, str | bytes] = {
        SENSITIVITY: measured.as_json(),
        "sensitivity.csv": measured.as_csv(),
    }
    try:
        from lm_eval_pruned.report.figure import costs_plot
    except ModuleNotFoundError as error:
        print(
            f"No plots were drawn: {error.name} is not installed: "
            "pip install 'lm-eval-pruned[report]'.",
            file=sys.stderr,
        )
    else:
        files |= costs_plot(measured).files()
    for name, content in files.items():
        write_atomically(output / name, content)
    print(f"Wrote {', '.join(files)} to {output}.", file=sys.stderr)
