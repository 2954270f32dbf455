"""Show by how much the loss on calibration text rises when one layer is cut, at a few widths and by
several criteria, with random cuts as reference. Prints the curves; with --output_path also JSON,
CSV and plots.
"""

import sys
from pathlib import Path

from lm_eval_pruned.cli import model_args as loading
from lm_eval_pruned.pruning.arguments import PruneArguments, take_prune_arguments
from lm_eval_pruned.util.atomic import write_atomically
from lm_eval_pruned.util.options import row
from lm_eval_pruned.util.palette import plots_missing


# fmt: off
#: Options that `measure_sensitivity` takes, and checks, under the same names.
_MEASURING = (
    row("--calibration", "FILE.jsonl",
        'text on which the loss rises, one {"text": ...} per line; it must not contain text from a '
        "benchmark (default: text included in this package)"),
    row("--calibration_samples", "N",
        "number of its texts to use, from the first on (default: all)"),
    row("--criteria", "NAME", "criteria to compare (default: maw act random)", nargs="+"),
    row("--repair", "NAME",
        "none, or least_squares to repair each layer after its cut (default: none)"),
    row("--seeds", "N", "seeds for the criterion random (default: 0 1 2)", nargs="+"),
    row("--prune_percents", "P", "shares of a layer to remove, in percent (default: 10 25 50)",
        nargs="+"),
)
OPTIONS = (
    loading.MODEL_ARGS,
    *_MEASURING,
    row("--device", None, "such as cuda:0 (default: cpu)"),
    row("--output_path", "DIR", "folder for sensitivity.json, sensitivity.csv and the plots"),
)
# fmt: on


def run(arguments) -> None:
    """Print the curves, and write them where that is asked."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lm_eval_pruned.checkpoints.checkpoint import Checkpoint
    from lm_eval_pruned.checkpoints.sensitivity import measure_sensitivity
    from lm_eval_pruned.report.layers import LayerCurves
    from lm_eval_pruned.results.runs import SENSITIVITY

    output = arguments.output_path and Path(arguments.output_path)
    if output:
        output.mkdir(parents=True, exist_ok=True)
    model_args = loading.read(arguments)
    for name, value in take_prune_arguments(model_args).items():
        raise ValueError(
            f"model_args has {name}={value}, but each layer is cut in turn: leave it out, and "
            "use --criteria, --seeds, --repair, --prune_percents and --calibration."
        )
    model_args = loading.with_default_model(model_args, "measuring")
    pretrained = str(model_args.pop("pretrained"))
    tokenizer = model_args.pop("tokenizer", None)
    if arguments.device is not None:
        model_args["device_map"] = {"": arguments.device}
    given = (pretrained, PruneArguments(), model_args)
    asked = {name[2:]: getattr(arguments, name[2:]) for name, _ in _MEASURING}
    measured = measure_sensitivity(
        Checkpoint.of(*given, AutoModelForCausalLM),
        tokenizer=tokenizer and AutoTokenizer.from_pretrained(tokenizer),
        **{name: value for name, value in asked.items() if value},
    )
    print(f"The curves were measured on {measured.device}.", file=sys.stderr)
    curves = LayerCurves.of(measured.as_dict())
    print(*curves.explanation, sep="\n\n")
    for share in curves.shares:
        table = curves.table(share)
        print(f"\n{table.label} of neurons removed\n")
        print(table.markdown(padded=True))
    if not output:
        return
    files: dict[str, str | bytes] = {"sensitivity.csv": measured.as_csv()}
    if why := plots_missing():
        print(f"No plots were drawn: {why}.", file=sys.stderr)
    else:
        files |= curves.plots()[0].files()
    measured.write(output / SENSITIVITY)
    for name, content in files.items():
        write_atomically(output / name, content)
    print(f"Wrote {', '.join([SENSITIVITY, *files])} to {output}.", file=sys.stderr)
