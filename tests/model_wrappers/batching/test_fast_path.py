"""What prefix sharing and slot refilling do alike: when they run, and without memory."""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from lm_eval_pruned.model_wrappers.batching import fast_path
from lm_eval_pruned.model_wrappers.hf_prefix import PrefixHFLM
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from tests.helpers.checkpoints import byte_tokenizer, tiny_config, tiny_model
from tests.model_wrappers.batching.test_prefix_sharing_architectures import shrunk


@dataclass
class Path:
    """One of the two, and requests that take it."""

    argument: str
    request_type: str
    name: str
    requests: list[tuple]
    advice: str

    def answers(self, lm):
        requests = [
            Instance(self.request_type, {}, arguments, index)
            for index, arguments in enumerate(self.requests)
        ]
        return getattr(lm, self.request_type)(requests, disable_tqdm=True)

    def of(self, lm) -> fast_path.FastPath:
        return {"shared": lm._sharing, "slots": lm._refilling}[self.name]

    def record(self, lm) -> dict:
        return lm.get_model_info()["answer_paths"][self.request_type]


STEM = "The same examples in front of each question. "
PATHS = [
    Path(
        "prefix_sharing",
        "loglikelihood",
        "shared",
        [(STEM + q, f" {a}") for q in "abcdef" for a in ("yes", "no", "maybe so")],
        r"\d+ tokens at once.*give a smaller batch_size, or prefix_sharing=false",
    ),
    Path(
        "slot_refilling",
        "generate_until",
        "slots",
        [(q * 9, {"until": ["\n"], "max_gen_toks": 8}) for q in "abcdef"],
        "6 requests at once.*give slots=3",
    ),
]


@pytest.fixture(params=PATHS, ids=lambda path: path.argument)
def path(request):
    return request.param


def wrapped(cls, model, **arguments):
    settings = {"batch_size": 1, "max_length": 256, **arguments}
    return cls(pretrained=model, tokenizer=byte_tokenizer(), device="cpu", **settings)


def tiny(dtype=torch.float64):
    return tiny_model(tiny_config()).to(dtype)


def same(got, expected):
    if isinstance(got[0], str):
        assert got == expected
        return
    assert [value for value, _ in got] == pytest.approx([v for v, _ in expected])
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]


def test_the_argument_is_a_switch(path):
    with pytest.raises(ValueError, match=f"{path.argument}='sometimes'"):
        wrapped(PrefixHFLM, tiny(), **{path.argument: "sometimes"})


@pytest.mark.slow
def test_turned_off_it_is_hfs_own_path(path, caplog):
    lm = wrapped(PrefixHFLM, tiny(), **{path.argument: False})
    with caplog.at_level(logging.WARNING, f"lm_eval.models.{path.argument}"):
        same(path.answers(lm), path.answers(wrapped(HFLM, lm.model)))
    assert not getattr(lm, path.argument)
    assert path.record(lm)["requests"] == {"plain": len(path.requests)}
    assert path.record(lm)["reasons"] == [f"{path.argument}=false"]
    assert "usual path" not in caplog.text and "whole" not in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("percent", [0, 30, 60])
def test_sizes_and_dtypes_of_a_sweep_take_it(path, dtype, percent):
    lm = wrapped(PrunedHFLM, tiny(dtype), prune_percent=percent)
    path.answers(lm)
    assert path.record(lm)["requests"] == {path.name: len(path.requests)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["bert", "xlm-roberta", "data2vec-text"])
def test_models_that_see_what_follows_are_refused(path, dtype, model_type):
    config = shrunk(model_type)
    config.is_decoder = False
    lm = wrapped(PrefixHFLM, tiny_model(config).to(dtype))
    assert not lm._can_take(path.of(lm))
    assert not getattr(lm, path.argument)
    assert "not among the model types" in path.of(lm).reason


def test_an_unknown_model_takes_hfs_path_and_one_line_says_so(path, caplog):
    lm = wrapped(PrefixHFLM, tiny_model(shrunk("bloom")))
    with caplog.at_level(logging.WARNING, f"lm_eval.models.{path.argument}"):
        for _ in range(2):
            same(path.answers(lm), path.answers(wrapped(HFLM, lm.model)))
    reason = "bloom is not among the model types that were tried"
    assert caplog.text.count(reason) == 1
    assert path.record(lm)["reasons"] == [reason]


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


NO_MEMORY = "CUDA out of memory. Tried to allocate 1 PiB."


@pytest.mark.slow
def test_a_lack_of_memory_halves_passes_for_good(path, monkeypatch, caplog):
    expected = path.answers(wrapped(HFLM, tiny()))
    lm = wrapped(PrefixHFLM, tiny(), slots=6)
    held = failing(lm, NO_MEMORY, lambda tokens: tokens < 24)
    left = []
    clear = fast_path.clear_device_cache

    def cleared(**arguments):
        clear(**arguments)
        left.extend(ref() for ref in held)

    monkeypatch.setattr(fast_path, "clear_device_cache", cleared)
    with caplog.at_level(logging.WARNING, f"lm_eval.models.{path.argument}"):
        same(path.answers(lm), expected)
    most, shortages = path.of(lm).most, caplog.text.count("Out of memory")
    assert f"at most {most} {path.of(lm).unit} at once" in caplog.text
    assert left and not any(tensor is not None for tensor in left)
    # Learnt for the next call.
    same(path.answers(lm), expected)
    assert (path.of(lm).most, caplog.text.count("Out of memory")) == (most, shortages)
    assert set(path.record(lm)["requests"]) == {path.name}


def test_another_error_is_not_taken_for_lack_of_memory(path):
    lm = wrapped(PrefixHFLM, tiny())
    failing(lm, "shapes do not match")
    with pytest.raises(RuntimeError, match="shapes do not match"):
        path.answers(lm)
    assert path.of(lm).most is None


def test_processes_that_share_a_model_do_not_back_off_one_by_one(path):
    model = tiny()
    model._tp_size = 2
    lm = wrapped(PrefixHFLM, model)
    failing(lm, NO_MEMORY)
    with pytest.raises(RuntimeError, match=path.advice):
        path.answers(lm)
