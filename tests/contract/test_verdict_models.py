"""What docs/verdict.md promises of BASE and CANDIDATE: what they can be, and which mistakes are told before the work."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from tests.contract.commands import pruned, results_in
from tests.helpers import evaluations
from tests.helpers.hub import running_hub, uploaded
from tests.helpers.results_files import answered, offering, write_run
from tests.helpers.sweeping import write_tasks
from tests.sweeps.conftest import quick  # noqa: F401


@pytest.fixture
def refused(tiny_llama, tmp_path):
    """Return the sentence with which the command refuses two models, `{tiny}` among them, before any work."""
    made = write_tasks(tmp_path / "tasks")

    def refused(base, candidate, *words):
        places = {"tiny": f"hf,pretrained={tiny_llama}", "folder": str(tiny_llama)}
        given = [word.replace("{folder}", places["folder"]) for word in words]
        models = [
            one.replace("{tiny}", places["tiny"]).replace("{folder}", places["folder"])
            for one in (base, candidate)
        ]
        where = "--tasks", "tiny_choice", "--include_path", made, "--device", "cpu"
        done = pruned(
            "verdict", *models, *where, *given, "--output_path", tmp_path / "out"
        )
        assert not [*tmp_path.rglob("unit.json")]
        assert done.err.count("\n") == 1, done.err
        return done.sentence

    return refused


@pytest.mark.parametrize("option", ["device=cpu", "batch_size=4", "max_batch_size=8"])
def test_what_both_models_are_run_with_is_an_option_and_no_argument_of_one(
    option, refused
):
    name, _, value = option.partition("=")
    said = refused("{tiny}", f"{{tiny}},{option}")
    assert "The candidate hf,pretrained=" in said
    assert f"has {option}, which is asked of both models: pass --{name} {value}" in said


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("kind", ["", "pruned-"])
def test_a_dtype_in_which_nothing_is_computed_is_refused(kind, dtype, refused):
    said = refused("{tiny}", f"{kind}{{tiny}},dtype={dtype}")
    assert f"dtype={dtype} only stores numbers" in said and "bfloat16" in said


def torchao(kind, **data):
    settings = {"_type": kind, "_version": 2, "_data": data}
    settings = str({"default": settings}).replace("'", '"')
    return (
        f'quantization_config={{"quant_method": "torchao", "quant_type": {settings}}}'
    )


FP8 = torchao("Float8DynamicActivationFloat8WeightConfig")


def test_a_quantiser_that_this_machine_cannot_run_is_tried_before_the_base_is_evaluated(
    refused,
):
    pytest.importorskip("torchao", reason="torchao is not installed (extra 'test')")
    said = refused("{tiny}", f"{{tiny}},{FP8}")
    assert "The candidate hf,pretrained=" in said
    assert "cannot be quantised on cpu" in said
    # Why, in the words of torchao.
    assert "CUDA" in said


def test_values_in_braces_are_json(refused):
    """Not those of Python alone: ``true``, ``false`` and ``null`` were text."""
    said = refused(
        "{tiny}",
        '{tiny},quantization_config={"quant_method": "nosuch", "x": false, "y": null, "z": true}',
    )
    assert "nosuch" in said
    for value in ("null", "false", '{"a": tru}'):
        said = refused("{tiny}", f"{{tiny}},quantization_config={value}")
        assert "quantization_config=" in said and "pass a dict" in said


@pytest.mark.parametrize("margin", ["1", "5", "acc=1", "choice_prob=2"])
def test_a_margin_without_a_unit_is_refused_before_anything_is_loaded(margin):
    """Neither the models, which are not there, nor torch or the harness."""
    code = (
        "import sys\nfrom lm_eval_pruned.cli import main\n"
        f"code = main(['verdict', 'hf,pretrained=a/b', 'hf,pretrained=c/d', '--margin', {margin!r}])\n"
        "print(code, sorted({'torch', 'lm_eval', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "2 []\n"
    assert f"did you mean {margin.rpartition('=')[2]}pt?" in done.stderr


def test_a_margin_without_a_unit_is_refused_before_the_models_where_tasks_are_named(
    refused, tmp_path
):
    """The base is known by then, and the candidate was not looked for."""
    assert "did you mean 1pt?" in refused(
        "{tiny}", "hf,pretrained=./nosuch", "--margin", "1"
    )
    rights = [n % 2 for n in range(60)]
    old = write_run(tmp_path / "old", {"boolq": answered(rights, rights)}).parent
    assert "did you mean 1pt?" in refused(
        str(old), "hf,pretrained=./nosuch", "--margin", "1"
    )


def test_a_gguf_file_is_passed_as_gguf_file(refused, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    for name, folder in (
        (f"{tmp_path}/m.gguf", f"{tmp_path}"),
        ("org/x/m.gguf", "org/x"),
    ):
        said = refused("{tiny}", f"hf,pretrained={name}")
        assert f"pass pretrained={folder},gguf_file=m.gguf" in said


def test_two_folders_of_checkpoints_are_two_models_of_hf(tiny_llama, tmp_path):
    made = write_tasks(tmp_path / "tasks", documents=12)
    comma = tmp_path / "a,b=c"
    shutil.copytree(tiny_llama, comma)
    words = "--tasks", "tiny_choice", "--include_path", made, "--device", "cpu"
    words = *words, "--margin", "10pt", "--output_path", tmp_path / "out"
    done = pruned("verdict", tiny_llama, comma, *words)
    assert done.code == 3, done.err
    for name, folder in (("base", tiny_llama), ("candidate", comma)):
        told = results_in(tmp_path / "out" / name / "units" / name)["config"]
        assert told["model"] == "hf-prefix"
        assert told["model_args"]["pretrained"] == str(folder)


def sizes_in(out):
    """Return the bytes on disk of both models, as the table shows them."""
    table = out.partition("## Size and time")[2].partition("\n## ")[0]
    rows = [[c.strip() for c in row.split("|")[1:-1]] for row in table.splitlines()]
    (head,) = [row for row in rows if row[:1] == ["model"]]
    return {
        row[0]: row[head.index("bytes on disk")]
        for row in rows
        if row[:1] in (["base"], ["candidate"])
    }


def test_the_page_has_the_bytes_on_disk_of_what_was_loaded(tiny_llama, tmp_path):
    """Of a folder, its weights and those of an adapter; of a GGUF file, the file."""
    folder = tmp_path / "folder"
    shutil.copytree(tiny_llama, folder)
    (folder / "optimizer.pt").write_bytes(b"0" * 999)
    (folder / "m.gguf").write_bytes(b"0" * 777)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_model.safetensors").write_bytes(b"0" * 555)
    weights = (folder / "model.safetensors").stat().st_size
    task = {"t": answered(RIGHTS, RIGHTS)}
    for model_args, size in (
        ({"pretrained": str(folder)}, f"{weights:,}"),
        (f"pretrained={folder},dtype=float32", f"{weights:,}"),
        (
            {"pretrained": str(folder), "peft": str(tmp_path / "lora")},
            f"{weights + 555:,}",
        ),
        ({"pretrained": str(folder), "gguf_file": "m.gguf"}, "777"),
        ({"pretrained": str(tmp_path / "gone")}, "-"),
        ({"pretrained": "org/not-here"}, "-"),
        ({"model": "served"}, "-"),
        ({}, "-"),
    ):
        config = {"model": "hf", "model_args": model_args}
        paths = [
            write_run(tmp_path / name, task, config=config).parent
            for name in ("old", "new")
        ]
        done = pruned("verdict", *paths, "--output_path", tmp_path / "out")
        assert sizes_in(done.out) == dict.fromkeys(("base", "candidate"), size)


@pytest.mark.parametrize(
    "kind", ["local-chat-completions", "openai-chat-completions", "gguf"]
)
def test_model_types_that_do_not_run_here_are_evaluated_by_lm_eval_first(kind, refused):
    said = refused("{tiny}", f"{kind},model=x")
    assert (
        f"The candidate {kind},model=x is of a model type that verdict does not run"
        in said
    )
    assert (
        f"or run `lm_eval --model {kind} ... --log_samples` there and pass that folder"
        in said
    )
    assert "neither a path of results nor a model" in refused(
        "{tiny}", "nosuch,model=x"
    )


def zeros(task):
    """Return a task whose likelihoods are 0, as a server answers that has none."""
    for row in task["acc,none"]["rows"].values():
        row["filtered_resps"] = [["0.0", "False"] for _ in row["filtered_resps"]]
    return task


RIGHTS = [n % 2 for n in range(60)]
LOST = {"aggregation": "perplexity", "higher_is_better": False}
SERVED = {
    "choices": lambda: zeros(answered(RIGHTS, RIGHTS)),
    # One continuation, such as the last word of LAMBADA.
    "word": lambda: {
        "perplexity,none": {
            "values": [0.0] * 60,
            "rows": {n: offering([" word"], likelihoods=[0]) for n in range(60)},
            **LOST,
        }
    },
    "text": lambda: {
        "perplexity,none": {
            "values": [0.0] * 60,
            "rows": {
                n: {"arguments": {"gen_args_0": {"arg_0": "A text."}}, "filtered_resps": ["0.0"]}
                for n in range(60)
            },
            **LOST,
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", SERVED)
@pytest.mark.parametrize("which", ["base", "candidate"])
def test_likelihoods_that_are_all_0_are_refused_and_not_scored(kind, which, tmp_path):
    """llama.cpp's server answers so, its issue 27174."""
    tasks = {"base": answered(RIGHTS, RIGHTS), "candidate": answered(RIGHTS, RIGHTS)}
    if kind != "choices":
        good = [offering([" word"], likelihoods=[-1.5]) for _ in RIGHTS]
        good = {"values": [-1.5] * 60, "rows": dict(enumerate(good)), **LOST}
        tasks = {name: {"perplexity,none": good} for name in tasks}
    tasks[which] = SERVED[kind]()
    paths = [write_run(tmp_path / n, {"t": of}).parent for n, of in tasks.items()]
    said = pruned("verdict", *paths, "--output_path", tmp_path / "out").sentence
    assert f"{tmp_path / which}" in said and "every log-likelihood of t is 0" in said
    assert "evaluate t again" in said


def test_some_likelihoods_may_be_0(tmp_path):
    """A model may be certain of one answer."""
    task = answered(RIGHTS, RIGHTS)
    task["acc,none"]["rows"][3]["filtered_resps"] = [["0.0", "True"], ["0.0", "True"]]
    path = write_run(tmp_path / "old", {"t": task}).parent
    assert pruned("verdict", path, path, "--output_path", tmp_path / "out").code in (
        0,
        3,
    )


@pytest.mark.slow
def test_what_is_pushed_names_no_path_of_this_machine(tmp_path):
    """Neither of a folder whose name has a comma, nor in a table, nor as a data set."""
    folder = tmp_path / "secret,project"
    task = answered(RIGHTS, RIGHTS)
    energy = {"request_types": {"loglikelihood": {"seconds": 2.0}}, "sources": {}}
    energy["notes"] = [f"the meter did not start: {folder} is full"]
    about = {"config": {"model": "hf", "energy": energy}}
    about["configs"] = {
        "t": {"dataset_path": "secret/data", "metric_list": [{"metric": "acc"}]}
    }
    paths = [
        write_run(folder / name, {"t": task}, **about).parent for name in ("old", "new")
    ]
    words = [
        "verdict",
        *paths,
        "--push_to_hub",
        "me/small",
        "--output_path",
        tmp_path / "out",
    ]
    command = [sys.executable, "-m", "lm_eval_pruned.cli", *map(str, words)]
    with running_hub("me/small") as (variables, sent):
        done = evaluations.run(command, check=False, **variables)
    assert done.returncode in (0, 3), done.stderr
    files = uploaded(sent, "me/small")
    assert files.keys() == {"README.md"}
    card = files["README.md"].decode()
    assert "Compared with old, by" in card and "Energy" in card
    assert "secret" not in card and str(tmp_path) not in card
