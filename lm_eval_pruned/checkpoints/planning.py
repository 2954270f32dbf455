"""``lm-eval-pruned plan``: what a model would become at several sizes, from its config."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, astuple, dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.pruning.argument_values import written_by_layer, written_layers
from lm_eval_pruned.pruning.arguments import PruneArguments, take_prune_arguments
from lm_eval_pruned.pruning.plan import whole_or_mean
from lm_eval_pruned.util.tables import csv_table, markdown_table


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lm_eval_pruned.checkpoints.request import LoadRequest
    from lm_eval_pruned.pruning.arguments import Layers, LayerWidths, Number
    from lm_eval_pruned.pruning.measuring import KnownScores


#: Arguments of `hf` that say where a config, a tokenizer and weights come from.
SOURCE_ARGUMENTS = ("revision", "subfolder", "gguf_file", "trust_remote_code")


@dataclass(frozen=True)
class PlanRow:
    """One requested size, or depth.

    Attributes:
        asked: The request, such as ``ratio=2.0``.
        intermediate_size: Kept width, in neurons; the mean where the layers differ.
        expansion_ratio: Kept width / hidden size.
        parameters: Parameters of the pruned model; tied ones count once.
        reduction: Share of the baseline's parameters that is removed, 0 to 1.
        checkpoint_bytes: Size of its weights in the config's dtype.
        layer_widths: Where layers differ, their kept widths, such as ``0:1200,1-29:900``.
        layer_criteria: Where they differ in their criterion, likewise.
        layers_dropped: Layers that are left out, such as ``20-22``.
        equal_ratio: If only layers are dropped, the expansion ratio at which the model with all
            its layers has as many parameters, to within a neuron; empty if its MLPs have fewer.
    """

    asked: str
    intermediate_size: int | float
    expansion_ratio: float
    parameters: int
    reduction: float
    checkpoint_bytes: int
    layer_widths: str = ""
    layer_criteria: str = ""
    layers_dropped: str = ""
    equal_ratio: str = ""


def suggested_recipe(
    prune_arguments: dict[str, Any], loading: dict[str, Any]
) -> tuple[str, str]:
    """Return which recipe suits a model, and why in one line; reads its config and tokenizer.

    Raises:
        ValueError, UnsupportedModelError, OSError: As `lm_eval_pruned.load_pruned`.
    """
    from lm_eval_pruned.checkpoints.request import LoadRequest
    from lm_eval_pruned.pruning.layouts import UnsupportedModelError

    given = dict(loading)
    calibrated = PruneArguments(**{**prune_arguments, "recipe": "best"})
    request = LoadRequest.resolve(None, given.pop("pretrained"), calibrated, given)
    try:
        request.check_text()
    except UnsupportedModelError as error:
        return "fast", f"calibration text cannot be used: {str(error).rstrip('.')}"
    try:
        request.load_tokenizer()
    except (OSError, ValueError):
        why = "has no tokenizer that can be loaded, which calibration text needs"
        return "fast", f"{request.pretrained} {why}"
    text = Path(str(calibrated.calibration)).name
    return "best", f"the model can be calibrated on {text}"


def shipped_config(pretrained: str) -> str | None:
    """Return the folder with the dimensions of one of the study's models; None for another model.

    The repositories of these models on the Hub can only be read by those who accepted a licence.
    """
    found = re.fullmatch(r"meta-llama/Llama-3\.2-([13])B(-Instruct)?", pretrained)
    if found is None or Path(pretrained).exists():
        return None
    return str(Path(__file__).parent / "known" / f"llama-3.2-{found[1]}b")


def plan_rows(
    pretrained: str,
    argument: str,
    values: Iterable[Number | LayerWidths | Layers],
    **given: Any,
) -> list[PlanRow]:
    """Plan a model at several sizes, without reading weights where that can be.

    Args:
        pretrained: Folder or Hub name.
        argument: ``ratio``, ``prune_percent``, ``widths`` or ``drop_layers``.
        values: One size, or depth, per row.
        **given: Those of `SOURCE_ARGUMENTS`, and others of
            `lm_eval_pruned.pruning.arguments.PruneArguments`. An allocation that is not uniform,
            and ``criterion=best``, look at weights or text.

    Raises:
        ValueError: A size is out of range.
        UnsupportedModelError: The model cannot be pruned.
        OSError: The config cannot be read.
    """
    others: dict[str, Any] = take_prune_arguments(given)
    asked = [PruneArguments(**{argument: value, **others}) for value in values]
    if not asked:
        return []
    from lm_eval_pruned.checkpoints.request import LoadRequest

    source = {name: value for name, value in given.items() if value}

    def requests(model: str) -> list[LoadRequest]:
        whole = LoadRequest.resolve(None, model, PruneArguments(), source)
        return [whole.asking(arguments) for arguments in asked]

    shipped = None if source else shipped_config(pretrained)
    planned = requests(shipped or pretrained)
    if shipped and any(map(_needs_weights, planned)):
        planned = requests(pretrained)
    known: KnownScores = {}
    return [_row(request, known) for request in planned]


def _needs_weights(request: LoadRequest) -> bool:
    return request.plan.is_open or request.prune_arguments.measures_depth


def _row(request: LoadRequest, known: KnownScores) -> PlanRow:
    """Describe what becomes of a model; `known` takes what its weights or text tell."""
    plan = request.plan
    if _needs_weights(request):
        from lm_eval_pruned.checkpoints.load import Stored

        request.check_text()
        stored = Stored.of(request, known_scores=known)
        plan, request = stored.settled(), stored.request
    widths = request.widths
    before = widths.parameters_before
    after = widths.count_parameters(widths.targets(plan))
    dtype: Any = widths.original.dtype
    return PlanRow(
        ", ".join(f"{argument}={value}" for argument, value in plan.asked.items()),
        whole_or_mean(plan.mean_width),
        plan.ratio,
        after,
        1 - after / before,
        after * (4 if dtype is None else dtype.itemsize),
        written_by_layer(plan.layer_widths or ()),
        written_by_layer(plan.layer_criteria or ()),
        "" if plan.depth is None else written_layers(plan.depth.dropped),
        "" if plan.depth is None or plan.prunes else _equal_ratio(request, after),
    )


def _equal_ratio(request: LoadRequest, parameters: int) -> str:
    """Return the ratio at which all layers together have as many parameters; empty without one."""
    plan, whole = request.plan, request.widths.whole
    before = whole.parameters_before
    rest = whole.count_parameters(dict.fromkeys(whole.actual, 0))
    share = Fraction(before - parameters, before - rest)
    width = plan.width_before - round(plan.width_before * share)
    # Rounded down to six digits, of which the kept width is rounded up again.
    return f"{width * 10**6 // plan.hidden_size / 10**6:.6f}" if width >= 1 else ""


#: Columns of the table, and how their values are written; those after the first six are left out
#: where they say nothing.
_COLUMNS = {
    "asked": "",
    "intermediate size": ",",
    "expansion ratio": ".4f",
    "parameters": ",",
    "reduction": ".2%",
    "checkpoint bytes": ",",
    "widths by layer": "",
    "criteria by layer": "",
    "layers dropped": "",
    "ratio of equal parameters": "",
}


def as_table(rows: list[PlanRow]) -> str:
    """Return the rows as a Markdown table."""
    cells = [map(format, astuple(row), _COLUMNS.values()) for row in rows]
    columns = [*zip(_COLUMNS, *cells, strict=True)]
    told = [*columns[:6], *(each for each in columns[6:] if any(each[1:]))]
    names, *table = zip(*told, strict=True)
    return markdown_table(names, table) + "\n"


FORMATS: dict[str, Callable[[list[PlanRow]], str]] = {
    "table": as_table,
    "csv": lambda rows: csv_table(PlanRow.__dataclass_fields__, map(asdict, rows)),
    "json": lambda rows: json.dumps([*map(asdict, rows)], indent=2) + "\n",
}
