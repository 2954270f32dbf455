"""Write docs/architectures.md: which architectures of transformers can be pruned.

Builds a tiny model of every causal-LM and seq2seq class of the installed
transformers, prunes it in memory, while loading and in an export, and compares
them with slicing by hand, with the unpruned model whose removed neurons are
zeroed, and with what stock transformers' Auto classes make of the export.

    python docs/make_architectures.py            # writes the table
    python docs/make_architectures.py llama t5   # prints these rows
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers.models.auto import modeling_auto

from lm_eval_pruned.checkpoints.export import export_pruned
from lm_eval_pruned.checkpoints.load import load_pruned
from lm_eval_pruned.pruning.arguments import PruneArguments
from lm_eval_pruned.pruning.layouts import UnsupportedModelError
from lm_eval_pruned.pruning.slicing import prune_model, widths_in_memory
from lm_eval_pruned.util.tables import markdown_table
from tests.helpers import by_hand


PERCENT = 40
#: Largest tiny model; classes whose configs do not shrink that far are not tried.
MOST_PARAMETERS = 30_000_000
SECONDS_PER_CLASS = 120
#: The reason of most refusals: one list, not a message for each.
NO_GLU = "no GLU-MLP of a known layout"

#: So that results can be compared bit for bit at any width.
EAGER = {"experts_implementation": "eager", "attn_implementation": "eager"}

#: Values for config keys, wherever a config has them.
SMALL = {
    "vocab_size": 160,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "dim": 32,
    "embedding_size": 32,
    "intermediate_size": 48,
    "ffn_hidden_size": 48,
    "d_ff": 48,
    "dense_intermediate_size": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "intermediate_size_mlp": 56,
    "moe_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "shared_expert_intermediate_size": 40,
    "moe_shared_expert_intermediate_size": 40,
    "shared_intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "n_layer": 4,
    "n_layers": 4,
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "d_kv": 8,
    "global_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "max_position_embeddings": 128,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 8,
    "mamba_head_dim": 8,
    "mamba_d_ssm": 64,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "ssm_state_size": 8,
    "n_groups": 1,
    "chunk_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "lru_width": 32,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 8,
    "sliding_window": 16,
    "vocab_size_per_layer_input": 160,
    "hidden_size_per_layer_input": 8,
    "hidden_size_global": 32,
    "encoder_hash_byte_group_vocab": 64,
    "num_kv_shared_layers": 0,
    "laurel_rank": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
#: The second half of the layers takes keys and values from the first.
SHARED: dict = {
    "num_kv_shared_layers": 2,
    "layer_types": 2 * ["sliding_attention", "full_attention"],
}
#: What single model types need besides.
OWN: dict[str, dict] = {
    "t5": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "mt5": {"feed_forward_proj": "gated-gelu"},
    "umt5": {"feed_forward_proj": "gated-gelu"},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    **dict.fromkeys(("gemma3n_text", "gemma4_text", "gemma4_unified_text"), SHARED),
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
}


@dataclass(frozen=True)
class Row:
    """What became of one model type.

    Attributes:
        model_type: The model type, as in config.json.
        class_name: The class that AutoModel picks.
        outcome: ``pruned``, ``refused`` or ``not tried``.
        detail: Config keys and layouts, or the reason.
    """

    model_type: str
    class_name: str
    outcome: str
    detail: str


def tiny_values(config) -> dict:
    """Return keyword arguments that make configs of the class of `config` tiny."""
    values = {key: value for key, value in SMALL.items() if key in vars(config)}
    for key, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            values[key] = {**tiny_values(value), "model_type": value.model_type}
    return values | OWN.get(config.model_type, {})


def tiny_config(model_type: str) -> transformers.PretrainedConfig:
    """Return a config of a model that builds in a moment."""
    config_class = transformers.CONFIG_MAPPING[model_type]
    return config_class(**tiny_values(config_class()))


def tiny_model(auto_class, config) -> transformers.PreTrainedModel:
    """Return a model whose every weight is drawn at random."""
    torch.manual_seed(0)
    with torch.device("meta"):
        size = sum(p.numel() for p in auto_class.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(
            f"the smallest model this script can build has {size:,} parameters"
        )
    model = auto_class.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def aligned(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Move weights out of mapped files: matrix products round by their addresses."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    """Return the logits of a fixed text, shape (1, tokens, vocabulary)."""
    tokens = torch.arange(5, 17).unsqueeze(0)
    arguments = {"input_ids": tokens}
    if model.config.is_encoder_decoder:
        arguments["decoder_input_ids"] = tokens[:, :5]
    torch.manual_seed(0)
    return model(**arguments, use_cache=False).logits


def check(model_type: str, auto_class, class_name: str) -> Row:
    """Prune a tiny model of `model_type` in every way and compare.

    Raises:
        AssertionError: Two ways disagree.
    """
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source, saved = Path(folder, "source"), Path(folder, "saved")
        try:
            config = tiny_config(model_type)
            model = tiny_model(auto_class, config)
            model.save_pretrained(source)
            # A class may stand for a part of its config, and then saves only that.
            config.save_pretrained(source)
        except Exception as error:  # noqa: BLE001 - anything may be wrong with a guess
            return Row(model_type, class_name, "not tried", _first_line(error))
        try:
            widths = widths_in_memory(model)
        except UnsupportedModelError as refusal:
            _same_refusal(source, auto_class, refusal)
            return Row(model_type, class_name, "refused", str(refusal))
        try:
            logits(model)
        except Exception as error:  # noqa: BLE001 - anything may be wrong with a guess
            reason = f"the tiny model does not run unpruned: {_first_line(error)}"
            return Row(model_type, class_name, "not tried", reason)
        plan = widths.cut(PruneArguments(prune_percent=PERCENT)).plan
        whole = aligned(auto_class.from_pretrained(source, **EAGER))
        expected, masks = by_hand.sliced(
            whole, by_hand.best(by_hand.share(PERCENT, plan.width_before))
        )
        loaded = load_pruned(
            source, prune_percent=PERCENT, auto_class=auto_class, **EAGER
        )
        in_memory = auto_class.from_pretrained(source, **EAGER)
        _compare("in memory", prune_model(in_memory, prune_percent=PERCENT), expected)
        _compare("while loading", loaded, expected)
        counts = [
            (m.prune_record.parameters_before, m.prune_record.parameters_after)
            for m in (in_memory, loaded)
        ]
        assert counts[0] == counts[1], f"parameters differ: {counts}"
        export_pruned(str(source), saved, prune_arguments={"prune_percent": PERCENT})
        # As a stranger opens it: nothing but the folder says which class it is.
        reloaded = aligned(auto_class.from_pretrained(saved, **EAGER))
        _compare("exported and reopened", reloaded, expected)
        pruned_logits = logits(aligned(loaded))
        assert pruned_logits.isfinite().all(), "the tiny model computes NaN"
        assert torch.equal(logits(reloaded), pruned_logits), "reopened logits differ"
        with torch.no_grad():
            for name, mask in masks.items():
                whole.get_parameter(name).mul_(mask)
        zeroed = torch.allclose(logits(whole), pruned_logits, rtol=1e-3, atol=1e-4)
        record = loaded.prune_record
    groups = ", ".join(
        sorted({f"{group['kind']} ({group['config_key']})" for group in record.groups})
    )
    if not zeroed:
        groups += "; its activation looks at all neurons at once"
    return Row(model_type, class_name, "pruned", groups)


def _compare(way: str, model, expected: dict[str, torch.Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys(), f"{way}: other parameters"
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), f"{way}: {name} differs"


def _same_refusal(source: Path, auto_class, refusal: Exception) -> None:
    try:
        load_pruned(source, prune_percent=PERCENT, auto_class=auto_class)
    except UnsupportedModelError as other:
        assert str(other) == str(refusal), f"{other} / {refusal}"
    else:
        raise AssertionError("refused in memory, but not while loading")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


def candidates() -> list[tuple[str, type, str]]:
    """Return model type, auto class and class name of everything to try."""
    found = {}
    for auto_class, names in (
        (
            transformers.AutoModelForCausalLM,
            modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        ),
        (
            transformers.AutoModelForSeq2SeqLM,
            modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        ),
    ):
        for model_type, class_name in names.items():
            name = class_name if isinstance(class_name, str) else class_name[0]
            found.setdefault(model_type, (model_type, auto_class, name))
    return sorted(found.values())


def table(rows: list[Row]) -> str:
    """Return the Markdown document."""
    pruned = [row for row in rows if row.outcome == "pruned"]
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    lines = f"""# Architectures

Written by `python docs/make_architectures.py`; do not edit.

{versions.partition("+")[0]}. A tiny model of every causal-LM and seq2seq class was
built and pruned by {PERCENT} %. {len(pruned)} can be pruned.

## Pruned

Each equals slicing by hand bit for bit, in memory, while loading and in an export, which
the Auto classes of stock transformers open with equal logits. The config keys in brackets
hold the new widths. Where an activation looks at all neurons at once (top-k
sparsity), removing neurons also changes the ones that stay.
""".splitlines()
    widths = sorted({row.detail for row in pruned})
    types = {w: [row.model_type for row in pruned if row.detail == w] for w in widths}
    cells = [
        [w, _listed(types[w])] for w in sorted(widths, key=lambda w: -len(types[w]))
    ]
    lines += ["", markdown_table(["widths in the config", "model types"], cells, "ll")]
    refused = [row for row in rows if row.outcome == "refused"]
    plain = [row.model_type for row in refused if f"has {NO_GLU}" in row.detail]
    others = [[*_names(r), r.detail] for r in refused if r.model_type not in plain]
    untried = [row.model_type for row in rows if row.outcome == "not tried"]
    lines += ["", "## Refused", ""]
    lines += [f"{len(plain)} model types have {NO_GLU}, and so no width to prune;"]
    lines += ["evaluate them with `--model hf` or `--model hf-prefix`:", ""]
    lines += [*_wrapped(plain), "", "The others are refused with this message:", ""]
    lines.append(markdown_table(["model type", "class", ""], others, "lll"))
    lines += ["", "## Not tried", ""]
    lines += ["The script cannot build or run a tiny model of these types;"]
    lines += ["`python docs/make_architectures.py MODEL_TYPE` prints why:", ""]
    lines += _wrapped(untried)
    return "\n".join(lines) + "\n"


def _listed(model_types: list[str]) -> str:
    return ", ".join(f"`{each}`" for each in model_types)


def _wrapped(model_types: list[str]) -> list[str]:
    return textwrap.wrap(_listed(model_types), 120, break_on_hyphens=False)


def _names(row: Row) -> list[str]:
    return [f"`{row.model_type}`", f"`{row.class_name}`"]


def main() -> int:
    """Write the table, or print the rows of the model types given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_types", nargs="*", help="only these, printed")
    chosen = parser.parse_args().model_types
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows, failures = [], []
    for model_type, auto_class, class_name in candidates():
        if chosen and model_type not in chosen:
            continue
        signal.alarm(SECONDS_PER_CLASS)
        try:
            rows.append(check(model_type, auto_class, class_name))
            print(rows[-1], file=sys.stderr)
        except Exception as error:
            failures.append(f"{model_type}: {_first_line(error)}")
            print(failures[-1], file=sys.stderr)
            if chosen:
                raise
        finally:
            signal.alarm(0)
    if failures:
        print("\n".join(["Failed:", *failures]), file=sys.stderr)
        return 1
    if not chosen:
        (ROOT / "docs" / "architectures.md").write_text(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
