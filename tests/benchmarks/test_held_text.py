"""The tables of losses on held text, on a tiny checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.functional import cross_entropy

from lm_eval_pruned import load_pruned


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    lines = [json.dumps({"text": f"{n} and {n * n} are numbers."}) for n in range(12)]
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def tables(printed: str) -> list[list[list[str]]]:
    """Return the cells of each table, without its head."""
    found: list[list[list[str]]] = [[]]
    for line in printed.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [rows[2:] for rows in found if rows]


def printed_by(script, name, text, model, capsys, *more) -> str:
    given = ["--data", str(text), "--pretrained", str(model), "--samples", "4"]
    assert script(name).main([*given, "--tokens", "16", *more]) == 0
    return capsys.readouterr().out


def test_held_documents_are_those_that_calibration_does_not_see(
    script, text, tiny_llama, capsys
):
    printed = printed_by(
        *(script, "allocation", text, tiny_llama, capsys),
        *("--prune_percents", "50", "--rows", "uniform maw", "sensitivity maw"),
    )
    (rows,) = tables(printed)
    assert [row[0] for row in rows] == ["uniform maw", "sensitivity maw"]
    assert rows[0][2:4] == ["0%", ""]
    assert 0 <= float(rows[1][3]) <= 1
    assert rows[0][4] == rows[1][4]

    held = script("held_text")
    model = load_pruned(tiny_llama, prune_percent=50, dtype="float32")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    documents = [
        torch.tensor(tokenizer(json.loads(line)["text"])["input_ids"][:16])
        for line in text.read_text().splitlines()[1::2]
    ]
    with torch.no_grad():
        expected = [
            cross_entropy(model(ids[None]).logits[0, :-1], ids[1:]).item()
            for ids in documents
        ]
    found = held.losses(model, documents)
    assert found == pytest.approx(expected)
    assert float(rows[0][1]) == pytest.approx(found.mean(), abs=6e-4)
