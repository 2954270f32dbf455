"""Model cards of what this package writes: a pruned checkpoint, or an adapter for one."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.checkpoints.cost import cost_table
from lm_eval_pruned.pruning.plan import whole_or_mean


if TYPE_CHECKING:
    from collections.abc import Mapping

    from lm_eval_pruned.checkpoints.checkpoint import Checkpoint
    from lm_eval_pruned.checkpoints.cost import Quality
    from lm_eval_pruned.pruning.plan import PrunePlan
    from lm_eval_pruned.pruning.record import PruneRecord

#: Model-card fields of the source that stay true of the pruned model.
_KEPT_CARD_FIELDS = ("license", "license_name", "license_link", "language")
_OURS = f"`lm-eval-pruned {version('lm-eval-pruned')}`"
_UNTRAINED = "No other weight was changed, and nothing was trained afterwards."
_REPAIRED = """The down projections of the kept neurons were adjusted by least squares on calibration \
text, and nothing was trained afterwards."""
_COST = "On kinds of text that the calibration text of lm-eval-pruned does not contain:"
_IN_STOCK = "The checkpoint opens in stock transformers and `lm_eval --model hf`."
_NOT_IN_STOCK = """Its MLPs differ in width, and transformers up to 5.24 cannot build that from a \
config: open it with `lm_eval_pruned.load_pruned` or `lm_eval --model pruned-hf`."""


def model_card(
    source: Checkpoint,
    folder: Path,
    record: PruneRecord,
    written: Path,
    trained: str | None = None,
    cost: Mapping[str, Quality] | None = None,
) -> str:
    """Return the README.md of the exported checkpoint.

    Args:
        source: The checkpoint that was pruned.
        folder: Folder of its card.
        record: What was pruned.
        written: Folder of the weights, which are complete.
        trained: A sentence on how the pruned model was trained.
        cost: What to show of it; see `Export`.
    """
    plan, revision = record.plan, source.model_arguments.get("revision")
    name = _name(source.pretrained)
    if trained is None:
        trained = _UNTRAINED if record.repaired is None else _REPAIRED
    shown = f"{_COST}\n\n{cost_table(cost)}\n\n" if cost else ""
    origin = f"{name} (revision {revision})" if revision else name
    loaded = f"pretrained={name}" + (f",revision={revision}" if revision else "")
    shards = shard_sizes(written)
    body = f"""{_OURS} pruned {origin}. In each layer, the neurons with the highest scores by \
`{plan.criterion}` were kept. {trained}

{_table(record)}

The digest is SHA-256 over the kept indices of all layers (little-endian int64).

```json
{json.dumps(record.as_dict(), indent=2)}
```

{shown}{_NOT_IN_STOCK if record.inexpressible else _IN_STOCK} The weights are {sum(shards):,} bytes in {len(shards)} file{"s" * (len(shards) > 1)}.

The cost of the cut depends on the model, the size and the task. Whether the model may be shipped in place
of its source, for your use:

```bash
lm-eval-pruned verdict pruned-hf,{loaded} pruned-hf,pretrained=FOLDER_OF_THIS_MODEL
```
"""
    title = f"{origin}, {_what(plan)}"
    return _card(source, folder, "transformers", record, title, body)


def adapter_card(
    source: Checkpoint,
    folder: Path,
    record: PruneRecord,
    method: str,
    trained: str,
) -> str:
    """Return the README.md of an adapter by a `method`, ``lora`` or ``dora``; see `model_card`."""
    plan, name = record.plan, _name(source.pretrained)
    loading = {"pretrained": name, "revision": source.model_arguments.get("revision")}
    loading = {k: v for k, v in (loading | plan.asked).items() if v}
    arguments = ",".join(f"{k}={v}" for k, v in loading.items())
    title = f"{method} adapter for {name}"
    if plan.prunes:
        title += f", {_what(plan)}"
    body = f"""{trained} {_OURS} wrote this adapter. `pruned-hf` refuses to apply it to other neurons than those it was trained on.

{_table(record)}

To evaluate it, pass the arguments of pruning that it was trained with (`healing.json` lists them all):

```bash
lm_eval --model pruned-hf --model_args {arguments},peft=FOLDER_OF_THIS_ADAPTER
```
"""
    return _card(source, folder, "peft", record, title, body, method)


def _card(
    source: Checkpoint,
    folder: Path,
    library: str,
    record: PruneRecord,
    title: str,
    body: str,
    *tags: str,
) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    known: dict[str, Any] = {}
    if (card := folder / "README.md").is_file():
        known = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    fields = ModelCardData(
        base_model=None if Path(source.pretrained).is_dir() else source.pretrained,
        library_name=library,
        tags=[*["width-pruning"] * record.plan.prunes, *tags, "glu", "lm-eval-pruned"],
        **{field: known[field] for field in _KEPT_CARD_FIELDS if field in known},
    )
    return f"---\n{fields.to_yaml()}\n---\n\n# {title}\n\n{body}"


def shard_sizes(folder: Path) -> list[int]:
    """Return the size of each weight file of a folder, in bytes."""
    return [path.stat().st_size for path in folder.glob("*.safetensors")]


def _name(pretrained: str) -> str:
    """Return what a card calls its source, without the folders of this machine."""
    path = Path(pretrained)
    return path.resolve().name if path.is_dir() else pretrained


def _table(record: PruneRecord) -> str:
    """Return the record's table with a blank line before each line that is not part of it."""
    return re.sub(r"\n(?!\|)", "\n\n", record.as_table())


def _what(plan: PrunePlan) -> str:
    return f"pruned to {whole_or_mean(plan.mean_width):,} neurons per MLP"
