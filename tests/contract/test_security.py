"""SECURITY.md: what the package does not do with files and arguments of others."""

from __future__ import annotations

import ast
import pickle
import re
import sys

import pytest

from lm_eval_pruned import PrunePlan, load_pruned
from tests.contract.commands import pruned
from tests.helpers import checkpoints, evaluations
from tests.helpers.installed import modules
from tests.helpers.results_files import write_run


#: What unpickles, runs text as code, starts programs or talks to other hosts, by full name.
RULED_OUT = re.compile(
    r"(_?pickle|cPickle|dill|cloudpickle|joblib|shelve|marshal|subprocess|multiprocessing|pty|code"
    r"|runpy|requests|urllib3?|http|httpx|aiohttp|ftplib|smtplib|telnetlib|xmlrpc)(\..*)?"
    r"|(builtins\.)?(eval|exec)|compile|__import__|torch\.load|(numpy|np)\.load|pandas\.read_pickle"
    r"|yaml\.(load|full_load|unsafe_load|load_all)|socket\.(create_connection|socket)"
    r"|os\.(system|popen|startfile|(exec|spawn|posix_spawn).*)"
)


def broken_promises(source: str) -> list[str]:
    """Return the names in `source` that SECURITY.md rules out."""
    names = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                names += [alias.name for alias in node.names]
            case ast.ImportFrom(level=0):
                names += [f"{node.module}.{alias.name}" for alias in node.names]
            case ast.Call():
                names.append(ast.unparse(node.func))
    return [name for name in names if RULED_OUT.fullmatch(name)]


def test_a_broken_promise_is_seen():
    for source in (
        "def late():\n    from pickle import loads",
        "import urllib.request as request",
        "torch.load(path, weights_only=True)",
        "os.execvp(program, arguments)",
    ):
        assert broken_promises(source)
    assert not broken_promises("import re, yaml\nmodel.eval()\nre.compile('a')")


def test_the_package_keeps_its_promises():
    for name, path in modules().items():
        broken = broken_promises(path.read_text("utf-8"))
        if name.endswith("sweeps.apart"):
            broken = [b for b in broken if not b.startswith("multiprocessing")]
        assert not broken, path


class Payload:
    """What runs a function of its choice where it is unpickled."""

    def __init__(self, touched):
        self.touched = touched

    def __reduce__(self):
        return (open, (str(self.touched), "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_it_does_not_unpickle_a_checkpoint(name, tmp_path):
    model, touched = checkpoints.save_tiny(tmp_path / "model"), tmp_path / "touched"
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(Payload(touched)))
    done = pruned(
        *("prune", "--model_args", f"pretrained={model}", "--ratio", 2),
        *("--output_path", tmp_path / "out"),
    )
    assert done.sentence
    assert not touched.exists()
    assert not (tmp_path / "out").exists()


def test_it_does_not_unpickle_results(tmp_path):
    touched = tmp_path / "touched"
    file = write_run(tmp_path / "run", {"task": {"acc,none": [1.0, 0.0]}})
    file.write_bytes(pickle.dumps(Payload(touched)))
    assert pruned("compare", tmp_path / "run", tmp_path / "run").sentence
    assert not touched.exists()


def test_a_yaml_file_makes_no_python_objects(tmp_path):
    touched = tmp_path / "touched"
    file = tmp_path / "sweep.yaml"
    file.write_text(
        f"output_path: !!python/object/apply:builtins.open [{touched}, w]\n"
    )
    assert "sweep.yaml" in pruned("sweep", "--config", file).sentence
    assert not touched.exists()


@pytest.fixture
def with_code(tmp_path):
    """A checkpoint that brings code, and the file that tells whether the code ran."""
    model = checkpoints.save_tiny(tmp_path / "model")
    touched = tmp_path / "touched"
    code = f"open({str(touched)!r}, 'w')\nraise ImportError('untrusted no more')\n"
    (model / "own_code.py").write_text(code)
    checkpoints.edit_config(
        model, model_type="own", auto_map={"AutoConfig": "own_code.Own"}
    )
    return model, touched


def test_it_does_not_run_code_that_comes_with_a_model(with_code, tmp_path):
    model, touched = with_code
    done = pruned("plan", "--model_args", f"pretrained={model}", "--ratios", 2)
    assert "trust_remote_code" in done.sentence
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_pruned(str(model), ratio=2)
    assert not touched.exists()


@pytest.mark.parametrize("text", ["off", "no", "yes", "1"])
def test_no_text_such_as_off_is_taken_for_yes(text, with_code):
    model, touched = with_code
    arguments = f"pretrained={model},trust_remote_code={text}"
    done = pruned("plan", "--model_args", arguments, "--ratios", 2)
    assert done.sentence.endswith("is not understood: pass true or false.")
    assert not touched.exists()


def test_code_that_comes_with_a_model_runs_with_trust_remote_code(with_code):
    """So the tests above would see it run."""
    model, touched = with_code
    with pytest.raises(ImportError, match="untrusted no more"):
        load_pruned(str(model), ratio=2, trust_remote_code=True)
    assert touched.exists()


NETWORK = """
import socket, sys


def refuse(*_, **__):
    print("the network was used", file=sys.stderr)
    raise OSError("this test has no network")


socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""


@pytest.mark.slow
def test_it_does_not_use_the_network_unless_asked_nor_write_elsewhere(
    tiny_llama, tmp_path
):
    """The commands in a fresh home, with the Hub allowed."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "sitecustomize.py").write_text(NETWORK)
    words = ["--model_args", f"pretrained={tiny_llama}", "--prune_percent", "30"]
    out = tmp_path / "out"
    program = (
        "from lm_eval_pruned.cli import main; "
        f"sys.exit(main({['prune', *words, '--output_path', str(out)]}))"
    )
    before = {p: p.stat().st_mtime_ns for p in tiny_llama.rglob("*")}
    done = evaluations.run(
        [sys.executable, "-c", f"import sys; {program}"],
        cwd=home,
        check=True,
        HOME=home,
        HF_HOME=home / "huggingface",
        HF_HUB_OFFLINE=0,
        PYTHONPATH=f"{home}:{checkpoints.ROOT}",
        PYTHONDONTWRITEBYTECODE=1,
        XDG_CACHE_HOME=home / "cache",
    )
    assert "the network was used" not in done.stderr
    assert {p: p.stat().st_mtime_ns for p in tiny_llama.rglob("*")} == before
    written = {p.relative_to(tmp_path).parts[:2] for p in tmp_path.rglob("*")}
    assert {parts[-1] for parts in written if parts[0] == "home"} <= {
        *("home", "cache", "sitecustomize.py", "huggingface")
    }


def test_a_criterion_of_another_package_is_imported_when_it_is_named(
    tmp_path, monkeypatch
):
    info = tmp_path / "others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: others\nVersion: 1.0\n"
    )
    entry = "[lm_eval_pruned.criteria]\nothers = others_criteria:f\n"
    (info / "entry_points.txt").write_text(entry)
    (tmp_path / "others_criteria.py").write_text("def f(gate, up): return gate[:, 0]")
    monkeypatch.syspath_prepend(tmp_path)
    assert PrunePlan.from_arguments(32, 88, ratio=2, criterion="maw")
    assert "others_criteria" not in sys.modules
