"""The model type ``hf-prefix``: the harness's ``hf`` with shared prefixes and refilled slots."""

from __future__ import annotations

from typing import Any

from lm_eval.models.huggingface import HFLM

from lm_eval_pruned.model_wrappers.batching.prefix_sharing import PrefixSharingMixin
from lm_eval_pruned.model_wrappers.batching.slot_refilling import SlotRefillingMixin
from lm_eval_pruned.model_wrappers.hf_arguments import (
    argument_names,
    check_arguments,
    given_or_default,
)


class PrefixHFLM(PrefixSharingMixin, SlotRefillingMixin, HFLM):
    def __init__(self, pretrained: Any = None, *args: Any, **kwargs: Any) -> None:
        """HFLM that computes what requests have in common once.

        Args:
            pretrained: As in HFLM. If omitted, SmolLM2-135M-Instruct.
            *args: As in HFLM.
            **kwargs: As in HFLM, ``prefix_sharing`` and ``slot_refilling``; see
                `PrefixSharingMixin` and `SlotRefillingMixin`.

        Raises:
            ValueError: The name of an argument is misspelt, or its value cannot be used.
        """
        check_arguments(type(self), {**kwargs, "pretrained": pretrained})
        super().__init__(given_or_default(pretrained), *args, **kwargs)

    @classmethod
    def argument_names(cls) -> set[str]:
        """Return the names of all arguments but those that HFLM hands on to transformers."""
        return argument_names(cls)
