"""``lm-eval-pruned sensitivity``: what cutting one layer alone costs, by several criteria."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.cli.model_args import (
    add_model_args,
    read_model_args,
    with_default_model,
)
from lm_eval_pruned.pruning.argument_values import exact
from lm_eval_pruned.pruning.arguments import DECLARED, SEVERAL, PruneArguments
from lm_eval_pruned.pruning.criteria import RANDOM, canonical_name


if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from lm_eval_pruned.pruning.curves import Sensitivity
    from lm_eval_pruned.report.layers import LayerCurves

CRITERIA = ("maw", "act", RANDOM)
SEEDS = ("0", "1", "2")
PERCENTS = ("10", "25", "50")


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
    parser.add_argument(
        "--calibration_samples",
        metavar="N",
        help="how many of its texts to use, from the first on (default: the first 16)",
    )
    parser.add_argument(
        "--calibration_tokens",
        metavar="N",
        help="how many tokens of each text the loss is measured on (default: 128)",
    )
    for name, default in (
        ("criteria", CRITERIA),
        ("seeds", SEEDS),
        ("prune_percents", PERCENTS),
    ):
        parser.add_argument(
            f"--{name}",
            nargs="+",
            metavar=DECLARED[SEVERAL[name]].metadata["metavar"],
            help={
                "criteria": "criteria to compare",
                "seeds": "seeds of the criterion random",
                "prune_percents": "shares of a layer to remove, in percent",
            }[name]
            + f" (default: {' '.join(default)})",
        )
    parser.add_argument("--device", help="such as cuda:0 (default: cpu)")
    parser.add_argument(
        "--output_path",
        metavar="DIR",
        help="folder for sensitivity.json, sensitivity.csv and the plots",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from importlib.util import find_spec
    from pathlib import Path

    from lm_eval_pruned.checkpoints.sensitivity import SAMPLES
    from lm_eval_pruned.pruning.calibration import read_texts
    from lm_eval_pruned.pruning.measuring import LENGTH
    from lm_eval_pruned.report.layers import LayerCurves, explanation, rises_table
    from lm_eval_pruned.util.tables import markdown_table

    criteria, seeds = _ranked_by(arguments.criteria, arguments.seeds)
    percents = [_percent(each) for each in arguments.prune_percents or PERCENTS]
    count = DECLARED["calibration_samples"].metadata["check"]
    samples = arguments.calibration_samples
    if samples is not None:
        samples = count("calibration_samples", samples)
    length = count("calibration_tokens", arguments.calibration_tokens or LENGTH)
    if length < 2:
        raise ValueError(
            f"calibration_tokens={length} leaves nothing to predict: pass 2 or more."
        )
    texts = read_texts(arguments.calibration, samples)
    folder = Path(arguments.output_path) if arguments.output_path else None
    plots = folder is not None and find_spec("altair") is not None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if not plots:
            print(
                "There will be no plots: they need altair, `pip install "
                "'lm-eval-pruned[report]'`.",
                file=sys.stderr,
            )
    measured = _measure(
        _model_args(read_model_args(arguments)),
        arguments.device,
        {
            "calibration": arguments.calibration,
            "criteria": criteria,
            "seeds": seeds,
            "removed": percents,
            "samples": samples or min(SAMPLES, len(texts)),
            "length": length,
        },
    )
    curves = LayerCurves.of(measured.as_dict())
    print("\n\n".join(explanation(curves)))
    for share in curves.shares:
        table = rises_table(curves, share)
        rows = [[cell.text for cell in row] for row in table.cells()]
        print(f"\n{table.label} of neurons removed\n")
        print(markdown_table(table.columns, rows, padded=True))
    if folder is not None:
        files = _write(measured, curves, folder, plots)
        print(f"Written to {', '.join(map(str, files))}.", file=sys.stderr)
    return 0


def _ranked_by(
    criteria: list[str] | None, seeds: list[str] | None
) -> tuple[list[str], list[int]]:
    """Return the criteria, and the seeds of ``random``."""
    names = list(dict.fromkeys(map(canonical_name, criteria or CRITERIA)))
    if seeds and RANDOM not in names:
        raise ValueError(
            f"seeds={' '.join(seeds)} were given, but only the criterion random has any: add "
            "--criteria random, or leave --seeds out."
        )
    check = DECLARED["seed"].metadata["check"]
    return names, list(dict.fromkeys(check("seeds", seed) for seed in seeds or SEEDS))


def _percent(text: str):
    percent = exact("prune_percents", text, "25")
    if not 0 < percent < 100:
        raise ValueError(
            f"prune_percents has {text}, which removes all of a layer or nothing: pass shares "
            "between 0 and 100, such as 10 25 50."
        )
    return percent


def _model_args(given: dict[str, Any]) -> dict[str, Any]:
    for name in given.keys() & DECLARED.keys():
        raise ValueError(
            f"model_args has {name}={given[name]}, but each layer is cut in turn: leave it out; "
            "--criteria, --seeds, --prune_percents and --calibration say how."
        )
    return with_default_model(given, "measuring")


def _measure(
    model_args: dict[str, Any], device: str | None, given: dict[str, Any]
) -> Sensitivity:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lm_eval_pruned.checkpoints.request import LoadRequest
    from lm_eval_pruned.checkpoints.sensitivity import measure_sensitivity

    pretrained = str(model_args.pop("pretrained"))
    tokenizer = model_args.pop("tokenizer", None)
    if device is not None:
        model_args["device_map"] = {"": device}
    request = LoadRequest.resolve(
        AutoModelForCausalLM, pretrained, PruneArguments(), model_args
    )
    return measure_sensitivity(
        request,
        tokenizer=tokenizer and AutoTokenizer.from_pretrained(tokenizer),
        **given,
    )


def _write(
    measured: Sensitivity, curves: LayerCurves, folder: Path, plots: bool
) -> list[Path]:
    from lm_eval_pruned.results.folder import SENSITIVITY
    from lm_eval_pruned.util.atomic import write_atomically

    files: dict[Path, str | bytes] = {
        (folder / SENSITIVITY).with_suffix(".csv"): measured.as_csv()
    }
    if plots:
        from lm_eval_pruned.report.layers import layer_plots

        for plot in layer_plots(curves):
            files[folder / f"{plot.name}.svg"] = plot.svg
            files[folder / f"{plot.name}.png"] = plot.png
    measured.write(folder / SENSITIVITY)
    for file, content in files.items():
        write_atomically(file, content)
    return [folder / SENSITIVITY, *files]
