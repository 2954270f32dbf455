"""Fast paths are on where they are valid, off where not, and the results say which."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM

from lm_eval_pruned.model_wrappers.batching import (
    attention_support,
    cpu_linear,
    prefix_pass,
    prefix_sharing,
)
from lm_eval_pruned.model_wrappers.batching.prefix_sharing import PrefixSharingMixin
from lm_eval_pruned.model_wrappers.batching.slot_refilling import SlotRefillingMixin
from lm_eval_pruned.model_wrappers.hf_prefix import PrefixHFLM
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from tests.checkpoints.test_adapters import METHODS, save_adapter
from tests.helpers import made_tasks
from tests.helpers.checkpoints import byte_tokenizer, tiny_config, tiny_model
from tests.model_wrappers.batching.test_prefix_sharing_architectures import (
    check_answers,
    shrunk,
)


def wrapped(cls, model, **arguments):
    return cls(
        pretrained=model,
        tokenizer=byte_tokenizer(),
        device="cpu",
        batch_size=2,
        max_length=256,
        **arguments,
    )


def rough_llama(dtype):
    """Return a model whose 16-bit answers depend on the order of sums by a tenth and more."""
    model = tiny_model(tiny_config(num_hidden_layers=6))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    return model.to(dtype)


@pytest.fixture
def share_however_little(monkeypatch):
    monkeypatch.setattr(prefix_sharing, "_least_saving", lambda device: -9.0)


REQUESTS = [
    (None, list(range(20)) + [a, a + 1], [b, b + 1])
    for a in range(0, 120, 30)
    for b in (3, 5, 90)
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prune_percent", [None, 30, 40, 60])
def test_all_sizes_and_dtypes_of_a_sweep_share(dtype, prune_percent):
    lm = wrapped(PrunedHFLM, rough_llama(dtype), prune_percent=prune_percent)
    answers = lm._loglikelihood_tokens(REQUESTS * 2, disable_tqdm=True)
    assert all(math.isfinite(value) for value, _ in answers)
    paths = lm.get_model_info()["answer_paths"]
    assert paths["loglikelihood"]["requests"] == {"shared": len(REQUESTS) * 2}
    assert paths["loglikelihood"]["tokens_computed"]["shared"] < 22 * len(REQUESTS)


def test_what_is_worth_sharing_does_not_depend_on_the_width():
    """Close to the least saving, the share of the MLPs in the work would decide."""
    decisions = []
    for prune_percent in (None, 20, 40, 60, 80):
        lm = wrapped(PrunedHFLM, tiny_model(tiny_config()), prune_percent=prune_percent)
        worth = []
        for length in range(1, 20):
            requests = [(None, [9] * length + [a], [a] * 40) for a in range(9)]
            work = prefix_pass.Work.of(requests, lm.max_length)
            worth.append(lm._is_worth_it(requests, work))
        decisions.append(worth)
    assert False in decisions[0] and True in decisions[0]
    assert decisions.count(decisions[0]) == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["lora", "lora-rank-pattern", "dora", "ia3", "lora-before"]
)
def test_adapters_share(tiny_llama, tmp_path, name, share_however_little):
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    base.resize_token_embeddings(len(byte_tokenizer()))
    adapter = save_adapter(tmp_path, base, METHODS[name.removesuffix("-before")])
    arguments = {"pretrained": str(tiny_llama), "device": "cpu", "peft": adapter}
    plain = HFLM(**arguments, logits_cache=False)
    cls = PrefixHFLM
    if name.endswith("-before"):
        cls, arguments["peft_stage"] = PrunedHFLM, "before"
    shared = cls(**arguments)
    check_answers(plain, shared)
    assert shared.prefix_sharing
    path = shared.get_model_info()["answer_paths"]["loglikelihood"]
    assert set(path["requests"]) == {"shared"}


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        *(
            ({"peft_type": kind}, f"({kind}) may look at the whole row")
            for kind in ("XLORA", "LOHA", "PROMPT_TUNING", "ADAPTION_PROMPT", "NEW")
        ),
        ({"alora_invocation_tokens": [5, 6]}, "searches for in the row"),
        ({}, None),
    ],
)
def test_adapters_that_look_at_the_whole_row_do_not(adapter, reason):
    plain = {"peft_type": peft.PeftType.LORA}
    model = tiny_model(tiny_config())
    model.peft_config = {"default": SimpleNamespace(**plain | adapter)}
    lm = SimpleNamespace(model=model, backend="causal")
    got = attention_support.unsupported_reason(lm)
    assert (got is None) if reason is None else reason in got


def test_two_runs_are_bit_identical(monkeypatch):
    def first():
        lm = wrapped(PrefixHFLM, tiny_model(tiny_config()))
        return lm._loglikelihood_tokens(REQUESTS * 2, disable_tqdm=True)

    assert first() == first()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    made_tasks.write_choice_task(folder)
    made_tasks.write_text_tasks(folder)
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(lm, tasks):
    results = simple_evaluate(
        model=lm,
        tasks=["tiny_choice", "tiny_rolling"],
        task_manager=tasks,
        num_fewshot=0,
        bootstrap_iters=0,
    )
    return results["config"]["answer_paths"]


def test_the_results_say_which_path_answered(
    tiny_llama, tasks, share_however_little, monkeypatch
):
    monkeypatch.setattr(cpu_linear, "linear_backend", lambda: "torch")
    lm = PrefixHFLM(pretrained=str(tiny_llama), device="cpu", batch_size=4)
    paths = evaluate(lm, tasks)
    for kind in ("loglikelihood", "loglikelihood_rolling"):
        assert set(paths[kind]["requests"]) == {"shared"}
        assert paths[kind]["tokens_computed"]["shared"] > 0
        assert paths[kind]["reasons"] == []
    assert paths["loglikelihood"]["requests"]["shared"] == 12
    assert paths["linear"] in ("torch", "onednn")


def test_the_results_are_those_of_one_evaluation(tiny_llama, tasks):
    lm = PrefixHFLM(pretrained=str(tiny_llama), device="cpu", batch_size=4)
    first, second = (copy.deepcopy(evaluate(lm, tasks)) for _ in range(2))
    assert first == second


def test_the_path_does_not_depend_on_what_was_answered_before():
    """A sweep that goes on evaluates its tasks in another order, and compares the paths."""
    few = REQUESTS[:4]
    paths = []
    for before in ([], REQUESTS * 2):
        lm = wrapped(PrefixHFLM, tiny_model(tiny_config()))
        for requests in filter(None, (before, few)):
            lm._loglikelihood_tokens(requests, disable_tqdm=True)
            path = lm.get_model_info()["answer_paths"]["loglikelihood"]
        paths.append(path)
    assert paths[0]["requests"] == {"shared": len(few)}
    assert paths[0] == paths[1]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"prefix_sharing": False}, "prefix_sharing=false"),
        ({"attn_implementation": "eager"}, None),
    ],
)
def test_the_results_say_why_not(
    tiny_llama, tasks, arguments, reason, share_however_little
):
    lm = PrefixHFLM(pretrained=str(tiny_llama), device="cpu", **arguments)
    paths = evaluate(lm, tasks)["loglikelihood"]
    assert set(paths["requests"]) == ({"plain"} if reason else {"shared"})
    assert paths["tokens_computed"]["plain" if reason else "shared"] > 0
    assert paths["reasons"] == ([reason] if reason else [])


def test_a_limit_is_a_reason(share_however_little):
    config = tiny_config("mistral", sliding_window=24)
    lm = wrapped(PrefixHFLM, tiny_model(config))
    lm._loglikelihood_tokens(
        [*REQUESTS, (None, [1] * 40, [2]), (None, [1] * 40, [3])], disable_tqdm=True
    )
    path = lm.answer_paths.of("loglikelihood")
    assert path.requests == {"shared": len(REQUESTS), "plain": 2}
    assert list(path.by_reason) == ["it is longer than 24 tokens"]
    # HFLM computes what two answers of one token share once.
    assert path.tokens_computed["plain"] == 40


def test_each_request_has_its_own_reason(share_however_little, monkeypatch):
    lm = wrapped(PrefixHFLM, tiny_model(tiny_config("mistral", sliding_window=24)))
    monkeypatch.setattr(prefix_sharing, "_least_saving", lambda device: 9.0)
    lm._loglikelihood_tokens(
        [*REQUESTS, (None, [1] * 40, [2]), (None, [1] * 50, [3])], disable_tqdm=True
    )
    path = lm.answer_paths.of("loglikelihood")
    assert path.requests == {"plain": len(REQUESTS) + 2}
    assert path.by_reason == {
        "requests have too little in common": len(REQUESTS),
        "it is longer than 24 tokens": 2,
    }
    info = lm.get_model_info()["answer_paths"]["loglikelihood"]
    assert info["reasons"] == list(path.by_reason)
    assert set(info) == {"requests", "tokens_computed", "reasons"}


@pytest.mark.parametrize(
    "method",
    ["_loglikelihood_tokens", "_select_cont_toks", "_model_call", "_model_generate"],
)
def test_what_hf_computes_with_is_overridden_in_one_place(method):
    ours = PrunedHFLM.__mro__[: PrunedHFLM.__mro__.index(HFLM)]
    assert len([cls for cls in ours if method in vars(cls)]) == 1


def test_no_path_takes_the_name_of_another():
    """Mixins of one class share a namespace, and a type checker does not mind."""
    common = vars(SlotRefillingMixin).keys() & vars(PrefixSharingMixin).keys()
    assert {name for name in common if not name.startswith("__")} == set()


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(40, 50, 56), (20, 31, 32, 33, 34, 56)])
def test_attention_temperature_follows_the_position(lengths, share_however_little):
    """Llama 4 takes the place in the row and the cache for the position."""
    config = shrunk(
        "llama4_text",
        floor_scale=64,
        attn_scale=0.5,
        attention_chunk_size=500,
        no_rope_layers=[0, 0, 1],
        layer_types=["full_attention", "full_attention", "chunked_attention"],
    )
    model = tiny_model(config)
    plain, shared = wrapped(HFLM, model), wrapped(PrefixHFLM, model)
    assert attention_support.sequence_limit(config) == 32
    assert shared._can_take(shared._sharing)
    requests = [
        (None, [a] * (length - 3) + [b], [1, 2])
        for a in range(40, 80)
        for b in (3, 4)
        for length in lengths
    ]
    got = shared._loglikelihood_tokens(requests, disable_tqdm=True)
    expected = plain._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [v for v, _ in got] == pytest.approx([v for v, _ in expected], abs=1e-3)


def watch_attention(monkeypatch):
    calls = []
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    sdpa = functions["sdpa"]

    def watched(module, query, key, value, attention_mask, **kwargs):
        calls.append(None if attention_mask is None else attention_mask)
        return sdpa(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(functions, "sdpa", watched)
    return calls


@pytest.mark.parametrize("lengths", [(40,) * 6, (40, 39, 38, 37, 36, 35)])
def test_chains_of_unequal_length_run_through_the_causal_kernel(
    lengths, monkeypatch, share_however_little
):
    model = tiny_model(tiny_config())
    plain, shared = wrapped(HFLM, model), wrapped(PrefixHFLM, model)
    requests = [(None, [a] * length, [1]) for a, length in enumerate(lengths)]
    assert shared._can_take(shared._sharing)
    calls = watch_attention(monkeypatch)
    got = shared._loglikelihood_tokens(requests, disable_tqdm=True)
    assert calls and all(mask is None for mask in calls)
    expected = plain._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [v for v, _ in got] == pytest.approx([v for v, _ in expected], abs=1e-4)


def test_rows_of_masks_begin_at_multiples_of_16(monkeypatch, share_however_little):
    lm = wrapped(PrefixHFLM, tiny_model(tiny_config()))
    assert lm._can_take(lm._sharing)
    calls = watch_attention(monkeypatch)
    lm._loglikelihood_tokens(REQUESTS, disable_tqdm=True)
    masks = [mask for mask in calls if mask is not None]
    assert masks
    for mask in masks:
        assert all(stride % 16 == 0 for stride in mask.stride()[:-1]), mask.stride()


def test_a_device_without_float64(monkeypatch, share_however_little):
    """Apple's has none; a processor, to which results come back, has."""

    class Values(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            name = getattr(function, "__name__", "")
            wide = any(a is torch.float64 for a in (*args, *(kwargs or {}).values()))
            if name == "double" or (name == "to" and wide):
                raise TypeError("Cannot convert a MPS Tensor to float64")
            if name in ("cpu", "numpy"):
                return getattr(args[0].as_subclass(torch.Tensor), name)()
            return super().__torch_function__(function, types, args, kwargs or {})

    lm = wrapped(PrefixHFLM, tiny_model(tiny_config()))
    expected = lm._loglikelihood_tokens(REQUESTS, disable_tqdm=True)
    score = prefix_pass._score
    monkeypatch.setattr(
        prefix_pass,
        "_score",
        lambda work, nodes, logits, *rest: score(
            work, nodes, logits.as_subclass(Values), *rest
        ),
    )
    assert lm._loglikelihood_tokens(REQUESTS, disable_tqdm=True) == expected


def test_one_text_split_in_two_ways_on_the_plain_path():
    """HFLM's cache of logits answers with the first logits of the text for the second."""
    model = tiny_model(tiny_config())
    plain = wrapped(HFLM, model, logits_cache=False)
    ours = wrapped(PrefixHFLM, model, prefix_sharing=False)
    requests = [(None, [1, 2, 3], [4, 5, 6]), (None, [1, 2, 3, 4, 5], [6])]
    got = ours._loglikelihood_tokens(requests, disable_tqdm=True)
    expected = plain._loglikelihood_tokens(requests, disable_tqdm=True)
    assert got == expected
    assert ours.logits_cache
    # Neither stands in for the other.
    assert ours.answer_paths.of("loglikelihood").tokens_computed["plain"] == 5 + 5


def test_hf_computes_answers_of_one_token_once(monkeypatch):
    lm = wrapped(PrefixHFLM, tiny_model(tiny_config()), prefix_sharing=False)
    calls = []
    call = lm._model_call
    monkeypatch.setattr(
        lm, "_model_call", lambda inps, **kw: calls.append(inps.shape) or call(inps)
    )
    requests = [(None, [1, 2, 3], [a]) for a in range(5)]
    lm._loglikelihood_tokens(requests, disable_tqdm=True)
    assert calls == [(1, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_under_autocast(attention, monkeypatch, share_however_little):
    config = tiny_config()
    config._attn_implementation = attention
    model = tiny_model(config)
    arguments = {"mixed_precision_dtype": "bfloat16", "softmax_dtype": "float32"}
    plain, shared = (
        wrapped(HFLM, model, **arguments),
        wrapped(PrefixHFLM, model, **arguments),
    )
    got = shared._loglikelihood_tokens(REQUESTS, disable_tqdm=True)
    expected = plain._loglikelihood_tokens(REQUESTS, disable_tqdm=True)
    assert [v for v, _ in got] == pytest.approx([v for v, _ in expected], abs=0.5)
    assert shared.token_counts.processed > 0


class SameDevice(torch.utils._python_dispatch.TorchDispatchMode):
    """Refuses what mixes devices; copies, and numbers from a processor, are allowed."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        flat = torch.utils._pytree.tree_leaves((args, kwargs))
        devices = {
            t.device.type for t in flat if isinstance(t, torch.Tensor) and t.dim()
        }
        assert len(devices) < 2 or "copy" in name, f"{name} mixes {devices}"
        return func(*args, **(kwargs or {}))


def test_a_pass_stays_on_its_device(monkeypatch, share_however_little):
    """On torch's device without data, where whatever else turns up is a stranger."""
    lm = wrapped(PrefixHFLM, tiny_model(tiny_config()))
    assert lm._can_take(lm._sharing)
    lm._model = lm.model.to("meta")
    lm._device = torch.device("meta")
    scored = []
    monkeypatch.setattr(
        prefix_pass, "_score", lambda work, nodes, logits, _: scored.append(logits)
    )
    work = prefix_pass.Work.of(REQUESTS, lm.max_length)
    with SameDevice():
        for _ in lm._passes(work, prefix_sharing.Budget(14, 7, 14)):
            pass
    assert len(scored) > 2
    assert {logits.device.type for logits in scored} == {"meta"}
