"""What may be said about a healing, and what is wrong with it before anything is loaded."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from peft import LoraConfig
    from transformers import TrainingArguments

#: What is trained: two kinds of adapter, or every weight.
METHODS = ("lora", "dora", "full")
#: Defaults that differ from those of `transformers.TrainingArguments`.
TRAINING = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "logging_steps": 10,
    "num_train_epochs": 1,
    "save_steps": 100,
    "save_total_limit": 2,
}
#: Adapters start at zero and bear a higher rate than weights that were trained before.
LEARNING_RATE = {"lora": 2e-4, "dora": 2e-4, "full": 2e-5}
#: Defaults of `peft.LoraConfig` here: every linear layer but the head.
ADAPTER = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
#: Fields of both libraries that are options of their own, or have no meaning here, with advice.
_TAKEN = {
    "output_dir": "pass output_path",
    "max_steps": "pass max_steps as an option of its own",
    "resume_from_checkpoint": "pass resume",
    "do_eval": "evaluate the adapter with lm_eval",
    "eval_strategy": "evaluate the adapter with lm_eval",
    "use_dora": "pass method=dora",
    "task_type": "leave it out",
}
_EXPECTED = {
    str: "a name",
    int: "a whole number",
    float: "a number",
    dict: "a mapping, or text such as key=value,key=value",
}


def _option(kind: type, default: Any, metavar: str, about: str) -> Any:
    """Declare an option: what a value must be, its default, and how ``--help`` shows it."""
    shown = {"kind": kind, "metavar": metavar, "help": about}
    if kind is dict:
        return field(default_factory=dict, metadata=shown)
    return field(default=default, metadata=shown)


@dataclass(frozen=True)
class HealingOptions:
    """How a pruned model is trained.

    Args:
        method: ``lora`` or ``dora``: an adapter is trained, every weight stays as it is.
            ``full``: all weights are trained.
        teacher_weight: Share of the loss that measures the distance to the unpruned model;
            the rest is the loss of the next token. 0 loads no teacher.
        temperature: By which the logits of both models are divided before they are compared.
        max_length: Tokens of each block of text.
        max_steps: Steps of the optimiser; default: until the text was seen once.
        training_args: Further fields of `transformers.TrainingArguments`.
        peft_args: Further fields of `peft.LoraConfig`.

    Raises:
        ValueError: One sentence naming an argument, its value and what would work.

    Example:
        >>> HealingOptions(teacher_weight=1.5)
        Traceback (most recent call last):
            ...
        ValueError: teacher_weight=1.5 is no share of the loss: pass a number from 0 to 1.
    """

    method: str = _option(
        *(str, "lora", "NAME"),
        "what is trained: the adapters lora or dora, or full, all weights (default: lora)",
    )
    teacher_weight: float = _option(
        *(float, 0.0, "W"),
        "share of the loss that is the distance to the unpruned model, from 0 to 1 (default: 0, "
        "next-token loss alone)",
    )
    temperature: float = _option(
        float, 1.0, "T", "what the logits of both are divided by (default: 1)"
    )
    max_length: int = _option(
        int, 512, "N", "tokens of each block of text (default: 512)"
    )
    max_steps: int | None = _option(
        *(int, None, "N"),
        "steps of the optimiser (default: until the text was seen once)",
    )
    training_args: Mapping[str, Any] = _option(
        *(dict, None, "KEY=VALUE,..."),
        "further fields of transformers.TrainingArguments, such as "
        "learning_rate=1e-4,bf16=true,gradient_checkpointing=true,report_to=tensorboard",
    )
    peft_args: Mapping[str, Any] = _option(
        *(dict, None, "KEY=VALUE,..."),
        "further fields of peft.LoraConfig (default: "
        "r=16,lora_alpha=32,target_modules=all-linear)",
    )

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            why = f"method={self.method} is unknown: pass one of {', '.join(METHODS)}"
        elif not 0 <= self.teacher_weight <= 1:
            why = (
                f"teacher_weight={self.teacher_weight} is no share of the loss: pass a number "
                "from 0 to 1"
            )
        elif not 0 < self.temperature < float("inf"):
            why = (
                f"temperature={self.temperature} divides logits: pass a number above 0"
            )
        elif self.temperature != 1 and self.teacher_weight == 0:
            why = (
                f"temperature={self.temperature} compares the model with a teacher, but there is "
                "none: add teacher_weight, or leave it out"
            )
        elif self.max_length < 2:
            why = f"max_length={self.max_length} is too small: pass a whole number of 2 or more"
        elif self.max_steps is not None and self.max_steps < 1:
            why = f"max_steps={self.max_steps} is too small: pass a whole number of 1 or more"
        elif self.peft_args and self.method == "full":
            why = (
                f"peft_args={written(self.peft_args)} describes an adapter, but method=full "
                "trains none: leave it out, or pass method=lora"
            )
        else:
            return
        raise ValueError(f"{why}.")

    @classmethod
    def of(cls, given: Mapping[str, Any], where: str) -> HealingOptions:
        """Return the options that a mapping holds, as YAML or ``KEY=VALUE,...`` has them.

        Args:
            given: Values by the names of the options. Those that are mappings may be text.
            where: What holds them, for messages.

        Raises:
            ValueError: A name is unknown, or a value of no use.
        """
        values = {}
        for name, value in given.items():
            if name not in DECLARED:
                near = difflib.get_close_matches(str(name), DECLARED, 1)
                hint = (
                    f"did you mean {near[0]}?"
                    if near
                    else f"known: {', '.join(DECLARED)}."
                )
                raise ValueError(f"{where} has the unknown key {name}: {hint}")
            kind = DECLARED[name].metadata["kind"]
            try:
                values[name] = _of_kind(kind, value)
            except (TypeError, ValueError):
                raise ValueError(
                    f"{where} has {name}={value}: pass {_EXPECTED[kind]}."
                ) from None
        return cls(**values)

    def trainer_arguments(self, folder: Path) -> TrainingArguments:
        """Return what `transformers.Trainer` is told, its checkpoints being in `folder`.

        Raises:
            ValueError: A training argument is unknown, taken or out of range.
        """
        from transformers import TrainingArguments

        example = "training_args", "learning_rate=1e-4"
        own = {"output_dir": str(folder), "max_steps": self.max_steps or -1}
        return _made(
            TrainingArguments, *example, self.training_args, self.training() | own
        )

    def training(self) -> dict[str, Any]:
        """Return the training arguments that are given, and those that differ by default."""
        rate = {"learning_rate": LEARNING_RATE[self.method]}
        return {**TRAINING, **rate, **self.training_args}

    def adapter_config(self) -> LoraConfig | None:
        """Return the adapter to train; None where all weights are trained.

        Raises:
            ValueError: An argument of the adapter is unknown, taken or out of range.
        """
        from peft import LoraConfig

        if self.method == "full":
            return None
        own = {"use_dora": self.method == "dora", "task_type": "CAUSAL_LM"}
        every = {**ADAPTER, **self.peft_args, **own}
        return _made(LoraConfig, "peft_args", "r=32", self.peft_args, every)

    def as_dict(self) -> dict[str, Any]:
        """Return what the record of a healing holds, and what a resumed one must share."""
        teacher = {"weight": self.teacher_weight, "temperature": self.temperature}
        return {
            "method": self.method,
            "max_length": self.max_length,
            "teacher": teacher if self.teacher_weight else None,
        }


#: The options by name.
DECLARED = {each.name: each for each in fields(HealingOptions)}


def _of_kind(kind: type, value: Any) -> Any:
    """Return a value as its option has it; texts become what they spell.

    Raises:
        TypeError: It is of another kind.
        ValueError: A text does not spell one of this kind.
    """
    from lm_eval.utils import handle_arg_string, simple_parse_args_string

    if kind is dict:
        if isinstance(value, str) and not value.lstrip().startswith("{"):
            return simple_parse_args_string(value)
        # YAML takes 1e-4 for a text.
        return {
            str(name): handle_arg_string(each) if isinstance(each, str) else each
            for name, each in dict(
                json.loads(value) if isinstance(value, str) else value
            ).items()
        }
    if isinstance(value, bool) or (kind is int and isinstance(value, float)):
        raise TypeError
    return kind(value)


def written(arguments: Mapping[str, Any]) -> str:
    """Return arguments as the command line takes them."""
    return ",".join(f"{name}={value}" for name, value in arguments.items())


def _made(
    kind: Any,
    argument: str,
    example: str,
    given: Mapping[str, Any],
    every: dict[str, Any],
) -> Any:
    """Make the arguments of a library.

    Args:
        kind: Data class of `transformers` or `peft`.
        argument: Name of the option that has some of its fields.
        example: One of them with a value, for messages.
        given: What the option has.
        every: The same and all others.

    Raises:
        ValueError: A field is unknown or taken, or a value out of range.
    """
    names = {each.name for each in fields(kind) if each.init}
    for name, value in given.items():
        if name in _TAKEN:
            raise ValueError(
                f"{argument} has {name}={value}, which is not settled there: {_TAKEN[name]}."
            )
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            raise ValueError(
                f"{argument} has {name}={value}, which {kind.__name__} does not know: pass "
                f"{f'{near[0]}=...' if near else f'one of its fields, such as {example}'}."
            )
    try:
        return kind(**every)
    except (TypeError, ValueError, ImportError, AttributeError) as error:
        library = kind.__module__.partition(".")[0]
        raise ValueError(
            f"{argument}={written(given)} cannot be used ({error}): pass what "
            f"{library}.{kind.__name__} takes."
        ) from None
