"""The model cards of an exported checkpoint and of an adapter."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.pruning.plan import whole_or_mean


if TYPE_CHECKING:
    from lm_eval_pruned.pruning.plan import PrunePlan
    from lm_eval_pruned.pruning.record import PruneRecord

#: Model-card fields of the source that stay true of the pruned model.
_KEPT_CARD_FIELDS = ("license", "license_name", "license_link", "language")
_OURS = f"`lm-eval-pruned {version('lm-eval-pruned')}`"
_RANKED = """ The best neurons of each layer by {} stayed in their original order, and ties went to the lower
index. A neuron is a row of the gate and up projections with its column of the down projection."""
_IN_STOCK = "The checkpoint opens in stock transformers and `lm_eval --model hf`."
_NOT_IN_STOCK = """Its layers differ in width. The config has the widths in `per_layer_config`, from \
which transformers up to 5.24 builds no MLPs: the checkpoint opens with `lm_eval_pruned.load_pruned` \
and `lm_eval --model pruned-hf`, and in stock transformers from the release on that does."""


def model_card(
    pretrained: str,
    revision: str | None,
    folder: Path,
    record: PruneRecord,
    trained: str = "No other weight was changed, and nothing was trained afterwards.",
) -> str:
    """Return the README.md of the exported checkpoint.

    Args:
        pretrained: Folder or Hub name of the source.
        revision: Its revision on the Hub.
        folder: Folder of the source's own card.
        record: What was pruned.
        trained: A sentence on how the pruned model was trained.
    """
    plan, name = record.plan, _name(pretrained)
    source = f"{name} (revision {revision})" if revision else name
    criteria = " or ".join(f"`{each}`" for each in plan.criteria)
    body = f"""{_OURS} pruned {source}.{_RANKED.format(criteria) * plan.prunes} {trained}

{_table(record)}

The digest is SHA-256 over the kept indices of all layers (little-endian int64; before them "layers" and the numbers of
those that stay, where some are left out): the same request on the same weights gives the same digest.

```json
{json.dumps(record.as_dict(), indent=2)}
```

{_IN_STOCK if record.config_expresses_widths else _NOT_IN_STOCK} What the cut cost depends on
the model, the size and the task, so evaluate the model for your use before relying on it.
"""
    tags = ["width-pruning"] * plan.prunes
    tags += ["depth-pruning"] * (plan.depth is not None)
    title = f"{source}, {_what(plan)}"
    return _card(pretrained, folder, "transformers", tags, title, body)


def adapter_card(
    pretrained: str,
    revision: str | None,
    folder: Path,
    record: PruneRecord,
    method: str,
    trained: str,
) -> str:
    """Return the README.md of an adapter by a `method`, ``lora`` or ``dora``; see `model_card`."""
    plan, name = record.plan, _name(pretrained)
    asked = {"pretrained": name, **({"revision": revision} if revision else {})}
    arguments = ",".join(f"{k}={v}" for k, v in {**asked, **plan.asked}.items())
    kind = {"lora": "LoRA", "dora": "DoRA"}.get(method, method)
    title, fits = f"{kind} adapter for {name}", ""
    if plan.changes_model:
        title += f", {_what(plan)}"
        fits = "\nIt fits the neurons and layers that stayed, and `pruned-hf` refuses it on others."
    body = f"""{trained} {_OURS} wrote this adapter.{fits}

{_table(record)}

To evaluate it, pass the arguments of pruning that it was trained with, which `healing.json` has in full:

```bash
lm_eval --model pruned-hf --model_args {arguments},peft=FOLDER_OF_THIS_ADAPTER
```
"""
    tags = [method, *["width-pruning"] * plan.prunes]
    return _card(pretrained, folder, "peft", tags, title, body)


def _card(
    pretrained: str, folder: Path, library: str, tags: list[str], title: str, body: str
) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    known: dict[str, Any] = {}
    if (own := folder / "README.md").is_file():
        known = ModelCard.load(own, ignore_metadata_errors=True).data.to_dict()
    fields = ModelCardData(
        base_model=None if Path(pretrained).is_dir() else pretrained,
        library_name=library,
        tags=[*tags, "glu", "lm-eval-pruned"],
        **{field: known[field] for field in _KEPT_CARD_FIELDS if field in known},
    )
    return f"---\n{fields.to_yaml()}\n---\n\n# {title}\n\n{body}"


def _name(pretrained: str) -> str:
    """Return what a card calls its source, without the folders of this machine."""
    path = Path(pretrained)
    return path.resolve().name if path.is_dir() else pretrained


def _table(record: PruneRecord) -> str:
    """Return the record's table with a blank line before each line that is not part of it."""
    return re.sub(r"\n(?!\|)", "\n\n", record.as_table())


def _what(plan: PrunePlan) -> str:
    """Return what a pruned model is, for a title."""
    words = []
    if plan.prunes:
        words.append(f"pruned to {whole_or_mean(plan.mean_width):,} neurons per MLP")
    if plan.depth is not None:
        words.append(f"{len(plan.depth.kept)} of {plan.depth.before} layers")
    return ", ".join(words)
