"""Damaged files are refused in a sentence or do no harm: they are no answer, and crash nothing."""

from __future__ import annotations

import itertools
import json
import math
from typing import TYPE_CHECKING, Any

import pytest

from tests.contract.commands import Done, pruned
from tests.helpers.results_files import (
    answered,
    offering,
    pruning,
    write_run,
    write_sweep,
)


if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    #: Keys of objects and indices of lists, from the outermost to the innermost.
    Place = tuple[str | int, ...]

N = 12
REMOVED = object()
#: What takes the place of a value.
DAMAGES = {
    "null": None,
    "text": "many",
    "negative": -3,
    "huge": 10**400,
    "list": [1],
    "object": {"a": 1},
    "nan": math.nan,
    "removed": REMOVED,
}
#: Of so many cases, the tests try one; odd, so that they meet all damages.
EVERY = {"results": 41, "samples": 23, "baseline": 23, "sweep": 5}
#: A third of them are fast.
FAST = [(kind, 0, 3 * step) for kind, step in EVERY.items()]
SLOW = [
    (kind, third * step, 3 * step) for kind, step in EVERY.items() for third in (1, 2)
]
#: What a sentence names: a file, or a run, which is called after its folder.
NAMED = ("/base", "/candidate", "baseline.json", "/sweep", " base", " candidate")
#: A score that is missing is an answer of `check`.
MISSING = {"fingerprint", "configurations"}
#: Scores, where they do not fit the samples: refused once what is reported is compared with them.
SCORES = {"score"}
#: What a model answered.
ANSWERS = {"filtered_resps"}


def good() -> dict[str, Any]:
    """Return tasks of each kind by which documents are scored."""
    docs, mc2_rows = {}, {}
    for n in range(N):
        texts = [f"{word} {n}" for word in ("true", "right", "false")]
        single = {"choices": texts[::2], "labels": [1, 0]}
        several = {"choices": texts, "labels": [1, 1, 0]}
        docs[n] = {"mc1_targets": single, "mc2_targets": several}
        choices = [f" {text}" for text in texts]
        mc2_rows[n] = offering(choices, likelihoods=[-1.0, -2.0 - n, -1.5])
    truths = {"docs": docs, "rows": mc2_rows}
    rights = [n % 2 for n in range(N)]
    losses = [-2.0 - n / N for n in range(N)]
    perplexity = {"values": losses, "aggregation": "perplexity"}
    follows = {"values": [[True, n % 3 > 0] for n in range(N)], "aggregation": "pooled"}
    ifeval = {n: {"instruction_id_list": ["a:b", "c:d"], "key": n} for n in range(N)}
    written = {n: offering([{"until": []}]) | {"resps": [["x"]]} for n in range(N)}
    members = {name: answered([*rights[1:], 0], rights) for name in ("m_one", "m_two")}
    return {
        "choice": answered([0, *rights[1:]], rights),
        "truths": {
            "mc1,none": {"values": [float(n % 2) for n in range(N)], **truths},
            "mc2,none": {"values": [n / N for n in range(N)], **truths},
        },
        "text": {"perplexity,none": {**perplexity, "higher_is_better": False}},
        "follows": {
            "inst_level_strict_acc,none": {**follows, "docs": ifeval, "rows": written}
        },
        **members,
    }


def write(folder: Path) -> None:
    """Write good results, with everything in them that the harness and our models write."""
    tasks = good()
    members = [name for name in tasks if name.startswith("m_")]
    values = [tasks[name]["acc,none"]["values"] for name in members]
    score = sum(map(sum, values)) / (N * len(members))
    widths = {"groups": [{"mlps": 2, "width_before": 400, "width_after": 320}]}
    repair = {"repair": "r", "calibration": {"sha256": "0", "tokens": 9}}
    config = {
        "model": "pruned-hf",
        "model_args": {"pretrained": "tiny"},
        "pruning": pruning(20) | widths | repair,
        "energy": {"energy_joules": 3.0},
        "answer_paths": {"loglikelihood": {"requests": {"shared": 3}}},
        "gen_kwargs": {"do_sample": False},
        "random_seed": 0,
    }
    declared = {"family": "knowledge", "primary_metric": "acc", "floors": {"acc": 0.5}}
    write_run(
        folder,
        tasks,
        groups={"m": members},
        group_scores={"m": {"acc,none": score, "acc_stderr,none": 0.1}},
        config=config,
        configs={"choice": {"metadata": declared | {"cluster": "c", "level": "l"}}},
        task_hashes=dict.fromkeys(tasks, "0"),
        total_evaluation_time_seconds="12.5",
        chat_template_sha=None,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with two good results, whose verdict is not `do not ship`, and a baseline."""
    folder = tmp_path_factory.mktemp("damaged")
    for name in ("base", "candidate"):
        write(folder / name)
    file = folder / "baseline.json"
    sizes = {"p0": (0, {"choice": good()["choice"]})}
    sizes["p20"] = 20, sizes["p0"][1]
    write_sweep(folder / "sweep", sizes)
    of_sweep = "--baseline", folder / "sweep-baseline.json"
    assert pruned("check", folder / "sweep", *of_sweep, "--update").code == 0
    for rule in ("--not_worse", "--absolute=0.01"):
        done = pruned("check", folder / "base", "--baseline", file, "--update", rule)
        assert done.code == 0, done.err
    return folder


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """Yield every place within a value; the first of a list, or of documents, stands for the others."""
    if isinstance(value, list):
        value = dict(enumerate(value[:1]))
    inner = [*value.items()] if isinstance(value, dict) else []
    for key, each in inner[:1] if place[-2:-1] == ("documents",) else inner:
        yield (*place, key)
        yield from places(each, (*place, key))


def damaged(value: Any, place: Place, damage: Any) -> Any:
    """Return a copy with something else in a place."""
    value = json.loads(json.dumps(value))
    *above, last = place
    inner = value
    for key in above:
        inner = inner[key]
    if damage is REMOVED:
        del inner[last]
    else:
        inner[last] = damage
    return value


def cases(made: Path, kind: str) -> Iterator[tuple[list[Path], Place, str, str]]:
    """Yield files of a kind that hold the same, a place in them, a damage, and what it leaves of them."""
    if kind == "baseline":
        same = [[made / "baseline.json"]]
    elif kind == "sweep":
        sweep = made / "sweep"
        same = [[sweep / "sweep.json"], [*sweep.glob("units/*/*/unit.json")]]
    else:
        names = sorted(file.name for file in (made / "base").glob(f"{kind}_*"))
        same = [[made / run / name for run in ("base", "candidate")] for name in names]
    for files in same:
        text = files[0].read_text()
        first, *others = text.splitlines(keepends=True) if kind == "samples" else [text]
        for place in places(json.loads(first)):
            for name, damage in DAMAGES.items():
                left = json.dumps(damaged(json.loads(first), place, damage))
                yield files, place, name, "".join([left + "\n", *others])


def commands(made: Path, kind: str, file: Path) -> Iterator[Done]:
    """Run what reads a damaged file."""
    base, candidate = made / "base", made / "candidate"
    baseline, out = made / "baseline.json", ("--output_path", made / "out")
    if kind == "sweep":
        base = candidate = made / "sweep"
        baseline = made / "sweep-baseline.json"
    if kind == "sweep" or file.parent != base:
        yield pruned("check", candidate, "--baseline", baseline)
    if kind != "baseline":
        yield pruned("verdict", base, candidate, *out)


def fault(done: Done, may_fail: bool) -> str:
    """Say what is wrong with how a command ended; empty if nothing is."""
    told = done.err.strip().splitlines()
    if done.code not in (0, 1, 2, 3) or (done.code == 1 and not may_fail):
        return f"exit code {done.code}: {' '.join(told[-4:-1]) or done.out}"
    # Some say which run they mean, which is called after its folder.
    named = any(word in told[-1] for word in NAMED) if told else False
    errors = sum("error:" in line for line in told)
    if errors and (errors > 1 or not named or "error:" not in told[-1]):
        return f"not one line that names a file: {done.err}"
    return ""


def may_fail(place: Place, damage: str) -> bool:
    """Whether what is damaged is a score, an answer, or what tells that a score is there."""
    missing = place[0] == "results" and damage == "removed"
    return missing or bool({*place} & (MISSING | SCORES | ANSWERS))


@pytest.mark.parametrize(
    ("kind", "start", "step"),
    [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_what_is_damaged_is_refused_in_a_sentence_or_does_no_harm(
    made, kind, start, step
):
    found = []
    for files, place, damage, text in itertools.islice(
        cases(made, kind), start, None, step
    ):
        for file in files:
            kept = file.read_text()
            file.write_text(text)
            ended = [*commands(made, kind, file)]
            file.write_text(kept)
            label = f"{file.relative_to(made)} {'.'.join(map(str, place))} {damage}"
            whys = (fault(done, may_fail(place, damage)) for done in ended)
            found += [f"{label}: {why}" for why in whys if why]
    assert not found, "\n".join(found)
