"""Exporting a pruned model as an ordinary checkpoint, layer by layer.

The checkpoint is opened the way it is for loading (`lm_eval_pruned.checkpoints.session`), but instead of
filling a model, its entries go straight to new shards. No more than one MLP, or one
other tensor, is in memory at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from lm_eval_pruned.checkpoints.auto_class import auto_class_for
from lm_eval_pruned.checkpoints.card import model_card
from lm_eval_pruned.checkpoints.companions import (
    copy_companions,
    source_folder,
    write_config,
    write_json,
)
from lm_eval_pruned.checkpoints.damage import check_complete, missing_tensors
from lm_eval_pruned.checkpoints.evidence import settled_request, with_depth
from lm_eval_pruned.checkpoints.layers import observe
from lm_eval_pruned.checkpoints.load import load_with_arguments
from lm_eval_pruned.checkpoints.narrowed import layer_by_layer
from lm_eval_pruned.checkpoints.request import LoadRequest
from lm_eval_pruned.checkpoints.route import (
    OWN_WAY,
    RouteDeclined,
    clear_errors,
    with_stored_widths,
)
from lm_eval_pruned.checkpoints.saving import check_output, save_loaded
from lm_eval_pruned.checkpoints.session import Session
from lm_eval_pruned.checkpoints.shards import (
    DTYPE_NAMES,
    ITEM_BYTES,
    StoredTensor,
    write_shard,
)
from lm_eval_pruned.checkpoints.transformers_api import (
    Placement,
    target_names,
)
from lm_eval_pruned.pruning.arguments import CUTS, PruneArguments
from lm_eval_pruned.pruning.record import PruneRecord
from lm_eval_pruned.pruning.scores import ScoreTable
from lm_eval_pruned.pruning.slicing import warn_inexpressible
from lm_eval_pruned.util.atomic import appearing_whole


if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from torch import Tensor

    from lm_eval_pruned.pruning.plan import PrunePlan

logger = logging.getLogger("lm_eval.pruned.export")

#: As in `transformers.PreTrainedModel.save_pretrained`.
MAX_SHARD_SIZE = "50GB"


@dataclass(frozen=True)
class Export:
    """What an export wrote.

    Attributes:
        folder: The checkpoint.
        record: What was pruned; its digest equals that of pruning while loading.
        streamed: Whether the weights went from file to file; otherwise the model
            was loaded in full, pruned and saved.
        weight_bytes: Size of the weights, in bytes.
        shards: Number of weight files.
    """

    folder: Path
    record: PruneRecord
    streamed: bool
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

    The weights are read, scored, sliced and written one MLP at a time. Every tensor
    keeps its name and, unless `dtype` says otherwise, its stored dtype; the config
    changes in its width alone; tokenizer files, generation config and licence are
    copied as they are. A checkpoint that cannot be opened tensor by tensor (GGUF,
    ``.bin``, a model class that loads in its own way) is loaded in full, pruned
    and saved, with a notice.

    Args:
        pretrained: Folder or Hub name of the model.
        output: Folder to write; it must not exist, or be empty. It appears when the
            export is complete, and not before.
        dtype: Dtype to store the floating-point weights in, except for those that
            transformers keeps in float32 when it loads with this dtype. Neurons are
            ranked by the weights as they are stored in `pretrained`. Default:
            as stored, which is also what ``lm_eval`` loads unless the config
            names another dtype.
        device: Where a model runs if the criterion looks at its activations, and where it is
            loaded to if it has to be in memory in full.
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
    target_dtype = _resolve_dtype(dtype)
    _check_shard_size(max_shard_size)
    source = {
        name: value for name, value in from_pretrained.items() if value is not None
    }
    auto_class = auto_class_for(AutoConfig.from_pretrained(pretrained, **source))
    # transformers decides by the dtype which weights it keeps in another.
    asked_for = source | ({} if target_dtype is None else {"dtype": target_dtype})
    asked = PruneArguments(**prune_arguments)
    request = LoadRequest.resolve(auto_class, pretrained, asked, asked_for)
    if request.lacks_depth:
        on_device = {**request.model_arguments, "device_map": {"": device}}
        measured = with_depth(dataclasses.replace(request, model_arguments=on_device))
        request = dataclasses.replace(measured, model_arguments=request.model_arguments)
    if not request.plan.asked.keys() & {"ratio", "intermediate_size"}:
        _check_prunes(request.plan)
    folder = source_folder(pretrained, source)
    with appearing_whole(output) as unfinished:
        writer = _Writer(
            folder, unfinished, target_dtype, torch.device(device), max_shard_size
        )
        streamed = with_stored_widths(request, lambda asked: _stream(asked, writer))
        record = streamed or _save_whole(request, source, writer)
        card = model_card(pretrained, source.get("revision"), folder, record)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        weights = sorted(unfinished.glob("*.safetensors"))
        size = sum(path.stat().st_size for path in weights)
    if push_to_hub is not None:
        _push(output, push_to_hub)
    return Export(output, record, streamed is not None, size, len(weights))


@dataclass(frozen=True)
class _Writer:
    """Where an export comes from and how it is written.

    Attributes:
        source: Folder of the files beside the weights.
        folder: Folder to write to.
        dtype: Dtype to store floating-point weights in; None: as stored.
        device: Where a model runs if the criterion looks at its activations, and where it is
            loaded to if it has to be in memory in full.
        max_shard_size: Largest size of a weight file.
    """

    source: Path
    folder: Path
    dtype: torch.dtype | None
    device: torch.device
    max_shard_size: int | str


def _stream(request: LoadRequest, writer: _Writer) -> PruneRecord | None:
    """Write everything but the model card, or return None if it cannot be streamed."""
    known = ScoreTable()
    request, known, declined = settled_request(request, known)
    plan, widths = request.plan, request.widths
    targets = widths.targets(plan)
    narrowed = widths.narrowed_config(targets)
    session = _ExportSession(request, targets, writer, known)
    session.declined = declined or request.unreadable()
    if session.declined is None and request.needs_scores(known):
        on_device = {**request.model_arguments, "device_map": {"": writer.device}}
        session.declined = observe(
            dataclasses.replace(request, model_arguments=on_device), known
        )
    if session.declined is None:
        with (
            contextlib.closing(session),
            clear_errors(session, request),
            contextlib.suppress(_Written),
        ):
            request.load(narrowed, checkpoint=session)
            raise RouteDeclined(OWN_WAY)
    if session.declined is not None:
        _check_prunes(plan)
        return None
    warn_inexpressible(widths, targets)
    copy_companions(writer.source, writer.folder)
    widths.describe_layers(narrowed, targets)
    write_config(
        widths.whole.original, narrowed, writer.source, writer.folder, writer.dtype
    )
    return PruneRecord.of(
        plan,
        widths,
        widths.parameters_before,
        widths.count_parameters(targets),
        session.kept(),
        known.calibration,
    )


def _check_prunes(plan: PrunePlan) -> None:
    if plan.changes_model:
        return
    asked = ", ".join(f"{k}={v}" for k, v in plan.asked.items())
    raise ValueError(
        f"{asked or 'no size'} keeps all {plan.width_before} neurons, so there is "
        f"nothing to export: pass one of {', '.join(CUTS)} that removes some."
    )


class _Written(Exception):
    """The weights are written, so transformers has nothing left to load."""


class _ExportSession(Session):
    """A load that ends in files: the weights never reach a model."""

    def __init__(
        self,
        request: LoadRequest,
        targets: Mapping[str, int],
        writer: _Writer,
        known: ScoreTable,
    ):
        super().__init__(request.plan, request.widths, targets, known)
        self._writer = writer

    def open(self, model, state_dict, checkpoint_files, load_config):
        dtype = self._writer.dtype
        placed = dataclasses.replace(
            load_config,
            device_map={"": "cpu"},
            dtype=dtype,
            dtype_plan={} if dtype is None else load_config.dtype_plan,
        )
        entries = super().open(model, state_dict, checkpoint_files, placed)
        # A width is not compared before: layers may be wider than the config says.
        _check_prunes(self.plan)
        names = target_names(entries, model, placed)
        check_complete(missing_tensors(names, model))
        placement = Placement(placed, model)
        tensors = [
            _stored(key, entries[key], placement.dtype(names[key][0]))
            for key in layer_by_layer(entries)
        ]
        _write_shards(tensors, self._writer)
        raise _Written

    def entries_of(self, file: str) -> dict[str, Any]:
        from safetensors import safe_open

        # A mapped file counts as private memory, so files are mapped only while read.
        with safe_open(file, framework="pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}
            return {
                key: _FileEntry(file, key, part.get_shape(), part.get_dtype())
                for key, part in slices.items()
            }


@dataclass(frozen=True)
class _FileEntry:
    """A tensor in a safetensors file that is opened anew at each reading."""

    file: str
    key: str
    shape: list[int]
    dtype: str

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return self.dtype

    def __getitem__(self, index) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.file, framework="pt") as opened:
            return opened.get_tensor(self.key)[index]


def _stored(key: str, entry: Any, dtype: torch.dtype | None) -> StoredTensor:
    name = entry.get_dtype()
    if name not in ITEM_BYTES:
        logger.warning("The model is loaded and saved, because %s is %s.", key, name)
        raise RouteDeclined(f"{key} is stored as {name}")
    is_number = name.startswith(("F", "BF")) and not name.startswith("F8")
    if not is_number or dtype not in DTYPE_NAMES:
        dtype = None

    def read() -> Tensor:
        # An entry that is narrowed answers with itself, and reads when it is moved.
        return entry[...].to(dtype=dtype)

    shape = tuple(entry.get_shape())
    return StoredTensor(key, DTYPE_NAMES[dtype] if dtype else name, shape, read)


def _write_shards(tensors: list[StoredTensor], writer: _Writer) -> None:
    from huggingface_hub.serialization import split_state_dict_into_shards_factory

    by_name = {tensor.name: tensor for tensor in tensors}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda tensor: tensor.bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=writer.max_shard_size,
    )
    folder = writer.folder
    total = sum(tensor.bytes for tensor in tensors)
    free = shutil.disk_usage(folder).free
    if total > free:
        raise OSError(
            f"The weights need {total:,} bytes, but only {free:,} are free where the output "
            "goes: choose another folder or a smaller dtype."
        )
    with tqdm(total=total, desc="Writing", unit="B", unit_scale=True) as bar:
        for file, names in split.filename_to_tensors.items():
            write_shard(folder / file, (by_name[name] for name in names), bar.update)
    if split.is_sharded:
        index = {
            "metadata": {"total_size": total},
            "weight_map": dict(sorted(split.tensor_to_filename.items())),
        }
        write_json(folder / "model.safetensors.index.json", index)


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


def _resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and resolved not in DTYPE_NAMES:
        raise ValueError(
            f"dtype={dtype} is not a dtype to store weights in: pass float32, float16 or bfloat16."
        )
    return resolved


def _save_whole(
    request: LoadRequest,
    source: dict[str, Any],
    writer: _Writer,
) -> PruneRecord:
    """Load in full, prune in memory and save: everything but the model card."""
    model = load_with_arguments(
        request.auto_class,
        request.pretrained,
        request.prune_arguments,
        {
            **source,
            "dtype": writer.dtype or "auto",
            "device_map": {"": writer.device},
        },
    )
    record: PruneRecord = model.prune_record  # type: ignore[assignment]
    save_loaded(
        model,
        request,
        writer.source,
        writer.folder,
        max_shard_size=writer.max_shard_size,
    )
    return record


def _push(folder: Path, repository: str) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    repository = api.create_repo(repository, exist_ok=True).repo_id
    api.upload_folder(
        repo_id=repository,
        folder_path=folder,
        commit_message="Upload a model pruned by lm-eval-pruned",
    )
