"""A model that is to be loaded and pruned, as far as its config tells."""

from __future__ import annotations

import dataclasses
import logging
import re
from dataclasses import dataclass
from inspect import getattr_static
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.checkpoints.damage import (
    argument_errors,
    check_complete,
    check_config,
    check_widths_fit,
    clear_config_errors,
    clear_load_errors,
)
from lm_eval_pruned.checkpoints.quantisation import (
    quantising_arguments,
    with_quantisation,
)
from lm_eval_pruned.checkpoints.skeleton import skeleton
from lm_eval_pruned.checkpoints.transformers_api import reading, unknown_loader
from lm_eval_pruned.pruning.calibration import check_observable, read_texts
from lm_eval_pruned.pruning.criteria import CALIBRATED
from lm_eval_pruned.pruning.depth import Depth
from lm_eval_pruned.pruning.dropping import count_layers
from lm_eval_pruned.pruning.layouts import (
    BUILDING,
    UnsupportedModelError,
    regions_by_parameter,
)
from lm_eval_pruned.pruning.widths import Widths


if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Mapping, Sequence

    from transformers import (
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

    from lm_eval_pruned.checkpoints.transformers_api import Checkpoint
    from lm_eval_pruned.pruning.arguments import PruneArguments
    from lm_eval_pruned.pruning.plan import PrunePlan
    from lm_eval_pruned.pruning.scores import ScoreTable

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
_DTYPES = ("dtype", "torch_dtype")
_MODEL_ARGUMENTS = (*_DTYPES, "quantization_config")
#: Arguments that say where and how the finished model lies.
_PLACING = re.compile(
    r"device_map|max_memory|tp_(plan|size)|offload_\w+|quantization_config"
    r"|load_in_[48]bit|bnb_4bit_\w+|llm_int8_\w+"
)
#: Those that say how to get at files or where to put weights, and nothing of the values.
_REACHING = (
    *(name for name in _HUB_ARGUMENTS if name != "subfolder"),
    *("low_cpu_mem_usage", "max_memory", "offload_folder"),
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

    def with_widths(self, actual: Mapping[str, int]) -> LoadRequest:
        """Return the same request for layers that have widths of their own.

        Args:
            actual: The width of each MLP in the checkpoint, by name.

        Raises:
            ValueError: An argument is out of range for these widths.
        """
        _tell_widths(self.pretrained, "tensors have", actual)
        with clear_config_errors(self.pretrained):
            widths = self.widths.of(actual)
            plan = widths.plan(self.prune_arguments)
        return dataclasses.replace(self, plan=plan, widths=widths)

    @property
    def lacks_depth(self) -> bool:
        """Whether text has to be looked at before it says which layers are dropped."""
        return self.prune_arguments.measures_depth and self.widths.depth is None

    def with_influence(
        self, influence: Sequence[float], measured_on: Mapping[str, Any]
    ) -> LoadRequest:
        """Return the same request for the layers of most block influence.

        Args:
            influence: That of each layer.
            measured_on: What the results file says of the text.
        """
        arguments = self.prune_arguments
        depth = Depth.of(arguments, len(influence), influence, measured_on)
        with clear_config_errors(self.pretrained):
            widths = self.widths.without_layers(depth)
            plan = widths.plan(arguments)
        return dataclasses.replace(self, plan=plan, widths=widths)

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

        It is the same however the model is asked for: by a command, by the harness or in Python.
        """
        checkpoint = self._content()
        if checkpoint is None:
            return None
        named = {
            name: value
            for name, value in self.model_arguments.items()
            if name not in _REACHING and value not in (None, False, "")
        }
        for name in _DTYPES:
            named.pop(name, None)
        named |= {"dtype": self.dtype, "device_map": self.device}
        arguments = tuple(sorted((k, repr(v)) for k, v in named.items()))
        # Arguments that transformers knows as settings of the config are in no file.
        config = self.widths.original.to_diff_dict()
        settings = sorted((k, repr(v)) for k, v in config.items() if "dtype" not in k)
        return (checkpoint, self.auto_class, arguments, tuple(settings))

    @property
    def dtype(self) -> str:
        """The dtype to load in, such as ``bfloat16``; ``auto`` where only the files know it."""
        asked = [self.model_arguments.get(name) for name in _DTYPES]
        dtype = next((each for each in asked if each is not None), "auto")
        if dtype == "auto":
            dtype = self.widths.original.dtype or dtype
        return str(dtype).removeprefix("torch.")

    @property
    def rounds(self) -> bool:
        """Whether the dtype to load in may hold less than what is stored.

        A GGUF file holds blocks, which are exact in float32.
        """
        if self.dtype in ("float32", "float64"):
            return False
        gguf = self.model_arguments.get("gguf_file") is not None
        return gguf or self.dtype != self.in_stored_dtype().dtype

    def in_stored_dtype(self) -> LoadRequest:
        """Return the same request for the dtype that the checkpoint names, whatever was asked for."""
        arguments = {
            name: value
            for name, value in self.model_arguments.items()
            if name not in _DTYPES
        }
        if arguments.get("gguf_file") is not None:
            arguments["dtype"] = torch.float32
        return dataclasses.replace(self, model_arguments=arguments)

    def unplaced(self) -> LoadRequest:
        """Return the same request for the CPU, unquantised and undivided."""
        arguments = {
            name: value
            for name, value in self.model_arguments.items()
            if not _PLACING.fullmatch(name)
        }
        return dataclasses.replace(self, model_arguments=arguments)

    @property
    def device(self) -> torch.device:
        """The device of the model if it lies in one place: the first of ``device_map``."""
        device_map = self.model_arguments.get("device_map")
        if isinstance(device_map, dict):
            device_map = next(iter(device_map.values()), None)
        if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
            device_map = 0 if torch.cuda.is_available() else "cpu"
        if device_map in (None, "disk", "cpu"):
            return torch.device("cpu")
        if isinstance(device_map, int) and not torch.accelerator.is_available():
            # torch knows the kind of a numbered device only where there is one.
            return torch.device("cuda", device_map)
        return torch.device(device_map)

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

    def unreadable(self) -> str | None:
        """Return why the checkpoint cannot be opened tensor by tensor, if that is known."""
        if self.model_arguments.get("gguf_file") is not None:
            return "it is a GGUF file"
        return unknown_loader()

    @property
    def ranked(self) -> list[str]:
        """Names of the GLU-MLPs whose neurons are ranked.

        Where layers are weighed against each other, that is also those which a uniform cut
        would leave as they are.
        """
        targets, actual = self.widths.targets(self.plan), self.widths.actual
        return [
            mlp.name
            for mlp in self.widths.mlps
            if targets[mlp.name] < actual[mlp.name]
            or (self.plan.is_open and self.plan.includes_layer(mlp.block))
        ]

    def needs_scores(self, known: ScoreTable) -> bool:
        """Return whether neurons have to be observed before weights are narrowed.

        Args:
            known: Scores from an earlier load of the same model.
        """
        if not self.plan.prunes or self.plan.calibration is None:
            return False
        ranked = self.ranked
        return any(
            mlp.name in ranked
            and mlp.name not in known.scores
            and self.plan.criterion_of(mlp.block) in CALIBRATED
            for mlp in self.widths.mlps
        )

    def check_prunable_in_memory(self, why: str | None) -> None:
        """Refuse what pruning after loading cannot do, before the weights are read.

        Args:
            why: Why the model is not pruned while it loads.

        Raises:
            ValueError: The model would be quantised first, or its calibration text
                cannot be read.
            UnsupportedModelError: Its activations cannot be observed.
        """
        if not self.plan.changes_model:
            return
        quantising = quantising_arguments(self.model_arguments)
        if self.model_arguments.get("gguf_file") is not None:
            # That one describes the file.
            quantising = [n for n in quantising if n != "quantization_config"]
        if quantising:
            raise ValueError(
                f"{quantising[0]} quantises the model while it loads, but it has to be pruned "
                f"afterwards, because {why}: export the pruned model first "
                "(lm-eval-pruned prune), or leave the quantisation out."
            )
        looks_at_losses = self.plan.is_open or self.plan.measured_on is not None
        observes = {*self.plan.criteria, *self.plan.tried} & {*CALIBRATED}
        if not self.plan.prunes or self.plan.calibration is None:
            return
        if looks_at_losses or observes:
            read_texts(self.plan.calibration, self.plan.calibration_samples)
        if observes:
            check_observable(self.widths.skeleton())

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

    def load(
        self,
        config: PretrainedConfig,
        neurons: Collection[str] = (),
        checkpoint: Checkpoint | None = None,
    ) -> PreTrainedModel:
        """Load the model as transformers does, with `config`.

        Args:
            config: The config.
            neurons: Parameters that have to be as wide as they are stored, even if
                the user lets other shapes differ.
            checkpoint: What stands in for the files, if anything does.
        """
        from transformers import GgufConfig, PreTrainedModel

        arguments = with_quantisation(self.model_arguments)
        if arguments.get("gguf_file") is not None:
            # Blocks of a GGUF file can be neither ranked nor sliced.
            arguments["quantization_config"] = GgufConfig(dequantize=True)
        model_class, auto_class = self.widths.model_class, self.auto_class
        if checkpoint is not None:
            auto_class = reading(checkpoint, auto_class, model_class, config)
        loader = getattr_static(model_class, "from_pretrained")
        if loader is not getattr_static(PreTrainedModel, "from_pretrained"):
            # A loader of its own need not know how to tell what was missing.
            with BUILDING:
                return auto_class.from_pretrained(
                    self.pretrained, config=config, **arguments
                )
        with BUILDING:
            model, found = auto_class.from_pretrained(
                self.pretrained, config=config, output_loading_info=True, **arguments
            )
        check_complete(found["missing_keys"])
        check_widths_fit(found.get("mismatched_keys", ()), neurons)
        return model

    def load_whole(self) -> PreTrainedModel:
        """Load the model unpruned, with all its layers.

        Raises:
            ValueError: It is damaged, or an argument is wrong.
        """
        with clear_load_errors(self.pretrained, self.model_arguments):
            neurons = regions_by_parameter(self.widths.whole.mlps)
            return self.load(self.widths.whole.original, neurons)


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
