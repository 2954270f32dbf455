"""What `prune` prints of a cut: every figure is that of a computation by hand."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

import lm_eval_pruned
from lm_eval_pruned import load_pruned
from lm_eval_pruned.checkpoints import cost
from lm_eval_pruned.compare.claims import paired
from lm_eval_pruned.results.documents import Documents
from lm_eval_pruned.results.files import Run, Score
from tests.contract.commands import pruned
from tests.helpers.checkpoints import ROOT, edit_weights, save_tiny


HELD_TEXT = Path(lm_eval_pruned.__file__).parent / "checkpoints" / "held_text.jsonl"


@torch.no_grad()
def loss_by_hand(model, tokenizer) -> float:
    """Return the mean of -ln p over all tokens that have one before them, of 128 per text."""
    losses: list[float] = []
    for line in HELD_TEXT.read_text(encoding="utf-8").splitlines():
        ids = tokenizer(json.loads(line)["text"])["input_ids"][:128]
        logits = model(torch.tensor([ids])).logits[0].double()
        losses += [
            -float(log_softmax(logits[n - 1], -1)[ids[n]]) for n in range(1, len(ids))
        ]
    return sum(losses) / len(losses)


def figures(out: str) -> dict[str, float]:
    """Return the losses that `prune` printed, by the name of their column."""
    table = [line.split("|")[1:-1] for line in out.splitlines() if line[:1] == "|"]
    names = next(row for row in table if "unpruned" in str(row))
    (losses,) = (row for row in table if "loss, nats per token" in row[0])
    pairs = zip(names[1:], losses[1:], strict=True)
    return {name.strip(): float(loss) for name, loss in pairs}


def test_losses_are_those_of_the_model_the_export_and_a_random_cut_of_these_layers(
    tmp_path,
):
    # The first layer does least.
    source, out = save_tiny(tmp_path / "source"), tmp_path / "out"
    edit_weights(
        source,
        lambda tensors: tensors["model.layers.0.mlp.down_proj.weight"].mul_(0.01),
    )
    asked = {"prune_percent": 75, "layers": "1"}
    words = [word for name, v in asked.items() for word in (f"--{name}", v)]
    command = ["prune", "--model_args", f"pretrained={source}", "--output_path", out]
    done = pruned(*command, *words, "--criterion", "maw", "--check")
    tokenizer = AutoTokenizer.from_pretrained(source)
    by_hand = {
        "unpruned": AutoModelForCausalLM.from_pretrained(source),
        "pruned": load_pruned(str(out)),
        "random cut": load_pruned(str(source), criterion="random", **asked),
    }
    expected = {name: loss_by_hand(each, tokenizer) for name, each in by_hand.items()}
    # Three digits are printed, of float32 logits.
    assert figures(done.out) == pytest.approx(expected, abs=6e-4)
    everywhere = load_pruned(str(source), criterion="random", prune_percent=75)
    others = [*expected.values(), loss_by_hand(everywhere, tokenizer)]
    assert min(abs(a - b) for a in others for b in others if a != b) > 2e-3


def made(name: str, lifts: np.ndarray) -> Run:
    """Return made scores of a task whose floor is 0, in blocks of four."""
    task, metric = "pruned_probe_knowledge", "lift,none"
    keys = tuple((task, str(number), 0) for number in range(len(lifts)))
    blocks = tuple(str(number // 4) for number in range(len(lifts)))
    weights = np.ones(len(lifts))
    documents = Documents(keys, lifts, weights, blocks, "mean")
    scores = {(task, metric): Score(float(lifts.mean()), None, True, len(lifts))}
    declared = {"primary_metric": "lift", "floors": {"lift": 0}, "family": "knowledge"}
    run = Run(name, Path(name), scores, metadata={task: declared})
    run.documents[task] = {metric: documents}
    return run


def test_what_is_kept_is_fiellers_share_of_the_lift_by_block():
    rng, tokens = np.random.default_rng(0), np.full(32, 100)
    lifts = rng.normal(5, 3, size=200)
    of = {"unpruned": 1.0, "pruned": 0.6, "random cut": 0.1}
    measured = {
        name: cost.Quality(
            rng.normal(400 / share, 9, size=32),
            tokens,
            ("",) * 3,
            made(name, share * lifts + rng.normal(0, 0.2, size=200)),
        )
        for name, share in of.items()
    }
    (line,) = (e for e in cost.cost_table(measured).splitlines() if "knowledge" in e)
    label, unpruned, *kept = line.strip("|").split("|")
    assert (label, unpruned[:5]) == ("knowledge kept, 200 prompts", "lift ")
    for name, text in zip(("pruned", "random cut"), kept, strict=True):
        values = [
            measured[each].probed.documents["pruned_probe_knowledge"]["lift,none"]
            for each in ("unpruned", name)
        ]
        blocks = values[0].clusters
        share = paired(*(each.values for each in values), clusters=blocks).kept()
        assert text == share.text
        assert share.low < of[name] < share.high


def test_the_part_of_the_probes_is_of_whole_blocks():
    utils = runpy.run_path(str(ROOT / "tasks" / "probes" / "utils.py"))
    for task, count in cost.PROBES.items():
        load = utils[task.replace("pruned_probe", "load")]
        blocks = load()["test"]["block"]
        assert not {*blocks[:count]} & {*blocks[count:]}


def test_scoring_ties_no_weights_that_the_file_has_apart(tmp_path):
    source, out = save_tiny(tmp_path / "source"), tmp_path / "out"
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps(config | {"tie_word_embeddings": True})
    )
    done = pruned(
        *("prune", "--model_args", f"pretrained={source}", "--prune_percent", 50),
        *("--recipe", "study", "--output_path", out),
    )
    assert "knowledge kept" in done.out, done.err
    (before,) = source.glob("*.safetensors")
    (after,) = out.glob("*.safetensors")
    name = "lm_head.weight"
    assert torch.equal(load_file(before)[name], load_file(after)[name])
