"""Configurations of a sweep that are trained again, and evaluated before and after."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from lm_eval.api.registry import get_model

from lm_eval_pruned.checkpoints.planning import SOURCE_ARGUMENTS
from lm_eval_pruned.healing.options import ADAPTER, HealingOptions
from lm_eval_pruned.healing.run import checkpoints_of, heal, prepare
from lm_eval_pruned.healing.text import digest_of, texts_of
from lm_eval_pruned.pruning.arguments import DECLARED
from lm_eval_pruned.sweeps.options import refuse_ray


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

#: Arguments of the model type that decide which weights are trained, or are refused there.
_LOADING = {
    *("pretrained", "dtype", "quantization_config", "peft"),
    *SOURCE_ARGUMENTS,
    *DECLARED,
}
#: Training arguments that change no weight, so that a resumed training may have others.
_HOW = (
    *("report_to", "run_name", "save_steps", "save_strategy", "save_total_limit"),
    *("logging_steps", "logging_strategy", "logging_first_step", "logging_dir"),
    *("disable_tqdm", "log_level", "use_cpu"),
)


class SweepHealing:
    """How the `pruned` configurations of a sweep with the option ``heal`` are trained."""

    def __init__(self, asked: Mapping[str, Any], pruned: Sequence[Any]) -> None:
        given = dict(asked["heal"])
        data, model = given.pop("data", None), asked.get("model", "pruned-hf")
        wrong = {
            "heal has no text to train on: add data=FILE.jsonl.": data is None,
            "heal has method=full, which leaves a checkpoint that no longer says what was pruned: "
            "pass method=lora or method=dora.": given.get("method") == "full",
            f"heal trains what pruned-hf evaluates, but the sweep has model={model}: leave model "
            "out, or train with lm-eval-pruned heal and pass lora_local_path.": model
            != "pruned-hf",
            "heal trains pruned models, but the sweep has none: add sizes such as "
            "--prune_percents 20 40.": not pruned,
        }
        for message in (message for message, applies in wrong.items() if applies):
            raise ValueError(message)
        refuse_ray("heal", asked)
        self._options = HealingOptions.of(given, "heal")
        self._data = str(data)
        self._texts, self._sha256 = texts_of(self._data), digest_of(self._data)

    def definition(self) -> dict[str, Any]:
        """Return what decides the weights that come out, beside the model."""
        options, training = self._options, self._options.training().items()
        return {
            **options.as_dict(),
            "data": {"sha256": self._sha256, "texts": len(self._texts)},
            "max_steps": options.max_steps,
            "training_args": {k: v for k, v in training if k not in _HOW},
            "peft_args": {**ADAPTER, **options.peft_args},
        }

    def check(self, model_args: Mapping[str, Any], place: Path) -> None:
        """Refuse a training to `place` that cannot be, before a model is loaded."""
        texts, place = self._texts, checkpoints_of(place)
        prepare(dict(model_args), self._data, texts, self._options, place)

    def train(
        self, model_args: Mapping[str, Any], place: Path, device: str | None
    ) -> None:
        """Train an adapter to `place`, or wait for a process that does, unless it is there.

        KeyboardInterrupt if someone stopped the training, of which a checkpoint is left.
        """
        options = self._options
        if device == "cpu":
            on_cpu = {"use_cpu": True, **options.training_args}
            options = replace(options, training_args=on_cpu)
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.with_name(f".{place.name}.lock")):
            for dead in place.parent.glob(f".{place.name}.unfinished-*"):
                shutil.rmtree(dead, ignore_errors=True)
            if not place.is_dir():
                healed = heal(dict(model_args), self._data, place, options, resume=None)
                if not healed.finished:
                    raise KeyboardInterrupt
            shutil.rmtree(checkpoints_of(place), ignore_errors=True)


def training_arguments(model: str, model_args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a model type without those that only evaluations know.

    ValueError for one that changes what is evaluated, which a training does not know.
    """
    for name in ("delta", "tokenizer", "autogptq", "gptqmodel"):
        if model_args.get(name) is not None:
            raise ValueError(
                f"model_args has {name}={model_args[name]}, which heal cannot train with: leave one of "
                "the two out."
            )
    evaluating = get_model(model).argument_names() - _LOADING  # type: ignore[attr-defined]
    return {k: v for k, v in model_args.items() if k not in evaluating}
