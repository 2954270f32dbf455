"""Options of a sweep that evaluates its units block by block."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from lm_eval_pruned.compare.stopping import StopRule

_GROUP = "documents in blocks"
#: Arguments of `options.Option`.
BLOCK_OPTIONS = (
    {
        "name": "stop_when",
        "kind": "text",
        "help": "decided, or decided:MARGIN: stop a unit when its difference to the unpruned "
        "model is shown, or equivalence within the margin (such as 1pt)",
        "metavar": "RULE",
        "group": _GROUP,
    },
    {
        "name": "block_size",
        "kind": "integer",
        "help": "documents per block: a unit that was interrupted goes on after its last "
        "finished block",
        "metavar": "N",
        "group": _GROUP,
        "decides": "how",
    },
)


def read_block_options(options: dict[str, Any]) -> tuple[StopRule | None, int | None]:
    """Return the rule that stops units, and the documents of a block.

    Raises:
        ValueError: One of them is not usable, or not together with another option.
    """
    text, size = options.get("stop_when"), options.get("block_size")
    if text is None and size is None:
        return None, None
    if size is not None and size < 1:
        raise ValueError(
            f"block_size={size} is no number of documents: pass 1 or more, such as 200."
        )
    name = "block_size" if text is None else "stop_when"
    if options.get("ray"):
        raise ValueError(
            f"{name}={options[name]} keeps blocks where the sweep runs, which Ray's workers do "
            "not see: leave --ray out, or use --shard."
        )
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise ValueError(
            f"{name}={options[name]} works in one process, and WORLD_SIZE is "
            f"{os.environ['WORLD_SIZE']}: start the sweep without a launcher."
        )
    if text is None:
        return None, size
    for other, value in (("log_samples", False), ("predict_only", True)):
        if options.get(other) is value:
            raise ValueError(
                f"stop_when={text} compares documents, and {other} is {value}: leave one of "
                "them out."
            )
    from lm_eval_pruned.compare.stopping import StopRule

    return StopRule(text), size
