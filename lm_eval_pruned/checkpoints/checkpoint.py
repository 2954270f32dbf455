"""A checkpoint: its config, the plan for its MLPs, loading it, and placing what is left of it.

Shapes make a plan, before a weight is read. Then the model is loaded whole in its stored dtype, whose
files are mapped; it is cut in memory, and what is left is cast and placed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import find_adapter_config_file, logging

from lm_eval_pruned.checkpoints.configs import (
    HUB,
    PLACING,
    READING,
    argument_errors,
    auto_class_for,
    clear_errors,
    config_and_rest,
)
from lm_eval_pruned.checkpoints.weights import (
    check_filled,
    checkpoint_files,
    stored_widths,
    tensor_in,
    tensors_in,
)
from lm_eval_pruned.pruning.allocation import check_comparable
from lm_eval_pruned.pruning.argument_values import UNIFORM
from lm_eval_pruned.pruning.calibration import check_observable
from lm_eval_pruned.pruning.calibration_text import TextSource
from lm_eval_pruned.pruning.criteria import CALIBRATED, OBS, check_finite
from lm_eval_pruned.pruning.layouts import (
    BUILDING,
    layers_of,
    regions_by_parameter,
    text_config,
    with_widths,
)
from lm_eval_pruned.pruning.widths import Widths
from lm_eval_pruned.util.content import content_digest


if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping

    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from lm_eval_pruned.checkpoints.weights import StoredTensor
    from lm_eval_pruned.pruning.arguments import PruneArguments
    from lm_eval_pruned.pruning.record import PruneRecord
    from lm_eval_pruned.pruning.widths import Cut


#: Values of ``device_map`` that leave it to accelerate which part goes where.
_SHARED = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True)
class Checkpoint:
    """A model in files, and what is to become of it, known before any weight is read.

    Attributes:
        pretrained: Folder or Hub name of the model.
        auto_class: The transformers class to load with.
        config: Its config, with the settings among the arguments of ``from_pretrained``.
        model_arguments: The other arguments of ``from_pretrained``.
        cut: What is to become of its GLU-MLPs, with the arguments of pruning.
        calibrates_on: Where calibration text runs; default: see `device`.
    """

    pretrained: str
    auto_class: Any
    config: PretrainedConfig
    model_arguments: dict[str, Any]
    cut: Cut
    calibrates_on: str | torch.device | None = None

    @classmethod
    def of(
        cls,
        pretrained: str,
        prune_arguments: PruneArguments,
        from_pretrained: dict[str, Any],
        auto_class: Any = None,
        calibrates_on: str | torch.device | None = None,
    ) -> Checkpoint:
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
            build = functools.partial(auto_class.from_config, trust_remote_code=trusted)
            widths = Widths(build, config)
            with argument_errors():
                cut = widths.cut(prune_arguments)
        places = {name: rest[name] for name in HUB if rest.get(name) is not None}
        if cut.plan.prunes and find_adapter_config_file(pretrained, **places):
            raise ValueError(
                f"pretrained={pretrained} holds an adapter (adapter_config.json) beside its weights, and "
                "only weights are pruned: move the files of the adapter to another folder, and pass that "
                "as peft=."
            )
        return cls(pretrained, auto_class, config, rest, cut, calibrates_on)

    def asking(
        self, prune_arguments: PruneArguments, widths: Widths | None = None
    ) -> Checkpoint:
        """Return the same model with other arguments of pruning, or other `widths`."""
        widths = widths or self.cut.widths
        with clear_errors(self.pretrained), argument_errors():
            return dataclasses.replace(self, cut=widths.cut(prune_arguments))

    def with_stored_widths(self) -> Checkpoint:
        """Return the same model with the widths that its tensors have, by the headers of its files.

        Raises:
            ValueError: The tensors of an MLP do not fit together, or the config.
        """
        widths = self.cut.widths
        shapes = {name: tensor.shape for name, tensor in self.stored.items()}
        expected = tensors_of(widths.skeleton)
        if not shapes or all(shapes.get(name) == t.shape for name, t in expected):
            return self
        # transformers knows which parameters they become.
        reading = {n: v for n, v in self.model_arguments.items() if n in READING}
        verbosity = logging.get_verbosity()
        # It would report what does not fit, at length.
        logging.set_verbosity_error()
        try:
            _, loading = self._built({**reading, "device_map": "meta"}, widths.uncut)
        finally:
            logging.set_verbosity(verbosity)
        actual = stored_widths(loading["mismatched_keys"], widths)
        if actual == widths.actual:
            return self
        build = type(widths.skeleton)
        stored = Widths(build, widths.original, actual.values())
        return self.asking(self.cut.plan.arguments, stored)

    @functools.cached_property
    def stored(self) -> dict[str, StoredTensor]:
        """The floating-point tensors of its files, by name, in the order of the files.

        Empty for GGUF files, whose blocks have neither dtype nor shape.
        """
        arguments = self.model_arguments
        if arguments.get("gguf_file") is not None:
            return {}
        with clear_errors(self.pretrained, arguments):
            files = checkpoint_files(self.pretrained, self.config, arguments)
            return {
                tensor.name: tensor for file in files for tensor in tensors_in(file)
            }

    def content_key(self) -> tuple[Hashable, ...] | None:
        """Identify the unpruned model as stored; None where the checkpoint's content is not known."""
        folder = Path(self.pretrained, self.model_arguments.get("subfolder") or "")
        # A commit of the Hub never changes.
        commit = getattr(self.config, "_commit_hash", None)
        content: Hashable = commit and (str(folder), commit)
        if Path(self.pretrained).is_dir():
            files = [path for path in sorted(folder.iterdir()) if path.is_file()]
            content = tuple((str(p.resolve()), content_digest(p)) for p in files)
        if content is None:
            return None
        reading = sorted(
            (name, repr(value))
            for name, value in self.model_arguments.items()
            if value and not (name in HUB or PLACING.fullmatch(name))
        )
        # Arguments that transformers knows as settings of the config are in no file.
        config = self.config.to_diff_dict()
        settings = sorted((k, repr(v)) for k, v in config.items() if "dtype" not in k)
        return (content, self.auto_class, tuple(reading), tuple(settings))

    def check_text(self) -> None:
        """Refuse what cannot be calibrated, and an unknown device, before a weight is read."""
        self.device()
        plan, skeleton = self.cut.plan, self.cut.widths.skeleton
        arguments = plan.arguments
        if arguments.calibration is None:
            return
        TextSource.of(arguments).check()
        if plan.is_open:
            check_comparable(self.cut)
        if plan.criterion in CALIBRATED:
            # Layers that are cut one after the other show what their experts are given.
            check_observable(skeleton, stacked=plan.criterion == OBS)
        if arguments.layer_by_layer or plan.is_open:
            layers_of(skeleton)

    def check_divides(self, processes: int, argument: str) -> None:
        """Refuse widths that do not divide among the processes that `argument` asked for."""
        plan, targets = self.cut.plan, self.cut.targets
        odd = [
            f"{n} {width} neurons" for n, width in targets.items() if width % processes
        ]
        # What an allocation finds is not known yet.
        if (
            plan.prunes
            and plan.arguments.allocation != UNIFORM
            and plan.multiple_of % processes
        ):
            odd = [f"each layer multiples of {plan.multiple_of} neurons"]
        if odd:
            raise ValueError(
                f"{plan.as_written() or 'The checkpoint'} gives {odd[0]}, which cannot be divided among "
                f"the {processes} processes of {argument}: pass "
                f"multiple_of={math.lcm(processes, plan.multiple_of)}, or use a number of processes "
                "that divides it."
            )

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer that belongs to the model.

        Raises:
            ValueError: There is none, or it cannot be loaded.
        """
        from transformers import AutoTokenizer

        names = (*HUB, "trust_remote_code", "gguf_file")
        reading = {
            n: v
            for n, v in self.model_arguments.items()
            if n in names and v is not None
        }
        try:
            return AutoTokenizer.from_pretrained(self.pretrained, **reading)
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0].rstrip(" .:")
            raise ValueError(
                f"no tokenizer can be loaded from {self.pretrained} ({reason})"
            ) from error

    def device(self) -> torch.device:
        """Return where calibration text runs: `calibrates_on`, else the first that is to hold the model.

        Without either, and where that is a disk, it is the CPU.

        Raises:
            ValueError: This machine has no such device.
        """
        placed = self.calibrates_on or self.model_arguments.get("device_map")
        name = next(iter(placed.values()), None) if isinstance(placed, dict) else placed
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

    def load_stored(self) -> PreTrainedModel:
        """Load the model unpruned in the dtype of its files, on the CPU; see `with_stored_widths`.

        It gets one dtype, so that text can run: the widest of its MLPs, which rounds none of what
        is ranked, and copies nothing where the tensors have it already.
        """
        arguments = {
            name: value
            for name, value in self.model_arguments.items()
            if not PLACING.fullmatch(name)
        }
        widths = self.cut.widths
        # Tensors of other names may become part of an MLP.
        neurons = regions_by_parameter(widths.mlps)
        outside = widths.skeleton.state_dict().keys() - neurons
        # transformers reads neither these nor, of any model, the tables of rotation that old files have.
        ignored: Any = widths.skeleton._keys_to_ignore_on_load_unexpected or ()
        unread = re.compile("|".join([*ignored, r"rotary_emb\.inv_freq"]))
        inside = {
            tensor.dtype
            for name, tensor in self.stored.items()
            if name not in outside and not unread.search(name)
        }
        if inside:
            arguments["dtype"] = functools.reduce(torch.promote_types, inside)
        return self.load_whole(arguments)

    def as_stored(self, model: PreTrainedModel) -> None:
        """Give each tensor of a model of `load_stored` its stored dtype, and what that dtype rounded."""
        for name, tensor in model.state_dict(keep_vars=True).items():
            stored = self.stored.get(name)
            if stored is None or stored.dtype == tensor.dtype:
                continue
            exact = tensor.to(stored.dtype)
            if torch.promote_types(stored.dtype, tensor.dtype) != tensor.dtype:
                in_file = tensor_in(stored.file, name)
                # Another where shapes may differ, and a bias that was repaired.
                if torch.equal(in_file.to(tensor.dtype), tensor):
                    exact = in_file
            tensor.data = exact.detach()

    def load_whole(self, arguments: Mapping[str, Any] | None = None) -> PreTrainedModel:
        """Load the model unpruned; see `with_stored_widths`.

        `arguments` are those of ``from_pretrained``; default: the user's.

        Raises:
            ValueError: It is damaged, or an argument is wrong.
        """
        arguments = dict(self.model_arguments if arguments is None else arguments)
        if arguments.get("gguf_file") is not None:
            from transformers import GgufConfig

            # Its blocks can be neither ranked nor sliced, and are exact in float32.
            arguments.setdefault("dtype", torch.float32)
            arguments["quantization_config"] = GgufConfig(dequantize=True)
        ignore_sizes = arguments.get("ignore_mismatched_sizes")
        widths = self.cut.widths
        model, loading = self._built(arguments, widths.uncut)
        check_filled(model, loading, widths, ignore_sizes)
        return model

    def place(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return a pruned model in the dtype, and on the devices, that the user asked for.

        Args:
            model: That of `load_stored`, pruned.
        """
        arguments = {
            name: value
            for name, value in self.model_arguments.items()
            if name not in READING and value is not None
        }
        dtype = arguments.pop("dtype", "auto")
        if dtype == "auto":
            # As `from_pretrained` loads the whole model if it is not told any.
            config: Any = self.config
            if type(config) is not type(model.config):
                config = text_config(config)
            stored = (tensor.dtype for tensor in self.stored.values())
            dtype = config.dtype or next(stored, model.dtype)
        elif isinstance(dtype, str):
            dtype = getattr(torch, dtype)
        if dtype == model.dtype and not any(map(PLACING.fullmatch, arguments)):
            return model
        self.as_stored(model)
        state = stored_once(model)
        for name, tensor in state.items():
            exceeds = tensor.is_floating_point() and torch.finfo(tensor.dtype).max
            if exceeds > torch.finfo(dtype).max:
                check_finite(name, tensor.to(dtype))
        arguments |= {"dtype": dtype, "state_dict": state}
        record: PruneRecord = model.prune_record  # type: ignore[assignment]
        placed, _ = self._built(arguments, record)
        placed.config.name_or_path = model.config.name_or_path
        placed.generation_config = model.generation_config
        # What `save_pretrained` takes apart again.
        placed._weight_conversions = getattr(  # type: ignore[assignment]
            model, "_weight_conversions", None
        )
        placed.prune_record = record  # type: ignore[assignment]
        return placed

    def _built(
        self, arguments: dict[str, Any], cut: Cut
    ) -> tuple[PreTrainedModel, Mapping[str, Any]]:
        """Build a model of a `cut` from the state dict in `arguments`, or else from its files.

        Returns:
            The model, and transformers' loading info.
        """
        widths, config = cut.widths, self.config
        loader, source = self.auto_class, None
        if "state_dict" not in arguments:
            source = self.pretrained
            # What does not fit is told by `stored_widths` and `check_filled`.
            arguments = arguments | {"ignore_mismatched_sizes": True}
        if source is None or cut.targets != widths.configured:
            loader, config = type(widths.skeleton), cut.config()
        if cut.inexpressible:
            loader = with_widths(loader, cut.targets)
        with BUILDING, clear_errors(self.pretrained, self.model_arguments):
            model, loading = loader.from_pretrained(
                source, config=config, output_loading_info=True, **arguments
            )
        model.__class__ = type(widths.skeleton)
        return model, loading


def stored_once(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the state dict of a model with tied tensors under one of their names."""
    state = model.state_dict()
    for name in model.all_tied_weights_keys:
        state.pop(name, None)
    return state


def tensors_of(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a model under the keys that its checkpoint has for them.

    Source: `transformers.PreTrainedModel.save_pretrained`, which renames them in the same way.
    """
    from transformers.core_model_loading import revert_weight_conversion

    yield from revert_weight_conversion(model, stored_once(model)).items()
