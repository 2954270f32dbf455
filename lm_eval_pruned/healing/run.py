"""Healing from the arguments to the adapter: load, train with or without a teacher, write."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import kl_div, log_softmax
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerState,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME

from lm_eval_pruned.checkpoints.adapters import HEALING, adapted_shapes, read_healing
from lm_eval_pruned.checkpoints.cards import adapter_card, model_card
from lm_eval_pruned.checkpoints.checkpoint import Checkpoint
from lm_eval_pruned.checkpoints.configs import quantising_arguments
from lm_eval_pruned.checkpoints.export import check_output, save_loaded, source_folder
from lm_eval_pruned.checkpoints.load import load_checkpoint
from lm_eval_pruned.pruning.arguments import PruneArguments, take_prune_arguments
from lm_eval_pruned.pruning.calibration_text import read_texts, token_ids
from lm_eval_pruned.pruning.layouts import UnsupportedModelError, without_weights
from lm_eval_pruned.pruning.stacked import runnable
from lm_eval_pruned.results.files import left_of
from lm_eval_pruned.util.atomic import appearing_whole, write_atomically


if TYPE_CHECKING:
    import os

    from peft import LoraConfig
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lm_eval_pruned.healing.options import HealingOptions
    from lm_eval_pruned.pruning.calibration_text import Text
    from lm_eval_pruned.pruning.record import PruneRecord


def distillation_loss(logits: Tensor, expected: Tensor, temperature: float) -> Tensor:
    """Return how far the distribution of each next token is from a teacher's.

    ``T ** 2 * KL(softmax(expected / T) || softmax(logits / T))``, the mean over the positions
    that predict a token of their block. The factor keeps gradients of one size over
    temperatures. Probabilities are float32; those of one row are in memory at a time, and are
    computed again for the gradient.

    Args:
        logits: Shape (rows, tokens, vocabulary).
        expected: Those of the teacher, of the same shape.
        temperature: T.

    Source: Hinton, Vinyals and Dean 2015, arXiv 1503.02531, section 2.
    """

    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        predicted, wanted = (
            log_softmax(row.float() / temperature, dim=-1) for row in (student, teacher)
        )
        return kl_div(predicted, wanted, reduction="sum", log_target=True)

    pairs = zip(logits[:, :-1], expected[:, :-1], strict=True)
    rows = [checkpoint(divergence, *pair, use_reentrant=False) for pair in pairs]
    return temperature**2 * torch.stack(rows).mean() / (logits.shape[1] - 1)


class HealingTrainer(Trainer):
    """A trainer whose loss is mixed with the distance to a teacher, if there is one."""

    def __init__(
        self,
        teacher: PreTrainedModel | None,
        options: HealingOptions,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        # Blocks are of one length, so that the mean of their means is the mean over tokens;
        # where the model divides by a count instead, the distance would have to as well.
        self.model_accepts_loss_kwargs = False
        self._teacher, self._temperature = teacher, options.temperature
        self._weight = options.teacher_weight

    def train_from(self, last: Path | None) -> None:
        """Train to the end, from a checkpoint if there is one."""
        if last is not None:
            state = TrainerState.load_from_json(str(last / TRAINER_STATE_NAME))
            steps = self.args.max_steps
            if steps <= 0 and state.num_train_epochs >= self.args.num_train_epochs:
                steps = state.max_steps
            if 0 < steps <= state.global_step:
                # Trainer would take one more step.
                self._load_from_checkpoint(str(last))
                self.state = state
                return
        self.train(resume_from_checkpoint=str(last) if last else None)

    def compute_loss(  # type: ignore[override]
        self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any
    ) -> Any:
        if self._teacher is None:
            return super().compute_loss(model, inputs, return_outputs, **more)
        with torch.no_grad():
            expected = self._teacher(input_ids=inputs["input_ids"]).logits
        loss, outputs = super().compute_loss(model, inputs, True, **more)
        distance = distillation_loss(outputs.logits, expected, self._temperature)
        loss = (1 - self._weight) * loss + self._weight * distance
        return (loss, outputs) if return_outputs else loss


class Checkpoints(TrainerCallback):
    """Writes a record into each checkpoint, with the seconds of training so far.

    `seconds` were spent before, up to the checkpoint that this training continues from.
    """

    def __init__(self, record: dict[str, Any], seconds: float) -> None:
        self._record, self._began = record, time.monotonic() - seconds

    def spent(self, state: TrainerState) -> dict[str, Any]:
        """Return the steps and seconds of a training, as its record holds them."""
        seconds = round(time.monotonic() - self._began, 1)
        return {"steps": state.global_step, "seconds": seconds}

    def on_save(self, args, state, control, **kwargs):
        """Write the record of this step, last: a checkpoint without it is not whole."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            write_record(folder, self._record | self.spent(state))


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write the record of a healing into the folder of its adapter."""
    text = json.dumps(record, indent=2, ensure_ascii=False)
    write_atomically(folder / HEALING, f"{text}\n")


def resolved(
    model_args: dict[str, Any], options: HealingOptions, adapter: LoraConfig | None
) -> Checkpoint:
    """Return the model with its pruning.

    Raises:
        ValueError: `heal` cannot train it. No weight was read.
    """
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
    pruning = PruneArguments(**take_prune_arguments(loading))
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
        widths = base.cut.widths
        skeleton = without_weights(type(widths.skeleton), widths.config)
        adapted_shapes(skeleton, adapter)
    positions = getattr(config, "max_position_embeddings", None)
    if positions and options.max_length > positions:
        raise ValueError(
            f"max_length={options.max_length} exceeds the {positions} positions of the model: "
            f"pass at most {positions}."
        )
    return base


def texts_of(file: str) -> list[Text]:
    """Read JSON Lines as `read_texts` does, or a file ``.txt``, which counts as one text.

    Raises:
        ValueError: The file is missing, empty or of another form.
    """
    if Path(file).suffix.lower() != ".txt":
        return read_texts(file, argument="data")
    try:
        return [Path(file).read_text(encoding="utf-8")]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"data={file} cannot be read ({error}): pass a text in UTF-8."
        ) from None


def token_blocks(
    file: str, texts: list[Text], tokenizer: PreTrainedTokenizerBase, length: int
) -> Tensor:
    """Cut texts, with the end of text after each, into blocks of `length` tokens.

    What is left at the end is dropped; `file` is where the texts come from. Returns shape
    (blocks, length), int64.

    Raises:
        ValueError: All texts together are shorter than a block.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens: list[int] = []
    for text in texts:
        tokens += [*token_ids(tokenizer, text), *end]
    if len(tokens) < length:
        raise ValueError(
            f"data={file} holds {len(tokens)} tokens, but each step needs blocks of "
            f"max_length={length}: pass more text or a smaller max_length."
        )
    return torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)


def heal(
    model_args: dict[str, Any],
    data: str,
    output: str | os.PathLike[str],
    options: HealingOptions,
    *,
    resume: bool = False,
    merge: bool = False,
) -> dict[str, Any]:
    """Train a pruned model, to recover some of what pruning cost, and return its record.

    Checkpoints go to ``OUTPUT.checkpoints``; `output` appears when the training is over.

    Args:
        model_args: ``pretrained``, arguments of pruning and what else ``from_pretrained`` takes.
        data: Text to train on, which must not contain text of a benchmark; see `texts_of`.
        output: Folder to write; it must not exist, or be empty.
        resume: Continue from the last checkpoint of the same healing.
        merge: Also write the merged model, as a checkpoint in the folder ``merged`` below `output`.

    Raises:
        ValueError: An argument, the text or the checkpoint to resume from is of no use.
        UnsupportedModelError: The model cannot be pruned, or has an encoder.
        OSError: The model cannot be read, or the result not be written.
    """
    check_output(output := Path(output))
    folder = output.resolve().with_name(f"{output.resolve().name}.checkpoints")
    if merge and options.method == "full":
        raise ValueError(
            "merge adds an adapter to its model, but method=full trains none: leave it out, the "
            "output is an ordinary checkpoint already."
        )
    last = _checkpoint(folder, resume)
    texts, length = texts_of(data), options.max_length
    arguments, adapter = options.trainer_arguments(folder), options.adapter_config()
    base = resolved(model_args, options, adapter)
    tokenizer = base.load_tokenizer()
    blocks = token_blocks(data, texts, tokenizer, length)
    digest = hashlib.sha256(Path(data).read_bytes()).hexdigest()
    text = {"file": Path(data).name, "sha256": digest, "texts": len(texts)}
    record = {
        "lm_eval_pruned": version("lm-eval-pruned"),
        **options.as_dict(),
        "data": {**text, "tokens": blocks.numel()},
        "training_args": options.training(),
    }
    before = (last and read_healing(str(last))) or {}
    _check_same(last, before, options.as_dict() | {"data": record["data"]})
    model: Any = load_checkpoint(base, tokenizer)
    pruned: PruneRecord = model.prune_record
    record["pruning"] = pruned.as_dict()
    _check_same(last, before and _left(before["pruning"]), _left(record["pruning"]))

    model.config.use_cache = False
    set_seed(arguments.seed)
    parameters = dict(model.named_parameters())
    if adapter is not None:
        from peft import get_peft_model

        model = get_peft_model(model, adapter)
    teacher: PreTrainedModel | None = None
    if options.teacher_weight:
        teacher = base.with_stored_widths().load_whole().eval().requires_grad_(False)
    with contextlib.nullcontext() if teacher is None else runnable(teacher):
        checkpoints = Checkpoints(record, before.get("seconds", 0.0))
        trainer = HealingTrainer(
            teacher,
            options,
            model=model,
            args=arguments,
            train_dataset=[{"input_ids": block, "labels": block} for block in blocks],
            callbacks=[checkpoints],
        )
        if teacher is not None:
            # Tensors that an adapter leaves alone are in memory once.
            for name, theirs in teacher.named_parameters() if adapter else ():
                ours = parameters.get(name)
                if ours is not None and torch.equal(ours.to(theirs.device), theirs):
                    theirs.data = ours.data
            teacher.to(arguments.device)  # type: ignore[arg-type]
        trainer.train_from(last)
        record |= checkpoints.spent(trainer.state)
    rows = arguments.train_batch_size * arguments.gradient_accumulation_steps
    record["tokens_seen"] = record["steps"] * rows * arguments.world_size * length
    if trainer.is_world_process_zero():
        trained: Any = trainer.accelerator.unwrap_model(trainer.model)
        with appearing_whole(output) as unfinished:
            _write(trained, base, pruned, unfinished, record, merge=merge)
            write_record(unfinished, record)
    trainer.accelerator.wait_for_everyone()
    return record


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
    source = source_folder(base)
    method, text = record["method"], record["data"]
    trained = (
        f"The {'pruned ' * pruned.plan.prunes}model was then trained on {record['tokens_seen']:,} "
        f"tokens of {text['file']} (SHA-256 {text['sha256']}) with method={method}."
    )
    if method != "full":
        model.save_pretrained(folder)
        # In place of peft's, an empty template that names a folder of this machine.
        card = adapter_card(base, source, pruned, method, trained)
        (folder / "README.md").write_text(card, encoding="utf-8")
        if not merge:
            return
        model = model.merge_and_unload()
        folder /= "merged"
        folder.mkdir()
    model.config.use_cache = True
    save_loaded(model, base, source, folder)
    if pruned.plan.prunes:
        card = model_card(base, source, pruned, folder, trained)
        (folder / "README.md").write_text(card, encoding="utf-8")
