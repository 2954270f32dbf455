"""Adapters: checks that one fits the MLPs to which it is applied.

The shapes of its tensors tell the width that an adapter was trained on; a file that
``lm-eval-pruned heal`` writes next to them tells which neurons were kept.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.pruning.layouts import without_weights
from lm_eval_pruned.results.files import left_of
from lm_eval_pruned.util.atomic import write_atomically


if TYPE_CHECKING:
    from collections.abc import Mapping

    from peft import PeftConfig
    from transformers import PreTrainedModel

    from lm_eval_pruned.checkpoints.checkpoint import Checkpoint

#: When an adapter is applied, relative to the pruning.
STAGES = ("after", "before")
#: File next to an adapter that records what it was trained on.
HEALING = "healing.json"


def check_adapter(
    adapter: str,
    checkpoint: Checkpoint,
    stage: str,
    revision: str | None = None,
    argument: str = "peft",
) -> None:
    """Refuse an adapter of any method whose tensors do not fit the MLPs.

    Args:
        adapter: Folder or Hub name of the adapter, with its `revision`.
        checkpoint: The model and its pruning.
        stage: One of `STAGES`.
        argument: What named the adapter, for messages.

    Raises:
        ValueError: There is no adapter; it was trained on MLPs of another width; or it was trained
            on a pruned model and is to be merged before pruning.
    """
    from peft import PeftConfig
    from peft.utils import load_peft_weights
    from safetensors import SafetensorError

    try:
        config = PeftConfig.from_pretrained(adapter, revision=revision)
        stored = load_peft_weights(adapter, device="cpu", revision=revision)
    except (ValueError, OSError, SafetensorError) as error:
        raise ValueError(
            f"{argument}={adapter} is not an adapter ({error}): pass its folder or Hub name."
        ) from None
    after = stage == "after"
    healing = read_healing(adapter, revision)
    if not after and healing and healing["pruning"]["kept_digest"]:
        raise ValueError(
            f"peft_stage=before merges {argument}={adapter} before pruning, but it was trained on "
            "a model that was pruned already: leave out peft_stage."
        )
    plan, cut = checkpoint.cut.plan, checkpoint.cut
    if not after:
        cut = cut.widths.uncut
    if cut.inexpressible:
        return
    narrow = without_weights(type(cut.widths.skeleton), cut.config())
    expected = adapted_shapes(narrow, config)
    for name in sorted(stored.keys() & expected.keys()):
        for have, want in zip(stored[name].shape, expected[name], strict=False):
            if have == want or want not in cut.targets.values():
                continue
            other = plan.width_before if after else plan.width
            advice = f"intermediate_size={have}"
            if have == other and argument == "peft":
                advice = f"peft_stage={'before' if after else 'after'}"
            raise ValueError(
                f"{argument}={adapter} was trained on MLPs of {have} neurons, but it is applied "
                f"to MLPs of {want} ({name}): pass an adapter of {want} neurons, or {advice}."
            )


def adapted_shapes(
    skeleton: PreTrainedModel, config: PeftConfig
) -> dict[str, tuple[int, ...]]:
    """Return the shapes that an adapter would have, were it trained on a model, which gets one.

    Raises:
        ValueError: The model has no modules such as the adapter names.
    """
    import torch
    from peft import PeftModel, get_peft_model_state_dict

    config = copy.copy(config)
    config.inference_mode = True
    with torch.device("meta"):
        adapted = PeftModel(skeleton, config)
        state = get_peft_model_state_dict(adapted)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def adapted_modules(adapter: str) -> set[str]:
    """Return the last names of the modules that a LoRA adapter changes, such as ``up_proj``."""
    from peft.utils import load_peft_weights

    parts = (name.split(".lora_") for name in load_peft_weights(adapter, device="cpu"))
    return {module.rpartition(".")[2] for module, *lora in parts if lora}


def check_kept(
    adapter: str,
    pruning: Mapping[str, Any],
    revision: str | None = None,
    argument: str = "peft",
) -> dict[str, Any] | None:
    """Return what an adapter says it was trained on; None without a record.

    Raises:
        ValueError: It was trained on another kept set or another repair than the record
            `pruning` of the model has, or its record is damaged.
    """
    healing = read_healing(adapter, revision)
    if healing is None or left_of(healing["pruning"]) == left_of(pruning):
        return healing
    trained = healing["pruning"]
    size = [f"{name}={value}" for name, value in (trained.get("asked") or {}).items()]
    if size:
        names = ("criterion", "repair")
        size += [f"{name}={trained[name]}" for name in names if name in trained]
    same = trained["kept_digest"] == pruning.get("kept_digest")
    theirs, ours = _described(trained, same), _described(pruning, same)
    belongs = (
        "it belongs to other weights" if same else "its columns belong to other neurons"
    )
    raise ValueError(
        f"{argument}={adapter} was trained on {theirs}, but this model has {ours}, so {belongs}: "
        f"pass {','.join(size) or 'no size'} with the pretrained{' and the text' * same} that it "
        "was trained on, or another adapter."
    )


def _described(pruning: Mapping[str, Any], with_repair: bool) -> str:
    digest, repair, text, tokens = left_of(pruning)
    kept = f"the kept set {digest[:12]}" if digest else "no kept set"
    if not with_repair:
        return kept
    read = f" on {tokens} tokens of the text {text[:12]}" if text else ""
    return f"{kept} with repair={repair or 'none'}{read}"


def write_healing(folder: Path, record: Mapping[str, Any]) -> None:
    """Write what an adapter or a checkpoint was trained on into its folder."""
    text = json.dumps(record, indent=2, ensure_ascii=False)
    write_atomically(folder / HEALING, f"{text}\n")


def read_healing(adapter: str, revision: str | None = None) -> dict[str, Any] | None:
    """Return what an adapter says it was trained on; None without a record.

    Raises:
        ValueError: Its file is damaged.
    """
    from transformers.utils import cached_file

    optional = {"_raise_exceptions_for_missing_entries": False}
    file = cached_file(adapter, HEALING, revision=revision, **optional)
    if file is None:
        return None
    try:
        healing = json.loads(Path(file).read_text(encoding="utf-8"))
        healing["pruning"]["kept_digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is not a healing record ({error!r}), so the neurons that the adapter was "
            "trained on are unknown: copy it to the adapter's folder again."
        ) from None
    return healing
