"""``lm-eval-pruned plan``: what a model would become at several sizes, from its config."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.pruning.argument_values import written_by_layer
from lm_eval_pruned.pruning.arguments import PruneArguments, take_prune_arguments
from lm_eval_pruned.pruning.plan import PrunePlan, whole_or_mean
from lm_eval_pruned.util.tables import Column, Table, csv_table


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lm_eval_pruned.checkpoints.checkpoint import Checkpoint
    from lm_eval_pruned.pruning.arguments import LayerWidths, Number


#: Arguments of `hf` that say where a config, a tokenizer and weights come from.
SOURCE_ARGUMENTS = ("revision", "subfolder", "gguf_file", "trust_remote_code")


#: Keys of a config without which a model is not one of `_BIASES`.
_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "vocab_size"),
)
_DERIVED = ("num_key_value_heads", "head_dim")
#: By model type, what decides whether query, key and value, the output of attention, and the MLP
#: have biases: a key of the config, or always (True), or never ("").
_BIASES: dict[str, tuple[str | bool, ...]] = {
    "llama": ("attention_bias", "attention_bias", "mlp_bias"),
    "mistral": ("", "", ""),
    "qwen2": (True, "", ""),
}
#: Keys with which a model of these types is another.
_UNREAD = {"auto_map", "block_configs", "layer_types", "per_layer_config"}
_BYTES = {None: 4, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class PlanRow:
    """One requested size.

    Attributes:
        asked: The request, such as ``ratio=2.0``.
        intermediate_size: Kept width, in neurons; the mean where the layers differ.
        expansion_ratio: Kept width / hidden size.
        parameters: Parameters of the pruned model; tied ones count once.
        reduction: Share of the baseline's parameters that is removed, 0 to 1.
        checkpoint_bytes: Size of its weights in the config's dtype.
        layer_widths: Where layers differ, their kept widths, such as ``0:1200,1-29:900``.
    """

    asked: str
    intermediate_size: int | float
    expansion_ratio: float
    parameters: int
    reduction: float
    checkpoint_bytes: int
    layer_widths: str = ""


def suggested_recipe(
    prune_arguments: dict[str, Any], loading: dict[str, Any]
) -> tuple[str, str]:
    """Return which recipe suits a model, and why in one line; reads its config and tokenizer.

    Raises:
        ValueError, UnsupportedModelError, OSError: As `lm_eval_pruned.load_pruned`.
    """
    from lm_eval_pruned.checkpoints.checkpoint import Checkpoint
    from lm_eval_pruned.pruning.layouts import UnsupportedModelError

    from_pretrained = dict(loading)
    calibrated = PruneArguments(**{**prune_arguments, "recipe": "best"})
    checkpoint = Checkpoint.of(
        from_pretrained.pop("pretrained"), calibrated, from_pretrained
    )
    try:
        checkpoint.check_text()
    except UnsupportedModelError as error:
        return "fast", f"calibration text cannot be used: {str(error).rstrip('.')}"
    try:
        checkpoint.load_tokenizer()
    except ValueError as error:
        return (
            "fast",
            f"calibration text needs a tokenizer, and {str(error).rstrip('.')}",
        )
    text = Path(str(calibrated.calibration)).name
    return "best", f"the model can be calibrated on {text}"


def shipped_config(pretrained: str) -> str | None:
    """Return the folder with the dimensions of one of the study's models; None for another model.

    The repositories of these models on the Hub can only be read by those who accepted a licence.
    """
    llama = re.fullmatch(r"meta-llama/Llama-3\.2-([13])B(-Instruct)?", pretrained)
    if llama is None or Path(pretrained).exists():
        return None
    return str(Path(__file__).parent / "known" / f"llama-3.2-{llama[1]}b")


def plan_rows(
    pretrained: str,
    argument: str,
    values: Iterable[Number | LayerWidths],
    **more: Any,
) -> list[PlanRow]:
    """Plan a model at several sizes, without reading weights where that can be.

    Args:
        pretrained: Folder or Hub name.
        argument: ``ratio``, ``prune_percent`` or ``widths``.
        values: One size per row.
        **more: Those of `SOURCE_ARGUMENTS`, and others of
            `lm_eval_pruned.pruning.arguments.PruneArguments`. An allocation that is not uniform
            looks at weights and text.

    Raises:
        ValueError: A size is out of range.
        UnsupportedModelError: The model cannot be pruned.
        OSError: The config cannot be read.
    """
    others: dict[str, Any] = take_prune_arguments(more)
    variants = [PruneArguments(**{argument: value, **others}) for value in values]
    if not variants:
        return []
    source = {name: value for name, value in more.items() if value}
    shipped = None if source else shipped_config(pretrained)
    if not source and (dense := _Dense.read(shipped or pretrained)):
        plans = [dense.plan(arguments) for arguments in variants]
        if not any(plan.is_open for plan in plans):
            return [dense.row(plan) for plan in plans]
    from lm_eval_pruned.checkpoints.checkpoint import Checkpoint

    def planned_for(model: str) -> list[Checkpoint]:
        whole = Checkpoint.of(model, PruneArguments(), source)
        if Path(model).is_dir():
            whole = whole.with_stored_widths()
        return [whole.asking(arguments) for arguments in variants]

    planned = planned_for(shipped or pretrained)
    if shipped and any(checkpoint.cut.plan.is_open for checkpoint in planned):
        planned = planned_for(pretrained)
    return [*map(_row, planned)]


def _row(checkpoint: Checkpoint) -> PlanRow:
    """Describe what becomes of a model."""
    cut = checkpoint.cut
    if cut.plan.is_open:
        from lm_eval_pruned.checkpoints.load import Stored
        from lm_eval_pruned.pruning.allocation import plan_layers

        checkpoint.check_text()
        checkpoint = checkpoint.with_stored_widths()
        cut = plan_layers(checkpoint.cut, Stored.of(checkpoint))
    dtype: Any = checkpoint.config.dtype
    return _described(
        cut.plan,
        cut.parameters_before,
        cut.parameters_after,
        dtype and dtype.itemsize,
    )


def _described(
    plan: PrunePlan, before: int, after: int, itemsize: int | None
) -> PlanRow:
    """Return the row of a plan, from parameters before and after and the bytes of one."""
    return PlanRow(
        plan.as_written(),
        whole_or_mean(plan.mean_width),
        plan.ratio,
        after,
        1 - after / before,
        after * (itemsize or 4),
        written_by_layer(plan.layer_widths or ()),
    )


def _has_one_width(folder: str, width: int) -> bool:
    """Return whether no file of weights in a folder has an MLP of another width."""
    from safetensors import SafetensorError, safe_open

    for file in Path(folder).glob("*.safetensors"):
        try:
            with safe_open(file, framework="np") as tensors:
                names = [n for n in tensors.keys() if n.endswith("gate_proj.weight")]
                shapes = [tensors.get_slice(name).get_shape() for name in names]
        except SafetensorError:
            # What is wrong with the file is said where the model is read.
            return False
        if any(shape[0] != width for shape in shapes):
            return False
    return True


@dataclass(frozen=True)
class _Dense:
    """What the config of a plain dense model says, read without torch and transformers.

    Attributes:
        hidden_size: Model width H.
        width: Intermediate size I of all layers, in neurons.
        layers: Number of layers.
        per_neuron: Parameters of a neuron.
        others: Parameters of all else; tied ones count once.
        itemsize: Bytes of a parameter in the config's dtype.
    """

    hidden_size: int
    width: int
    layers: int
    per_neuron: int
    others: int
    itemsize: int

    @classmethod
    def read(cls, pretrained: str) -> _Dense | None:
        """Return what ``config.json`` of a folder says; None where transformers has to read it."""
        try:
            text = Path(pretrained, "config.json").read_text("utf-8")
            config = defaultdict(lambda: None, json.loads(text))
            kind, dtype = config["model_type"], config["dtype"] or config["torch_dtype"]
            # transformers writes the kind of each layer of Qwen2, also where all are alike.
            kinds = (kind == "qwen2" and config.pop("layer_types", None)) or []
            known = kind in _BIASES and dtype in _BYTES and not config.keys() & _UNREAD
            known &= kinds == ["full_attention"] * len(kinds)
        except (OSError, ValueError, TypeError):
            return None
        sizes = [config[name] for name in _SIZES]
        # These two follow from the others where the config leaves them out.
        extra = [n for key in _DERIVED if (n := config[key]) is not None]
        if not known or not all(type(n) is int and n > 0 for n in [*sizes, *extra]):
            return None
        hidden, width, layers, heads, vocabulary = sizes
        if not _has_one_width(pretrained, width):
            return None
        shared = config["num_key_value_heads"] or heads
        size = config["head_dim"] or hidden // heads
        if hidden % heads or heads % shared or len(kinds) not in (0, layers):
            return None
        query, keys = heads * size, 2 * shared * size
        inputs, output, mlp = (
            bool(config[key] or key is True) for key in _BIASES[kind]
        )
        attention = (
            hidden * (2 * query + keys) + inputs * (query + keys) + output * hidden
        )
        layer = attention + 2 * hidden + mlp * hidden
        embeddings = vocabulary * hidden * (1 if config["tie_word_embeddings"] else 2)
        others = layers * layer + embeddings + hidden
        return cls(hidden, width, layers, 3 * hidden + 2 * mlp, others, _BYTES[dtype])

    def plan(self, arguments: PruneArguments) -> PrunePlan:
        """Resolve the arguments of pruning; ValueError if one is out of range."""
        widths = dict.fromkeys(range(self.layers), self.width)
        return PrunePlan.of(arguments, self.hidden_size, self.width, widths)

    def row(self, plan: PrunePlan) -> PlanRow:
        """Describe what becomes of the model."""
        kept = {
            n: plan.width if plan.includes_layer(n) else self.width
            for n in range(self.layers)
        }
        kept |= dict(plan.layer_widths or ())
        before, after = (
            self.others + self.per_neuron * neurons
            for neurons in (self.layers * self.width, sum(kept.values()))
        )
        return _described(plan, before, after, self.itemsize)


#: Those after the first six are left out where they say nothing.
_COLUMNS = (
    Column("asked", attrgetter("asked")),
    Column("intermediate size", attrgetter("intermediate_size"), ","),
    Column("expansion ratio", attrgetter("expansion_ratio"), ".4f"),
    Column("parameters", attrgetter("parameters"), ","),
    Column("reduction", attrgetter("reduction"), ".2%"),
    Column("checkpoint bytes", attrgetter("checkpoint_bytes"), ","),
    Column("widths by layer", attrgetter("layer_widths"), ">"),
)


def as_table(rows: list[PlanRow]) -> str:
    """Return the rows as a Markdown table."""
    more = [column for column in _COLUMNS[6:] if any(map(column.value, rows))]
    return Table("Plan", [*_COLUMNS[:6], *more], rows).markdown() + "\n"


FORMATS: dict[str, Callable[[list[PlanRow]], str]] = {
    "table": as_table,
    "csv": lambda rows: csv_table([*map(asdict, rows)]),
    "json": lambda rows: json.dumps([*map(asdict, rows)], indent=2) + "\n",
}
