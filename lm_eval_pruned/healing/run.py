"""Healing from the arguments to the adapter: load, train, write."""

from __future__ import annotations

import contextlib
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lm_eval_pruned.checkpoints.adapters import HEALING, adapted_shapes, read_healing
from lm_eval_pruned.checkpoints.cards import adapter_card, model_card
from lm_eval_pruned.checkpoints.checkpoint import Checkpoint
from lm_eval_pruned.checkpoints.configs import quantising_arguments
from lm_eval_pruned.checkpoints.export import check_output, save_loaded, source_folder
from lm_eval_pruned.checkpoints.load import load_checkpoint
from lm_eval_pruned.healing.cost import TrainingCost
from lm_eval_pruned.healing.text import digest_of, texts_of, token_blocks
from lm_eval_pruned.pruning.arguments import PruneArguments
from lm_eval_pruned.pruning.layouts import UnsupportedModelError
from lm_eval_pruned.pruning.stacked import runnable
from lm_eval_pruned.util.atomic import appearing_whole
from lm_eval_pruned.util.pruning_record import left_of


if TYPE_CHECKING:
    import os

    from peft import LoraConfig
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        TrainingArguments,
    )

    from lm_eval_pruned.healing.options import HealingOptions
    from lm_eval_pruned.pruning.calibration import Text
    from lm_eval_pruned.pruning.record import PruneRecord


class Healed(NamedTuple):
    """The folder of the result, or of the last checkpoint if interrupted, and its record."""

    folder: Path
    record: dict[str, Any]
    finished: bool


def prepare(
    model_args: dict[str, Any],
    data: str,
    texts: list[Text],
    options: HealingOptions,
    checkpoints: Path,
) -> tuple[TrainingArguments, LoraConfig | None, Checkpoint, PreTrainedTokenizerBase]:
    """Return the arguments of Trainer, the adapter, the model with its pruning, and its tokenizer.

    Raises:
        ValueError: `heal` cannot do this. No weight was read.
    """
    from transformers import AutoModelForCausalLM

    arguments = options.trainer_arguments(checkpoints)
    adapter = options.adapter_config()
    where = "training_args say where to train, such as use_cpu=true"
    quantised = "quantised weights cannot be trained, so quantise the result"
    refused = {"peft": "merge it into a checkpoint first"}
    refused |= {"device": where, "device_map": where}
    refused |= dict.fromkeys(quantising_arguments(model_args), quantised)
    for name, advice in refused.items():
        if model_args.get(name) is not None:
            raise ValueError(
                f"model_args has {name}={model_args[name]}, which heal does not accept: leave it "
                f"out; {advice}."
            )
    loading = dict(model_args)
    pretrained = str(loading.pop("pretrained"))
    pruning = PruneArguments.taken_from(loading)
    base = Checkpoint.of(pretrained, pruning, loading, AutoModelForCausalLM)
    config = base.config
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{pretrained} is an encoder-decoder model, and plain text has no targets for its decoder: "
            "pass a decoder-only model."
        )
    if options.teacher_weight and pruning.size is None:
        raise ValueError(
            f"teacher_weight={options.teacher_weight} takes the unpruned model as teacher, but no "
            "size was given, so that it would teach itself: add one such as prune_percent=40 to "
            "model_args, or leave it out."
        )
    if adapter is not None:
        # peft refuses modules that the model lacks.
        widths = base.widths
        adapted_shapes(widths.build(widths.config), adapter)
    positions = getattr(config, "max_position_embeddings", None)
    if positions and options.max_length > positions:
        raise ValueError(
            f"max_length={options.max_length} exceeds the {positions} positions of the model: "
            f"pass at most {positions}."
        )
    tokenizer = base.load_tokenizer()
    next(token_blocks(data, texts, tokenizer, options.max_length))
    return arguments, adapter, base, tokenizer


def heal(
    model_args: dict[str, Any],
    data: str,
    output: str | os.PathLike[str],
    options: HealingOptions,
    *,
    resume: bool = False,
    merge: bool = False,
    metered: bool = True,
) -> Healed:
    """Train a pruned model, to recover some of what pruning cost.

    Checkpoints go to `checkpoints_of` `output`, which appears when the training is over. The first
    Ctrl-C ends it after the step that runs, with a checkpoint.

    Args:
        model_args: ``pretrained``, arguments of pruning and what else ``from_pretrained`` takes.
        data: Text to train on, which must not contain text of a benchmark; see `texts_of`.
        output: Folder to write; it must not exist, or be empty.
        resume: Continue from the last checkpoint of the same healing.
        merge: Also write the merged model, as a checkpoint in the folder ``merged`` below `output`.
        metered: Whether to measure the energy of the training.

    Raises:
        ValueError: An argument, the text or the checkpoint to resume from is of no use.
        UnsupportedModelError: The model cannot be pruned, or has an encoder.
        OSError: The model cannot be read, or the result not be written.
    """
    check_output(output := Path(output))
    checkpoints = checkpoints_of(output)
    if merge and options.method == "full":
        raise ValueError(
            "merge adds an adapter to its model, but method=full trains none: leave it out, the "
            "output is an ordinary checkpoint already."
        )
    last = _checkpoint(checkpoints, resume)
    texts, length = texts_of(data), options.max_length
    arguments, adapter, base, tokenizer = prepare(
        model_args, data, texts, options, checkpoints
    )
    blocks = [*map(torch.tensor, token_blocks(data, texts, tokenizer, length))]
    text = {"file": Path(data).name, "sha256": digest_of(data), "texts": len(texts)}
    record = {
        "lm_eval_pruned": version("lm-eval-pruned"),
        **options.as_dict(),
        "data": {**text, "tokens": len(blocks) * length},
        "training_args": options.training(),
    }
    before = (last and read_healing(str(last))) or {}
    _check_same(last, before, options.as_dict() | {"data": record["data"]})
    model: Any = load_checkpoint(base, tokenizer)
    pruned: PruneRecord = model.prune_record
    record["pruning"] = pruned.as_dict()
    _check_same(last, before and _left(before["pruning"]), _left(record["pruning"]))

    from transformers import set_seed

    from lm_eval_pruned.healing import trainer as training

    model.config.use_cache = False
    set_seed(arguments.seed)
    parameters = dict(model.named_parameters())
    if adapter is not None:
        from peft import get_peft_model

        model = get_peft_model(model, adapter)
    teacher: PreTrainedModel | None = None
    if options.teacher_weight:
        teacher = base.with_stored_widths().load_whole().eval().requires_grad_(False)
    running = contextlib.nullcontext() if teacher is None else runnable(teacher)
    metering = contextlib.closing(TrainingCost(metered=metered, before=before))
    with metering as cost, running:
        checkpointing = training.Checkpoints(record, cost)
        trainer = training.HealingTrainer(
            teacher,
            options,
            model=model,
            args=arguments,
            train_dataset=[{"input_ids": block, "labels": block} for block in blocks],
            callbacks=[checkpointing],
        )
        if teacher is not None:
            # Tensors that an adapter leaves alone are in memory once.
            for name, theirs in teacher.named_parameters() if adapter else ():
                ours = parameters.get(name)
                if ours is not None and torch.equal(ours.to(theirs.device), theirs):
                    theirs.data = ours.data
            teacher.to(arguments.device)  # type: ignore[arg-type]
        with checkpointing.listening():
            trainer.train_from(last)
        steps = trainer.state.global_step
        record |= {"steps": steps, **cost.so_far()}
    rows = arguments.train_batch_size * arguments.gradient_accumulation_steps
    record["tokens_seen"] = steps * rows * arguments.world_size * length
    if steps < trainer.state.max_steps:
        return Healed(checkpoints / f"checkpoint-{steps}", record, finished=False)
    if trainer.is_world_process_zero():
        trained: Any = trainer.accelerator.unwrap_model(trainer.model)
        with appearing_whole(output) as unfinished:
            _write(trained, base, pruned, unfinished, record, merge=merge)
            training.write_record(unfinished, record)
    trainer.accelerator.wait_for_everyone()
    return Healed(output, record, finished=True)


def checkpoints_of(output: Path) -> Path:
    """Return where the checkpoints of a healing lie."""
    return output.resolve().with_name(f"{output.resolve().name}.checkpoints")


def _checkpoint(folder: Path, resume: bool) -> Path | None:
    """Return the last complete checkpoint to continue from; None to start."""
    complete = [file.parent for file in folder.glob(f"checkpoint-*/{HEALING}")]
    if resume is not bool(complete):
        raise ValueError(
            f"resume continues from a checkpoint, but {folder} holds none: leave it out to start."
            if resume
            else f"{folder} holds checkpoints of a healing: add --resume to continue from the last, or "
            "delete the folder."
        )
    return max(
        complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None
    )


def _left(pruning: dict[str, Any]) -> dict[str, Any]:
    names = ("kept_digest", "repair", "SHA-256 of its text", "tokens of its text")
    return dict(zip(names, left_of(pruning), strict=True))


def _check_same(last: Path | None, before: Any, now: dict[str, Any]) -> None:
    for name, value in now.items():
        if before and before.get(name) != value:
            raise ValueError(
                f"{last} comes from a healing with {name}={before.get(name)}, but this one has "
                f"{name}={value}: pass the same value to resume, or another output to start."
            )


def _write(
    model: Any,
    base: Checkpoint,
    pruned: PruneRecord,
    folder: Path,
    record: dict[str, Any],
    *,
    merge: bool,
) -> None:
    name, revision = base.pretrained, base.model_arguments.get("revision")
    origin = (name, revision, source_folder(name, base.model_arguments), pruned)
    method, text = record["method"], record["data"]
    trained = (
        f"The {'pruned ' * pruned.plan.prunes}model was then trained on {record['tokens_seen']:,} "
        f"tokens of {text['file']} (SHA-256 {text['sha256']}) with method={method}."
    )
    if method != "full":
        model.save_pretrained(folder)
        # In place of peft's, an empty template that names a folder of this machine.
        card = adapter_card(*origin, method, trained)
        (folder / "README.md").write_text(card, encoding="utf-8")
        if not merge:
            return
        model = model.merge_and_unload()
        folder /= "merged"
        folder.mkdir()
    model.config.use_cache = True
    save_loaded(model, base, origin[2], folder)
    if pruned.plan.prunes:
        card = model_card(*origin, folder, trained)
        (folder / "README.md").write_text(card, encoding="utf-8")
