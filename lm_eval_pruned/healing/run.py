"""Healing from the arguments to the adapter: load, train, write."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.checkpoints.adapters import HEALING, adapted_shapes, read_healing
from lm_eval_pruned.checkpoints.card import adapter_card, model_card
from lm_eval_pruned.checkpoints.configs import quantising_arguments
from lm_eval_pruned.checkpoints.export import check_output, save_loaded, source_folder
from lm_eval_pruned.checkpoints.load import load_request
from lm_eval_pruned.checkpoints.request import LoadRequest
from lm_eval_pruned.healing.cost import Cost
from lm_eval_pruned.healing.options import written
from lm_eval_pruned.healing.text import HealingText, check_length, texts_of
from lm_eval_pruned.pruning.arguments import PruneArguments
from lm_eval_pruned.util.atomic import appearing_whole


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

# Below the harness's logger, so that its verbosity applies.
logger = logging.getLogger("lm_eval.pruned.healing")

#: Folder of the merged checkpoint beside the adapter.
MERGED = "merged"
#: What two runs must share for one to go on from the other's checkpoint.
_SHARED = ("method", "max_length", "teacher", "data")


@dataclass(frozen=True)
class Healed:
    """What a healing did.

    Attributes:
        folder: The adapter, or with ``method=full`` the checkpoint; of a healing that was
            interrupted the checkpoint to resume from.
        record: What it was trained on, as the file `healing.json` has it.
        finished: Whether it came to its end.
    """

    folder: Path
    record: dict[str, Any]
    finished: bool


@dataclass(frozen=True)
class Prepared:
    """What a healing needs, checked as far as that reads no weight.

    Attributes:
        arguments: What Trainer is told.
        adapter: The adapter to train, or None.
        request: The model and its pruning.
        from_pretrained: What loading it takes besides.
        tokenizer: Its tokenizer.
    """

    arguments: TrainingArguments
    adapter: LoraConfig | None
    request: LoadRequest
    from_pretrained: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase


def prepare(
    model_args: dict[str, Any],
    data: str,
    texts: list[Text],
    options: HealingOptions,
    checkpoints: Path,
) -> Prepared:
    """Refuse a healing that cannot be, before a weight is read.

    Args:
        model_args: As in `heal`.
        data: Where the texts come from.
        texts: What `lm_eval_pruned.healing.text.texts_of` read.
        options: How to train.
        checkpoints: Folder of the checkpoints; nothing is written there yet.

    Raises:
        ValueError: An argument or the text is of no use.
        UnsupportedModelError: The model cannot be pruned, or has an encoder.
        OSError: The model's config or tokenizer cannot be read.
    """
    arguments = options.trainer_arguments(checkpoints)
    adapter = options.adapter_config()
    request, from_pretrained = _request(dict(model_args), options)
    if adapter is not None:
        try:
            adapted_shapes(request, request.widths.original, adapter)
        except ValueError as error:
            raise ValueError(
                f"peft_args={written(options.peft_args)} fits no layer of the model ({error})"
            ) from None
    tokenizer = request.load_tokenizer()
    positions = getattr(request.widths.original, "max_position_embeddings", None)
    if positions and options.max_length > positions:
        raise ValueError(
            f"max_length={options.max_length} is more than the {positions} positions of the "
            "model: pass that many or fewer."
        )
    check_length(data, texts, tokenizer, options.max_length)
    return Prepared(arguments, adapter, request, from_pretrained, tokenizer)


def heal(
    model_args: dict[str, Any],
    data: str,
    output: str | os.PathLike[str],
    options: HealingOptions,
    *,
    resume: bool | None = False,
    merge: bool = False,
    metered: bool = True,
) -> Healed:
    """Train a pruned model, so that it takes back some of what pruning cost.

    Checkpoints go to a folder beside `output` whose name ends in ``.checkpoints``;
    `output` appears when the training is over. The first Ctrl-C ends it after the step
    that runs, with a checkpoint.

    Args:
        model_args: ``pretrained``, the arguments of
            `lm_eval_pruned.pruning.arguments.PruneArguments` and what else
            ``from_pretrained`` takes.
        data: Text to train on; see `lm_eval_pruned.healing.text.texts_of`. None of it may
            be part of what is evaluated.
        output: Folder to write; it must not exist, or be empty.
        options: How to train.
        resume: Go on from the last checkpoint of the same healing. None: if there is one.
        merge: Also write the model with the adapter merged, as an ordinary checkpoint in
            the folder ``merged`` below `output`.
        metered: Whether to measure the energy of the training.

    Raises:
        ValueError: An argument, the text or the checkpoint to resume from is of no use.
        UnsupportedModelError: The model cannot be pruned, or has an encoder.
        OSError: The model cannot be read, or the result not be written.
    """
    output = Path(output)
    checkpoints = checkpoints_of(output)
    check_output(output)
    if merge and options.method == "full":
        raise ValueError(
            "merge adds an adapter to its model, but method=full trains none: leave it out, the "
            "output is an ordinary checkpoint already."
        )
    last = _checkpoint(checkpoints, resume)
    texts = texts_of(data)
    prepared = prepare(model_args, data, texts, options, checkpoints)
    arguments, adapter = prepared.arguments, prepared.adapter
    request, tokenizer = prepared.request, prepared.tokenizer
    text = HealingText.of(data, texts, tokenizer, options.max_length)
    record = {
        "lm_eval_pruned": version("lm-eval-pruned"),
        **options.as_dict(),
        "data": text.as_dict(),
        "training_args": options.training(),
    }
    if last is not None:
        _check_same(last, record, _SHARED)

    from transformers import set_seed

    from lm_eval_pruned.healing.trainer import (
        HealingTrainer,
        RecordBeside,
        StopWhenAsked,
        TellTimeLeft,
        write_record,
    )

    model: Any = load_request(request, tokenizer)
    pruned: PruneRecord = model.prune_record
    record["pruning"] = pruned.as_dict()
    if last is not None:
        _check_same(last, record["pruning"], ("kept_digest",), "pruning")
    model.config.use_cache = False
    teacher = (
        _Teacher.of(request, model, frozen=adapter is not None)
        if options.teacher_weight
        else None
    )
    set_seed(arguments.seed)
    if adapter is not None:
        from peft import get_peft_model

        model = get_peft_model(model, adapter)
    stop = StopWhenAsked()
    with contextlib.closing(Cost(metered=metered)) as cost:
        cost.add(None if last is None else read_healing(str(last)))
        try:
            trainer = HealingTrainer(
                None if teacher is None else teacher.model,
                options.teacher_weight,
                options.temperature,
                model=model,
                args=arguments,
                train_dataset=text.examples(),
                callbacks=[RecordBeside(record, cost), TellTimeLeft(), stop],
            )
        except (ImportError, RuntimeError) as error:
            raise ValueError(
                f"training_args ask for what is not here ({error}): install it, or leave it "
                "out."
            ) from None
        if teacher is not None:
            teacher.move(arguments.device)
        with stop.listening():
            trainer.train_from(last)
        record["steps"] = trainer.state.global_step
        record |= cost.so_far()
    record["tokens_seen"] = (
        trainer.state.global_step
        * arguments.train_batch_size
        * arguments.gradient_accumulation_steps
        * arguments.world_size
        * options.max_length
    )
    if trainer.state.global_step < trainer.state.max_steps:
        left = checkpoints / f"checkpoint-{trainer.state.global_step}"
        return Healed(left, record, finished=False)
    if trainer.is_world_process_zero():
        with appearing_whole(output) as unfinished:
            trained = trainer.accelerator.unwrap_model(trainer.model)
            _write(trained, request, pruned, unfinished, record, merge=merge)
            write_record(unfinished / HEALING, record)
    trainer.accelerator.wait_for_everyone()
    return Healed(output, record, finished=True)


def _request(
    model_args: dict[str, Any], options: HealingOptions
) -> tuple[LoadRequest, dict[str, Any]]:
    """Read the config of the model, and refuse what cannot be healed.

    Returns:
        The model and its pruning, and what ``from_pretrained`` takes besides.
    """
    from transformers import AutoModelForCausalLM

    from lm_eval_pruned.pruning.layouts import UnsupportedModelError

    for name, advice in (
        ("peft", "merge it into a checkpoint first"),
        ("device", "training_args say where to train, such as use_cpu=true"),
        ("device_map", "training_args say where to train, such as use_cpu=true"),
    ):
        if model_args.get(name) is not None:
            raise ValueError(
                f"model_args has {name}={model_args[name]}, which a healing does not take: leave "
                f"it out; {advice}."
            )
    for name in quantising_arguments(model_args):
        raise ValueError(
            f"model_args has {name}={model_args[name]}, but quantised weights can be neither "
            "trained nor merged: leave it out, and quantise what comes out."
        )
    pretrained = str(model_args.pop("pretrained"))
    asked = PruneArguments.taken_from(model_args)
    request = LoadRequest.resolve(AutoModelForCausalLM, pretrained, asked, model_args)
    if request.widths.original.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{pretrained} has an encoder, and text has no target for its decoder: pass a "
            "decoder-only model."
        )
    if options.teacher_weight and asked.size is None:
        raise ValueError(
            f"teacher_weight={options.teacher_weight} takes the unpruned model as teacher, but no "
            "size was asked for, so that both are one: add one such as prune_percent=40 to "
            "model_args, or leave it out."
        )
    return request, model_args


def checkpoints_of(output: Path) -> Path:
    """Return where the checkpoints of a healing lie."""
    whole = output.resolve()
    return whole.with_name(f"{whole.name}.checkpoints")


def _checkpoint(folder: Path, resume: bool | None) -> Path | None:
    """Return the last whole checkpoint to go on from; None to begin."""
    found = {
        int(path.name.partition("-")[2]): path
        for path in folder.glob("checkpoint-*")
        if path.name.partition("-")[2].isdigit() and (path / HEALING).is_file()
    }
    if resume and not found:
        raise ValueError(
            f"resume goes on from a checkpoint, but {folder} holds none: leave it out to begin."
        )
    if found and resume is False:
        raise ValueError(
            f"{folder} holds checkpoints of a healing: add --resume to go on from the last, or "
            "delete the folder."
        )
    return found[max(found)] if found else None


def _check_same(
    last: Path, now: dict[str, Any], names: tuple[str, ...], part: str | None = None
) -> None:
    before: dict[str, Any] = read_healing(str(last)) or {}
    before = before[part] if part else before
    for name in names:
        if before.get(name) != now[name]:
            raise ValueError(
                f"{last} is of a healing with {name}={before.get(name)}, but this one has "
                f"{name}={now[name]}: pass the same to resume, or another output to begin."
            )


@dataclass(frozen=True)
class _Teacher:
    """The unpruned model, which holds no tensor twice that the pruned one has as well.

    Attributes:
        model: It.
        shared: Parameters of it with those of the pruned model that are the same.
    """

    model: PreTrainedModel
    shared: list[tuple[Any, Any]] = field(default_factory=list)

    @classmethod
    def of(
        cls, request: LoadRequest, pruned: PreTrainedModel, *, frozen: bool
    ) -> _Teacher:
        """Load the teacher.

        Args:
            request: The model and its pruning.
            pruned: The model that learns.
            frozen: Whether its own weights stay as they are.
        """
        model = request.load()[0].eval().requires_grad_(False)
        teacher = cls(model)
        if frozen:
            learning = dict(pruned.named_parameters())
            for name, theirs in model.named_parameters():
                ours = learning.get(name)
                if ours is not None and torch.equal(ours, theirs):
                    teacher.shared.append((theirs, ours))
        teacher.move(pruned.device)
        return teacher

    def move(self, device: Any) -> None:
        """Follow the pruned model to its device."""
        for theirs, ours in self.shared:
            theirs.data = ours.data
        self.model.to(device)


def _write(
    model: Any,
    request: LoadRequest,
    pruned: PruneRecord,
    folder: Path,
    record: dict[str, Any],
    *,
    merge: bool,
) -> None:
    """Write the adapter, or the model, or both."""
    source = source_folder(request.pretrained, request.model_arguments)
    revision = request.model_arguments.get("revision")
    told = (
        f"The {'pruned ' * pruned.plan.prunes}model was then trained on {record['tokens_seen']:,} tokens of "
        f"{record['data']['file']} (SHA-256 {record['data']['sha256']}) with "
        f"method={record['method']}."
    )
    if record["method"] != "full":
        model.save_pretrained(folder)
        card = adapter_card(
            request.pretrained, revision, source, pruned, record["method"], told
        )
        # In place of peft's, an empty template that names a folder of this machine.
        (folder / "README.md").write_text(card, encoding="utf-8")
        if not merge:
            return
        model = model.merge_and_unload()
        folder /= MERGED
        folder.mkdir()
    model.config.use_cache = True
    save_loaded(model, request, source, folder)
    if pruned.plan.prunes:
        card = model_card(request.pretrained, revision, source, pruned, told)
        (folder / "README.md").write_text(card, encoding="utf-8")
