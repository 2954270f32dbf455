"""What is to be loaded and pruned, as far as arguments and config tell, and loading it."""

from __future__ import annotations

import dataclasses
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.checkpoints.configs import (
    HUB,
    PLACING,
    READING,
    argument_errors,
    auto_class_for,
    check_filled,
    class_with_widths,
    clear_errors,
    config_and_rest,
    skeleton,
    stored_widths,
)
from lm_eval_pruned.checkpoints.weights import (
    checkpoint_files,
    dtypes_in,
    tensor_in,
)
from lm_eval_pruned.pruning.allocation import check_comparable
from lm_eval_pruned.pruning.calibration import check_observable, read_texts
from lm_eval_pruned.pruning.criteria import CALIBRATED, OBS, check_finite
from lm_eval_pruned.pruning.depth import Depth, count_layers, layers_of
from lm_eval_pruned.pruning.layouts import (
    BUILDING,
    regions_by_parameter,
    text_config,
)
from lm_eval_pruned.pruning.widths import Widths, widths_in_memory


if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping

    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lm_eval_pruned.pruning.arguments import PruneArguments
    from lm_eval_pruned.pruning.plan import PrunePlan
    from lm_eval_pruned.pruning.record import PruneRecord

    #: A module, the name of a tensor in it, and that tensor as it is stored. A module that goes to a
    #: device and back stays the same object; its parameters may not.
    Rounded = tuple[nn.Module, str, Tensor]


#: Values of ``device_map`` that leave it to accelerate which part goes where.
_SHARED = ("auto", "balanced", "balanced_low_0", "sequential")


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
        """Read the config of a model, of `auto_class` or else of the config's class, and plan.

        Raises:
            ValueError: An argument is out of range.
            UnsupportedModelError: The model cannot be pruned.
            OSError: The config cannot be read.
        """
        trusted = bool(from_pretrained.get("trust_remote_code"))
        with clear_errors(pretrained):
            config, rest = config_and_rest(pretrained, from_pretrained)
            auto_class = auto_class or auto_class_for(config)
            build = functools.partial(skeleton, auto_class, trust_remote_code=trusted)
            whole = Widths(config, build)
            widths, plan = _planned(whole, prune_arguments)
        return cls(auto_class, pretrained, plan, widths, rest, prune_arguments)

    def asking(self, prune_arguments: PruneArguments) -> LoadRequest:
        """Return a request for the same model with other arguments of pruning."""
        with clear_errors(self.pretrained):
            widths, plan = _planned(self.widths.whole, prune_arguments)
        return dataclasses.replace(
            self, widths=widths, plan=plan, prune_arguments=prune_arguments
        )

    def content_key(self) -> tuple[Hashable, ...] | None:
        """Identify the unpruned model as stored; None where the checkpoint's content is not known."""
        folder = Path(self.pretrained, self.model_arguments.get("subfolder") or "")
        # A commit of the Hub never changes.
        commit = getattr(self.widths.original, "_commit_hash", None)
        content: Hashable = commit and (str(folder), commit)
        if Path(self.pretrained).is_dir():
            content = tuple(stamp(p) for p in sorted(folder.iterdir()) if p.is_file())
        if content is None:
            return None
        given = sorted(
            (name, repr(value))
            for name, value in self.model_arguments.items()
            if value and not (name in HUB or PLACING.fullmatch(name))
        )
        # Arguments that transformers knows as settings of the config are in no file.
        config = self.widths.original.to_diff_dict()
        settings = sorted((k, repr(v)) for k, v in config.items() if "dtype" not in k)
        return (content, self.auto_class, tuple(given), tuple(settings))

    def check_text(self) -> None:
        """Refuse what cannot be calibrated, and an unknown device, before a weight is read."""
        self.device()
        asked, plan = self.prune_arguments, self.plan
        if asked.calibration is None:
            return
        samples: Any = asked.calibration_samples
        read_texts(asked.calibration, samples and int(samples))
        if plan.is_open:
            check_comparable(plan, self.widths)
        if plan.criterion in CALIBRATED:
            # Layers that are cut one after the other show what their experts are given.
            check_observable(self.widths.skeleton(), stacked=plan.criterion == OBS)
        if asked.layer_by_layer or plan.is_open:
            layers_of(self.widths.skeleton())

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer that belongs to the model.

        Raises:
            ValueError: There is none, or it cannot be loaded.
        """
        from transformers import AutoTokenizer

        read = (*HUB, "trust_remote_code", "gguf_file")
        given = {
            n: v for n, v in self.model_arguments.items() if n in read and v is not None
        }
        try:
            return AutoTokenizer.from_pretrained(self.pretrained, **given)
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0].rstrip(" .:")
            raise ValueError(
                f"no tokenizer can be loaded from {self.pretrained} ({reason})"
            ) from error

    @functools.cached_property
    def stored_dtypes(self) -> dict[str, tuple[str, torch.dtype]]:
        """The file and the dtype of each floating-point tensor, by name, in the order of the files.

        Empty for GGUF files, whose blocks have none.
        """
        arguments = self.model_arguments
        if arguments.get("gguf_file") is not None:
            return {}
        with clear_errors(self.pretrained, arguments):
            files = checkpoint_files(self.pretrained, self.widths.original, arguments)
            return {
                name: (file, dtype) for file in files for name, dtype in dtypes_in(file)
            }

    def load(self) -> tuple[PreTrainedModel, Widths]:
        """Load the model unpruned, with all its layers, and find the widths that its tensors have.

        Raises:
            ValueError: It is damaged, or an argument is wrong.
        """
        return self._load(self.model_arguments)

    def load_stored(
        self,
    ) -> tuple[PreTrainedModel, Widths, list[Rounded]]:
        """Load it as it is stored, on the CPU, whatever the user asked for; see `load`.

        It gets one dtype, so that text can run: the widest of its MLPs, which rounds none of what
        is ranked, and copies nothing where the tensors have it already.

        Returns:
            The model, its widths, and the tensors outside of the MLPs that the dtype rounded, each
            as it is stored.
        """
        arguments = {
            name: value
            for name, value in self.model_arguments.items()
            if not PLACING.fullmatch(name)
        }
        whole, stored = self.widths.whole, self.stored_dtypes
        # Tensors of other names may become part of an MLP.
        outside = whole.skeleton().state_dict().keys() - regions_by_parameter(
            whole.mlps
        )
        inside = {dtype for name, (_, dtype) in stored.items() if name not in outside}
        if inside:
            arguments["dtype"] = functools.reduce(torch.promote_types, inside)
        model, widths = self._load(arguments)
        held, rounded = model.state_dict(keep_vars=True), []
        for name in outside & stored.keys():
            (file, dtype), weight = stored[name], held[name]
            if torch.promote_types(dtype, weight.dtype) != weight.dtype:
                exact = tensor_in(file, name)
                # Of another shape where the user lets shapes differ.
                if torch.equal(exact.to(weight.dtype), weight):
                    path, _, attribute = name.rpartition(".")
                    rounded.append((model.get_submodule(path), attribute, exact))
        return model, widths, rounded

    def _load(self, asked: Mapping[str, Any]) -> tuple[PreTrainedModel, Widths]:
        arguments = dict(asked)
        if arguments.get("gguf_file") is not None:
            from transformers import GgufConfig

            # Its blocks can be neither ranked nor sliced, and are exact in float32.
            arguments.setdefault("dtype", torch.float32)
            arguments["quantization_config"] = GgufConfig(dequantize=True)
        ignore_sizes = arguments.get("ignore_mismatched_sizes")
        arguments["ignore_mismatched_sizes"] = True
        widths = self.widths.whole
        model, found = self._built(widths, widths.actual, arguments)
        actual = stored_widths(found["mismatched_keys"], widths)
        if actual != widths.actual:
            widths = widths.of(actual)
            model, found = self._built(widths, actual, arguments)
        check_filled(model, found, widths, ignore_sizes)
        if type(model.config) is not type(widths.original):
            # The class is handed the part of the config that is of text.
            widths = widths_in_memory(model)
        return model, widths

    def device(self) -> torch.device:
        """Return where calibration text runs: the first device that the model is asked for.

        Without one, and where that is a disk, it is the CPU.

        Raises:
            ValueError: This machine has no such device.
        """
        asked = self.model_arguments.get("device_map")
        name = next(iter(asked.values()), None) if isinstance(asked, dict) else asked
        if name in _SHARED or (name is None and self.model_arguments.get("tp_plan")):
            # Each process of tp_plan has an accelerator for itself.
            rank = int(os.environ.get("LOCAL_RANK", "0"))
            name = rank if torch.accelerator.is_available() else None
        name = "cpu" if name in (None, "disk") else name
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError, NotImplementedError):
            raise ValueError(
                f"device={name} is not a device of this machine: pass one that torch finds here, such "
                "as cpu, or cuda:0 where there is a GPU."
            ) from None

    def placed(
        self,
        model: PreTrainedModel,
        widths: Widths,
        rounded: Iterable[Rounded],
    ) -> PreTrainedModel:
        """Return a pruned model in the dtype, and on the devices, that the user asked for.

        Args:
            model: On the CPU, in the dtype of `load_stored`.
            widths: Those of its unpruned MLPs.
            rounded: What `load_stored` returned.
        """
        arguments = {
            name: value
            for name, value in self.model_arguments.items()
            if name not in READING and value is not None
        }
        dtype = arguments.pop("dtype", "auto")
        if dtype == "auto":
            dtype = self._default_dtype(model)
        elif isinstance(dtype, str):
            dtype = getattr(torch, dtype)
        if dtype == model.dtype and not any(map(PLACING.fullmatch, arguments)):
            return model
        as_stored(rounded)
        state = stored_once(model)
        for name, tensor in state.items():
            exceeds = tensor.is_floating_point() and torch.finfo(tensor.dtype).max
            if exceeds > torch.finfo(dtype).max:
                check_finite(name, tensor.to(dtype))
        record: PruneRecord = model.prune_record  # type: ignore[assignment]
        given = {**arguments, "dtype": dtype, "state_dict": state}
        targets = widths.targets(record.plan)
        placed, _ = self._built(widths, targets, given)
        placed.config.name_or_path = model.config.name_or_path
        placed.generation_config = model.generation_config
        # What `save_pretrained` takes apart again.
        placed._weight_conversions = getattr(  # type: ignore[assignment]
            model, "_weight_conversions", None
        )
        placed.prune_record = record  # type: ignore[assignment]
        return placed

    def _default_dtype(self, model: PreTrainedModel) -> torch.dtype:
        """Return the dtype in which `from_pretrained` loads the whole model if it is not told any."""
        config: Any = self.widths.original
        if type(config) is not type(model.config):
            config = text_config(config)
        first = next(iter(self.stored_dtypes.values()), (None, model.dtype))
        return config.dtype or first[1]

    def _built(
        self, widths: Widths, targets: Mapping[str, int], arguments: dict[str, Any]
    ) -> tuple[PreTrainedModel, Mapping[str, Any]]:
        """Build a model with MLPs of `targets`, from the checkpoint or from a state dict."""
        from_memory = "state_dict" in arguments
        loader: Any = widths.model_class if from_memory else self.auto_class
        config = widths.narrowed_config(targets)
        if widths.inexpressible(targets):
            loader = class_with_widths(widths.model_class, targets)
            expected: Any = widths.model_class.config_class
            if not isinstance(config, expected):
                # A class of text alone is handed that part, as by the Auto classes.
                config = text_config(config)
        with BUILDING, clear_errors(self.pretrained, self.model_arguments):
            model, found = loader.from_pretrained(
                None if from_memory else self.pretrained,
                config=config,
                output_loading_info=True,
                **arguments,
            )
        model.__class__ = widths.model_class
        widths.describe_layers(model.config, targets)
        return model, found


def _planned(whole: Widths, asked: PruneArguments) -> tuple[Widths, PrunePlan]:
    """Return the widths of the layers that stay, and the plan, as far as the config tells."""
    widths = whole
    if asked.drop_layers is not None:
        depth = Depth.of(asked, count_layers(whole.skeleton()))
        shallow = whole.without_layers(depth)
        # Where text decides which layers stay, only their number is known.
        widths = whole if asked.measures_depth else shallow
    with argument_errors():
        return widths, widths.plan(asked)


def as_stored(rounded: Iterable[Rounded]) -> None:
    """Undo what the dtype of a load rounded; see `LoadRequest.load_stored`."""
    for module, name, stored in rounded:
        getattr(module, name).data = stored


def stored_once(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the state dict of a model with tied tensors under one of their names."""
    state = model.state_dict()
    for name in model.all_tied_weights_keys:
        state.pop(name, None)
    return state


def stamp(path: Path) -> tuple[str, int, int]:
    """Identify what a file holds by its path, size in bytes and time of change in ns."""
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns


def asked_of(plan: PrunePlan) -> str:
    """Return the sizes that a plan was asked for, as they are written on the command line."""
    return ", ".join(f"{name}={value}" for name, value in plan.asked.items())
