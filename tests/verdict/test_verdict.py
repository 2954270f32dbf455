"""The command ``lm-eval-pruned verdict``: what it answers, and what it makes of itself."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

from lm_eval_pruned import cli, tasks
from lm_eval_pruned.results.runs import read_run
from lm_eval_pruned.sweeps.plan import FLOORS
from lm_eval_pruned.util.atomic import write_atomically
from lm_eval_pruned.verdict.decision import decide
from lm_eval_pruned.verdict.hub import eval_results, without_paths
from lm_eval_pruned.verdict.page import card_section
from tests.helpers.results_files import write_run, write_sweep
from tests.helpers.sweeping import write_tasks
from tests.sweeps.conftest import quick  # noqa: F401


def right(share, documents=400):
    """Return answers of which a share is right, the same documents first."""
    return [float(n < share * documents) for n in range(documents)]


@pytest.fixture
def answer(tmp_path, capsys):
    """Return exit code and output of the command on two finished results, of one score or of tasks."""

    def answer(base, candidate, *words, **sections):
        for name, scored in (("old", base), ("new", candidate)):
            if not isinstance(scored, dict):
                scored = {"boolq": {"acc,none": scored}}
            write_run(tmp_path / name, scored, **sections)
        paths = [str(tmp_path / name) for name in ("old", "new")]
        where = ["--output_path", str(tmp_path / "out")]
        return cli.main(["verdict", *paths, *where, *words]), capsys.readouterr().out

    return answer


def test_a_model_in_place_of_itself_is_shipped_and_nothing_is_evaluated_twice(
    tiny_llama, tmp_path, capsys
):
    made, out = write_tasks(tmp_path / "tasks", documents=40), tmp_path / "out"
    models = [f"{kind},pretrained={tiny_llama}" for kind in ("hf", "pruned-hf")]
    words = ["--tasks", "tiny_choice", "tiny_sentence", "--include_path", str(made)]
    words += ["--gen_kwargs", "do_sample=false,temperature=0", "--device", "cpu"]
    words += ["--margin", "10pt", "--measure", "acc", "--output_path", str(out)]
    # Nobody trained it: what it scores, a model that knows nothing scores, too.
    assert cli.main(["verdict", *models, *words]) == 3
    first = capsys.readouterr().out
    assert first.count("|cannot show a loss (at floor)") == 2
    assert "No score can show a loss" in first
    # tiny_choice has three choices, of which two are ever right.
    rows = [row for row in first.splitlines() if row.startswith("|tiny_choice")]
    row = next(row for row in rows if "acc" in row)
    assert "|0.5000" in row and "|cannot show a loss (at floor)|" in row
    assert "bytes in memory" in first
    assert "<h2>Agreement with the base</h2>" in (out / "verdict.html").read_text()
    assert (out / "verdict.md").read_text("utf-8").startswith("# May it be")
    units = {*out.rglob("results_*.json")}
    # Of the four models that know nothing, too.
    assert len(units) == 4 + 2 * len(FLOORS)
    finished = [str(out / name) for name in ("base", "candidate")]
    for again in (models, finished):
        assert cli.main(["verdict", *again, *words]) == 3
        assert {*out.rglob("results_*.json")} == units


def test_what_it_would_take_is_documents_and_minutes(answer, tmp_path):
    # What lm_eval adds to a folder later is of another task, at another speed.
    more = "2026-01-03T03-04-05.678901"
    for name in ("old", "new"):
        write_run(tmp_path / name, {"piqa": {"acc,none": right(0.5)}}, date=more)
    given = right(0.8, 60), right(0.8, 60), "--margin", "10pt", "boolq=2pt"
    code, said = answer(*given, total_evaluation_time_seconds="80")
    assert code == 3
    assert "documents instead of 60, but the task has 60: accept" in said
    sizes = {"boolq": {"original": 3270, "effective": 60}}
    timed = {"n-samples": sizes, "total_evaluation_time_seconds": "90"}
    _, said = answer(*given, **timed)
    (needed, minutes) = re.search(
        r"about (\S+) documents .*, ([\d,]+) min", said
    ).groups()
    # Both models take 1.5 s for each document that is not there yet.
    assert int(minutes) == round((int(needed.replace(",", "")) - 60) * 2 * 1.5 / 60)
    (row,) = [row for row in said.splitlines() if row.startswith("|candidate")]
    # 90 s on 60 documents, and none known of the 400 of the other task.
    assert row.split("|")[5].strip() == "1.5"


def test_it_says_where_one_test_alone_or_more_documents_would_not_help(answer):
    """Five answers of 1000 became wrong: p is 0.031 on one side, and 0.31 among ten scores."""
    base = {f"t{n}": {"acc,none": right(0.5, 1000)} for n in range(10)}
    lost = {"acc,none": right(0.495, 1000)}
    alone = "A test of only this score would show it to be worse"
    # Margins that name tasks are claims on each of them.
    margins = [f"t{n}=0.4pt" for n in range(10)]
    _, said = answer(base, {**base, "t3": lost}, "--margin", *margins)
    assert said.count(alone) == 1
    assert re.search(rf"t3 acc: undecided\. {alone}", said)
    # Twelve became wrong and six right: equal models change as many, and mostly come out closer.
    values = right(0.494, 2000)
    values[-6:] = [1.0] * 6
    code, said = answer(right(0.5, 2000), values, "--margin", "0.65pt")
    assert (code, alone in said) == (3, False)
    assert "2000 documents would probably have decided if the models did not" in said


@pytest.mark.parametrize("bias", ["pct_stereotype", "bias"])
@pytest.mark.parametrize(("after", "code"), [(0.3, 1), (0.7, 1), (0.5, 0)])
def test_a_bias_is_judged_in_both_directions_and_beside_what_the_task_lists_first(
    bias, after, code, answer
):
    def scored(share):
        both_ways = {"values": right(share), "higher_is_better": None}
        # How far two sentences are apart, whichever is likelier, is no bias.
        apart = {"values": [9 * share] * 400, "higher_is_better": False}
        first = {"likelihood_diff,none": apart} if bias != "bias" else {}
        first |= {"acc,none": right(0.5)} if bias == "bias" else {}
        return {"crows": {**first, f"{bias},none": both_ways}}

    found, said = answer(scored(0.5), scored(after), "--margin", "5pt")
    assert found == code
    scores = said.partition("## Bias")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:4] for line in scores.splitlines() if "|crows" in line]
    words = {metric.strip(): word.strip() for _, metric, word in rows}
    assert words == {bias: "different" if code else "equivalent"} | (
        {"acc": "equivalent"} if bias == "bias" else {}
    )


def test_a_verdict_is_pushed_as_a_section_of_the_card_and_scores(
    answer, tmp_path, monkeypatch, capsys
):
    hub = tmp_path / "hub"
    write_atomically(hub / "README.md", "---\nlicense: mit\n---\nMine.\n")

    class Api:
        def auth_check(self, repo_id, write):
            assert write
            if repo_id != "me/small":
                raise OSError(f"{repo_id} is not there")

        def file_exists(self, repo_id, filename):
            return (hub / filename).exists()

        def hf_hub_download(self, repo_id, filename):
            return str(hub / filename)

        def repo_exists(self, repo_id, repo_type):
            return (repo_id, repo_type) == ("google/boolq", "dataset")

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, hub, dirs_exist_ok=True)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    given = right(0.8), right(0.8), "--push_to_hub"
    code, said = answer(*given, "me/small")
    assert code == 0
    assert "no score over all documents of a data set on the Hub" in said
    assert not (hub / ".eval_results").exists()
    of = {"dataset_path": "google/boolq", "metric_list": [{"metric": "acc"}]}
    of |= {"metadata": {"floors": {"acc": 0.5}}}
    answer(*given, "me/small", "--margin", "1pt", configs={"boolq": of})
    card = (hub / "README.md").read_text()
    # A second verdict takes the place of the first, and the rest is the author's.
    assert card.startswith("---\nlicense: mit\n---\nMine.\n")
    assert card.count("## May it be shipped? Ship") == 1
    assert "|boolq|acc|equivalent|" in card and "|1pt|" in card
    assert str(tmp_path) not in card and "prompt 0" not in card
    (entry,) = parse_eval_result_entries(
        yaml.safe_load((hub / ".eval_results" / "verdict.yaml").read_text())
    )
    assert (entry.dataset_id, entry.value) == ("google/boolq", 0.8)
    assert "; kept of the score above the floor: 100 % [" in entry.notes
    assert answer(*given, "me/wrong") == (2, "")
    # Of the same form as a name on the Hub, a folder of another machine.
    local = of | {"dataset_path": "secret/boolq"}
    said = answer(*given, "me/small", configs={"boolq": local})[1]
    assert "no score over all documents of a data set on the Hub" in said


@pytest.mark.parametrize(
    ("named", "published"),
    [
        ("hf,pretrained=org/model,dtype=float32", "hf,pretrained=org/model,dtype=float32"),
        ("hf,pretrained=/a/secret/model,revision=main", "hf,pretrained=model,revision=main"),
        ("/a/secret,project/model", "model"),
        ("secret/results", "results"),
        ("hf,pretrained=/a/secret,project/model", "hf"),
        ('hf,{"pretrained": "/a/secret,project/model"}', "hf,pretrained=model"),
        ("hf,pretrained='/a/secret,project/model',dtype=auto", "hf,pretrained=model,dtype=auto"),
        ("hf,pretrained=../secret/model", "hf,pretrained=model"),
        ("hf,pretrained=./model", "hf,pretrained=model"),
        ("hf,pretrained=~/model", "hf,pretrained=model"),
        ("hf,pretrained=secret/project/model", "hf,pretrained=model"),
        (r"hf,pretrained=C:\secret\model", "hf,pretrained=model"),
        ("hf,pretrained=org/model,peft=/secret", "hf,pretrained=org/model,peft=secret"),
        ("hf,pretrained=org/model,download_dir=secret/cache", "hf,pretrained=org/model,download_dir=cache"),
        (
            'hf,pretrained=org/model,quantization_config={"a": true, "file": ["/secret/x"]}',
            'hf,pretrained=org/model,quantization_config={"a": true, "file": ["x"]}',
        ),
        ("pruned-hf,ratio=2.0", "pruned-hf,ratio=2.0"),
    ],
)  # fmt: skip
def test_what_is_published_of_a_model_has_no_folders_of_this_machine(named, published):
    """Whether or not they are still there."""
    assert without_paths(named) == published
    assert without_paths(published) == published


def test_a_folder_here_that_is_named_like_a_model_of_the_hub_is_none(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret" / "model").mkdir(parents=True)
    assert without_paths("hf,pretrained=secret/model") == "hf,pretrained=model"


def test_a_card_has_no_path_where_both_results_have_one_name_or_the_meter_failed(
    tmp_path,
):
    """The table of energy names both runs, and its notes say what the meter met."""
    record = {"seconds": 20.0, "joules": {"total": 300.0}}
    energy = {"request_types": {"loglikelihood": record}, "sources": {"cpu": None}}
    energy["notes"] = [f"the meter did not start: {tmp_path} is full"]
    runs = []
    for name in ("a", "b"):
        config = {"model": "hf", "energy": energy}
        tasks = {"boolq": {"acc,none": right(0.8)}}
        runs.append(read_run(write_run(tmp_path / name, tasks, config=config).parent))
    runs[1] = replace(runs[1], name=str(runs[1].path))
    section = card_section(decide(*runs), str(tmp_path / "a"))
    assert "## Energy and latency" in section.replace("###", "##")
    assert "Compared with a, by" in section
    assert str(tmp_path) not in section and tmp_path.name not in section


def test_scores_for_the_hub_are_those_that_count_in_their_sweep(tmp_path):
    unit = {"acc,none": [1.0, 0.0]}
    folder = write_sweep(tmp_path, {"candidate": (20, {"new": unit, "old": unit})})
    candidate = folder / "units" / "candidate"
    for name in ("new", "old"):
        (file,) = (candidate / name).glob("results_*.json")
        of = {"dataset_path": f"org/{name}", "metric_list": [{"metric": "acc"}]}
        file.write_text(
            json.dumps(json.loads(file.read_text()) | {"configs": {name: of}})
        )
    assert "org/old" in eval_results(candidate, {})
    record = candidate / "old" / "unit.json"
    record.write_text(record.read_text().replace('"0"', '"1"'))
    assert "org/old" not in eval_results(candidate, {})
    assert "org/new" in eval_results(candidate, {})


@pytest.mark.slow
def test_a_candidate_that_cannot_be_loaded_ends_in_its_reason(
    tiny_llama, tmp_path, capfd, caplog
):
    made, empty = write_tasks(tmp_path / "tasks"), tmp_path / "empty"
    shutil.copytree(tiny_llama, empty, ignore=shutil.ignore_patterns("*.safetensors"))
    models = [f"hf,pretrained={folder}" for folder in (tiny_llama, empty)]
    words = ["--tasks", "tiny_choice", "--include_path", str(made)]
    words += ["--device", "cpu", "--output_path", str(tmp_path / "out")]
    assert cli.main(["verdict", *models, *words]) == 2
    said = "".join(capfd.readouterr())
    assert not any(record.exc_info for record in caplog.records)
    assert "--retry_failed" not in said
    last = said.splitlines()[-1]
    assert f"tiny_choice failed on the candidate {models[1]} (" in last
    assert "no file named" in last


INT8 = {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}
INT8 = json.dumps({"quant_method": "torchao", "quant_type": {"default": INT8}})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("candidate", "words", "codes"),
    [
        ("hf,pretrained={}", ["pruned_demo_bias", "--limit", "40"], {0}),
        (
            f"hf,pretrained={{}},quantization_config={INT8}",
            ["--limit", "40"],
            {0, 3},
        ),
        ("pruned-hf,pretrained={},prune_percent=30", ["--measure", "mc1"], {1}),
    ],
    ids=["itself", "int8", "30 percent"],
)
def test_the_real_model_and_what_is_made_of_it(
    candidate, words, codes, real_model, tmp_path, capsys
):
    texts = ("hf,pretrained={}", candidate)
    run = ["verdict", *(each.replace("{}", real_model, 1) for each in texts)]
    run += ["--tasks", "pruned_demo_truthfulness", *words, "--margin", "10pt"]
    run += ["--include_path", str(Path(tasks.__file__).parent), "--device", "cpu"]
    run += ["--batch_size", "8", "--output_path", str(tmp_path)]
    assert cli.main(run) in codes
    rows = capsys.readouterr().out.splitlines()
    (size,) = [row for row in rows if row.startswith("|candidate")]
    of_int8 = int(size.split("|")[3].replace(",", ""))
    # The embedding keeps its type: 28 of 135 million numbers, at 4 bytes.
    assert (of_int8 < 300e6) == ("quantization" in candidate)
