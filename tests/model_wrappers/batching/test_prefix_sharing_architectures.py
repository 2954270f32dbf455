"""On which architectures prefixes may be shared, and that the answers are HFLM's on all.

Every architecture runs with windows of 24 tokens where it has any, on requests shorter
and longer than that.
"""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from packaging.version import Version
from transformers import CONFIG_MAPPING, AutoConfig

from lm_eval_pruned.model_wrappers.batching import attention_support, prefix_sharing
from lm_eval_pruned.model_wrappers.hf_prefix import PrefixHFLM
from tests.helpers.checkpoints import TINY, byte_tokenizer, tiny_config, tiny_model


WINDOW = 24
#: Names under which architectures keep the sizes that make them tiny, besides `TINY`'s.
SIZES = {
    "d_model": 32,
    "decoder_attention_heads": 4,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_layers": 2,
    "ffn_dim": 64,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "mamba_d_head": 16,
    "mamba_d_ssm": 64,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    # Some count positions from behind the padding token, whose number is 258.
    "max_position_embeddings": 1024,
    "moe_intermediate_size": 16,
    "n_embd": 32,
    "n_group": 1,
    "n_head": 4,
    "n_heads": 4,
    "n_inner": 64,
    "n_layer": 2,
    "n_layers": 2,
    "n_positions": 512,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "rotary_dim": 4,
    "shared_expert_intermediate_size": 16,
    "topk_group": 1,
    "v_head_dim": 8,
    "word_embed_proj_dim": 32,
}
WINDOWS = ("sliding_window", "window_size", "attention_chunk_size", "local_attention")


#: What is listed here was found with the 5.24; releases before have fewer classes.
OLDER = Version(transformers.__version__) < Version("5.24")


#: Attention that an architecture does not have.
ONLY_EAGER = {(name, "sdpa") for name in ("gemma2", "gpt_oss", "vaultgemma", "xglm")}


def shrunk(model_type, **overrides):
    """Return a tiny config of any architecture, with every kind of layer it has."""
    if OLDER and model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    default = AutoConfig.for_model(model_type).get_text_config()
    if "text_config" in AutoConfig.for_model(model_type).sub_configs:
        text = shrunk(default.model_type, **overrides).to_dict()
        return AutoConfig.for_model(
            model_type, text_config=text, vision_config={"num_hidden_layers": 1}
        )
    arguments = {k: v for k, v in (TINY | SIZES).items() if hasattr(default, k)}
    if getattr(default, "kv_lora_rank", None):
        arguments.pop("head_dim", None)
        arguments["num_key_value_heads"] = 4
    if kinds := list(dict.fromkeys(getattr(default, "layer_types", None) or ())):
        arguments["layer_types"] = (kinds * 3)[:3]
    arguments |= {
        name: WINDOW
        for name in WINDOWS
        if isinstance(getattr(default, name, None), int)
        or (name == "sliding_window" and hasattr(default, name))
    }
    if hasattr(default, "use_sliding_window"):
        arguments |= {"use_sliding_window": True, "sliding_window": WINDOW}
    arguments |= overrides
    while True:
        try:
            return AutoConfig.for_model(model_type, **arguments)
        except AttributeError as error:
            # A size that follows from others.
            computed = re.search(r"property '(\w+)'", str(error))
            if computed is None or computed[1] not in arguments:
                raise
            del arguments[computed[1]]


def sides(config, attention="sdpa", dtype=torch.float32):
    config._attn_implementation = attention
    try:
        model = tiny_model(config).to(dtype)
    except ValueError as error:
        if OLDER and "does not support an attention implementation" in str(error):
            pytest.skip(f"{config.model_type} has no {attention} in this transformers")
        raise
    return [
        cls(
            pretrained=model,
            tokenizer=byte_tokenizer(),
            device="cpu",
            batch_size=2,
            max_length=512,
        )
        for cls in (HFLM, PrefixHFLM)
    ]


def requests(lengths):
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, 200, (max(lengths),), generator=generator).tolist()
    return [
        (
            None,
            text[: max(1, length - len(end) - len(continuation))] + end,
            continuation,
        )
        for length in lengths
        for end in ([1, 2], [length % 100] * 7)
        for continuation in ([3, 4], [5], [6, 7, 8])
    ]


def check_answers(plain, shared, lengths=(20, 23, 24, 25, 26, 60)):
    asked = requests(lengths)
    got = shared._loglikelihood_tokens(asked, disable_tqdm=True)
    expected = plain._loglikelihood_tokens(asked, disable_tqdm=True)
    assert [g for _, g in got] == [g for _, g in expected]
    spread = torch.tensor([v for v, _ in expected]).std().item()
    assert [v for v, _ in got] == pytest.approx(
        [v for v, _ in expected], abs=1e-3 * spread
    )


@pytest.fixture(autouse=True)
def share_however_little(monkeypatch):
    monkeypatch.setattr(prefix_sharing, "_least_saving", lambda device: -9.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "limit"),
    [
        *((name, None) for name in (
            "apertus", "arcee", "biogpt", "codegen", "cohere", "deepseek_v2", "deepseek_v3",
            "ernie4_5", "exaone", "falcon", "gemma", "glm", "glm4_moe", "gpt2", "gpt_bigcode",
            "gpt_neox", "gptj", "granite", "granitemoe", "helium", "jetmoe", "llama", "nemotron",
            "olmo", "olmo2", "olmoe", "opt", "persimmon", "phi", "stablelm",
        )),
        *((name, WINDOW) for name in (
            "cohere2", "exaone4", "gemma3_text", "llama4_text", "ministral", "mistral", "mixtral",
            "olmo3", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "starcoder2",
        )),
    ],
)  # fmt: skip
def test_shared(model_type, limit):
    plain, shared = sides(shrunk(model_type))
    assert shared._can_take(shared._sharing)
    assert attention_support.sequence_limit(shared.model.config) == limit
    check_answers(plain, shared)
    assert shared.token_counts.processed > 0


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss", "llama", "xglm"])
def test_shared_with_eager_attention(model_type):
    plain, shared = sides(shrunk(model_type), "eager")
    assert shared._can_take(shared._sharing)
    check_answers(plain, shared)


UNKNOWN = "is not among the model types that were tried"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "attention", "reason"),
    [
        ({"model_type": "bart"}, "sdpa", "encoder-decoder"),
        ({"model_type": "falcon", "alibi": True}, "eager", "ALiBi"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "sdpa", "both ways"),
        ({"model_type": "llama", "is_causal": False}, "sdpa", "both ways"),
        # ALiBi, a recurrent state, attention that looks both ways, other positions.
        *(({"model_type": name}, "eager", UNKNOWN) for name in ("mpt", "mamba", "bert", "xlm")),
    ],
)  # fmt: skip
def test_falls_back(config, attention, reason, caplog):
    plain, shared = sides(shrunk(**config), attention)
    if plain.backend == "seq2seq":
        assert reason in attention_support.unsupported_reason(shared)
        return
    for _ in range(2):
        # Its plain path takes seconds on a CPU.
        if config["model_type"] != "mamba":
            check_answers(plain, shared)
        assert not shared._can_take(shared._sharing)
    lines = [r.message for r in caplog.records if "not shared" in r.message]
    assert len(lines) == 1
    assert reason in lines[0]


class OwnLlama(transformers.LlamaForCausalLM):
    """As a checkpoint may bring along, under the name of a model type that is known."""


def test_a_class_that_is_not_from_transformers_falls_back():
    _, shared = sides(tiny_config())
    shared.model.__class__ = OwnLlama
    reason = attention_support.unsupported_reason(shared)
    assert reason == "OwnLlama is not a class of transformers"


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_length_of_a_batch(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0}
    if rope_type == "longrope":
        rope |= {
            "short_factor": [1.0] * 4,
            "long_factor": [3.0] * 4,
            "original_max_position_embeddings": 40,
        }
    config = tiny_config(
        rope_parameters=rope,
        max_position_embeddings=40 if rope_type == "dynamic" else 160,
    )
    plain, shared = sides(config)
    assert attention_support.sequence_limit(shared.model.config) == 40
    assert shared._can_take(shared._sharing)
    # The plain path's answers beyond the limit depend on what else is in the batch.
    check_answers(plain, shared, lengths=(20, 39, 40))


def test_flash_attention_takes_no_mask():
    _, shared = sides(tiny_config())
    shared.model.config._attn_implementation = "flash_attention_2"
    reason = attention_support.unsupported_reason(shared)
    assert reason == (
        "attn_implementation=flash_attention_2 takes no mask of its own; sdpa and eager do"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_not_taken_for_disagreement(dtype):
    _, shared = sides(tiny_config(), dtype=dtype)
    assert shared._can_take(shared._sharing)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", sorted(attention_support.PLAIN_ATTENTION))
def test_every_known_architecture(model_type, attention):
    """Both fast paths answer as HFLM does."""
    if (model_type, attention) in ONLY_EAGER:
        pytest.skip(f"{model_type} has no {attention}")
    plain, shared = sides(shrunk(model_type), attention)
    assert shared._can_take(shared._sharing)
    check_answers(plain, shared)
    check_answers(plain, shared, lengths=(20, 200, 400))
    asked = [
        Instance("generate_until", {}, (text, {"until": [], "max_gen_toks": 12}), n)
        for n, text in enumerate(["abcdefgh", "abcdexyz", "qrstuvwx"])
    ]
    # XGLM's says where a decoder starts, which greedy generation has no use for.
    shared.model.generation_config.decoder_start_token_id = None
    got = shared.generate_until(asked, disable_tqdm=True)
    assert got == plain.generate_until(asked, disable_tqdm=True)
    assert set(shared.answer_paths.of("generate_until").requests) == {"slots"}
