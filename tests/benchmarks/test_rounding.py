"""What `benchmarks/rounding.py` prints, on a tiny checkpoint."""

from __future__ import annotations

import contextlib
import math

import pytest


@pytest.fixture(scope="module")
def rounding(script):
    return script("rounding")


@pytest.mark.slow
def test_the_table_has_three_distances_and_their_ratio(rounding, tiny_llama, capsys):
    # Whether sharing lies further off is tested below; a tiny model decides it by chance.
    with contextlib.suppress(SystemExit):
        rounding.main(["--pretrained", str(tiny_llama), "--limit", "2"])
    lines = capsys.readouterr().out.splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("|")
    ]
    heads, _, *body = rows
    assert heads[2:5] == ["hf, batch size 1", "hf, batch size 8", "hf-prefix"]
    assert [row[:2] for row in body] == [
        [dtype, percent] for dtype in ("bfloat16", "float16") for percent in ("0", "40")
    ]
    figures = [[float(cell) for cell in row[2:]] for row in body]
    assert all(math.isfinite(value) and value > 0 for row in figures for value in row)
    # float16 has eight times the precision of bfloat16.
    for low, high in zip(figures[:2], figures[2:], strict=True):
        assert high[2] < low[2] / 3


def test_it_fails_where_sharing_lies_further_off(rounding, tiny_llama, monkeypatch):
    found = {"hf, batch size 1": 1.0, "hf, batch size 8": 1.0, "hf-prefix": 1.26}
    monkeypatch.setattr(rounding, "distances", lambda *_: found)
    monkeypatch.setattr(rounding, "requests_of", lambda *_: [])
    with pytest.raises(SystemExit, match=r"1\.26 times as far"):
        rounding.main(["--pretrained", str(tiny_llama), "--limit", "1"])
