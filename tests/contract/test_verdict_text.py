"""What docs/verdict.md promises of text: the loss, and the divergence from the base."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.contract.commands import pruned
from tests.helpers.checkpoints import ROOT, save_tiny
from tests.helpers.results_files import losses, write_two
from tests.sweeps.conftest import quick  # noqa: F401


DEMO = ROOT / "tasks" / "demo"
PARTS = [f"Part {n}. " + f"Some words {n * n} of this text. " * 8 for n in range(70)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return [save_tiny(tmp_path_factory.mktemp("m"), seed=seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def said(models, tmp_path_factory):
    """Return a function that judges two models, or finished results, on a file of text."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "my.txt").write_text("\n\n".join(PARTS))

    def said(one, other, *words, file=folder / "my.txt", out="out"):
        both = [
            f"hf,pretrained={path},dtype=float32" if path in models else path
            for path in (one, other)
        ]
        words = *words, "--text", file, "--tasks", "pruned_demo_bias", "--limit", "70"
        words = *words, "--device", "cpu", "--include_path", DEMO
        return pruned("verdict", *both, *words, "--output_path", folder / out), folder

    return said


def scored(folder, name):
    """Return the score and the samples of a model's unit on the text of the file."""
    unit = folder / "out" / name / "units" / name / "held_text"
    (results,), (samples,) = (unit.glob(f"{of}_*") for of in ("results", "samples"))
    rows = [json.loads(line) for line in samples.read_text("utf-8").splitlines()]
    return json.loads(results.read_text("utf-8"))["results"]["held_text"], rows


@pytest.fixture(scope="module")
def first(models, said):
    return said(*models)


def log_probs(path, text):
    """Return log-probabilities of each token after the first, as the harness has them predicted."""
    model, tokenizer = (
        kind.from_pretrained(path) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    start = tokenizer.bos_token_id or tokenizer.eos_token_id
    ids = torch.tensor([start, *tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        return model(ids[None, :-1]).logits[0].log_softmax(-1), ids[1:]


def test_kl_is_that_of_the_whole_vocabulary_at_16_positions_of_each_text(models, first):
    done, folder = first
    assert done.code in (0, 1, 2)
    _, rows = scored(folder, "candidate")
    assert len(rows) == 70
    for row in rows[::23]:
        text = row["doc"]["text"]
        one, ids = log_probs(models[0], text)
        other, _ = log_probs(models[1], text)
        places = np.linspace(0, len(ids) - 1, 16).round()
        kl = (one.exp() * (one - other)).sum(-1)[places]
        assert row["kl"] == [pytest.approx(float(kl.sum()), abs=0.01), 16.0]
        loss = other.gather(1, ids[:, None]).sum()
        assert row["bits_per_byte"][0] == pytest.approx(float(loss), abs=1e-2)


def test_it_is_shown_with_an_interval_and_not_judged_without_a_margin(first):
    done, folder = first
    score, rows = scored(folder, "candidate")
    line = next(row for row in done.out.splitlines() if re.search(r"\|kl *\|", row))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[:4] == ["held_text", "kl", "not judged", "0.0000"]
    assert float(cells[4]) == pytest.approx(score["kl,none"], abs=1e-4)
    means = [total / count for total, count in (row["kl"] for row in rows)]
    half = 1.67 * np.std(means, ddof=1) / np.sqrt(len(means))
    low, high = (float(end) for end in cells[8].strip("[]").split(","))
    assert high - low == pytest.approx(2 * half, rel=0.6)
    assert low < score["kl,none"] < high
    page = (folder / "out" / "verdict.html").read_text("utf-8")
    assert "kl is the divergence of the candidate" in page


def test_a_margin_that_names_it_has_it_judged(models, said, first):
    kl = scored(first[1], "candidate")[0]["kl,none"]
    for share, word in ((1.5, "equivalent"), (0.5, "worse")):
        done, _ = said(*models, "--margin", f"kl={share * kl:.4f}")
        assert re.search(rf"\|kl *\|{word} *\|", done.out), done.out


def test_another_candidate_meets_the_probabilities_that_the_base_left(
    models, said, first
):
    base = first[1] / "out" / "base"
    (kept,) = base.rglob("log_probs.safetensors")
    before = kept.stat().st_mtime_ns
    done, folder = said(models[0], models[0])
    assert (scored(folder, "candidate")[0]["kl,none"], done.code) == (0.0, 0)
    assert re.search(r"\|kl *\|not judged *\|0.0000\| *0.0000", done.out)
    assert kept.stat().st_mtime_ns == before
    # With another base, the same candidate is measured anew.
    said(*models[::-1])
    assert scored(folder, "candidate")[0]["kl,none"] > 0.1


def test_with_finished_results_it_is_not_measured_and_the_page_says_so(tmp_path):
    values = losses(([-500.0 - n, 300.0] for n in range(64)), "bits_per_byte")
    task = {"pruned_demo_text": {"bits_per_byte,none": values}}
    paths = write_two(tmp_path, task, task)
    done = pruned("verdict", *paths, "--output_path", tmp_path / "out")
    assert done.code == 0
    why = "(KL) was not measured, because one of the two is finished results"
    assert why in done.out
    done = pruned("verdict", *paths, "--text", "x.txt", "--output_path", tmp_path)
    assert "which is finished results: pass two models" in done.sentence


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "cannot be read as text"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b" ", "is empty"),
    ],
)
def test_a_file_that_is_no_text_is_refused_before_anything_is_evaluated(
    content, why, models, said, tmp_path
):
    file = tmp_path / "my.txt"
    if content is not None:
        file.write_bytes(content)
    done, folder = said(*models, file=file, out="none")
    assert (done.code, why in done.sentence) == (2, True)
    assert not [*(folder / "none").rglob("unit.json")]
