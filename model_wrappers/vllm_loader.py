"""The vLLM loader ``pruned``: GLU-MLPs are narrowed while vLLM reads the checkpoint.

Every process of vLLM calls `register` (entry-point group ``vllm.general_plugins``), so that
``--load-format pruned`` works there, and with it the model type ``pruned-vllm``.

Source: ``vllm.model_executor.model_loader.register_model_loader``.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForCausalLM
from vllm.model_executor.model_loader import (
    DefaultModelLoader,
    get_model_loader,
    register_model_loader,
)

from lm_eval_pruned.checkpoints.request import LoadRequest
from lm_eval_pruned.checkpoints.stream import (
    check_expressible,
    open_stream,
    scores_of_activations,
)
from lm_eval_pruned.model_wrappers.vllm_arguments import LOAD_FORMAT
from lm_eval_pruned.pruning.arguments import PruneArguments


if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import Tensor, nn

    from lm_eval_pruned.pruning.record import PruneRecord


class PrunedModelLoader(DefaultModelLoader):
    """vLLM's own loader, which sees a checkpoint that was always narrow.

    ``model_loader_extra_config`` holds the arguments that `lm_eval_pruned.load_pruned`
    takes for pruning; what else is in it goes to vLLM's loader.
    """

    def __init__(self, load_config: Any) -> None:
        others = dict(load_config.model_loader_extra_config)
        self._prune_arguments = PruneArguments.taken_from(others)
        super().__init__(
            dataclasses.replace(
                load_config, load_format="auto", model_loader_extra_config=others
            )
        )
        self._request: LoadRequest | None = None

    def load_model(
        self, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any
    ) -> nn.Module:
        if model_config is not vllm_config.model_config:
            # A draft model, whose widths are none of this request.
            loader = get_model_loader(self.load_config)
            return loader.load_model(vllm_config, model_config, *args, **kwargs)
        request = LoadRequest.resolve(
            AutoModelForCausalLM,
            model_config.model,
            self._prune_arguments,
            {
                "revision": model_config.revision,
                "trust_remote_code": model_config.trust_remote_code,
                "cache_dir": self.load_config.download_dir,
                "dtype": model_config.dtype,
            },
        )
        check_expressible(request)
        self._request = request
        narrow_config(request, model_config.hf_config)
        return super().load_model(vllm_config, model_config, *args, **kwargs)

    def get_all_weights(
        self, model_config: Any, model: nn.Module
    ) -> Generator[tuple[str, Tensor], None, None]:
        request = self._request
        if request is None or not request.plan.prunes:
            yield from super().get_all_weights(model_config, model)
            return
        with open_stream(request, scores_of_activations(request)) as stream:
            yield from stream.tensors()
            model.prune_record = stream.record()  # type: ignore[assignment]
        for source in getattr(model, "secondary_weights", ()):
            yield from self._get_weights_iterator(source)


def narrow_config(request: LoadRequest, config: Any) -> None:
    """Write the kept widths into the config that vLLM builds its model from.

    Raises:
        ValueError: Its widths are not those of the checkpoint's config.
    """
    widths = request.widths
    targets = widths.targets(request.plan)
    narrowed = widths.narrowed_config(targets)
    # Nothing is left of widths for single layers, which guard the keys.
    widths.describe_layers(config, targets)
    for key in set(widths.keys.values()):
        try:
            found = key.get(config)
        except AttributeError:
            found = None
        # A model that is loaded again finds the config narrow.
        if found not in (key.get(widths.config), key.get(narrowed)):
            raise ValueError(
                f"vLLM's config of {request.pretrained} says {key}={found}, but the checkpoint's "
                f"says {key.get(widths.config)}: leave that out of hf_overrides, because the "
                "kept width is derived."
            )
    widths.copy_keys(narrowed, config)


class PruneRecordExtension:
    """What a worker of vLLM tells of its model; see ``worker_extension_cls`` there."""

    def model_bytes(self) -> int:
        """Return the bytes of the weights and buffers of this worker."""
        model = self.get_model()  # type: ignore[attr-defined]
        return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))

    def pruned_record(self) -> dict[str, Any] | None:
        """Return the kept neurons and the calibration text; None for an unpruned model."""
        model = self.get_model()  # type: ignore[attr-defined]
        record: PruneRecord | None = getattr(model, "prune_record", None)
        if record is None:
            return None
        text = record.calibration
        return {
            "kept": [kept.numpy().astype("<i8").tobytes() for kept in record.kept],
            "calibration": text and text.as_dict(),
        }


def register() -> None:
    """Make the loader known to this process of vLLM."""
    register_model_loader(LOAD_FORMAT)(PrunedModelLoader)
