"""The model type ``hf-prefix``: the harness's ``hf`` with shared prefixes and refilled slots."""

from __future__ import annotations

from lm_eval.models.huggingface import HFLM

from lm_eval_pruned.model_wrappers.batching.prefix_sharing import PrefixSharingMixin
from lm_eval_pruned.model_wrappers.batching.slot_refilling import SlotRefillingMixin


class PrefixHFLM(PrefixSharingMixin, SlotRefillingMixin, HFLM):
    """HFLM that computes what requests have in common once.

    Takes HFLM's arguments, ``prefix_sharing`` and ``slot_refilling``; see
    `PrefixSharingMixin` and `SlotRefillingMixin`.
    """
