"""A training from its text to the trained model: the teacher reads, then the pruned model is trained.

What the teacher expects waits on the disk, so teacher and pruned model need not be in memory together.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from lm_eval_pruned.checkpoints.adapters import HEALING, read_healing
from lm_eval_pruned.healing.options import ADAPTERS, WEIGHTS, Budget
from lm_eval_pruned.healing.resume import check_same, last_checkpoint, left_weights
from lm_eval_pruned.healing.teacher import (
    bytes_expected,
    read_expected,
    vocabulary_of,
    write_expected,
)
from lm_eval_pruned.healing.text import check_sources, training_text
from lm_eval_pruned.healing.trainer import Blocks, HealingTrainer, Records
from lm_eval_pruned.healing.weights import (
    read_trained,
    trainable,
    trained_weights,
    write_trained,
)
from lm_eval_pruned.pruning.lending import moved
from lm_eval_pruned.pruning.stacked import runnable
from lm_eval_pruned.util.atomic import check_writable


if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lm_eval_pruned.healing.options import HealingOptions
    from lm_eval_pruned.healing.teacher import Expected
    from lm_eval_pruned.healing.text import TrainingText
    from lm_eval_pruned.pruning.record import PruneRecord

# Below the harness's logger, so that its verbosity applies.
logger = logging.getLogger("lm_eval.pruned.healing")

#: The teacher reads for at most this share of a time: a pass of it takes about a third of a step.
_SHARE_OF_TEACHER = 0.25
#: How often the loss on held text is measured, with the first; and how much of a step it takes.
_EVALUATIONS, _PASS_OF_STEP = 6, 0.35
#: What torch says of a full disk and of memory that is not there, by the words in its message.
_DISK, _MEMORY = "PytorchStreamWriter", ("not enough memory", "out of memory")


class Training:
    """Text, teacher and checkpoints of a training.

    Args:
        options: How to train.
        output: Where the result goes; checkpoints go to ``OUTPUT.checkpoints``.
        sources: Text to train on; see `training_text`.
        argument: What messages call the text.
        budget: What it may take; by default, what `options` say.
        resume: Whether to continue from the last checkpoint.

    Attributes:
        record: What was done so far.
        expected: What the teacher expects of the text, once it is known.

    Raises:
        ValueError: A source or an argument is of no use, or there is no checkpoint to resume from.
    """

    def __init__(
        self,
        options: HealingOptions,
        output: Path,
        sources: list[str],
        argument: str,
        budget: Budget | None = None,
        *,
        resume: bool = False,
    ) -> None:
        self.options = options
        self.record: dict[str, Any] = {}
        self._output, self._sources, self._argument = output, sources, argument
        self._budget = budget or Budget()
        whole = output.resolve()
        self.folder = whole.with_name(f"{whole.name}.checkpoints")
        self._last = last_checkpoint(self.folder, resume)
        self._before = (self._last and read_healing(str(self._last))) or {}
        self._arguments = options.trainer_arguments(self.folder)
        options.adapter_config(options.method)
        check_sources(sources, argument)
        self._text: TrainingText | None = None
        self.expected: Expected | None = None
        self._spent = 0.0

    def check_output(self) -> None:
        """Refuse an output that holds something else than what Ctrl-C left of this training.

        Raises:
            ValueError: It does.
        """
        from lm_eval_pruned.checkpoints.export import check_output

        if not self._replaces():
            check_output(self._output)

    def check_model(self, model: PreTrainedModel, config: Any) -> None:
        """Refuse blocks that are longer than the model's positions, and a disk without room.

        Args:
            model: The model to train, of which no weight is read.
            config: Its config.

        Raises:
            ValueError: A block is too long.
            OSError: Checkpoints have no room.
        """
        positions = getattr(config, "max_position_embeddings", None)
        length = self.options.max_length
        if positions and length > positions:
            raise ValueError(
                f"max_length={length} exceeds the {positions} positions of the model: "
                f"pass at most {positions}."
            )
        needed = 0
        method = self.options.method_for(model, self._arguments.device)
        if method in WEIGHTS:
            # The best and the last checkpoint, each with all weights and the moments of those trained,
            # and what these were at the start.
            trained = sum(p.numel() for p in trained_weights(model, method))
            every = sum(p.numel() for p in model.parameters())
            needed = 2 * (4 * every + 8 * trained) + 4 * trained
        check_writable(self.folder, needed)

    def read(
        self, tokenizer: PreTrainedTokenizerBase, limit: int | None = None
    ) -> TrainingText:
        """Read the text, of which at most `limit` tokens are trained on.

        Raises:
            ValueError: It is too short, or another than that of the checkpoint to resume from.
        """
        options = self.options
        if self._before:
            limit = self._before["data"]["limit"]
        text = training_text(
            self._sources, tokenizer, options.max_length, self._argument, limit
        )
        given = {**options.as_dict(), "data": text.about}
        check_same(self._last, self._before, given)
        if options.method is not None:
            check_same(self._last, self._before, {"method": options.method})
        self.record = {"lm_eval_pruned": version("lm-eval-pruned"), **given}
        self._text = text
        if self._before and options.teacher_weight:
            self.expected = read_expected(self.folder / "teacher")
        return text

    def listen(
        self,
        teacher: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device | None = None,
    ) -> None:
        """Read the text, and have the unpruned model say what it expects of it, on `device`.

        In a budget of time, no more text is read than the teacher reads in a quarter of it.

        Raises:
            ValueError: See `read`.
            OSError: The disk has no room.
        """
        began = time.monotonic()
        with moved(teacher, device), runnable(teacher), self._clear_errors():
            limit = self._budget.tokens
            if self._budget.seconds is not None and not self._before:
                share = _SHARE_OF_TEACHER * self._budget.seconds
                limit = int(share / self._seconds_of_token(teacher))
            text = self._text or self.read(tokenizer, limit)
            blocks = torch.cat([text.held, text.blocks])
            if self.expected is None:
                needed = bytes_expected(blocks.numel(), vocabulary_of(teacher))
                check_writable(self.folder, needed)
                self.expected = write_expected(
                    teacher,
                    blocks,
                    self.folder / "teacher",
                    self.options.temperature,
                    self._autocast,
                )
        self._spent = time.monotonic() - began

    def train(self, model: PreTrainedModel) -> Any:
        """Train a pruned model, which is changed, and complete `record`.

        It ends with the weights that were best on held text, those of the start among them, in the
        dtypes that it had.

        Returns:
            The model, in an adapter of peft where one was trained.

        Raises:
            ValueError: Another training left the checkpoint to resume from, or there is not enough memory
                for a step.
            OSError: A checkpoint cannot be written.
        """
        options, text, arguments = self.options, self._text, self._arguments
        assert text is not None
        pruned: PruneRecord = model.prune_record  # type: ignore[assignment]
        method = self._before.get("method")
        method = method or options.method_for(model, arguments.device)
        hidden_size = model.config.get_text_config().hidden_size
        arguments.learning_rate = options.learning_rate(method, hidden_size)
        given = {**options.training(), "learning_rate": arguments.learning_rate}
        self.record |= {"method": method, "training_args": given}
        self.record["pruning"] = pruned.as_dict()
        before = self._before and left_weights(self._before["pruning"])
        check_same(self._last, before, left_weights(self.record["pruning"]))
        steps = self._before.get("planned_steps")
        model.config.use_cache, used_cache = False, model.config.use_cache
        set_seed(arguments.seed)
        student: Any = model
        if (adapter := options.adapter_config(method)) is not None:
            from peft import get_peft_model

            student = get_peft_model(model, adapter)
        with (
            runnable(model),
            self._clear_errors(),
            _quiet(),
            contextlib.nullcontext() if adapter else trainable(model, method),
        ):
            records = Records(self.record, self._before.get("seconds", self._spent))
            trainer = HealingTrainer(
                options,
                [records],
                model=student,
                args=arguments,
                train_dataset=Blocks(text.blocks, self.expected, len(text.held)),
                eval_dataset=Blocks(text.held, self.expected),
            )
            rows = arguments.train_batch_size * arguments.gradient_accumulation_steps
            tokens = rows * arguments.world_size * options.max_length
            if steps is None and self._budget.tokens is not None:
                steps = max(1, self._budget.tokens // tokens)
            if steps is None and self._budget.seconds is not None:
                steps = self._steps_in_time(trainer)
            if steps is not None:
                arguments.max_steps = self.record["planned_steps"] = steps
            start = self.folder / "start.safetensors"
            if self._last is None and trainer.is_world_process_zero():
                self.folder.mkdir(parents=True, exist_ok=True)
                write_trained(student, start)
            trainer.train_from(self._last)
            self.record |= records.spent(trainer.state)
            history = trainer.state.log_history
            losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
            # Trainer compares its checkpoints with each other, not with the start.
            if not (helped := min(losses) < losses[0]):
                read_trained(student, start)
        self.record["held_loss"] = {"before": losses[0], "after": min(losses)}
        self.record["tokens_seen"] = self.record["steps"] * tokens
        self.record["teacher_seconds"] = round(self._spent, 3)
        self.record["interrupted"] = trainer.interruption.asked
        self.record["digest"] = self._digest()
        if not helped:
            logger.warning(
                "Training did not lower the loss on held text, %.3f nats, so the weights are those before "
                "it: pass a smaller learning_rate or more text.",
                losses[0],
            )
        trained = trainer.accelerator.unwrap_model(trainer.model)
        trained.eval()
        model.config.use_cache = used_cache
        self._trainer = trainer
        return trained

    def trained_whole(self, model: PreTrainedModel) -> PreTrainedModel:
        """Train a pruned model as `train`, merge what adapts it, and return it to where it was."""
        place, record = model.device, model.prune_record
        trained = self.train(model)
        if self.record["method"] in ADAPTERS:
            trained = trained.merge_and_unload()
        trained.prune_record = record
        return trained.to(place)

    @property
    def writes(self) -> bool:
        """Whether this process writes the result, as one of those of a launcher does."""
        return self._trainer.is_world_process_zero()

    def wait(self) -> None:
        """Wait for the other processes of a launcher."""
        self._trainer.accelerator.wait_for_everyone()

    @property
    def device(self) -> torch.device:
        """Where the training runs."""
        return self._arguments.device

    def sentence(self) -> str:
        """Return what a model card says of the training."""
        record, text = self.record, self.record["data"]
        loss = "distilled from the unpruned model" if record["teacher"] else "trained"
        return (
            f"The {'pruned ' * bool(record['pruning']['kept_digest'])}model was then {loss} on "
            f"{record['tokens_seen']:,} tokens of {text['file']} (SHA-256 {text['sha256']}) with "
            f"method={record['method']}."
        )

    @contextlib.contextmanager
    def replacing(self) -> Iterator[None]:
        """Remove what Ctrl-C left of this training when the block, which writes anew, succeeds."""
        replaces = self._replaces()
        yield
        if replaces:
            import shutil

            shutil.rmtree(self._output)

    def _replaces(self) -> bool:
        if self._last is None or not (self._output / HEALING).is_file():
            return False
        return bool((read_healing(str(self._output)) or {}).get("interrupted"))

    def _autocast(self) -> AbstractContextManager[Any]:
        arguments = self._arguments
        dtype = torch.bfloat16 if arguments.bf16 else torch.float16
        wanted = arguments.bf16 or arguments.fp16
        return torch.autocast(arguments.device.type, dtype, enabled=wanted)

    def _seconds_of_token(self, teacher: PreTrainedModel) -> float:
        """Return how long a pass of the teacher takes for each token: the shorter of two."""
        length, seconds = self.options.max_length, []
        block = torch.ones(1, length, dtype=torch.long, device=teacher.device)
        for _ in range(2):
            began = time.monotonic()
            with torch.no_grad(), self._autocast():
                teacher(input_ids=block, use_cache=False).logits.float().sum().item()
            seconds.append(time.monotonic() - began)
        return min(seconds) / length

    def _steps_in_time(self, trainer: HealingTrainer) -> int:
        """Return how many steps fit in the time that the teacher and the passes over held text leave."""
        assert self._budget.seconds is not None
        batch = next(iter(trainer.get_train_dataloader()))
        step = trainer.seconds_of_step(batch)
        assert self._text is not None
        passes = -(-len(self._text.held) // self._arguments.eval_batch_size)
        held = _EVALUATIONS * _PASS_OF_STEP * passes
        return max(1, int((self._budget.seconds - self._spent) / step - held))

    def _digest(self) -> str:
        """Return SHA-256 of all that decides a training, and nothing that a machine measures."""
        names = ("max_length", "teacher", "method", "training_args", "steps")
        decides = {name: self.record[name] for name in names}
        decides["training_args"] = {
            name: value
            for name, value in self.record["training_args"].items()
            if name != "use_cpu"
        }
        decides["data"] = self.record["data"]["sha256"]
        decides["pruning"] = left_weights(self.record["pruning"])
        text = json.dumps(decides, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    @contextlib.contextmanager
    def _clear_errors(self) -> Iterator[None]:
        """Turn what a full disk and too little memory raise into one sentence."""
        try:
            yield
        except (SafetensorError, OSError, RuntimeError, MemoryError) as error:
            text = str(error)
            nameless = isinstance(error, OSError) and error.errno and not error.filename
            if isinstance(error, SafetensorError) or nameless or _DISK in text:
                raise OSError(
                    f"What the training keeps cannot be written to {self.folder}: pass an output_path on "
                    "another disk, or make room; with --resume it goes on from the last complete checkpoint."
                ) from None
            if isinstance(error, OSError):
                raise
            lacks = isinstance(error, MemoryError) or any(w in text for w in _MEMORY)
            if not lacks:
                raise
            rows = self._arguments.per_device_train_batch_size
            raise ValueError(
                f"A step on {rows} blocks of {self.options.max_length} tokens needs more memory than "
                f"{self._arguments.device} has: use heal with method=lora, or with "
                "training_args=per_device_train_batch_size=1,gradient_checkpointing=true."
            ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the bars of each checkpoint that is written."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
