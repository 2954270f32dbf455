"""The trainer of transformers, with the loss of a distillation, a bar, and an end by Ctrl-C."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from lm_eval_pruned.checkpoints.adapters import write_healing
from lm_eval_pruned.healing.teacher import distillation_loss


if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lm_eval_pruned.healing.options import HealingOptions
    from lm_eval_pruned.healing.teacher import Expected

# Below the harness's logger, so that its verbosity applies.
logger = logging.getLogger("lm_eval.pruned.healing")


class Blocks(torch.utils.data.Dataset):
    """Blocks of tokens, with what a teacher expects of them where there is one."""

    def __init__(self, blocks: Tensor, expected: Expected | None, first: int = 0):
        self._blocks, self._expected, self._first = blocks, expected, first

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        block = self._blocks[number]
        if self._expected is None:
            return {"input_ids": block, "labels": block}
        row = self._first + number
        return {
            "input_ids": block,
            "labels": block,
            "likeliest": torch.from_numpy(self._expected.tokens[row].copy()),
            "expected": torch.from_numpy(self._expected.log_probabilities[row].copy()),
        }


class HealingTrainer(Trainer):
    """A trainer whose loss is mixed with the distance to a teacher, if there is one."""

    def __init__(
        self, options: HealingOptions, callbacks: list[TrainerCallback], **more: Any
    ):
        self.interruption = Interruption()
        shown = [*callbacks, self.interruption, Bar()]
        super().__init__(callbacks=shown, **more)
        self.remove_callback(PrinterCallback)
        # Blocks are of one length, so that the mean of their means is the mean over tokens;
        # where the model divides by a count instead, the distance would have to as well.
        self.model_accepts_loss_kwargs = False
        self._weight, self._temperature = options.teacher_weight, options.temperature

    def train_from(self, last: Path | None) -> None:
        """Train to the end, from a checkpoint if there is one."""
        if last is not None:
            state = TrainerState.load_from_json(str(last / TRAINER_STATE_NAME))
            steps = self.args.max_steps
            if steps <= 0 and state.num_train_epochs >= self.args.num_train_epochs:
                steps = state.max_steps
            if 0 < steps <= state.global_step:
                # Trainer would take one more step.
                self.state = state
                self._load_from_checkpoint(state.best_model_checkpoint or str(last))
                return
        with self.interruption.awaited():
            self.train(resume_from_checkpoint=str(last) if last else None)

    def seconds_of_step(self, inputs: dict[str, Tensor]) -> float:
        """Return how long a step on a batch takes: the shortest of three, none of which moves a weight."""
        model: Any = self.model
        model.to(self.args.device).train()
        optimizer = self.create_optimizer()
        for group in optimizer.param_groups:
            group |= {"lr": 0.0, "weight_decay": 0.0}
        seconds = []
        for _ in range(3):
            began = time.monotonic()
            with self.accelerator.autocast():
                loss = self.compute_loss(model, self._prepare_inputs(inputs))
            self.accelerator.backward(loss)
            optimizer.step()
            model.zero_grad()
            if self.args.device.type != "cpu":
                torch.accelerator.synchronize()
            seconds.append(time.monotonic() - began)
        self.optimizer = None
        return min(seconds)

    def compute_loss(  # type: ignore[override]
        self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any
    ) -> Any:
        inputs = dict(inputs)
        likeliest, expected = (
            inputs.pop(name, None) for name in ("likeliest", "expected")
        )
        if likeliest is None:
            return super().compute_loss(model, inputs, return_outputs, **more)
        if self._weight == 1:
            outputs = model(input_ids=inputs["input_ids"])
            loss = torch.zeros((), device=outputs.logits.device)
        else:
            loss, outputs = super().compute_loss(model, inputs, True, **more)
        distance = distillation_loss(
            outputs.logits, likeliest, expected, self._temperature
        )
        loss = (1 - self._weight) * loss + self._weight * distance
        return (loss, outputs) if return_outputs else loss


class Interruption(TrainerCallback):
    """Ends a training after its step when Ctrl-C is pressed once, and at once the second time.

    The loss is then measured and a checkpoint written, as at the end.
    """

    def __init__(self) -> None:
        self.asked = False

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """Take Ctrl-C as a request while the block runs, where this process may."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: Any) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True
            logger.warning(
                "The training ends after this step and keeps what is best so far; Ctrl-C again ends it at "
                "once."
            )

        before = signal.getsignal(signal.SIGINT)
        if before is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def on_step_end(self, args, state, control, **kwargs):
        """Ask for the end."""
        if self.asked:
            control.should_evaluate = control.should_save = True
            control.should_training_stop = True


class Bar(TrainerCallback):
    """Shows on a terminal how many steps were taken, the time left and the loss on held text."""

    _bar: Any = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Begin where the training goes on."""
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit="step",
            leave=False,
            disable=None if state.is_world_process_zero else True,
        )

    def on_step_end(self, args, state, control, **kwargs):
        """Show the step."""
        self._bar.update(state.global_step - self._bar.n)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Show the loss."""
        if self._bar is not None and metrics:
            loss = metrics["eval_loss"]
            self._bar.set_postfix_str(f"{loss:.3f} nats on held text")

    def on_train_end(self, args, state, control, **kwargs):
        """Remove the bar."""
        self._bar.close()


class Records(TrainerCallback):
    """Writes a record into each checkpoint, with the seconds of training so far.

    `seconds` were spent before, up to the checkpoint that this training continues from.
    """

    def __init__(self, record: dict[str, Any], seconds: float) -> None:
        self._record, self._began = record, time.monotonic() - seconds

    def spent(self, state: TrainerState) -> dict[str, Any]:
        """Return the steps and seconds of a training, as its record holds them."""
        seconds = round(time.monotonic() - self._began, 3)
        return {"steps": state.global_step, "seconds": seconds}

    def on_save(self, args, state, control, **kwargs):
        """Write the record of this step, last: a checkpoint without it is not whole."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            write_healing(folder, self._record | self.spent(state))
