"""On every architecture that takes the fast paths, the answers are those of `HFLM`.

Every architecture runs with windows of 24 tokens where it has any, on requests shorter
and longer than that.
"""

from __future__ import annotations

import pytest
import torch

from lm_eval_pruned.model_wrappers.batching import attention_support
from tests.helpers.answering import (
    GENERATED,
    OLDER,
    SCORED,
    WINDOW,
    assert_close,
    greedy,
    hf,
    ours,
    shrunk,
)
from tests.helpers.checkpoints import tiny_config, tiny_model


pytestmark = pytest.mark.usefixtures("share_however_little")

#: Without sdpa.
ONLY_EAGER = {"gemma2", "gpt_oss", "vaultgemma", "xglm"}
FAST = {"gemma2-eager", "gpt_oss-eager", "llama-eager", "mistral-sdpa"}


def sides(config, attention="sdpa"):
    config._attn_implementation = attention
    try:
        model = tiny_model(config)
    except ValueError as error:
        if OLDER and "does not support an attention implementation" in str(error):
            pytest.skip(f"{config.model_type} has no {attention} in this transformers")
        raise
    # XGLM's says where a decoder starts, which greedy generation has no use for.
    model.generation_config.decoder_start_token_id = None
    return [make(model, max_length=512) for make in (hf, ours)]


def check_scores(plain, shared, lengths):
    """Score texts of these lengths with two endings and three continuations each."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, 200, (max(lengths),), generator=generator).tolist()
    asked = [
        (("", ""), text[: max(1, length - len(end) - len(tail))] + end, tail)
        for length in lengths
        for end in ([1, 2], [length % 100] * 7)
        for tail in ([3, 4], [5], [6, 7, 8])
    ]
    got, expected = (
        lm._loglikelihood_tokens(asked, disable_tqdm=True) for lm in (shared, plain)
    )
    spread = torch.tensor([value for value, _ in expected]).std().item()
    assert_close(got, expected, 1e-3 * spread)


def check_texts(plain, lm, *prompts):
    """Return how many requests of each path were answered as by `plain`."""
    asked = greedy(*prompts, until=[])
    assert GENERATED.ask(lm, asked) == GENERATED.ask(plain, asked)
    return GENERATED.record(lm)["requests"]


@pytest.mark.parametrize(
    ("model_type", "attention"),
    [
        pytest.param(name, attention, id=case, marks=marks)
        for name in sorted(attention_support.PLAIN_ATTENTION)
        for attention in (["eager"] if name in ONLY_EAGER else ["sdpa", "eager"])
        for case in [f"{name}-{attention}"]
        for marks in [() if case in FAST else pytest.mark.slow]
    ],
)
def test_every_known_architecture(model_type, attention):
    """Both fast paths answer as HFLM does."""
    plain, lm = sides(shrunk(model_type), attention)
    limit = attention_support.sequence_limit(lm.model.config)
    assert limit in (WINDOW, None)
    check_scores(plain, lm, (20, 23, 24, 25, 26, 60))
    check_scores(plain, lm, (20, 200, 400))
    assert SCORED.record(lm)["requests"]["shared"] > 0
    assert check_texts(plain, lm, "abcdefgh", "abcdexyz", "qrstuvwx") == {"slots": 3}
    beyond = "plain" if limit else "slots"
    assert check_texts(plain, lm, "abcdefgh" * 3) == {beyond: 1}


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"rope_type": "dynamic"}, 40),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [3.0] * 4,
                "original_max_position_embeddings": 40,
            },
            160,
        ),
    ],
)
def test_positions_that_depend_on_the_length_of_a_batch(rope, longest):
    rope = {"rope_theta": 10000.0, "factor": 4.0, **rope}
    config = tiny_config(rope_parameters=rope, max_position_embeddings=longest)
    plain, shared = sides(config)
    assert attention_support.sequence_limit(shared.model.config) == 40
    # The plain path's answers beyond the limit depend on what else is in the batch.
    check_scores(plain, shared, (20, 39, 40))
    assert SCORED.record(shared)["requests"].keys() == {"shared"}
