"""What a load or an export holds in memory at most, in bytes counted as they are allocated."""

from __future__ import annotations

import pytest
import torch
from transformers import BitsAndBytesConfig

from lm_eval_pruned import load_pruned
from lm_eval_pruned.checkpoints.export import export_pruned
from lm_eval_pruned.pruning import measuring, slicing
from tests.conftest import skip_without
from tests.helpers.allocations import Allocations
from tests.helpers.checkpoints import edit_weights, save_tiny
from tests.helpers.ways_to_load import write_texts


#: Eight layers, so that one of them is little of the model.
SIZES = {"num_hidden_layers": 8, "hidden_size": 128, "intermediate_size": 512}


class InThisThread:
    """A pool of threads without threads, which would not be counted."""

    map = staticmethod(map)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def counted(monkeypatch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    for module in (measuring, slicing):
        monkeypatch.setattr(module, "ThreadPoolExecutor", InThisThread)

    def run(call, folder, *more, **asked):
        with Allocations() as allocations:
            result = call(str(folder), *more, **asked)
        return allocations.peak, result

    return run


def size_of(module) -> int:
    return sum(weight.nbytes for weight in module.parameters())


def test_a_whole_model_that_is_mapped_takes_no_memory(counted, tmp_path):
    peak, model = counted(load_pruned, save_tiny(tmp_path, **SIZES))
    assert peak < size_of(model) / 100


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        (torch.float32, "float32"),
        (torch.float32, "bfloat16"),
        (torch.bfloat16, "float32"),
        ("norms in float32", "bfloat16"),
        ("norms in float32", "float32"),
    ],
)
def test_a_load_holds_at_most_the_pruned_model_and_one_layer(
    stored, dtype, counted, tmp_path
):
    """As it is stored, and as it was asked for where that is another dtype."""
    mixed = isinstance(stored, str)
    save_tiny(tmp_path, dtype=torch.bfloat16 if mixed else stored, **SIZES)
    if mixed:
        norms = lambda t: t.update({n: w.float() for n, w in t.items() if "norm" in n})
        edit_weights(tmp_path, norms)
    whole = load_pruned(str(tmp_path), dtype=dtype)
    _, as_stored = counted(load_pruned, tmp_path, ratio=1)
    peak, model = counted(load_pruned, tmp_path, ratio=1, dtype=dtype)
    # Attention and embeddings stay mapped until they are cast.
    narrow = sum(size_of(layer.mlp) for layer in as_stored.model.layers)
    cast = 0 if model.dtype == as_stored.dtype and not mixed else size_of(model)
    assert peak <= narrow + cast + size_of(whole.model.layers[0])
    assert (
        narrow + cast + size_of(whole.model.layers[0]) < 0.8 * size_of(whole) + narrow
    )


def test_a_quantised_model_is_never_whole_in_memory(counted, tmp_path):
    skip_without("bitsandbytes")
    save_tiny(tmp_path, dtype=torch.bfloat16, **SIZES)
    whole, narrow = load_pruned(str(tmp_path)), load_pruned(str(tmp_path), ratio=1)
    four_bits = BitsAndBytesConfig(load_in_4bit=True)
    peak, model = counted(load_pruned, tmp_path, ratio=1, quantization_config=four_bits)
    mlps = sum(size_of(layer.mlp) for layer in narrow.model.layers)
    limit = mlps + size_of(model) + size_of(whole.model.layers[0])
    assert peak <= limit < 0.8 * size_of(whole)


@pytest.mark.parametrize("recipe", ["study", "best"])
def test_an_export_of_a_model_with_more_layers_takes_no_more_memory(
    recipe, counted, tmp_path
):
    """While text runs back through all layers, it does. Later, the cache has what that told."""
    peaks, asked = [], {"recipe": recipe, "prune_percent": 10}
    if recipe == "best":
        asked["calibration"] = write_texts(tmp_path / "texts", ["one two three " * 30])
    for layers in (2, 8):
        sizes = {"hidden_size": 64, "intermediate_size": 320}
        folder = save_tiny(tmp_path / f"{layers}", num_hidden_layers=layers, **sizes)
        output = tmp_path / f"{layers} pruned"
        export_pruned(str(folder), tmp_path / f"{layers} first", prune_arguments=asked)
        peak, _ = counted(export_pruned, folder, output, prune_arguments=asked)
        peaks.append(peak)
        (layer, *_) = load_pruned(str(output)).model.layers
    fewer, more = peaks
    assert more - fewer < size_of(layer.mlp)
