"""The files beside the weights of an exported checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

#: Files beside the weights that an exported checkpoint keeps as they are.
_KEPT_FILES = (
    "*.json",
    "*.txt",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
_MODEL_CODE = "*.py"
_OWN_FILES = ("config.json", "trainer_state.json", "adapter_config.json")
_INDEX = ".index.json"


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as the Hub's JSON files are written."""
    path.write_text(
        json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def source_folder(pretrained: str, source: dict[str, Any]) -> Path:
    """Return the folder that holds the files beside the weights, fetching them if need be."""
    folder = Path(pretrained)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        below = f"{source['subfolder']}/" if source.get("subfolder") else ""
        wanted = (*_KEPT_FILES, _MODEL_CODE, "README.md")
        folder = Path(
            snapshot_download(
                pretrained,
                revision=source.get("revision"),
                cache_dir=source.get("cache_dir"),
                token=source.get("token"),
                local_files_only=bool(source.get("local_files_only")),
                allow_patterns=[f"{below}{pattern}" for pattern in wanted],
            )
        )
    return folder / (source.get("subfolder") or "")


def copy_companions(folder: Path, output: Path) -> None:
    """Copy what stays true of the pruned model: tokenizer, generation config, licence, code."""
    patterns = [*_KEPT_FILES]
    if "auto_map" in _raw_config(folder):
        patterns.append(_MODEL_CODE)
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            target = output / path.relative_to(folder)
            if (
                path.is_file()
                and path.name not in _OWN_FILES
                and not path.name.endswith(_INDEX)
            ):
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)


def _raw_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def write_config(
    original: PretrainedConfig, model: PreTrainedModel, source: Path, folder: Path
) -> None:
    """Write the source's config.json with the widths and the dtype of a model, and nothing else changed.

    Args:
        original: The config of the source.
        model: The model that was saved.
        source: Folder of the source's config.json.
        folder: Folder to write to.
    """
    raw = _raw_config(source)
    _apply_changes(raw, original.to_dict(), model.config.to_dict())
    name = str(model.dtype).removeprefix("torch.")
    for part in (raw, *(v for v in raw.values() if isinstance(v, dict))):
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = name
    if "torch_dtype" not in raw:
        raw["dtype"] = name
    write_json(folder / "config.json", raw)


def _apply_changes(
    raw: dict[str, Any], before: dict[str, Any], after: dict[str, Any]
) -> None:
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
