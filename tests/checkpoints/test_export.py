"""`lm-eval-pruned prune`: an ordinary checkpoint, whole or not at all.

That its weights are those of every other way to load is in `test_loading_contract`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import parse_eval_result_entries
from hypothesis import given, strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_pruned import load_pruned
from lm_eval_pruned.checkpoints.configs import skeleton
from lm_eval_pruned.checkpoints.default_model import _packaged_gguf
from lm_eval_pruned.checkpoints.export import export_pruned
from lm_eval_pruned.cli import main
from tests.helpers import checkpoints, evaluations
from tests.helpers.architectures import candidates, listed, script
from tests.helpers.results_files import write_run
from tests.helpers.ways_to_load import Source, assert_state


HALF = {"prune_arguments": {"ratio": 2}}


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def stored(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


ARCHITECTURES = {
    "llama": {"mlp_bias": True, "attention_bias": True},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {},
    "phi3": {},
    "mixtral": {"num_local_experts": 3},
    "t5": {
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "d_model": 32,
        "d_ff": 88,
        "d_kv": 8,
        "num_layers": 2,
        "num_heads": 4,
    },
}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_only_the_width_changes(family, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    sizes = {"dtype": torch.bfloat16, "max_shard_size": "20KB"}
    checkpoints.save_tiny(source, family, **sizes, **ARCHITECTURES[family])
    # Settings that nobody knows are kept.
    checkpoints.edit_config(source, a_key_nobody_knows={"kept": [1, None]})
    export_pruned(str(source), out, prune_arguments={"ratio": "1.5"})
    before, after = config_of(source), config_of(out)
    key = "d_ff" if "d_ff" in before else "intermediate_size"
    assert (before.pop(key), after.pop(key)) == (88, 48)
    assert after == before
    old, new = stored(source), stored(out)
    assert old.keys() == new.keys()
    for key in old:
        narrowed = old[key].numel() * 48 == new[key].numel() * 88
        in_mlp = re.search(r"mlp\.(?!down_proj\.bias)|experts|wi_|wo", key)
        assert narrowed == bool(in_mlp)
        assert narrowed or torch.equal(old[key], new[key]), key
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert (out / "generation_config.json").is_file()
    AutoTokenizer.from_pretrained(out)
    loaded = Source(source).load(ratio="1.5")
    assert_state(Source(source).whole(out), loaded.state_dict())


@pytest.mark.slow
@given(width=st.integers(1, 87), shard=st.integers(1, 200_000))
def test_any_width_and_shard_size(tmp_path_factory, tiny_llama, width, shard):
    output = tmp_path_factory.mktemp("export") / "out"
    asked = {"intermediate_size": width}
    export_pruned(str(tiny_llama), output, max_shard_size=shard, prune_arguments=asked)
    loaded = load_pruned(str(tiny_llama), **asked)
    assert_state(loaded, stored(output))
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
        for key, name in recorded["weight_map"].items():
            assert key in load_file(output / name)


def left_in_float32(model_type: str, dtype, tmp_path: Path) -> set[str]:
    """Compare an export with pruning while loading; return what it did not cast."""
    config = script().tiny_config(model_type)
    model = script().tiny_model(candidates()[model_type][1], config)
    state = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in state and buffer.is_floating_point():
            buffer.add_(torch.randn_like(buffer) * 0.05)
    model.save_pretrained(tmp_path / "in")
    config.save_pretrained(tmp_path / "in")
    source, out, asked = (
        Source(tmp_path / "in"),
        tmp_path / "out",
        {"prune_percent": 40},
    )
    source.auto = candidates()[model_type][1]
    export_pruned(str(source.folder), out, dtype=dtype, prune_arguments=asked)
    loaded = source.load(dtype=dtype, **asked).state_dict()
    assert_state(source.auto.from_pretrained(out), loaded)
    kept = {n for n, t in loaded.items() if t.is_floating_point() and t.dtype != dtype}
    # Loading a part of it in full precision shows what was rounded.
    exact = source.auto.from_pretrained(out, dtype=torch.float32).state_dict()
    whole = source.auto.from_pretrained(source.folder).state_dict()
    for name in kept:
        if exact[name].shape == whole[name].shape:
            assert torch.equal(exact[name], whole[name]), name
    return kept


#: Beside it, newer releases keep the router's weight.
ROUTER_BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.mark.parametrize(
    ("model_type", "dtype", "kept"),
    [
        ("deepseek_v3", torch.bfloat16, ROUTER_BIAS),
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
    left = left_in_float32(model_type, dtype, tmp_path)
    assert kept in left if kept else not left


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_class_with_a_dtype_plan_is_exported_as_it_is_loaded(dtype, tmp_path):
    checked = []
    for model_type in sorted(listed("Pruned") & candidates().keys()):
        config = script().tiny_config(model_type)
        model = skeleton(candidates()[model_type][1], config)
        if model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict:
            left_in_float32(model_type, dtype, tmp_path / model_type)
            checked.append(model_type)
    assert len(checked) > 25


def test_a_dtype_that_the_config_does_not_name_is_written_out(tmp_path):
    folder = checkpoints.save_tiny(tmp_path / "in")
    config = config_of(folder)
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    export_pruned(str(folder), tmp_path / "out", dtype="float16", **HALF)
    assert config_of(tmp_path / "out")["dtype"] == "float16"


def test_model_card(tmp_path):
    from huggingface_hub import ModelCard

    folder, out = checkpoints.save_tiny(tmp_path / "A-Base"), tmp_path / "out"
    fields = "license: other\nlicense_name: a-licence\nlanguage:\n- en\ndatasets:\n- x"
    (folder / "README.md").write_text(f"---\n{fields}\n---\nHello")
    (folder / "LICENSE.txt").write_text("terms")
    export = export_pruned(str(folder), out, **HALF)
    card = ModelCard.load(out / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "a-licence")
    assert (card.data.library_name, card.data.datasets) == ("transformers", None)
    for word in (export.record.digest, "A-Base", "ratio=2", "`maw`"):
        assert word in card.text
    assert str(tmp_path) not in card.content
    # What a cut costs differs between models and tasks, so the card claims nothing.
    assert "evaluate the model for your use" in card.text
    assert (out / "LICENSE.txt").read_text() == "terms"


def test_an_interrupted_export_leaves_nothing(tiny_llama, tmp_path, monkeypatch):
    def broken(*arguments, **more):
        (unfinished,) = tmp_path.iterdir()
        assert list(unfinished.glob("*.safetensors"))
        raise KeyboardInterrupt

    monkeypatch.setattr("lm_eval_pruned.checkpoints.export.model_card", broken)
    with pytest.raises(KeyboardInterrupt):
        export_pruned(str(tiny_llama), tmp_path / "out", **HALF)
    assert list(tmp_path.iterdir()) == []


def test_output_must_be_new_or_empty(tiny_llama, tmp_path):
    taken, empty, link = (tmp_path / name for name in ("taken", "empty", "link"))
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"output=.*taken exists"):
        export_pruned("no/such-model", taken, **HALF)
    assert [path.name for path in taken.iterdir()] == ["notes.txt"]
    empty.mkdir()
    link.symlink_to(empty, target_is_directory=True)
    export_pruned(str(tiny_llama), link, **HALF)
    assert link.is_symlink() and (empty / "config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"prune_arguments": {"prune_percent": 0}}, "prune_percent=0 keeps all 88"),
        ({"prune_arguments": {}}, "no size keeps all 88"),
        ({"max_shard_size": "big"}, "max_shard_size=big"),
        ({"max_shard_size": 0}, "max_shard_size=0"),
        ({"dtype": "int8"}, "dtype=int8"),
        ({"dtype": "float31"}, "dtype=float31"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    tiny_llama, tmp_path, arguments, word
):
    with pytest.raises(ValueError, match=word):
        export_pruned(str(tiny_llama), tmp_path / "out", **{**HALF, **arguments})
    assert list(tmp_path.iterdir()) == []


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
    export_pruned(str(tiny_llama), tmp_path / "a", **HALF)
    assert calls == []
    export_pruned(str(tiny_llama), tmp_path / "b", push_to_hub="r", **HALF)
    assert calls == [("create", "r"), ("upload", "me/r")]


def test_scores_of_the_same_neurons_are_exported_as_the_hub_reads_them(
    tiny_llama, tmp_path, capsys
):
    digest = load_pruned(str(tiny_llama), prune_percent=50).prune_record.digest
    configs = {
        name: {"dataset_path": place, "metric_list": [{"metric": "acc"}], **more}
        for name, place, more in (
            ("gpqa", "Idavidrein/gpqa", {"dataset_name": "gpqa_diamond"}),
            ("local", "json", {}),
        )
    }
    tasks = {name: {"acc,none": [1, 0, 1, 0]} for name in configs}
    repaired = {"repair": "least_squares", "calibration": {"sha256": "ab"}}
    for name, found in ((digest, {}), ("another", {}), ("repaired", repaired)):
        left = name if name == "another" else digest
        pruned = {"kept_digest": left, **found}
        write_run(tmp_path / name, tasks, pruning=pruned, configs=configs)
    command = ["prune", "--model_args", f"pretrained={tiny_llama}"]
    command += ["--prune_percent", "50", "--output_path", str(tmp_path / "out")]
    command += ["--recipe", "study"]
    for wrong in ("another", "repaired"):
        assert main([*command, "--results", str(tmp_path / wrong)]) == 2
        assert "of other neurons or another repair" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, "--results", str(tmp_path / digest)]) == 0
    text = (tmp_path / "out" / ".eval_results" / "lm_eval.yaml").read_text()
    (entry,) = parse_eval_result_entries(yaml.safe_load(text))
    assert (entry.dataset_id, entry.task_id) == ("Idavidrein/gpqa", "gpqa_diamond")
    assert entry.value == 0.5
    assert entry.notes == ("lm-evaluation-harness, gpqa: acc,none, 0-shot, 4 documents")


def test_command(tiny_llama, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["prune", "--model_args", f"pretrained={tiny_llama}"]
    command += ["--output_path", str(out)]
    assert main([*command, "--prune_percent", "50", "--multiple_of", "8"]) == 0
    printed = capsys.readouterr().out
    assert "kept digest" in printed and str(out) in printed
    assert config_of(out)["intermediate_size"] == 40
    assert main([*command, "--ratio", "2"]) == 2
    assert "is not an empty folder" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hf_scores_the_export_like_pruned_hf_scores_the_source(
    tiny_llama_sharded, tmp_path, dtype
):
    """The source is stored in float32."""
    output, more = tmp_path / "out", f"dtype={dtype}"
    export = export_pruned(str(tiny_llama_sharded), output, **HALF)
    exported, _ = evaluations.evaluate("hf", f"pretrained={output},{more}")
    pruned, config = evaluations.evaluate(
        "pruned-hf", f"pretrained={tiny_llama_sharded},ratio=2,{more}"
    )
    assert exported == pruned
    assert config["pruning"]["kept_digest"] == export.record.digest


@pytest.mark.slow
def test_the_real_model_through_both_commands(real_model, tmp_path):
    output = tmp_path / "out"
    prune = ["lm-eval-pruned", "prune", "--model_args", f"pretrained={real_model}"]
    prune += ["--prune_percent", "40", "--output_path", str(output)]
    prune += ["--recipe", "study"]
    evaluations.run([*prune, "--max_shard_size", "100MB"], tmp_path, check=True)
    assert len(list(output.glob("*.safetensors"))) > 1
    answers = []
    for model, model_args in (
        ("hf", f"pretrained={output}"),
        ("pruned-hf", f"pretrained={real_model},prune_percent=40"),
    ):
        command = evaluations.command(model, model_args, tmp_path / model, limit=10)
        evaluations.run(command, tmp_path, check=True)
        scores, config = evaluations.read(tmp_path / model)
        answers.append(scores)
    assert answers[0] == answers[1]
    assert config["pruning"]["kept_digest"] in (output / "README.md").read_text()


_WATCHED = """
import json, sys, threading
from pathlib import Path
import torch
from lm_eval_pruned import load_pruned

warm_up, source, dtype = sys.argv[1:]
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
mlps = sum(p.numel() for n, p in model.named_parameters() if ".mlp." in n)
everything = sum(p.nbytes for p in model.parameters())
print(json.dumps({"peak": loaded, "kept": 2 * mlps, "model": everything}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_load_takes_memory_for_what_is_kept(tiny_llama, tmp_path, dtype):
    """What lies in the mapped file takes none; converting takes a copy."""
    sizes = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 6}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128}
    folder = checkpoints.save_tiny(tmp_path / "in", dtype=torch.bfloat16, **sizes)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    command = [sys.executable, "-c", _WATCHED, tiny_llama, folder, dtype]
    done = evaluations.run(command, tmp_path, timeout=600, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    allowed = found["kept"] + (0 if dtype is None else found["model"])
    assert size > 1.8 * found["kept"]
    # Of one weight, there may be a copy while it is scored or converted.
    assert found["peak"] < allowed + 4 * 1024 * 8192


@pytest.mark.slow
def test_a_gguf_file(tmp_path):
    if why := checkpoints.real_model_missing():
        pytest.skip(why)
    gguf, out = _packaged_gguf(), tmp_path / "out"
    more = {"gguf_file": gguf.name, "prune_arguments": {"prune_percent": 40}}
    export_pruned(str(gguf.parent), out, **more)
    opened = AutoModelForCausalLM.from_pretrained(out)
    assert opened.config.intermediate_size == 922
    assert getattr(opened.config, "quantization_config", None) is None
    AutoTokenizer.from_pretrained(out)
