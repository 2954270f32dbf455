"""``lm-eval-pruned plan``: widths and parameters at several sizes, from a config alone."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

from lm_eval_pruned.cli.model_args import (
    add_model_args,
    pruning_of,
    read_model_args,
    refuse_others,
    with_default_model,
)
from lm_eval_pruned.pruning.arguments import (
    CUTS,
    DECLARED,
    SEVERAL_SIZES,
    add_option,
)
from lm_eval_pruned.util.options import merged


if TYPE_CHECKING:
    import argparse

#: What else decides how wide each layer becomes.
SHARING = tuple(name for name in DECLARED if name not in CUTS)


def add(commands) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "plan",
        help="widths and parameters at several sizes, from a config alone",
        description="Print kept width, expansion ratio, parameters and checkpoint bytes at "
        "several sizes, and with fewer layers. Reads the config of a model alone, unless an allocation or the choice of "
        "criteria looks at its weights.",
    )
    add_model_args(parser)
    sizes = parser.add_mutually_exclusive_group()
    for name in SEVERAL_SIZES:
        add_option(sizes, name, several=True)
    add_option(parser, "drop_layers", several=True)
    for name in SHARING:
        add_option(parser, name)
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run model code that comes with the model",
    )
    parser.add_argument("--format", choices=("table", "csv", "json"), default="table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from lm_eval_pruned.checkpoints import planning

    model_args = read_model_args(arguments)
    pruning = pruning_of(arguments, model_args, SHARING)
    options = {**SEVERAL_SIZES, "drop_layers": "drop_layers"}
    given = {name: getattr(arguments, option) for option, name in options.items()}
    sizes = {name: values for name, values in given.items() if values is not None}
    asked = merged({n: [pruning.pop(n)] for n in CUTS if n in pruning}, sizes)
    if not asked:
        names = ", ".join(f"--{name}" for name in options)
        raise ValueError(f"No size was given: pass one of {names}.")
    if arguments.trust_remote_code:
        model_args["trust_remote_code"] = True
    refuse_others(model_args, planning.SOURCE_ARGUMENTS, "plan")
    source = with_default_model(model_args, "planning") | pruning
    # Sizes of two kinds are refused by the arguments of pruning, in one sentence.
    first, *others = asked
    rows = [
        row
        for values in product(*(asked[name] for name in others))
        for row in planning.plan_rows(
            argument=first,
            values=asked[first],
            **source,
            **dict(zip(others, values, strict=True)),
        )
    ]
    print(planning.FORMATS[arguments.format](rows), end="")
    return 0
