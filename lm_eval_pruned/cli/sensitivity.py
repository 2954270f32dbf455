"""``lm-eval-pruned sensitivity``: what cutting one layer alone costs, by several criteria."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from lm_eval_pruned.cli.model_args import (
    add_model_args,
    read_model_args,
    with_default_model,
)
from lm_eval_pruned.pruning.arguments import PruneArguments, take_prune_arguments


if TYPE_CHECKING:
    import argparse

    from lm_eval_pruned.pruning.curves import Sensitivity

#: Options that `measure_sensitivity` takes, and checks, under the same names.
_MEASURING = {
    "calibration_samples": "how many of its texts to use, from the first on (default: the first 16)",
    "calibration_tokens": "how many tokens of each text the loss is measured on (default: 128)",
    "criteria": "criteria to compare (default: maw act random)",
    "seeds": "seeds of the criterion random (default: 0 1 2)",
    "prune_percents": "shares of a layer to remove, in percent (default: 10 25 50)",
}
_SEVERAL = {"criteria": "NAME", "seeds": "N", "prune_percents": "P"}


def add(commands) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "sensitivity",
        help="what cutting one layer alone costs, by criterion and width",
        description="Measure the loss on calibration text with one layer cut at a time, at a few "
        "widths and by several criteria, with the criterion random as the zero line. Prints the "
        "curves; with --output_path also JSON, CSV and plots.",
    )
    add_model_args(parser)
    parser.add_argument(
        "--calibration",
        required=True,
        metavar="FILE.jsonl",
        help='text to measure the loss on, one {"text": ...} a line; no text of a benchmark',
    )
    for name, about in _MEASURING.items():
        metavar, nargs = _SEVERAL.get(name, "N"), "+" if name in _SEVERAL else None
        parser.add_argument(f"--{name}", nargs=nargs, metavar=metavar, help=about)
    parser.add_argument("--device", help="such as cuda:0 (default: cpu)")
    parser.add_argument(
        "--output_path",
        metavar="DIR",
        help="folder for sensitivity.json, sensitivity.csv and the plots",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from pathlib import Path

    from lm_eval_pruned.report.layers import (
        LayerCurves,
        explanation,
        rises_table,
    )
    from lm_eval_pruned.results.folder import SENSITIVITY
    from lm_eval_pruned.util.atomic import write_atomically
    from lm_eval_pruned.util.palette import plots_missing
    from lm_eval_pruned.util.tables import markdown_table

    if arguments.output_path:
        Path(arguments.output_path).mkdir(parents=True, exist_ok=True)
    measured = _measured(arguments)
    curves = LayerCurves.of(measured.as_dict())
    print("\n\n".join(explanation(curves)))
    for share in curves.shares:
        table = rises_table(curves, share)
        rows = [[cell.text for cell in row] for row in table.cells()]
        print(f"\n{table.label} of neurons removed\n")
        print(markdown_table(table.columns, rows, padded=True))
    if not arguments.output_path:
        return 0
    folder = Path(arguments.output_path)
    measured.write(folder / SENSITIVITY)
    files: dict[str, str | bytes] = {"sensitivity.csv": measured.as_csv()}
    if why := plots_missing():
        print(f"There are no plots: {why}.", file=sys.stderr)
    else:
        from lm_eval_pruned.report.layers import layer_plots

        for plot in layer_plots(curves):
            files |= {f"{plot.name}.svg": plot.svg, f"{plot.name}.png": plot.png}
    for name, content in files.items():
        write_atomically(folder / name, content)
    print(f"Wrote {', '.join([SENSITIVITY, *files])} to {folder}.", file=sys.stderr)
    return 0


def _measured(arguments: argparse.Namespace) -> Sensitivity:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lm_eval_pruned.checkpoints.request import LoadRequest
    from lm_eval_pruned.checkpoints.sensitivity import measure_sensitivity

    model_args = read_model_args(arguments)
    for name, value in take_prune_arguments(model_args).items():
        raise ValueError(
            f"model_args has {name}={value}, but each layer is cut in turn: leave it out; "
            "--criteria, --seeds, --prune_percents and --calibration say how."
        )
    model_args = with_default_model(model_args, "measuring")
    pretrained = str(model_args.pop("pretrained"))
    tokenizer = model_args.pop("tokenizer", None)
    if arguments.device is not None:
        model_args["device_map"] = {"": arguments.device}
    nothing = PruneArguments()
    return measure_sensitivity(
        LoadRequest.resolve(AutoModelForCausalLM, pretrained, nothing, model_args),
        arguments.calibration,
        tokenizer=tokenizer and AutoTokenizer.from_pretrained(tokenizer),
        **{n: getattr(arguments, n) for n in _MEASURING if getattr(arguments, n)},
    )
