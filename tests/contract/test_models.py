"""docs/models.md: which models are pruned, how they are loaded, and what an export is."""

from __future__ import annotations

import json
import re
import resource
import shutil
import sys

import pytest
import torch
from lm_eval.api.registry import get_model
from lm_eval.utils import simple_parse_args_string
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from lm_eval_pruned import load_pruned
from tests.contract.commands import lm_eval, pruned
from tests.helpers import evaluations, layouts
from tests.helpers.checkpoints import (
    edit_config,
    edit_weights,
    save_tiny,
    tiny_config,
    tiny_model,
)
from tests.helpers.hub import running_hub, uploaded
from tests.helpers.made_tasks import write_made_tasks


def prune(source, output, *words):
    """Run ``lm-eval-pruned prune``, by default with the cut of the study."""
    command = ["prune", "--model_args", f"pretrained={source}", "--output_path", output]
    return pruned(*command, *words)


MLP = "model.layers.1.mlp.up_proj.weight"
BIAS = "model.layers.1.mlp.up_proj.bias"
STUDY = ("--prune_percent", 40, "--recipe", "study")


def test_experts_whose_width_the_grouped_product_refuses_run_one_by_one(tmp_path):
    """Before the cut, too, where the export measures what it costs."""
    source, widths = tmp_path / "source", tmp_path / "widths.json"
    save_tiny(source, "deepseek_v3", **layouts.overrides("deepseek_v3", 35))
    widths.write_text(json.dumps({"1": 20}))
    words = ("--widths", widths, "--recipe", "study", "--check")
    done = prune(source, tmp_path / "out", *words)
    assert done.code == 0, done.err
    assert "loss, nats per token" in done.out


def test_a_teacher_whose_experts_the_grouped_product_refuses_runs_them_one_by_one(
    tmp_path,
):
    source, texts = tmp_path / "source", tmp_path / "texts.jsonl"
    save_tiny(source, "deepseek_v3", **layouts.overrides("deepseek_v3", 35))
    texts.write_text(json.dumps({"text": "one two three four " * 4}))
    words = ("--model_args", f"pretrained={source}", "intermediate_size=20")
    words += ("--teacher_weight", 0.5, "--max_steps", 1, "--max_length", 32)
    words += ("--training_args", "use_cpu=true", "--output_path", tmp_path / "out")
    done = pruned("heal", "--data", texts, *words)
    assert done.code == 0, done.err


@pytest.fixture
def small_files():
    """Let this process write no file above 20 kB, as where a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_export_that_is_killed_leaves_a_folder_that_the_next_one_removes(
    tiny_llama, tmp_path
):
    left = tmp_path / ".out.unfinished-abc"
    (left / "out").mkdir(parents=True)
    (left / "out" / "model.safetensors").write_text("half")
    (left / "lock").touch()
    assert prune(tiny_llama, tmp_path / "out", *STUDY).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_fills_up_ends_in_one_sentence(tiny_llama, tmp_path, small_files):
    said = prune(tiny_llama, tmp_path / "out", *STUDY).sentence
    assert "The weights cannot be written to" in said and "make room" in said
    assert not [*tmp_path.iterdir()]


def test_a_disk_that_is_too_full_is_refused_before_the_load_with_bytes_needed_and_free(
    tmp_path,
):
    """No disk holds this model, of which there is only a config."""
    width = 2**30
    sizes = {"hidden_size": 2**20, "intermediate_size": width}
    tiny_config(**sizes).save_pretrained(tmp_path / "bare")
    more = ("--prune_percent", 50, "--recipe", "study")
    source = f"{tmp_path / 'bare'},dtype=bfloat16"
    said = prune(source, tmp_path / "out", *more).sentence
    with torch.device("meta"):
        cut = tiny_config(**sizes | {"intermediate_size": width // 2})
        pruned_model = AutoModelForCausalLM.from_config(cut)
    needed, free = re.findall(r"([\d,]+)(?: bytes| are free)", said)
    assert int(needed.replace(",", "")) == 2 * pruned_model.num_parameters()
    assert 0 < int(free.replace(",", "")) < shutil.disk_usage(tmp_path).total
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]


@pytest.mark.slow
def test_push_to_hub_uploads_what_was_written(tiny_llama, tmp_path):
    out = tmp_path / "out"
    words = ["prune", "--model_args", f"pretrained={tiny_llama}", *STUDY]
    words += ["--output_path", out, "--push_to_hub", "me/model-40"]
    command = [sys.executable, "-m", "lm_eval_pruned.cli", *map(str, words)]
    with running_hub("me/model-40") as (variables, sent):
        evaluations.run(command, check=True, **variables)
    files = {path for path in out.rglob("*") if path.is_file()}
    written = {str(file.relative_to(out)): file.read_bytes() for file in files}
    assert uploaded(sent, "me/model-40") == written


#: What each command that writes to a folder needs beside it, with a model that does not exist.
NOWHERE = ("--model_args", "pretrained=/nowhere")
WRITING = {
    "prune": (*NOWHERE, *STUDY),
    "heal": (*NOWHERE, "--data", "texts.jsonl"),
    "sweep": (*NOWHERE, "--tasks", "boolq", "--ratios", 2),
    "study": ("/nowhere",),
    "sensitivity": NOWHERE,
    "profile": (*NOWHERE, "--ratios", 2),
    "verdict": ("hf,pretrained=/nowhere", "hf,pretrained=/nowhere"),
    "report": ("nowhere",),
}


@pytest.mark.parametrize("command", WRITING)
def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_looked_for(
    command, tmp_path
):
    (tmp_path / "file").touch()
    words = ("--output_path", tmp_path / "file" / "out")
    done = pruned(command, *WRITING[command], *words)
    assert "out cannot be written" in done.sentence
    assert "Not a directory" in done.sentence


def test_a_folder_that_the_file_of_a_sweep_names_is_tried_too(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "sweep.yaml").write_text(
        f"model_args: pretrained=/nowhere\noutput_path: {tmp_path}/file/out\n"
        "tasks: [boolq]\nratios: [2]\n"
    )
    done = pruned("sweep", "--config", tmp_path / "sweep.yaml")
    assert "out cannot be written" in done.sentence


def test_the_model_card_has_the_size_of_the_weights_and_the_next_command(tmp_path):
    source, out = save_tiny(tmp_path / "A-Base"), tmp_path / "out"
    assert prune(source, out, *STUDY, "--max_shard_size", "100KB").code == 0
    sizes = [path.stat().st_size for path in out.glob("*.safetensors")]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert len(sizes) > 1
    assert f"The weights are {sum(sizes):,} bytes in {len(sizes)} files." in card
    command = "lm-eval-pruned verdict pruned-hf,pretrained=A-Base pruned-hf,pretrained="
    assert command in card
    assert str(tmp_path) not in card


def test_a_folder_without_a_tokenizer_is_told_once_a_line(tmp_path, caplog):
    """The recipe in one line, and that nothing was measured in another."""
    source = save_tiny(tmp_path / "source")
    for path in source.glob("*token*"):
        path.unlink()
    done = prune(source, tmp_path / "out", "--prune_percent", 40)
    assert done.code == 0
    lines = [*done.err.splitlines(), *caplog.messages]
    told = [line for line in lines if "tokenizer" in line]
    assert len(told) == 2, told
    why = "recipe=fast was chosen, because calibration text needs a tokenizer, and no"
    assert told[0].startswith(why)
    assert told[1].startswith(
        "The cost of the cut was not measured: no tokenizer can be"
    )


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("config.json", "config.json"),
        ("*.safetensors", "weights"),
        ("model-00002*", "model-00002-of-00012.safetensors"),
    ],
)
def test_a_damaged_checkpoint_fails_with_one_sentence_that_names_the_file(
    pattern, named, tmp_path, tiny_llama_sharded
):
    source = tmp_path / "source"
    shutil.copytree(tiny_llama_sharded, source)
    paths = [*source.glob(pattern)]
    if named == "weights":
        paths.append(source / "model.safetensors.index.json")
    for path in paths:
        path.unlink()
    said = prune(source, tmp_path / "out", *STUDY).sentence
    assert f"source is a folder without {named}: pass the folder of a" in said
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.slow
def test_the_scores_of_an_export_are_those_of_the_source_pruned(tiny_llama, tmp_path):
    """Each log-likelihood, to the last digit, where prefixes and slots are not shared."""
    made, out = write_made_tasks(tmp_path / "tasks"), tmp_path / "out"
    assert prune(tiny_llama, out, *STUDY).code == 0
    cut = "prune_percent=40,prefix_sharing=false,slot_refilling=false"
    models = {"hf": f"pretrained={out}", "pruned-hf": f"pretrained={tiny_llama},{cut}"}
    scores = {}
    for model, arguments in models.items():
        words = ("--model", model, "--model_args", arguments, "--device", "cpu")
        where = ("--include_path", made, "--output_path", tmp_path / model)
        done = lm_eval(*words, "--tasks", "tiny_choice", "--log_samples", *where)
        assert done.code == 0, done.err
        (samples,) = (tmp_path / model).rglob("samples_tiny_choice_*.jsonl")
        rows = map(json.loads, samples.read_text(encoding="utf-8").splitlines())
        scores[model] = {row["doc_id"]: row["resps"] for row in rows}
    assert len(scores["hf"]) == 6 and scores["hf"] == scores["pruned-hf"]


def test_an_export_holds_config_tokenizer_generation_config_and_licence_of_its_source(
    tmp_path,
):
    source, out = save_tiny(tmp_path / "source"), tmp_path / "out"
    (source / "LICENSE").write_text("terms")
    edit_config(source, a_key_nobody_knows=1)
    assert prune(source, out, *STUDY).code == 0
    for name in ("tokenizer.json", "LICENSE", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (source, out)
    )
    assert (before.pop("intermediate_size"), after.pop("intermediate_size")) == (88, 53)
    assert after == before


@pytest.mark.slow
def test_weights_keep_their_dtype_unless_dtype_converts_them(tmp_path):
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    for asked, expected in (("", "BF16"), ("float16", "F16")):
        out = tmp_path / f"out{asked}"
        words = [f"dtype={asked}"] if asked else []
        command = ["prune", "--model_args", f"pretrained={source}", *words]
        assert pruned(*command, "--output_path", out, *STUDY).code == 0
        with safe_open(out / "model.safetensors", "pt") as file:
            found = {file.get_slice(name).get_dtype() for name in file.keys()}
        assert found == {expected}


def test_a_checkpoint_that_is_already_quantised_is_refused(tmp_path):
    source = save_tiny(tmp_path / "source")
    edit_config(source, quantization_config={"quant_method": "gptq", "bits": 4})
    said = prune(source, tmp_path / "out", *STUDY).sentence
    assert "quantised already (quant_method=gptq)" in said


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "model.norm.weight"),
        (lambda tensors: tensors.update({MLP: torch.ones(9, 32)}), MLP),
        (lambda tensors: tensors.update({BIAS: torch.ones(88)}), BIAS),
    ],
)
def test_a_tensor_that_is_missing_or_does_not_fit_the_config_is_refused(
    damage, named, tmp_path
):
    source = save_tiny(tmp_path / "source")
    edit_weights(source, damage)
    assert named in prune(source, tmp_path / "out", *STUDY).sentence


def test_fewer_layers_than_the_checkpoint_has_are_refused(tmp_path):
    source = save_tiny(tmp_path / "source")
    edit_config(source, num_hidden_layers=2)
    assert "layers.2" in prune(source, tmp_path / "out", *STUDY).sentence


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_garbage_in_a_json_file_is_one_sentence(file, tmp_path, tiny_llama_sharded):
    source = tmp_path / "source"
    shutil.copytree(tiny_llama_sharded, source)
    (source / file).write_text("{]")
    assert str(source) in prune(source, tmp_path / "out", *STUDY).sentence


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("prune_precent=40", "did you mean prune_percent"),
        ("trust_remote_code=off", "trust_remote_code='off'"),
        ("dtype=abc", "dtype=abc"),
    ],
)
def test_a_mistyped_argument_is_one_sentence_with_the_argument(
    argument, message, tiny_llama, tmp_path
):
    command = ["prune", "--model_args", f"pretrained={tiny_llama}", argument]
    done = pruned(*command, "--output_path", tmp_path / "out", *STUDY)
    assert message in done.sentence


def test_a_mistyped_argument_of_load_pruned_names_what_was_probably_meant(tiny_llama):
    said = r"prune_percnt=30 is not understood: .*; did you mean prune_percent\?$"
    with pytest.raises(ValueError, match=said):
        load_pruned(str(tiny_llama), prune_percnt=30)


@pytest.mark.parametrize("command", ["heal", "profile", "sensitivity", "study"])
def test_a_mistyped_dtype_is_one_sentence_of_each_command(
    command, tiny_llama, tmp_path
):
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "one two three four " * 4}))
    which = {"heal": ("--data", texts), "profile": ("--ratios", 1)}
    which["study"] = (tiny_llama, "--dry_run")
    words = ["--model_args", "dtype=flaot16", "--output_path", tmp_path / "out"]
    if command != "study":
        words.insert(1, f"pretrained={tiny_llama}")
    said = pruned(command, *which.get(command, ()), *words).sentence
    assert "dtype=flaot16 is not understood: pass a dtype such as bfloat16." in said


@pytest.mark.parametrize("dtype", ["flaot16", "nn", "int8", 16, torch.int8])
def test_a_dtype_that_weights_cannot_have_is_refused_by_name(dtype, tiny_llama):
    said = f"dtype={dtype} is not understood: pass a dtype such as bfloat16"
    with pytest.raises(ValueError, match=re.escape(said)):
        load_pruned(str(tiny_llama), prune_percent=40, dtype=dtype)


@pytest.mark.parametrize(
    ("argument", "works"),
    [
        ("device=0", "pass one such as cpu, or cuda:0"),
        ("batch_size=0", "pass a whole number of 1 or more, auto or auto:4"),
        ("dtype=abc", "pass a dtype such as bfloat16"),
        ("backend=abc", "pass default, causal or seq2seq"),
        ("trust_remote_code=off", "pass true or false"),
        ("energy=off", "pass true or false"),
    ],
)
def test_a_value_that_cannot_be_used_is_one_sentence_with_the_argument(
    argument, works, tiny_llama
):
    given = {"pretrained": str(tiny_llama), "prune_percent": 40, "device": "cpu"}
    given |= simple_parse_args_string(argument)
    load = get_model("pruned-hf")
    with pytest.raises(ValueError, match=works) as error:
        load(**given)
    said = str(error.value)
    assert said.startswith(argument.partition("=")[0] + "=") and "\n" not in said


@pytest.mark.parametrize(
    ("trained_on", "advice"),
    [(88, "or peft_stage=before"), (40, "or intermediate_size=40")],
)
def test_an_adapter_of_another_width_is_refused_before_weights_are_read(
    trained_on, advice, tmp_path
):
    adapter, source = tmp_path / "adapter", save_tiny(tmp_path / "source")
    model = tiny_model(tiny_config(intermediate_size=trained_on))
    config = LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"])
    get_peft_model(model, config).save_pretrained(adapter)
    (source / "model.safetensors").write_bytes(b"no weights")
    load, said = get_model("pruned-hf"), f"{trained_on} neurons, but .* 53 .*{advice}"
    with pytest.raises(ValueError, match=said):
        load(str(source), prune_percent=40, peft=str(adapter), device="cpu")
