"""The plan of a sweep: its configurations, its units, and what defines them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lm_eval_pruned.cli import main
from lm_eval_pruned.sweeps.plan import Sweep
from lm_eval_pruned.sweeps.run import run_sweep
from lm_eval_pruned.sweeps.tasks import fingerprint


def prints(options):
    """Return the fingerprint of each unit by its names."""
    sweep = Sweep(options)
    return {unit.names: fingerprint(sweep.definition(*unit)) for unit in sweep.units()}


def configured(options, **more):
    return Sweep({**options, **more}).configurations


def with_args(options, **more):
    return {**options, "model_args": {**options["model_args"], **more}}


@pytest.mark.parametrize(
    "change",
    [
        {"limit": 2.0},
        {"num_fewshot": 1},
        {"apply_chat_template": True},
        {"system_instruction": "Be brief."},
        {"gen_kwargs": {"max_gen_toks": 2}},
        {"seed": "7"},
        {"log_samples": False},
        {"metadata": {"answer": 1}},
        {"predict_only": True},
        {"samples": {"tiny_choice": [0]}},
        {"dtype": "bfloat16"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_decides_scores_changes_every_unit(options, change):
    here = with_args(options, **change) if "dtype" in change else {**options, **change}
    before, after = prints(options), prints(here)
    assert before.keys() == after.keys()
    assert not {*before.values()} & {*after.values()}


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": "8"},
        {"device": "cuda:1"},
        {"use_cache": "c"},
        {"ratios": ["1.50"]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_says_how_changes_no_unit(options, change):
    assert prints({**options, **change}) == prints(options)


def test_a_model_is_known_by_its_content(options, tiny_llama, tmp_path):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    here, before = with_args(options, pretrained=str(model)), prints(options)
    assert prints(here) == before
    (model / "checkpoint-500").mkdir()
    (model / "checkpoint-500" / "model.safetensors").touch()
    assert prints(here) == before
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (model / "model.safetensors").write_bytes(content)
    assert not {*prints(here).values()} & {*before.values()}


@pytest.mark.parametrize(
    ("name", "old", "new", "changed"),
    [
        ("choice.yaml", "version: 1.0", "version: 2.0", {"tiny_choice"}),
        ("utils.py", "import json", "import json  #", {"tiny_choice", "tiny_sentence"}),
        ("questions.jsonl", "even", "odd", {"tiny_choice", "tiny_sentence"}),
        ("both.yaml", "num_fewshot: 0", "num_fewshot: 2", {"tiny_sentence"}),
        ("README.md", "", "read me", set()),
    ],
)
def test_a_task_is_known_by_its_settings_code_and_data(
    options, tasks, tmp_path, name, old, new, changed
):
    copy = shutil.copytree(tasks, tmp_path / "tasks")
    text = (copy / name).read_text() if (copy / name).exists() else ""
    (copy / name).write_text(text.replace(old, new))
    before, after = prints(options), prints({**options, "include_path": str(copy)})
    assert {
        task for (_, task), print_ in before.items() if after[_, task] != print_
    } == changed


def test_text_for_calibration_is_known_by_its_content(options, tmp_path):
    text = tmp_path / "texts.jsonl"
    text.write_text('{"text": "one"}\n')
    asked = {**options, "criteria": ["act"]}
    before = prints(with_args(asked, calibration=str(text)))
    moved = text.rename(tmp_path / "moved.jsonl")
    assert prints(with_args(asked, calibration=str(moved))) == before
    moved.write_text('{"text": "another"}\n')
    after = prints(with_args(asked, calibration=str(moved)))
    assert {names[0] for names in before if before[names] != after[names]} == {
        "ratio-1.5_criterion-act"
    }


def test_files_of_widths_are_known_by_their_content(options, tmp_path):
    one, other = tmp_path / "1.5.json", tmp_path / "else" / "1.5.json"
    other.parent.mkdir()
    one.write_text('{"0": 60, "2": 41}')
    other.write_text("[10, 20, 30]")
    asked = {**options, "ratios": []}
    found = configured(asked, widths=[str(one), str(other), str(one)])
    assert [each.id.rpartition("-")[0] for each in found[1:]] == ["widths-1.5"] * 2
    assert [each.kept_width for each in found] == [88, 63, 20]
    moved = tmp_path / "moved.csv"
    defined = []
    for text in ("layer,width\n2,41\n0,60\n", "layer,width\n2,42\n0,60\n"):
        moved.write_text(text)
        defined.append({*prints({**asked, "widths": [str(moved)]}).values()})
    known = {*prints({**asked, "widths": [str(one)]}).values()}
    assert defined[0] == known != defined[1]


def test_configurations_multiply(options):
    more = {
        "criteria": ["ppm", "l2", "random"],
        "seeds": ["1", "2"],
        "drop_layers": ["1"],
    }
    found = configured(options, ratios=["2.75"], prune_percents=["0", "20.0"], **more)
    # The model's own size is the baseline.
    assert [each.id for each in found] == [
        "baseline",
        "prune_percent-20",
        "prune_percent-20_criterion-l2",
        "prune_percent-20_criterion-random_seed-1",
        "prune_percent-20_criterion-random_seed-2",
        "drop_layers-1",
    ]
    assert found[4].arguments == {"prune_percent": 20, "criterion": "random", "seed": 2}


def test_layers_that_are_left_alone_count_as_whole(options):
    baseline, cut = configured(with_args(options, layers="0"), ratios=["1"])
    assert baseline.parameters - cut.parameters == 3 * 32 * (88 - 32)


@pytest.mark.parametrize("parts", range(1, 9))
def test_shards_are_a_partition(options, parts):
    sweep = Sweep({**options, "ratios": ["2.5", "2", "1.5"]})
    shards = [sweep.units((part, parts)) for part in range(parts)]
    assert sorted(unit.names for shard in shards for unit in shard) == sorted(
        unit.names for unit in sweep.units()
    )
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    if parts == len(sweep.configurations):
        assert all(len({unit[0].id for unit in shard}) == 1 for shard in shards)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratios": ["4"]}, "ratio=4 is above the model's own expansion ratio 88/32"),
        ({"ratios": ["many"]}, "ratio=many"),
        ({"seeds": ["1"]}, "only the criterion random"),
        ({"criteria": ["random"], "seeds": ["-1"]}, "seed=-1"),
        ({"model": "hf"}, "model=hf"),
        ({"tasks": ["no_such_task"]}, "no_such_task"),
        ({"include_path": "/no/such/folder"}, "not a folder"),
        ({"seed": "one"}, "'one'"),
        ({"model_args": {"pretrained": "x", "ratio": 2}}, "use --ratios"),
        ({"tasks": ["tiny_both", "tiny_sentence"]}, "asked for twice"),
        ({"fewshot_as_multiturn": True}, "apply_chat_template"),
        ({"more": {"prune_precent": 3}}, "did you mean --prune_percents"),
        ({"more": {"multipleof": 8}}, "did you mean multiple_of"),
        ({"more": {"n_layers": 2}}, "n_layers=2"),
        (
            {"more": {"skip_layers": 1}, "widths": ["a.json"]},
            "skip_layers=1 and widths",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_refused_before_anything_runs(
    options, change, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("a.json").write_text("[10]")
    here = with_args({**options, **change}, **change.get("more", {}))
    here["model_args"] = change.get("model_args", here["model_args"])
    with pytest.raises(ValueError, match=message):
        run_sweep(here)
    assert not Path(options["output_path"]).exists()


def test_a_setting_of_the_config_is_an_argument(options, tiny_llama, tmp_path):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "n_layers": 3}))
    Sweep(with_args(options, pretrained=str(model), n_layers=2))


def test_the_command_prints_the_plan_and_writes_nothing(options, tmp_path, capsys):
    file = tmp_path / "sweep.yaml"
    file.write_text(json.dumps({**options, "ratios": [2.0]}))
    words = ["sweep", "--config", str(file), "--ratios", "1.5"]
    assert main([*words, "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "|baseline|88|2.7500|51,424|0.00%|0|0|2|" in out
    assert "|ratio-1.5|48|1.5000|39,904|22.40%|0|0|2|" in out
    assert "Units: 4, 0 done, 0 failed, 4 to run" in out
    assert not Path(options["output_path"]).exists()
    assert main([*words, "--shard", "2/2"]) == 2
