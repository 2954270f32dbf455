"""``lm-eval-pruned plan``: what a model would become at several sizes, from its config."""

from __future__ import annotations

import json
from dataclasses import asdict, astuple, dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.pruning.allocations import UNIFORM
from lm_eval_pruned.pruning.argument_values import written_layers
from lm_eval_pruned.pruning.arguments import PruneArguments
from lm_eval_pruned.pruning.depth import Depth
from lm_eval_pruned.pruning.layer_widths import written_by_layer
from lm_eval_pruned.pruning.plan import PrunePlan, whole_or_mean
from lm_eval_pruned.pruning.sizes import DenseShape, dense_shape
from lm_eval_pruned.util.tables import csv_table, markdown_table


if TYPE_CHECKING:
    from collections.abc import Iterable

    from lm_eval_pruned.pruning.arguments import Layers, LayerWidths, Number
    from lm_eval_pruned.pruning.scores import KnownScores
    from lm_eval_pruned.pruning.widths import Widths


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
        layer_widths: Kept width of each layer, such as ``0:1200,1-29:900``; empty where
            all are alike.
        layer_criteria: Criterion of each layer likewise; empty where one scores all.
        layers_dropped: Layers that are left out, such as ``20-22``; empty where none is.
        equal_ratio: Where layers are left out and nothing else, the expansion ratio at which
            all layers together are left with as many parameters, to a neuron; empty where
            their MLPs do not have so many.
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


def plan_rows(
    pretrained: str,
    argument: str,
    values: Iterable[Number | LayerWidths | Layers],
    *,
    multiple_of: Number = PruneArguments.multiple_of,
    revision: str = "main",
    subfolder: str = "",
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
    **prune_arguments: Any,
) -> list[PlanRow]:
    """Plan a model at several sizes, without reading weights where that can be.

    Args:
        pretrained: Folder or Hub name.
        argument: ``ratio``, ``prune_percent``, ``widths`` or ``drop_layers``.
        values: One size, or depth, per row.
        multiple_of: Round kept widths down to a multiple of this, in neurons.
        revision: Revision on the Hub.
        subfolder: Folder in `pretrained`.
        gguf_file: GGUF file to read the config from.
        trust_remote_code: Whether model code that comes with the model may run.
        **prune_arguments: Others of `lm_eval_pruned.pruning.arguments.PruneArguments`. An
            allocation that is not uniform, and ``criterion=best``, look at weights or text.

    Raises:
        ValueError: A size is out of range.
        UnsupportedModelError: The model cannot be pruned.
        OSError: The config cannot be read.
    """
    asked = [
        PruneArguments(
            multiple_of=multiple_of,
            **{argument: value},  # type: ignore[arg-type]
            **prune_arguments,
        )
        for value in values
    ]
    source: dict[str, Any] = {
        "revision": revision,
        "subfolder": subfolder,
        "gguf_file": gguf_file,
        "trust_remote_code": trust_remote_code,
    }
    if any(a.allocation != UNIFORM or a.tried or a.measures_depth for a in asked):
        return _settled_rows(pretrained, asked, source)
    raw: dict[str, Any] = {}
    if not trust_remote_code and gguf_file is None:
        raw = _read_config(pretrained, revision, subfolder)
    if dense_shape(raw) is not None:
        return _rows_of_shape(raw, asked)

    import torch
    import transformers

    from lm_eval_pruned.checkpoints.auto_class import auto_class_for
    from lm_eval_pruned.checkpoints.skeleton import skeleton
    from lm_eval_pruned.pruning.dropping import count_layers
    from lm_eval_pruned.pruning.widths import Widths

    config = transformers.AutoConfig.from_pretrained(
        pretrained,
        revision=revision,
        subfolder=subfolder,
        trust_remote_code=trust_remote_code,
        **({} if gguf_file is None else {"gguf_file": gguf_file}),
    )
    auto_class = auto_class_for(config)
    whole = Widths(
        config,
        lambda c: skeleton(auto_class, c, trust_remote_code=trust_remote_code),
    )
    dtype = config.dtype or torch.float32
    rows = []
    for arguments in asked:
        widths = whole
        if arguments.drop_layers is not None:
            layers = count_layers(whole.skeleton())
            widths = whole.without_layers(Depth.of(arguments, layers))
        rows.append(_row_of_widths(widths.plan(arguments), widths, dtype.itemsize))
    return rows


def _row_of_widths(plan: PrunePlan, widths: Widths, item_bytes: int) -> PlanRow:
    whole = widths.whole
    narrowest = whole.plan(PruneArguments(intermediate_size=1))
    least = whole.count_parameters(whole.targets(narrowest))
    before = widths.parameters_before
    per_neuron = Fraction(before - least, max(plan.width_before - 1, 1))
    parameters = widths.count_parameters(widths.targets(plan))
    return _row(plan, parameters, before, item_bytes, per_neuron)


def _settled_rows(
    pretrained: str, asked: Iterable[PruneArguments], source: dict[str, Any]
) -> list[PlanRow]:
    """Plan sizes whose widths follow from weights or losses, measured once for all."""
    import torch
    from transformers import AutoConfig

    from lm_eval_pruned.checkpoints.auto_class import auto_class_for
    from lm_eval_pruned.checkpoints.load import Stored
    from lm_eval_pruned.checkpoints.request import LoadRequest

    source = {name: value for name, value in source.items() if value}
    auto_class = auto_class_for(AutoConfig.from_pretrained(pretrained, **source))
    known: KnownScores = {}
    rows = []
    dtype: torch.dtype
    for arguments in asked:
        request = LoadRequest.resolve(auto_class, pretrained, arguments, source)
        request.check_text()
        stored = Stored.of(request, known_scores=known)
        plan, widths = stored.settled(), stored.request.widths
        dtype = widths.original.dtype or torch.float32  # type: ignore[assignment]
        rows.append(_row_of_widths(plan, widths, dtype.itemsize))
    return rows


def _row(
    plan: PrunePlan,
    parameters: int,
    before: int,
    bytes_per_parameter: int,
    per_neuron: int | Fraction,
) -> PlanRow:
    """Describe a plan; `per_neuron` are the parameters of a neuron, summed over all layers."""
    equal = ""
    if plan.depth is not None and not plan.prunes:
        width = plan.width_before - round(Fraction(before - parameters) / per_neuron)
        # Rounded down, of which the kept width is rounded up again.
        digits = width * 10**_DIGITS // plan.hidden_size
        equal = f"{digits / 10**_DIGITS:.{_DIGITS}f}" if width >= 1 else ""
    return PlanRow(
        ", ".join(f"{argument}={value}" for argument, value in plan.asked.items()),
        whole_or_mean(plan.mean_width),
        plan.ratio,
        parameters,
        1 - parameters / before,
        parameters * bytes_per_parameter,
        written_by_layer(plan.layer_widths or ()),
        written_by_layer(plan.layer_criteria or ()),
        "" if plan.depth is None else written_layers(plan.depth.dropped),
        equal,
    )


def _read_config(pretrained: str, revision: str, subfolder: str) -> dict[str, Any]:
    """Return ``config.json``, or nothing where transformers has to say what is wrong."""
    try:
        path = Path(pretrained, subfolder, "config.json")
        if not Path(pretrained).is_dir():
            from huggingface_hub import hf_hub_download

            path = Path(
                hf_hub_download(
                    pretrained,
                    "config.json",
                    subfolder=subfolder or None,
                    revision=revision,
                )
            )
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _rows_of_shape(
    config: dict[str, Any], asked: Iterable[PruneArguments]
) -> list[PlanRow]:
    rows = []
    for arguments in asked:
        whole = _shape(config)
        depth = Depth.of(arguments, whole.layers)
        layers = tuple(range(whole.layers)) if depth is None else depth.kept
        shape = _shape({**config, "num_hidden_layers": len(layers)})
        plan = PrunePlan.of(arguments, shape.hidden_size, shape.width, layers, depth)
        share = Fraction(
            sum(map(plan.includes_layer, range(shape.layers))), shape.layers
        )
        cut = share * (shape.width - plan.mean_width)
        removed = shape.parameters_per_neuron * cut
        rows.append(
            _row(
                plan,
                shape.parameters - int(removed),
                whole.parameters,
                shape.bytes_per_parameter,
                whole.parameters_per_neuron,
            )
        )
    return rows


def _shape(config: dict[str, Any]) -> DenseShape:
    shape = dense_shape(config)
    assert shape is not None
    return shape


#: Columns of the table that it has where some row says something there.
_SOMETIMES = {
    "widths by layer": "layer_widths",
    "criteria by layer": "layer_criteria",
    "layers dropped": "layers_dropped",
    "ratio of equal parameters": "equal_ratio",
}
#: A ratio of so many digits names the width of any model.
_DIGITS = 6


def as_table(rows: list[PlanRow]) -> str:
    """Return the rows as a Markdown table."""
    forms = {
        "asked": "",
        "intermediate size": ",",
        "expansion ratio": ".4f",
        "parameters": ",",
        "reduction": ".2%",
        "checkpoint bytes": ",",
    }
    cells = [[*map(format, astuple(row), forms.values())] for row in rows]
    for heading, attribute in _SOMETIMES.items():
        own = [getattr(row, attribute) for row in rows]
        if any(own):
            forms[heading] = ""
            cells = [[*cell, each] for cell, each in zip(cells, own, strict=True)]
    return markdown_table(list(forms), cells) + "\n"


def as_csv(rows: list[PlanRow]) -> str:
    """Return the rows as CSV with a header."""
    return csv_table(PlanRow.__dataclass_fields__, map(asdict, rows))


def as_json(rows: list[PlanRow]) -> str:
    """Return the rows as a JSON list of objects."""
    return json.dumps([asdict(row) for row in rows], indent=2) + "\n"


FORMATS = {"table": as_table, "csv": as_csv, "json": as_json}
