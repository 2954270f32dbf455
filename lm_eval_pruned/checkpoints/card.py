"""The model card of an exported checkpoint."""

from __future__ import annotations

import json
import logging
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.pruning.layer_numbers import written_layers
from lm_eval_pruned.pruning.plan import whole_or_mean


if TYPE_CHECKING:
    from lm_eval_pruned.pruning.record import PruneRecord

logger = logging.getLogger("lm_eval.pruned.export")

#: Model-card fields of the source that stay true of the pruned model.
_KEPT_CARD_FIELDS = ("license", "license_name", "license_link", "language")

UNTRAINED = "No other\nweight was changed, and nothing was trained afterwards."


def model_card(
    pretrained: str,
    revision: str | None,
    folder: Path,
    record: PruneRecord,
    trained: str | None = None,
) -> str:
    """Return the README.md of the exported checkpoint.

    Args:
        pretrained: Folder or Hub name of the source.
        revision: Its revision on the Hub.
        folder: Folder of the source's own card.
        record: What was pruned.
        trained: A sentence on how the pruned model was trained, if it was.
    """
    from huggingface_hub import ModelCardData

    local = Path(pretrained).is_dir()
    known = _source_card(folder)
    name = Path(pretrained).resolve().name if local else pretrained
    if not local and revision:
        name += f" (revision {revision})"
    tags = ["width-pruning"] if record.plan.prunes else []
    if record.plan.depth is not None:
        tags.append("depth-pruning")
    fields = ModelCardData(
        base_model=None if local else pretrained,
        library_name="transformers",
        tags=[*tags, "glu", "lm-eval-pruned"],
        **{field: known[field] for field in _KEPT_CARD_FIELDS if field in known},
    )
    plan = record.plan
    lines = record.as_table().splitlines()
    rows = "\n".join(line for line in lines if line.startswith("|"))
    summary = "\n\n".join(line for line in lines if not line.startswith("|"))
    opens = (
        "The checkpoint opens in stock transformers and `lm_eval --model hf`."
        if record.config_expresses_widths
        else "Its layers differ in width. The config has the widths in `per_layer_config`, from "
        "which transformers up to 5.24 builds no MLPs: the checkpoint opens with "
        "`lm_eval_pruned.load_pruned` and `lm_eval --model pruned-hf`, and in stock transformers "
        "from the release on that does."
    )
    alike = plan.layer_widths is None and plan.layers is None
    best = (
        f"the {plan.width:,} best of {plan.width_before:,} stayed"
        if alike
        else "the best of each layer stayed"
    )
    criteria = " or ".join(f"`{name}`" for name in plan.criteria)
    by = "the criterion" if len(plan.criteria) == 1 else "the criterion of their layer,"
    title = f"{whole_or_mean(plan.mean_width):,} neurons per MLP"
    if not alike:
        title += " on average" if plan.layers is None else " in some layers"
    depth, of_layers = plan.depth, ""
    what, how = (
        f"width-pruned to {title}",
        f"removed neurons from the GLU-MLPs of {name}",
    )
    ranked = f"""Each neuron is a row of the gate and up projections with its column of the down projection. Neurons were
ranked by {by} {criteria}, {best} in their
original order, and ties went to the lower index. """
    costs = "Width pruning costs knowledge more than it costs\ninstruction following (arXiv 2512.22671)"
    if depth is not None:
        left = f"{len(depth.kept)} of {depth.before} layers"
        what = f"{what}, {left}" if plan.prunes else f"cut to {left}"
        dropped = f"left out the layers {written_layers(depth.dropped)}"
        how = f"{how}, and {dropped}" if plan.prunes else f"{dropped} of {name}"
        costs = "What it lost depends on the task"
        of_layers = ', after "layers" and the numbers of those that stay'
    if not plan.prunes:
        ranked = "The layers that stay are numbered anew, in their order. "
    return f"""---
{fields.to_yaml()}
---

# {name}, {what}

`lm-eval-pruned {version("lm-eval-pruned")}` {how}. {trained or UNTRAINED}

{rows}

{summary}

{ranked}The digest is SHA-256 over the kept indices of all layers
(little-endian int64{of_layers}): the same request on the same weights gives the same digest.

```json
{json.dumps(record.as_dict(), indent=2)}
```

{opens} {costs}, so evaluate the model for your use before relying on it.
"""


def _source_card(folder: Path) -> dict[str, Any]:
    """Return the metadata of the source's model card; empty where it has none."""
    from huggingface_hub import ModelCard

    path = folder / "README.md"
    if not path.is_file():
        return {}
    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except Exception as error:  # noqa: BLE001
        logger.warning("%s cannot be read as a model card (%s).", path, error)
        return {}
