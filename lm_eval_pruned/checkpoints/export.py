"""Writing a pruned model as an ordinary checkpoint, with the files beside its weights."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lm_eval_pruned.checkpoints.adapters import write_healing
from lm_eval_pruned.checkpoints.cards import model_card, shard_sizes
from lm_eval_pruned.checkpoints.checkpoint import Checkpoint, stored_once
from lm_eval_pruned.checkpoints.cost import (
    DISTILLED,
    PRUNED,
    RANDOM_CUT,
    UNPRUNED,
    Quality,
    probed,
    quality_of,
    random_cut,
)
from lm_eval_pruned.checkpoints.default_model import save_converted
from lm_eval_pruned.checkpoints.load import load_checkpoint, stored_model
from lm_eval_pruned.pruning.arguments import SIZES, PruneArguments
from lm_eval_pruned.pruning.layouts import UnsupportedModelError
from lm_eval_pruned.pruning.lending import moved
from lm_eval_pruned.pruning.slicing import carry_out, finish
from lm_eval_pruned.util.atomic import appearing_whole, check_writable


if TYPE_CHECKING:
    import os
    from collections.abc import Collection, Mapping
    from contextlib import AbstractContextManager

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lm_eval_pruned.pruning.record import PruneRecord

# Below the harness's logger, so that its verbosity applies.
logger = logging.getLogger("lm_eval.pruned.export")

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
#: Those among them that are true only of the source.
_OWN_FILES = ("config.json", "trainer_state.json", "adapter_config.json")


class Recovery(Protocol):
    """What an export asks of a training; `lm_eval_pruned.healing.training.Training` has the words."""

    record: dict[str, Any]

    def check_output(self) -> None:
        """Refuse an output that holds something else."""

    def check_model(self, model: PreTrainedModel, config: Any) -> None:
        """Refuse a model that it cannot train."""

    def listen(
        self,
        teacher: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device | None = None,
    ) -> None:
        """Have the unpruned model read the text."""

    def trained_whole(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return the pruned model trained."""
        ...

    def replacing(self) -> AbstractContextManager[None]:
        """Remove what an interrupted training left when the block succeeds."""
        ...

    def sentence(self) -> str:
        """Return what a model card says."""
        ...


@dataclass(frozen=True)
class Export:
    """What an export wrote.

    Attributes:
        folder: The checkpoint.
        record: What was pruned; its digest equals that of pruning while loading.
        weight_bytes: Size of the weights, in bytes.
        shards: Number of weight files.
        cost: The `Quality` of the unpruned, the pruned and the distilled model, and of a random
            cut, by these names; empty where it was not asked for or cannot be measured.
        training: The record of a distillation, where there was one.
    """

    folder: Path
    record: PruneRecord
    weight_bytes: int
    shards: int
    cost: Mapping[str, Quality] = field(default_factory=dict)
    training: Mapping[str, Any] | None = None


def export_pruned(
    pretrained: str,
    output: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    max_shard_size: int | str = MAX_SHARD_SIZE,
    push_to_hub: str | None = None,
    measured: Collection[str] = (),
    training: Recovery | None = None,
    prune_arguments: dict[str, Any],
    **from_pretrained: Any,
) -> Export:
    """Write a pruned model as an ordinary checkpoint that stock transformers opens.

    Opened in any dtype, it is the model that `lm_eval_pruned.load_pruned` loads. Every tensor has its
    stored name and, unless `dtype` says otherwise, its stored dtype; the config
    changes only in its width; tokenizer files, generation config and licence are
    copied as they are.

    Args:
        pretrained: Folder or Hub name of the model.
        output: Folder to write; it must not exist, or be empty. It appears when the
            export is complete, and not before.
        dtype: Dtype to store the floating-point weights in, except for those that
            transformers keeps in float32. Default: each as it is stored.
        device: Where text runs: calibration, and what is `measured`. The rest stays on the CPU.
        max_shard_size: Largest size of a weight file, in bytes or such as ``5GB``.
        push_to_hub: Repository on the Hub to upload the finished folder to.
        measured: Whose `Quality` to measure: some of `UNPRUNED`, `PRUNED`, `DISTILLED` and
            `RANDOM_CUT`.
        training: Gives back what the cut took. One that Ctrl-C ends leaves what was best so far, and
            the same export may replace it.
        prune_arguments: Those of `lm_eval_pruned.pruning.arguments.PruneArguments`.
        **from_pretrained: Anything else ``from_pretrained`` takes.

    Raises:
        ValueError, UnsupportedModelError, OSError: As `load_pruned`; also where nothing would be
            pruned, or `output` is not empty, cannot be written or has too little room.

    Example:
        ```python
        export_pruned("org/model", "model-40", prune_arguments={"prune_percent": 40})
        ```
    """
    output = Path(output)
    training.check_output() if training else check_output(output)
    stored = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and stored not in _STORED:
        raise ValueError(
            f"dtype={dtype} is not a dtype to store weights in: pass float32, float16 or bfloat16."
        )
    if not re.fullmatch(r"0*[1-9]\d*([KMGT]?B)?", str(max_shard_size), re.IGNORECASE):
        raise ValueError(
            f"max_shard_size={max_shard_size} is not a size: pass one such as 5GB."
        )
    checkpoint = Checkpoint.of(
        pretrained,
        PruneArguments(**prune_arguments),
        {**from_pretrained, "dtype": dtype},
        calibrates_on=device,
    )
    device = checkpoint.device()
    source = source_folder(checkpoint)
    check_writable(output, _least_bytes(checkpoint, source, stored))
    if training is not None:
        check_trainable(checkpoint)
        training.check_model(checkpoint.cut.widths.skeleton, checkpoint.config)
    tokenizer = _tokenizer_of_measurable(checkpoint) if measured else None
    checkpoint = checkpoint.with_stored_widths()
    cost: dict[str, Quality] = {}

    def measure(name: str, model: PreTrainedModel) -> None:
        if tokenizer is not None and name in measured:
            with moved(model, device):
                quality = quality_of(model, tokenizer)
                cost[name] = replace(quality, probed=probed(model, tokenizer, name))

    if RANDOM_CUT in measured and tokenizer is not None:
        measure(RANDOM_CUT, load_checkpoint(random_cut(checkpoint)))
    checkpoint.check_text()
    if not checkpoint.cut.plan.is_open:
        checkpoint.cut.check_opens()
    loaded = stored_model(checkpoint)
    measure(UNPRUNED, loaded.model)
    if training is not None:
        training.listen(loaded.model, checkpoint.load_tokenizer(), device)
    with (
        appearing_whole(output) as unfinished,
        training.replacing() if training else contextlib.nullcontext(),
    ):
        model = loaded.model
        carry_out(loaded, checkpoint.cut, scratch=unfinished)
        if dtype is not None:
            model = checkpoint.place(model)
        finish(model, device)
        record: PruneRecord = model.prune_record  # type: ignore[assignment]
        if not record.plan.prunes:
            raise ValueError(
                f"{record.plan.as_written() or 'no size'} keeps all {record.plan.width_before} neurons, so "
                f"there is nothing to export: pass one of {', '.join(SIZES)} that removes some."
            )
        measure(PRUNED, model)
        if training is not None:
            model = training.trained_whole(model)
            measure(DISTILLED, model)
        if dtype is None:
            checkpoint.as_stored(model)
        weights = stored_once(model).values()
        check_writable(output, sum(weight.nbytes for weight in weights))
        save_loaded(
            model,
            checkpoint,
            source,
            unfinished,
            max_shard_size,
            keeps_dtype=dtype is None,
        )
        if training is not None:
            write_healing(unfinished, training.record)
        how = training.sentence() if training else None
        card = model_card(checkpoint, source, record, unfinished, how, cost)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        shards = shard_sizes(unfinished)
    if push_to_hub is not None:
        from huggingface_hub import HfApi

        api = HfApi()
        api.upload_folder(
            repo_id=api.create_repo(push_to_hub, exist_ok=True).repo_id,
            folder_path=output,
            commit_message="Upload a model pruned by lm-eval-pruned",
        )
    trained = training.record if training else None
    return Export(output, record, sum(shards), len(shards), cost, trained)


def _tokenizer_of_measurable(
    checkpoint: Checkpoint,
) -> PreTrainedTokenizerBase | None:
    """Return what reads the held text; None, with a warning, where no model can be measured on it."""
    try:
        if checkpoint.config.is_encoder_decoder:
            raise ValueError("the held text has no target for a decoder")
        return checkpoint.load_tokenizer()
    except ValueError as error:
        logger.warning("The cost of the cut was not measured: %s.", error)
        return None


def _least_bytes(
    checkpoint: Checkpoint, source: Path, dtype: torch.dtype | None
) -> int:
    """Return how many bytes of weights there will be at least; 0 where only a load tells."""
    cut = checkpoint.cut
    if cut.plan.is_open:
        return 0
    parameters = cut.parameters_after
    if dtype is not None:
        return parameters * dtype.itemsize
    known: Any = checkpoint.config.dtype or torch.float32
    size = sum(path.stat().st_size for path in source.glob("model*.safetensors"))
    # A folder may hold weights that are not loaded, and a config lie about the dtype.
    share = size * parameters // cut.parameters_before
    return min(share, parameters * known.itemsize)


def check_trainable(checkpoint: Checkpoint) -> None:
    """Refuse a model that plain text cannot train."""
    if checkpoint.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{checkpoint.pretrained} is an encoder-decoder model, and plain text has no targets for its "
            "decoder: pass a decoder-only model."
        )


def check_output(output: Path) -> None:
    """Refuse a folder that holds something."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(
            f"output_path={output} exists and is not an empty folder: pass a new one."
        )


def source_folder(checkpoint: Checkpoint) -> Path:
    """Return the folder that holds the files beside the weights, fetching them if need be."""
    folder, source = Path(checkpoint.pretrained), checkpoint.model_arguments
    subfolder = source.get("subfolder") or ""
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        wanted = (*_KEPT_FILES, _MODEL_CODE, "README.md")
        options = ("revision", "cache_dir", "token", "local_files_only")
        fetched = snapshot_download(
            checkpoint.pretrained,
            **{name: source[name] for name in options if source.get(name)},
            allow_patterns=[Path(subfolder, name).as_posix() for name in wanted],
        )
        folder = Path(fetched)
    return folder / subfolder


def save_loaded(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    source: Path,
    folder: Path,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    *,
    keeps_dtype: bool = False,
) -> None:
    """Write a model, and all that stays true of it in the folder of its source but the model card.

    `keeps_dtype` says that its tensors have their stored dtypes, so that the config keeps its own.
    """
    if checkpoint.model_arguments.get("gguf_file") is not None:
        save_converted(model, checkpoint.load_tokenizer(), folder, max_shard_size)
        return
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    has_code = any(
        '"auto_map"' in f.read_text("utf-8") for f in source.glob("*config.json")
    )
    for pattern in (*_KEPT_FILES, *([_MODEL_CODE] if has_code else ())):
        for path in source.glob(pattern):
            is_index = path.name.endswith(".index.json")
            if path.is_file() and path.name not in _OWN_FILES and not is_index:
                target = folder / path.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
    whole = checkpoint.config
    before, after = whole.to_dict(), model.config.to_dict()
    if type(model.config) is not type(whole):
        # The class was handed the part that is of text, and no Auto class opens that part alone.
        after.pop("transformers_version")
        classes = after["architectures"]
        after = before | {"text_config": after, "architectures": classes}
    dtype = None if keeps_dtype else str(model.dtype).removeprefix("torch.")
    _edit(config, before, after, dtype)
    if dtype is not None and "torch_dtype" not in config:
        config["dtype"] = dtype
    # As the Hub's JSON files are written.
    written = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(written, encoding="utf-8")


def _edit(
    stored: dict[str, Any],
    before: dict[str, Any],
    after: dict[str, Any],
    dtype: str | None,
) -> None:
    """Change in a config as it is stored what differs between two configs, and its dtypes to `dtype`."""
    dtypes = ("dtype", "torch_dtype")
    for key in before.keys() - after.keys():
        stored.pop(key, None)
    for key, value in after.items():
        if isinstance(value, dict) and isinstance(stored.get(key), dict):
            _edit(stored[key], before[key], value, dtype)
        elif value != before.get(key) and key not in dtypes:
            stored[key] = value
    if dtype is not None:
        stored |= {key: dtype for key in dtypes if key in stored}
