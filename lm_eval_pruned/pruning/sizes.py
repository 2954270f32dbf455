"""Parameter counts of common dense architectures in closed form.

``lm-eval-pruned plan`` has to answer at once, and building a model on the meta
device takes the import of torch and transformers, which is most of its time.
The families below are counted from ``config.json`` alone; for every other model,
and for every config that leaves a dimension to its class's default, the answer is
None and the model is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Mapping

_DIMENSIONS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
#: Keys whose presence means more parameters than are counted here.
_UNCOUNTED = (
    "quantization_config",
    "text_config",
    "num_experts",
    "auto_map",
    "per_layer_config",
    "block_configs",
)
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}


@dataclass(frozen=True)
class _Family:
    """What distinguishes an architecture from the plain Llama block.

    Attributes:
        norms: Norms of size H per layer.
        tied: Whether embeddings are tied where the config does not say.
        qkv_bias: Whether query, key and value always have biases.
        head_norms: Whether query and key have norms of size head_dim.
        full_norms: Whether query and key have norms over all their heads.
        biases: Whether the keys ``attention_bias`` and ``mlp_bias`` are read.
    """

    norms: int = 2
    tied: bool = False
    qkv_bias: bool = False
    head_norms: bool = False
    full_norms: bool = False
    biases: tuple[str, ...] = ()


_FAMILIES = {
    "llama": _Family(biases=("attention_bias", "mlp_bias")),
    "mistral": _Family(),
    "qwen2": _Family(qkv_bias=True),
    "qwen3": _Family(head_norms=True, biases=("attention_bias",)),
    "gemma": _Family(tied=True, biases=("attention_bias",)),
    "gemma2": _Family(norms=4, tied=True, biases=("attention_bias",)),
    "gemma3_text": _Family(
        norms=4, tied=True, head_norms=True, biases=("attention_bias",)
    ),
    "granite": _Family(biases=("attention_bias", "mlp_bias")),
    "olmo2": _Family(full_norms=True, biases=("attention_bias",)),
}


@dataclass(frozen=True)
class DenseShape:
    """A dense model as far as `plan` needs to know it.

    Attributes:
        hidden_size: Model width H.
        width: Intermediate size I, in neurons.
        parameters: Parameters of the whole model; tied ones count once.
        parameters_per_neuron: Parameters that one removed neuron takes away, summed
            over the layers.
        bytes_per_parameter: Of the dtype that the config names, else of float32.
        layers: Number of layers.
    """

    hidden_size: int
    width: int
    parameters: int
    parameters_per_neuron: int
    bytes_per_parameter: int
    layers: int


def dense_shape(config: Mapping[str, Any]) -> DenseShape | None:
    """Count the parameters of a model from its ``config.json``.

    Args:
        config: The parsed file.

    Returns:
        The counts, or None if they cannot be told for certain from the file alone.
    """
    family = _FAMILIES.get(config.get("model_type", ""))
    known = all(type(config.get(key)) is int for key in _DIMENSIONS)
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    if (
        family is None
        or not known
        or any(config.get(key) for key in _UNCOUNTED)
        or dtype not in _BYTES
    ):
        return None
    vocabulary, hidden, width, layers, heads = (config[key] for key in _DIMENSIONS)
    groups = config.get("num_key_value_heads")
    head = config.get("head_dim")
    if head is None and not config["model_type"].startswith("gemma"):
        head = hidden // heads
    if type(groups) is not int or type(head) is not int or min(heads, head) < 1:
        return None
    queries, keys = heads * head, groups * head
    attention = 2 * hidden * queries + 2 * hidden * keys
    if family.qkv_bias:
        attention += queries + 2 * keys
    if "attention_bias" in family.biases and config.get("attention_bias"):
        attention += queries + 2 * keys + hidden
    if family.head_norms:
        attention += 2 * head
    if family.full_norms:
        attention += queries + keys
    has_mlp_bias = "mlp_bias" in family.biases and bool(config.get("mlp_bias"))
    per_neuron = 3 * hidden + 2 * has_mlp_bias
    mlp = width * per_neuron + hidden * has_mlp_bias
    tied = config.get("tie_word_embeddings", family.tied)
    embeddings = vocabulary * hidden * (1 if tied else 2)
    return DenseShape(
        hidden,
        width,
        embeddings + layers * (attention + mlp + family.norms * hidden) + hidden,
        layers * per_neuron,
        _BYTES[dtype],
        layers,
    )
