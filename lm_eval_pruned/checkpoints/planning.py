"""``lm-eval-pruned plan``: what a model would become at several sizes, from its config."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.checkpoints.checkpoint import Checkpoint
from lm_eval_pruned.checkpoints.load import stored_model
from lm_eval_pruned.pruning.allocation import plan_layers
from lm_eval_pruned.pruning.argument_values import written_by_layer
from lm_eval_pruned.pruning.arguments import PruneArguments, take_prune_arguments
from lm_eval_pruned.pruning.layouts import UnsupportedModelError
from lm_eval_pruned.pruning.plan import whole_or_mean
from lm_eval_pruned.util.tables import Column, Table, csv_table


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lm_eval_pruned.pruning.arguments import LayerWidths, Number


#: Arguments of `hf` that say where a config, a tokenizer and weights come from.
SOURCE_ARGUMENTS = ("revision", "subfolder", "gguf_file", "trust_remote_code")


@dataclass(frozen=True)
class PlanRow:
    """One requested size.

    Attributes:
        asked: The request, such as ``ratio=2.0``.
        intermediate_size: Kept width, in neurons; the mean where the layers differ.
        expansion_ratio: Kept width / hidden size.
        parameters: Parameters of the pruned model; tied ones count once.
        reduction: Share of the baseline's parameters that is removed, 0 to 1.
        checkpoint_bytes: Size of its weights in the config's dtype.
        layer_widths: Where layers differ, their kept widths, such as ``0:1200,1-29:900``.
    """

    asked: str
    intermediate_size: int | float
    expansion_ratio: float
    parameters: int
    reduction: float
    checkpoint_bytes: int
    layer_widths: str = ""


def suggested_recipe(
    prune_arguments: dict[str, Any], loading: dict[str, Any]
) -> tuple[str, str]:
    """Return which recipe suits a model, and why in one line; reads its config and tokenizer.

    Raises:
        ValueError, UnsupportedModelError, OSError: As `lm_eval_pruned.load_pruned`.
    """
    from_pretrained = dict(loading)
    calibrated = PruneArguments(**{**prune_arguments, "recipe": "best"})
    checkpoint = Checkpoint.of(
        from_pretrained.pop("pretrained"), calibrated, from_pretrained
    )
    try:
        checkpoint.check_text()
    except UnsupportedModelError as error:
        return "fast", f"calibration text cannot be used: {str(error).rstrip('.')}"
    try:
        checkpoint.load_tokenizer()
    except ValueError as error:
        return (
            "fast",
            f"calibration text needs a tokenizer, and {str(error).rstrip('.')}",
        )
    text = Path(str(calibrated.calibration)).name
    return "best", f"the model can be calibrated on {text}"


def shipped_config(pretrained: str) -> str | None:
    """Return the folder with the dimensions of one of the study's models; None for another model.

    The repositories of these models on the Hub can only be read by those who accepted a licence.
    """
    llama = re.fullmatch(r"meta-llama/Llama-3\.2-([13])B(-Instruct)?", pretrained)
    if llama is None or Path(pretrained).exists():
        return None
    return str(Path(__file__).parent / "known" / f"llama-3.2-{llama[1]}b")


def plan_rows(
    pretrained: str,
    argument: str,
    values: Iterable[Number | LayerWidths],
    **more: Any,
) -> list[PlanRow]:
    """Plan a model at several sizes, without reading weights where that can be.

    Args:
        pretrained: Folder or Hub name.
        argument: ``ratio``, ``prune_percent`` or ``widths``.
        values: One size per row.
        **more: Those of `SOURCE_ARGUMENTS`, and others of
            `lm_eval_pruned.pruning.arguments.PruneArguments`. An allocation that is not uniform
            looks at weights and text.

    Raises:
        ValueError: A size is out of range.
        UnsupportedModelError: The model cannot be pruned.
        OSError: The config cannot be read.
    """
    others: dict[str, Any] = take_prune_arguments(more)
    variants = [PruneArguments(**{argument: value, **others}) for value in values]
    if not variants:
        return []
    source = {name: value for name, value in more.items() if value}
    shipped = None if source else shipped_config(pretrained)

    def planned_for(model: str) -> list[Checkpoint]:
        whole = Checkpoint.of(model, PruneArguments(), source)
        if Path(model).is_dir():
            whole = whole.with_stored_widths()
        return [whole.asking(arguments) for arguments in variants]

    planned = planned_for(shipped or pretrained)
    if shipped and any(checkpoint.cut.plan.is_open for checkpoint in planned):
        planned = planned_for(pretrained)
    return [*map(_row, planned)]


def _row(checkpoint: Checkpoint) -> PlanRow:
    """Describe what becomes of a model."""
    cut = checkpoint.cut
    if cut.plan.is_open:
        checkpoint.check_text()
        checkpoint = checkpoint.with_stored_widths()
        cut = plan_layers(checkpoint.cut, stored_model(checkpoint))
    plan, before, after = cut.plan, cut.parameters_before, cut.parameters_after
    dtype: Any = checkpoint.config.dtype or torch.float32
    return PlanRow(
        plan.as_written(),
        whole_or_mean(plan.mean_width),
        plan.ratio,
        after,
        1 - after / before,
        after * dtype.itemsize,
        written_by_layer(plan.layer_widths or ()),
    )


#: Those after the first six are left out where they say nothing.
_COLUMNS = (
    Column("asked", attrgetter("asked")),
    Column("intermediate size", attrgetter("intermediate_size"), ","),
    Column("expansion ratio", attrgetter("expansion_ratio"), ".4f"),
    Column("parameters", attrgetter("parameters"), ","),
    Column("reduction", attrgetter("reduction"), ".2%"),
    Column("checkpoint bytes", attrgetter("checkpoint_bytes"), ","),
    Column("widths by layer", attrgetter("layer_widths"), ">"),
)


def as_table(rows: list[PlanRow]) -> str:
    """Return the rows as a Markdown table."""
    more = [column for column in _COLUMNS[6:] if any(map(column.value, rows))]
    return Table("Plan", [*_COLUMNS[:6], *more], rows).markdown() + "\n"


FORMATS: dict[str, Callable[[list[PlanRow]], str]] = {
    "table": as_table,
    "csv": lambda rows: csv_table([*map(asdict, rows)]),
    "json": lambda rows: json.dumps([*map(asdict, rows)], indent=2) + "\n",
}
