"""The model type ``pruned-hf``: the harness's ``hf`` with narrowed GLU-MLPs.

A sibling of `lm_eval.models.hf_steered`. The entry point ``lm_eval.models``
registers the class, so it carries no ``@register_model``.
"""

from __future__ import annotations

import logging
import os
import re
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.util.garbage import without_collections


with without_collections():
    from lm_eval.models.huggingface import HFLM

    from lm_eval_pruned.checkpoints.adapters import STAGES, check_adapter, merged
    from lm_eval_pruned.checkpoints.damage import check_config, clear_config_errors
    from lm_eval_pruned.checkpoints.default_model import find_default_model
    from lm_eval_pruned.checkpoints.load import load_with_arguments
    from lm_eval_pruned.checkpoints.parallel import check_divisible
    from lm_eval_pruned.checkpoints.request import Request
    from lm_eval_pruned.model_wrappers.batching.answer_paths import AnswerPaths
    from lm_eval_pruned.model_wrappers.batching.prefix_sharing import PrefixSharingMixin
    from lm_eval_pruned.model_wrappers.batching.slot_refilling import SlotRefillingMixin
    from lm_eval_pruned.model_wrappers.energy_logging import EnergyLoggingHFLM
    from lm_eval_pruned.model_wrappers.hf_arguments import check_hf_arguments
    from lm_eval_pruned.pruning.slicing import prune_model


if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from lm_eval_pruned.pruning.plan import Layers, Number
    from lm_eval_pruned.pruning.record import PruneRecord
    from lm_eval_pruned.pruning.scores import KnownScores

eval_logger = logging.getLogger("lm_eval.models.pruned_hf")


class PrunedHFLM(EnergyLoggingHFLM, PrefixSharingMixin, SlotRefillingMixin, HFLM):
    # HFLM's, which sets them in ways that a type checker does not follow.
    AUTO_MODEL_CLASS: Any
    _model: Any

    _prune_record: PruneRecord

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
        layers: Layers | None = None,
        skip_layers: Layers | None = None,
        calibration: str | None = None,
        calibration_samples: Number | None = None,
        peft: str | None = None,
        peft_stage: str | None = None,
        quantization_config: dict[str, Any] | None = None,
        known_scores: KnownScores | None = None,
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
                ``pon`` or ``random``, the calibrated ``maw_act`` and ``act``, or one
                that another package declares; see `lm_eval_pruned.criteria`.
            seed: Seed of the criterion ``random``.
            layers: Layers to prune, such as ``4-11``, ``0+4-11`` or ``[0,4]``, counted
                from 0; default: all. The command line takes a bare comma for the end
                of the argument; Python and YAML may write ``0,4-11``.
            skip_layers: Layers to leave as they are, instead of `layers`.
            calibration: JSON Lines file of text for ``maw_act`` and ``act``; see
                `lm_eval_pruned.pruning.calibration`. There is no default text.
            calibration_samples: How many of its texts to use; default: all.
            peft: As in HFLM.
            peft_stage: ``after`` (default): `peft` was trained on the pruned model and
                is applied to it. ``before``: it was trained on the full model, is
                merged into it, and the result is pruned in memory.
            quantization_config: How to quantise the pruned weights as they are loaded,
                as the dict of a transformers quantisation config. ``load_in_8bit``,
                ``load_in_4bit`` and ``bnb_4bit_...`` work as well.
            known_scores: Scores that a sweep keeps from one of its models to the next.
            **kwargs: Everything HFLM takes, the arguments ``energy...`` of
                `EnergyLoggingHFLM`, and ``prefix_sharing`` and ``slot_refilling``
                (default true); see `PrefixSharingMixin` and `SlotRefillingMixin`.

        Raises:
            ValueError: A size, the criterion or the model cannot be pruned as asked.
        """
        self._prune_arguments: dict[str, Any] = {
            "ratio": ratio,
            "prune_percent": prune_percent,
            "intermediate_size": intermediate_size,
            "multiple_of": multiple_of,
            "criterion": criterion,
            "seed": seed,
            "layers": layers,
            "skip_layers": skip_layers,
            "calibration": calibration,
            "calibration_samples": calibration_samples,
        }
        self._known_scores = known_scores
        check_hf_arguments(
            {
                **kwargs,
                "pretrained": pretrained,
                "peft": peft,
                "quantization_config": quantization_config,
            }
        )
        self._quantization_config = quantization_config
        self._peft_stage = self._resolve_stage(peft, peft_stage)
        self._rejoin_layers(kwargs)
        if pretrained is None:
            default = find_default_model()
            kwargs |= default.model_args()
            pretrained = kwargs.pop("pretrained")
            eval_logger.warning(
                "pretrained was not given: evaluating SmolLM2-135M-Instruct, from %s.",
                default.source,
            )
        super().__init__(pretrained, peft=peft, **kwargs)
        if not isinstance(pretrained, str):
            self._prune_in_memory()
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None and accelerator.device.type == "cpu":
            # HFLM shares documents out among processes on GPUs only.
            self._rank = accelerator.process_index
            self._world_size = accelerator.num_processes
        if self.rank == 0:
            eval_logger.info("Pruning:\n%s", self._prune_record.as_table())

    def _rejoin_layers(self, kwargs: dict[str, Any]) -> None:
        """Undo what splitting ``skip_layers=0,15,ratio=2`` at commas did to it.

        `lm_eval.utils.simple_parse_args_string` leaves ``{"skip_layers": 0, "15": ""}``.
        """
        pieces = [
            name
            for name, value in kwargs.items()
            if value == "" and re.fullmatch(r"\d+(-\d+)?[\])]?", name)
        ]
        for name in ("layers", "skip_layers"):
            if self._prune_arguments[name] is not None and pieces:
                for piece in pieces:
                    del kwargs[piece]
                self._prune_arguments[name] = [self._prune_arguments[name], *pieces]
                return

    @staticmethod
    def _resolve_stage(peft: str | None, stage: str | None) -> str:
        if stage is not None and stage not in STAGES:
            raise ValueError(
                f"peft_stage={stage} is unknown: pass one of {', '.join(STAGES)}."
            )
        if stage is not None and peft is None:
            raise ValueError(
                f"peft_stage={stage} says when an adapter is applied, but there is none: add "
                "peft=ADAPTER, or leave it out."
            )
        return stage or "after"

    def _get_config(self, pretrained: str, **kwargs: Any) -> None:
        if kwargs.get("gguf_file") is None:
            check_config(pretrained, kwargs)
        with clear_config_errors(pretrained):
            super()._get_config(pretrained, **kwargs)

    def _create_model(
        self,
        pretrained: str,
        delta: str | None = None,
        peft: str | None = None,
        tp_plan: str | dict | None = None,
        **kwargs: Any,
    ) -> None:
        for argument in ("autogptq", "gptqmodel"):
            if kwargs.get(argument):
                raise ValueError(
                    f"{argument}={kwargs[argument]} loads quantised weights, which can be neither "
                    "ranked nor sliced: pass the unquantised checkpoint, or use --model hf."
                )

        if self._quantization_config is not None:
            kwargs["quantization_config"] = self._quantization_config

        def inspect(request: Request) -> None:
            if peft is not None:
                revision = kwargs.get("revision")
                check_adapter(peft, request, self._peft_stage, revision)
            if tp_plan is not None:
                check_divisible(request, int(os.environ.get("WORLD_SIZE", "1")))

        merging = "delta" if delta is not None else None
        if peft is not None and self._peft_stage == "before":
            merging = "peft_stage"
        auto_class = self.AUTO_MODEL_CLASS
        self.AUTO_MODEL_CLASS = _PruningAutoModel(self, auto_class, inspect, merging)
        try:
            super()._create_model(
                pretrained, delta=delta, peft=peft, tp_plan=tp_plan, **kwargs
            )
        finally:
            self.AUTO_MODEL_CLASS = auto_class
        if merging is not None:
            # The criterion has to see the sum of the weights.
            if peft is not None and merging == "peft_stage":
                self._model = merged(self._model, peft)
            self._prune_in_memory()

    def _prune_in_memory(self) -> None:
        prune_model(self._model, **self._prune_arguments, tokenizer=self.tokenizer)
        self._prune_record = self._model.prune_record
        self._config = self._model.config

    def begin_evaluation(self) -> None:
        """Begin the records in the results anew, for a model that answers several evaluations."""
        self.answer_paths = AnswerPaths()
        if self._energy is not None:
            self._energy.begin()

    def get_model_info(self) -> dict[str, Any]:
        """Return HFLM's model information and what was pruned, under ``pruning``."""
        return {**super().get_model_info(), "pruning": self._prune_record.as_dict()}


class _PruningAutoModel:
    """Stands in for an AutoModel class while HFLM loads through it."""

    def __init__(
        self,
        lm: PrunedHFLM,
        auto_class: type,
        inspect: Callable[[Request], None],
        merging: str | None,
    ) -> None:
        self._lm = lm
        self._auto_class = auto_class
        self._inspect = inspect
        self._merging = merging

    def from_pretrained(self, pretrained: str, **kwargs: Any) -> PreTrainedModel:
        if self._merging is not None:
            return self._load_whole(pretrained, kwargs)
        model = load_with_arguments(
            self._auto_class,
            pretrained,
            self._lm._prune_arguments,
            kwargs,
            tokenizer=self._lm.tokenizer,
            inspect=self._inspect,
            known_scores=self._lm._known_scores,
        )
        self._lm._prune_record = model.prune_record  # type: ignore[assignment]
        self._lm._config = model.config
        return model

    def _load_whole(self, pretrained: str, kwargs: dict[str, Any]) -> PreTrainedModel:
        request = Request.resolve(
            self._auto_class, pretrained, self._lm._prune_arguments, kwargs
        )
        request.check_prunable_in_memory(f"{self._merging} adds to its weights first")
        self._inspect(request)
        return request.load_whole()
