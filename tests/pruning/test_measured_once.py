"""What text says of a model is measured once, and read from the user's cache by later loads."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from lm_eval.utils import warning_once

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.checkpoints.planning import plan_rows
from lm_eval_pruned.pruning import measuring
from lm_eval_pruned.pruning.criteria import ACTIVITY
from lm_eval_pruned.pruning.curvature import Curvature
from lm_eval_pruned.pruning.moments import TextMoments
from lm_eval_pruned.util import cache
from tests.helpers.checkpoints import (
    byte_tokenizer,
    edit_config,
    save_tiny,
    tiny_config,
    tiny_model,
)
from tests.helpers.ways_to_load import assert_same_model, write_texts


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return {"calibration": write_texts(tmp_path / "texts.jsonl")}


@pytest.fixture
def work(monkeypatch):
    """Count what is computed: passes of text, by what they are for."""
    passes: Counter[str] = Counter()
    for module, name in (
        (measuring, "calibrate"),
        (measuring, "curvature"),
        (TextMoments, "measure"),
        (measuring.LoadedModel, "_curves"),
    ):
        original = getattr(module, name)

        def counted(*args, run=original, what=name, **named):
            passes[what] += 1
            return run(*args, **named)

        monkeypatch.setattr(module, name, counted)
    return passes


ACT = {"ratio": 1, "criterion": "act"}
SHARED = {"ratio": 2, "criterion": "act", "allocation": "sensitivity"}
#: Loads, and how often text runs for them.
LOADS = [
    *(
        ([{"prune_percent": n, "criterion": name} for n in (10, 40)], {"calibrate": 1})
        for name in ACTIVITY
    ),
    (
        [ACT | {"dtype": dtype} for dtype in (torch.bfloat16, torch.float16)],
        {"calibrate": 1},
    ),
    (
        [{"ratio": n, "recipe": "best"} for n in (1, 2)],
        {"curvature": 1, "measure": 1},
    ),
    (
        [
            {"ratio": n, "recipe": recipe}
            for n in (1, 2)
            for recipe in ("uneven", "best")
        ],
        {"curvature": 1, "measure": 1, "_curves": 1},
    ),
    (
        [SHARED, SHARED | {"ratio": 1}, SHARED | {"repair": "least_squares"}],
        {"calibrate": 1, "curvature": 1, "measure": 1, "_curves": 2},
    ),
]


@pytest.mark.parametrize(("loads", "expected"), LOADS)
def test_several_sizes_are_measured_once(
    loads, expected, tiny_llama, work, text, tmp_path, monkeypatch
):
    models = [load_pruned(str(tiny_llama), **asked, **text) for asked in loads]
    assert work == expected
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    alone = load_pruned(str(tiny_llama), **loads[-1], **text)
    assert_same_model(models[-1], alone)
    assert models[-1].prune_record.as_dict() == alone.prune_record.as_dict()


def test_the_plan_of_several_sizes_takes_one_pass_of_text(tiny_llama, text, work):
    sizes = (str(tiny_llama), "prune_percent", [20, 40])
    rows = plan_rows(*sizes, criterion="act", allocation="sensitivity", **text)
    once = ("calibrate", "curvature", "measure", "_curves")
    assert work == dict.fromkeys(once, 1)
    assert all(row.layer_widths for row in rows)
    alike = [row.parameters for row in plan_rows(*sizes)]
    assert [row.parameters for row in rows] == alike


def _other_weights(folder, text):
    save_tiny(folder, seed=1)


def _other_config(folder, text):
    edit_config(folder, rms_norm_eps=0.5)


def _other_text(folder, text):
    write_texts(text, ["Other words.", "And more of them."])


def _fewer_texts(folder, text):
    return {"calibration_samples": 1}


def _other_weights_of_the_same_size_and_time(folder, text):
    times = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    save_tiny(folder, seed=1)
    for file, time_of_change in times.items():
        os.utime(file, ns=(time_of_change, time_of_change))


def _cut_short(folder, text):
    (file,) = (cache.cache_folder() / "measured").iterdir()
    file.write_bytes(file.read_bytes()[:40])


def _zeros_at_the_end(folder, text):
    (file,) = (cache.cache_folder() / "measured").iterdir()
    file.write_bytes(file.read_bytes()[:-40] + bytes(40))


@pytest.mark.parametrize(
    "change",
    [
        _other_weights,
        _other_weights_of_the_same_size_and_time,
        _other_config,
        _other_text,
        _fewer_texts,
        _cut_short,
        _zeros_at_the_end,
    ],
)
def test_what_may_differ_is_measured_anew(change, text, work, tmp_path):
    folder = save_tiny(tmp_path / "model")
    load_pruned(str(folder), **ACT, **text)
    asked = change(folder, tmp_path / "texts.jsonl") or {}
    load_pruned(str(folder), **ACT, **text, **asked)
    assert work == {"calibrate": 2}


@pytest.mark.parametrize("recipe", ["best", "uneven"])
def test_what_takes_too_much_room_is_measured_for_each_use(
    recipe, tiny_llama, text, work, monkeypatch
):
    asked = {"ratio": 2, "recipe": recipe, **text}
    stored = load_pruned(str(tiny_llama), **asked)
    assert work["measure"] == 1
    monkeypatch.setattr(measuring, "_MOST_STORED", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.cache_folder() / "another"))
    assert_same_model(stored, load_pruned(str(tiny_llama), **asked))
    assert work["measure"] == 1


def test_an_expert_that_sees_no_token_does_not_have_the_text_run_again(
    text, tmp_path, monkeypatch
):
    folder = save_tiny(tmp_path / "experts", "mixtral", num_local_experts=8)
    Path(text["calibration"]).write_text('{"text": "One."}\n')
    runs, run = [], TextMoments._run
    monkeypatch.setattr(
        TextMoments, "_run", lambda self, mlps: (runs.append(mlps), run(self, mlps))[1]
    )
    for recipe in ("uneven", "best"):
        load_pruned(str(folder), prune_percent=40, recipe=recipe, **text)
    assert len(runs) == 1


def test_a_model_in_memory_is_measured_each_time(tiny_llama, text, work):
    for _ in range(2):
        model = load_pruned(str(tiny_llama))
        prune_model(model, tokenizer=byte_tokenizer(), **ACT, **text)
    assert work == {"calibrate": 2}
    assert not cache.cache_folder().exists()


def test_layers_that_stay_are_not_measured(text, work, monkeypatch):
    model, ran = tiny_model(tiny_config(num_hidden_layers=3)), []
    run = TextMoments._run
    noted = lambda self, mlps: (ran.extend(m.layer for m in mlps), run(self, mlps))[1]
    monkeypatch.setattr(TextMoments, "_run", noted)
    asked = {"ratio": 2, "recipe": "best", "layers": "0-1"}
    prune_model(model, tokenizer=byte_tokenizer(), **asked, **text)
    assert ran == [1, 0]
    assert not work["measure"]


def test_a_cache_that_cannot_be_written_is_no_error_and_is_told_once(
    tiny_llama, text, work, tmp_path, monkeypatch, caplog
):
    warning_once.cache_clear()
    # A file where the folder would be, as even root cannot make it then.
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    first, second = (load_pruned(str(tiny_llama), **ACT, **text) for _ in range(2))
    assert first.prune_record.digest == second.prune_record.digest
    assert work == {"calibrate": 2}
    (message,) = (line for line in caplog.messages if "cannot be written" in line)
    assert "set XDG_CACHE_HOME to a writable folder" in message


def test_what_killed_processes_left_and_the_oldest_entries_go(text, monkeypatch):
    folder = cache.cache_folder() / "measured"
    folder.mkdir(parents=True)
    for name, days in ((".killed-1", 2), (".writing-1", 0), ("old", 9), ("new", 1)):
        (folder / name).write_bytes(bytes(4000))
        at = time.time() - 86_400 * days
        os.utime(folder / name, (at, at))
    monkeypatch.setattr(cache, "_MOST", 10_000)
    cache.measured_once("model", "what", lambda: ({"x": torch.zeros(1)}, {}))
    left = {path.name for path in folder.iterdir()}
    assert left >= {".writing-1", "new"} and not left & {".killed-1", "old"}
    # What was written last stays, however large it is.
    monkeypatch.setattr(cache, "_MOST", 10)
    cache.measured_once("model", "more", lambda: ({"x": torch.zeros(9)}, {}))
    assert len([path for path in folder.iterdir() if path.suffix]) == 1


def test_a_user_without_a_home_has_no_cache_and_is_told_once(
    tiny_llama, text, work, monkeypatch, caplog
):
    warning_once.cache_clear()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    for _ in range(2):
        load_pruned(str(tiny_llama), **ACT, **text)
    assert work == {"calibrate": 2}
    (message,) = (line for line in caplog.messages if "no home folder" in line)
    assert "set XDG_CACHE_HOME to a writable folder" in message


def test_experts_that_see_no_token_are_ordered_by_their_weights_and_not_repaired(
    text, tmp_path, caplog
):
    """Llama 4 hands each expert zeros where it has no token."""
    folder = save_tiny(tmp_path / "experts", "llama4_text", num_local_experts=16)
    model = load_pruned(str(folder), prune_percent=40, recipe="best", **text)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    (message,) = (line for line in caplog.messages if "GLU-MLPs are repaired" in line)
    assert "repair=least_squares" in message


def test_a_matrix_that_experts_share_is_kept_once_and_mapped(text):
    shared, other = torch.rand(3, 3).T, torch.rand(2, 2)
    costs = Curvature(1.5, {"0.a": shared, "0.b": shared, "1": other})
    for _ in range(2):
        again = Curvature.of(*cache.measured_once("model", "", costs.as_measured))
        assert again.loss == costs.loss
        assert again.roots.keys() == costs.roots.keys()
        assert all(
            torch.equal(again.roots[name], costs.roots[name]) for name in again.roots
        )
        assert again.roots["0.a"] is again.roots["0.b"]
        (file,) = (cache.cache_folder() / "measured").iterdir()
        assert str(file) in Path("/proc/self/maps").read_text()
