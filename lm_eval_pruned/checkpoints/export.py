"""Writing a pruned model as an ordinary checkpoint, with the files beside its weights."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.checkpoints.card import model_card
from lm_eval_pruned.checkpoints.default_model import save_converted
from lm_eval_pruned.checkpoints.load import load_request
from lm_eval_pruned.checkpoints.request import LoadRequest, asked_of
from lm_eval_pruned.pruning.arguments import CUTS, PruneArguments
from lm_eval_pruned.util.atomic import appearing_whole


if TYPE_CHECKING:
    import os

    from transformers import PreTrainedModel

    from lm_eval_pruned.pruning.record import PruneRecord

#: Dtypes to store weights in.
_STORED = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
#: As in `transformers.PreTrainedModel.save_pretrained`.
MAX_SHARD_SIZE = "50GB"
#: Files beside the weights that an exported checkpoint keeps as they are.
_KEPT_FILES = (
    *("*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken"),
    *("additional_chat_templates/*.jinja", "LICENSE*", "LICENCE*"),
    *("NOTICE*", "USE_POLICY*"),
)
_MODEL_CODE = "*.py"
#: Those among them that are true of the source alone.
_OWN_FILES = ("config.json", "trainer_state.json", "adapter_config.json")


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
        **from_pretrained: Anything else ``from_pretrained`` takes.

    Raises:
        ValueError, UnsupportedModelError, OSError: As `load_pruned`; also where nothing would be
            pruned, or `output` is not empty.

    Example:
        ```python
        export_pruned("org/model", "model-40", prune_arguments={"prune_percent": 40})
        ```
    """
    output = Path(output)
    check_output(output)
    _check_stored(dtype, max_shard_size)
    given = {name: v for name, v in from_pretrained.items() if v is not None}
    request = LoadRequest.resolve(
        None,
        pretrained,
        PruneArguments(**prune_arguments),
        {**given, "dtype": dtype, "device_map": {"": device}},
    )
    model = load_request(request)
    record: PruneRecord = model.prune_record  # type: ignore[assignment]
    if not record.plan.changes_model:
        raise ValueError(
            f"{asked_of(record.plan) or 'no size'} keeps all {record.plan.width_before} neurons, so "
            f"there is nothing to export: pass one of {', '.join(CUTS)} that removes some."
        )
    source = source_folder(pretrained, given)
    with appearing_whole(output) as unfinished:
        save_loaded(model, request, source, unfinished, max_shard_size)
        card = model_card(pretrained, given.get("revision"), source, record)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        weights = [p.stat().st_size for p in unfinished.glob("*.safetensors")]
    if push_to_hub is not None:
        from huggingface_hub import HfApi

        api = HfApi()
        api.upload_folder(
            repo_id=api.create_repo(push_to_hub, exist_ok=True).repo_id,
            folder_path=output,
            commit_message="Upload a model pruned by lm-eval-pruned",
        )
    return Export(output, record, sum(weights), len(weights))


def check_output(output: Path) -> None:
    """Refuse a folder that holds something."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(
            f"output={output} exists and is not an empty folder: pass a new one."
        )


def _check_stored(dtype: str | torch.dtype | None, max_shard_size: int | str) -> None:
    """Refuse a dtype or a size that only the end of an export would stumble over."""
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and resolved not in _STORED:
        raise ValueError(
            f"dtype={dtype} is not a dtype to store weights in: pass float32, float16 or bfloat16."
        )
    if not re.fullmatch(r"0*[1-9]\d*([KMGT]?B)?", str(max_shard_size), re.IGNORECASE):
        raise ValueError(
            f"max_shard_size={max_shard_size} is not a size: pass one such as 5GB."
        )


def source_folder(pretrained: str, source: dict[str, Any]) -> Path:
    """Return the folder that holds the files beside the weights, fetching them if need be."""
    folder, subfolder = Path(pretrained), source.get("subfolder") or ""
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        wanted = (*_KEPT_FILES, _MODEL_CODE, "README.md")
        options = ("revision", "cache_dir", "token", "local_files_only")
        fetched = snapshot_download(
            pretrained,
            **{name: source[name] for name in options if source.get(name)},
            allow_patterns=[Path(subfolder, each).as_posix() for each in wanted],
        )
        folder = Path(fetched)
    return folder / subfolder


def save_loaded(
    model: PreTrainedModel,
    request: LoadRequest,
    source: Path,
    folder: Path,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Write a model, and all that stays true of it in the folder of its source but the model card."""
    if request.model_arguments.get("gguf_file") is not None:
        save_converted(model, request.load_tokenizer(), folder, max_shard_size)
        return
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    for pattern in (*_KEPT_FILES, *([_MODEL_CODE] if "auto_map" in config else ())):
        for path in source.glob(pattern):
            own = path.name in _OWN_FILES or path.name.endswith(".index.json")
            if path.is_file() and not own:
                target = folder / path.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
    before = request.widths.whole.original.to_dict()
    _apply_changes(config, before, model.config.to_dict())
    name = str(model.dtype).removeprefix("torch.")
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        part |= {key: name for key in ("dtype", "torch_dtype") if key in part}
    if "torch_dtype" not in config:
        config["dtype"] = name
    # As the Hub's JSON files are written.
    written = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(written, encoding="utf-8")


def _apply_changes(
    raw: dict[str, Any], before: dict[str, Any], after: dict[str, Any]
) -> None:
    """Change in `raw`, a config as it is stored, what differs between two configs."""
    for key in before.keys() - after.keys():
        raw.pop(key, None)
    for key, value in after.items():
        if value == before.get(key):
            continue
        layers = key == "per_layer_config"
        if isinstance(value, dict) and isinstance(raw.get(key), dict) and not layers:
            _apply_changes(raw[key], before[key], value)
        else:
            raw[key] = value
