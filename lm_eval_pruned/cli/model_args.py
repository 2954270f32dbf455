"""The option ``--model_args`` of commands that load one model, and the model without it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import argparse


def add_model_args(parser: argparse.ArgumentParser) -> None:
    """Declare ``--model_args``."""
    parser.add_argument(
        "--model_args",
        default="",
        metavar="KEY=VALUE,...",
        help="pretrained=NAME_OR_FOLDER and other arguments of loading "
        "(default: SmolLM2-135M-Instruct)",
    )


def with_default_model(given: dict[str, Any], doing: str) -> dict[str, Any]:
    """Return arguments of loading that name a model.

    Args:
        given: Those of the user.
        doing: What is done to the default model, for the notice that it is taken.

    Raises:
        OSError: The default model is wanted and cannot be had.
    """
    if "pretrained" in given:
        return given
    from lm_eval_pruned.checkpoints.default_model import find_default_model

    default = find_default_model()
    print(f"pretrained was not given: {doing} {default.source}.", file=sys.stderr)
    return given | default.model_args()
