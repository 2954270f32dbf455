"""The stand-in for a checkpoint while one model loads from it.

`Session.provide` gives transformers a state dict in which the entries of the GLU-MLPs
are of the kept width. How it gets between transformers and the files is said in
`lm_eval_pruned.checkpoints.transformers_api`.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.checkpoints.narrowed import (
    AssembledTensor,
    NarrowedMlp,
    RegionOfSource,
    shape_of,
)
from lm_eval_pruned.checkpoints.route import OWN_WAY, RouteDeclined, WidthsDiffer
from lm_eval_pruned.checkpoints.sources import find_sources
from lm_eval_pruned.checkpoints.transformers_api import (
    Placement,
    shares_weights_among_ranks,
    target_names,
)
from lm_eval_pruned.pruning.criteria import proves_finite
from lm_eval_pruned.pruning.dropping import layers_of
from lm_eval_pruned.pruning.layouts import (
    GluMlp,
    UnsupportedModelError,
    describe,
    find_glu_mlps,
    resize,
)
from lm_eval_pruned.pruning.scores import ScoreTable


if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor
    from transformers import PreTrainedModel

    from lm_eval_pruned.pruning.depth import Depth
    from lm_eval_pruned.pruning.plan import PrunePlan
    from lm_eval_pruned.pruning.regions import Region
    from lm_eval_pruned.pruning.widths import Widths


class Session:
    """One load of one model: opens its files and narrows its GLU-MLPs."""

    def __init__(
        self,
        plan: PrunePlan,
        widths: Widths,
        targets: Mapping[str, int],
        known: ScoreTable | None = None,
    ):
        self.plan = plan
        self.known = known or ScoreTable()
        self.declined: str | None = None
        self.error: Exception | None = None
        self._widths = widths
        self._targets = targets
        self._files = contextlib.ExitStack()
        self._one_layer = threading.Lock()
        self._mlps: list[NarrowedMlp] = []
        self._parts: dict[str, list] = {}
        self._model: PreTrainedModel | None = None

    @property
    def opened(self) -> bool:
        """Whether transformers asked for the checkpoint of a model."""
        return self._model is not None

    @property
    def changes_model(self) -> bool:
        """Whether the model differs from the one that stock transformers loads."""
        alike = self._targets == self._widths.configured == self._widths.actual
        return not alike or self._widths.depth is not None

    def provide(self, model, state_dict, checkpoint_files, load_config):
        """Stand in for the checkpoint of the first model of its class; see `reading`."""
        # A class may load another model of its class while its own is loaded.
        if self.opened:
            return state_dict, checkpoint_files
        entries = self.open(model, state_dict, checkpoint_files, load_config)
        if not self.changes_model:
            return state_dict, checkpoint_files
        entries = self.merge(entries, model, load_config)
        # Without file names, offloading to disk writes the narrowed weights instead of
        # pointing into the original files.
        return entries, None

    def check_filled(self, model: PreTrainedModel) -> None:
        """Refuse a narrowed model that was filled with something else than narrowed weights.

        A class that goes past the session meets narrow shapes, and mostly fails on
        them; but where it was told to put up with other shapes, it draws weights.

        Raises:
            UnsupportedModelError: The MLPs of `model` did not come from this session.
            RouteDeclined: They did not, but are as wide as they are stored.
        """
        # Of experts, a process may ask for its share only.
        read = not self.changes_model or any(not mlp.is_untouched for mlp in self._mlps)
        if read and any(part is self._model for part in model.modules()):
            return
        if self.changes_model:
            raise UnsupportedModelError(
                f"{describe(model)} loads its checkpoint in its own way, which put no weights "
                "into the narrowed MLPs and did not fail on their shapes: leave out "
                "ignore_mismatched_sizes, or load it in full and pass it to prune_model."
            )
        if self.plan.changes_model:
            raise RouteDeclined(OWN_WAY)

    def score(self, names: Collection[str]) -> None:
        """Score the MLPs of these names, before any is narrowed."""
        for mlp in self._mlps:
            if mlp.name in names:
                mlp.score()

    def kept(self) -> tuple[Tensor, ...]:
        """Return the kept neurons of every MLP, each of shape (k,), on the CPU."""
        if not self.plan.prunes:
            return ()
        return tuple(mlp.kept() for mlp in self._mlps)

    def close(self) -> None:
        self._files.close()
        # Sessions wait for the garbage collector; the model must not wait with them.
        self._model, self._parts = None, {}

    def scoring(self, criterion: str) -> contextlib.AbstractContextManager[Any]:
        """Let one layer at a time be scored by a criterion that copies its weights."""
        if proves_finite(criterion):
            return contextlib.nullcontext()
        return self._one_layer

    def open(self, model, state_dict, checkpoint_files, load_config) -> dict[str, Any]:
        """Return the checkpoint as a state dict of lazy entries.

        Raises:
            RouteDeclined: The checkpoint is not in safetensors, or transformers
                computes some GLU weight from other tensors in a way not known here.
            WidthsDiffer: The layers have other widths than the session was told.
            OSError: A file is damaged.
            ValueError: A GLU weight is missing or has another shape than the
                config says.
        """
        self._model = model
        entries = self._open_files(state_dict, checkpoint_files)
        if self._widths.depth is not None:
            entries = self._without_layers(entries, self._widths.depth, load_config)
        mlps = find_glu_mlps(model)
        narrowed = [
            NarrowedMlp(
                self, mlp, self._widths.actual[mlp.name], self._targets[mlp.name]
            )
            for mlp in mlps
        ]
        by_name = {mlp.name: mlp for mlp in narrowed}
        wanted = {
            (mlp.name, place): region
            for mlp in mlps
            for place, region in mlp.regions.items()
        }
        replaced = {}
        placement = Placement(load_config, model)
        self._parts = find_sources(entries, model, mlps, load_config)
        for key, parts in self._parts.items():
            pieces = {}
            for mlp, place, region, sourced in parts:
                wanted.pop((mlp.name, place), None)
                pieces[region] = by_name[mlp.name].add(
                    place[0],
                    place[1],
                    RegionOfSource(sourced, entries[key]) if sourced else entries[key],
                    (
                        placement.device(region.parameter),
                        placement.dtype(region.parameter),
                    ),
                )
            whole = len(parts) == 1 and not parts[0][3]
            replaced[key] = (
                next(iter(pieces.values())) if whole else AssembledTensor(pieces)
            )
        if wanted:
            missing = next(iter(wanted.values()))
            raise ValueError(
                f"The checkpoint holds no tensor for {missing.parameter}: it is incomplete, or "
                "its config.json describes another model."
            )
        self._mlps = narrowed
        if all(map(proves_finite, self.plan.criteria)):
            # Nothing is copied for their scores, so several layers may be at it.
            for mlp, following in itertools.pairwise(narrowed):
                mlp.following = following
        self._check_widths()
        self._resize(model, mlps, load_config)
        return entries | replaced

    def merge(self, entries: dict[str, Any], model, load_config) -> dict[str, Any]:
        """Put together what transformers would, which takes a second copy for that.

        Args:
            entries: What `open` returned.
            model: The model.
            load_config: How it is loaded.

        Returns:
            The entries, with one for each parameter in place of those of its parts.
        """
        keys: dict[str, dict[Region, str]] = {}
        for key, [(mlp, _, region, sourced), *others] in self._parts.items():
            whole = others or sourced or region.is_whole
            # A process of many may need some of the parts only.
            if not whole and type(mlp.parameter(region)) is torch.nn.Parameter:
                keys.setdefault(region.parameter, {})[region] = key
        names = target_names(keys, model, load_config)
        whole_ones = {
            parameter: AssembledTensor(
                {region: entries[key] for region, key in regions.items()}
            )
            for parameter, regions in keys.items()
            if names[parameter] == (parameter, None, None) and parameter not in entries
        }
        merged = {key for parameter in whole_ones for key in keys[parameter].values()}
        # `save_pretrained` takes apart what it remembers to have been put together.
        target_names(merged, model, load_config, remember=True)
        kept = {key: entry for key, entry in entries.items() if key not in merged}
        return kept | whole_ones

    def _without_layers(
        self, entries: dict[str, Any], depth: Depth, load_config
    ) -> dict[str, Any]:
        """Leave out the entries of dropped layers, and number the others anew."""
        whole = self._widths.whole.skeleton()
        path, _ = layers_of(whole)
        gone = len(depth.dropped)
        new = {old: number for number, old in enumerate(depth.kept)}
        kept: dict[str, Any] = {}
        for key, (name, _, _) in target_names(entries, whole, load_config).items():
            if not name.startswith(f"{path}."):
                kept[key] = entries[key]
                continue
            number = name[len(path) + 1 :].partition(".")[0]
            before, found, after = key.partition(f".{number}.")
            if not found or not number.isdecimal():
                raise RouteDeclined(f"its key {key} does not name a layer")
            # Layers beyond the last, as for predicting several tokens, stay beyond it.
            if int(number) in new or int(number) >= depth.before:
                now = new.get(int(number), int(number) - gone)
                kept[f"{before}.{now}.{after}"] = entries[key]
        return kept

    def _check_widths(self) -> None:
        """Compare the widths of the checkpoint with those the session was told."""
        stored = {mlp.name: mlp.stored_width() for mlp in self._mlps}
        other = [
            name for name, width in stored.items() if width != self._widths.actual[name]
        ]
        if not other:
            return
        if (
            len(set(stored.values())) == 1
            or self._widths.actual != self._widths.configured
        ):
            key = self._widths.keys[other[0]]
            raise ValueError(
                f"{other[0]} has {stored[other[0]]} neurons in the checkpoint, but its config.json "
                f"says {self._widths.actual[other[0]]}: correct {key} there, or copy the "
                "checkpoint again."
            )
        raise WidthsDiffer(stored)

    def _resize(self, model, mlps: list[GluMlp], load_config) -> None:
        """Build the layers whose width the config cannot express."""
        odd = [mlp for mlp in mlps if mlp.width != self._targets[mlp.name]]
        if not odd:
            return
        for mlp in odd:
            for region in mlp.regions.values():
                if type(mlp.parameter(region)) is not torch.nn.Parameter:
                    raise UnsupportedModelError(
                        f"{describe(model)} would have layers of different width, which can be "
                        "neither quantised by replacing layers nor split by tensor parallelism: "
                        "leave out quantization_config and tp_plan, or layers and skip_layers."
                    )
        with torch.device("meta"):
            resize(
                odd,
                {
                    (mlp.name, *place): torch.empty(
                        shape_of(
                            place[0], place[1], self._targets[mlp.name], mlp.hidden_size
                        ),
                        dtype=mlp.parameter(region).dtype,
                    )
                    for mlp in odd
                    for place, region in mlp.regions.items()
                },
            )

    def _open_files(self, state_dict, checkpoint_files) -> dict[str, Any]:
        from safetensors import SafetensorError

        if shares_weights_among_ranks():
            raise RouteDeclined("DeepSpeed ZeRO-3 gathers its weights itself")
        if state_dict is not None or not checkpoint_files:
            raise RouteDeclined("its weights do not come from files")
        if not all(str(file).endswith(".safetensors") for file in checkpoint_files):
            raise RouteDeclined("its checkpoint is not in safetensors")
        entries: dict[str, Any] = {}
        for file in checkpoint_files:
            try:
                entries |= self.entries_of(file)
            except (SafetensorError, OSError) as error:
                raise OSError(
                    f"{file} is not an intact safetensors file ({error}): download or copy it again."
                ) from None
        return entries

    def entries_of(self, file: str) -> dict[str, Any]:
        """Return the tensors of one safetensors file, none of them read."""
        from safetensors import safe_open

        opened = self._files.enter_context(safe_open(file, framework="pt"))
        return {key: opened.get_slice(key) for key in opened.keys()}
