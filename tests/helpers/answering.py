"""Requests of every type, and models that answer them beside `HFLM`, on one tiny model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from packaging.version import Version
from transformers import CONFIG_MAPPING, AutoConfig

from lm_eval_pruned.model_wrappers.hf_prefix import PrefixHFLM
from tests.helpers.asking import request
from tests.helpers.checkpoints import TINY, byte_tokenizer, tiny_config, tiny_model


@dataclass(frozen=True)
class Kind:
    """A type of request.

    `argument` turns its fast path off, which results call `fast`; those `asked` begin alike.
    """

    request_type: str
    argument: str
    fast: str
    asked: tuple[tuple, ...]

    def ask(self, lm, asked=None, quiet=True) -> list[Any]:
        requests = [
            request(self.request_type, *arguments, place=number)
            for number, arguments in enumerate(self.asked if asked is None else asked)
        ]
        return getattr(lm, self.request_type)(requests, disable_tqdm=quiet)

    def path(self, lm):
        """Return the `FastPath` of `lm`."""
        return lm._sharing if self.argument == "prefix_sharing" else lm._refilling

    def record(self, lm) -> dict:
        """Return what the results say of the requests so far, which ends the evaluation."""
        return lm.get_model_info()["answer_paths"][self.request_type]


def greedy(*prompts: str, **settings) -> list[tuple]:
    """Return requests to generate greedily."""
    settings = {"until": ["\n"], "max_gen_toks": 12} | settings
    return [(prompt, dict(settings)) for prompt in prompts]


STEM = "The same examples in front of each question. "
#: Prompts that begin alike, equal, short, and longer than `MAX_LENGTH`.
PROMPTS = [
    *(f"{STEM}{end}" for end in ("One", "One more", "Two", "One")),
    *("x", "Something else", "A long text " * 10),
]
MAX_LENGTH = 64

SCORED = Kind(
    "loglikelihood",
    "prefix_sharing",
    "shared",
    (
        *((p, f" {answer}") for p in PROMPTS for answer in ("yes", "no", "maybe so")),
        # No context; one token; one text split in two ways.
        *(("", "ab"), ("", "<bos>a"), ("x", "y"), ("abc", "def"), ("abcde", "f")),
    ),
)
ROLLING = Kind(
    "loglikelihood_rolling",
    "prefix_sharing",
    "shared",
    (("some text" * 3,), ("longer than a window " * 9,), ("some other",), ("s",)),
)
GENERATED = Kind("generate_until", "slot_refilling", "slots", tuple(greedy(*PROMPTS)))


def tiny(attention="sdpa", dtype=torch.float64, **overrides):
    config = tiny_config(**overrides)
    config._attn_implementation = attention
    model = tiny_model(config).to(dtype)
    # End-of-text tokens come at random times: every eighth byte is one.
    model.generation_config.eos_token_id = [257, *range(0, 256, 8)]
    return model


def wrapped(cls, model, **arguments):
    settings = {"batch_size": 3, "max_length": MAX_LENGTH, "device": "cpu"}
    if cls is not HFLM:
        settings["slots"] = 2
    return cls(model, tokenizer=byte_tokenizer(), **settings | arguments)


def ours(model, **arguments):
    return wrapped(PrefixHFLM, model, **arguments)


def hf(model, **arguments):
    """Wrap `model` in `HFLM`, one request at a time, without the cache of logits.

    That answers wrongly where two requests split one text differently; eager attention in
    float64 makes NaN of the padding in a batch.
    """
    return wrapped(HFLM, model, **arguments, batch_size=1, logits_cache=False)


def assert_close(got, expected, tolerance=1e-9):
    """Compare log-likelihoods up to `tolerance`, and all else of the answers exactly."""

    def near(value):
        if isinstance(value, tuple):
            return tuple(map(near, value))
        is_number = isinstance(value, float)
        return pytest.approx(value, abs=tolerance) if is_number else value

    assert got == [near(answer) for answer in expected]


WINDOW = 24
#: Names under which architectures keep the sizes that make them tiny, besides `TINY`'s.
SIZES = {
    1: "first_k_dense_replace n_group topk_group",
    2: "n_layer n_layers num_experts_per_tok",
    4: "n_head n_heads n_routed_experts num_experts num_local_experts rotary_dim",
    8: "qk_nope_head_dim qk_rope_head_dim v_head_dim",
    16: "kv_lora_rank moe_intermediate_size q_lora_rank shared_expert_intermediate_size",
    32: "d_model n_embd word_embed_proj_dim",
    64: "ffn_dim n_inner",
    512: "n_positions",
    # Some count positions from behind the padding token, whose number is 258.
    1024: "max_position_embeddings",
}
WINDOWS = ("sliding_window", "window_size", "attention_chunk_size", "local_attention")
#: Releases before have fewer classes.
OLDER = Version(transformers.__version__) < Version("5.24")


def shrunk(model_type, **overrides):
    """Return a tiny config of any architecture, with windows and every kind of layer it has."""
    if OLDER and model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    whole = AutoConfig.for_model(model_type)
    default = whole.get_text_config()
    if "text_config" in whole.sub_configs:
        text = shrunk(default.model_type, **overrides).to_dict()
        vision = {"num_hidden_layers": 1}
        return AutoConfig.for_model(model_type, text_config=text, vision_config=vision)
    sizes = {name: size for size, names in SIZES.items() for name in names.split()}
    windows = {"sliding_window": WINDOW, "use_sliding_window": True}
    wanted = TINY | sizes | windows
    arguments = {k: v for k, v in wanted.items() if hasattr(default, k)}
    if getattr(default, "kv_lora_rank", None):
        arguments.pop("head_dim", None)
        arguments["num_key_value_heads"] = 4
    if kinds := list(dict.fromkeys(getattr(default, "layer_types", None) or ())):
        arguments["layer_types"] = (kinds * 3)[:3]
    for name in WINDOWS:
        if isinstance(getattr(default, name, None), int):
            arguments[name] = WINDOW
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
