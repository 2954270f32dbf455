"""Every way in which a pruned model comes about, for tests that want one result of all."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.checkpoints.checkpoint import (
    Checkpoint,
    tensors_of,
)
from lm_eval_pruned.checkpoints.export import export_pruned
from lm_eval_pruned.checkpoints.load import stored_model
from lm_eval_pruned.pruning.arguments import PruneArguments
from lm_eval_pruned.pruning.slicing import carry_out
from tests.helpers.checkpoints import auto_class, byte_tokenizer
from tests.helpers.layouts import EAGER


TEXTS = ("The tide comes in twice a day.", "A loaf rises.", "Bridges expand in summer.")
WEIGHTS = "model.safetensors"


class Source:
    """A checkpoint in a folder, which stock transformers opens."""

    def __init__(self, folder, auto=None):
        self.folder = Path(folder)
        self.auto = auto or auto_class(AutoConfig.from_pretrained(folder))

    def whole(self, folder=None, **more):
        return self.auto.from_pretrained(folder or self.folder, **EAGER, **more).eval()

    def load(self, folder=None, **asked):
        path = str(folder or self.folder)
        return load_pruned(path, auto_class=self.auto, **EAGER, **asked)

    def opened(self, folder, record):
        """Open a pruned model that was saved, with stock transformers if it can."""
        return (self.load if record.inexpressible else self.whole)(folder)

    def export(self, folder, dtype=None, **asked):
        return export_pruned(
            str(self.folder), folder, dtype=dtype, prune_arguments=asked
        )


class Uneven(Source):
    """A checkpoint whose layers differ in width, which only this package opens."""

    def whole(self, folder=None, **more):
        return super().whole(folder, **more) if folder else self.load()


def request_of(
    folder, auto_class=AutoModelForCausalLM, arguments=None, **asked
) -> Checkpoint:
    return Checkpoint.of(
        str(folder), PruneArguments(**asked), dict(arguments or {}), auto_class
    )


def norms_in_float32(tensors: dict[str, torch.Tensor]) -> None:
    """Store the norms more exactly than 16 bits can, for `tests.helpers.checkpoints.edit_weights`."""
    for name, tensor in tensors.items():
        if "norm" in name:
            # Below the step of a 16-bit float around 1.
            tensors[name] = tensor.float() + 1e-5


def write_texts(file, texts=TEXTS) -> str:
    """Write calibration text and return the path of its file."""
    file.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    return str(file)


def _recorded(model):
    return model, model.prune_record


def _one_file(source, asked, folder):
    return _recorded(source.load(**asked))


def _in_memory(source, asked, folder):
    return _recorded(prune_model(source.whole(), tokenizer=byte_tokenizer(), **asked))


def _stored(write, source, asked, folder):
    source.whole().config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    write(source, folder)
    return _recorded(source.load(folder, **asked))


def _as_shards(source, folder):
    source.whole().save_pretrained(folder, max_shard_size="3KB")
    assert len(list(folder.glob("*.safetensors"))) > 5


def _as_torch_file(source, folder):
    torch.save(load_file(source.folder / WEIGHTS), folder / "pytorch_model.bin")


def _as_transformers_holds_it(source, folder):
    """Experts in one tensor, and the tensors in another order."""
    state = reversed(source.whole().state_dict().items())
    tensors = {name: tensor.clone() for name, tensor in state}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def _saved(source, asked, folder):
    model = source.load(**asked)
    model.save_pretrained(folder)
    return source.opened(folder, model.prune_record), model.prune_record


def _exported(source, asked, folder):
    record = source.export(folder, **asked).record
    return source.opened(folder, record), record


def _streamed(source, asked, folder):
    """The tensors that other engines are handed, under the keys of an exported checkpoint."""
    source.export(folder, **asked)
    checkpoint = request_of(source.folder, source.auto, **asked).with_stored_widths()
    stored = stored_model(checkpoint)
    model = stored.model
    carry_out(stored, checkpoint.cut)
    checkpoint.as_stored(model)
    tensors = {name: tensor.clone() for name, tensor in tensors_of(model)}
    assert tensors.keys() == load_file(folder / WEIGHTS).keys()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return source.opened(folder, model.prune_record), model.prune_record


#: From a `Source`, arguments of pruning and an empty folder to a model and its record.
WAYS = {
    "one file": _one_file,
    "in memory": _in_memory,
    "shards": functools.partial(_stored, _as_shards),
    "torch files": functools.partial(_stored, _as_torch_file),
    "stacked": functools.partial(_stored, _as_transformers_holds_it),
    "saved": _saved,
    "exported": _exported,
    "streamed": _streamed,
}


def assert_state(model, state):
    """Fail unless a model has the tensors of a state dict, bit for bit."""
    _assert_equal(model.state_dict(), state)


def assert_same_model(one, other):
    """Fail unless two models have the same parameters, bit for bit."""
    _assert_equal(*(dict(model.named_parameters()) for model in (one, other)))


def _assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def assert_one_model(source, asked, state, folder, ways=tuple(WAYS)):
    """Fail unless all ways give the tensors of `state`, and one record."""
    records = []
    for way in ways:
        model, record = WAYS[way](source, asked, folder / way)
        assert_state(model, state)
        records.append(record.as_dict())
    assert all(each == records[0] for each in records)
    return record


def forbid_reading(monkeypatch):
    """Let a test fail if the weights of a checkpoint are read."""

    def load(*given, **named):
        raise AssertionError("weights were read")

    monkeypatch.setattr(Checkpoint, "_built", load)
