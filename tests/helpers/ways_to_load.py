"""Every way in which a pruned model comes about, for tests that want one result of all."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.checkpoints.export import export_pruned
from tests.helpers.checkpoints import auto_class, byte_tokenizer
from tests.helpers.layouts import EAGER


TEXTS = ("The tide comes in twice a day.", "A loaf rises.", "Bridges expand in summer.")


class Source:
    """A checkpoint in a folder, which stock transformers opens."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.auto = auto_class(AutoConfig.from_pretrained(folder))

    def whole(self, folder=None, **more):
        return self.auto.from_pretrained(folder or self.folder, **EAGER, **more).eval()

    def load(self, folder=None, **asked):
        path = str(folder or self.folder)
        return load_pruned(path, auto_class=self.auto, **EAGER, **asked)

    def opened(self, folder, record):
        """Open a pruned model that was saved, with stock transformers if it can."""
        if record.config_expresses_widths:
            return self.whole(folder)
        return self.load(folder)


def write_texts(file, texts=TEXTS) -> str:
    """Write calibration text and return the path of its file."""
    file.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    return str(file)


def _one_file(source, asked, folder):
    model = source.load(**asked)
    return model, model.prune_record


def _in_memory(source, asked, folder):
    model = prune_model(source.whole(), tokenizer=byte_tokenizer(), **asked)
    return model, model.prune_record


def _copy(source, folder):
    source.whole().config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def _shards(source, asked, folder):
    _copy(source, folder)
    source.whole().save_pretrained(folder, max_shard_size="3KB")
    assert len(list(folder.glob("*.safetensors"))) > 5
    model = source.load(folder, **asked)
    return model, model.prune_record


def _torch_files(source, asked, folder):
    _copy(source, folder)
    tensors = load_file(source.folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    model = source.load(folder, **asked)
    return model, model.prune_record


def _as_transformers_holds_it(source, asked, folder):
    """Experts in one tensor, and the tensors in another order."""
    _copy(source, folder)
    state = reversed(source.whole().state_dict().items())
    tensors = {name: tensor.clone() for name, tensor in state}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = source.load(folder, **asked)
    return model, model.prune_record


def _saved(source, asked, folder):
    model = source.load(**asked)
    model.save_pretrained(folder)
    return source.opened(folder, model.prune_record), model.prune_record


def _exported(source, asked, folder):
    export = export_pruned(str(source.folder), folder, prune_arguments=asked)
    return source.opened(folder, export.record), export.record


#: From a `Source`, arguments of pruning and an empty folder to a model and its record.
WAYS = {
    "one file": _one_file,
    "in memory": _in_memory,
    "shards": _shards,
    "torch files": _torch_files,
    "stacked": _as_transformers_holds_it,
    "saved": _saved,
    "exported": _exported,
}


def assert_state(model, state):
    """Fail unless a model has the tensors of a state dict, bit for bit."""
    own = model.state_dict()
    assert own.keys() == state.keys()
    for name, tensor in state.items():
        assert own[name].dtype == tensor.dtype, name
        assert torch.equal(own[name], tensor), name


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

    monkeypatch.setattr("lm_eval_pruned.checkpoints.request.LoadRequest.load", load)
