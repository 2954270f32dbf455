"""What docs/evaluating.md promises."""

from __future__ import annotations

import csv
import json
import logging
import shutil

import pytest
import torch
from lm_eval.api.registry import get_model

from lm_eval_pruned import load_pruned, prune_model
from tests.contract.commands import compared, lm_eval, pruned, results_in
from tests.helpers import checkpoints
from tests.helpers.ways_to_load import assert_same_model
from tests.sweeps.conftest import quick  # noqa: F401


with (checkpoints.DATA / "architectures.csv").open(encoding="utf-8") as file:
    ARCHITECTURES = list(csv.DictReader(file))
PROBES = ("pruned_probe_knowledge", "pruned_probe_instructions")
STUDY = sorted({row["base_model"] for row in ARCHITECTURES})


def planned(folder, *words):
    """Return the rows of ``plan``."""
    source = ("--model_args", f"pretrained={folder}", "--format", "json")
    return json.loads(pruned("plan", *source, *words).out)


def test_half_of_the_ratio_of_llama_has_the_width_and_the_parameters_of_the_page():
    (row,) = planned("meta-llama/Llama-3.2-1B", "--ratios", "2.0")
    assert (row["intermediate_size"], row["parameters"]) == (4096, 833_161_216)


@pytest.mark.parametrize("model", STUDY)
def test_the_study_s_architectures_come_out_exactly(model):
    rows = [row for row in ARCHITECTURES if row["base_model"] == model]
    percents = [row["prune_percent"] for row in rows]
    baseline, *cut = planned(model, "--prune_percents", 0, *percents)
    assert baseline["intermediate_size"] == int(rows[0]["intermediate_size_before"])
    assert baseline["parameters"] == int(rows[0]["parameters_before"])
    assert baseline["reduction"] == 0
    for ours, theirs in zip(cut, rows, strict=True):
        width, parameters = ours["intermediate_size"], ours["parameters"]
        assert width == int(theirs["intermediate_size_after"])
        assert parameters == int(theirs["parameters_after"])
        assert ours["checkpoint_bytes"] == 2 * parameters
        assert ours["expansion_ratio"] == width / int(theirs["hidden_size"])


def test_sizes_are_compared_before_any_weights_are_loaded(tiny_llama, tmp_path):
    shutil.copy(tiny_llama / "config.json", tmp_path)
    assert planned(tmp_path, "--ratios", 2, 1) == planned(tiny_llama, "--ratios", 2, 1)


def test_two_runs_with_equal_digests_evaluated_the_same_neurons(tiny_llama):
    sizes = {"prune_percent": 50}, {"intermediate_size": 44}, {"ratio": 1}
    one, same, other = (load_pruned(str(tiny_llama), **size) for size in sizes)
    assert one.prune_record.digest == same.prune_record.digest
    weights = same.state_dict()
    assert all(torch.equal(w, weights[name]) for name, w in one.state_dict().items())
    assert one.prune_record.digest != other.prune_record.digest


def test_without_a_size_the_unpruned_model_is_loaded(tiny_llama):
    record = load_pruned(str(tiny_llama)).prune_record
    assert record.parameters_after == record.parameters_before
    assert record.digest is None


def test_before_the_scores_a_run_logs_what_was_done_to_the_model(tiny_llama, caplog):
    with caplog.at_level(logging.INFO, "lm_eval"):
        lm = get_model("pruned-hf")(str(tiny_llama), ratio=2, device="cpu")
    record = lm.model.prune_record
    for row in (
        "|expansion ratio  |        2.7500|        2.0000|",
        "|intermediate size|            88|            64|",
        f"ratio=2, criterion=maw, 3 layers, kept digest {record.digest[:12]}",
    ):
        assert row in caplog.text
    # The results file has the same record.
    assert lm.get_model_info()["pruning"] == record.as_dict()


def test_commands_take_arguments_in_model_args_or_as_options(tiny_llama, tmp_path):
    model = f"pretrained={tiny_llama}"
    in_model_args = planned(f"{tiny_llama},ratio=2,layers=0+2,criterion=l2")
    options = ("--layers", "0+2", "--criterion", "l2")
    assert planned(tiny_llama, "--ratios", 2, *options) == in_model_args
    expected = load_pruned(str(tiny_llama), ratio=2, layers="0+2", criterion="l2")
    command = ["prune", "--model_args", f"{model},ratio=2", "recipe=study", *options]
    done = pruned(*command, "--output_path", tmp_path / "out")
    assert expected.prune_record.digest[:12] in done.out
    said = pruned("plan", "--model_args", f"{model},ratio=2", "--ratios", 3).sentence
    assert "ratio was given twice" in said


@pytest.mark.parametrize(
    "sizes",
    [
        {"ratio": 2, "prune_percent": 40},
        {"intermediate_size": 9, "ratio": 2},
        {"widths": {0: 9}, "prune_percent": 40},
    ],
    ids=str,
)
def test_at_most_one_size_is_given(sizes, tiny_llama):
    with pytest.raises(ValueError, match="together") as error:
        load_pruned(str(tiny_llama), **sizes)
    assert all(name in str(error.value) for name in sizes)


def test_prune_model_gives_the_model_that_load_pruned_gives(tiny_llama):
    whole = checkpoints.tiny_model(checkpoints.tiny_config())
    assert prune_model(whole, prune_percent=40) is whole
    assert_same_model(whole, load_pruned(str(tiny_llama), prune_percent=40))


@pytest.mark.slow
def test_a_model_that_does_not_read_the_prompt_scores_the_floors_of_the_probes(
    tmp_path,
):
    """Whichever answer it prefers."""
    words = ["--model", "constant", "--model_args", "loglikelihood=first"]
    words += ["--tasks", ",".join(PROBES), "--include_path", checkpoints.ROOT / "tasks"]
    words += ["--output_path", tmp_path, "--log_samples"]
    assert lm_eval("run", *words).code == 0
    scores = [results_in(tmp_path)["results"][name] for name in PROBES]
    assert [score["acc,none"] for score in scores] == pytest.approx(
        [0.25, 0.273], abs=5e-4
    )
    sizes, levels = (800, 300), (5, 3)
    for name, size, count, score in zip(PROBES, sizes, levels, scores, strict=True):
        assert score["lift,none"] == pytest.approx(0, abs=1e-9)
        (file,) = tmp_path.rglob(f"samples_{name}_*.jsonl")
        docs = [
            json.loads(line)["doc"] for line in file.read_text("utf-8").splitlines()
        ]
        assert len(docs) == size
        assert len({doc["level"] for doc in docs}) == count
        assert all(doc["family"] for doc in docs)


@pytest.mark.parametrize(
    "limit", [12, pytest.param(None, marks=pytest.mark.slow)], ids=str
)
def test_a_comparison_shows_the_exact_floors_of_the_probes(tiny_llama, limit, tmp_path):
    """Also of few prompts, on which models that know nothing guess more or less by luck."""
    words = ["--model_args", f"pretrained={tiny_llama}", "--prune_percents", 20]
    words += ["--tasks", *PROBES, "--include_path", checkpoints.ROOT / "tasks"]
    words += ["--limit", limit] if limit else []
    assert pruned("sweep", *words, "--output_path", tmp_path / "sweep").code == 0
    told = compared(tmp_path / "sweep")
    rows = {(row["task"], row["metric"]): row["floor"] for row in told["rows"]}
    floors = {
        key: (floor["floor_name"], floor["floor"])
        for key, floor in rows.items()
        if floor
    }
    of_acc, of_lift = (
        [floors[name, metric] for name in PROBES]
        for metric in ("acc,none", "lift,none")
    )
    # A block counts once, and there are 200 blocks of 800 prompts and 82 of 300.
    assert of_acc == [("exact", 200 / 800), ("exact", pytest.approx(82 / 300))]
    assert of_lift == [("exact", 0)] * 2
