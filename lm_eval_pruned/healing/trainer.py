"""`transformers.Trainer` with a teacher, and with checkpoints that say what they are of."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import kl_div, log_softmax
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from lm_eval_pruned.checkpoints.adapters import HEALING
from lm_eval_pruned.util.atomic import write_atomically


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from lm_eval_pruned.healing.options import HealingOptions


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
