"""The model type ``hf-prefix``: the harness's ``hf`` with shared prefixes."""

from __future__ import annotations

from lm_eval.models.huggingface import HFLM

from lm_eval_pruned.model_wrappers.prefix_sharing import PrefixSharingMixin


class PrefixHFLM(PrefixSharingMixin, HFLM):
    """HFLM that computes what log-likelihood requests have in common once.

    Takes HFLM's arguments and ``prefix_sharing``; see `PrefixSharingMixin`.
    """
