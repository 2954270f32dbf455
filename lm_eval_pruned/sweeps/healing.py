"""Configurations of a sweep that are trained again, and evaluated before and after."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.checkpoints.planning import SOURCE_ARGUMENTS
from lm_eval_pruned.healing.options import ADAPTER, HealingOptions
from lm_eval_pruned.pruning.arguments import PruneArguments
from lm_eval_pruned.sweeps.folder import lock


if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lm_eval_pruned.pruning.calibration import Text

#: What the id of a healed configuration ends in.
SUFFIX = "_healed"
#: Arguments of the model type that decide which weights are trained, or are refused there.
_LOADING = frozenset(
    {"pretrained", "dtype", "quantization_config", "peft", *SOURCE_ARGUMENTS}
    | {each.name for each in fields(PruneArguments)}
)
#: Arguments of the model type that change weights or tokens in ways that a training cannot.
_REFUSED = ("delta", "tokenizer", "autogptq", "gptqmodel")
#: Training arguments that change no weight, so that a training may go on under others.
_HOW = (
    *("report_to", "run_name", "save_steps", "save_strategy", "save_total_limit"),
    *("logging_steps", "logging_strategy", "logging_first_step", "logging_dir"),
    *("disable_tqdm", "log_level", "use_cpu"),
)


@dataclass(frozen=True)
class SweepHealing:
    """How the configurations of a sweep are trained.

    Attributes:
        data: File of the text.
        texts: What it holds.
        sha256: SHA-256 of it.
        options: How to train on it.
    """

    data: str
    texts: list[Text] = field(repr=False)
    sha256: str
    options: HealingOptions

    @classmethod
    def of(cls, asked: Mapping[str, Any]) -> SweepHealing:
        """Return what the options of a sweep ask for under ``heal``.

        Raises:
            ValueError: An option is unknown or of no use, the text cannot be read, or the
                sweep evaluates in a way that has no adapters.
        """
        given = dict(asked["heal"])
        data = given.pop("data", None)
        if data is None:
            raise ValueError(
                "heal has no text to train on: add data=FILE.jsonl, one such as "
                "lm-eval-pruned heal takes as --data."
            )
        options = HealingOptions.of(given, "heal")
        if options.method == "full":
            raise ValueError(
                "heal has method=full, which leaves a checkpoint that no longer says what was "
                "pruned: pass method=lora or method=dora."
            )
        model = asked.get("model", "pruned-hf")
        if model != "pruned-hf":
            raise ValueError(
                f"heal trains what pruned-hf evaluates, but the sweep has model={model}: leave "
                "model out, or train with lm-eval-pruned heal and pass lora_local_path."
            )
        if asked.get("ray"):
            raise ValueError(
                "heal keeps its adapters in the folder of the sweep, which the workers of ray "
                "need not see: leave out one of the two, or share the sweep out with --shard."
            )
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            raise ValueError(
                f"heal trains in the process of the sweep, but WORLD_SIZE="
                f"{os.environ['WORLD_SIZE']} announces several: start the sweep without a "
                "launcher."
            )
        from lm_eval_pruned.healing.text import digest_of, texts_of

        return cls(str(data), texts_of(str(data)), digest_of(str(data)), options)

    def definition(self) -> dict[str, Any]:
        """Return what decides the weights that come out, beside the model."""
        training = {
            name: value
            for name, value in self.options.training().items()
            if name not in _HOW
        }
        return {
            **self.options.as_dict(),
            "data": {"sha256": self.sha256, "texts": len(self.texts)},
            "max_steps": self.options.max_steps,
            "training_args": training,
            "peft_args": {**ADAPTER, **self.options.peft_args},
        }

    def check(self, model_args: Mapping[str, Any], place: Path) -> None:
        """Refuse a training that cannot be, before a model is loaded.

        Args:
            model_args: From `training_arguments`.
            place: Where the adapter will be.

        Raises:
            ValueError: An argument or the text is of no use to the model.
            UnsupportedModelError: The model cannot be pruned, or has an encoder.
            OSError: The model's config or tokenizer cannot be read.
        """
        from lm_eval_pruned.healing.run import checkpoints_of, prepare

        prepare(
            dict(model_args), self.data, self.texts, self.options, checkpoints_of(place)
        )

    def train(
        self, model_args: Mapping[str, Any], place: Path, device: str | None
    ) -> None:
        """Train an adapter, unless it is there; go on from the last checkpoint of it.

        Another process that trains the same one is waited for.

        Args:
            model_args: From `training_arguments`.
            place: Folder of the adapter, which appears whole.
            device: Where the sweep evaluates.

        Raises:
            KeyboardInterrupt: The training was stopped by hand, with a checkpoint.
            Exception: Whatever the training raised.
        """
        from lm_eval_pruned.healing.run import checkpoints_of, heal

        place.parent.mkdir(parents=True, exist_ok=True)
        with lock(place.with_name(f".{place.name}.lock"), wait=True):
            for dead in place.parent.glob(f".{place.name}.unfinished-*"):
                shutil.rmtree(dead, ignore_errors=True)
            if not place.is_dir():
                healed = heal(
                    dict(model_args),
                    self.data,
                    place,
                    self._on(device),
                    resume=None,
                )
                if not healed.finished:
                    raise KeyboardInterrupt
            shutil.rmtree(checkpoints_of(place), ignore_errors=True)

    def _on(self, device: str | None) -> HealingOptions:
        if device != "cpu":
            return self.options
        training = {"use_cpu": True, **self.options.training_args}
        return replace(self.options, training_args=training)


def training_arguments(model: str, model_args: Mapping[str, Any]) -> dict[str, Any]:
    """Return those arguments of a model type that a training loads its model with.

    Args:
        model: The model type.
        model_args: Its arguments. What only evaluations know, such as ``energy``, is left
            out.

    Raises:
        ValueError: One of them changes what is evaluated, and a training has no such thing.
    """
    from lm_eval.api.registry import get_model

    for name in _REFUSED:
        if model_args.get(name) is not None:
            raise ValueError(
                f"model_args has {name}={model_args[name]}, with which heal does not train: leave "
                "one of the two out."
            )
    declared = get_model(model).argument_names()  # type: ignore[attr-defined]
    return {
        name: value
        for name, value in model_args.items()
        if name in _LOADING or name not in declared
    }
