"""A model that is to be loaded and pruned, as far as its config tells."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from inspect import getattr_static
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.checkpoints.damage import (
    argument_errors,
    check_config,
    check_filled,
    clear_config_errors,
    clear_load_errors,
)
from lm_eval_pruned.checkpoints.own_widths import class_with_widths, stored_widths
from lm_eval_pruned.checkpoints.quantisation import (
    quantising_arguments,
    with_quantisation,
)
from lm_eval_pruned.checkpoints.skeleton import skeleton
from lm_eval_pruned.pruning.allocation import check_comparable
from lm_eval_pruned.pruning.calibration import check_observable, read_texts
from lm_eval_pruned.pruning.criteria import CALIBRATED
from lm_eval_pruned.pruning.depth import Depth
from lm_eval_pruned.pruning.dropping import count_layers
from lm_eval_pruned.pruning.layouts import (
    BUILDING,
    UnsupportedModelError,
    find_glu_mlps,
    regions_by_parameter,
)
from lm_eval_pruned.pruning.slicing import check_finite
from lm_eval_pruned.pruning.widths import Widths, widths_in_memory


if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from transformers import (
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

    from lm_eval_pruned.pruning.arguments import PruneArguments
    from lm_eval_pruned.pruning.plan import PrunePlan
    from lm_eval_pruned.pruning.record import PruneRecord

# Below the harness's logger, so that its verbosity applies.
logger = logging.getLogger("lm_eval.pruned.loading")

_HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)
#: Arguments of `from_pretrained` that AutoConfig must not absorb into the config.
_MODEL_ARGUMENTS = ("dtype", "torch_dtype", "quantization_config")
#: Arguments of `from_pretrained` that say where and how the finished model lies.
_PLACING = re.compile(
    r"device_map|max_memory|tp_(plan|size)|distributed_config|offload_\w+|quantization_config"
    r"|load_in_[48]bit|bnb_4bit_\w+|llm_int8_\w+|dtype|torch_dtype"
)
#: Arguments of `from_pretrained` that say how to read a checkpoint.
_READING = (
    *_HUB_ARGUMENTS,
    "gguf_file",
    "trust_remote_code",
    "use_safetensors",
    "variant",
)
#: Those that say how to get at files or where to put weights, and nothing of the values.
_REACHING = (
    *(name for name in _HUB_ARGUMENTS if name != "subfolder"),
    "low_cpu_mem_usage",
)


@dataclass(frozen=True)
class LoadRequest:
    """What is to be loaded, known before any weight is read.

    Attributes:
        auto_class: The transformers class to load with.
        pretrained: Folder or Hub name of the model.
        plan: What to do to the GLU-MLPs.
        widths: The widths that they have.
        model_arguments: Keyword arguments of ``from_pretrained`` besides the config.
        prune_arguments: What the user asked for.
    """

    auto_class: Any
    pretrained: str
    plan: PrunePlan
    widths: Widths
    model_arguments: dict[str, Any]
    prune_arguments: PruneArguments

    @classmethod
    def resolve(
        cls,
        auto_class: Any,
        pretrained: str,
        prune_arguments: PruneArguments,
        from_pretrained: dict[str, Any],
    ) -> LoadRequest:
        """Read the config of a model and plan its pruning.

        Takes the arguments of `lm_eval_pruned.checkpoints.load.load_with_arguments`.

        Raises:
            ValueError: An argument is out of range.
            UnsupportedModelError: The model cannot be pruned.
            OSError: The config cannot be read.
        """
        trusted = from_pretrained.get("trust_remote_code")
        if trusted not in (None, True, False):
            # Any text counts as true to transformers, "off" included.
            raise ValueError(
                f"trust_remote_code={trusted!r} is not understood: pass true or false."
            )
        with clear_config_errors(pretrained):
            config, model_arguments = _resolve_config(pretrained, dict(from_pretrained))
            _refuse_quantised(config, model_arguments)

        def build(config: PretrainedConfig) -> PreTrainedModel:
            return skeleton(
                auto_class,
                config,
                trust_remote_code=bool(trusted),
            )

        with clear_config_errors(pretrained):
            widths = Widths(config, build)
            if prune_arguments.drop_layers is not None:
                layers = count_layers(widths.skeleton())
                shallow = widths.without_layers(Depth.of(prune_arguments, layers))
                if not prune_arguments.measures_depth:
                    widths = shallow
            with argument_errors():
                plan = widths.plan(prune_arguments)
        if widths.actual != widths.configured:
            _tell_widths(pretrained, "config has", widths.actual)
        return cls(
            auto_class, pretrained, plan, widths, model_arguments, prune_arguments
        )

    def scores_key(self) -> Hashable | None:
        """Identify what scores depend on; None where the checkpoint's content is not known."""
        model = self.content_key()
        if model is None:
            return None
        plan, text = self.plan, None
        if plan.calibration is not None:
            text = (_stamp(Path(plan.calibration)), plan.calibration_samples)
        return (
            *model,
            plan.criterion,
            plan.layer_criteria,
            plan.tried,
            plan.seed,
            text,
            plan.depth and plan.depth.kept,
        )

    def influence_key(self) -> Hashable | None:
        """Identify what block influence depends on; None as in `scores_key`."""
        model, arguments = self.content_key(), self.prune_arguments
        text = Path(str(arguments.calibration))
        return model and (*model, _stamp(text), arguments.calibration_samples)

    def content_key(self) -> tuple[Hashable, ...] | None:
        """Identify the unpruned model; None where the checkpoint's content is not known.

        It is the same however the model is asked for, and wherever it is to go in what dtype:
        neurons are ranked and losses measured before.
        """
        checkpoint = self._content()
        if checkpoint is None:
            return None
        named = {
            name: value
            for name, value in self.model_arguments.items()
            if name not in _REACHING
            and not _PLACING.fullmatch(name)
            and value not in (None, False, "")
        }
        arguments = tuple(sorted((k, repr(v)) for k, v in named.items()))
        # Arguments that transformers knows as settings of the config are in no file.
        config = self.widths.original.to_diff_dict()
        settings = sorted((k, repr(v)) for k, v in config.items() if "dtype" not in k)
        return (checkpoint, self.auto_class, arguments, tuple(settings))

    def _content(self) -> Hashable | None:
        """Identify the checkpoint's content as it is now; None where that cannot be told."""
        folder = Path(self.pretrained)
        if not folder.is_dir():
            # A commit of the Hub never changes.
            commit = getattr(self.widths.original, "_commit_hash", None)
            return commit and (self.pretrained, commit)
        folder /= self.model_arguments.get("subfolder") or ""
        return tuple(
            _stamp(path) for path in sorted(folder.iterdir()) if path.is_file()
        )

    def check_text(self) -> None:
        """Refuse what cannot be calibrated before a weight is read.

        Raises:
            ValueError: The calibration text cannot be read.
            UnsupportedModelError: Activations cannot be observed in the model.
        """
        asked, plan = self.prune_arguments, self.plan
        if asked.calibration is None:
            return
        samples: Any = asked.calibration_samples
        read_texts(asked.calibration, samples and int(samples))
        if plan.is_open:
            check_comparable(plan, self.widths)
        if {*plan.criteria, *plan.tried} & {*CALIBRATED}:
            check_observable(self.widths.skeleton())

    def check_prunable_in_memory(self, why: str) -> None:
        """Refuse to quantise a model that is pruned only after it was loaded.

        Args:
            why: Why it is pruned afterwards.

        Raises:
            ValueError: It would be quantised first.
        """
        self.check_text()
        quantising = quantising_arguments(self.model_arguments)
        if quantising and self.plan.changes_model:
            raise ValueError(
                f"{quantising[0]} quantises the model while it loads, but it has to be pruned "
                f"afterwards, because {why}: export the pruned model first "
                "(lm-eval-pruned prune), or leave the quantisation out."
            )

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer that belongs to the model."""
        from transformers import AutoTokenizer

        names = (*_HUB_ARGUMENTS, "trust_remote_code", "gguf_file")
        arguments = {
            name: self.model_arguments[name]
            for name in names
            if self.model_arguments.get(name) is not None
        }
        return AutoTokenizer.from_pretrained(self.pretrained, **arguments)

    def load(self) -> tuple[PreTrainedModel, Widths]:
        """Load the model unpruned, with all its layers and as the user asked; see `load_stored`."""
        return self._loaded(with_quantisation(self.model_arguments))

    def load_stored(self) -> tuple[PreTrainedModel, Widths]:
        """Load the model unpruned, with all its layers, in its stored dtype, on the CPU.

        Returns:
            The model, and the widths that its tensors have.

        Raises:
            ValueError: It is damaged, or an argument is wrong.
        """
        arguments = {
            name: value
            for name, value in self.model_arguments.items()
            if not _PLACING.fullmatch(name)
        }
        if arguments.get("gguf_file") is not None:
            # Its blocks are exact in this dtype.
            arguments["dtype"] = torch.float32
        return self._loaded(arguments)

    def _loaded(self, arguments: dict[str, Any]) -> tuple[PreTrainedModel, Widths]:
        if arguments.get("gguf_file") is not None:
            from transformers import GgufConfig

            # Blocks of a GGUF file can be neither ranked nor sliced.
            arguments = {
                **arguments,
                "quantization_config": GgufConfig(dequantize=True),
            }
        widths = self.widths.whole
        with clear_load_errors(self.pretrained, self.model_arguments):
            model, found = self._filled(widths, arguments)
            stored = stored_widths(found.get("mismatched_keys", ()), widths)
            if stored != widths.actual:
                _tell_widths(self.pretrained, "tensors have", stored)
                widths = widths.of(stored)
                model, found = self._filled(widths, arguments)
            check_filled(model, found, widths, arguments)
        if type(model.config) is not type(widths.original):
            # The class is handed the part of the config that is of text.
            widths = widths_in_memory(model)
        return model, widths

    def _filled(
        self, widths: Widths, arguments: dict[str, Any]
    ) -> tuple[PreTrainedModel, Mapping[str, Any]]:
        """Load a model with MLPs of `widths`; return it and what transformers says of its keys."""
        from transformers import PreTrainedModel

        loader: Any = self.auto_class
        config = widths.original
        if widths.actual != widths.configured:
            config = widths.narrowed_config(widths.actual)
            loader = class_with_widths(widths.model_class, widths.actual)
        arguments = {**arguments, "config": config}
        own = getattr_static(widths.model_class, "from_pretrained")
        if own is not getattr_static(PreTrainedModel, "from_pretrained"):
            # A loader of its own need not know how to tell what was missing.
            with BUILDING:
                return loader.from_pretrained(self.pretrained, **arguments), {}
        arguments["ignore_mismatched_sizes"] = True
        with BUILDING:
            model, found = loader.from_pretrained(
                self.pretrained, output_loading_info=True, **arguments
            )
        model.__class__ = widths.model_class
        widths.describe_layers(model.config, widths.actual)
        return model, found

    def placed(self, model: PreTrainedModel, widths: Widths) -> PreTrainedModel:
        """Return a pruned model in the dtype, and on the devices, that the user asked for.

        Args:
            model: A model in its stored dtype, on the CPU, as `load_stored` returns it.
            widths: The widths that its unpruned MLPs have.
        """
        arguments = {
            name: value
            for name, value in with_quantisation(self.model_arguments).items()
            if name not in _READING and value is not None
        }
        dtypes = [arguments.pop(name, None) for name in ("dtype", "torch_dtype")]
        dtype = next(
            (each for each in dtypes if each not in (None, "auto")), model.dtype
        )
        placing = any(map(_PLACING.fullmatch, arguments))
        if not placing and str(dtype).removeprefix("torch.") == str(model.dtype)[6:]:
            return model
        record: PruneRecord = model.prune_record  # type: ignore[assignment]
        targets = widths.targets(record.plan)
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype)
        if torch.finfo(dtype).max < torch.finfo(model.dtype).max:
            for name, weights in regions_by_parameter(find_glu_mlps(model)).items():
                mlp, _, region = weights[0]
                check_finite(name, mlp.parameter(region).to(dtype))
        state = model.state_dict()
        for name in model.all_tied_weights_keys:
            # It would be sent to the device a second time.
            state.pop(name, None)
        loader = widths.model_class
        if widths.inexpressible(targets):
            loader = class_with_widths(loader, targets)
        with BUILDING, clear_load_errors(self.pretrained, self.model_arguments):
            placed = loader.from_pretrained(
                None,
                config=widths.narrowed_config(targets),
                state_dict=state,
                dtype=dtype,
                **arguments,
            )
        placed.__class__ = widths.model_class
        widths.describe_layers(placed.config, targets)
        placed.config.name_or_path = model.config.name_or_path
        placed.generation_config = model.generation_config
        # What `save_pretrained` takes apart again.
        placed._weight_conversions = getattr(  # type: ignore[assignment]
            model, "_weight_conversions", None
        )
        placed.prune_record = record  # type: ignore[assignment]
        return placed


def _tell_widths(pretrained: str, found: str, actual: Mapping[str, int]) -> None:
    logger.info(
        "The layers of %s have widths of their own: its %s from %d to %d neurons.",
        pretrained,
        found,
        min(actual.values()),
        max(actual.values()),
    )


def _resolve_config(
    pretrained: str, arguments: dict[str, Any]
) -> tuple[PretrainedConfig, dict[str, Any]]:
    """Split `arguments` into the config they describe and what is left for the model.

    Mirrors `transformers.models.auto.auto_factory._BaseAutoModelClass.from_pretrained`.
    """
    from transformers import AutoConfig

    kept = {name: arguments.pop(name) for name in _MODEL_ARGUMENTS if name in arguments}
    kept |= {name: arguments[name] for name in _HUB_ARGUMENTS if name in arguments}
    for name in ("trust_remote_code", "gguf_file"):
        if name in arguments:
            kept[name] = arguments[name]
    if arguments.get("gguf_file") is None:
        check_config(pretrained, arguments)
    config, unused = AutoConfig.from_pretrained(
        pretrained, return_unused_kwargs=True, **arguments
    )
    return config, {**unused, **kept}


def _refuse_quantised(config: PretrainedConfig, arguments: dict[str, Any]) -> None:
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is None or arguments.get("gguf_file") is not None:
        return
    if not isinstance(quantisation, dict):
        quantisation = quantisation.to_dict()
    method = quantisation.get("quant_method", "unknown")
    raise UnsupportedModelError(
        f"The checkpoint is quantised already (quant_method={getattr(method, 'value', method)}), "
        "and quantised neurons can be neither ranked nor sliced: pass the unquantised checkpoint "
        "it was made from."
    )


def _stamp(path: Path) -> tuple[str, int, int]:
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns
