"""`transformers.Trainer` with a teacher, and with checkpoints that say what they are of."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from lm_eval_pruned.checkpoints.adapters import HEALING
from lm_eval_pruned.healing.distillation import distillation_loss
from lm_eval_pruned.util.atomic import write_atomically


if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from lm_eval_pruned.healing.cost import TrainingCost
    from lm_eval_pruned.healing.options import HealingOptions


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
        weight = self._weight
        loss: Any = 0.0
        if weight == 1:
            # Next-token loss would be computed, and its gradient, to be multiplied by 0.
            outputs = model(**{k: v for k, v in inputs.items() if k != "labels"})
        else:
            loss, outputs = super().compute_loss(model, inputs, True, **more)
        distance = distillation_loss(outputs.logits, expected, self._temperature)
        loss = (1 - weight) * loss + weight * distance
        return (loss, outputs) if return_outputs else loss


class Checkpoints(TrainerCallback):
    """Writes a record into each checkpoint, and makes one when the training is interrupted."""

    def __init__(self, record: dict[str, Any], cost: TrainingCost) -> None:
        self._record, self._cost, self._stopping = record, cost, False

    def on_train_begin(self, args, state, control, **kwargs):
        """Begin to count what is spent."""
        self._cost.begin(on_gpu=args.device.type == "cuda")

    def on_step_end(self, args, state, control, **kwargs):
        """Save and stop, if that was asked for."""
        if self._stopping:
            control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        """Write the record of this step, last: a checkpoint without it is not whole."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            spent = {"steps": state.global_step} | self._cost.so_far()
            write_record(folder, self._record | spent)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the first Ctrl-C as the wish to stop; a second one interrupts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)

        def ask(number, frame) -> None:
            self._stopping = True
            signal.signal(signal.SIGINT, before)
            told = "Stopping after this step, with a checkpoint; Ctrl-C again stops at once."
            print(f"\n{told}", file=sys.stderr)

        signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write the record of a healing into the folder of its adapter."""
    text = json.dumps(record, indent=2, ensure_ascii=False)
    write_atomically(folder / HEALING, f"{text}\n")
