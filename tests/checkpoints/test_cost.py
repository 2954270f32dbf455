"""What `prune` prints of a cut: every figure is that of a computation by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

import lm_eval_pruned
from lm_eval_pruned import load_pruned
from tests.contract.commands import pruned
from tests.helpers.checkpoints import edit_weights, save_tiny


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


BY_INFLUENCE = {"drop_by": "block_influence", "calibration_samples": 2}


@pytest.mark.parametrize(
    "asked",
    [
        {"prune_percent": 75, "layers": "1"},
        {"prune_percent": 75, "drop_layers": 1, **BY_INFLUENCE},
    ],
)
def test_losses_are_those_of_the_model_the_export_and_a_random_cut_of_these_layers(
    asked, tmp_path
):
    # The first layer does least.
    source, out = save_tiny(tmp_path / "source"), tmp_path / "out"
    edit_weights(
        source,
        lambda tensors: tensors["model.layers.0.mlp.down_proj.weight"].mul_(0.01),
    )
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
