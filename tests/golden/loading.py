"""What pruning gives for each layout and argument, as short digests in ``loading.json``.

The file holds behaviour while the code behind it changes. After a change that is meant to alter results,

    python -m tests.golden.loading

rewrites it; the diff then shows what else changed.

Digests hold what every processor computes alike: weights are whole numbers of `UNIT`, so that scores of
weights are exact in any order of summation. What is chosen by text, such as kept sets of ``act``, hangs
on gaps far above rounding.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import safe_open

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.checkpoints.export import export_pruned
from tests.helpers import layouts
from tests.helpers.checkpoints import (
    auto_class,
    byte_tokenizer,
    tiny_config,
    tiny_model,
)


if TYPE_CHECKING:
    from collections.abc import Iterator

FILE = Path(__file__).with_suffix(".json")

WIDTH = 48
#: Weights are -512 to 512 of it: the squares of a row of 32 add up below 2**24, exactly in float32.
UNIT = 2.0**-11
#: Calibration text of the cases that need some; a file name in the folder of the models.
TEXT = "text.jsonl"
WORDS = "the quick brown fox jumps over a lazy dog while seven wizards judge it"

#: What else the models of some families need to have three layers.
MORE: dict[str, dict[str, Any]] = {
    "t5": {"num_decoder_layers": 3},
    "umt5": {"num_decoder_layers": 3},
    "gpt_oss": {
        "layer_types": ["full_attention", "sliding_attention", "full_attention"]
    },
}

#: Arguments of pruning, by the name of the case.
CASES: dict[str, dict[str, Any]] = {
    "baseline": {},
    "ratio": {"ratio": 1.1},
    "percent": {"prune_percent": 40},
    "width": {"intermediate_size": 21},
    "multiple": {"prune_percent": 30, "multiple_of": 16},
    "layers": {"prune_percent": 40, "layers": "1-2"},
    "one_layer": {"intermediate_size": 21, "layers": [0]},
    "skipped": {"prune_percent": 40, "skip_layers": "0"},
    "widths": {"widths": {0: 30, 1: 20}},
    "max_abs": {"prune_percent": 40, "criterion": "max_abs"},
    "l1": {"prune_percent": 40, "criterion": "l1"},
    "l2": {"prune_percent": 40, "criterion": "l2"},
    "vow": {"prune_percent": 40, "criterion": "vow"},
    "pon": {"prune_percent": 40, "criterion": "pon"},
    "random": {"prune_percent": 40, "criterion": "random", "seed": 3},
    "act": {"prune_percent": 40, "criterion": "act", "calibration": TEXT},
    "maw_act": {"prune_percent": 40, "criterion": "maw_act", "calibration": TEXT},
    "sensitivity": {"prune_percent": 40, "allocation": "sensitivity", "calibration": TEXT},
    "bfloat16": {"prune_percent": 40, "dtype": "bfloat16"},
}  # fmt: skip
#: Cases that are also exported by ``lm-eval-pruned prune``.
EXPORTED = ("percent", "layers", "act")

#: What a user may get wrong, and the sentence that says so.
MISTAKES: tuple[dict[str, Any], ...] = (
    {"ratio": 2, "prune_percent": 40},
    {"ratio": 9},
    {"ratio": 0},
    {"ratio": "two"},
    {"prune_percent": 100},
    {"prune_percent": -1},
    {"intermediate_size": 0},
    {"intermediate_size": 4000},
    {"intermediate_size": 2.5},
    {"prune_percent": 40, "multiple_of": 0},
    {"prune_percent": 40, "multiple_of": 64},
    {"multiple_of": 4},
    {"layers": "0"},
    {"prune_percent": 40, "layers": "7"},
    {"prune_percent": 40, "layers": "x"},
    {"prune_percent": 40, "layers": "0", "skip_layers": "1"},
    {"prune_percent": 40, "skip_layers": "0-2"},
    {"widths": {0: 30, 9: 20}},
    {"widths": {0: 300}},
    {"widths": "absent.json"},
    {"widths": {0: 30}, "layers": "0"},
    {"prune_percent": 40, "criterion": "mow"},
    {"prune_percent": 40, "criterion": "random", "seed": -1},
    {"prune_percent": 40, "criterion": "act", "calibration": "absent.jsonl"},
    {"prune_percent": 40, "calibration": TEXT},
    {"prune_percent": 40, "allocation": "fair"},
    {"allocation": "sensitivity"},
)  # fmt: skip


def digest(value: Any) -> str:
    """Return twelve hexadecimal digits that stand for a value of JSON types."""
    written = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(written.encode()).hexdigest()[:12]


def digest_of_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """Return the same for tensors: names, dtypes, shapes and every bit."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        plain = tensor.detach().cpu().contiguous().flatten()
        found.update(plain.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]


def saved(folder: Path) -> dict[str, str]:
    """Return digests of the tensors and of the config of a checkpoint."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors |= {key: opened.get_tensor(key) for key in opened.keys()}
    config = json.loads((folder / "config.json").read_text())
    return {"tensors": digest_of_tensors(tensors), "config": digest(config)}


def described(model: transformers.PreTrainedModel) -> dict[str, Any]:
    """Return what holds of a pruned model however it came about."""
    record = model.prune_record
    told = record.as_dict()
    # Where text lies does not matter; which of its two places names it differs between ways.
    told.pop("calibration", None)
    told.get("measured_on", {}).pop("file", None)
    told["asked"].pop("calibration", None)
    return {
        "state": digest_of_tensors(model.state_dict()),
        "kept": (record.digest or "none")[:12],
        "parameters": record.parameters_after,
        "record": digest(told),
    }


@contextlib.contextmanager
def checkpoint(family: str) -> Iterator[Path]:
    """Write a tiny checkpoint of a family; the text lies beside it, in the working directory."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as place:
        words = WORDS.split()
        lines = [" ".join(words[n:] + words[:n]) for n in range(8)]
        content = "".join(json.dumps({"text": line}) + "\n" for line in lines)
        Path(place, TEXT).write_text(content)
        folder = Path(place, "model")
        sizes = layouts.overrides(family, WIDTH) | {"num_hidden_layers": 3}
        config = tiny_config(family, **sizes | MORE.get(family, {}))
        model = tiny_model(config)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                whole = torch.randint(-512, 513, parameter.shape)
                parameter.copy_(whole * UNIT + (parameter.dim() == 1))
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        os.chdir(place)
        try:
            yield folder
        finally:
            os.chdir(before)


def observed(family: str) -> dict[str, Any]:
    """Return what every case gives for one family."""
    found: dict[str, Any] = {}
    with checkpoint(family) as folder:
        loader = auto_class(tiny_config(family, **layouts.overrides(family, WIDTH)))
        for name, arguments in CASES.items():
            found[name] = _loaded(folder, loader, arguments)
            if name in EXPORTED and "refused" not in found[name]:
                output = folder.with_name(name)
                export_pruned(str(folder), output, prune_arguments=arguments)
                found[name]["exported"] = saved(output)
    return found


def _loaded(folder: Path, loader: type, arguments: dict[str, Any]) -> dict[str, Any]:
    more = {"auto_class": loader, **layouts.EAGER}
    try:
        model = load_pruned(str(folder), **more, **arguments)
    except ValueError as refusal:
        return {"refused": str(refusal)}
    entry = described(model)
    if "dtype" not in arguments:
        whole = loader.from_pretrained(folder, **layouts.EAGER)
        in_memory = prune_model(whole, tokenizer=byte_tokenizer(), **arguments)
        same = described(in_memory)
        assert same == entry, f"on load {entry}, in memory {same}"
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place)
        entry["saved"] = saved(Path(place))
    return entry


def sentences() -> dict[str, str | None]:
    """Return what is said of each mistake; None where nothing is."""
    found = {}
    with checkpoint("llama") as folder:
        for arguments in MISTAKES:
            try:
                load_pruned(str(folder), **arguments)
                said = None
            except (ValueError, OSError) as error:
                # A new criterion changes no behaviour that the file holds.
                said = re.sub(
                    r"(criterion=mow is unknown: pass one of) .*", r"\1 …", str(error)
                )
            found[json.dumps(arguments)] = said
    return found


def versions() -> dict[str, str]:
    """Return the releases on which the digests depend."""
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__.partition("+")[0],
    }


def main() -> None:
    """Write the file anew."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    golden = {
        "versions": versions(),
        "mistakes": sentences(),
        "families": {family: observed(family) for family in layouts.FAMILIES},
    }
    FILE.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
