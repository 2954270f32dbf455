"""The page of `benchmarks/gpu_check.py`, made on the CPU with a tiny shape."""

from __future__ import annotations

import re
import subprocess
import sys

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
    assert results == {**dict.fromkeys(parts, "passed"), "pruned-vllm, tiny": "skipped"}
    assert code == 0
    assert "sh benchmarks/gpu_check.sh --quick --device cpu" in page
    for said in ("slots", "pruned on load, 40 %", " / hf-prefix|", "attention"):
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
    assert list(results.values()) == ["failed", "passed", "passed", "skipped"]
    assert "the card is full" in page
    assert "minutes are over" in page


def test_a_part_that_takes_too_long_is_ended(script):
    part = script("gpu_check").Part("", "facts", "", 0)
    status, said = script("gpu_check").run(part, ["--device", "cpu"], 0)
    assert (status, "more than 0 s" in said) == ("failed", True)


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
