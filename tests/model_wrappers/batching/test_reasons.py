"""When a fast path gives way, what it says, and what the results record of it."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers

from lm_eval_pruned.model_wrappers.batching import (
    attention_support,
    cpu_linear,
    fast_path,
    prefix_pass,
    prefix_sharing,
)
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from tests.helpers.answering import (
    GENERATED,
    PROMPTS,
    SCORED,
    assert_close,
    greedy,
    hf,
    ours,
    shrunk,
    tiny,
    wrapped,
)
from tests.helpers.checkpoints import auto_class, tiny_config, tiny_model
from tests.helpers.layouts import overrides


UNKNOWN = "is not among the model types that were tried"
T5 = tiny_config("t5", **overrides("t5", 64))
NO_MEMORY = "CUDA out of memory. Tried to allocate 1 PiB."


class OwnLlama(transformers.LlamaForCausalLM):
    """As a checkpoint may bring along, under the name of a model type that is known."""


def model_of(config=None, attention="eager", own_class=None, **adapter):
    config = config or tiny_config()
    with torch.device("meta"):
        model = auto_class(config).from_config(config, attn_implementation="eager")
    config = model.config
    config._attn_implementation = attention
    if own_class:
        model.__class__ = own_class
    if adapter:
        model.peft_config = {"default": SimpleNamespace(**adapter)}
    return model


LORA = {"peft_type": peft.PeftType.LORA}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        # ALiBi, a recurrent state, attention that looks both ways, other positions.
        *((lambda n=name: model_of(shrunk(n)), UNKNOWN) for name in ("mpt", "mamba", "bert", "xlm")),
        (lambda: model_of(shrunk("falcon", alibi=True)), "ALiBi"),
        (lambda: model_of(shrunk("gemma3_text", use_bidirectional_attention=True)), "both ways"),
        (lambda: model_of(tiny_config(is_causal=False)), "both ways"),
        (lambda: model_of(own_class=OwnLlama), "OwnLlama is not a class of transformers"),
        (lambda: model_of(attention="flash_attention_2"), "flash_attention_2 takes no explicit mask"),
        *((lambda k=kind: model_of(peft_type=k), f"({kind}) may look at the whole row")
          for kind in ("XLORA", "LOHA", "PROMPT_TUNING", "ADAPTION_PROMPT", "NEW")),
        (lambda: model_of(alora_invocation_tokens=[5, 6], **LORA), "searches for in the row"),
        (lambda: model_of(**LORA), None),
        (model_of, None),
    ],
)  # fmt: skip
def test_what_about_a_model_speaks_against_fast_paths(make, reason):
    lm = SimpleNamespace(model=make(), backend="causal")
    got = attention_support.unsupported_reason(lm)
    assert (got is None) if reason is None else reason in got


def said(fast, caplog) -> list[str]:
    """Return what the fast path has logged."""
    name = f"lm_eval.models.{fast.argument}"
    return [record.message for record in caplog.records if record.name == name]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: tiny_model(shrunk("bloom")), f"bloom {UNKNOWN}"),
        (lambda: tiny_model(T5), "the model is an encoder-decoder"),
        (tiny, "{}=false"),
    ],
    ids=["unknown", "encoder-decoder", "off"],
)
def test_where_a_path_is_not_taken_hf_answers_and_one_line_says_why(
    fast, make, reason, caplog
):
    model, reason, off = make(), reason.format(fast.argument), make is tiny
    backend = "seq2seq" if model.config.is_encoder_decoder else "causal"
    more = {fast.argument: False} if off else {}
    lm = ours(model, backend=backend, batch_size=1, **more)
    asked = fast.asked[:3]
    expected = fast.ask(hf(model, backend=backend), asked)
    for _ in range(2):
        assert_close(fast.ask(lm, asked), expected, 0)
    lines = said(fast, caplog)
    # Nobody has to be told what they asked for.
    assert [reason in line for line in lines] == [True] * (not off)
    record = fast.record(lm)
    assert (record["requests"], record["reasons"]) == ({"plain": 6}, [reason])
    assert record["tokens_computed"]["plain"] > 0
    assert "slots" not in record
    assert not fast.path(lm).is_on


#: What a task may ask for of each request, and why `HFLM` answers it; None: greedy all the same.
SETTINGS = [
    ({"do_sample": True, "temperature": 0.7}, "do_sample"),
    ({"temperature": 0.7}, "do_sample"),
    *(({name: value}, f"{name}={value}") for name, value in [
        ("num_beams", 2), ("repetition_penalty", 1.3), ("no_repeat_ngram_size", 2),
        ("suppress_tokens", [65]), ("min_new_tokens", 2),
    ]),
    ({"max_length": 80}, "max_length"),
    ({"logits_processor": []}, "logits_processor"),
    *((more, None) for more in [
        {"num_beams": 1}, {"repetition_penalty": 1.0}, {"temperature": 0.0},
        {"do_sample": False, "top_p": 0.9},
    ]),
]  # fmt: skip


def test_each_request_that_is_more_than_greedy_has_its_own_reason(caplog):
    model = tiny()
    asked = [
        request for more, _ in SETTINGS for request in greedy(*PROMPTS[:2], **more)
    ]
    torch.manual_seed(0)
    expected = GENERATED.ask(hf(model), asked)
    lm = ours(model, batch_size=1)
    torch.manual_seed(0)
    assert GENERATED.ask(lm, asked) == expected
    reasons = [f"{why} is asked for" for _, why in SETTINGS if why]
    counted = {why: 2 * reasons.count(why) for why in reasons}
    assert lm.answer_paths["generate_until"].by_reason == counted
    assert len(said(GENERATED, caplog)) == len(counted)
    record = GENERATED.record(lm)
    assert record["requests"] == {"slots": 8, "plain": 18}
    assert record["reasons"] == list(counted)
    # Each evaluation records only its own reasons.
    GENERATED.ask(lm, greedy(*PROMPTS, num_beams=2))
    assert GENERATED.record(lm)["reasons"] == ["num_beams=2 is asked for"]
    model.generation_config.repetition_penalty = 1.4
    GENERATED.ask(lm)
    assert GENERATED.record(lm)["reasons"] == ["repetition_penalty=1.4 is asked for"]


@pytest.mark.parametrize(
    ("least_saving", "requests", "few"),
    [(-9, {"shared": 12, "plain": 2}, {}), (9, {"plain": 14}, {"common": 12})],
)
def test_each_scored_request_has_its_own_reason(
    least_saving, requests, few, monkeypatch
):
    monkeypatch.setattr(prefix_sharing, "_least_saving", lambda device: least_saving)
    lm = ours(tiny_model(tiny_config("mistral", sliding_window=24)))
    short = [(f"The same {n} times", " abc"[: 2 + n % 3]) for n in range(12)]
    # HFLM computes what two answers of one token share once.
    SCORED.ask(lm, [*short, ("x" * 40, "a"), ("x" * 40, "b")])
    by_reason = lm.answer_paths["loglikelihood"].by_reason
    counted = {reason.split()[-1]: count for reason, count in by_reason.items()}
    assert counted == {**few, "tokens": 2}
    record = SCORED.record(lm)
    assert (record["requests"], record["reasons"]) == (requests, [*by_reason])
    if not few:
        assert record["tokens_computed"]["plain"] == 40


def test_what_is_worth_sharing_does_not_depend_on_the_width():
    """Close to the least saving, the share of the MLPs in the work would decide."""
    decisions = set()
    for percent in (None, 20, 40, 60, 80):
        lm = wrapped(PrunedHFLM, tiny_model(tiny_config()), prune_percent=percent)
        worth = []
        for length in range(1, 20):
            requests = [(None, [9] * length + [a], [a] * 40) for a in range(9)]
            work = prefix_pass.Work.from_requests(requests, 512)
            worth.append(lm._is_worth_it(work))
        decisions.add(tuple(worth))
    assert len(decisions) == 1
    assert set(*decisions) == {False, True}


def test_what_answered_is_recorded_for_one_evaluation(fast):
    """Nor does it depend on what was answered before: a sweep that goes on compares paths."""
    lm, records = ours(tiny()), []
    for asked in (fast.asked, fast.asked[:4], fast.asked):
        before = lm.token_counts.processed
        fast.ask(lm, asked)
        expected = {
            "requests": {fast.fast: len(asked)},
            "tokens_computed": {fast.fast: lm.token_counts.processed - before},
            "reasons": [],
            **({"slots": 2} if fast is GENERATED else {}),
        }
        records.append(fast.record(lm))
        assert records[-1] == expected
    assert records[0] == records[2]


@pytest.mark.parametrize(
    ("dtype", "linear"), [(torch.float32, "onednn"), (torch.float64, "torch")]
)
def test_the_results_say_what_computed_linear_layers(dtype, linear, monkeypatch):
    monkeypatch.setattr(cpu_linear, "faster_library", lambda: "onednn")
    lm = ours(tiny(dtype=dtype))
    SCORED.ask(lm)
    assert lm.get_model_info()["answer_paths"]["linear"] == linear


# --- a lack of memory


def failing(lm, message, fits=lambda tokens: False):
    """Let the passes of a model fail that do not fit; return what the failed ones held."""
    held = []

    def look(_, inputs):
        if not fits(inputs[0].shape[:-1].numel()):
            hidden = inputs[0] + 1
            held.append(weakref.ref(hidden))
            raise RuntimeError(message)

    lm.model.model.layers[1].register_forward_pre_hook(look)
    return held


@pytest.mark.slow
@pytest.mark.usefixtures("share_however_little")
def test_a_lack_of_memory_halves_passes_for_good(fast, monkeypatch, caplog):
    asked = [(letter * 9, *fast.asked[0][1:]) for letter in "abcdef"]
    expected = fast.ask(hf(tiny()), asked)
    lm, left, clear = ours(tiny(), slots=6), [], fast_path.clear_device_cache
    held = failing(lm, NO_MEMORY, lambda tokens: tokens < 24)

    def cleared(**arguments):
        clear(**arguments)
        left.extend(ref() for ref in held)

    monkeypatch.setattr(fast_path, "clear_device_cache", cleared)
    lines = []
    # The second time it is known.
    for _ in range(2):
        assert_close(fast.ask(lm, asked), expected)
        lines.append(said(fast, caplog))
    path = fast.path(lm)
    assert lines[0] == lines[1]
    assert f"at most {path.most} {path.unit} at once" in lines[0][-1]
    assert left and not any(tensor is not None for tensor in left)
    assert fast.record(lm)["requests"].keys() == {fast.fast}


def test_what_a_smaller_pass_would_not_help(fast):
    """`test_runs` has a lack of memory in one of two processes that share a model."""
    lm = ours(tiny(), slots=6)
    failing(lm, "shapes do not match")
    with pytest.raises(RuntimeError, match="shapes"):
        fast.ask(lm)
    assert fast.path(lm).most is None
