"""What transformers keeps private: used as it does itself, and not at all once it changes."""

from __future__ import annotations

import inspect
import logging
import shutil
import types

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    modeling_utils,
)
from transformers.core_model_loading import WeightRenaming
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.checkpoints import transformers_api
from lm_eval_pruned.checkpoints.export import export_pruned
from lm_eval_pruned.checkpoints.request import LoadRequest
from lm_eval_pruned.pruning.arguments import PruneArguments
from lm_eval_pruned.pruning.layouts import UnsupportedModelError
from tests.helpers import checkpoints
from tests.helpers.comparing import assert_same_model


LOADER = "_load_pretrained_model"
ORIGINAL = vars(PreTrainedModel)[LOADER]


class Untouched:
    """Stands in for a checkpoint, and leaves it as it is."""

    def __init__(self):
        self.seen = []

    def provide(self, model, state_dict, checkpoint_files, load_config):
        self.seen.append((model, load_config))
        return state_dict, checkpoint_files


def renamed(monkeypatch):
    """Transformers calls its loader by another name."""
    source = modeling_utils.PreTrainedModel.from_pretrained.__func__
    code = source.__code__
    names = tuple("_fill" if name == LOADER else name for name in code.co_names)
    assert names != code.co_names
    other = types.FunctionType(
        code.replace(co_names=names),
        source.__globals__,
        source.__name__,
        source.__defaults__,
        source.__closure__,
    )
    other.__kwdefaults__ = source.__kwdefaults__
    monkeypatch.setattr(PreTrainedModel, "_fill", ORIGINAL, raising=False)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(other))
    monkeypatch.delattr(PreTrainedModel, LOADER)


def made_a_class_method(monkeypatch):
    def load(cls, *args, **kwargs):
        return ORIGINAL.__func__(*args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, LOADER, classmethod(load))


def made_a_method(monkeypatch):
    def load(self, state_dict, checkpoint_files, load_config, expected_keys=None):
        return ORIGINAL.__func__(
            self, state_dict, checkpoint_files, load_config, expected_keys
        )

    # As transformers would call it from its class method.
    monkeypatch.setattr(PreTrainedModel, LOADER, load)


def in_another_order(monkeypatch):
    def load(model, checkpoint_files, state_dict, load_config):
        # transformers' own caller passes the old order.
        return ORIGINAL.__func__(model, checkpoint_files, state_dict, load_config)

    monkeypatch.setattr(PreTrainedModel, LOADER, staticmethod(load))


def with_one_more(monkeypatch):
    def load(model, state_dict, checkpoint_files, load_config, adapter=None, *, more):
        raise AssertionError

    def through(*args):
        return ORIGINAL.__func__(*args)

    through.__signature__ = inspect.signature(load)
    monkeypatch.setattr(PreTrainedModel, LOADER, staticmethod(through))


def without_settings(monkeypatch):
    monkeypatch.setattr(
        transformers_api, "_SETTINGS", (*transformers_api._SETTINGS, "a_new_one")
    )


def without_a_function(monkeypatch):
    monkeypatch.setattr(
        transformers_api,
        "_USED",
        (*transformers_api._USED, ("core_model_loading", "gone", ())),
    )


def without_a_module(monkeypatch):
    monkeypatch.setattr(transformers_api, "_USED", (("gone", "dot_natural_key", ()),))


def with_other_parameters(monkeypatch):
    def rename_source_key(key, transforms):
        raise AssertionError

    # transformers itself fetched its own when it was imported.
    used = ("core_model_loading", "renamed_key", ("source_key", "weight_renamings"))
    monkeypatch.setattr(
        "transformers.core_model_loading.renamed_key", rename_source_key, raising=False
    )
    monkeypatch.setattr(transformers_api, "_USED", (used,))


CHANGES = [
    renamed,
    made_a_class_method,
    made_a_method,
    in_another_order,
    with_one_more,
    without_settings,
    without_a_function,
    without_a_module,
    with_other_parameters,
]


def test_the_installed_release_is_known():
    assert transformers_api.unknown_loader() is None


@pytest.mark.parametrize("change", CHANGES)
def test_a_release_that_loads_otherwise_is_pruned_in_memory(
    tiny_llama, monkeypatch, caplog, change
):
    expected = load_pruned(str(tiny_llama), ratio=1)
    baseline = load_pruned(str(tiny_llama))
    change(monkeypatch)
    with caplog.at_level(logging.INFO, "lm_eval.pruned"):
        assert_same_model(load_pruned(str(tiny_llama)), baseline)
        assert not caplog.messages
        model = load_pruned(str(tiny_llama), ratio=1)
    assert_same_model(model, expected)
    assert model.prune_record.digest == expected.prune_record.digest
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        f"{tiny_llama} is loaded in full and pruned in memory, because transformers "
        f"{transformers.__version__} loads checkpoints in a way not known here."
    )


@pytest.mark.parametrize("change", [renamed, made_a_class_method])
def test_a_release_that_loads_otherwise_is_exported_from_memory(
    tiny_llama, tmp_path, monkeypatch, caplog, change
):
    expected = load_pruned(str(tiny_llama), ratio=1)
    change(monkeypatch)
    export = export_pruned(
        str(tiny_llama), tmp_path / "out", prune_arguments={"ratio": 1}
    )
    assert not export.streamed
    assert caplog.text.count("in a way not known here") == 1
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_model(opened, expected)


def test_what_must_be_narrow_while_it_loads_is_refused_where_it_cannot_be(
    tiny_llama, monkeypatch
):
    made_a_class_method(monkeypatch)
    with pytest.raises(ValueError, match=r"load_in_8bit .* in a way not known here"):
        load_pruned(str(tiny_llama), ratio=1, load_in_8bit=True)


class PastTheSession(LlamaForCausalLM):
    """Fills itself; shapes that do not fit are drawn at random if it is told so."""

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs):
        return ORIGINAL.__func__(model, state_dict, checkpoint_files, *args, **kwargs)


class PastEverything(LlamaForCausalLM):
    """Has a loader of its own, which takes what fits."""

    @classmethod
    def from_pretrained(cls, pretrained, *, config, ignore_mismatched_sizes=False, **_):
        model = cls(config).eval()
        stored = load_file(f"{pretrained}/model.safetensors")
        if ignore_mismatched_sizes:
            own = model.state_dict()
            stored = {k: v for k, v in stored.items() if v.shape == own[k].shape}
        model.load_state_dict(stored, strict=not ignore_mismatched_sizes)
        return model


class FromAnother(LlamaForCausalLM):
    """Loads another model of its kind first."""

    @classmethod
    def from_pretrained(cls, pretrained, *, config, **arguments):
        LlamaForCausalLM.from_pretrained(pretrained)
        return super().from_pretrained(pretrained, config=config, **arguments)


def auto(model_class):
    return type(
        "Auto", (_BaseAutoModelClass,), {"_model_mapping": {LlamaConfig: model_class}}
    )


@pytest.mark.parametrize("model_class", [PastTheSession, PastEverything])
def test_mlps_are_never_drawn_at_random(tiny_llama, tmp_path, caplog, model_class):
    arguments = {"auto_class": auto(model_class), "ratio": 1}
    with pytest.raises(
        UnsupportedModelError,
        match=rf"^{model_class.__name__} .* in its own way.*: leave out "
        r"ignore_mismatched_sizes, or load it in full and pass it to prune_model\.$",
    ):
        load_pruned(str(tiny_llama), ignore_mismatched_sizes=True, **arguments)
    expected = load_pruned(str(tiny_llama), ratio=1)
    # Both ways that the message names.
    model = load_pruned(str(tiny_llama), **arguments)
    assert_same_model(model, expected)
    assert model.prune_record.digest == expected.prune_record.digest
    assert "its model class loads checkpoints in its own way" in caplog.text
    whole = load_pruned(
        str(tiny_llama), ignore_mismatched_sizes=True, auto_class=auto(model_class)
    )
    assert_same_model(prune_model(whole, ratio=1), expected)


def test_a_loader_that_asks_for_nothing_is_noticed(tiny_llama):
    class AsksForNothing(LlamaForCausalLM):
        @classmethod
        def from_pretrained(cls, pretrained, *, config, **_):
            model = cls(config).eval()
            settings = modeling_utils.LoadStateDictConfig()
            cls._load_pretrained_model(
                model, None, [f"{pretrained}/model.safetensors"], settings
            )
            fresh = cls(config).eval()
            return fresh

    with pytest.raises(UnsupportedModelError, match="put no weights into the narrowed"):
        load_pruned(str(tiny_llama), ratio=1, auto_class=auto(AsksForNothing))


def test_another_model_may_be_loaded_first(tiny_llama):
    model = load_pruned(str(tiny_llama), ratio=1, auto_class=auto(FromAnother))
    assert type(model) is FromAnother
    assert_same_model(model, load_pruned(str(tiny_llama), ratio=1))


def test_a_record_of_pruning_says_what_was_kept(tiny_llama):
    record = load_pruned(str(tiny_llama), ratio=1).prune_record
    with pytest.raises(ValueError, match="kept neurons of 3 MLPs, not of 0"):
        type(record).of(
            record.plan,
            LoadRequest.resolve(
                AutoModelForCausalLM, str(tiny_llama), PruneArguments(ratio=1), {}
            ).widths,
            2,
            1,
            (),
        )


class AsksInTheMiddle(LlamaForCausalLM):
    """Looks while it is filled what other loads would meet, and loads its like."""

    @classmethod
    def _finalize_model_loading(cls, model, *args):
        assert vars(PreTrainedModel)[LOADER] is ORIGINAL
        assert type(model) is AsksInTheMiddle
        if "like" not in vars(AsksInTheMiddle):
            AsksInTheMiddle.like = None
            AsksInTheMiddle.like = AsksInTheMiddle.from_pretrained(model.name_or_path)
        return super()._finalize_model_loading(model, *args)


def test_no_other_load_takes_notice(tiny_llama):
    expected = load_pruned(str(tiny_llama), ratio=1)
    model = load_pruned(str(tiny_llama), ratio=1, auto_class=auto(AsksInTheMiddle))
    assert type(model) is type(AsksInTheMiddle.like) is AsksInTheMiddle
    assert_same_model(model, expected)
    assert_same_model(
        AsksInTheMiddle.like, AutoModelForCausalLM.from_pretrained(tiny_llama)
    )


def test_the_class_that_asks_goes_by_the_names_of_its_model(tiny_llama):
    config = AutoConfig.from_pretrained(tiny_llama)
    checkpoint = Untouched()
    chosen = transformers_api.reading(
        checkpoint, AutoModelForCausalLM, LlamaForCausalLM, config
    )
    assert chosen is not AutoModelForCausalLM
    asking = chosen._model_mapping[LlamaConfig]
    for made, base in ((chosen, AutoModelForCausalLM), (asking, LlamaForCausalLM)):
        assert repr(made) == repr(base)
        assert made.__name__ == base.__name__
    model = chosen.from_pretrained(tiny_llama, config=config)
    assert type(model) is LlamaForCausalLM
    assert [type(seen) for seen, _ in checkpoint.seen] == [LlamaForCausalLM]
    assert_same_model(model, AutoModelForCausalLM.from_pretrained(tiny_llama))
    # Others are as they were.
    AutoModelForCausalLM.from_pretrained(tiny_llama)
    chosen.from_config(config)
    assert len(checkpoint.seen) == 1


def test_a_class_that_is_no_auto_class_is_left_alone(tiny_llama):
    config = AutoConfig.from_pretrained(tiny_llama)
    for auto_class in (object(), LlamaForCausalLM):
        assert auto_class is transformers_api.reading(
            Untouched(), auto_class, LlamaForCausalLM, config
        )


def test_what_others_put_in_its_place_is_called(tiny_llama, monkeypatch):
    calls = []
    expected = load_pruned(str(tiny_llama), ratio=1)

    def theirs(model, state_dict, checkpoint_files, load_config, *args):
        calls.append(type(model))
        return ORIGINAL.__func__(
            model, state_dict, checkpoint_files, load_config, *args
        )

    monkeypatch.setattr(PreTrainedModel, LOADER, staticmethod(theirs))
    assert_same_model(load_pruned(str(tiny_llama), ratio=1), expected)
    assert calls == [LlamaForCausalLM]
    assert PreTrainedModel._load_pretrained_model is theirs


def test_a_model_of_remote_code_is_pruned_while_it_loads(tiny_llama, tmp_path, caplog):
    folder = tmp_path / "remote"
    shutil.copytree(tiny_llama, folder)
    (folder / "modeling_theirs.py").write_text(
        "from transformers import LlamaForCausalLM\n"
        "class Theirs(LlamaForCausalLM):\n    pass\n"
    )
    checkpoints.edit_config(
        folder, auto_map={"AutoModelForCausalLM": "modeling_theirs.Theirs"}
    )
    model = load_pruned(str(folder), ratio=1, trust_remote_code=True)
    assert type(model).__name__ == "Theirs"
    assert type(model).__module__.startswith("transformers_modules.")
    assert "in full" not in caplog.text
    assert_same_model(model, load_pruned(str(tiny_llama), ratio=1))


def test_a_model_of_text_with_the_config_of_more_is_pruned_while_it_loads(
    tmp_path, caplog
):
    """Its class is handed the part of the config that is of text."""
    text = {
        **checkpoints.tiny_config("qwen3_5_text", head_dim=8).to_dict(),
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    config = CONFIG_MAPPING["qwen3_5"](text_config=text)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(whole.config) is not type(config)
    model = load_pruned(str(tmp_path), ratio=1)
    assert "in full" not in caplog.text
    assert_same_model(model, prune_model(whole, ratio=1))


def test_keys_are_renamed_unless_the_model_has_them_as_they_are(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    renaming = WeightRenaming(source_patterns="norm", target_patterns="scale")
    config = types.SimpleNamespace(weight_mapping=[renaming])
    names = transformers_api.target_names(
        ["model.norm.weight", "last_norm"], model, config
    )
    assert names == {
        "model.norm.weight": ("model.norm.weight", None, None),
        "last_norm": ("last_scale", None, None),
    }
    plain = types.SimpleNamespace(weight_mapping=None)
    names = transformers_api.target_names(["norm.weight", "last_norm"], model, plain)
    assert names == {
        "norm.weight": ("model.norm.weight", None, None),
        "last_norm": ("last_norm", None, None),
    }


@pytest.mark.parametrize("remember", [False, True])
def test_looking_a_name_up_leaves_no_trace_unless_it_shall(tiny_llama, remember):
    """`save_pretrained` reverts the renamings that remember to have been used."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    renaming = WeightRenaming(source_patterns="norm", target_patterns="scale")
    config = types.SimpleNamespace(weight_mapping=[renaming])
    transformers_api.target_names(["last_norm"], model, config, remember)
    assert renaming.was_used() == remember


def test_a_loader_that_passes_on_what_it_does_not_name_is_known(monkeypatch):
    def load(model, *args, **kwargs):
        return ORIGINAL.__func__(model, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, LOADER, staticmethod(load))
    assert transformers_api.unknown_loader() is None


def test_keys_are_sorted_by_number():
    assert transformers_api.in_order(["a.10", "a.9", "a.1"]) == ["a.1", "a.9", "a.10"]


def test_weights_go_where_transformers_puts_them():
    model = torch.nn.Module()
    model.down = torch.nn.Linear(2, 2, dtype=torch.float16)
    model.kept = torch.nn.Linear(2, 2, dtype=torch.float64)

    def placement(device_map=None, plan=None, quantiser=None, dtype=torch.float16):
        config = modeling_utils.LoadStateDictConfig(
            device_map=device_map, dtype=dtype, dtype_plan=plan, hf_quantizer=quantiser
        )
        return transformers_api.Placement(config, model)

    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert placement().device("down.weight") == cpu
    split = {"down": "meta", "kept": "disk"}
    assert placement(split).device("down.weight") == meta
    assert placement(split).device("kept.bias") == cpu
    assert placement().dtype("down.weight") == torch.float16
    assert placement().dtype("elsewhere") == torch.float16
    assert placement().dtype("kept.weight") == torch.float64
    plan = {"down": torch.float32, "kept*bias": torch.bfloat16}
    assert placement(plan=plan).dtype("down.weight") == torch.float32
    assert placement(plan=plan).dtype("kept.weight") == torch.float64
    assert placement(plan=plan).dtype("kept.bias") == torch.bfloat16
    for pre_quantized, needs, expected in (
        (False, True, torch.float16),
        (False, False, torch.float64),
        (True, True, torch.float64),
    ):
        quantiser = types.SimpleNamespace(
            pre_quantized=pre_quantized,
            param_needs_quantization=lambda m, name, needs=needs: needs and m is model,
        )
        assert placement(quantiser=quantiser).dtype("kept.weight") == expected
    assert placement(plan=plan, dtype=None).dtype("down.weight") is None
    assert placement(dtype=None).dtype("kept.weight") is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_ranked_as_stored_whatever_their_class_builds(tmp_path, dtype):
    class BuildsItsMlpsItself(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            for layer in self.model.layers:
                layer.mlp.to(dtype)

    folder = checkpoints.save_tiny(tmp_path)

    def round_to_ones(tensors):
        for name, tensor in tensors.items():
            if "gate_proj" in name or "up_proj" in name:
                tensor.mul_(1e-4).add_(1)

    checkpoints.edit_weights(folder, round_to_ones)
    expected = prune_model(LlamaForCausalLM.from_pretrained(folder), ratio=1)
    for layer in expected.model.layers:
        layer.mlp.to(dtype)
    loaded = load_pruned(str(folder), ratio=1, auto_class=auto(BuildsItsMlpsItself))
    assert_same_model(loaded, expected)
    assert loaded.prune_record.digest == expected.prune_record.digest
    rounded = prune_model(BuildsItsMlpsItself.from_pretrained(folder), ratio=1)
    assert loaded.prune_record.digest != rounded.prune_record.digest
