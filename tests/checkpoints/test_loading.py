"""Checkpoints as they are found on disk: shards, dtypes, devices, damage."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import re
import shutil
import subprocess
import sys
import threading
import types
import weakref
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    conversion_mapping,
)

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.checkpoints import load as loading, narrowed
from lm_eval_pruned.checkpoints.damage import check_counts
from lm_eval_pruned.checkpoints.narrowed import (
    AssembledTensor,
    NarrowedMlp,
    NarrowedTensor,
    RegionOfSource,
)
from lm_eval_pruned.checkpoints.request import (
    LoadRequest,
    _refuse_quantised,
    _resolve_config,
)
from lm_eval_pruned.checkpoints.route import RouteDeclined
from lm_eval_pruned.checkpoints.session import Session
from lm_eval_pruned.checkpoints.sources import _converted_sources
from lm_eval_pruned.pruning.arguments import PruneArguments
from lm_eval_pruned.pruning.layouts import UnsupportedModelError
from lm_eval_pruned.pruning.regions import Region
from lm_eval_pruned.pruning.scores import ScoreTable
from tests.helpers import checkpoints, layouts
from tests.helpers.checkpoints import edit_config, edit_weights
from tests.helpers.comparing import assert_same_model


@pytest.fixture
def copied(tiny_llama, tmp_path):
    """A copy of the tiny checkpoint that a test may damage."""
    return shutil.copytree(tiny_llama, tmp_path / "copy")


@pytest.fixture
def copied_shards(tiny_llama_sharded, tmp_path):
    """A copy of the sharded tiny checkpoint that a test may damage."""
    return shutil.copytree(tiny_llama_sharded, tmp_path / "copy")


def test_shards_are_joined(tiny_llama, tiny_llama_sharded):
    assert len(list(tiny_llama_sharded.glob("*.safetensors"))) > 5
    assert_same_model(
        load_pruned(str(tiny_llama), ratio=1),
        load_pruned(str(tiny_llama_sharded), ratio=1),
    )


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64, "auto"]
)
def test_scores_are_those_of_the_stored_weights_in_any_target_dtype(tiny_llama, dtype):
    stored = prune_model(AutoModelForCausalLM.from_pretrained(tiny_llama), ratio=1)
    pruned = load_pruned(str(tiny_llama), ratio=1, dtype=dtype)
    cast = torch.float32 if dtype == "auto" else dtype
    assert_same_model(pruned, stored.to(cast))


def test_every_projection_is_read_once_and_where_it_lies(tiny_llama, monkeypatch):
    lies_in_the_file = []
    read = NarrowedTensor.read

    def watched(self):
        weight = read(self)
        lies_in_the_file.append(weight.data_ptr() == read(self).data_ptr())
        return weight

    monkeypatch.setattr(NarrowedTensor, "read", watched)
    load_pruned(str(tiny_llama), ratio=1, dtype=torch.bfloat16)
    assert len(lies_in_the_file) == 9, "every projection of the three layers"
    assert all(lies_in_the_file), "not a copy"


def test_a_thread_that_would_wait_scores_a_later_layer(tiny_llama, monkeypatch):
    scored, others = [], threading.Event()

    def watched(plan, name, *args, score=narrowed.score, **kwargs):
        scored.append(name)
        if name == "model.layers.0.mlp":
            assert others.wait(60), "nobody scores another layer meanwhile"
        else:
            others.set()
        return score(plan, name, *args, **kwargs)

    monkeypatch.setattr(narrowed, "score", watched)
    monkeypatch.setattr("transformers.core_model_loading.GLOBAL_WORKERS", 2)
    expected = prune_model(AutoModelForCausalLM.from_pretrained(tiny_llama), ratio=1)
    assert_same_model(load_pruned(str(tiny_llama), ratio=1), expected)
    assert sorted(scored) == [f"model.layers.{layer}.mlp" for layer in range(3)]


def test_no_layer_is_converted_at_its_full_width(tiny_llama, monkeypatch):
    # In the calling thread, where a dispatch mode sees every operation.
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    full = {(88, 32), (32, 88)}
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if (
                isinstance(result, torch.Tensor)
                and result.device.type == "cpu"
                and result.dtype == torch.bfloat16
            ):
                seen.append(tuple(result.shape))
            return result

    with Watch():
        load_pruned(str(tiny_llama), ratio=1, dtype=torch.bfloat16)
    assert (32, 32) in seen, "the narrowed weights are converted"
    assert not full & set(seen)


@pytest.mark.parametrize("criterion", ["l2", "random"])
def test_criteria_that_copy_weights_see_one_layer_at_a_time(
    tiny_llama, monkeypatch, criterion
):
    scoring, most = [], []

    def watched(*args, score=narrowed.score, **kwargs):
        scoring.append(args[1])
        most.append(len(scoring))
        try:
            return score(*args, **kwargs)
        finally:
            scoring.pop()

    monkeypatch.setattr(narrowed, "score", watched)
    load_pruned(str(tiny_llama), ratio=1, criterion=criterion, dtype=torch.bfloat16)
    assert most == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("criterion", ["maw", "max_abs", "l1", "vow"])
def test_narrowing_before_converting_changes_no_bit(
    tmp_path, checkpoint_dtype, dtype, criterion
):
    folder = checkpoints.save_tiny(tmp_path / "tiny", dtype=checkpoint_dtype)
    stored = AutoModelForCausalLM.from_pretrained(folder)
    assert stored.dtype == checkpoint_dtype
    assert_same_model(
        load_pruned(str(folder), ratio=2, dtype=dtype, criterion=criterion),
        prune_model(stored, ratio=2, criterion=criterion).to(dtype),
    )


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64])
def checkpoint_dtype(request):
    return request.param


def test_weights_that_overflow_in_the_target_dtype_are_named(copied):
    key = "model.layers.1.mlp.gate_proj.weight"
    edit_weights(copied, lambda tensors: tensors[key][3, 3].fill_(1e6))
    load_pruned(str(copied), ratio=1)
    with pytest.raises(ValueError, match=f"{re.escape(key)} holds 1 NaN or infinite"):
        load_pruned(str(copied), ratio=1, dtype=torch.float16)


def test_the_order_of_the_tensors_does_not_matter(copied):
    def reverse(tensors):
        for key in sorted(tensors, reverse=True):
            tensors[key] = tensors.pop(key)

    expected = load_pruned(str(copied), ratio=1)
    edit_weights(copied, reverse)
    assert_same_model(load_pruned(str(copied), ratio=1), expected)


def test_nothing_stays_registered(tiny_llama, copied):
    before = PreTrainedModel.__dict__["_load_pretrained_model"]
    mapping = repr(conversion_mapping.get_checkpoint_conversion_mapping("llama"))
    load_pruned(str(tiny_llama), ratio=1)
    (copied / "model.safetensors").write_bytes(b"")
    with pytest.raises(OSError, match="not an intact safetensors file"):
        load_pruned(str(copied), ratio=1)
    assert PreTrainedModel.__dict__["_load_pretrained_model"] is before
    assert (
        repr(conversion_mapping.get_checkpoint_conversion_mapping("llama")) == mapping
    )


def load_in_threads(tiny_llama):
    """Load pruned and unpruned models in four threads at once."""
    full = AutoModelForCausalLM.from_pretrained(tiny_llama)
    loaded = []

    def load(prune):
        for _ in range(4):
            loaded.append(
                load_pruned(str(tiny_llama), ratio=1)
                if prune
                else AutoModelForCausalLM.from_pretrained(tiny_llama)
            )

    threads = [threading.Thread(target=load, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(m.config.intermediate_size for m in loaded) == [32] * 8 + [88] * 8
    for model in loaded:
        expected = full
        if model.config.intermediate_size == 32:
            expected = load_pruned(str(tiny_llama), ratio=1)
        assert_same_model(model, expected)


def in_another_process(function, folder):
    code = f"import sys; from {__name__} import {function}; {function}(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", code, folder], cwd=checkpoints.ROOT, check=True
    )


def load_tied_models_in_threads(folder):
    """Build, load and prune models with tied embeddings in six threads at once."""
    start = threading.Barrier(6)

    def load():
        start.wait()
        for _ in range(5):
            model = load_pruned(folder, ratio=1)
            loaded.append(prune_model(model, ratio=0.5))

    loaded: list = []
    threads = [threading.Thread(target=load) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 30, "some thread failed"
    built = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    for model in (*loaded, built):
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert built.model.layers[0].mlp.gate_proj.weight.std() < 0.1, "initialised"


def test_tied_models_load_in_threads(tmp_path):
    folder = str(checkpoints.save_tiny(tmp_path, tie_word_embeddings=True))
    in_another_process("load_tied_models_in_threads", folder)


def test_other_threads_load_untouched(tiny_llama):
    # In a process of its own: where threads load at once, transformers itself can leave
    # torch.nn.init replaced, and models built later would stay uninitialised.
    in_another_process("load_in_threads", str(tiny_llama))


def test_disk_offload_keeps_the_narrowed_weights(tiny_llama, tmp_path):
    device_map = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "disk",
        "model.norm": "cpu",
        "lm_head": "cpu",
    }
    offloaded = load_pruned(
        str(tiny_llama),
        ratio=1,
        device_map=device_map,
        offload_folder=str(tmp_path / "offload"),
    )
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected = load_pruned(str(tiny_llama), ratio=1)(tokens).logits
        assert torch.equal(offloaded(tokens).logits, expected)


def test_pickled_checkpoints_are_pruned_in_memory(copied, caplog):
    tensors = load_file(copied / "model.safetensors")
    expected = load_pruned(str(copied), ratio=1)
    (copied / "model.safetensors").unlink()
    torch.save(tensors, copied / "pytorch_model.bin")
    with caplog.at_level(logging.INFO, "lm_eval.pruned.loading"):
        model = load_pruned(str(copied), ratio=1)
    assert_same_model(model, expected)
    assert "loaded in full and pruned in memory" in caplog.text
    assert "not in safetensors" in caplog.text


def test_device_and_device_map_exclude_each_other(tiny_llama):
    with pytest.raises(ValueError, match="device=cpu and device_map=auto"):
        load_pruned(str(tiny_llama), ratio=1, device="cpu", device_map="auto")


@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
def test_nan_is_named_while_loading(copied, projection):
    key = f"model.layers.2.mlp.{projection}.weight"
    edit_weights(copied, lambda tensors: tensors[key][0].fill_(float("nan")))
    with pytest.raises(ValueError, match=f"{re.escape(key)} holds .* NaN or infinite"):
        load_pruned(str(copied), ratio=1)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000])
def test_a_truncated_file_is_named(copied, keep):
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(OSError, match=r"model\.safetensors is not an intact") as error:
        load_pruned(str(copied), ratio=1)
    assert "download or copy it again" in str(error.value)


def test_a_missing_shard_is_named(copied_shards):
    missing = sorted(copied_shards.glob("*.safetensors"))[3]
    missing.unlink()
    with pytest.raises(OSError, match=missing.name):
        load_pruned(str(copied_shards), ratio=1)


def test_a_missing_tensor_is_named(copied):
    key = "model.layers.1.mlp.up_proj.weight"
    edit_weights(copied, lambda tensors: tensors.pop(key))
    with pytest.raises(ValueError, match=f"no tensor for {re.escape(key)}"):
        load_pruned(str(copied), ratio=1)


def test_a_config_that_lies_about_the_width_is_caught(copied):
    edit_config(copied, intermediate_size=96)
    with pytest.raises(
        ValueError,
        match=r"has 88 neurons in the checkpoint, but its config\.json says 96",
    ):
        load_pruned(str(copied), ratio=1)


def test_integer_weights_are_refused(copied):
    key = "model.layers.1.mlp.up_proj.weight"

    def to_int(tensors):
        tensors[key] = tensors[key].to(torch.int8)

    edit_weights(copied, to_int)
    with pytest.raises(ValueError, match="stored as I8"):
        load_pruned(str(copied), ratio=1)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_quantised_checkpoints_are_refused_before_weights_are_read(copied, method):
    edit_config(copied, quantization_config={"quant_method": method, "bits": 4})
    (copied / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match=f"quant_method={method}"):
        load_pruned(str(copied), ratio=1)


@pytest.mark.parametrize(
    "arguments",
    [{"ratio": 9}, {"ratio": "x"}, {"criterion": "x"}, {"prune_percent": 100}],
)
def test_bad_arguments_are_refused_before_weights_are_read(copied, arguments):
    (copied / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}="):
        load_pruned(str(copied), **arguments)


def test_models_without_a_glu_are_refused_before_weights_are_read(tmp_path):
    checkpoints.tiny_config("gpt2").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel"):
        load_pruned(str(tmp_path), ratio=1)


def test_the_files_are_closed_after_loading(tiny_llama, monkeypatch):
    opened = []

    class Recorder:
        def __init__(self, *args, **kwargs):
            self.file = safe_open(*args, **kwargs)
            self.closed = False
            opened.append(self)

        def __enter__(self):
            return self.file.__enter__()

        def __exit__(self, *error):
            self.closed = True
            return self.file.__exit__(*error)

    monkeypatch.setattr("safetensors.safe_open", Recorder)
    load_pruned(str(tiny_llama), ratio=1)
    assert opened
    assert all(recorder.closed for recorder in opened)


@pytest.mark.parametrize("sizes", [{}, {"ratio": 1}])
def test_a_model_that_is_let_go_waits_for_no_collection(tiny_llama, sizes):
    gc.disable()
    try:
        model = load_pruned(str(tiny_llama), **sizes)
        reference = weakref.ref(model)
        del model
        assert reference() is None
    finally:
        gc.enable()


def request_for(folder, arguments=None, **prune_arguments):
    return LoadRequest.resolve(
        AutoModelForCausalLM,
        str(folder),
        PruneArguments(**prune_arguments),
        arguments or {},
    )


def test_what_cannot_be_pruned_while_it_loads_says_why(tiny_llama):
    request = request_for(tiny_llama, ratio=1)
    assert request.unreadable() is None
    gguf = dataclasses.replace(request, model_arguments={"gguf_file": "a.gguf"})
    assert gguf.unreadable() == "it is a GGUF file"
    none = dataclasses.replace(request, model_arguments={"gguf_file": None})
    assert none.unreadable() is None


def test_neurons_are_observed_where_their_scores_are_not_known(tiny_llama):
    request = request_for(tiny_llama, ratio=1)
    known = ScoreTable()
    assert not request.needs_scores(known)
    observing = request_for(tiny_llama, ratio=1, criterion="act", calibration="a")
    assert observing.needs_scores(known)
    names = [f"model.layers.{layer}.mlp" for layer in range(3)]
    known.scores = dict.fromkeys(names[:2], torch.zeros(88))
    assert observing.needs_scores(known)
    known.scores[names[2]] = torch.zeros(88)
    assert not observing.needs_scores(known)
    baseline = request_for(tiny_llama)
    assert not baseline.needs_scores(known)
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.plan = baseline.plan


def test_what_is_pruned_in_memory_may_not_be_quantised_first(tiny_llama):
    request = request_for(tiny_llama, ratio=1)
    config = {"quantization_config": {"quant_method": "torchao"}}
    for arguments, name in (
        (config, "quantization_config"),
        ({"load_in_8bit": True}, "load_in_8bit"),
        ({"load_in_4bit": True, "gguf_file": "a.gguf"}, "load_in_4bit"),
    ):
        quantising = dataclasses.replace(request, model_arguments=arguments)
        with pytest.raises(ValueError, match=f"{name} quantises .* because of me"):
            quantising.check_prunable_in_memory("of me")
    for arguments in ({}, config | {"gguf_file": "a.gguf"}):
        fine = dataclasses.replace(request, model_arguments=arguments)
        fine.check_prunable_in_memory("of me")
    baseline = request_for(tiny_llama)
    dataclasses.replace(baseline, model_arguments=config).check_prunable_in_memory(None)


def test_the_tokenizer_comes_from_where_the_model_does(tiny_llama, monkeypatch):
    request = request_for(tiny_llama, ratio=1)
    calls = []
    monkeypatch.setattr(
        "transformers.AutoTokenizer.from_pretrained",
        lambda *args, **kwargs: calls.append((args, kwargs)),
    )
    where = {
        "cache_dir": "c",
        "force_download": True,
        "local_files_only": True,
        "proxies": {"http": "p"},
        "revision": "r",
        "subfolder": "s",
        "token": "t",
        "trust_remote_code": True,
        "gguf_file": "a.gguf",
    }
    for arguments, expected in (
        ({}, {}),
        (
            {"revision": None, "dtype": torch.float16, "subfolder": ""},
            {"subfolder": ""},
        ),
        ({**where, "device_map": {"": "cpu"}}, where),
    ):
        dataclasses.replace(request, model_arguments=arguments).load_tokenizer()
        assert calls.pop() == ((str(tiny_llama),), expected)


class Loader:
    """In place of an Auto class: remembers with which arguments it was called."""

    def __init__(self, missing=()):
        self.missing = list(missing)
        self.calls = []

    def from_pretrained(self, pretrained, **arguments):
        self.calls.append((pretrained, arguments))
        if arguments.get("output_loading_info"):
            return "model", {"missing_keys": self.missing}
        return "model"


def test_a_model_is_loaded_with_the_arguments_of_the_user(tiny_llama):
    loader = Loader()
    request = dataclasses.replace(
        request_for(tiny_llama, {"dtype": torch.float16, "revision": "r"}, ratio=1),
        auto_class=loader,
    )
    assert request.load("config") == "model"
    assert loader.calls == [
        (
            str(tiny_llama),
            {
                "config": "config",
                "output_loading_info": True,
                "dtype": torch.float16,
                "revision": "r",
            },
        )
    ]


def test_a_gguf_file_is_expanded(tiny_llama):
    loader = Loader()
    request = dataclasses.replace(
        request_for(tiny_llama),
        auto_class=loader,
        model_arguments={"gguf_file": "a.gguf"},
    )
    assert request.load_whole() == "model"
    ((_, arguments),) = loader.calls
    assert arguments["gguf_file"] == "a.gguf"
    assert arguments["config"] is request.widths.original
    expanding = arguments.get("quantization_config")
    assert expanding is None or expanding.dequantize is True


def test_a_loader_that_tells_what_was_missing_is_believed(tiny_llama):
    request = dataclasses.replace(
        request_for(tiny_llama), auto_class=Loader(missing=["b", "a"])
    )
    with pytest.raises(ValueError, match="no tensor for a and 1 more"):
        request.load("config")


class OwnLoader(LlamaForCausalLM):
    """A class that reads checkpoints in a way of its own."""

    @classmethod
    def from_pretrained(cls, pretrained, *, config, **arguments):
        assert "output_loading_info" not in arguments
        model = cls(config).eval()
        model.load_state_dict(load_file(f"{pretrained}/model.safetensors"), strict=True)
        return model


class OwnAuto:
    from_pretrained = OwnLoader.from_pretrained

    @staticmethod
    def from_config(config, **arguments):
        return OwnLoader(config)


def test_a_class_with_a_loader_of_its_own_is_pruned_in_memory(tiny_llama, caplog):
    with caplog.at_level(logging.INFO, "lm_eval.pruned.loading"):
        model = load_pruned(str(tiny_llama), ratio=1, auto_class=OwnAuto)
    assert type(model) is OwnLoader
    assert_same_model(model, load_pruned(str(tiny_llama), ratio=1))
    assert "because its model class loads checkpoints in its own way" in caplog.text
    whole = load_pruned(str(tiny_llama), auto_class=OwnAuto)
    assert_same_model(whole, load_pruned(str(tiny_llama)))


def test_pruning_in_memory_is_told_and_loading_whole_is_not(copied, caplog):
    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    for file in copied.glob("tokenizer*"):
        file.unlink()
    with caplog.at_level(logging.INFO, "lm_eval.pruned.loading"):
        load_pruned(str(copied))
        assert not caplog.messages
        load_pruned(str(copied), ratio=1)
    (message,) = caplog.messages
    assert message == (
        f"{copied} is loaded in full and pruned in memory, because its checkpoint is not in "
        "safetensors."
    )


class TwiceItself(LlamaForCausalLM):
    """Loads another model of its class in the same call."""

    @classmethod
    def from_pretrained(cls, pretrained, **arguments):
        first = super().from_pretrained(pretrained, **arguments)
        first.second = [super().from_pretrained(pretrained)]
        return first


def test_only_the_first_model_of_a_session_is_pruned(tiny_llama):
    """A class may load another model while it is loaded."""
    mapping = {LlamaConfig: TwiceItself}
    auto = type("Auto", (AutoModelForCausalLM,), {"_model_mapping": mapping})
    first = load_pruned(str(tiny_llama), ratio=1, auto_class=auto)
    (second,) = first.second
    assert first.config.intermediate_size == 32
    assert_same_model(first, load_pruned(str(tiny_llama), ratio=1))
    assert_same_model(second, load_pruned(str(tiny_llama)))


def test_a_model_whose_weights_nobody_asked_for_is_refused(tiny_llama):
    """Of a mixture's experts a process may ask for its share; of none of them it may not."""
    request = request_for(tiny_llama, ratio=1)
    session = Session(
        request.plan, request.widths, request.widths.targets(request.plan)
    )
    session._model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    session._mlps = [SimpleNamespace(is_untouched=True)] * 2
    with pytest.raises(UnsupportedModelError, match="put no weights into the narrowed"):
        session.check_filled(session._model)
    session._mlps = [SimpleNamespace(is_untouched=untouched) for untouched in (1, 0)]
    session.check_filled(session._model)


@pytest.mark.parametrize(
    ("state_dict", "files", "why"),
    [
        ({}, ["a.safetensors"], "its weights do not come from files"),
        (None, [], "its weights do not come from files"),
        (None, None, "its weights do not come from files"),
        (None, ["a.safetensors", "b.bin"], "its checkpoint is not in safetensors"),
    ],
)
def test_checkpoints_that_are_no_safetensors_are_declined(
    tiny_llama, state_dict, files, why
):
    request = request_for(tiny_llama, ratio=1)
    session = Session(request.plan, request.widths, {})
    with pytest.raises(RouteDeclined, match=why):
        session._open_files(state_dict, files)


def test_zero3_gathers_weights_itself(tiny_llama, monkeypatch):
    request = request_for(tiny_llama, ratio=1)
    session = Session(request.plan, request.widths, {})
    monkeypatch.setattr(
        "transformers.integrations.is_deepspeed_zero3_enabled", lambda: True
    )
    with pytest.raises(RouteDeclined, match="DeepSpeed"):
        session._open_files(None, [str(tiny_llama / "model.safetensors")])


class Entry:
    """A safetensors slice of a tensor."""

    def __init__(self, tensor, dtype="F32"):
        self.tensor, self.dtype = tensor, dtype

    def get_shape(self):
        return list(self.tensor.shape)

    def get_dtype(self):
        return self.dtype

    def __getitem__(self, index):
        return self.tensor[index]


def narrowed_mlp(request, width=32, sources=None):
    """Return the entries of the first MLP of a Llama, and its state dict."""
    mlp = request.widths.mlps[0]
    targets = dict.fromkeys(request.widths.actual, width)
    session = Session(request.plan, request.widths, targets)
    glu = NarrowedMlp(session, mlp, 88, width)
    target = (torch.device("cpu"), torch.bfloat16)
    weights = {
        "down_proj": torch.randn(32, 88),
        "gate_proj": torch.randn(88, 32),
        "up_proj": torch.randn(88, 32),
    } | (sources or {})
    entries = {
        name: glu.add(name, "weight", Entry(weight), target)
        for name, weight in weights.items()
    }
    return glu, entries, weights


def test_entries_look_like_tensors_of_the_kept_width(tiny_llama):
    mlp, entries, weights = narrowed_mlp(request_for(tiny_llama, ratio=1))
    assert mlp.stored_width() == 88
    gate, down = entries["gate_proj"], entries["down_proj"]
    assert (gate.get_shape(), down.get_shape()) == ([32, 32], [32, 32])
    assert (gate.stored_shape(), down.stored_shape()) == ([88, 32], [32, 88])
    assert gate.get_dtype() == "F32"
    assert gate[...] is gate
    kept = mlp.kept()
    assert kept.dtype == torch.int64 and len(kept) == 32
    expected = weights["gate_proj"][kept].bfloat16()
    # The first reading hands out what the scoring had at hand, the next one reads anew.
    assert torch.equal(gate.to(), expected)
    assert torch.equal(gate.to(), expected)
    assert torch.equal(gate[1:3], expected[1:3])
    # The ranks of tensor parallelism ask for parts, and must not hold on to the rest.
    assert gate[1:3].untyped_storage().nbytes() == 2 * 32 * 2
    assert gate.to(dtype=torch.float64).dtype == torch.float64
    assert gate.to(device="meta").device.type == "meta"
    assert torch.equal(down[...].to(), weights["down_proj"][:, kept].bfloat16())


def test_entries_that_do_not_fit_the_others_are_named(tiny_llama):
    request = request_for(tiny_llama, ratio=1)
    name = r"model\.layers\.0\.mlp\."
    for sources, message in (
        (
            {"up_proj": torch.randn(80, 32)},
            r"up_proj.weight has shape \[80, 32\] .* says \[88, 32\]",
        ),
        (
            {"down_proj": torch.randn(80, 88)},
            r"down_proj.weight has shape \[80, 88\] .* says \[32, 88\]",
        ),
        ({"gate_proj": torch.randn(80)}, r"gate_proj.weight has shape \[80\] .* says"),
        ({"gate_proj": torch.randn(0, 32)}, r"gate_proj.weight has shape \[0, 32\] .*"),
    ):
        mlp, _, _ = narrowed_mlp(request, sources=sources)
        with pytest.raises(ValueError, match=name + message):
            mlp.stored_width()
    one = {"gate_proj": torch.randn(1, 32), "up_proj": torch.randn(1, 32)}
    mlp, _, _ = narrowed_mlp(request, sources={**one, "down_proj": torch.randn(32, 1)})
    assert mlp.stored_width() == 1


@pytest.mark.parametrize("dtype", ["I8", "BOOL", "F8_E4M3", "U16"])
def test_codes_are_no_weights(tiny_llama, dtype):
    request = request_for(tiny_llama, ratio=1)
    mlp, _, weights = narrowed_mlp(request)
    source = Entry(weights["up_proj"], dtype)
    with pytest.raises(
        ValueError, match=rf"mlp\.up_proj\.weight is stored as {dtype},"
    ):
        mlp.add("up_proj", "weight", source, None)


def test_fused_entries_are_assembled(tiny_llama):
    request = request_for(tiny_llama, ratio=1)
    mlp, entries, weights = narrowed_mlp(request)
    halves = [Region("p", half=0), Region("p", half=1)]
    pair = AssembledTensor(
        dict(zip(halves, (entries["gate_proj"], entries["up_proj"]), strict=True))
    )
    kept = mlp.kept()
    expected = torch.cat(
        [weights[name][kept].bfloat16() for name in ("gate_proj", "up_proj")]
    )
    assert pair.get_shape() == [64, 32]
    assert pair.get_dtype() == "F32"
    assert pair[...] is pair
    assert torch.equal(pair.to(), expected)
    assert torch.equal(pair[30:40], expected[30:40])
    assert pair[30:40].untyped_storage().nbytes() == 10 * 32 * 2
    assert pair.to(dtype=torch.float64).dtype == torch.float64
    assert pair.to(device="meta").device.type == "meta"


def test_a_part_of_an_entry_is_an_entry():
    tensor = torch.randn(10, 4)
    part = RegionOfSource(Region("p", half=1), Entry(tensor, "F16"))
    assert part.get_shape() == [5, 4]
    assert part.get_dtype() == "F16"
    assert torch.equal(part[...], tensor[5:])
    assert part[...].is_contiguous()
    assert torch.equal(part[1:3], tensor[6:8])
    # A damaged entry has no such part; its whole shape is what the message shows.
    broken = RegionOfSource(Region("p", expert=3), Entry(torch.randn(2, 4)))
    assert broken.get_shape() == [2, 4]


def converter(sources, targets, *operations):
    return types.SimpleNamespace(
        source_patterns=sources, target_patterns=targets, operations=operations
    )


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "phi3"])
def test_what_was_merged_is_saved_as_it_was_stored(family, tmp_path, monkeypatch):
    layouts.save_family(tmp_path / "source", family, 16)
    merge = Session.merge
    entries = []

    def watched(self, *args):
        entries.append(merge(self, *args))
        return entries[-1]

    monkeypatch.setattr(Session, "merge", watched)
    model = load_pruned(str(tmp_path / "source"), intermediate_size=8)
    stored = {}
    for name in ("source", "saved"):
        if name == "saved":
            model.save_pretrained(tmp_path / name)
        with safe_open(tmp_path / name / "model.safetensors", "pt") as file:
            stored[name] = set(file.keys())
    assert stored["source"] == stored["saved"]
    # transformers saw no expert, but for models without any.
    assert (entries[0].keys() == stored["source"]) == (family == "phi3")
    again = load_pruned(str(tmp_path / "saved"))
    assert_same_model(again, model)


class MergeModulelist:
    def __init__(self, dim=0):
        self.dim = dim


class Concatenate(MergeModulelist):
    pass


class Transpose(MergeModulelist):
    pass


def test_experts_stored_one_by_one_are_told_apart():
    merge = converter(["w1", "w3"], ["both"], MergeModulelist(), Concatenate(1))
    places = [
        (f"mlp{expert}", (projection, "weight"), Region("p", expert, half))
        for half, projection in enumerate(("gate_proj", "up_proj"))
        for expert in (1, 0)
    ]
    keys = ["experts.0.w3", "experts.1.w3"]
    assert _converted_sources("p", "w3", keys, merge, places) == {
        key: [(f"mlp{i}", ("up_proj", "weight"), Region("p", i, 1), None)]
        for i, key in enumerate(keys)
    }
    first = _converted_sources("p", "w1", ["a", "b"], merge, places)
    assert first["b"] == [("mlp1", ("gate_proj", "weight"), Region("p", 1, 0), None)]

    single = converter(["w2"], ["down"], MergeModulelist())
    downs = [(f"mlp{i}", ("down_proj", "weight"), Region("p", i)) for i in (0, 1)]
    assert _converted_sources("p", "w2", ["a", "b"], single, downs) == {
        key: [(f"mlp{i}", ("down_proj", "weight"), Region("p", i), None)]
        for i, key in enumerate("ab")
    }

    fuse = converter(["gate", "up"], ["both"], Concatenate(0))
    halves = [("mlp", (n, "weight"), Region("p", half=i)) for i, n in enumerate("gu")]
    assert _converted_sources("p", "up", ["k"], fuse, halves) == {
        "k": [("mlp", ("u", "weight"), Region("p", half=1), None)]
    }


_EXPERT_HALVES = [("m", "x", Region("p", i, half)) for i in (0, 1) for half in (0, 1)]
_EXPERT_DOWNS = [("m", "x", Region("p", i)) for i in (0, 1)]
_HALVES = [("m", "x", Region("p", half=i)) for i in (0, 1)]


@pytest.mark.parametrize(
    ("conversion", "keys", "places"),
    [
        (converter(["a"], ["x", "y"], MergeModulelist()), 2, _EXPERT_DOWNS),
        (converter(["a"], ["x"], MergeModulelist(1)), 2, _EXPERT_DOWNS),
        (converter(["a"], ["x"], MergeModulelist(), Transpose(1)), 2, _EXPERT_DOWNS),
        (converter(["a"], ["x"], MergeModulelist()), 1, _EXPERT_DOWNS),
        (converter(["a"], ["x"], MergeModulelist()), 2, _EXPERT_HALVES),
        (converter(["a"], ["x"]), 2, _EXPERT_DOWNS),
        (
            converter(["a", "b"], ["x"], MergeModulelist(), Concatenate(0)),
            2,
            _EXPERT_HALVES,
        ),
        (converter(["a", "b"], ["x"], Concatenate(1)), 1, _HALVES),
        (converter(["a", "b"], ["x"], Transpose(0)), 1, _HALVES),
        (converter(["a", "b"], ["x"], Concatenate(0)), 2, _HALVES),
        (converter(["a", "b"], ["x"], MergeModulelist(), Concatenate(1)), 1, _HALVES),
        (
            converter(["a", "b"], ["x"], Concatenate(0)),
            1,
            [("m", "x", Region("p", half=i, interleaved=True)) for i in (0, 1)],
        ),
        (
            converter(["a", "b"], ["x"], Concatenate(0)),
            1,
            [("m", "x", Region("p", half=i, transposed=True)) for i in (0, 1)],
        ),
        (converter(["a"], ["x"], MergeModulelist()), 2, []),
    ],
)
def test_other_ways_of_computing_a_weight_are_declined(conversion, keys, places):
    with pytest.raises(RouteDeclined, match="computes p from other tensors"):
        _converted_sources("p", "a", list("kl")[:keys], conversion, places)


def test_quantised_checkpoints_are_told_by_their_config():
    def refuse(quantisation, **arguments):
        _refuse_quantised(
            types.SimpleNamespace(quantization_config=quantisation), arguments
        )

    refuse(None)
    refuse({"quant_method": "gguf"}, gguf_file="a.gguf")
    _refuse_quantised(types.SimpleNamespace(), {})
    method = types.SimpleNamespace(value="awq")
    as_object = types.SimpleNamespace(to_dict=lambda: {"quant_method": method})
    for quantisation, said in (
        ({"quant_method": "gptq"}, "gptq"),
        (as_object, "awq"),
        ({}, "unknown"),
    ):
        for arguments in ({}, {"gguf_file": None}):
            with pytest.raises(UnsupportedModelError, match=f"quant_method={said}."):
                refuse(quantisation, **arguments)


def test_arguments_are_for_the_config_or_for_the_model(tiny_llama):
    arguments = {
        "dtype": torch.float16,
        "quantization_config": None,
        "rms_norm_eps": 0.5,
        "revision": "main",
        "trust_remote_code": False,
        "attn_implementation": "eager",
        "low_cpu_mem_usage": True,
    }
    config, rest = _resolve_config(str(tiny_llama), dict(arguments))
    assert config.rms_norm_eps == 0.5
    assert config.dtype == torch.float32, "what the checkpoint says"
    for name in ("dtype", "quantization_config", "revision", "trust_remote_code"):
        assert rest[name] is arguments[name]
    assert "rms_norm_eps" not in rest
    assert rest["low_cpu_mem_usage"] is True


def test_what_is_about_to_be_loaded_can_be_inspected(copied):
    def inspected(folder, **prune_arguments):
        seen = []
        model = loading.load_with_arguments(
            AutoModelForCausalLM,
            str(folder),
            PruneArguments(**prune_arguments),
            {},
            inspect=seen.append,
        )
        return seen, model

    (request,), model = inspected(copied, ratio=1)
    assert request.plan == model.prune_record.plan
    ragged = copied.parent / "ragged"
    load_pruned(str(copied), ratio=1, layers=1).save_pretrained(ragged)
    (only,), _ = inspected(ragged, ratio=2)
    assert sorted(only.widths.actual.values()) == [32, 88, 88]
    config = json.loads((ragged / "config.json").read_text())
    del config["per_layer_config"]
    (ragged / "config.json").write_text(json.dumps(config))
    (first, second), _ = inspected(ragged, ratio=2)
    assert set(first.widths.actual.values()) == {88}
    assert sorted(second.widths.actual.values()) == [32, 88, 88]
    (ragged / "model.safetensors").unlink()

    def refuse(request):
        raise KeyError("before weights are read")

    with pytest.raises(KeyError, match="before"):
        loading.load_with_arguments(
            AutoModelForCausalLM, str(ragged), PruneArguments(), {}, inspect=refuse
        )


def test_an_unpruned_load_is_left_to_transformers(tiny_llama, monkeypatch):
    calls = []
    original = PreTrainedModel._load_pretrained_model

    def recorded(model, state_dict, checkpoint_files, *args, **kwargs):
        calls.append((state_dict, checkpoint_files))
        return original(model, state_dict, checkpoint_files, *args, **kwargs)

    monkeypatch.setattr(
        PreTrainedModel, "_load_pretrained_model", staticmethod(recorded)
    )
    load_pruned(str(tiny_llama))
    load_pruned(str(tiny_llama), ratio="2.75")
    for state_dict, files in calls:
        assert state_dict is None
        assert files == [str(tiny_llama / "model.safetensors")]
    calls.clear()
    load_pruned(str(tiny_llama), ratio=1)
    ((state_dict, files),) = calls
    assert files is None, "offloading writes the narrowed weights"
    assert len(state_dict) == len(load_file(tiny_llama / "model.safetensors"))


def test_a_config_that_no_model_has_is_refused(copied):
    edit_config(copied, num_hidden_layers=10**12)
    with pytest.raises(
        ValueError, match="num_hidden_layers=1000000000000, which no mo"
    ):
        load_pruned(str(copied), ratio=1)
    (copied / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="describes no model that can be built"):
        load_pruned(str(copied), ratio=1)


def test_counts_that_a_model_has_are_not_absurd(tmp_path):
    """Dense Doge carries the number of experts of its sparse siblings."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_key_value_heads": 4}
    dense = checkpoints.save_tiny(tmp_path / "dense", "doge", **sizes)
    edit_config(dense, num_experts=16384, num_cdmoe_experts=16348)
    model = load_pruned(str(dense), ratio=1)
    whole = AutoModelForCausalLM.from_pretrained(dense)
    assert_same_model(model, prune_model(whole, ratio=1))
    edit_config(dense, is_moe=True)
    with pytest.raises(
        UnsupportedModelError, match=r"down_embed.* inside its MLP: a neuron of it is"
    ):
        load_pruned(str(dense), ratio=1)
    edit_config(dense, num_experts=16385)
    with pytest.raises(ValueError, match=r"=16385, which no model has: .* most 16384"):
        load_pruned(str(dense), ratio=1)
    edit_config(dense, num_experts=4, num_hidden_layers=4097)
    with pytest.raises(ValueError, match=r"=4097, which no model has: .* most 4096"):
        load_pruned(str(dense), ratio=1)


def test_no_class_is_refused_with_its_own_defaults():
    refused = []
    for model_type, config_class in CONFIG_MAPPING.items():
        try:
            config = config_class()
        except Exception:  # noqa: BLE001, S112 - not every class has defaults
            continue
        try:
            check_counts(config.to_dict(), model_type)
        except ValueError as error:
            refused.append(str(error))
    assert not refused


def test_biases_are_no_part_of_the_ranking(tmp_path):
    folder = checkpoints.save_tiny(tmp_path / "tiny", mlp_bias=True)
    expected = load_pruned(str(folder), ratio=1).prune_record.digest
    gate, down = (f"model.layers.1.mlp.{name}_proj.bias" for name in ("gate", "down"))

    def spoil(tensors):
        tensors[gate][5:80] = float("nan")
        tensors[down][3] = float("inf")

    edit_weights(folder, spoil)
    loaded = load_pruned(str(folder), ratio=1)
    assert loaded.prune_record.digest == expected
    assert loaded.get_parameter(gate).isnan().any()


def test_down_is_looked_through_once(tiny_llama, monkeypatch):
    checked = []
    monkeypatch.setattr(
        narrowed,
        "check_finite",
        lambda name, *args, check=narrowed.check_finite: (
            checked.append(name),
            check(name, *args),
        ),
    )
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(3)]
    known_scores = {}
    for ratio in (1, 2):
        loading.load_with_arguments(
            AutoModelForCausalLM,
            str(tiny_llama),
            PruneArguments(ratio=ratio),
            {},
            known_scores=known_scores,
        )
        assert sorted(checked) == names


@pytest.mark.parametrize("layers", [1, 2])
def test_a_config_that_lies_about_a_small_model_is_caught(tmp_path, layers):
    folder = checkpoints.save_tiny(tmp_path / "tiny", num_hidden_layers=layers)
    edit_config(folder, intermediate_size=96)
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp has 88 .* says 96: correct in"
    ):
        load_pruned(str(folder))


def test_the_key_of_the_first_lie_is_named(tmp_path):
    sizes = {**layouts.overrides("qwen3_moe", 16), "intermediate_size": 16}
    folder = checkpoints.save_tiny(tmp_path / "tiny", "qwen3_moe", **sizes)
    edit_config(folder, intermediate_size=20, moe_intermediate_size=24)
    with pytest.raises(
        ValueError, match=r"0\.mlp has 16 .* 20: correct intermediate_size"
    ):
        load_pruned(str(folder))


def test_a_stack_of_one_expert_is_a_stack(tmp_path):
    sizes = layouts.overrides("gpt_oss", 16)
    sizes |= {"num_local_experts": 1, "num_experts_per_tok": 1}
    folder = checkpoints.save_tiny(tmp_path / "tiny", "gpt_oss", **sizes)
    arguments = {"prune_percent": 50}
    full = AutoModelForCausalLM.from_pretrained(folder, **layouts.EAGER)
    loaded = load_pruned(str(folder), **arguments, **layouts.EAGER)
    assert_same_model(loaded, prune_model(full, **arguments))


def test_widths_that_change_while_they_are_read_are_told(copied):
    """The first pass found widths that the second one does not."""
    load_pruned(str(copied), ratio=1, layers=1).save_pretrained(copied)
    names = [f"model.layers.{layer}.mlp" for layer in range(3)]
    found = dict(zip(names, (40, 88, 88), strict=True))
    request = request_for(copied, intermediate_size=40).with_widths(found)
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp has 88 .* says 40: correct in"
    ):
        loading._load(request, None, None)


def test_layers_that_keep_their_width_are_not_scored(tmp_path):
    folder = checkpoints.save_tiny(tmp_path / "tiny", intermediate_size=300)
    key = "model.layers.2.mlp.gate_proj.weight"
    edit_weights(folder, lambda tensors: tensors[key][7].fill_(float("nan")))
    model = load_pruned(str(folder), ratio=1, layers="0-1")
    assert [len(kept) for kept in model.prune_record.kept] == [32, 32, 300]
    assert model.get_parameter(key)[7].isnan().all()
    with pytest.raises(ValueError, match=f"{re.escape(key)} holds 32 NaN"):
        load_pruned(str(folder), ratio=1)


@pytest.mark.parametrize("error", [RuntimeError, KeyError])
def test_errors_while_loading_do_not_lead_to_another_way_of_loading(
    tiny_llama, monkeypatch, error
):
    def fail(*args, **kwargs):
        raise error("out of order")

    monkeypatch.setattr(narrowed, "score", fail)
    with pytest.raises(
        ValueError, match=f"cannot be loaded .{error.__name__}: .*order"
    ):
        load_pruned(str(tiny_llama), ratio=1)


def test_errors_before_the_checkpoint_is_opened_are_told(tiny_llama):
    class Broken(OwnAuto):
        @staticmethod
        def from_pretrained(*args, **kwargs):
            raise KeyError("out of order")

    with pytest.raises(ValueError, match=r"cannot be loaded .KeyError: .*order"):
        load_pruned(str(tiny_llama), ratio=1, auto_class=Broken)


def test_shapes_may_differ_outside_of_the_mlps_on_request(copied):
    def cut(tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:200].clone()

    edit_weights(copied, cut)
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape \[200, 32\]"):
        load_pruned(str(copied), ratio=1)
    loaded = load_pruned(str(copied), ratio=1, ignore_mismatched_sizes=True)
    assert loaded.lm_head.weight.shape == (260, 32)


@pytest.mark.parametrize("sizes", [{}, {"ratio": 1}])
def test_shapes_may_not_differ_inside_of_the_mlps(copied, sizes):
    """Neither in safetensors nor in files that are loaded in full."""
    edit_config(copied, intermediate_size=80)
    more = {"ignore_mismatched_sizes": True, **sizes}
    with pytest.raises(ValueError, match=r"88 neurons .* config.json says 80"):
        load_pruned(str(copied), **more)
    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    with pytest.raises(
        ValueError,
        match=r"layers\.0\.mlp\.down_proj\.weight has shape \[32, 88\] in the checkpoint, but "
        r"its config\.json says \[32, 80\]: correct the width there",
    ):
        load_pruned(str(copied), **more)
    edit_config(copied, intermediate_size=88, vocab_size=300)
    assert load_pruned(str(copied), **more).lm_head.weight.shape == (300, 32)


def test_options_are_passed_by_name(tiny_llama):
    with pytest.raises(TypeError, match="positional"):
        load_pruned(str(tiny_llama), 1)
    model = load_pruned(ratio=1, pretrained=str(tiny_llama))
    assert model.config.intermediate_size == 32
    arguments = {
        "auto_class": AutoModelForCausalLM,
        "pretrained": str(tiny_llama),
        "prune_arguments": PruneArguments(ratio=1),
        "from_pretrained": {},
    }
    with pytest.raises(TypeError, match="positional"):
        loading.load_with_arguments(*arguments.values(), None)
    assert_same_model(model, loading.load_with_arguments(**arguments))


def test_widths_of_their_own_are_told(copied, caplog):
    load_pruned(str(copied), ratio=1, layers=1).save_pretrained(copied)
    with caplog.at_level(logging.INFO, "lm_eval.pruned.loading"):
        load_pruned(str(copied), ratio=2)
    assert (
        f"The layers of {copied} have widths of their own: its config has from 32 to 88 "
        "neurons."
    ) in caplog.messages


@pytest.mark.parametrize("text", ["off", "false", ""])
def test_text_does_not_let_remote_code_run(tiny_llama, text):
    with pytest.raises(ValueError, match=f"trust_remote_code='{text}' is not"):
        load_pruned(str(tiny_llama), ratio=2, trust_remote_code=text)


@pytest.mark.parametrize("trusted", [False, None])
def test_code_that_is_not_remote_needs_no_trust(tiny_llama, trusted):
    model = load_pruned(str(tiny_llama), ratio=2, trust_remote_code=trusted)
    assert_same_model(model, load_pruned(str(tiny_llama), ratio=2))


def test_a_gate_of_three_axes_is_named_and_not_its_neighbour(copied):
    key = "model.layers.1.mlp.gate_proj.weight"
    edit_weights(copied, lambda tensors: tensors.update({key: torch.randn(5, 32, 1)}))
    for more in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(
            ValueError, match=rf"^{re.escape(key)} has shape \[5, 32, 1\]"
        ):
            load_pruned(str(copied), ratio=1, **more)


def test_what_the_hub_holds_is_known_by_name_and_commit(tiny_llama):
    request = dataclasses.replace(request_for(tiny_llama, ratio=1), pretrained="org/a")
    assert request.scores_key() is None
    request.widths.original._commit_hash = "1" * 40
    other = dataclasses.replace(request, pretrained="org/b")
    assert request.scores_key() not in (None, other.scores_key())


def test_what_the_class_lets_be_missing_or_superfluous_is_no_damage(
    copied, monkeypatch
):
    def edit(tensors):
        tensors["model.extra"] = tensors.pop("model.norm.weight")

    edit_weights(copied, edit)
    with pytest.raises(ValueError, match=r"model\.(norm\.weight|extra)"):
        load_pruned(str(copied), ratio=1)
    for list_of, name in (("missing", "norm"), ("unexpected", "extra")):
        name = f"_keys_to_ignore_on_load_{list_of}", [rf"model\.{name}"]
        monkeypatch.setattr(LlamaForCausalLM, *name, raising=False)
    load_pruned(str(copied), ratio=1)
