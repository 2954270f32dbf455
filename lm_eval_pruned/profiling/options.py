"""What a profile is asked for, and what that comes to: models, and batches of the texts to go on from."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.pruning.arguments import RECIPES, SEVERAL_SIZES, STUDY
from lm_eval_pruned.util.options import DeclaredOptions, option


if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import BatchEncoding

    from lm_eval_pruned.pruning.arguments import Number


@dataclass(frozen=True)
class ProfileRequest(DeclaredOptions):
    """What to measure.

    Args:
        pretrained: Folder or Hub name of the unpruned model.
        ratios, prune_percents: Sizes to measure besides the unpruned model.
        widths: Files with the width of each layer, for one more model each.
        criterion: Importance score; see `lm_eval_pruned.pruning.criteria`.
        device: Where the models run.
        dtype: Weight dtype; None keeps the checkpoint's.
        load_arguments: Anything else `lm_eval_pruned.load_pruned` takes.
        multiple_of: Round the widths down to multiples of this; each value is measured.
        batch_sizes: Prompts per batch.
        max_new_tokens: Fixed output length in tokens, and the limit of the natural one.
        repeats: Number of repeats of all measurements.
        seed: Seed of torch and of the criterion random.
        apply_chat_template: Wrap each prompt as a turn of the user.

    Raises:
        ValueError: A number is out of range, or no size is named.
    """

    pretrained: str
    ratios: Sequence[Number] = ()
    prune_percents: Sequence[Number] = ()
    widths: Sequence[str] = ()
    criterion: str = RECIPES[STUDY]["criterion"]
    device: str = "cpu"
    dtype: str | None = None
    load_arguments: dict[str, Any] = field(default_factory=dict)
    multiple_of: tuple[int, ...] = option(int, (1,), "N")
    batch_sizes: tuple[int, ...] = option(int, (1,), "B", least=1)
    max_new_tokens: int = option(int, 50, "N", least=2)
    repeats: int = option(int, 5, "N", least=1)
    seed: int = option(int, 0, "N")
    apply_chat_template: bool = option(bool, False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.ratios or self.prune_percents or self.widths):
            raise ValueError(
                "No size was given to compare with the unpruned model: pass ratios, "
                "prune_percents or widths."
            )

    def source(self) -> dict[str, Any]:
        """Return the arguments that say where config and tokenizer come from."""
        from lm_eval_pruned.checkpoints.planning import SOURCE_ARGUMENTS

        return {k: v for k, v in self.load_arguments.items() if k in SOURCE_ARGUMENTS}


def plan_models(request: ProfileRequest) -> list[dict[str, Any]]:
    """Resolve the sizes to widths, without reading weights; equal ones are measured once.

    Returns:
        A row for each model, the baseline first: ``name``, such as ``ratio=2.4 multiple_of=64``;
        ``asked``, the arguments of `load_pruned` that make it; ``model_bytes`` of weights and
        buffers in memory, None before it was loaded; and figures of `PlanRow`, of which
        ``layer_widths`` is empty where all layers are alike.

    Raises:
        ValueError, UnsupportedModelError, OSError: See `plan_rows`.
    """
    from lm_eval_pruned.checkpoints.planning import plan_rows

    sizes: list[tuple[str, Any, int]] = [("prune_percent", 0, 1)]
    for several, argument in SEVERAL_SIZES.items():
        sizes += product([argument], getattr(request, several), request.multiple_of)
    models: dict[tuple[float, str], dict[str, Any]] = {}
    for argument, value, multiple in sizes:
        loading = {"multiple_of": multiple, **request.source()}
        (row,) = plan_rows(request.pretrained, argument, [value], **loading)
        # A file may give all layers one width.
        by_layer = row.layer_widths if "," in row.layer_widths else ""
        name = f"{argument}={value}" + f" multiple_of={multiple}" * (multiple != 1)
        model = {
            "name": name if models else "baseline",
            "asked": {argument: value, "multiple_of": multiple} if models else {},
            "intermediate_size": row.intermediate_size,
            "expansion_ratio": row.expansion_ratio,
            "parameters": row.parameters,
            "model_bytes": None,
            "layer_widths": by_layer,
        }
        models.setdefault((row.intermediate_size, by_layer), model)
    return list(models.values())


def read_prompts(path: Path) -> list[str]:
    """Read prompts from ``.txt`` (one prompt a line) or JSON Lines (key ``prompt``).

    Raises:
        ValueError: A line has no prompt, or there is none.
        OSError: The file cannot be read.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    prompts = [line for line in lines if line.strip()]
    with contextlib.suppress(ValueError, KeyError, TypeError):
        if path.suffix != ".txt":
            prompts = [json.loads(line)["prompt"] for line in prompts]
        if prompts and all(isinstance(prompt, str) for prompt in prompts):
            return prompts
    raise ValueError(
        f"prompts={path} does not hold prompts: pass a .txt file with one prompt a line, or JSON "
        'Lines with a text under the key "prompt".'
    )


def demo_prompts() -> list[str]:
    """Return the prompts of the demo task for instruction following."""
    import lm_eval_pruned.tasks

    folder = Path(lm_eval_pruned.tasks.__path__[0])
    return read_prompts(folder / "demo" / "instructions.jsonl")


def batches_of(
    request: ProfileRequest, prompts: Sequence[str]
) -> tuple[dict[int, list[BatchEncoding]], int]:
    """Return left-padded batches by batch size, and the token that fills rows which have ended.

    Raises:
        ValueError: A prompt leaves no room for the tokens that are to be generated.
    """
    from transformers import AutoConfig, AutoTokenizer

    name, source, tokens = request.pretrained, request.source(), request.max_new_tokens
    tokenizer = AutoTokenizer.from_pretrained(name, **source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat := request.apply_chat_template:
        prompts = tokenizer.apply_chat_template(  # type: ignore[assignment]
            [[{"role": "user", "content": prompt}] for prompt in prompts],
            tokenize=False,
            add_generation_prompt=True,
        )
    # A chat template writes special tokens itself.
    how: dict[str, Any] = {"add_special_tokens": not chat, "return_tensors": "pt"}
    how |= {"padding": True, "padding_side": "left"}
    batches = {
        size: [
            tokenizer(list(prompts[start : start + size]), **how).to(request.device)
            for start in range(0, len(prompts), size)
        ]
        for size in request.batch_sizes
    }
    longest = max(batch["input_ids"].shape[1] for batch in chain(*batches.values()))
    config = AutoConfig.from_pretrained(name, **source).get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and longest + tokens > limit:
        raise ValueError(
            f"max_new_tokens={tokens} after a prompt of {longest} tokens does not fit into the "
            f"model's {limit} positions: use shorter prompts or fewer tokens."
        )
    return batches, int(tokenizer.pad_token_id or 0)
