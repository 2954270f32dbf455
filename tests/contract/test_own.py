"""docs/own.md: a criterion and a task of one's own."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch

from lm_eval_pruned import PrunePlan, load_pruned, prune_model
from tests.contract.commands import compared, pruned
from tests.helpers import by_hand, evaluations
from tests.helpers.checkpoints import ROOT, save_tiny
from tests.helpers.results_files import write_run, write_sweep


PAGE = (ROOT / "docs" / "own.md").read_text("utf-8")
GROUP = "lm_eval_pruned.criteria"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that installs a package with a module and entry points."""

    def install(code: str, *entries: str, name: str = "user_criteria"):
        site = tmp_path / name
        info = site / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"{name}.py").write_text(code)
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        (info / "METADATA").write_text(metadata)
        (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *entries]))
        monkeypatch.syspath_prepend(site)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return site / f"{name}.py"

    return install


CUBIC = """
def cubic(gate, up):
    # Compares neurons with each other, so it must see all of them.
    size = gate.float().pow(3).abs().sum(dim=1) + up.float().pow(3).abs().sum(dim=1)
    return size - size.mean()
"""


def test_a_packages_criterion_prunes_everywhere(install, tiny_llama):
    install(CUBIC, "cubic = user_criteria:cubic")
    loaded = load_pruned(str(tiny_llama), ratio=2, criterion="cubic").prune_record
    whole = load_pruned(str(tiny_llama))
    for layer, kept in zip(whole.model.layers, loaded.kept, strict=True):
        rows = (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight)
        size = sum(weight.abs().pow(3).sum(dim=1) for weight in rows)
        assert kept.equal(by_hand.top(size.tolist(), 64))
    pruned = prune_model(whole, ratio=2, criterion="cubic")
    assert pruned.prune_record.digest == loaded.digest
    arguments = f"pretrained={tiny_llama},ratio=2,criterion=cubic"
    _, config = evaluations.evaluate("pruned-hf", arguments, limit=1)
    assert config["pruning"]["criterion"] == "cubic"
    assert config["pruning"]["kept_digest"] == loaded.digest


def test_names_are_known_without_importing_and_ours_cannot_be_taken(install):
    names = ("broken", "maw", "ppm")
    entries = [f"{name} = user_criteria:f" for name in names]
    install("raise RuntimeError('imported')", *entries)
    plans = [PrunePlan.from_arguments(32, 88, ratio=2, criterion=n) for n in names]
    assert [plan.criterion for plan in plans] == ["broken", "maw", "maw"]
    with pytest.raises(ValueError, match=r"criterion=x is unknown.*maw_act.*, broken"):
        PrunePlan.from_arguments(32, 88, ratio=2, criterion="x")
    with pytest.raises(ValueError, match=r"criterion=\['maw'\] is unknown"):
        PrunePlan.from_arguments(32, 88, ratio=2, criterion=["maw"])


@pytest.mark.parametrize(
    ("returned", "word"),
    [
        ("gate", r"shape \(88, 32\).* return 88 finite"),
        ("gate[:80, 0]", r"shape \(80,\)"),
        ("gate[:, 0].double() * 0 + 1e300", "NaN or infinite"),
    ],
)
def test_what_a_criterion_returns_is_checked(install, tiny_llama, returned, word):
    install(f"def f(gate, up): return {returned}", "f = user_criteria:f")
    with pytest.raises(ValueError, match=f"criterion=f .*{word}"):
        load_pruned(str(tiny_llama), ratio=2, criterion="f")


def test_a_criterion_is_given_the_stored_dtype_on_the_cpu(install, tmp_path):
    folder = save_tiny(tmp_path / "model", dtype=torch.bfloat16)
    code = "def f(gate, up):\n    assert gate.shape == up.shape == (88, 32)\n"
    code += "    assert {gate.dtype, up.dtype} == {__import__('torch').bfloat16}\n"
    code += "    assert gate.device.type == 'cpu'\n    return gate[:, 0]"
    install(code, "f = user_criteria:f")
    model = load_pruned(str(folder), ratio=1, criterion="f", dtype=torch.float32)
    assert model.config.intermediate_size == 32


def shown(language: str, start: str) -> str:
    """Return the example of the page in that language which starts so."""
    blocks = re.findall(rf"(?ms)^```{language}\n(.*?)^```", PAGE)
    (block,) = (block for block in blocks if block.startswith(start))
    return block


def test_the_criterion_of_the_page_works_in_all_commands(install, tiny_llama):
    entries = shown("toml", "[project]").split(f'"{GROUP}"]\n')[1]
    install(
        shown("python", '"""my_criteria.py'),
        entries.splitlines()[0].replace('"', ""),
        name="my_criteria",
    )
    loaded = load_pruned(str(tiny_llama), ratio=2, criterion="disagreement")
    assert loaded.config.intermediate_size == 64
    model = ["--model_args", f"pretrained={tiny_llama}"]
    measured = pruned(
        "sensitivity", *model, "--criterion", "disagreement", "--calibration_samples", 2
    )
    assert measured.code == 0
    assert "disagreement" in measured.out
    planned = pruned("plan", *model[:1], f"{model[1]},criterion=disagreement,ratio=2")
    assert planned.code == 0


@pytest.fixture
def task(tmp_path, monkeypatch):
    """The folder of the page's task, in the folder where commands run."""
    folder = tmp_path / "my_tasks"
    folder.mkdir()
    (folder / "my_questions.yaml").write_text(shown("yaml", "task: my_questions"))
    row = json.loads(shown("json", '{"question"'))
    rows = [row | {"question": f"{row['question']} {n}"} for n in range(6)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize(
    ("option", "name", "meant"),
    [
        ("--criteria", "disagrement", "disagreement"),
        ("--tasks", "my_question", "my_questions"),
    ],
)
def test_a_mistyped_name_of_a_criterion_or_task_gets_the_one_that_was_meant(
    option, name, meant, install, task, tiny_llama
):
    install(CUBIC, "disagreement = user_criteria:cubic")
    words = ["sweep", "--model_args", f"pretrained={tiny_llama}", "--dry_run"]
    words += ["--prune_percents", 30, "--include_path", "my_tasks"]
    words += ["--output_path", "my_sweep", "--tasks", "my_questions", option, name]
    said = pruned(*words).sentence
    assert name in said
    assert f"did you mean {meant}?" in said


@pytest.mark.slow
def test_all_commands_take_the_task_and_a_changed_question_is_evaluated_again(
    task, tiny_llama
):
    words = ["--model_args", f"pretrained={tiny_llama}", "--prune_percents", 30]
    words += ["--tasks", "my_questions", "--include_path", "my_tasks"]
    words += ["--output_path", "my_sweep", "--floors", "no", "--device", "cpu"]

    def swept():
        done = pruned("sweep", *words)
        assert done.code == 0, done.err
        return {p for p in task.parent.glob("my_sweep/units/*/*/results_*")}

    first = swept()
    assert len(first) == 2
    questions = task / "questions.jsonl"
    questions.write_text(questions.read_text().replace("sun? 0", "sun? 10"))
    changed = swept()
    assert len(changed) == 2
    assert not changed & first
    table = pruned("compare", "my_sweep").out
    assert "|my_questions" in table and "acc" in table
    power = pruned("power", "my_questions", "my_sweep", "--margin", "2pt")
    assert power.code == 0
    assert "2" in power.out


def two_runs(folder, metrics):
    """Write results of one task before and after: 40 answers, of which 30 changed."""
    for name, change in (("before", 0.0), ("after", 1.0)):
        values = [change] * 30 + [1.0] * 10
        of_task = {
            metric: {"values": values, "higher_is_better": higher}
            for metric, higher in metrics.items()
        }
        write_run(folder / name, {"task": of_task})
    return folder / "before", folder / "after"


@pytest.mark.parametrize(
    ("higher", "verdict"), [(True, "better"), (False, "worse"), (None, "different")]
)
def test_without_higher_is_better_the_verdict_is_different(higher, verdict, tmp_path):
    before, after = two_runs(tmp_path, {"acc,none": higher})
    assert f"|{verdict}" in pruned("compare", before, after).out.replace(" ", "")


@pytest.mark.parametrize(
    ("first", "second", "counted"),
    [("f1", "acc", "f1"), ("acc", "f1", "acc"), ("acc", "acc_norm", "acc_norm")],
)
def test_the_first_metric_counts_or_acc_norm(first, second, counted, tmp_path):
    metrics = {f"{first},none": True, f"{second},none": True}
    out = pruned("compare", *two_runs(tmp_path, metrics)).out
    rows = re.findall(r"(?m)^\|after *\|task *\|(\w+),none *\|.*\|(\w+) *\|$", out)
    assert dict(rows) == dict.fromkeys((first, second), "restated") | {
        counted: "better"
    }


def declaring(folder, values, **metadata):
    """Write results of a task of `values` by run, whose YAML file has `metadata`."""
    paths = []
    for name, of_run in values.items():
        metrics = {"acc,none": [0.5, 0.25] * 30, "gain,none": of_run}
        configs = {"task": {"metadata": metadata}}
        file = write_run(folder / name, {"task": metrics}, configs=configs)
        paths.append(file.parent)
    return paths


GAINS = {"base": [3.0, 5.0] * 30, "half": [1.5, 2.5] * 30}


def test_the_metric_that_metadata_names_counts_and_its_floor_is_exact(tmp_path):
    paths = declaring(tmp_path, GAINS, primary_metric="gain", floors={"gain": 0})
    rows = compared(*paths)["rows"]
    by_metric = {row["metric"]: row for row in rows}
    assert by_metric["acc,none"]["verdict"] == "restated"
    assert by_metric["gain,none"]["verdict"] == "worse"
    floor = by_metric["gain,none"]["floor"]
    assert (floor["floor"], floor["floor_name"]) == (0, "exact")
    assert floor["base_above_floor"] and floor["kept"]["share"] == pytest.approx(0.5)
    undeclared = declaring(tmp_path / "undeclared", GAINS)
    rows = compared(*undeclared)["rows"]
    assert [row["floor"] for row in rows] == [None, None]
    assert [row["primary"] for row in rows] == [True, False]


def test_documents_that_share_the_field_that_is_the_cluster_count_as_one(tmp_path):
    docs = {n: {"question": n, "text_id": n // 4} for n in range(60)}
    tested = {}
    for field in ("text_id", None):
        for name, values in {"base": [1.0, 0.5] * 30, "cut": [0.9, 0.3] * 30}.items():
            write_run(
                tmp_path / str(field) / name,
                {"task": {"gain,none": {"values": values, "docs": docs}}},
                configs={"task": {"metadata": {"cluster": field}}},
            )
        paths = (tmp_path / str(field) / name for name in ("base", "cut"))
        (row,) = compared(*paths)["rows"]
        tested[field] = row["method"]
    assert "clusters" in tested["text_id"] and "documents" in tested[None]


def test_an_exact_floor_is_the_floor_whatever_a_model_that_knows_nothing_scores(
    tmp_path,
):
    paths = declaring(tmp_path, GAINS, primary_metric="gain", floors={"gain": 0})
    lucky = {"acc,none": [0.5, 0.25] * 30, "gain,none": [9.0, -3.0] * 30}
    config = {"config": {"model": "constant"}}
    paths.append(write_run(tmp_path / "floor", {"task": lucky}, **config).parent)
    rows = compared(*paths)["rows"]
    (floor,) = [row["floor"] for row in rows if row["metric"] == "gain,none"]
    assert (floor["floor"], floor["floor_name"]) == (0, "exact")


@pytest.mark.parametrize("constant", [0.5, -0.5])
def test_a_base_below_an_exact_floor_has_nothing_to_keep(constant, tmp_path):
    values = {"base": [constant - 0.4, constant + 0.3] * 30, "half": [0.1, 0.2] * 30}
    floors = {"gain": constant}
    paths = declaring(tmp_path, values, primary_metric="gain", floors=floors)
    done = pruned("compare", *paths)
    assert "cannot show a loss" in done.out + done.err


@pytest.mark.slow
def test_the_report_shows_what_is_kept_at_each_value_of_the_field_that_is_the_level(
    tmp_path,
):
    pytest.importorskip("altair", reason="figures need the extra `report`")
    # The easy questions lose nothing, the hard ones half.
    docs = {n: {"question": n, "grade": ["easy", "hard"][n % 2]} for n in range(60)}
    values = {"p0": [3.0, 5.0, 4.0, 6.0] * 15, "p20": [3.0, 2.5, 4.0, 3.0] * 15}
    runs = {
        name: (size, {"task": {"gain,none": {"values": values[name], "docs": docs}}})
        for name, size in (("p0", 0), ("p20", 20))
    }
    folder = write_sweep(tmp_path, runs)
    metadata = {"primary_metric": "gain", "floors": {"gain": 0}, "level": "grade"}
    for file in folder.rglob("results_*.json"):
        of = json.loads(file.read_text())
        of["configs"] = {"task": {"metadata": metadata}}
        file.write_text(json.dumps(of))
    done = pruned("report", folder)
    assert done.code == 0, done.err
    page = (folder / "report" / "report.md").read_text("utf-8")
    table = page.partition("## Kept by level")[2].partition("\n## ")[0]
    rows = [
        line.strip("|").split("|") for line in table.splitlines() if line[:1] == "|"
    ]
    kept = {row[1]: row[-1] for row in rows[2:]}
    assert kept["easy"].startswith("100 % [") and kept["hard"].startswith("50 % [")


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        (
            {"primary_metric": "gian"},
            "task declares primary_metric: gian, which it does not report: name one of acc, gain.",
        ),
        (
            {"floors": {"gian": 0}},
            "task declares a floor of gian, which it does not report: name one of acc, gain.",
        ),
        (
            {"floors": {"gain": "low"}},
            "task declares the floor 'low' of gain: pass a number.",
        ),
    ],
)
def test_a_declaration_that_fits_no_metric_is_refused(metadata, sentence, tmp_path):
    done = pruned("compare", *declaring(tmp_path, GAINS, **metadata))
    assert done.sentence.endswith(sentence)


def test_a_metric_that_is_no_mean_is_compared_by_its_standard_errors(tmp_path):
    paths = []
    for name, score in (("base", 0.5), ("run", 0.4)):
        # F1 over the corpus, and what the harness logs for each document.
        f1 = {"values": [1.0, 0.0] * 30, "score": score, "stderr": 0.02}
        paths.append(write_run(tmp_path / name, {"task": {"f1,none": f1}}).parent)
    (row,) = compared(*paths)["rows"]
    assert row["method"].startswith("unpaired z test on stderrs")
    assert row["verdict"] == "worse"


@pytest.mark.slow
def test_a_report_sorts_a_task_by_the_family_that_it_declares(tmp_path):
    runs = {
        f"p{size}": (size, {"my_instructions": {"acc,none": [1.0, size < 20] * 20}})
        for size in (0, 40)
    }
    for family, label in (("knowledge", "Knowledge"), (None, "Instruction following")):
        metadata = {"my_instructions": {"family": family}}
        folder = write_sweep(tmp_path / label, runs, metadata=metadata)
        assert pruned("report", folder).code == 0
        report = (folder / "report" / "report.md").read_text("utf-8")
        assert f"\n|{label}|maw|" in report
