"""`lm-eval-pruned prune`: an ordinary checkpoint, whole or not at all."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lm_eval_pruned import load_pruned
from lm_eval_pruned.checkpoints.configs import skeleton
from lm_eval_pruned.checkpoints.export import export_pruned
from lm_eval_pruned.cli import main
from tests.helpers import checkpoints, evaluations


ARCHITECTURES = {
    "llama": {},
    "llama-bias": {"mlp_bias": True, "attention_bias": True},
    "llama-tied": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {},
    "mistral": {},
    "gemma2": {},
    "phi3": {},
    "mixtral": {"num_local_experts": 3},
    "t5": {
        "feed_forward_proj": "gated-gelu",
        "d_model": 32,
        "d_ff": 88,
        "d_kv": 8,
        "num_layers": 2,
        "num_heads": 4,
        "tie_word_embeddings": False,
    },
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def source(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return checkpoints.save_tiny(
        folder,
        request.param.partition("-")[0],
        dtype=torch.bfloat16,
        max_shard_size="20KB",
        **ARCHITECTURES[request.param],
    )


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {
        key: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for key, tensor in load_file(file).items()
    }


def auto_class_of(folder: Path) -> type:
    return checkpoints.auto_class(AutoConfig.from_pretrained(folder))


def assert_equal_weights(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype, key
        assert torch.equal(tensor, other[key]), key


def test_equals_pruning_while_loading(source, tmp_path):
    export = export_pruned(
        str(source), tmp_path / "out", prune_arguments={"ratio": "1.5"}
    )
    auto_class = auto_class_of(source)
    loaded = load_pruned(str(source), ratio="1.5", auto_class=auto_class)
    opened, report = auto_class.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_equal_weights(opened.state_dict(), loaded.state_dict())
    assert export.record.as_dict() == loaded.prune_record.as_dict()
    assert opened.config.dtype == torch.bfloat16


def test_only_the_width_changes(source, tmp_path):
    export_pruned(str(source), tmp_path / "out", prune_arguments={"ratio": "1.5"})
    before = json.loads((source / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    key = "d_ff" if "d_ff" in before else "intermediate_size"
    assert after.pop(key) == 48
    assert before.pop(key) == 88
    assert after == before
    old, new = stored(source), stored(tmp_path / "out")
    assert old.keys() == new.keys()
    for key in old:
        narrowed = old[key].numel() * 48 == new[key].numel() * 88
        assert narrowed == bool(
            re.search(r"mlp\.(?!down_proj\.bias)|experts|wi_|wo", key)
        )
        if not narrowed:
            assert torch.equal(old[key], new[key]), key
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert (tmp_path / "out" / "generation_config.json").is_file()
    AutoTokenizer.from_pretrained(tmp_path / "out")


def test_layers_of_different_width(tiny_llama, tmp_path, caplog):
    arguments = {"ratio": 2, "skip_layers": "1"}
    export_pruned(str(tiny_llama), tmp_path / "once", prune_arguments=arguments)
    assert "stock transformers cannot open" in caplog.text
    assert "lm_eval --model pruned-hf" in (tmp_path / "once" / "README.md").read_text()
    loaded = load_pruned(str(tiny_llama), **arguments)
    assert_equal_weights(stored(tmp_path / "once"), loaded.state_dict())
    # Exporting the result narrows the layer that was left out.
    export_pruned(
        str(tmp_path / "once"), tmp_path / "twice", prune_arguments={"ratio": 2}
    )
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    expected = load_pruned(str(tiny_llama), ratio=2)
    assert_equal_weights(opened.state_dict(), expected.state_dict())


@pytest.mark.slow
@given(
    width=st.integers(1, 87),
    shard=st.integers(1, 200_000),
    criterion=st.sampled_from(["maw", "l2", "random"]),
)
def test_any_width_and_shard_size(
    tmp_path_factory, tiny_llama, width, shard, criterion
):
    output = tmp_path_factory.mktemp("export") / "out"
    arguments = {"intermediate_size": width, "criterion": criterion, "seed": 3}
    export = export_pruned(
        str(tiny_llama), output, max_shard_size=shard, prune_arguments=arguments
    )
    loaded = load_pruned(str(tiny_llama), **arguments)
    assert export.record.digest == loaded.prune_record.digest
    assert_equal_weights(stored(output), loaded.state_dict())
    index = output / "model.safetensors.index.json"
    files = sorted(output.glob("*.safetensors"))
    assert index.is_file() == (len(files) > 1)
    total = 0
    for file in files:
        tensors = load_file(file)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= shard or len(tensors) == 1
        total += size
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    if index.is_file():
        recorded = json.loads(index.read_text())
        assert recorded["metadata"]["total_size"] == total
        assert set(recorded["weight_map"].values()) == {file.name for file in files}
        for key, name in recorded["weight_map"].items():
            assert key in load_file(output / name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype_is_the_one_ranked_and_stored(source, tmp_path, dtype):
    export = export_pruned(
        str(source), tmp_path / "out", dtype=dtype, prune_arguments={"ratio": 2}
    )
    auto_class = auto_class_of(source)
    loaded = load_pruned(str(source), ratio=2, dtype=dtype, auto_class=auto_class)
    opened = auto_class.from_pretrained(tmp_path / "out")
    assert opened.dtype == getattr(torch, dtype)
    assert_equal_weights(opened.state_dict(), loaded.state_dict())
    assert export.record.digest == loaded.prune_record.digest


def save_drawn(model_type: str, folder: Path) -> type:
    """Write a tiny float32 checkpoint and return its AutoModel class."""
    script = architectures_script()
    _, auto_class, _ = {row[0]: row for row in script.candidates()}[model_type]
    config = script.tiny_config(model_type)
    model = script.tiny_model(auto_class, config)
    stored_tensors = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in stored_tensors and buffer.is_floating_point():
            buffer.add_(torch.randn_like(buffer) * 0.05)
    model.save_pretrained(folder)
    config.save_pretrained(folder)
    return auto_class


def kept_in_float32(model, dtype: torch.dtype) -> set[str]:
    """Return the floating-point tensors that were not loaded in `dtype`."""
    return {
        name
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and tensor.dtype != dtype
    }


def check_export_in_another_dtype(model_type: str, dtype, tmp_path: Path) -> set[str]:
    """Compare an export with pruning while loading; return what it left in float32."""
    auto_class = save_drawn(model_type, tmp_path / "in")
    export = export_pruned(
        str(tmp_path / "in"),
        tmp_path / "out",
        dtype=dtype,
        prune_arguments={"prune_percent": 40},
    )
    loaded = load_pruned(
        str(tmp_path / "in"), prune_percent=40, dtype=dtype, auto_class=auto_class
    )
    opened = auto_class.from_pretrained(tmp_path / "out")
    assert export.record.digest == loaded.prune_record.digest
    assert_equal_weights(opened.state_dict(), loaded.state_dict())
    # Loading a part of it in full precision shows what was rounded.
    kept = kept_in_float32(loaded, dtype)
    exact = auto_class.from_pretrained(tmp_path / "out", dtype=torch.float32)
    source = auto_class.from_pretrained(tmp_path / "in").state_dict()
    for name in kept:
        if exact.state_dict()[name].shape == source[name].shape:
            assert torch.equal(exact.state_dict()[name], source[name]), name
    return kept


#: Beside it, newer releases keep the router's weight.
ROUTER_BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.mark.parametrize(
    ("model_type", "dtype", "kept"),
    [
        ("deepseek_v3", torch.bfloat16, ROUTER_BIAS),
        ("glm4_moe", torch.bfloat16, ROUTER_BIAS),
        ("gpt_oss", torch.float16, "model.layers.0.input_layernorm.weight"),
        ("gpt_oss", torch.bfloat16, None),
        # Built in float32 without a word about it in the plan.
        ("lfm2_moe", torch.bfloat16, "model.layers.2.feed_forward.expert_bias"),
        ("t5", torch.float16, "decoder.block.0.layer.2.DenseReluDense.wo.weight"),
    ],
)
def test_what_transformers_keeps_in_float32_is_not_rounded(
    tmp_path, model_type, dtype, kept
):
    left = check_export_in_another_dtype(model_type, dtype, tmp_path)
    assert kept in left if kept else not left


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_class_with_a_dtype_plan_is_exported_as_it_is_loaded(dtype, tmp_path):
    script = architectures_script()
    table = (checkpoints.ROOT / "docs" / "architectures.md").read_text()
    pruned = set(
        re.findall(
            r"^\|`([^`]+)`\|",
            table.partition("## Pruned")[2].partition("\n## ")[0],
            flags=re.MULTILINE,
        )
    )
    checked = []
    for model_type, auto_class, _ in script.candidates():
        if model_type not in pruned:
            continue
        model = skeleton(auto_class, script.tiny_config(model_type))
        if model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict:
            check_export_in_another_dtype(model_type, dtype, tmp_path / model_type)
            checked.append(model_type)
    assert len(checked) > 25


@functools.cache
def architectures_script():
    """Return docs/make_architectures.py, which builds a tiny model of every class."""
    path = checkpoints.ROOT / "docs" / "make_architectures.py"
    spec = importlib.util.spec_from_file_location("make_architectures", path)
    module = importlib.util.module_from_spec(spec)
    # Its dataclass looks itself up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_settings_that_nobody_knows_are_kept(tmp_path):
    folder = checkpoints.save_tiny(tmp_path / "in")
    config = json.loads((folder / "config.json").read_text())
    config["a_key_nobody_knows"] = {"kept": [1, None]}
    (folder / "config.json").write_text(json.dumps(config))
    export_pruned(str(folder), tmp_path / "out", prune_arguments={"ratio": 2})
    config["intermediate_size"] = 64
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config


def test_a_default_width_is_written_out(tmp_path):
    folder = checkpoints.save_tiny(tmp_path / "in")
    config = json.loads((folder / "config.json").read_text())
    config["hidden_size_of_another_tool"] = config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    export_pruned(
        str(folder), tmp_path / "out", dtype="float16", prune_arguments={"ratio": 2}
    )
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["dtype"] == "float16"


def test_model_card(tmp_path):
    from huggingface_hub import ModelCard

    folder = checkpoints.save_tiny(tmp_path / "A-Base")
    (folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: a-licence\nlanguage:\n- en\ndatasets:\n- x\n---\nHello"
    )
    (folder / "LICENSE.txt").write_text("terms")
    export = export_pruned(str(folder), tmp_path / "out", prune_arguments={"ratio": 2})
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "other"
    assert card.data.license_name == "a-licence"
    assert card.data.library_name == "transformers"
    assert card.data.datasets is None
    assert export.record.digest in card.text
    assert "A-Base" in card.text and str(tmp_path) not in card.content
    assert "ratio=2" in card.text and "`maw`" in card.text
    # What a cut costs differs between models and tasks, so the card claims nothing.
    assert "evaluate the model for your use" in card.text
    assert "instruction following" not in card.text
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "terms"


def test_an_interrupted_export_leaves_nothing(tiny_llama, tmp_path, monkeypatch):
    def broken(*arguments, **more):
        (unfinished,) = tmp_path.iterdir()
        assert list(unfinished.glob("*.safetensors"))
        raise KeyboardInterrupt

    monkeypatch.setattr("lm_eval_pruned.checkpoints.export.model_card", broken)
    with pytest.raises(KeyboardInterrupt):
        export_pruned(str(tiny_llama), tmp_path / "out", prune_arguments={"ratio": 2})
    assert list(tmp_path.iterdir()) == []


def test_output_must_be_new_or_empty(tiny_llama, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"output=.*taken exists and is not an empty"):
        export_pruned("no/such-model", taken, prune_arguments={"ratio": 2})
    assert [path.name for path in taken.iterdir()] == ["notes.txt"]
    empty = tmp_path / "empty"
    empty.mkdir()
    link = tmp_path / "link"
    link.symlink_to(empty, target_is_directory=True)
    export_pruned(str(tiny_llama), link, prune_arguments={"ratio": 2})
    assert link.is_symlink() and (empty / "config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prune_arguments": {"prune_percent": 0}}, "prune_percent=0 keeps all 88"),
        ({"prune_arguments": {}}, "no size keeps all 88"),
        ({"prune_arguments": {"ratio": 9}}, "ratio=9 is above"),
        ({"max_shard_size": "big"}, "max_shard_size=big is not a size"),
        ({"max_shard_size": 0}, "max_shard_size=0 is not a size"),
        ({"dtype": "int8"}, "dtype=int8 is not a dtype to store"),
        ({"dtype": "float31"}, "dtype=float31 is not a dtype to store"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    tiny_llama, tmp_path, arguments, message
):
    with pytest.raises(ValueError, match=message):
        export_pruned(
            str(tiny_llama),
            tmp_path / "out",
            **{"prune_arguments": {"ratio": 2}, **arguments},
        )
    assert list(tmp_path.iterdir()) == []


def test_pickled_weights_are_saved_as_safetensors(tmp_path):
    folder = checkpoints.save_tiny(tmp_path / "in")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    expected = load_pruned(str(folder), ratio=2)
    (folder / "model.safetensors").unlink()
    export = export_pruned(
        str(folder),
        tmp_path / "out",
        max_shard_size="20KB",
        prune_arguments={"ratio": 2},
    )
    assert export.shards > 1
    assert not list((tmp_path / "out").glob("*.bin"))
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_equal_weights(opened.state_dict(), expected.state_dict())
    assert export.record.digest == expected.prune_record.digest
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_pushes_the_finished_folder_only_when_asked(tiny_llama, tmp_path, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, repo_id, exist_ok):
            calls.append(("create", repo_id))
            return type("Url", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            assert (Path(folder_path) / "config.json").is_file()
            calls.append(("upload", repo_id))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    export_pruned(str(tiny_llama), tmp_path / "a", prune_arguments={"ratio": 2})
    assert calls == []
    export_pruned(
        str(tiny_llama), tmp_path / "b", push_to_hub="r", prune_arguments={"ratio": 2}
    )
    assert calls == [("create", "r"), ("upload", "me/r")]


def test_command(tiny_llama, tmp_path, capsys):
    command = [
        "prune",
        "--model_args",
        f"pretrained={tiny_llama}",
        "--output_path",
        str(tmp_path / "out"),
    ]
    assert main([*command, "--prune_percent", "50", "--multiple_of", "8"]) == 0
    printed = capsys.readouterr().out
    assert "kept digest" in printed and str(tmp_path / "out") in printed
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["intermediate_size"] == 40
    assert main([*command, "--ratio", "2"]) == 2
    assert "is not an empty folder" in capsys.readouterr().err


@pytest.mark.slow
def test_hf_scores_the_export_like_pruned_hf_scores_the_source(
    tiny_llama_sharded, tmp_path
):
    output = tmp_path / "out"
    export = export_pruned(
        str(tiny_llama_sharded), output, prune_arguments={"ratio": 2}
    )
    exported, _ = evaluations.evaluate("hf", f"pretrained={output}")
    pruned, config = evaluations.evaluate(
        "pruned-hf", f"pretrained={tiny_llama_sharded},ratio=2"
    )
    assert exported == pruned
    assert config["pruning"]["kept_digest"] == export.record.digest


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "texts.jsonl"
    texts = ("the quick brown fox jumps over the lazy dog", "some other text")
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


WAYS = {
    "maw": {"criterion": "maw"},
    "global": {"criterion": "vow", "allocation": "global"},
    "act": {"criterion": "act"},
    "sensitivity": {"allocation": "sensitivity"},
    "best": {"criterion": "best", "criteria_tried": "maw+act"},
    "influence": {"drop_layers": 1, "drop_by": "block_influence"},
}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["safetensors", "pickled"])
@pytest.mark.parametrize("way", WAYS)
def test_the_kept_neurons_are_those_of_the_stored_dtype(
    tmp_path, monkeypatch, calibration, way, form
):
    """So an export is its source in each dtype in which both are loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = checkpoints.save_tiny(tmp_path / "in", num_hidden_layers=4)
    if form == "pickled":
        weights = load_file(folder / "model.safetensors")
        torch.save(weights, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    asked = {"ratio": 2, **WAYS[way]}
    if way not in ("maw", "global"):
        asked["calibration"] = calibration
    output = tmp_path / "out"
    export = export_pruned(str(folder), output, prune_arguments=asked)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        pruned = load_pruned(str(folder), dtype=dtype, **asked)
        assert pruned.dtype == dtype
        assert pruned.prune_record.digest == export.record.digest
        exported = load_pruned(str(output), dtype=dtype)
        assert_equal_weights(exported.state_dict(), pruned.state_dict())


@pytest.mark.slow
def test_hf_answers_as_pruned_hf_in_a_dtype_that_rounds(tiny_llama, tmp_path):
    """The source is stored in float32."""
    output = tmp_path / "out"
    export_pruned(str(tiny_llama), output, prune_arguments={"ratio": 2})
    exported, _ = evaluations.evaluate("hf", f"pretrained={output},dtype=bfloat16")
    pruned, config = evaluations.evaluate(
        "pruned-hf", f"pretrained={tiny_llama},ratio=2,dtype=bfloat16"
    )
    assert config["model_dtype"] == torch.bfloat16
    assert exported == pruned


@pytest.mark.slow
def test_the_real_model_through_both_commands(real_model, tmp_path):
    output = tmp_path / "out"
    prune = ["lm-eval-pruned", "prune", "--model_args", f"pretrained={real_model}"]
    prune += ["--prune_percent", "40", "--output_path", str(output)]
    done = evaluations.run([*prune, "--max_shard_size", "100MB"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list(output.glob("*.safetensors"))) > 1
    answers = {}
    for model, model_args in {
        "hf": f"pretrained={output}",
        "pruned-hf": f"pretrained={real_model},prune_percent=40",
    }.items():
        done = evaluations.run(
            evaluations.command(model, model_args, tmp_path / model, limit=10), tmp_path
        )
        assert done.returncode == 0, done.stderr
        answers[model], config = evaluations.read(tmp_path / model)
    assert answers["hf"] == answers["pruned-hf"]
    assert config["pruning"]["kept_digest"] in (output / "README.md").read_text()


_WATCHED = """
import json, sys, threading
from pathlib import Path
import torch
from lm_eval_pruned import load_pruned
from lm_eval_pruned.checkpoints.export import export_pruned

warm_up, source, output, dtype = sys.argv[1:]
dtype = None if dtype == "None" else getattr(torch, dtype)
# Imports and thread pools are no part of what is measured.
load_pruned(warm_up, ratio=2, dtype=torch.float16)


def private():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


before = peak = private()
done = threading.Event()


def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, private())


watcher = threading.Thread(target=watch)
watcher.start()
model = load_pruned(source, prune_percent=50, dtype=dtype)
done.set()
watcher.join()
loaded = max(peak, private()) - before
export_pruned(source, output, dtype=dtype, prune_arguments={"prune_percent": 50})
mlps = sum(p.numel() for n, p in model.named_parameters() if ".mlp." in n)
everything = sum(p.nbytes for p in model.parameters())
print(json.dumps({"peak": loaded, "kept": 2 * mlps, "model": everything}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_load_takes_memory_for_what_is_kept(tiny_llama, tmp_path, dtype):
    """What lies in the mapped file takes none; converting takes a copy."""
    folder = checkpoints.save_tiny(
        tmp_path / "in",
        hidden_size=1024,
        intermediate_size=8192,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        dtype=torch.bfloat16,
    )
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    python = [sys.executable, "-c", _WATCHED]
    arguments = [str(tiny_llama), str(folder), str(tmp_path / "out"), str(dtype)]
    done = evaluations.run([*python, *arguments], tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    allowed = found["kept"] + (0 if dtype is None else found["model"])
    assert size > 1.8 * found["kept"]
    # Of one weight, there may be a copy while it is scored or converted.
    assert found["peak"] < allowed + 4 * 1024 * 8192


@pytest.mark.slow
def test_a_gguf_file(tmp_path):
    from lm_eval_pruned.checkpoints.default_model import _packaged_gguf

    why = checkpoints.real_model_missing()
    if why:
        pytest.skip(why)
    gguf = _packaged_gguf()
    export_pruned(
        str(gguf.parent),
        tmp_path / "out",
        gguf_file=gguf.name,
        prune_arguments={"prune_percent": 40},
    )
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert opened.config.intermediate_size == 922
    assert getattr(opened.config, "quantization_config", None) is None
    AutoTokenizer.from_pretrained(tmp_path / "out")
