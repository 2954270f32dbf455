"""A model as its config describes it, without weights."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.pruning.layouts import BUILDING


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def skeleton(
    auto_class: Any, config: PretrainedConfig, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build the model that `config` describes on the meta device, without weights."""
    from transformers.initialization import no_init_weights

    with BUILDING:
        with no_init_weights(), torch.device("meta"):
            model = auto_class.from_config(
                copy.deepcopy(config), trust_remote_code=trust_remote_code
            )
        # Ties are part of the initialisation that was left out.
        model.tie_weights()
    return model
