"""The options of a healing, and what is wrong with them before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.util.options import DeclaredOptions, option


if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from peft import LoraConfig
    from transformers import TrainingArguments

#: Defaults that differ from those of `transformers.TrainingArguments`.
TRAINING = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "logging_steps": 10,
    "num_train_epochs": 1,
    "save_steps": 100,
    "save_total_limit": 2,
}
#: By method: adapters start at zero, and tolerate a higher one than trained weights.
LEARNING_RATE = {"lora": 2e-4, "dora": 2e-4, "full": 2e-5}
#: Defaults of `peft.LoraConfig` here: every linear layer but the head.
ADAPTER = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


@dataclass(frozen=True)
class HealingOptions(DeclaredOptions):
    """How a pruned model is trained.

    Args:
        method: What to train: an adapter (lora or dora), or all weights (full).
        teacher_weight: Share of the loss that measures the distance to the unpruned model, from
            0 to 1. The rest is the loss of the next token; 0 loads no teacher.
        temperature: Distillation temperature: logits of both models are divided by it.
        max_length: Tokens of each block of text.
        max_steps: Steps of the optimiser; without it, one pass over the text.
        training_args: Further fields of transformers.TrainingArguments, such as
            learning_rate=1e-4,bf16=true,gradient_checkpointing=true,report_to=tensorboard.
        peft_args: Further fields of peft.LoraConfig; without them,
            r=16,lora_alpha=32,target_modules=all-linear.

    Raises:
        ValueError: One sentence naming an argument, its value and what would work.
    """

    method: str = option(str, "lora", "NAME", choices=tuple(LEARNING_RATE))
    teacher_weight: float = option(float, 0.0, "W")
    temperature: float = option(float, 1.0, "T")
    max_length: int = option(int, 512, "N", least=2)
    max_steps: int | None = option(int, None, "N", least=1)
    training_args: Mapping[str, Any] = option(dict, None, "KEY=VALUE,...")
    peft_args: Mapping[str, Any] = option(dict, None, "KEY=VALUE,...")

    def __post_init__(self) -> None:
        super().__post_init__()
        weight, temperature = self.teacher_weight, self.temperature
        if not 0 <= weight <= 1:
            raise ValueError(
                f"teacher_weight={weight} is not a share of the loss: pass a number from 0 to 1."
            )
        if not 0 < temperature < math.inf:
            raise ValueError(
                f"temperature={temperature} is not a distillation temperature: pass a number above 0."
            )
        if temperature != 1 and not weight:
            raise ValueError(
                f"temperature={temperature} has no effect without a teacher: add teacher_weight, or "
                "leave it out."
            )
        if self.peft_args and self.method == "full":
            raise ValueError(
                f"peft_args={written(self.peft_args)} describes an adapter, but method=full trains "
                "none: leave it out, or pass method=lora."
            )

    def trainer_arguments(self, folder: Path) -> TrainingArguments:
        """Return the arguments of `Trainer`; raise ValueError if transformers refuses one."""
        from transformers import TrainingArguments

        fixed = {"output_dir": str(folder), "max_steps": self.max_steps or -1}
        values = {**self.training(), **fixed}
        return self._made(TrainingArguments, "training_args", values)

    def training(self) -> dict[str, Any]:
        """Return the training arguments that are given, and those that differ by default."""
        rate = {"learning_rate": LEARNING_RATE[self.method]}
        return {**TRAINING, **rate, **self.training_args}

    def adapter_config(self) -> LoraConfig | None:
        """Return the adapter to train, or None; raise ValueError if peft refuses an argument."""
        from peft import LoraConfig

        if self.method == "full":
            return None
        fixed = {"use_dora": self.method == "dora", "task_type": "CAUSAL_LM"}
        values = {**ADAPTER, **self.peft_args, **fixed}
        return self._made(LoraConfig, "peft_args", values)

    def as_dict(self) -> dict[str, Any]:
        """Return what the record of a healing holds, and what a resumed one must share."""
        teacher = {"weight": self.teacher_weight, "temperature": self.temperature}
        shared = {"method": self.method, "max_length": self.max_length}
        return {**shared, "teacher": teacher if self.teacher_weight else None}

    def _made(self, kind: Any, argument: str, values: Mapping[str, Any]) -> Any:
        """Make a library's arguments of `values`; the option `argument` names some of them."""
        chosen = getattr(self, argument)
        for name, value in chosen.items():
            if values[name] != value:
                raise ValueError(
                    f"{argument} has {name}={value}, which other options of heal set: leave it "
                    "out."
                )
        try:
            return kind(**values)
        except (TypeError, ValueError, ImportError, AttributeError) as error:
            library = kind.__module__.partition(".")[0]
            raise ValueError(
                f"{argument}={written(chosen)} cannot be used ({error}): pass what "
                f"{library}.{kind.__name__} takes."
            ) from None


def written(arguments: Mapping[str, Any]) -> str:
    """Return arguments as the command line takes them."""
    return ",".join(f"{name}={value}" for name, value in arguments.items())
