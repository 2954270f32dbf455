"""What a cut cost: loss on text that no default calibrates on, and what the model says.

The text comes with this package, in kinds that its calibration text does not have.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.pruning.arguments import CUTS, PruneArguments
from lm_eval_pruned.pruning.calibration import CalibrationText, run_texts, watched
from lm_eval_pruned.pruning.criteria import RANDOM
from lm_eval_pruned.pruning.measuring import text_loss
from lm_eval_pruned.util.tables import markdown_table


if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lm_eval_pruned.checkpoints.request import LoadRequest

#: Whose quality is measured: the model before, after, and after a random cut of the same size.
UNPRUNED, PRUNED, RANDOM_CUT = "unpruned", "pruned", "random cut"
#: The text, by the folder of this package.
HELD_TEXT = Path(__file__).with_name("held_text.jsonl")
#: The loss is measured on at most this many tokens of each text.
TOKENS = 128
#: What the model goes on from.
PROMPTS = ("Name three colours.", "The capital of France is", "Water boils at")
#: Tokens of a continuation.
_SAID = 16


@dataclass(frozen=True)
class Quality:
    """How well a model predicts the held text.

    Attributes:
        loss: Mean loss over all its tokens, in nats per token.
        said: What the model says to each of `PROMPTS`, by greedy decoding.
    """

    loss: float
    said: tuple[str, ...]


def quality_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Quality:
    """Measure a model without an encoder, where it is."""
    text = CalibrationText.of(
        model, tokenizer, str(HELD_TEXT), longest=TOKENS, shortest=2
    )
    total, count = 0.0, 0

    def add(tokens: torch.Tensor) -> None:
        nonlocal total, count
        total, count = total + text_loss(model, tokens), count + tokens.numel() - 1

    run_texts(model, text.tokens, "held text", run=add)
    with watched(model, {}):
        said = tuple(_said(model, tokenizer, prompt) for prompt in PROMPTS)
    return Quality(total / count, said)


def _said(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str
) -> str:
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}]
        given: Any = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        given = tokenizer(prompt, return_tensors="pt")
    ids = given["input_ids"].to(model.device)
    found: Any = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=_SAID,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    said = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
    return str(said).strip()


def random_cut(request: LoadRequest) -> LoadRequest:
    """Return the request for a random cut of the same size and layers, without repair."""
    asked = request.prune_arguments
    names = [*CUTS, "layers", "skip_layers", "multiple_of"]
    if asked.measures_depth:
        names += ["drop_by", "calibration", "calibration_samples"]
    same = {n: v for n in names if (v := getattr(asked, n)) is not None}
    arguments = PruneArguments(**same, criterion=RANDOM)
    return dataclasses.replace(
        request, prune_arguments=arguments, plan=request.widths.plan(arguments)
    )


def cost_table(qualities: Mapping[str, Quality]) -> str:
    """Return loss and continuations as Markdown, one column for each model by its name."""
    rows = [
        ("loss, nats per token", *(f"{each.loss:.3f}" for each in qualities.values()))
    ]
    for number, prompt in enumerate(PROMPTS):
        said = (" ".join(each.said[number].split()) for each in qualities.values())
        rows.append((f"“{prompt}”", *(text.replace("|", "¦") for text in said)))
    return markdown_table(["", *qualities], rows)
