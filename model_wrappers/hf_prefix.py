"""The model type ``hf-prefix``: the harness's ``hf``, faster and with its energy measured.

The arguments of all model types of this package are checked here. HFLM asserts some of them
without a message, hands others to code that fails far from the cause, and takes any text for true:
``trust_remote_code=off`` would run that code.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM

from lm_eval_pruned.checkpoints.configs import (
    argument_errors,
    check_dtype,
    misspelt,
)
from lm_eval_pruned.checkpoints.default_model import find_default_model
from lm_eval_pruned.checkpoints.planning import SOURCE_ARGUMENTS
from lm_eval_pruned.model_wrappers.batching.attention_support import is_encoder_decoder
from lm_eval_pruned.model_wrappers.batching.fast_path import check_count, check_flag
from lm_eval_pruned.model_wrappers.batching.prefix_sharing import PrefixSharingMixin
from lm_eval_pruned.model_wrappers.batching.slot_refilling import SlotRefillingMixin
from lm_eval_pruned.model_wrappers.energy_windows import WARM_UP_TOKENS, EnergyWindows
from lm_eval_pruned.model_wrappers.mismatched_questions import (
    ARGUMENT,
    mismatched,
    refuse_others,
)


if TYPE_CHECKING:
    from collections.abc import Mapping

    from lm_eval.api.instance import Instance

eval_logger = logging.getLogger("lm_eval.models.pruned")

_FLAGS = (
    "add_bos_token",
    "energy",
    "load_in_4bit",
    "load_in_8bit",
    "logits_cache",
    "parallelize",
    "prefix_sharing",
    "slot_refilling",
    "truncation",
    "trust_remote_code",
    "use_fast_tokenizer",
    ARGUMENT,
)
_COUNTS = ("max_batch_size", "max_length", "slots")
_TEXTS = (
    "attn_implementation",
    "delta",
    "device",
    "gguf_file",
    "peft",
    "pretrained",
    "subfolder",
    "tokenizer",
)
_DTYPES = ("dtype", "mixed_precision_dtype", "softmax_dtype")
_BATCH_SIZE = re.compile(r"auto(:[0-9]+(\.[0-9]+)?)?|0*[1-9][0-9]*")


def check_values(arguments: Mapping[str, Any]) -> None:
    """Refuse values of arguments that the harness's model would stumble over.

    Raises:
        ValueError: A value cannot be used.
    """
    for name, value in arguments.items():
        if name in _FLAGS and value is not None:
            check_flag(name, value)
        elif name in _COUNTS:
            check_count(name, value)
        elif name in _DTYPES:
            check_dtype(name, value)
        elif (expected := _expected_instead(name, value)) is not None:
            raise ValueError(f"{name}={value} is not understood: pass {expected}.")


class PrefixHFLM(EnergyWindows, PrefixSharingMixin, SlotRefillingMixin, HFLM):
    check_values = staticmethod(check_values)

    def __init__(
        self,
        pretrained: Any = None,
        *args: Any,
        mismatched_questions: bool = False,
        **kwargs: Any,
    ) -> None:
        """HFLM that computes what requests have in common once, and measures its energy.

        Args:
            pretrained: As in HFLM. If omitted, SmolLM2-135M-Instruct.
            *args: As in HFLM.
            mismatched_questions: Score each document's answers after the question of another
                document of its task. The scores are a floor: what this model scores without
                reading the question. `compare` takes such results for nothing else.
            **kwargs: As in HFLM, and those of `EnergyWindows`, `PrefixSharingMixin` and
                `SlotRefillingMixin`.

        Raises:
            ValueError: The name of an argument is misspelt, or its value cannot be used.
        """
        named = {"pretrained": pretrained, ARGUMENT: mismatched_questions}
        check_arguments(type(self), kwargs | named)
        self._mismatched_questions = mismatched_questions
        super().__init__(given_or_default(pretrained), *args, **kwargs)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Score answers as `HFLM` does, after another document's question if that was asked for."""
        if self._mismatched_questions:
            requests = mismatched(requests)
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Score whole texts as `HFLM` does."""
        if self._mismatched_questions:
            refuse_others(requests)
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def generate_until(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[str]:
        """Answer prompts as `HFLM` does."""
        if self._mismatched_questions:
            refuse_others(requests)
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def begin_evaluation(self) -> None:
        """Begin the records in the results anew."""
        super().begin_evaluation()
        self.answer_paths.clear()

    def get_model_info(self) -> dict[str, Any]:
        """Return HFLM's model information, ``energy``, and whether questions were exchanged."""
        info = super().get_model_info() | self.energy_info()
        return info | {ARGUMENT: True} if self._mismatched_questions else info

    def barrier(self) -> None:
        """Wait for all processes, as the harness does after each type of request; end its windows."""
        super().barrier()
        if self._energy is not None and self.world_size > 1:
            used = self.gather_object(self._energy.take(), dst=0)
            if self.rank == 0:
                self._energy.add(used)

    def _runs_on_gpu(self) -> bool:
        return bool(self._accelerators())

    def _first_pass(self) -> None:
        size = (1, min(WARM_UP_TOKENS, self.max_length))
        tokens = torch.ones(size, dtype=torch.long, device=self.device)
        decoded = tokens if is_encoder_decoder(self) else None
        self._model_call(tokens, attn_mask=decoded, labels=decoded)

    def _accelerators(self) -> set[torch.device]:
        devices = {parameter.device for parameter in self.model.parameters()}
        return {device for device in devices if device.type not in ("cpu", "meta")}

    def _wait_for_accelerators(self) -> None:
        for device in self._accelerators():
            torch.accelerator.synchronize(device)

    def _detect_batch_size(self, *args: Any, **kwargs: Any) -> int:
        with self._set_up("batch_size_search"):
            return super()._detect_batch_size(*args, **kwargs)

    @classmethod
    def argument_names(cls) -> set[str]:
        """Return the names of all arguments but those that HFLM hands on to transformers."""
        return argument_names(cls)


def check_arguments(model_type: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse misspelt names, and values that the harness's model would stumble over.

    Raises:
        ArgumentError: A name is unknown and resembles one of the ``argument_names()`` of
            `model_type`, or a value cannot be used.
    """
    with argument_errors():
        misspelling = misspelt(
            arguments, model_type.argument_names(), lambda: _config(arguments)
        )
        if misspelling is not None:
            name, near = misspelling
            raise ValueError(
                f"{name}={arguments[name]} is not understood: did you mean {near}?"
            )
        model_type.check_values(arguments)


def _expected_instead(name: str, value: Any) -> str | None:
    """Return what to pass for an argument; None if `value` will do."""
    if name in _TEXTS and isinstance(value, (bool, int, float)):
        return "one such as cpu, or cuda:0" if name == "device" else "a name"
    if name == "backend" and value not in ("default", "causal", "seq2seq"):
        return "default, causal or seq2seq"
    if name == "batch_size":
        known = type(value) in (int, str) and _BATCH_SIZE.fullmatch(str(value))
        return None if known else "a whole number of 1 or more, auto or auto:4"
    if name == "quantization_config" and isinstance(value, (str, int, float)):
        return "a dict, or load_in_8bit=true instead"
    return None


def argument_names(model_type: type) -> set[str]:
    """Return the names of the arguments of a model type, without those that it passes on."""
    return {
        name
        for base in model_type.__mro__
        if "__init__" in vars(base)
        for name in inspect.signature(vars(base)["__init__"]).parameters
    } - {"self", "args", "kwargs"}


def given_or_default(pretrained: Any) -> Any:
    """Return `pretrained`; if it is None the default model."""
    if pretrained is not None:
        return pretrained
    default = find_default_model()
    eval_logger.warning(
        "pretrained was not given: evaluating SmolLM2-135M-Instruct, from %s.",
        default.source,
    )
    return default.pretrained


def _config(arguments: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    pretrained = arguments.get("pretrained")
    if not isinstance(pretrained, (str, os.PathLike)):
        return getattr(pretrained, "config", None)
    source = {n: arguments[n] for n in SOURCE_ARGUMENTS if arguments.get(n)}
    return AutoConfig.from_pretrained(pretrained, **source)
