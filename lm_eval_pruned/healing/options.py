"""The options of a healing, and what is wrong with them before anything is loaded."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.util.options import DeclaredOptions, option


if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from peft import LoraConfig
    from transformers import TrainingArguments

#: Defaults that differ from those of `transformers.TrainingArguments`. Five times, the loss on held
#: text is measured and a checkpoint written.
TRAINING = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "logging_steps": 10,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "save_steps": 0.2,
}
#: Of adapters, which start at zero and tolerate a higher one; of weights by next-token loss; of
#: weights by distillation, in a model of this hidden size or a smaller one.
_ADAPTER_RATE, _NEXT_TOKEN_RATE, _DISTILLATION_RATE, _HIDDEN_SIZE = (
    2e-4,
    2e-5,
    3e-4,
    576,
)
#: Methods that train weights of the model, and those that train an adapter.
WEIGHTS, ADAPTERS = ("mlp", "full"), ("lora", "dora")
#: Weights are trained where that takes at most this share of the memory that is free.
_SHARE_OF_MEMORY = 0.7
#: Seconds and tokens by the unit of a budget.
_SECONDS, _TOKENS = {"s": 1, "m": 60, "h": 3600}, {"": 1, "k": 1_000, "M": 1_000_000}
#: Defaults of `peft.LoraConfig` here: every linear layer but the head.
ADAPTER = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


@dataclass(frozen=True)
class Budget:
    """What a distillation may take: seconds, with those of the teacher, or tokens to train on."""

    seconds: float | None = None
    tokens: int | None = None

    @classmethod
    def parsed(cls, text: str) -> Budget:
        """Read a time such as ``20m`` or ``1h``, or a number of tokens such as ``200k``.

        Raises:
            ValueError: It is neither.
        """
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhkM]?)", str(text))
        if found and float(found[1]) > 0:
            number, unit = float(found[1]), found[2]
            if unit in _SECONDS:
                return cls(seconds=number * _SECONDS[unit])
            if number * _TOKENS[unit] >= 1:
                return cls(tokens=round(number * _TOKENS[unit]))
        raise ValueError(
            f"distil={text} is neither a time nor a number of tokens: pass one such as 20m, 1h, 200k "
            "or 2M."
        )


@dataclass(frozen=True)
class HealingOptions(DeclaredOptions):
    """How a pruned model is trained.

    Args:
        method: What to train: the MLPs, which lost neurons (mlp), all weights (full), or an adapter
            (lora or dora); by default mlp where it fits in memory, else lora.
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

    method: str | None = option(
        str, None, "NAME", choices=(None, "mlp", "full", *ADAPTERS)
    )
    teacher_weight: float = option(float, 1.0, "W")
    temperature: float = option(float, 1.0, "T")
    max_length: int = option(int, 256, "N", least=2)
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
        if self.peft_args and self.method in WEIGHTS:
            raise ValueError(
                f"peft_args={written(self.peft_args)} describes an adapter, but method={self.method} "
                "trains none: leave it out, or pass method=lora."
            )

    def trainer_arguments(self, folder: Path) -> TrainingArguments:
        """Return the arguments of `Trainer`, whose checkpoints go to a folder.

        Raises:
            ValueError: transformers refuses one.
        """
        import torch
        from transformers import TrainingArguments

        fixed = {
            "output_dir": str(folder),
            "max_steps": self.max_steps or -1,
            # What is best on held text is kept.
            "eval_strategy": "steps",
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
            "save_total_limit": 2,
            "prediction_loss_only": True,
            "eval_on_start": True,
            "remove_unused_columns": False,
        }
        # Our bar shows the loss on held text.
        values = {**TRAINING, "disable_tqdm": True, **self.training_args, **fixed}
        values["eval_steps"] = values["save_steps"]
        if not torch.accelerator.is_available():
            values.setdefault("use_cpu", True)
        known = "bf16" in values or "fp16" in values
        if not known and _multiplies_bf16(on_cpu=bool(values.get("use_cpu"))):
            values["bf16"] = True
        return self._made(TrainingArguments, "training_args", values)

    def training(self) -> dict[str, Any]:
        """Return the training arguments that are given, and those that differ by default."""
        return {**TRAINING, **self.training_args}

    def learning_rate(self, method: str, hidden_size: int) -> float:
        """Return the rate that is given, or the default of a method and a size of model."""
        if method in ADAPTERS:
            rate = _ADAPTER_RATE
        elif not self.teacher_weight:
            rate = _NEXT_TOKEN_RATE
        else:
            rate = _DISTILLATION_RATE * min(1, _HIDDEN_SIZE / hidden_size)
        return float(self.training_args.get("learning_rate", rate))

    def method_for(self, model: Any, device: torch.device) -> str:
        """Return what is trained of a model on a device: `method`, or what its memory allows."""
        if self.method is not None:
            return self.method
        if self.peft_args:
            return "lora"
        from lm_eval_pruned.healing.weights import bytes_to_train
        from lm_eval_pruned.pruning.lending import free_bytes

        # Where only the device knows, it is taken to have room.
        free = free_bytes(device) or math.inf
        fits = bytes_to_train(model, "mlp") <= _SHARE_OF_MEMORY * free
        return "mlp" if fits else "lora"

    def adapter_config(self, method: str | None) -> LoraConfig | None:
        """Return the adapter that a method trains, or None; ValueError if peft refuses an argument."""
        from peft import LoraConfig

        if method in WEIGHTS:
            return None
        fixed = {"use_dora": method == "dora", "task_type": "CAUSAL_LM"}
        values = {**ADAPTER, **self.peft_args, **fixed}
        return self._made(LoraConfig, "peft_args", values)

    def as_dict(self) -> dict[str, Any]:
        """Return what the record of a healing holds, and what a resumed one must share."""
        teacher = {"weight": self.teacher_weight, "temperature": self.temperature}
        shared: dict[str, Any] = {"max_length": self.max_length}
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


def _multiplies_bf16(*, on_cpu: bool) -> bool:
    """Tell whether the device that trains has instructions that multiply matrices of bfloat16."""
    import torch

    if not on_cpu and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = torch.cpu.get_capabilities()
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))


def written(arguments: Mapping[str, Any]) -> str:
    """Return arguments as the command line takes them."""
    return ",".join(f"{name}={value}" for name, value in arguments.items())
