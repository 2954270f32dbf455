"""Llamas as GGUF files, as llama.cpp's converter and its llama-quantize write them."""

from __future__ import annotations

from pathlib import Path

import numpy as np


#: Numbers of a block of each type; llama.cpp leaves rows that are no whole blocks to another type.
BLOCKS = {"F32": 1, "Q8_0": 32, "Q4_0": 32, "Q4_K": 256}


def write_gguf(
    model, file: str | Path, kind: str = "F32", like: str | Path = ""
) -> Path:
    """Write a Llama, whose rows of q and k are reordered, with its matrices as `kind`.

    Rows that are no whole blocks of Q4_K are Q8_0. Tokenizer and what else is known come from the GGUF
    file `like`.
    """
    import gguf

    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for name, field in gguf.GGUFReader(like).fields.items() if like else ():
        if name.startswith("tokenizer."):
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    arch = gguf.MODEL_ARCH.LLAMA
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        if count := heads.get(name.split(".")[-2]):
            rows = tensor.reshape(count, 2, -1, tensor.shape[1]).swapaxes(1, 2)
            tensor = rows.reshape(tensor.shape)
        values = tensor.float().contiguous().numpy()
        of = kind if values.ndim > 1 else "F32"
        of = of if values.shape[-1] % BLOCKS[of] == 0 else "Q8_0"
        raw = gguf.GGMLQuantizationType[of]
        data = _q4_k(values) if of == "Q4_K" else gguf.quants.quantize(values, raw)
        new = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(new, data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(file)


def _q4_k(values: np.ndarray) -> np.ndarray:
    """Quantise to Q4_K by rounding, which the package gguf only reads: 144 bytes for 256 numbers.

    A block has a scale and a minimum of 6 bits for each 32 numbers, in units of two halves.
    """
    rows, parts = values.shape[0], values.reshape(-1, 8, 32)
    low = np.minimum(parts.min(-1), 0)
    scale = (np.maximum(parts.max(-1), 0) - low) / 15
    d, dmin = (
        (of.max(-1, keepdims=True) / 63).astype(np.float16) for of in (scale, -low)
    )
    units = [
        np.rint(np.divide(of, u, out=np.zeros_like(of), where=u != 0)).clip(0, 63)
        for of, u in ((scale, d.astype(np.float32)), (-low, dmin.astype(np.float32)))
    ]
    s, m = (of.astype(np.uint8) for of in units)
    step, base = s * d.astype(np.float32), m * dmin.astype(np.float32)
    shifted = parts + base[..., None]
    digits = np.divide(
        shifted, step[..., None], out=np.zeros_like(parts), where=step[..., None] != 0
    )
    digits = np.rint(digits).clip(0, 15).astype(np.uint8)
    packed = np.concatenate(
        [
            s[:, :4] | (s[:, 4:] >> 4) << 6,
            m[:, :4] | (m[:, 4:] >> 4) << 6,
            (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4,
        ],
        axis=-1,
    )
    nibbles = digits[:, ::2] | digits[:, 1::2] << 4
    halves = [of.view(np.uint8).reshape(len(parts), 2) for of in (d, dmin)]
    blocks = np.concatenate([*halves, packed, nibbles.reshape(len(parts), -1)], -1)
    return blocks.reshape(rows, -1)
