"""The page of `benchmarks/gpu_check.py`, made on the CPU with a tiny shape."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time

import psutil
import pytest
import torch

from tests.helpers import checkpoints


@pytest.fixture
def part(script, tmp_path):
    """Return what runs a part in this process, giving its exit code and what it wrote."""

    def run(name, shape):
        page = tmp_path / "part.md"
        words = ["--part", name, "--shape", shape, "--page", str(page)]
        words += ["--device", "cpu", "--folder", str(tmp_path)]
        return script("gpu_parts").main(words), page.read_text(encoding="utf-8")

    return run


@pytest.fixture
def on_the_cpu(script, tmp_path):
    """Return what makes the page, giving the exit code, the results of the parts, and the page."""

    def run():
        file = tmp_path / "page.md"
        words = ["--quick", "--device", "cpu", "--output", str(file)]
        code, page = script("gpu_check").main(words), file.read_text(encoding="utf-8")
        rows = r"^\|([^|]+)\|(passed|failed|skipped)\|$"
        return code, dict(re.findall(rows, page, re.MULTILINE)), page

    return run


@pytest.mark.slow
def test_one_command_writes_a_page_of_all_parts(on_the_cpu):
    code, results, page = on_the_cpu()
    parts = ("Answers equal to those of hf", "Load, tiny", "Speed, tiny")
    parts += ("Distillation, tiny",)
    others = dict.fromkeys(("pruned-vllm, tiny", "Several cards, tiny"), "skipped")
    assert results == {**dict.fromkeys(parts, "passed"), **others}
    assert code == 0
    assert "sh benchmarks/gpu_check.sh --quick --device cpu" in page
    for said in (
        "slots",
        "pruned on load, 40 %",
        " / hf-prefix|",
        "attention",
        "one card is visible",
        "training of the MLPs, cut by 40 %, takes",
    ):
        assert said in page
    assert str(checkpoints.ROOT) not in page


def test_parts_follow_one_that_fails_until_time_is_over(
    on_the_cpu, script, monkeypatch
):
    gpu_check = script("gpu_check")

    def run(part, options, seconds):
        if part.name == "speed":
            monkeypatch.setattr(gpu_check, "QUICK", 0)
        if part.name == "equality":
            return "failed", "**Failed**: the card is full"
        return "passed", '{"card": "cpu"}'

    monkeypatch.setattr(gpu_check, "run", run)
    code, results, page = on_the_cpu()
    assert code == 1
    assert list(results.values()) == ["failed", "passed", "passed", *["skipped"] * 3]
    assert "the card is full" in page
    assert "minutes are over" in page


def test_a_part_that_takes_too_long_is_ended(script):
    part = script("gpu_check").Part("", "facts", "", 0)
    status, said = script("gpu_check").run(part, ["--device", "cpu"], 0)
    assert (status, "more than 0 s" in said) == ("failed", True)


@pytest.mark.parametrize("interrupted", [False, True], ids=["too slow", "Ctrl-C"])
def test_it_ends_with_all_that_it_has_started(
    script, monkeypatch, tmp_path, interrupted
):
    """Launchers give each process a session, which a signal to the part's group does not reach."""
    gpu_check, file = script("gpu_check"), tmp_path / "number"
    stub = tmp_path / "python"
    own = f"setsid sh -c 'echo $$ > {file}; exec sleep 999' & wait"
    stub.write_text(f"#!/bin/sh\n{own}\n")
    stub.chmod(0o755)
    monkeypatch.setattr(gpu_check.sys, "executable", str(stub))

    class Started(subprocess.Popen):
        def wait(self, timeout=None):
            while timeout and not (file.exists() and file.read_text()):
                pass
            if timeout and interrupted:
                raise KeyboardInterrupt
            return super().wait(timeout and 0)

    monkeypatch.setattr(gpu_check.subprocess, "Popen", Started)
    stopped = pytest.raises(KeyboardInterrupt)
    with stopped if interrupted else contextlib.nullcontext():
        gpu_check.run(gpu_check.Part("", "cards", "", 0), [], 1)
    number = int(file.read_text())
    with contextlib.suppress(psutil.NoSuchProcess):
        left = psutil.Process(number)
        # Killed, but the kernel may take a moment to say so.
        while left.is_running() and left.status() != "zombie":
            time.sleep(0.05)


@pytest.mark.slow
def test_scores_of_several_cards_are_those_of_one(part, script, monkeypatch):
    """Two processes play two cards."""
    monkeypatch.setattr(script("gpu_parts").Parts, "count", 2)
    code, said = part("cards", "tiny")
    assert code == 0, said
    rows = re.findall(r"(?m)^\|([^|]+)\|\d+\|(\d+)\|(\S+) nats; 8 of 8 texts", said)
    assert [(name, int(requests)) for name, requests, _ in rows] == [
        ("one card", 24),
        ("2 copies of the model", 12),
        ("one model, split by layers", 24),
        ("one model, split by tensors", 24),
    ]


def test_a_way_that_fails_or_scores_otherwise_is_named(part, script, monkeypatch):
    cards, answered = script("gpu_cards"), iter([(4, [1.0], ["a"]), (4, [1.1], ["a"])])
    monkeypatch.setattr(script("gpu_parts").Parts, "count", 3)
    monkeypatch.setattr(cards, "_logged", lambda _: next(answered))
    split = lambda launcher, model_args, *_: "parallelize" in model_args
    monkeypatch.setattr(cards, "_evaluate", lambda *a: "NoCard" if split(*a) else None)
    code, said = part("cards", "tiny")
    assert (code, "|one card|" in said) == (1, True)
    assert "3 copies of the model: the scores are not those of one card; " in said
    assert "one model, split by layers: NoCard" in said


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), "float16"), ((8, 0), "bfloat16")]
)
def test_cards_without_bfloat16_run_in_float16(script, monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    parts = script("gpu_parts").Parts("cuda", None, "tiny", checkpoints.ROOT)
    assert parts.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("shape, weights, most", [("1B", 2.3, 6), ("8B", 15.0, 20)])
def test_a_shape_that_does_not_fit_is_skipped_with_what_it_needs(
    part, script, monkeypatch, shape, weights, most
):
    class Little:
        available = 2**30

    monkeypatch.setattr(script("gpu_parts").psutil, "virtual_memory", Little)
    code, said = part("speed", shape)
    assert code == script("gpu_check").SKIPPED
    assert f"which {weights} are weights" in said
    assert weights < float(re.search(r"about ([\d.]+) GiB", said)[1]) < most


def test_hf_gets_the_largest_batch_size_that_has_memory(part, script, monkeypatch):
    beside_hf = script("beside_hf")

    class Small(beside_hf.HFLM):
        def loglikelihood(self, *args, **kwargs):
            if self.batch_size > 1:
                raise torch.OutOfMemoryError
            return super().loglikelihood(*args, **kwargs)

    monkeypatch.setattr(beside_hf, "HFLM", Small)
    code, said = part("speed", "tiny")
    assert code == 0
    assert "batch size 8, out of memory" in said
    assert "|hf, batch size 1|" in said


def test_the_process_that_writes_the_page_has_no_torch():
    code = "import gpu_check, sys; sys.exit('torch' in sys.modules)"
    command, folder = [sys.executable, "-c", code], checkpoints.ROOT / "benchmarks"
    subprocess.run(command, cwd=folder, check=True)


def test_without_a_card_it_says_what_would_work(script, monkeypatch, capsys):
    monkeypatch.setattr(script("gpu_check"), "run", lambda *_: ("failed", "no card"))
    with pytest.raises(SystemExit):
        script("gpu_check").main([])
    assert "--device cpu" in capsys.readouterr().err
