"""Adapters: whether one fits the MLPs it is to be applied to.

An adapter trained on a pruned model has the pruned width in its tensors, one
trained on the full model the full width. Either is told from the shapes in the
adapter's file, before any weight of the model is read. Which neurons stayed is not in
its tensors: an adapter of ``lm-eval-pruned heal`` has a file beside them that says so.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from peft import PeftConfig, PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

    from lm_eval_pruned.checkpoints.request import LoadRequest
    from lm_eval_pruned.pruning.record import PruneRecord

#: When an adapter is applied, relative to the pruning.
STAGES = ("after", "before")
#: File beside an adapter that says on what it was trained.
HEALING = "healing.json"


def check_adapter(
    adapter: str,
    request: LoadRequest,
    stage: str,
    revision: str | None = None,
    argument: str = "peft",
) -> None:
    """Refuse an adapter whose tensors do not fit the MLPs.

    Adapters of any method are checked, by building the adapted model without weights
    and comparing shapes. Those that are not in safetensors are left to peft.

    Args:
        adapter: Folder or Hub name of the adapter.
        request: The model and its pruning.
        stage: ``after``: the adapter is applied to the pruned model; ``before``: to
            the full one.
        revision: Revision of the adapter on the Hub.
        argument: What named the adapter, for messages. With another than ``peft`` there
            is no stage to choose.

    Raises:
        ValueError: There is no adapter, or it was trained on MLPs of another width, or
            after pruning where it is to be merged before.
    """
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(adapter, revision=revision)
    except (ValueError, OSError) as error:
        raise ValueError(f"{argument}={adapter} is no adapter ({error}).") from None
    healing = read_healing(adapter, revision)
    if stage == "before" and healing and healing["pruning"]["kept_digest"]:
        raise ValueError(
            f"peft_stage=before merges {argument}={adapter} before pruning, but it was trained on "
            "a model that was pruned already: leave out peft_stage."
        )
    stored = _stored_shapes(adapter, revision)
    if not stored:
        return
    widths, plan = request.widths, request.plan
    if stage == "before":
        widths = widths.whole
    targets = widths.targets(plan) if stage == "after" else widths.actual
    if widths.inexpressible(targets):
        return
    narrowed = widths.narrowed_config(targets)
    expected = adapted_shapes(request, narrowed, config)
    _check_depth(adapter, request, stage, stored, expected, argument)
    for name, shape in stored.items():
        if name not in expected or shape == expected[name]:
            continue
        differing = [
            (have, want)
            for have, want in zip(shape, expected[name], strict=False)
            if have != want
        ]
        mlp = next((mlp for mlp in widths.mlps if f".{mlp.path}." in f".{name}"), None)
        if mlp is None or len(shape) != len(expected[name]):
            continue
        for have, want in differing:
            if want == targets[mlp.name]:
                advice = _advice(have, stage, request)
                if argument != "peft":
                    advice = (
                        f"pass an adapter of {want} neurons, or use --model pruned-hf with peft, "
                        "which can merge one of the full model before pruning"
                    )
                raise ValueError(
                    f"{argument}={adapter} was trained on MLPs of {have} neurons, but it is "
                    f"applied to MLPs of {want} ({name}): {advice}."
                )


def _check_depth(
    adapter: str,
    request: LoadRequest,
    stage: str,
    stored: Collection[str],
    expected: Collection[str],
    argument: str,
) -> None:
    """Refuse an adapter with weights for layers that are not there, which peft passes over."""
    depth = request.plan.depth
    absent = sorted({*stored} - {*expected})
    if stage != "after" or depth is None or not absent:
        return
    raise ValueError(
        f"{argument}={adapter} has {absent[0]}, of which the {len(depth.kept)} of {depth.before} "
        "layers that drop_layers leaves know nothing: pass an adapter that was trained on them, "
        "or peft_stage=before to merge it first."
    )


def check_kept(
    adapter: str,
    record: PruneRecord,
    revision: str | None = None,
    argument: str = "peft",
) -> dict[str, Any] | None:
    """Refuse an adapter that was trained on other neurons, if it says on which.

    Args:
        adapter: Folder or Hub name of the adapter.
        record: What the model that it is applied to kept.
        revision: Revision of the adapter on the Hub.
        argument: What named the adapter, for messages.

    Returns:
        What it says it was trained on; None where it says nothing.

    Raises:
        ValueError: It was trained on another kept set, or its record is damaged.
    """
    healing = read_healing(adapter, revision)
    if healing is None:
        return None
    trained, kept = healing["pruning"], record.digest
    if trained["kept_digest"] == kept:
        return healing
    size = [f"{name}={value}" for name, value in (trained.get("asked") or {}).items()]
    if size:
        size.append(f"criterion={trained.get('criterion')}")
    raise ValueError(
        f"{argument}={adapter} was trained on {_named(trained['kept_digest'])}, but this model has "
        f"{_named(kept)}, so its columns belong to other neurons: pass "
        f"{','.join(size) or 'no size'} with the pretrained that it was trained on, or another "
        "adapter."
    )


def _named(digest: str | None) -> str:
    return f"the kept set {digest[:12]}" if digest else "no kept set"


def read_healing(adapter: str, revision: str | None = None) -> dict[str, Any] | None:
    """Return what an adapter says it was trained on; None where it says nothing.

    Raises:
        ValueError: Its file is damaged.
    """
    file = _file_of(adapter, HEALING, revision)
    if file is None:
        return None
    try:
        healing = json.loads(file.read_text(encoding="utf-8"))
        healing["pruning"]["kept_digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is no record of a healing ({error!r}), so nothing says on which neurons the "
            "adapter was trained: copy it anew beside the adapter."
        ) from None
    return healing


def adapted_modules(adapter: str | None) -> set[str]:
    """Return the last names of the modules that a LoRA adapter changes, such as ``up_proj``.

    Empty without an adapter, and for one that is not in safetensors.
    """
    names = _stored_shapes(adapter, None) if adapter is not None else ()
    return {
        name.partition(".lora_")[0].rpartition(".")[2]
        for name in names
        if ".lora_" in name
    }


def _advice(width: int, stage: str, request: LoadRequest) -> str:
    full, kept = request.plan.width_before, request.plan.width
    if stage == "after" and width == full:
        return "pass peft_stage=before to merge it into the full model and prune the result"
    if stage == "before" and width == kept:
        return "pass peft_stage=after to apply it to the pruned model"
    if width < full:
        return (
            f"pass intermediate_size={width}, or an adapter of {kept} or {full} neurons"
        )
    return f"pass an adapter of {kept} neurons, or one of {full} with peft_stage=before"


def _stored_shapes(adapter: str, revision: str | None) -> dict[str, tuple[int, ...]]:
    """Return the shapes in the adapter's safetensors file; empty where it has none."""
    from peft.utils import SAFETENSORS_WEIGHTS_NAME
    from safetensors import safe_open

    file = _file_of(adapter, SAFETENSORS_WEIGHTS_NAME, revision)
    if file is None:
        return {}
    with safe_open(file, framework="pt") as opened:
        return {
            name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()
        }


def _file_of(adapter: str, name: str, revision: str | None) -> Path | None:
    """Return a file of an adapter, from the Hub if need be; None where it has none."""
    from transformers.utils import cached_file

    if Path(adapter).is_dir():
        file = Path(adapter, name)
        return file if file.is_file() else None
    found = cached_file(
        adapter,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
    )
    return None if found is None else Path(found)


def adapted_shapes(
    request: LoadRequest, narrowed: PretrainedConfig, config: PeftConfig
) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes that an adapter would have, were it trained on this model.

    Args:
        request: The model.
        narrowed: Its config as it is when the adapter is applied.
        config: The adapter.

    Raises:
        ValueError: The model has no modules such as the adapter names.
    """
    import torch
    from peft import PeftModel, get_peft_model_state_dict

    model = request.widths.skeleton(narrowed)
    config = copy.copy(config)
    config.inference_mode = True
    with torch.device("meta"):
        adapted = PeftModel(model, config)
        state = get_peft_model_state_dict(adapted)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def merged(model: PeftModel, adapter: str) -> PreTrainedModel:
    """Merge an adapter into its model and return the model.

    Raises:
        ValueError: Adapters of this kind cannot be merged.
    """
    try:
        return model.merge_and_unload()
    except (AttributeError, NotImplementedError, ValueError) as error:
        kind = model.peft_config[model.active_adapter].peft_type
        raise ValueError(
            f"peft={adapter} is of the kind {getattr(kind, 'value', kind)}, which cannot be merged "
            f"({error}): leave out peft_stage=before."
        ) from error
