"""Pruning while loading: the full model never exists in memory.

`load_pruned` asks transformers for a model with a narrowed config. While it
loads, `_Session` stands in for the checkpoint: the entries of the GLU-MLPs are
`NarrowedTensor`s, which look like tensors of the kept width. When transformers
materialises one, the layer's gate and up are scored as they lie in the file, as
they would look in the target dtype, and only the kept neurons are copied, converted
and moved to the target device. Everything else transformers does
with a checkpoint (shards, renamed keys, ``device_map``, dtype casts, quantising
while loading, tensor parallelism) sees a checkpoint that was always narrow.

Source of the protocol: `transformers.core_model_loading.spawn_materialize`. How the
session gets between transformers and the files is said in `transformers_api`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import threading
from dataclasses import dataclass
from inspect import getattr_static
from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.checkpoints.damage import (
    check_complete,
    check_config,
    check_entries,
    check_widths_fit,
    clear_config_errors,
    clear_load_errors,
)
from lm_eval_pruned.checkpoints.known_request import table_for
from lm_eval_pruned.checkpoints.quantisation import (
    quantising_arguments,
    with_quantisation,
)
from lm_eval_pruned.checkpoints.skeleton import skeleton
from lm_eval_pruned.checkpoints.transformers_api import (
    Placement,
    in_order,
    shares_weights_among_ranks,
    standing_in,
    target_names,
    unknown_loader,
)
from lm_eval_pruned.pruning.alignment import warn_misaligned
from lm_eval_pruned.pruning.calibration import check_observable, read_texts
from lm_eval_pruned.pruning.criteria import kept_set, proves_finite
from lm_eval_pruned.pruning.layouts import (
    NEURON_AXIS,
    GluMlp,
    Slot,
    UnsupportedModelError,
    assemble,
    count_parameters,
    describe,
    find_glu_mlps,
    resize,
    slots_by_parameter,
)
from lm_eval_pruned.pruning.scores import ScoreTable
from lm_eval_pruned.pruning.slicing import (
    PruneRecord,
    carry_out,
    check_finite,
    choose_experts_implementation,
    narrow,
    score,
    warn_inexpressible,
)
from lm_eval_pruned.pruning.widths import Widths
from lm_eval_pruned.util.garbage import without_collections


if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from torch import Tensor
    from transformers import (
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

    from lm_eval_pruned.pruning.plan import Layers, Number, PrunePlan

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
_CPU = torch.device("cpu")
#: Arguments of `from_pretrained` that AutoConfig must not absorb into the config.
_MODEL_ARGUMENTS = ("dtype", "torch_dtype", "quantization_config")


def load_pruned(
    pretrained: str,
    *,
    ratio: Number | None = None,
    prune_percent: Number | None = None,
    intermediate_size: Number | None = None,
    criterion: str = "maw",
    multiple_of: Number = 1,
    seed: Number = 0,
    layers: Layers | None = None,
    skip_layers: Layers | None = None,
    calibration: str | None = None,
    calibration_samples: Number | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    auto_class: type | None = None,
    **from_pretrained: Any,
) -> PreTrainedModel:
    """Load a model whose GLU-MLPs are narrowed while its checkpoint is read.

    Gate and up come out as (k, H) instead of (I, H), down as (H, k). Checkpoints
    that cannot be pruned while they load (GGUF, ``.bin``, a release of transformers
    that loads in a way not known here) are loaded in full and pruned in memory, with
    identical weights and a warning. What sizes mean in a model with experts is said
    in `lm_eval_pruned.prune_model`.

    A checkpoint whose layers differ in width, although its config knows only one,
    loads with the widths of its tensors; sizes then prune from there: layers that
    are narrower than ``ratio`` or ``intermediate_size`` ask stay as they are, and
    ``prune_percent`` is a share of each layer's own width.

    Args:
        pretrained: Folder or Hub name of the model.
        ratio: Expansion ratio to keep; the kept width is ``ceil(ratio * H)``.
        prune_percent: Share of neurons to remove, in percent.
        intermediate_size: Kept width, in neurons. At most one of these three; none
            loads the model unpruned.
        criterion: Importance score; see `lm_eval_pruned.criteria`.
        multiple_of: Round the kept width down to a multiple of this, in neurons.
        seed: Seed of the ``random`` criterion.
        layers: Layers to prune, such as ``4-11`` or ``0,2-5``, counted from 0;
            default: all.
        skip_layers: Layers to leave as they are, instead of `layers`.
        calibration: JSON Lines file of text, for criteria that look at activations;
            see `lm_eval_pruned.pruning.calibration`.
        calibration_samples: How many of its texts to use; default: all.
        tokenizer: What reads that text; default: the tokenizer of `pretrained`.
        device: Where to load to; default: the CPU. Only the kept neurons go there:
            scores are computed on the CPU.
        dtype: Weight dtype; default: the one the checkpoint is stored in.
        auto_class: The transformers class to load with; default
            `AutoModelForCausalLM`.
        **from_pretrained: Anything else ``from_pretrained`` takes.

    Returns:
        The model, in evaluation mode. ``model.prune_record`` says what was done.

    Raises:
        ValueError: An argument is out of range, or a weight is NaN or infinite.
        UnsupportedModelError: The model cannot be pruned.
        OSError: The checkpoint is missing, incomplete or damaged.

    Source: arXiv 2512.22671, section 3.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(
        ...     hidden_size=32,
        ...     intermediate_size=128,
        ...     num_hidden_layers=2,
        ...     num_attention_heads=4,
        ...     vocab_size=64,
        ... )
        >>> with TemporaryDirectory() as folder:
        ...     LlamaForCausalLM(tiny).save_pretrained(folder)
        ...     model = load_pruned(folder, prune_percent=40)
        >>> model.config.intermediate_size
        77
        >>> model.model.layers[0].mlp.down_proj.weight.shape
        torch.Size([32, 77])
        >>> model.prune_record.parameters_before, model.prune_record.parameters_after
        (37024, 27232)
    """
    import transformers

    auto_class = auto_class or transformers.AutoModelForCausalLM
    if dtype is not None:
        from_pretrained["dtype"] = dtype
    if device is not None:
        if from_pretrained.get("device_map") is not None:
            raise ValueError(
                f"device={device} and device_map={from_pretrained['device_map']} both say where "
                "to load: pass one."
            )
        from_pretrained["device_map"] = {"": device}
    return load_with_arguments(
        auto_class,
        pretrained,
        {
            "ratio": ratio,
            "prune_percent": prune_percent,
            "intermediate_size": intermediate_size,
            "criterion": criterion,
            "multiple_of": multiple_of,
            "seed": seed,
            "layers": layers,
            "skip_layers": skip_layers,
            "calibration": calibration,
            "calibration_samples": calibration_samples,
        },
        from_pretrained,
        tokenizer=tokenizer,
    )


def load_with_arguments(
    auto_class: type,
    pretrained: str,
    prune_arguments: dict[str, Any],
    from_pretrained: dict[str, Any],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    inspect: Callable[[Request], None] | None = None,
) -> PreTrainedModel:
    """Load and prune; `load_pruned` with its arguments in groups.

    Args:
        auto_class: The transformers class to load with.
        pretrained: Folder or Hub name of the model.
        prune_arguments: Keyword arguments of `PrunePlan.from_arguments`.
        from_pretrained: Keyword arguments of ``auto_class.from_pretrained``.
        tokenizer: What reads calibration text; default: that of `pretrained`.
        inspect: Called with what is about to be loaded, before weights are read; may
            raise.
    """
    inspect = inspect or (lambda request: None)
    request = Request.resolve(auto_class, pretrained, prune_arguments, from_pretrained)
    inspect(request)
    try:
        return _load(request, tokenizer)
    except _WidthsDiffer as found:
        request = Request.resolve(
            auto_class, pretrained, prune_arguments, from_pretrained, found
        )
        inspect(request)
        return _load(request, tokenizer)


def _load(
    request: Request, tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedModel:
    plan, widths = request.plan, request.widths
    targets = widths.targets(plan)
    narrowed = widths.narrowed_config(targets)
    before = widths.count_parameters(widths.actual)
    known = table_for(request)
    session = _Session(plan, widths, targets, known)
    session.declined = request.must_load_whole(known)
    if session.declined is None:
        with (
            without_collections(),
            contextlib.closing(session),
            standing_in(session),
            _clear_errors(session, request),
        ):
            model = request.load(narrowed if session.changes_model else widths.original)
            session.check_filled(model)
            choose_experts_implementation(model)
            model.prune_record = PruneRecord.of(  # type: ignore[assignment]
                plan,
                widths,
                before,
                count_parameters(model),
                session.kept(),
                known.calibration if plan.prunes else None,
            )
            warn_inexpressible(widths, targets)
            warn_misaligned(model, plan, widths, targets)
            return model
    request.check_prunable_in_memory(session.declined)
    if plan.prunes:
        logger.warning(
            "%s is loaded in full and pruned in memory, because %s.",
            request.pretrained,
            session.declined,
        )
    if plan.prunes and plan.calibration is not None and tokenizer is None:
        tokenizer = request.load_tokenizer()
    return carry_out(plan, request.load_whole(), tokenizer=tokenizer, known=known)


@dataclass(frozen=True)
class Request:
    """What is to be loaded, known before any weight is read.

    Attributes:
        auto_class: The transformers class to load with.
        pretrained: Folder or Hub name of the model.
        plan: What to do to the GLU-MLPs.
        widths: The widths that they have.
        model_arguments: Keyword arguments of ``from_pretrained`` besides the config.
    """

    auto_class: Any
    pretrained: str
    plan: PrunePlan
    widths: Widths
    model_arguments: dict[str, Any]

    @classmethod
    def resolve(
        cls,
        auto_class: Any,
        pretrained: str,
        prune_arguments: dict[str, Any],
        from_pretrained: dict[str, Any],
        found: _WidthsDiffer | None = None,
    ) -> Request:
        """Read the config of a model and plan its pruning.

        Takes the arguments of `load_with_arguments`, and the widths that a session
        found in the checkpoint if they are not those of the config.

        Raises:
            ValueError: An argument is out of range.
            UnsupportedModelError: The model cannot be pruned.
            OSError: The config cannot be read.
        """
        with clear_config_errors(pretrained):
            config, model_arguments = _resolve_config(pretrained, dict(from_pretrained))
            _refuse_quantised(config, model_arguments)

        def build(config: PretrainedConfig) -> PreTrainedModel:
            return skeleton(
                auto_class,
                config,
                trust_remote_code=bool(from_pretrained.get("trust_remote_code")),
            )

        actual = None
        if found is not None:
            actual = found.actual
            logger.info(
                "The layers of %s have widths of their own: its tensors have from %d to %d "
                "neurons.",
                pretrained,
                min(actual.values()),
                max(actual.values()),
            )
        with without_collections(), clear_config_errors(pretrained):
            widths = Widths(config, build, actual)
            plan = widths.plan(**prune_arguments)
        return cls(auto_class, pretrained, plan, widths, model_arguments)

    def must_load_whole(self, known: ScoreTable | None = None) -> str | None:
        """Return why the model cannot be pruned while it loads, if that is known.

        Args:
            known: Scores from an earlier load of the same model.
        """
        if self.model_arguments.get("gguf_file") is not None:
            return "it is a GGUF file"
        if (unknown := unknown_loader()) is not None:
            return unknown
        if not self.plan.prunes or self.plan.calibration is None:
            return None
        if known is not None and known.covers(
            self.widths.actual, self.widths.targets(self.plan)
        ):
            return None
        return f"criterion={self.plan.criterion} looks at its activations"

    def check_prunable_in_memory(self, why: str | None) -> None:
        """Refuse what pruning after loading cannot do, before the weights are read.

        Args:
            why: Why the model is not pruned while it loads.

        Raises:
            ValueError: The model would be quantised first, or its calibration text
                cannot be read.
            UnsupportedModelError: Its activations cannot be observed.
        """
        if not self.plan.prunes:
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
        if self.plan.calibration is not None:
            read_texts(self.plan.calibration, self.plan.calibration_samples)
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
        self, config: PretrainedConfig, neurons: Collection[str] = ()
    ) -> PreTrainedModel:
        """Load the model as transformers does, with `config`.

        Args:
            config: The config.
            neurons: Parameters that have to be as wide as they are stored, even if
                the user lets other shapes differ.
        """
        from transformers import GgufConfig, PreTrainedModel

        arguments = with_quantisation(self.model_arguments)
        if arguments.get("gguf_file") is not None:
            # Blocks of a GGUF file can be neither ranked nor sliced.
            arguments["quantization_config"] = GgufConfig(dequantize=True)
        loader = getattr_static(self.widths.model_class, "from_pretrained")
        if loader is not getattr_static(PreTrainedModel, "from_pretrained"):
            # A loader of its own need not know how to tell what was missing.
            return self.auto_class.from_pretrained(
                self.pretrained, config=config, **arguments
            )
        model, found = self.auto_class.from_pretrained(
            self.pretrained, config=config, output_loading_info=True, **arguments
        )
        check_complete(found["missing_keys"])
        check_widths_fit(found.get("mismatched_keys", ()), neurons)
        return model

    def load_whole(self) -> PreTrainedModel:
        """Load the model unpruned.

        Raises:
            ValueError: It is damaged, or an argument is wrong.
        """
        with clear_load_errors(self.pretrained, self.model_arguments):
            neurons = slots_by_parameter(self.widths.mlps)
            return self.load(self.widths.original, neurons)


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


#: Why a class that goes past the session is pruned in memory.
OWN_WAY = "its model class loads checkpoints in its own way"


class _RouteDeclined(Exception):
    """The checkpoint cannot be pruned while it loads; nothing was read yet."""


class _WidthsDiffer(Exception):
    """The layers of the checkpoint differ in width; nothing was read yet."""

    def __init__(self, actual: dict[str, int]):
        super().__init__(str(actual))
        self.actual = actual


@contextlib.contextmanager
def _clear_errors(session: _Session, request: Request) -> Iterator[None]:
    """Turn what escapes from a load into one sentence, or into `session.declined`."""
    try:
        yield
    except _RouteDeclined as reason:
        session.declined = str(reason)
    except _WidthsDiffer:
        raise
    except Exception as error:
        if (
            session.error is None
            and not session.opened
            and isinstance(error, RuntimeError)
        ):
            # A class with a loader of its own went past the session and met narrow shapes.
            session.declined = OWN_WAY
            return
        with clear_load_errors(request.pretrained, request.model_arguments):
            if session.error is not None:
                raise session.error from None
            raise
    else:
        if session.error is not None:
            raise session.error


class _Session:
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
        self._mlps: list[_NarrowedMlp] = []
        self._parts: dict[str, list] = {}
        self._model: PreTrainedModel | None = None

    @property
    def opened(self) -> bool:
        """Whether transformers asked for the checkpoint of a model."""
        return self._model is not None

    @property
    def changes_model(self) -> bool:
        """Whether the model differs from the one that stock transformers loads."""
        return not (self._targets == self._widths.configured == self._widths.actual)

    def provide(self, model, state_dict, checkpoint_files, load_config):
        """Stand in for the checkpoint of the first model of its class; see `standing_in`."""
        # A class may load another model before or while its own is loaded.
        its_own = type(model).__name__ == self._widths.model_class.__name__
        if self.opened or not its_own:
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
            _RouteDeclined: They did not, but are as wide as they are stored.
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
        if self.plan.prunes:
            raise _RouteDeclined(OWN_WAY)

    def kept(self) -> tuple[Tensor, ...]:
        """Return the kept neurons of every MLP, each of shape (k,), on the CPU."""
        if not self.plan.prunes:
            return ()
        return tuple(mlp.kept() for mlp in self._mlps)

    def close(self) -> None:
        self._files.close()

    def scoring(self, criterion: str) -> contextlib.AbstractContextManager[Any]:
        """Let one layer at a time be scored by a criterion that copies its weights."""
        if proves_finite(criterion):
            return contextlib.nullcontext()
        return self._one_layer

    def open(self, model, state_dict, checkpoint_files, load_config) -> dict[str, Any]:
        """Return the checkpoint as a state dict of lazy entries.

        Raises:
            _RouteDeclined: The checkpoint is not in safetensors, or transformers
                computes some GLU weight from other tensors in a way not known here.
            _WidthsDiffer: The layers have other widths than the session was told.
            OSError: A file is damaged.
            ValueError: A GLU weight is missing or has another shape than the
                config says.
        """
        self._model = model
        entries = self._open_files(state_dict, checkpoint_files)
        mlps = find_glu_mlps(model)
        narrowed = [
            _NarrowedMlp(
                self, mlp, self._widths.actual[mlp.name], self._targets[mlp.name]
            )
            for mlp in mlps
        ]
        by_name = {mlp.name: mlp for mlp in narrowed}
        wanted = {
            (mlp.name, place): slot for mlp in mlps for place, slot in mlp.slots.items()
        }
        replaced = {}
        placement = Placement(load_config, model)
        self._parts = _sources(entries, model, mlps, load_config)
        for key, parts in self._parts.items():
            pieces = {}
            for mlp, place, slot, sourced in parts:
                wanted.pop((mlp.name, place), None)
                pieces[slot] = by_name[mlp.name].add(
                    place[0],
                    place[1],
                    _SlotOfSource(sourced, entries[key]) if sourced else entries[key],
                    (
                        placement.device(slot.parameter),
                        placement.dtype(slot.parameter),
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
        if proves_finite(self.plan.criterion):
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
        keys: dict[str, dict[Slot, str]] = {}
        for key, [(mlp, _, slot, sourced), *others] in self._parts.items():
            whole = others or sourced or slot.is_whole
            # A process of many may need some of the parts only.
            if not whole and type(mlp.parameter(slot)) is torch.nn.Parameter:
                keys.setdefault(slot.parameter, {})[slot] = key
        names = target_names(keys, model, load_config)
        whole_ones = {
            parameter: AssembledTensor(
                {slot: entries[key] for slot, key in slots.items()}
            )
            for parameter, slots in keys.items()
            if names[parameter] == (parameter, None, None) and parameter not in entries
        }
        merged = {key for parameter in whole_ones for key in keys[parameter].values()}
        # `save_pretrained` takes apart what it remembers to have been put together.
        target_names(merged, model, load_config, remember=True)
        kept = {key: entry for key, entry in entries.items() if key not in merged}
        return kept | whole_ones

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
        raise _WidthsDiffer(stored)

    def _resize(self, model, mlps: list[GluMlp], load_config) -> None:
        """Build the layers whose width the config cannot express."""
        odd = [mlp for mlp in mlps if mlp.width != self._targets[mlp.name]]
        if not odd:
            return
        for mlp in odd:
            for slot in mlp.slots.values():
                if type(mlp.parameter(slot)) is not torch.nn.Parameter:
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
                        _shape(
                            place[0], place[1], self._targets[mlp.name], mlp.hidden_size
                        ),
                        dtype=mlp.parameter(slot).dtype,
                    )
                    for mlp in odd
                    for place, slot in mlp.slots.items()
                },
            )

    def _open_files(self, state_dict, checkpoint_files) -> dict[str, Any]:
        from safetensors import SafetensorError

        if shares_weights_among_ranks():
            raise _RouteDeclined("DeepSpeed ZeRO-3 gathers its weights itself")
        if state_dict is not None or not checkpoint_files:
            raise _RouteDeclined("its weights do not come from files")
        if not all(str(file).endswith(".safetensors") for file in checkpoint_files):
            raise _RouteDeclined("its checkpoint is not in safetensors")
        entries: dict[str, Any] = {}
        for file in checkpoint_files:
            try:
                entries |= self._entries_of(file)
            except (SafetensorError, OSError) as error:
                raise OSError(
                    f"{file} is not an intact safetensors file ({error}): download or copy it again."
                ) from None
        return entries

    def _entries_of(self, file: str) -> dict[str, Any]:
        """Return the tensors of one safetensors file, none of them read."""
        from safetensors import safe_open

        opened = self._files.enter_context(safe_open(file, framework="pt"))
        return {key: opened.get_slice(key) for key in opened.keys()}


def _shape(projection: str, part: str, width: int, hidden_size: int) -> list[int]:
    if part == "bias":
        return [width]
    return [hidden_size, width] if projection == "down_proj" else [width, hidden_size]


class _NarrowedMlp:
    """The source tensors of one GLU-MLP, and the kept set once it is known."""

    def __init__(self, session: _Session, mlp: GluMlp, width_before: int, width: int):
        self.layer = mlp.layer
        self.name = mlp.name
        self.width = width
        self._width_before = width_before
        self._hidden_size = mlp.hidden_size
        self._session = session
        self._sources: dict[tuple[str, str], NarrowedTensor] = {}
        self._ready: dict[tuple[str, str], Tensor] = {}
        self._kept: Tensor | None = None
        self._lock = threading.Lock()
        self.following: _NarrowedMlp | None = None

    def add(self, projection: str, part: str, source, target):
        """Take the source of one projection and return its narrowed entry."""
        if not source.get_dtype().startswith(("F32", "F16", "BF16", "F64")):
            raise ValueError(
                f"{self.name}.{projection}.{part} is stored as {source.get_dtype()}, which can "
                "be neither ranked nor sliced: use a checkpoint in float32, float16 or bfloat16."
            )
        axis = NEURON_AXIS[projection] if part == "weight" else 0
        tensor = NarrowedTensor(self, projection, part, axis, source, target)
        self._sources[projection, part] = tensor
        return tensor

    def stored_width(self) -> int:
        """Return the number of neurons in the checkpoint.

        Raises:
            ValueError: Its tensors do not fit together.
        """
        gate = self._sources["gate_proj", "weight"].stored_shape()
        stored = gate[0] if len(gate) == 2 and gate[0] >= 1 else self._width_before
        for (projection, part), tensor in self._sources.items():
            shape = tensor.stored_shape()
            if shape != _shape(projection, part, stored, self._hidden_size):
                says = _shape(projection, part, self._width_before, self._hidden_size)
                raise ValueError(
                    f"{self.name}.{projection}.{part} has shape {shape} in the checkpoint, but "
                    f"its config.json says {says}."
                )
        return stored

    @property
    def is_untouched(self) -> bool:
        """Whether none of its weights was asked for."""
        return self._kept is None

    def kept(self) -> Tensor:
        """Return the kept neurons, shape (k,), int64, on the CPU."""
        with self._lock:
            return self._kept_set(_CPU)

    def take(self, tensor: NarrowedTensor, device: torch.device) -> Tensor:
        """Return the narrowed weights of `tensor` in its target dtype, new ones on `device`."""
        try:
            with self._locked(device):
                kept = self._kept_set(device)
                key = (tensor.projection, tensor.part)
                if key in self._ready:
                    return self._ready.pop(key)
            weight = tensor.read()
            finite = self._session.known.finite
            if key == ("down_proj", "weight") and self.name not in finite:
                check_finite(f"{self.name}.down_proj.weight", weight, tensor.dtype)
                finite.add(self.name)
            return tensor.narrowed(weight, kept, device)
        except Exception as error:
            self._session.error = self._session.error or error
            raise

    @contextlib.contextmanager
    def _locked(self, device: torch.device) -> Iterator[None]:
        """Hold the lock; while another thread has it, score an MLP that comes later."""
        if not self._lock.acquire(blocking=False):
            later = self.following
            while later is not None and not later._lock.acquire(blocking=False):
                later = later.following
            if later is not None:
                try:
                    later._kept_set(device)
                finally:
                    later._lock.release()
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def _kept_set(self, device: torch.device) -> Tensor:
        if self._kept is None and self.width == self._width_before:
            self._kept = torch.arange(self.width, device=_CPU)
        if self._kept is None:
            scores = self._session.known.scores
            if self.name not in scores:
                gate, up = (
                    self._sources[p, "weight"] for p in ("gate_proj", "up_proj")
                )
                weights = gate.read(), up.read()
                scores[self.name] = self._score(*weights)
                kept = kept_set(scores[self.name], self.width)
                # The weights are in the processor's cache now.
                self._ready = {
                    (tensor.projection, "weight"): tensor.narrowed(weight, kept, device)
                    for tensor, weight in zip((gate, up), weights, strict=True)
                }
            self._kept = kept_set(scores[self.name], self.width)
        return self._kept

    def _score(self, gate: Tensor, up: Tensor) -> Tensor:
        plan, dtype = self._session.plan, self._sources["gate_proj", "weight"].dtype
        with self._session.scoring(plan.criterion):
            return score(plan, self.name, self.layer, gate, up, dtype=dtype)


class NarrowedTensor:
    """A checkpoint entry that reads as if it had been saved with the kept width.

    It follows the protocol of a safetensors slice: `get_shape`, `get_dtype` and
    indexing. ``entry[...]`` is the entry itself and ``.to`` reads it, because
    that is how transformers materialises an entry on a device.
    """

    def __init__(
        self,
        mlp: _NarrowedMlp,
        projection: str,
        part: str,
        axis: int,
        source,
        target: tuple[torch.device, torch.dtype],
    ):
        self.projection = projection
        self.part = part
        self.axis = axis
        self._mlp = mlp
        self._source = source
        self.device, self.dtype = target
        #: Returns the part of a larger parameter that this tensor fills.
        self.place: Callable[[torch.device, torch.dtype], Tensor] | None = None

    def get_shape(self) -> list[int]:
        """Return the narrowed shape."""
        shape = self.stored_shape()
        shape[self.axis] = self._mlp.width
        return shape

    def stored_shape(self) -> list[int]:
        """Return the unpruned shape."""
        return list(self._source.get_shape())

    def get_dtype(self) -> str:
        """Return the stored dtype in safetensors' notation, such as ``BF16``."""
        return self._source.get_dtype()

    def __getitem__(self, index):
        if index is Ellipsis:
            return self
        # A shard, which must not hold on to those of the other ranks.
        return self._mlp.take(self, _CPU)[index].clone()

    def to(self, device=None, dtype=None, **kwargs) -> Tensor:
        """Read, narrow and move the weights."""
        return self._mlp.take(self, self.device).to(device=device, dtype=dtype)

    def read(self) -> Tensor:
        """Return the unpruned weights as they lie in the file, without a copy if it can be."""
        # safetensors follows torch's default device.
        with _CPU:
            return self._source[...]

    def narrowed(self, weight: Tensor, kept: Tensor, device: torch.device) -> Tensor:
        """Return the kept neurons of `weight` in the target dtype, on `device` or in their place."""
        out, dtype = None, self.dtype or weight.dtype
        if self.place is not None:
            out = self.place(device, dtype)
        elif device.type != "cpu":
            out = torch.empty(self.get_shape(), dtype=dtype, device=device)
        return narrow(weight, kept, self.axis, self.dtype, out)


class _SlotOfSource:
    """The part of a checkpoint entry that holds one projection, as an entry."""

    def __init__(self, slot: Slot, source):
        self._slot = slot
        self._source = source

    def get_shape(self) -> list[int]:
        with torch.device("meta"):
            whole = torch.empty(self._source.get_shape())
            try:
                return list(self._slot.view(whole).shape)
            except (IndexError, RuntimeError):
                return list(whole.shape)

    def get_dtype(self) -> str:
        return self._source.get_dtype()

    def __getitem__(self, index):
        return self._slot.read(self._source).contiguous()[index]


class AssembledTensor:
    """A checkpoint entry made of the `NarrowedTensor`s of several projections.

    It is allocated once, and each projection is gathered into its place.
    """

    def __init__(self, pieces: Mapping[Slot, NarrowedTensor]):
        self._pieces = pieces
        self._whole: Tensor | None = None
        self._lock = threading.Lock()
        for slot, piece in pieces.items():
            piece.place = functools.partial(self._place, slot)

    def get_shape(self) -> list[int]:
        """Return the narrowed shape."""
        with torch.device("meta"):
            return list(
                assemble(
                    {s: torch.empty(p.get_shape()) for s, p in self._pieces.items()}
                ).shape
            )

    def get_dtype(self) -> str:
        """Return the stored dtype in safetensors' notation, such as ``BF16``."""
        return next(iter(self._pieces.values())).get_dtype()

    def __getitem__(self, index):
        return self if index is Ellipsis else self._filled(_CPU)[index].clone()

    def to(self, device=None, dtype=None, **kwargs) -> Tensor:
        """Read, narrow, assemble and move the weights."""
        target = next(iter(self._pieces.values())).device
        return self._filled(target).to(device=device, dtype=dtype)

    def _place(self, slot: Slot, device: torch.device, dtype: torch.dtype) -> Tensor:
        with self._lock:
            if self._whole is None:
                self._whole = torch.empty(self.get_shape(), dtype=dtype, device=device)
            return slot.view(self._whole)

    def _filled(self, device: torch.device) -> Tensor:
        for piece in self._pieces.values():
            piece._mlp.take(piece, device)
        with self._lock:
            whole, self._whole = self._whole, None
        assert whole is not None
        return whole


def _sources(entries, model, mlps: Iterable[GluMlp], load_config):
    """Map checkpoint keys to the projections they hold.

    Returns:
        ``{key: [(mlp, (projection, part), slot, source_slot)]}``, where source_slot
        is the part of the entry that is meant, None for all of it.

    Raises:
        _RouteDeclined: Some projection is computed in a way not known here.
    """
    places = slots_by_parameter(mlps)
    found: dict[str, list] = {}
    converted: dict[tuple[str, str], list[str]] = {}
    converters = {}
    names = target_names(entries, model, load_config)
    check_entries(
        entries,
        names,
        model,
        places,
        any_shape=load_config.is_quantized or load_config.ignore_mismatched_sizes,
    )
    for key in in_order(names):
        parameter, converter, pattern = names[key]
        if converter is not None and pattern is not None:
            targets = [
                parameter.replace(converter.target_patterns[0], target)
                for target in converter.target_patterns
            ]
            if places.keys() & {parameter, *targets}:
                converted.setdefault((parameter, pattern), []).append(key)
                converters[parameter] = converter
        elif parameter in places:
            found[key] = [
                (mlp, place, slot, None if slot.is_whole else slot)
                for mlp, place, slot in places[parameter]
            ]
    for (parameter, pattern), keys in converted.items():
        found |= _converted_sources(
            parameter, pattern, keys, converters[parameter], places.get(parameter, [])
        )
    return found


def _converted_sources(
    parameter: str, pattern: str, keys: list[str], converter, places
):
    """Assign the sources that a converter stacks or concatenates to their slots."""
    steps = [
        (type(op).__name__, getattr(op, "dim", None)) for op in converter.operations
    ]
    merges = steps[:1] == [("MergeModulelist", 0)]
    concatenation = steps[1:] if merges else steps
    halves = len(converter.source_patterns)
    sizes = {slot.expert for _, _, slot in places}
    known = (
        len(converter.target_patterns) == 1
        and concatenation
        == ([] if halves == 1 else [("Concatenate", 1 if merges else 0)])
        and merges == (None not in sizes)
        and len(keys) == len(sizes)
        and len(places) == len(sizes) * halves
        and not any(slot.transposed or slot.interleaved for _, _, slot in places)
    )
    if not known:
        raise _RouteDeclined(f"transformers computes {parameter} from other tensors")
    half = converter.source_patterns.index(pattern)
    chosen = [place for place in places if halves == 1 or place[2].half == half]
    chosen.sort(key=lambda place: place[2].expert or 0)
    return {
        key: [(mlp, place, slot, None)]
        for key, (mlp, place, slot) in zip(keys, chosen, strict=True)
    }
