"""Under which settings a task was evaluated, and in which of them two runs differ.

A results file keeps them in six places, some by task and some for the whole file, and the
units of a resumed sweep were written by several commands. Here they are one flat mapping
for each task, so that a comparison is right whichever file a score came from.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


#: What was asked. Scores under different ones are the scores of different tests.
ASKED = (
    "documents",
    "num_fewshot",
    "fewshot_seed",
    "fewshot_as_multiturn",
    "chat_template",
    "system_instruction",
    "gen_kwargs",
)
#: Without few-shot examples these change nothing.
OF_FEWSHOT = ("fewshot_seed", "fewshot_as_multiturn")
#: What else may move a score. ``task_hash`` is the harness's, over documents, prompts and
#: targets in the order of evaluation; some chat templates put the date into each prompt.
CIRCUMSTANCES = (
    "task_hash",
    "lm_eval_version",
    "transformers_version",
    "dtype",
    "random_seed",
    "numpy_seed",
    "torch_seed",
)
#: Which way answers were computed; two ways of one model differ by rounding.
COMPUTED = ("answer_paths",)
#: Which model ``pruned-hf`` made of its checkpoint. Runs that are compared differ in it.
PRUNING = ("widths", "kept_digest")
#: Where the model comes from; paths are among them.
MODEL = ("model_args", "model_sha")
#: What one command gives all its tasks.
SHARED = (*ASKED[2:], *CIRCUMSTANCES[1:], *PRUNING, *MODEL)
LABELS = {
    name: name.replace("_", " ")
    for name in ("answer_paths", "chat_template", "system_instruction")
}


def settings_of(
    data: Mapping[str, Any], task: str, leaves: Sequence[str]
) -> dict[str, Any]:
    """Return the settings of one task.

    Args:
        data: A results file whose sections are objects.
        task: A task or group of it.
        leaves: The tasks that it is made of.

    Returns:
        A value of JSON by each name in the tuples above;
        None for what was off or is not recorded.
    """
    config = data.get("config") or {}
    pruning = config.get("pruning")
    pruning = pruning if isinstance(pruning, dict) else {}
    off_or = {
        "fewshot_as_multiturn": data.get("fewshot_as_multiturn"),
        "chat_template": data.get("chat_template_sha"),
        "system_instruction": data.get("system_instruction_sha"),
        "gen_kwargs": config.get("gen_kwargs"),
        "dtype": config.get("model_dtype"),
        "model_sha": config.get("model_sha"),
        "model_args": config.get("model_args"),
    }
    return {
        "documents": _documents(data.get("n-samples") or {}, leaves),
        "num_fewshot": _shots(data.get("n-shot") or {}, task, leaves),
        "task_hash": _task_hash(data.get("task_hashes"), leaves),
        **{
            name: data.get(name) for name in ("lm_eval_version", "transformers_version")
        },
        **{
            f"{kind}_seed": config.get(f"{kind}_seed")
            for kind in ("fewshot", "random", "numpy", "torch")
        },
        **{name: value or None for name, value in off_or.items()},
        "answer_paths": _answer_paths(config.get("answer_paths")),
        "widths": _widths(pruning),
        "kept_digest": pruning.get("kept_digest"),
    }


def differing(
    one: Mapping[str, Any], other: Mapping[str, Any], names: Iterable[str]
) -> list[str]:
    """Return those of `names` in which two tasks' settings differ."""
    return [name for name in names if one.get(name) != other.get(name)]


def other_settings(
    base: Mapping[str, Mapping[str, Any]],
    run: Mapping[str, Mapping[str, Any]],
    tasks: Iterable[str],
) -> dict[tuple[str, ...], list[str]]:
    """Return what two runs were asked otherwise, or evaluated otherwise with.

    Args:
        base: Settings by task.
        run: Settings by task.
        tasks: Tasks of both.

    Returns:
        Tasks by the labels of the settings that differ on them; tasks without any are
        left out.
    """
    found: dict[tuple[str, ...], list[str]] = {}
    for task in tasks:
        names = differing(
            base.get(task, {}),
            run.get(task, {}),
            (*ASKED, *CIRCUMSTANCES, *COMPUTED),
        )
        if names:
            found.setdefault(tuple(LABELS.get(n, n) for n in names), []).append(task)
    return found


def shown(value: Any) -> str:
    """Return a setting for a message; hashes are cut."""
    if value is None:
        return "none"
    text = str(value)
    return text[:12] if len(text) == 64 and text.isalnum() else text


def listed(names: Sequence[str], most: int = 5) -> str:
    """Return names for a message, no more than `most`."""
    text = ", ".join(names[:most])
    return text if len(names) <= most else f"{text} and {len(names) - most} more"


def _documents(counts: Mapping[str, Any], leaves: Sequence[str]) -> int | None:
    """Add up the documents that were evaluated."""
    total = 0
    for leaf in leaves:
        count = counts.get(leaf)
        effective = count.get("effective") if isinstance(count, dict) else None
        if not isinstance(effective, int):
            return None
        total += effective
    return total


def _shots(shots: Mapping[str, Any], task: str, leaves: Sequence[str]) -> Any:
    if task in shots:
        return shots[task]
    # The harness gives a group a number only if all its members have the same.
    of_leaves = {leaf: shots.get(leaf) for leaf in leaves}
    values = list(of_leaves.values())
    return values[0] if values.count(values[0]) == len(values) else of_leaves


def _task_hash(hashes: Any, leaves: Sequence[str]) -> str | None:
    if not isinstance(hashes, dict) or any(leaf not in hashes for leaf in leaves):
        return None
    if len(leaves) == 1:
        return str(hashes[leaves[0]])
    text = "".join(f"{leaf} {hashes[leaf]}\n" for leaf in sorted(leaves))
    return hashlib.sha256(text.encode()).hexdigest()


def _answer_paths(paths: Any) -> str | None:
    """Return which paths answered, such as ``loglikelihood: shared; linear: torch``."""
    if not isinstance(paths, dict):
        return None
    return "; ".join(
        f"{name}: {', '.join(path.get('requests') or ()) if isinstance(path, dict) else path}"
        for name, path in sorted(paths.items())
    )


def _widths(pruning: Mapping[str, Any]) -> str | None:
    """Return how many MLPs have which width, such as ``30 x 921``."""
    groups = pruning.get("groups")
    if groups and isinstance(groups, list) and all(isinstance(g, dict) for g in groups):
        return ", ".join(
            f"{group.get('mlps')} x {group.get('width_after')}" for group in groups
        )
    width = pruning.get("intermediate_size_after")
    return None if width is None else f"{pruning.get('layers')} x {width}"
