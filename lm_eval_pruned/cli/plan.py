"""``lm-eval-pruned plan``: widths and parameters at several sizes, from a config alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_eval_pruned.pruning.arguments import (
    CUTS,
    DECLARED,
    SEVERAL_SIZES,
    add_option,
)


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
    parser.add_argument(
        "--pretrained",
        required=True,
        metavar="NAME_OR_FOLDER",
        help="model to plan for",
    )
    sizes = parser.add_mutually_exclusive_group()
    for name in SEVERAL_SIZES:
        add_option(sizes, name, several=True)
    add_option(parser, "drop_layers", several=True)
    for name in SHARING:
        add_option(parser, name)
    parser.add_argument("--revision", default="main", help="revision on the Hub")
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

    given = [name for name in SEVERAL_SIZES if getattr(arguments, name) is not None]
    depths = arguments.drop_layers
    if not given and depths is None:
        options = ", ".join(f"--{name}" for name in (*SEVERAL_SIZES, "drop_layers"))
        raise ValueError(f"No size was given: pass one of {options}.")
    shared = {name: getattr(arguments, name) for name in SHARING}

    def plan(argument: str, values: list[str], **more: Any) -> list[planning.PlanRow]:
        return planning.plan_rows(
            arguments.pretrained,
            argument,
            values,
            revision=arguments.revision,
            trust_remote_code=arguments.trust_remote_code,
            **shared,
            **more,
        )

    if given:
        argument, values = SEVERAL_SIZES[given[0]], getattr(arguments, given[0])
        found = [
            plan(argument, values, drop_layers=depth) for depth in depths or [None]
        ]
        rows = [row for part in found for row in part]
    else:
        rows = plan("drop_layers", depths)
    print(planning.FORMATS[arguments.format](rows), end="")
    return 0
