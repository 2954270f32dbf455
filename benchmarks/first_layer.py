"""Why criteria that look at weights misjudge a layer: its weights beside what its neurons do.

For each layer, on calibration text: how the scores of a criterion rank the neurons
beside what they add to the residual stream (Spearman's rank correlation with
l2(x_i) * l2(d_i), x_i being the values of neuron i and d_i its column of down), and how
much of the layer's output goes with the share of neurons that the criterion removes,
as a share of the output's energy. Then, for the layers of ``--layers``, the loss on other
documents when that layer alone is cut: by criteria, at random, by what a neuron does
alone, and by MAW with the strongest of the removed neurons put back.

Removing a neuron and zeroing its column of down are the same, so nothing is sliced.

    python benchmarks/first_layer.py --data speeches.jsonl --layers 0 1

Without ``--pretrained`` the default model is looked at. Documents with an even number
calibrate, the others are measured on; a passage is cut from the middle of each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_pruned.checkpoints.default_model import find_default_model
from lm_eval_pruned.pruning.calibration import NeuronActivity
from lm_eval_pruned.pruning.criteria import score_neurons
from lm_eval_pruned.pruning.layouts import find_glu_mlps
from lm_eval_pruned.util.tables import markdown_table


if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from transformers import PreTrainedModel

    from lm_eval_pruned.pruning.layouts import GluMlp

CRITERIA = ("maw", "max_abs", "l1", "l2", "vow", "pon", "maw_act", "act")
SEEDS = (0, 1, 2)
#: How many of the removed neurons are put back, the strongest first.
PUT_BACK = (1, 4, 16, 64)


class Observed:
    """What the neurons of one GLU-MLP did on calibration text.

    Attributes:
        x: Input of down, shape (tokens, I).
        inputs: Root mean square of each channel of the input of gate and up, shape (H,).
        scores: Scores of neurons by the name of the ranking, shape (I,) each.
        strength: What a neuron adds to the residual stream, shape (I,).
        growth: Median over tokens of the norm of the residual stream behind the layer, as
            a multiple of that in front of it.
    """

    def __init__(
        self, mlp: GluMlp, x: Tensor, inputs: Tensor, growth: float, length: int
    ) -> None:
        self.x, self.inputs, self.growth = x, inputs, growth
        gate, up, down = (
            mlp.weight(f"{name}_proj").detach().float()
            for name in ("gate", "up", "down")
        )
        self.down = down
        norm = x.norm(dim=0)
        by_text = x.view(-1, length, x.shape[1]).norm(dim=1).sum(dim=0)
        activity = NeuronActivity(norm.double(), by_text.double())
        self.scores = {
            name: score_neurons(gate, up, name, down=down, activity=activity)
            for name in CRITERIA
        }
        self.strength = self.scores["act"]
        self.rows = gate.norm(dim=1) + up.norm(dim=1)
        self.columns, self.norm = down.norm(dim=0), norm
        # What a row sees of its input: the weights of a norm stand in front of it.
        self.scores["maw of rows times their input"] = score_neurons(
            gate * inputs, up * inputs, "maw"
        )
        self.scores["column of down alone"] = self.columns
        self.scores["values alone"] = norm
        self.scores["maw, the largest removed"] = -self.scores["maw"]
        for seed in SEEDS:
            self.scores[f"random, seed {seed}"] = score_neurons(
                gate, up, "random", layer=mlp.layer, seed=seed
            )

    def removed(self, name: str, share: float) -> Tensor:
        """Return the neurons with the lowest scores, the lowest first."""
        scores = self.scores[name]
        return scores.sort(stable=True).indices[: int(share * len(scores))]

    def lost(self, neurons: Tensor) -> float:
        """Return the energy of what neurons add together, as a share of the output's."""
        part = self.x[:, neurons] @ self.down[:, neurons].T
        return float(part.square().sum() / (self.x @ self.down.T).square().sum())


def passages(
    file: Path, tokenizer, count: int, length: int, odd: bool
) -> tuple[Tensor, int]:
    """Return `count` passages of `length` tokens, one from the middle of each document."""
    found = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if number % 2 != odd:
                continue
            tokens = tokenizer(json.loads(line)["text"])["input_ids"]
            first = tokens[:1] if tokens[0] == tokenizer.bos_token_id else []
            start = len(tokens) // 2
            passage = first + tokens[start : start + length - len(first)]
            if len(passage) == length:
                found.append(passage)
            if len(found) == count:
                return torch.tensor(found), number + 1
    sys.exit(f"{file} has {len(found)} such passages: pass a smaller --passages.")


@torch.no_grad()
def loss_of(model: PreTrainedModel, tokens: Tensor) -> float:
    """Return the mean loss of a model, in nats per token."""
    losses = [
        model(input_ids=each, labels=each, use_cache=False).loss
        for each in tokens.split(4)
    ]
    return float(torch.stack(losses).mean())


@torch.no_grad()
def observe(model: PreTrainedModel, tokens: Tensor) -> dict[int, Observed]:
    """Run calibration text through a model; return what each layer's neurons did."""
    seen: dict[tuple[int, str], list[Tensor]] = {}

    def hook(layer: int, name: str):
        def keep(module, arguments, output) -> None:
            values = arguments[0].reshape(-1, arguments[0].shape[-1]).float()
            seen.setdefault((layer, name), []).append(values)

        return keep

    grown: dict[int, list[Tensor]] = {}

    def watch(layer: int):
        def keep(module, arguments, output) -> None:
            after = output[0] if isinstance(output, tuple) else output
            ratio = after.norm(dim=-1) / arguments[0].norm(dim=-1)
            grown.setdefault(layer, []).append(ratio.flatten())

        return keep

    mlps = find_glu_mlps(model)
    handles = [
        model.get_submodule(mlp.stack).register_forward_hook(watch(mlp.layer))
        for mlp in mlps
    ]
    handles += [
        mlp.projection(f"{name}_proj").register_forward_hook(hook(mlp.layer, name))
        for mlp in mlps
        for name in ("gate", "down")
    ]
    for each in tokens.split(4):
        model(input_ids=each, use_cache=False, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    return {
        mlp.layer: Observed(
            mlp,
            torch.cat(seen.pop((mlp.layer, "down"))),
            torch.cat(seen.pop((mlp.layer, "gate"))).square().mean(0).sqrt(),
            float(torch.cat(grown[mlp.layer]).median()),
            tokens.shape[1],
        )
        for mlp in mlps
    }


@contextlib.contextmanager
def without(mlp: GluMlp, neurons: Tensor) -> Iterator[None]:
    """Take neurons out of a GLU-MLP while the block runs."""
    weight = mlp.weight("down_proj")
    before = weight[:, neurons].clone()
    weight.data[:, neurons] = 0
    try:
        yield
    finally:
        weight.data[:, neurons] = before


def spearman(one: Tensor, other: Tensor) -> float:
    """Return the rank correlation of two vectors."""
    ranks = [values.argsort().argsort().double() for values in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def spread(values: Tensor) -> str:
    """Return 1st percentile, median, 99th percentile and maximum, the median being 1."""
    points = torch.cat(
        [values.quantile(torch.tensor([0.01, 0.99])), values.max()[None]]
    )
    return " / ".join(f"{float(point / values.median()):.2f}" for point in points)


def tables(observed: dict[int, Observed], share: float, length: int) -> Iterator[str]:
    """Yield what the layers show, as Markdown."""
    ranked = ("maw", "max_abs", "l2", "pon", "maw of rows times their input")
    yield markdown_table(
        ["layer", *ranked, "columns of down", "maw and columns of down"],
        [
            [layer]
            + [f"{spearman(of.scores[name], of.strength):+.2f}" for name in ranked]
            + [f"{spearman(of.columns, of.strength):+.2f}"]
            + [f"{spearman(of.scores['maw'], of.columns):+.2f}"]
            for layer, of in observed.items()
        ],
    )
    chosen = ("maw", "max_abs", "l2", "pon", "maw_act", "act")
    yield markdown_table(
        ["layer", *chosen, "random", "strongest 1 %"],
        [
            [layer]
            + [f"{of.lost(of.removed(name, share)):.3f}" for name in chosen]
            + [
                f"{sum(of.lost(of.removed(f'random, seed {s}', share)) for s in SEEDS) / len(SEEDS):.3f}"
            ]
            + [f"{of.lost(of.strength.argsort()[-(len(of.strength) // 100) :]):.3f}"]
            for layer, of in observed.items()
        ],
    )
    rows = []
    for layer, of in observed.items():
        output = (of.x @ of.down.T).norm(dim=1)
        top = int(output.argmax())
        peak = of.x.abs().max()
        rows.append(
            [
                layer,
                spread(of.inputs),
                spread(of.rows),
                spread(of.columns),
                spread(of.norm),
                f"{float(output.max() / output.median()):.1f}",
                top % length,
                f"{float(peak / of.x.abs().median()):,.0f}",
                f"{of.growth:.2f}",
            ]
        )
    yield markdown_table(
        ["layer", "input channels", "rows of gate and up", "columns of down"]
        + [
            "values of neurons",
            "strongest token",
            "its place",
            "strongest value",
            "growth",
        ],
        rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained", help="default: the default model")
    parser.add_argument("--data", type=Path, required=True, help="JSON Lines of text")
    parser.add_argument("--layers", type=int, nargs="*", default=[0])
    parser.add_argument("--share", type=float, default=0.25, help="default: 0.25")
    parser.add_argument("--passages", type=int, default=16, help="default: 16")
    parser.add_argument("--tokens", type=int, default=128, help="default: 128")
    arguments = parser.parse_args()
    pretrained = arguments.pretrained or find_default_model().pretrained
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32).eval()
    calibration, held = (
        passages(arguments.data, tokenizer, arguments.passages, arguments.tokens, odd)[
            0
        ]
        for odd in (False, True)
    )
    observed = observe(model, calibration)
    for table in tables(observed, arguments.share, arguments.tokens):
        print(f"{table}\n", flush=True)
    baseline = loss_of(model, held)
    print(f"Loss of the unpruned model: {baseline:.3f}\n", flush=True)
    mlps = {mlp.layer: mlp for mlp in find_glu_mlps(model)}
    rows = []
    for layer in arguments.layers:
        of = observed[layer]
        chosen = {name: of.removed(name, arguments.share) for name in of.scores}
        wrong = chosen["maw"]
        strongest = wrong[of.strength[wrong].sort(descending=True).indices]
        for number in PUT_BACK:
            chosen[f"maw, {number} put back"] = strongest[number:]
            chosen[f"the {number} alone"] = strongest[:number]
        for name, neurons in chosen.items():
            with without(mlps[layer], neurons):
                loss = loss_of(model, held)
            rows.append(
                [
                    layer,
                    name,
                    f"{loss:.3f}",
                    f"{loss - baseline:+.3f}",
                    f"{of.lost(neurons):.3f}",
                ]
            )
    header = ["layer", "removed", "loss", "rise", "share of the output's energy"]
    print(markdown_table(header, rows, "llrrr"))


if __name__ == "__main__":
    main()
