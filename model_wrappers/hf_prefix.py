"""The model type ``hf-prefix``: the harness's ``hf``, faster and with its energy measured.

The arguments of all model types of this package are checked here. HFLM asserts some of them
without a message, hands others to code that fails far from the cause, and takes any text for true:
``trust_remote_code=off`` would run that code.
"""

from __future__ import annotations

import inspect
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
from lm_eval_pruned.model_wrappers.batching.attention_support import is_encoder_decoder
from lm_eval_pruned.model_wrappers.batching.prefix_sharing import PrefixSharingMixin
from lm_eval_pruned.model_wrappers.batching.slot_refilling import SlotRefillingMixin
from lm_eval_pruned.model_wrappers.energy_windows import WARM_UP_TOKENS, EnergyWindows
from lm_eval_pruned.model_wrappers.floors import MISMATCHED, mismatched


if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

_BACKENDS = ("default", "causal", "seq2seq")
_BATCH_SIZE = re.compile(r"auto(:[0-9]+(\.[0-9]+)?)?|0*[1-9][0-9]*")


def _is_text(value: Any) -> bool:
    return type(value) not in (bool, int, float)


_FLAGS = (
    *("add_bos_token", "energy", "load_in_4bit", "load_in_8bit", "logits_cache"),
    *("parallelize", "prefix_sharing", "slot_refilling", "truncation"),
    *("trust_remote_code", "use_fast_tokenizer", MISMATCHED),
)
_NAMES = (
    *("attn_implementation", "delta", "gguf_file", "peft", "pretrained"),
    *("subfolder", "tokenizer"),
)
_COUNTS = ("max_batch_size", "max_length", "slots")
_DTYPES = {"dtype", "mixed_precision_dtype", "softmax_dtype"}
#: Arguments over which the harness's model would stumble: names, which values they can have, and
#: what to pass.
_KINDS: tuple[tuple[Sequence[str], Callable[[Any], Any], str], ...] = (
    (_FLAGS, lambda value: value in (True, False, None), "true or false"),
    (
        _COUNTS,
        lambda value: value is None or (type(value) is int and value > 0),
        "a whole number of 1 or more",
    ),
    (_NAMES, _is_text, "a name"),
    (["device"], _is_text, "one such as cpu, or cuda:0"),
    (["backend"], _BACKENDS.__contains__, "default, causal or seq2seq"),
    (
        ["batch_size"],
        lambda value: type(value) in (int, str) and _BATCH_SIZE.fullmatch(str(value)),
        "a whole number of 1 or more, auto or auto:4",
    ),
    (
        ["quantization_config"],
        lambda value: _is_text(value) and type(value) is not str,
        "a dict, or load_in_8bit=true instead",
    ),
)


class CheckedArguments:
    """The arguments of a model type, with what is wrong with their names and values."""

    #: Names that it takes besides those in the signatures of its classes.
    more_arguments: Collection[str] = ()

    @classmethod
    def argument_names(cls) -> set[str]:
        """Return the names of all arguments but those that the model type hands on."""
        names = {*cls.more_arguments}
        for base in cls.__mro__:
            if "__init__" in vars(base):
                names |= inspect.signature(vars(base)["__init__"]).parameters.keys()
        return names - {"self", "args", "kwargs"}

    @staticmethod
    def check_values(arguments: Mapping[str, Any]) -> None:
        """Refuse values of arguments; raise ValueError for one that cannot be used."""
        for names, can_be, instead in _KINDS:
            for name in names:
                if name in arguments and not can_be(arguments[name]):
                    raise ValueError(
                        f"{name}={arguments[name]!r} is not understood: pass {instead}."
                    )
        for name in arguments.keys() & _DTYPES:
            check_dtype(name, arguments[name])

    @classmethod
    def check_arguments(cls, arguments: Mapping[str, Any]) -> None:
        """Refuse misspelt names, and values that the harness's model would stumble over.

        Raises:
            ArgumentError: A name is unknown and resembles one of `argument_names`, or a value
                cannot be used.
        """
        with argument_errors():
            if misspelling := misspelt(arguments, cls.argument_names()):
                name, near = misspelling
                raise ValueError(
                    f"{name}={arguments[name]} is not understood: did you mean {near}?"
                )
            cls.check_values(arguments)


class PrefixHFLM(
    CheckedArguments, EnergyWindows, PrefixSharingMixin, SlotRefillingMixin, HFLM
):
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
        named = {"pretrained": pretrained, MISMATCHED: mismatched_questions}
        self.check_arguments(kwargs | named)
        self._mismatched_questions = mismatched_questions
        if pretrained is None:
            pretrained = find_default_model()
        super().__init__(pretrained, *args, **kwargs)

    def _measured(self, request_type: str, requests: list, disable_tqdm: bool) -> list:
        if self._mismatched_questions:
            requests = mismatched(request_type, requests)
        return super()._measured(request_type, requests, disable_tqdm)

    def begin_evaluation(self) -> None:
        """Begin the records in the results anew."""
        super().begin_evaluation()
        self.answer_paths.clear()

    def get_model_info(self) -> dict[str, Any]:
        """Return HFLM's model information, ``energy``, and whether questions were exchanged."""
        info = super().get_model_info() | self.energy_info()
        return info | {MISMATCHED: True} if self._mismatched_questions else info

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
