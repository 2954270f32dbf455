"""Writes results and samples in the harness's layout, without running a model."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np

from lm_eval_pruned.results.runs import unit_folder


if TYPE_CHECKING:
    from pathlib import Path


DATE = "2026-01-02T03-04-05.678901"


def score_of(values, aggregation: str = "mean") -> float:
    """Aggregate per-document values as lm_eval.api.metrics does."""
    if aggregation == "mean":
        return float(np.mean(np.array(values, dtype=float)))
    if aggregation == "pooled":
        return float(np.mean([item for value in values for item in value]))
    if aggregation == "perplexity":
        return float(np.exp(-np.mean(values)))
    sums, weights = np.array(values, dtype=float).T
    mean = sums.sum() / weights.sum()
    return float(np.exp(-mean) if aggregation == "weighted" else -mean / np.log(2))


def offering(
    options, target: object = "0", prompt: str = "the question", likelihoods=()
) -> dict:
    """Return what the harness logs of a document with several choices, and of their likelihoods."""
    answers = [[str(value), "False"] for value in likelihoods]
    return {
        "arguments": {
            f"gen_args_{number}": {"arg_0": prompt, "arg_1": option}
            for number, option in enumerate(options)
        },
        "target": str(target),
        "resps": [[answer] for answer in answers],
        "filtered_resps": answers,
    }


def answered(picks, rights, options=(" no", " yes")) -> dict:
    """Return a multiple-choice task by which choice was picked, and which is right."""
    pairs, rows = [*zip(picks, rights, strict=True)], {}
    for number, (pick, right) in enumerate(pairs):
        likelihoods = [-1 - (n != pick) for n in range(len(options))]
        rows[number] = offering(options, right, likelihoods=likelihoods)
    values = [float(pick == right) for pick, right in pairs]
    return {"acc,none": {"values": values, "rows": rows}}


def spread(share: float, documents: int = 80, seed: int = 7) -> list[float]:
    """Return zeros and ones in no order; a higher share keeps the ones of a lower one."""
    order = np.random.default_rng(seed).permutation(documents)
    return (order < share * documents).astype(float).tolist()


def yes_or_no(share: float, documents: int) -> dict:
    """Return a task of two choices of which a share is right, the same documents first; chance is one half."""
    rights = [number % 2 for number in range(documents)]
    picks = [r if n < share * documents else 1 - r for n, r in enumerate(rights)]
    return answered(picks, rights)


def losses(values, aggregation: str = "perplexity") -> dict:
    """Return a metric of text, of which less is better."""
    form = {"aggregation": aggregation, "higher_is_better": False}
    return {"values": [*values], **form}


def lifts(folder: Path, share: float, noise: float = 0.0, **more) -> Path:
    """Write results of a probe in 60 blocks of four, of whose lift a model keeps a share; return the folder."""
    rng = np.random.default_rng(more.pop("seed", 5))
    values = share * rng.normal(5, 4, 240) + rng.normal(0, noise, 240)
    docs = {number: {"block": number // 4} for number in range(240)}
    known = {"primary_metric": "lift", "floors": {"lift": 0}, "cluster": "block"}
    known["family"] = "knowledge"
    lift = {"lift,none": {"values": [*values], "docs": docs}, "acc,none": [1.0] * 240}
    configs = {"facts": {"metadata": known}}
    return write_run(folder, {"facts": lift, **more}, configs=configs).parent


def write_two(folder: Path, base: dict, run: dict, **about) -> list[Path]:
    """Write two results with the same sections and return their folders, ``base`` and ``run``."""
    both = (("base", base), ("run", run))
    return [write_run(folder / name, tasks, **about).parent for name, tasks in both]


def written(texts, rights) -> dict:
    """Return a task of free texts, and whether each is right."""
    rows = {
        number: offering([{"until": []}], prompt=f"Write {number}")
        | {"resps": [[text]], "filtered_resps": [text.strip()]}
        for number, text in enumerate(texts)
    }
    return {"prompt_level_strict_acc,none": {"values": [*rights], "rows": rows}}


def write_run(
    folder: Path,
    tasks: dict,
    *,
    date: str = DATE,
    samples: bool = True,
    pruning: dict | None = None,
    groups: dict | None = None,
    group_scores: dict | None = None,
    **sections,
) -> Path:
    """Write one results file with its samples and return its path.

    Args:
        folder: Where; made if missing.
        tasks: By task: ``{"metric,filter": values}``, or with a dict as value,
            ``{"values", "aggregation", "higher_is_better", "stderr", "score",
            "docs", "prompts", "rows"}``; rows are further keys of single samples.
        date: Time stamp in the names.
        samples: Whether to log samples.
        pruning: ``config.pruning``.
        groups: Members by group.
        group_scores: Metrics by group.
        **sections: Further top-level sections, replacing generated ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data: dict = {
        "results": {task: {"name": task, "alias": task} for task in tasks},
        "group_subtasks": {task: [] for task in tasks} | (groups or {}),
        "configs": {},
        "versions": dict.fromkeys(tasks, 1.0),
        "n-shot": dict.fromkeys(tasks, 0),
        "higher_is_better": {task: {} for task in tasks},
        "n-samples": {},
        "config": {"model": "pruned-hf", "model_args": {"pretrained": "tiny"}},
        "lm_eval_version": "0.4.13",
        "date": 1.0,
    }
    if pruning is not None:
        data["config"]["pruning"] = pruning
    for task, metrics in tasks.items():
        rows: dict[tuple[str, int], dict] = {}
        for metric, spec in metrics.items():
            spec = spec if isinstance(spec, dict) else {"values": spec}
            values, (name, filter_name) = spec["values"], metric.split(",")
            how = spec.get("aggregation", "mean")
            score = spec["score"] if "score" in spec else score_of(values, how)
            stderr = {f"{name}_stderr,{filter_name}": spec.get("stderr", "N/A")}
            data["results"][task] |= {metric: score} | stderr
            data["higher_is_better"][task][name] = spec.get("higher_is_better", True)
            size = dict.fromkeys(("original", "effective"), len(values))
            data["n-samples"][task] = size
            for number, value in enumerate(values):
                doc = spec.get("docs", {}).get(number, {"question": number})
                prompt = spec.get("prompts", {}).get(number, f"prompt {number}")
                row = {"doc_id": number, "doc": doc, "target": "0", "resps": []}
                row |= {"filter": filter_name, "metrics": []}
                row |= {"doc_hash": _digest(json.dumps([task, doc]))}
                row |= {"prompt_hash": _digest(prompt)}
                row = rows.setdefault((filter_name, number), row)
                row |= spec.get("rows", {}).get(number, {})
                row["metrics"].append(name)
                row[name] = value.tolist() if isinstance(value, np.generic) else value
        if samples:
            lines = "".join(json.dumps(row) + "\n" for row in rows.values())
            file = folder / f"samples_{task}_{date}.jsonl"
            file.write_text(lines, encoding="utf-8")
    for group, metrics in (group_scores or {}).items():
        data["results"][group] = {"alias": group} | metrics
        names = [metric.split(",")[0] for metric in metrics]
        data["higher_is_better"][group] = dict.fromkeys(names, True)
    file = folder / f"results_{date}.json"
    file.write_text(json.dumps(data | sections, indent=2), encoding="utf-8")
    return file


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def pruning(percent: int, *, criterion: str = "maw", seed: int | None = None) -> dict:
    """Return what ``pruned-hf`` records of a model with H = 100 and I = 400."""
    kept = 400 - 4 * percent
    before_after = {
        "intermediate_size": (400, kept),
        "expansion_ratio": (4.0, kept / 100),
        "parameters": (1000, 1000 - 6 * percent),
    }
    return {
        "criterion": criterion if percent else None,
        "asked": {"prune_percent": str(percent)},
        "layers": 2,
        "hidden_size": 100,
        **{f"{name}_before": pair[0] for name, pair in before_after.items()},
        **{f"{name}_after": pair[1] for name, pair in before_after.items()},
        "kept_digest": f"{percent:064x}" if percent else None,
        **({"seed": seed} if percent and seed is not None else {}),
    }


def write_sweep(
    folder: Path, runs: dict, *, metadata: dict | None = None, **failures
) -> Path:
    """Write a sweep folder.

    Args:
        folder: Where.
        runs: By configuration id: ``(percent, tasks)`` with tasks as in `write_run`; in
            place of the percent also what `pruning` returns, or a floor's model type.
        metadata: What the YAML file of each task declares, by task.
        **failures: By configuration id, the task that failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    units = {name: dict.fromkeys(tasks, "0") for name, (_, tasks) in runs.items()}
    for identifier, task in failures.items():
        units[identifier][task] = "0"
    configurations = [{"id": name, "units": units[name]} for name in runs]
    definition = {"schema_version": 1, "configurations": configurations}
    (folder / "sweep.json").write_text(json.dumps(definition))
    for identifier, (size, tasks) in runs.items():
        # A model type in place of a size is one that knows nothing.
        of = pruning(size) if isinstance(size, int) else size
        about = {"config": {"model": of}} if isinstance(of, str) else {"pruning": of}
        for task, metrics in tasks.items():
            unit = unit_folder(folder, identifier, task)
            declared = {"metadata": (metadata or {}).get(task, {})}
            write_run(unit, {task: metrics}, configs={task: declared}, **about)
            _write_unit(unit)
    for identifier, task in failures.items():
        unit = unit_folder(folder, identifier, task)
        unit.mkdir(parents=True)
        error = {"task": task, "message": "out of memory"}
        (unit / "error.json").write_text(json.dumps(error))
        _write_unit(unit)
    return folder


def _write_unit(folder: Path) -> None:
    unit = {"schema_version": 1, "fingerprint": "0", "seconds": 0}
    (folder / "unit.json").write_text(json.dumps(unit))
