"""With which of transformers' Auto classes a model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import PretrainedConfig


def auto_class_for(config: PretrainedConfig) -> Any:
    """Choose the Auto class as `lm_eval.models.huggingface.HFLM` does by default.

    It goes by a list of model types, which holds encoder-decoders and more: models
    that hear, for example, have no decoder apart from an encoder of text.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )

    if config.model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForSeq2SeqLM
    return AutoModelForCausalLM
