"""What `benchmarks/healing.py` prints, on a tiny checkpoint."""

from __future__ import annotations

import json

import pytest


@pytest.fixture(scope="module")
def healing(script):
    return script("healing")


def test_runs_of_words_are_counted_without_case_and_punctuation(healing):
    known = healing.runs_of_words("We the People, of the United States.", 3)
    assert len(known) == 5
    documents = ["we the people", "of the people by the people", "No."]
    found = healing.overlap(known, documents, 3)
    # One of the one run, none of the four different ones, and a text that is too short.
    assert found == "1 of 3 documents, 20.00% of the runs"


@pytest.mark.slow
def test_the_table_has_the_loss_before_and_after(
    healing, tiny_llama, tmp_path, capsys, monkeypatch
):
    data = tmp_path / "data.jsonl"
    texts = [f"Speech {n} of a day that was as long as others." for n in range(9)]
    data.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    words = ["healing.py", "--data", str(data), "--pretrained", str(tiny_llama)]
    words += ["--output", str(tmp_path / "out"), "--rows", "next token"]
    words += ["--max_steps", "2", "--max_length", "16", "--evaluation", str(data)]
    words += ["--training_args", "use_cpu=true,learning_rate=0.01"]
    monkeypatch.setattr("sys.argv", words)
    assert healing.main() == 0
    printed = capsys.readouterr().out
    assert "7 documents trained on, 2 held out" in printed
    assert "|held documents|" in printed
    assert "9 of 9 documents" in printed
    pruned, healed = (
        next(line for line in printed.splitlines() if line.startswith(f"|{name}|"))
        for name in ("pruned", "next token")
    )
    assert float(healed.split("|")[2]) < float(pruned.split("|")[2])
    assert healed.split("|")[5] == str(2 * 8 * 16)
