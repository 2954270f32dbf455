"""Exporting a pruned model as an ordinary checkpoint."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.checkpoints.auto_class import auto_class_for
from lm_eval_pruned.checkpoints.card import model_card
from lm_eval_pruned.checkpoints.companions import source_folder
from lm_eval_pruned.checkpoints.load import load_request
from lm_eval_pruned.checkpoints.request import LoadRequest
from lm_eval_pruned.checkpoints.saving import check_output, save_loaded
from lm_eval_pruned.pruning.arguments import CUTS, PruneArguments
from lm_eval_pruned.util.atomic import appearing_whole


if TYPE_CHECKING:
    import os

    from transformers import PreTrainedModel

    from lm_eval_pruned.pruning.plan import PrunePlan
    from lm_eval_pruned.pruning.record import PruneRecord

#: Dtypes to store weights in.
_STORED = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
#: As in `transformers.PreTrainedModel.save_pretrained`.
MAX_SHARD_SIZE = "50GB"


@dataclass(frozen=True)
class Export:
    """What an export wrote.

    Attributes:
        folder: The checkpoint.
        record: What was pruned; its digest equals that of pruning while loading.
        weight_bytes: Size of the weights, in bytes.
        shards: Number of weight files.
    """

    folder: Path
    record: PruneRecord
    weight_bytes: int
    shards: int


def export_pruned(
    pretrained: str,
    output: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    max_shard_size: int | str = MAX_SHARD_SIZE,
    push_to_hub: str | None = None,
    prune_arguments: dict[str, Any],
    **from_pretrained: Any,
) -> Export:
    """Write a pruned model as an ordinary checkpoint that stock transformers opens.

    The model is loaded as `lm_eval_pruned.load_pruned` loads it, and saved. Every tensor has its
    stored name and, unless `dtype` says otherwise, the dtype it is loaded in; the config
    changes in its width alone; tokenizer files, generation config and licence are
    copied as they are.

    Args:
        pretrained: Folder or Hub name of the model.
        output: Folder to write; it must not exist, or be empty. It appears when the
            export is complete, and not before.
        dtype: Dtype to store the floating-point weights in, except for those that
            transformers keeps in float32. Default: as stored.
        device: Where the pruned model is put before it is saved.
        max_shard_size: Largest size of a weight file, in bytes or such as ``5GB``.
        push_to_hub: Repository on the Hub to upload the finished folder to.
        prune_arguments: Those of `lm_eval_pruned.pruning.arguments.PruneArguments`.
        **from_pretrained: ``revision``, ``subfolder``, ``trust_remote_code`` and
            what else ``from_pretrained`` takes.

    Raises:
        ValueError: An argument is out of range, nothing would be pruned, `output`
            is not empty, or a weight is NaN or infinite.
        UnsupportedModelError: The model cannot be pruned.
        OSError: The checkpoint is missing or damaged, or the disk is full.

    Example:
        ```python
        export_pruned("org/model", "model-40", prune_arguments={"prune_percent": 40})
        ```
    """
    from transformers import AutoConfig

    output = Path(output)
    check_output(output)
    _check_dtype(dtype)
    _check_shard_size(max_shard_size)
    source = {
        name: value for name, value in from_pretrained.items() if value is not None
    }
    auto_class = auto_class_for(AutoConfig.from_pretrained(pretrained, **source))
    asked = PruneArguments(**prune_arguments)
    placing = {"dtype": dtype, "device_map": {"": device}}
    request = LoadRequest.resolve(auto_class, pretrained, asked, source | placing)
    if not request.plan.asked.keys() & {"ratio", "intermediate_size"}:
        _check_prunes(request.plan)
    folder = source_folder(pretrained, source)
    model = load_request(request)
    record: PruneRecord = model.prune_record  # type: ignore[assignment]
    _check_prunes(record.plan)
    with appearing_whole(output) as unfinished:
        _check_room(model, unfinished)
        save_loaded(model, request, folder, unfinished, max_shard_size)
        card = model_card(pretrained, source.get("revision"), folder, record)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        weights = sorted(unfinished.glob("*.safetensors"))
        size = sum(path.stat().st_size for path in weights)
    if push_to_hub is not None:
        _push(output, push_to_hub)
    return Export(output, record, size, len(weights))


def _check_prunes(plan: PrunePlan) -> None:
    if plan.changes_model:
        return
    asked = ", ".join(f"{k}={v}" for k, v in plan.asked.items())
    raise ValueError(
        f"{asked or 'no size'} keeps all {plan.width_before} neurons, so there is "
        f"nothing to export: pass one of {', '.join(CUTS)} that removes some."
    )


def _check_shard_size(max_shard_size: int | str) -> None:
    from huggingface_hub.serialization._base import parse_size_to_int

    try:
        size = (
            max_shard_size
            if isinstance(max_shard_size, int)
            else parse_size_to_int(max_shard_size)
        )
    except ValueError:
        size = 0
    if size <= 0:
        raise ValueError(
            f"max_shard_size={max_shard_size} is not a size: pass one such as 5GB."
        )


def _check_dtype(dtype: str | torch.dtype | None) -> None:
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and resolved not in _STORED:
        raise ValueError(
            f"dtype={dtype} is not a dtype to store weights in: pass float32, float16 or bfloat16."
        )


def _check_room(model: PreTrainedModel, folder: Path) -> None:
    total = sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})
    free = shutil.disk_usage(folder).free
    if total > free:
        raise OSError(
            f"The weights need {total:,} bytes, but only {free:,} are free where the output "
            "goes: choose another folder or a smaller dtype."
        )


def _push(folder: Path, repository: str) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    repository = api.create_repo(repository, exist_ok=True).repo_id
    api.upload_folder(
        repo_id=repository,
        folder_path=folder,
        commit_message="Upload a model pruned by lm-eval-pruned",
    )
