"""The model type ``pruned-hf``: the harness's ``hf`` with narrowed GLU-MLPs.

A sibling of `lm_eval.models.hf_steered`. The entry point ``lm_eval.models``
registers the class, so it carries no ``@register_model``.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from lm_eval.models.huggingface import HFLM

from lm_eval_pruned.default_model import find_default_model
from lm_eval_pruned.loading import load_with_arguments
from lm_eval_pruned.model_wrappers.prefix_sharing import PrefixSharingMixin
from lm_eval_pruned.pruning import prune_model


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lm_eval_pruned.expansion import Number
    from lm_eval_pruned.pruning import PruneRecord

eval_logger = logging.getLogger("lm_eval.models.pruned_hf")


class PrunedHFLM(PrefixSharingMixin, HFLM):
    def __init__(
        self,
        pretrained: str | PreTrainedModel | None = None,
        *,
        ratio: Number | None = None,
        prune_percent: Number | None = None,
        intermediate_size: Number | None = None,
        multiple_of: Number = 1,
        criterion: str = "maw",
        seed: Number = 0,
        **kwargs: Any,
    ) -> None:
        """HFLM whose GLU-MLPs are narrowed while the model loads.

        At most one of `ratio`, `prune_percent` and `intermediate_size`; none of
        them evaluates the model unpruned.

        Args:
            pretrained: As in HFLM. If omitted, SmolLM2-135M-Instruct.
            ratio: Expansion ratio (intermediate size / hidden size) to keep, such
                as 2.0. The kept width is ``ceil(ratio * hidden_size)``.
            prune_percent: Share of neurons to remove, in percent, such as 40.
            intermediate_size: Kept width, in neurons.
            multiple_of: Round the kept width down to a multiple of this, in neurons.
            criterion: ``maw`` (alias ``ppm``), ``max_abs``, ``l1``, ``l2``, ``vow``,
                ``pon`` or ``random``; see `lm_eval_pruned.criteria`.
            seed: Seed of the criterion ``random``.
            **kwargs: Everything HFLM takes, and ``prefix_sharing`` (default true); see
                `PrefixSharingMixin`.

        Raises:
            ValueError: A size, the criterion or the model cannot be pruned as asked.
        """
        self._prune_arguments = {
            "ratio": ratio,
            "prune_percent": prune_percent,
            "intermediate_size": intermediate_size,
            "multiple_of": multiple_of,
            "criterion": criterion,
            "seed": seed,
        }
        if pretrained is None:
            default = find_default_model()
            pretrained = default.pretrained
            if default.gguf_file is not None:
                kwargs["gguf_file"] = default.gguf_file
            eval_logger.warning(
                "pretrained was not given: evaluating SmolLM2-135M-Instruct, from %s.",
                default.source,
            )
        super().__init__(pretrained, **kwargs)
        if not isinstance(pretrained, str):
            prune_model(self._model, **self._prune_arguments)
            self._prune_record: PruneRecord = self._model.prune_record
        if self.rank == 0:
            eval_logger.info("Pruning:\n%s", self._prune_record.as_table())

    def _create_model(
        self, pretrained: str, delta: str | None = None, **kwargs: Any
    ) -> None:
        auto_class = self.AUTO_MODEL_CLASS
        if delta is not None:
            # The criterion has to see the sum of the weights.
            super()._create_model(pretrained, delta=delta, **kwargs)
            prune_model(self._model, **self._prune_arguments)
            self._prune_record = self._model.prune_record
            return
        for argument in ("autogptq", "gptqmodel"):
            if kwargs.get(argument):
                raise ValueError(
                    f"{argument}={kwargs[argument]} loads quantised weights, which can be neither "
                    "ranked nor sliced: pass the unquantised checkpoint, or use --model hf."
                )
        self.AUTO_MODEL_CLASS = _PruningAutoModel(self, auto_class)
        try:
            super()._create_model(pretrained, **kwargs)
        finally:
            self.AUTO_MODEL_CLASS = auto_class

    def get_model_info(self) -> dict[str, Any]:
        """Return HFLM's model information and what was pruned, under ``pruning``."""
        return {**super().get_model_info(), "pruning": self._prune_record.as_dict()}


class _PruningAutoModel:
    """Stands in for an AutoModel class while HFLM loads through it."""

    def __init__(self, lm: PrunedHFLM, auto_class: type) -> None:
        self._lm = lm
        self._auto_class = auto_class

    def from_pretrained(self, pretrained: str, **kwargs: Any) -> PreTrainedModel:
        model = load_with_arguments(
            self._auto_class, pretrained, self._lm._prune_arguments, kwargs
        )
        self._lm._prune_record = model.prune_record
        self._lm._config = model.config
        return model
