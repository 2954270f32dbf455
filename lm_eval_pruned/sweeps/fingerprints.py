"""What makes a unit the one it is: digests of definitions, code and data."""

from __future__ import annotations

import functools
import glob
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


#: Arguments of the model that name files, and a file by which the Hub knows them.
SOURCES = {
    "pretrained": "config.json",
    "delta": "config.json",
    "peft": "adapter_config.json",
    "lora_local_path": "adapter_config.json",
    "tokenizer": "tokenizer_config.json",
}


def fingerprint(definition: dict[str, Any]) -> str:
    """Return the hash of a definition, as 64 hexadecimal digits."""
    text = json.dumps(definition, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def changes(
    before: Mapping[str, Any], now: Mapping[str, Any], of: str = "the task"
) -> Iterator[str]:
    """Say in which ways one definition differs from another, such as ``dtype=float32, now bfloat16``.

    Args:
        before: A definition that was read from a file, or a part of it.
        now: One that was made here.
        of: What hashes in it are of.
    """
    now = json.loads(json.dumps(now, default=str))
    for name in [*now, *(name for name in before if name not in now)]:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from changes(old, new, name)
        elif old != new:
            hashed = "sha256" in name
            yield f"another {of}" if hashed else f"{name}={old}, now {new}"


def entry_config(entry: Any, resolve: bool = True) -> dict[str, Any]:
    """Return the config of an entry of the harness's index, read from its file where it has one."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if entry.yaml_path is None:
        return entry.cfg or {}
    if not resolve and entry.cfg is not None:
        return entry.cfg
    return load_yaml(entry.yaml_path, resolve_func=resolve)


def describe(value: Any) -> Any:
    """Return `value` with functions and local data replaced by hashes of their files.

    Paths go, so that a task folder may move; contents stay.
    """
    if isinstance(value, dict):
        described = {key: describe(item) for key, item in value.items()}
        data = value.get("dataset_path")
        if isinstance(data, str) and Path(data).is_dir():
            described["dataset_path"] = hash_tree(Path(data))
        files = value.get("dataset_kwargs")
        if isinstance(files, dict):
            described["dataset_kwargs"] = _describe_data(files)
        return described
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    if isinstance(value, Callable):  # type: ignore[arg-type]
        code = getattr(value, "__code__", None)
        return [
            getattr(value, "__qualname__", str(value)),
            hash_beside(Path(code.co_filename).parent) if code else None,
        ]
    if isinstance(value, str) and value.startswith("/") and "\n" not in value:
        # The loader leaves `!function module.name` as FOLDER/module.name.
        folder, _, function = value.rpartition("/")
        module = function.rpartition(".")[0].replace(".", "/")
        if module and Path(folder, f"{module}.py").is_file():
            return [function, hash_beside(Path(folder, f"{module}.py").parent)]
    return value


def _describe_data(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _describe_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_describe_data(item) for item in value]
    if isinstance(value, str) and len(value) < 4096 and "\n" not in value:
        path = Path(value)
        if path.is_file():
            return hash_file(path)
        if path.is_dir():
            return hash_tree(path)
        if glob.has_magic(value):
            return [hash_file(Path(each)) for each in sorted(glob.glob(value))]
    return describe(value)


def source_of(
    name: str, revision: str, subfolder: str, argument: str
) -> dict[str, str | None]:
    """Return what identifies a checkpoint: of a folder its content, on the Hub the commit.

    Other folders in it, such as the checkpoints of a training, do not count.
    """
    folder = Path(name)
    if folder.is_dir():
        if (folder / subfolder).is_dir():
            folder /= subfolder
        return {"sha256": hash_tree(folder, deep=False)}
    from transformers.utils import cached_file

    try:
        path = Path(cached_file(name, SOURCES[argument], revision=revision) or "").parts
        return {"name": name, "commit": path[path.index("snapshots") + 1]}
    except (OSError, ValueError, IndexError):
        return {"name": name, "commit": None}


@functools.lru_cache(maxsize=64)
def hash_tree(folder: Path, deep: bool = True) -> str:
    """Return the hash of the files in `folder`, and below it if `deep`."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*") if deep else folder.iterdir()):
        hidden = any(
            part.startswith(".") or part == "__pycache__"
            for part in path.relative_to(folder).parts
        )
        if path.is_file() and not hidden:
            digest.update(f"{path.relative_to(folder)}\0{hash_file(path)}\n".encode())
    return digest.hexdigest()


@functools.lru_cache(maxsize=4096)
def hash_beside(folder: Path) -> str:
    """Return the hash of the files that a task's Python file may import or read."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix not in (".yaml", ".yml", ".md", ".pyc"):
            digest.update(f"{path.name}\0{hash_file(path)}\n".encode())
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
