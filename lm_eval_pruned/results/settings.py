"""Under which settings a task was evaluated, and in which of them two runs differ."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

#: What was asked. Scores under different ones are the scores of different tests.
ASKED = (
    "documents", "num_fewshot", "fewshot_seed", "fewshot_as_multiturn", "chat_template",
    "system_instruction", "gen_kwargs",
)  # fmt: skip
#: Without few-shot examples these change nothing.
OF_FEWSHOT = ("fewshot_seed", "fewshot_as_multiturn")
#: What else may move a score. ``task_hash`` is the harness's, over documents, prompts and
#: targets in the order of evaluation; some chat templates put the date into each prompt.
CIRCUMSTANCES = (
    "task_hash", "lm_eval_version", "transformers_version", "dtype", "random_seed", "numpy_seed",
    "torch_seed",
)  # fmt: skip
#: What is compared. Two ways to answer differ by rounding.
COMPARED = (*ASKED, *CIRCUMSTANCES, "answer_paths")
#: Where the model comes from; paths are among them.
MODEL = ("model_args", "model_sha")
#: Which weights a pruning left.
WEIGHTS = ("kept_digest", "repair", "repair_text", "repair_tokens")


def settings_of(
    data: Mapping[str, Any], task: str, leaves: Sequence[str]
) -> dict[str, Any]:
    """Return the settings of a task of a results file, or of a group that is made of `leaves`.

    None for what was off or is not recorded.
    """
    config, every_hash = data["config"], data["task_hashes"]
    pruning, paths = config.get("pruning") or {}, config.get("answer_paths") or {}
    counts = [data["n-samples"].get(leaf, {}).get("effective") for leaf in leaves]
    # The harness gives a group a number only if all its members have the same.
    shots = {leaf: data["n-shot"].get(leaf) for leaf in leaves}
    common = shots if len({*map(str, shots.values())}) > 1 else shots[leaves[0]]
    task_hash = every_hash.get(leaves[0])
    if len(leaves) > 1:
        hashes = "".join(f"{leaf} {every_hash.get(leaf)}\n" for leaf in sorted(leaves))
        whole = every_hash.keys() >= {*leaves}
        task_hash = hashlib.sha256(hashes.encode()).hexdigest() * whole
    width = pruning.get("intermediate_size_after")
    alike = [{"mlps": pruning.get("layers"), "width_after": width}] * bool(width)
    groups = pruning.get("groups") or alike
    of_run = ("fewshot_as_multiturn", "lm_eval_version", "transformers_version")
    seeds = [f"{kind}_seed" for kind in ("fewshot", "random", "numpy", "torch")]
    settings = {
        **{name: data.get(name) for name in of_run},
        **{name: config.get(name) for name in (*seeds, "gen_kwargs", *MODEL)},
        "documents": None if None in counts else sum(counts),
        "num_fewshot": data["n-shot"].get(task, common),
        "task_hash": task_hash,
        "chat_template": data.get("chat_template_sha"),
        "system_instruction": data.get("system_instruction_sha"),
        "dtype": config.get("model_dtype"),
        "answer_paths": {
            name: sorted(path["requests"]) if isinstance(path, dict) else path
            for name, path in paths.items()
        },
        "widths": ", ".join(f"{g['mlps']} x {g['width_after']}" for g in groups),
        **dict(zip(WEIGHTS, left_of(pruning), strict=True)),
    }
    return {k: v if v or type(v) is int else None for k, v in settings.items()}


def left_of(pruning: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what decides the weights that a pruning left, in the order of `WEIGHTS`.

    `pruning` is the record in a results file; the text is given by its SHA-256 and its tokens.
    """
    repair, text = pruning.get("repair"), pruning.get("calibration")
    if not repair or not isinstance(text, dict):
        text = {}
    return pruning.get("kept_digest"), repair, text.get("sha256"), text.get("tokens")


def asked_differently(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    where: str,
    more: Iterable[str] = (),
) -> str:
    """Say which of `ASKED` and `more` the settings of a task differ in from those `where` says.

    Empty where they make the same test.
    """
    no_shots = before.get("num_fewshot") == after.get("num_fewshot") == 0
    names = [name for name in ASKED if not (no_shots and name in OF_FEWSHOT)]
    return ", ".join(
        f"{name} is {_shown(after.get(name))}, but {_shown(before.get(name))} {where}"
        for name in (*names, *more)
        if before.get(name) != after.get(name)
    )


def _shown(value: Any) -> str:
    """Return a setting for a message; hashes are cut."""
    text = "none" if value is None else str(value)
    return text[:12] if len(text) == 64 and text.isalnum() else text


def listed(names: Sequence[str], most: int = 5) -> str:
    """Return names for a message, no more than `most`."""
    text = ", ".join(names[:most])
    return text if len(names) <= most else f"{text} and {len(names) - most} more"
