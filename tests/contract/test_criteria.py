"""What docs/criteria.md promises."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_pruned import load_pruned
from tests.contract.commands import lm_eval, pruned, results_in
from tests.helpers.by_hand import FORMULAS, FORMULAS_OF_ACTIVITY, top
from tests.helpers.checkpoints import ROOT, edit_weights, save_tiny
from tests.helpers.layouts import save_family


TEXTS = ["One two three four five six. " * 6, "A model is cut and asked again. " * 6]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": each}) + "\n" for each in TEXTS]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def digest(folder, **asked) -> str:
    return load_pruned(str(folder), prune_percent=40, **asked).prune_record.digest


def test_the_neurons_with_the_highest_scores_stay_in_their_order_and_ties_go_to_the_lower(
    tmp_path,
):
    folder = save_tiny(tmp_path, num_hidden_layers=1)
    gate = torch.zeros(88, 32)
    gate[5], gate[80], gate[20:25] = 3.0, 4.0, 1.0

    def change(tensors):
        mlp = "model.layers.0.mlp."
        tensors[f"{mlp}gate_proj.weight"] = gate
        tensors[f"{mlp}up_proj.weight"] = gate.clone()

    edit_weights(folder, change)
    model = load_pruned(str(folder), intermediate_size=4)
    assert [each.tolist() for each in model.prune_record.kept] == [[5, 20, 21, 80]]
    assert model.model.layers[0].mlp.gate_proj.weight.equal(gate[[5, 20, 21, 80]])


PAGE = (ROOT / "docs" / "criteria.md").read_text("utf-8")
TABLES = re.findall(r"(?m)^\| `(\w+)` (?:\(.*?\) )?\|", PAGE)


def test_the_tables_list_the_criteria():
    assert [*FORMULAS, "random", *reversed(FORMULAS_OF_ACTIVITY)] == TABLES


@pytest.fixture(scope="module")
def stock(tiny_llama):
    """By layer: gate, up and down in float64, and what goes into down, text by text."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    layers = []
    for layer in model.model.layers:
        mlp, seen = layer.mlp, []
        mlp.down_proj.register_forward_pre_hook(
            lambda _, inputs, seen=seen: seen.append(inputs[0][0].double().numpy())
        )
        rows = (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T)
        layers.append([*(row.detach().double().numpy() for row in rows), seen])
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    with torch.no_grad():
        for line in TEXTS:
            model(tokenizer(line, return_tensors="pt")["input_ids"])
    return layers


@pytest.mark.parametrize("name", [*FORMULAS, *FORMULAS_OF_ACTIVITY])
def test_the_neurons_that_stay_are_those_of_the_formula(name, stock, tiny_llama, text):
    of_activity = name in FORMULAS_OF_ACTIVITY
    given = {"calibration": text} if of_activity else {}
    model = load_pruned(str(tiny_llama), ratio=1, criterion=name, **given)
    for kept, (*rows, seen) in zip(model.prune_record.kept, stock, strict=True):
        if of_activity:
            scores = FORMULAS_OF_ACTIVITY[name](*rows, seen)
        else:
            scores = FORMULAS[name](*rows[:2])
        assert kept.equal(top(scores.tolist(), 32))


def test_criteria_look_at_the_stored_weights_whatever_dtype_the_model_is_loaded_in(
    tiny_llama,
):
    for criterion in ("maw", "l2"):
        asked = {"criterion": criterion}
        assert digest(tiny_llama, dtype="bfloat16", **asked) == digest(
            tiny_llama, **asked
        )


def test_ppm_is_an_alias_of_maw(tiny_llama):
    assert digest(tiny_llama, criterion="ppm") == digest(tiny_llama, criterion="maw")


def test_a_random_order_is_fixed_by_seed_and_layer(tiny_llama):
    first, again, other = (
        load_pruned(str(tiny_llama), ratio=1, criterion="random", seed=seed)
        for seed in (0, 0, 1)
    )
    kept, same, another = (
        [each.tolist() for each in model.prune_record.kept]
        for model in (first, again, other)
    )
    assert kept == same and kept != another
    assert kept[0] != kept[1]


def test_experts_in_one_tensor_are_refused_by_act_and_accepted_by_obs(tmp_path, text):
    save_family(tmp_path / "mixtral", "mixtral", 64)
    given = [
        "--model_args",
        f"pretrained={tmp_path / 'mixtral'}",
        "--calibration",
        text,
    ]
    given += ["--prune_percent", 40, "--criterion"]
    refused = pruned("prune", *given, "act", "--output_path", tmp_path / "one")
    assert "stacked with others" in refused.sentence
    asked = {"criterion": "obs", "repair": "least_squares", "calibration": text}
    assert digest(tmp_path / "mixtral", **asked)


def test_a_model_with_an_encoder_is_refused(tmp_path, text):
    save_family(tmp_path / "t5", "t5", 40)
    given = ["--model_args", f"pretrained={tmp_path / 't5'}", "--criterion", "act"]
    given += ["--calibration", text, "--prune_percent", 40]
    refused = pruned("prune", *given, "--output_path", tmp_path / "out")
    assert "has an encoder" in refused.sentence


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{", "is not a JSON object"),
        ('{"text": 1}', "is not a JSON object"),
        ("", "holds 0 texts"),
    ],
)
def test_each_line_is_an_object_with_text_or_messages(line, word, tiny_llama, tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text(line)
    with pytest.raises(ValueError, match=word):
        digest(tiny_llama, criterion="act", calibration=str(file))


def test_a_chat_is_formatted_by_the_chat_template(tiny_llama, tmp_path):
    file = tmp_path / "chats.jsonl"
    chat = {"messages": [{"role": "user", "content": "Hello there."}]}
    file.write_text(json.dumps(chat))
    asked = {"criterion": "act", "calibration": str(file)}
    model = load_pruned(str(tiny_llama), ratio=1, **asked)
    # The template adds to what the user says.
    found = model.prune_record.as_dict()["calibration"]
    assert found["tokens"] > len("Hello there.")


@pytest.mark.parametrize(("positions", "tokens"), [(512, 512), (4096, 2048)])
def test_calibration_samples_uses_the_first_and_a_text_is_cut_after_2048_tokens_or_the_model(
    positions, tokens, tmp_path
):
    folder = save_tiny(tmp_path, num_hidden_layers=1, max_position_embeddings=positions)
    file = tmp_path / "text.jsonl"
    texts = ["short", "x" * 3000, "never read"]
    file.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    asked = {"criterion": "act", "calibration": str(file), "calibration_samples": 2}
    found = load_pruned(str(folder), ratio=1, **asked).prune_record.as_dict()
    calibration = found["calibration"]
    assert (calibration["texts"], calibration["tokens"]) == (2, len("short") + tokens)


def calibration_of(folder, source, **more):
    asked = {"ratio": 1, "criterion": "act", "calibration": source}
    return load_pruned(str(folder), **asked, **more).prune_record.as_dict()[
        "calibration"
    ]


def test_a_dataset_is_read_until_there_are_enough_tokens(tiny_llama, text, tmp_path):
    rows = tmp_path / "rows" / "train.jsonl"
    rows.parent.mkdir()
    blank = json.dumps({"text": ""}) + "\n"
    rows.write_text(blank + Path(text).read_text("utf-8"))
    source = f"dataset:{rows.parent}"
    whole = calibration_of(tiny_llama, source)
    assert whole == calibration_of(tiny_llama, text) | {
        "file": source,
        "sha256": whole["sha256"],
    }
    part = calibration_of(tiny_llama, source, calibration_tokens=10)
    assert (part["texts"], part["tokens"]) == (1, len(TEXTS[0]))
    assert part["sha256"] != whole["sha256"]
    with pytest.raises(ValueError, match=f"holds {whole['texts']} texts, but 10 were"):
        calibration_of(tiny_llama, source, calibration_samples=10)


@pytest.mark.parametrize("rows", [None, '{"question": "Why?"}\n', '{"text": ""}\n'])
def test_a_dataset_that_cannot_be_read_is_refused_before_the_load(
    rows, tiny_llama, tmp_path
):
    bare = shutil.copytree(tiny_llama, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    if rows is not None:
        (tmp_path / "rows").mkdir()
        (tmp_path / "rows" / "train.jsonl").write_text(rows)
    with pytest.raises(ValueError, match=r"calibration=dataset:.*rows"):
        calibration_of(bare, f"dataset:{tmp_path / 'rows'}")


def test_the_unpruned_model_writes_as_many_tokens_drawn_with_the_seed(tiny_llama):
    more = {"calibration_tokens": 1000}
    first = calibration_of(tiny_llama, "self", **more)
    assert first["file"] == "self" and 1000 <= first["tokens"] < 1300
    assert calibration_of(tiny_llama, "self", **more) == first
    other = calibration_of(tiny_llama, "self", seed=1, **more)
    assert other["sha256"] != first["sha256"]


@pytest.mark.parametrize("device", ["nonsense:7", "cuda:99"])
def test_a_device_that_this_machine_does_not_have_is_refused_before_the_load(
    device, tiny_llama, tmp_path
):
    # Whoever read a weight would miss the file.
    bare = shutil.copytree(tiny_llama, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    said = f"device={device} is not a device of this machine"
    model = ["--model_args", f"pretrained={bare}", "--device", device]
    assert said in pruned("sensitivity", *model).sentence
    cut = ["--prune_percent", 40, "--output_path", tmp_path / "out"]
    assert said in pruned("prune", *model, *cut).sentence
    with pytest.raises(ValueError, match=said):
        load_pruned(str(bare), prune_percent=40, device=device)


@pytest.mark.slow
def test_the_results_file_records_the_text(tiny_llama, text, tmp_path):
    given = f"pretrained={tiny_llama},ratio=1,criterion=act,calibration={text}"
    done = lm_eval(
        *("--model", "pruned-hf", "--model_args", given, "--device", "cpu"),
        *(
            "--tasks",
            "pruned_demo_truthfulness",
            "--limit",
            1,
            "--output_path",
            tmp_path / "out",
        ),
    )
    assert done.code == 0, done.err
    found = results_in(tmp_path / "out")["config"]["pruning"]["calibration"]
    content = (tmp_path / "text.jsonl").read_bytes()
    assert found == {
        "file": "text.jsonl",
        "sha256": hashlib.sha256(content).hexdigest(),
        "texts": 2,
        "tokens": sum(map(len, TEXTS)),
    }


# What text says of a checkpoint is kept in XDG_CACHE_HOME/lm-eval-pruned/measured


@pytest.fixture
def measured(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lm-eval-pruned" / "measured"


def test_other_sizes_and_later_runs_read_what_text_says(tiny_llama, text, measured):
    asked = {"criterion": "act", "calibration": text}
    first = digest(tiny_llama, **asked)
    (file,) = measured.iterdir()
    written = file.stat().st_mtime_ns
    load_pruned(str(tiny_llama), prune_percent=20, dtype="bfloat16", **asked)
    assert digest(tiny_llama, **asked) == first
    assert [each.stat().st_mtime_ns for each in measured.iterdir()] == [written]


def test_the_folder_may_be_deleted(tiny_llama, text, measured):
    asked = {"criterion": "act", "calibration": text}
    first = digest(tiny_llama, **asked)
    shutil.rmtree(measured)
    assert digest(tiny_llama, **asked) == first
    assert len([*measured.iterdir()]) == 1


def test_other_text_and_another_checkpoint_are_measured(
    tiny_llama, text, measured, tmp_path
):
    asked = {"criterion": "act", "calibration": text}
    digest(tiny_llama, **asked)
    digest(tiny_llama, **asked, calibration_samples=1)
    digest(save_tiny(tmp_path / "other", seed=1), **asked)
    assert len([*measured.iterdir()]) == 3
