"""What a cut cost: loss on text that no default calibrates on, what is kept, what the model says.

The text comes with this package, in kinds that its calibration text does not have. What is kept of
knowledge and instructions is measured on its probes.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lm_eval_pruned.compare.claims import paired
from lm_eval_pruned.compare.floors import standings
from lm_eval_pruned.pruning.arguments import SIZES, PruneArguments
from lm_eval_pruned.pruning.calibration import run_texts, watched
from lm_eval_pruned.pruning.calibration_text import TextSource
from lm_eval_pruned.pruning.criteria import RANDOM
from lm_eval_pruned.pruning.measuring import text_loss
from lm_eval_pruned.results.documents import documents_of
from lm_eval_pruned.results.groups import family_of, primary_metrics
from lm_eval_pruned.results.runs import read_run
from lm_eval_pruned.util.tables import interval_text, markdown_table


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lm_eval_pruned.checkpoints.checkpoint import Checkpoint
    from lm_eval_pruned.results.files import Run

logger = logging.getLogger("lm_eval.pruned.export")

#: Whose quality is measured: the model before, after, after a distillation, and after a random cut of
#: the same size.
UNPRUNED, PRUNED, DISTILLED = "unpruned", "pruned", "distilled"
RANDOM_CUT = "random cut"
#: The text, by the folder of this package.
HELD_TEXT = Path(__file__).with_name("held_text.jsonl")
#: The loss is measured on at most this many tokens of each text.
TOKENS = 128
#: What the model goes on from.
PROMPTS = ("Name three colours.", "The capital of France is", "Water boils at")
#: Tokens of a continuation.
_CONTINUED = 16
#: Tasks by name, and how many of their documents are scored: the first, whole blocks of all families.
PROBES = {"pruned_probe_knowledge": 200, "pruned_probe_instructions": 150}


@dataclass(frozen=True)
class Quality:
    """How well a model predicts the held text, and what it scores.

    Attributes:
        losses: Loss of each text, summed over its tokens but the first, in nats, shape (n,).
        tokens: How many tokens these are, shape (n,).
        continuations: What the model says to each of `PROMPTS`, by greedy decoding.
        probed: Scores and documents of `PROBES`, where they were measured.
    """

    losses: np.ndarray
    tokens: np.ndarray
    continuations: tuple[str, ...]
    probed: Run | None = None

    @property
    def loss(self) -> float:
        """Mean loss over all tokens, in nats per token."""
        return float(self.losses.sum() / self.tokens.sum())


def quality_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Quality:
    """Measure a model on text that no default calibrates on; this package brings it.

    Args:
        model: A model without an encoder; it runs where it is.
        tokenizer: Its tokenizer.

    Returns:
        The quality: ``loss`` in nats per token, the losses of texts behind it, and what the model says
        to three prompts. The loss reads the first 128 tokens of each text.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"the": 0, "?": 1}, unk_token="?"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> sizes = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64}
        >>> tiny = LlamaConfig(**sizes, intermediate_size=128, num_hidden_layers=2)
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
        >>> round(quality_of(LlamaForCausalLM(tiny).eval(), tokenizer).loss)  # log(64)
        4
    """
    held = TextSource(str(HELD_TEXT))
    text = held.read(model, tokenizer, longest=TOKENS, shortest=2)
    losses: list[float] = []

    def add(tokens: torch.Tensor) -> None:
        losses.append(text_loss(model, tokens))

    run_texts(model, text.tokens, "held text", run=add)
    with watched(model, {}):
        continuations = tuple(
            _continued(model, tokenizer, prompt) for prompt in PROMPTS
        )
    counts = np.array([tokens.numel() - 1 for tokens in text.tokens])
    return Quality(np.array(losses), counts, continuations)


def probed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    prompts: Mapping[str, int] = PROBES,
) -> Run | None:
    """Score a model on the first `prompts` of tasks, where it is; None, with a warning, where that fails.

    The scores are those of ``hf-prefix`` in the harness, in a run called `name`.
    """
    from lm_eval import evaluate
    from lm_eval.api.registry import get_model
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    # Without the harness's own tasks, whose files take longer to read than the probes to score.
    folder = str(files("lm_eval_pruned.tasks") / "probes")
    manager = TaskManager(include_path=folder, include_defaults=False)
    try:
        with _untouched(model):
            results: Any = evaluate(
                get_model("hf-prefix")(model, tokenizer=tokenizer, batch_size=16),
                manager.load([*prompts]),
                samples={task: [*range(count)] for task, count in prompts.items()},
                bootstrap_iters=0,
            )
        samples = results.pop("samples")
        with TemporaryDirectory() as folder:
            tracker = EvaluationTracker(output_path=str(Path(folder, "results.json")))
            tracker.save_results_aggregated(results=results, samples=samples)
            for task, rows in samples.items():
                tracker.save_results_samples(task_name=task, samples=rows)
            run = read_run(folder, name)
            # The files go.
            for task, metric in run.scores:
                documents_of(run, task, metric)
            return run
    except (MemoryError, OSError, RuntimeError, ValueError) as error:
        why = str(error).partition("\n")[0].rstrip(".")
        logger.warning("What is kept of the probes was not measured: %s.", why)
        return None


@contextlib.contextmanager
def _untouched(model: PreTrainedModel) -> Iterator[None]:
    """Keep the harness from tying weights of a model that is saved later, and from its warnings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    # It ties what the config says is tied, also where the file holds two different tensors.
    model.tie_weights = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        logging.disable(before)
        del model.tie_weights


def _continued(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str
) -> str:
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}]
        encoded: Any = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    ids = encoded["input_ids"].to(model.device)
    generated: Any = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=_CONTINUED,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    text = tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True)
    return str(text).strip()


def random_cut(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with a random cut of the same size and layers, without repair."""
    arguments = checkpoint.cut.plan.arguments
    names = (*SIZES, "layers", "skip_layers", "multiple_of")
    same = {n: v for n in names if (v := getattr(arguments, n)) is not None}
    return checkpoint.asking(PruneArguments(**same, criterion=RANDOM))


def cost_table(qualities: Mapping[str, Quality]) -> str:
    """Return what was measured as Markdown, one column for each model by its name."""
    losses = (f"{quality.loss:.3f}" for quality in qualities.values())
    rows = [("loss, nats per token", *losses), *_beside_unpruned(qualities)]
    for number, prompt in enumerate(PROMPTS):
        texts = (" ".join(q.continuations[number].split()) for q in qualities.values())
        rows.append((f"“{prompt}”", *(text.replace("|", "¦") for text in texts)))
    return markdown_table(["", *qualities], rows)


def _beside_unpruned(qualities: Mapping[str, Quality]) -> list[tuple[str, ...]]:
    """Return what each model has lost in loss, and what it keeps of each probe, with intervals."""
    base = qualities.get(UNPRUNED)
    if base is None or len(qualities) == 1:
        return []
    more = (
        "more than unpruned",
        *(_more(base, quality) for quality in qualities.values()),
    )
    known = {name: q.probed for name, q in qualities.items() if q.probed}
    unpruned = known.pop(UNPRUNED, None)
    if unpruned is None:
        return [more]
    keys = primary_metrics([unpruned, *known.values()])
    compared = [(run, key, True) for run in known.values() for key in keys]
    standing = standings(unpruned, [], compared, 0.05)
    rows = [more]
    for task, metric in keys:
        label = f"{family_of(task, unpruned.metadata).label.lower()} kept, {PROBES[task]} prompts"
        score = unpruned.scores[task, metric].value
        cells = {UNPRUNED: f"{metric.partition(',')[0]} {score:.2f}"}
        for name in known:
            cells[name] = standing[name, task, metric].kept_text or "-"
        rows.append((label, *(cells.get(name, "-") for name in qualities)))
    return rows


def _more(base: Quality, other: Quality) -> str:
    if other is base:
        return "-"
    losses = (quality.losses / base.tokens for quality in (base, other))
    test = paired(*losses, weights=base.tokens)
    ends = interval_text(*test.interval(), 3)
    return f"{test.difference:+.3f} {ends}".removesuffix(" -")
