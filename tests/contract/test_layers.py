"""docs/layers.md: widths by layer."""

from __future__ import annotations

import csv
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from lm_eval_pruned import load_pruned, prune_model
from tests.contract.commands import lm_eval, pruned, results_in
from tests.helpers.checkpoints import ROOT, byte_tokenizer
from tests.helpers.layouts import save_family
from tests.helpers.results_files import write_sweep


#: Neurons of each layer of `tiny_llama`.
WIDTH = 88


@pytest.fixture
def text(tmp_path):
    lines = ("The tide comes in twice a day.", "A loaf rises.", "Bridges expand.")
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return str(file)


def widths_of(model) -> list[int]:
    return [layer.mlp.gate_proj.out_features for layer in model.model.layers]


def state_of(folder) -> dict:
    return load_file(folder / "model.safetensors")


def refusal(folder, **asked) -> str:
    """Return the sentence with which a load is refused, though there is no weight to read."""
    bare = folder.parent / "without-weights"
    bare.mkdir(exist_ok=True)
    shutil.copyfile(folder / "config.json", bare / "config.json")
    with pytest.raises(ValueError) as error:
        load_pruned(str(bare), **asked)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def tiny(tiny_llama, tmp_path):
    return shutil.copytree(tiny_llama, tmp_path / "tiny")


# Measure what cutting one layer costs


def test_sensitivity_prints_and_writes_what_each_layer_costs_and_a_report_shows_it(
    tiny, text, tmp_path
):
    pytest.importorskip("altair", reason="plots need the extra `report`")
    tasks = {"boolq": {"acc,none": [0.0, 1.0]}}
    sweep = write_sweep(tmp_path / "sweep", {"base": (0, tasks), "p40": (40, tasks)})
    words = ["sensitivity", "--model_args", f"pretrained={tiny}", "--calibration", text]
    words += ["--prune_percents", 25, 50, "--output_path", sweep]
    before = {path.name for path in sweep.iterdir()}
    done = pruned(*words)
    assert done.code == 0, done.err
    names = {"sensitivity.json", "sensitivity.csv"}
    names |= {f"sensitivity-by-layer.{kind}" for kind in ("png", "svg")}
    assert {path.name for path in sweep.iterdir()} - before == names
    content = json.loads((sweep / "sensitivity.json").read_text())
    assert (content["criterion"], content["repair"]) == ("obs", "least_squares")
    assert (content["file"], content["texts"]) == ("texts.jsonl", 3)
    assert len(content["sha256"]) == 64
    rows = [f"{c['layer']}|{c['rises'][1]:+.3f}" for c in content["curves"]]
    assert [curve["widths"] for curve in content["curves"]] == 3 * [[44, 66]]
    with (sweep / "sensitivity.csv").open() as file:
        points = [*csv.DictReader(file)]
    assert len(points) == 3 * 2
    # The table, and that in the report's section.
    assert pruned("report", sweep).code == 0
    report = (sweep / "report" / "report.md").read_text("utf-8")
    for shown in (done.out, report.split("## Layers\n")[1]):
        bare = re.sub(r" *\| *", "|", shown)
        assert all(f"|{row}|" in bare for row in rows)
    assert [*(sweep / "report").glob("plots/sensitivity-by-layer.*")]
    assert pruned(*words).out == done.out


def test_sensitivity_uses_the_texts_of_the_package_by_default(tiny):
    words = ["sensitivity", "--model_args", f"pretrained={tiny}"]
    words += ["--prune_percents", 50, "--calibration_samples", 3]
    done = pruned(*words)
    assert done.code == 0, done.err
    assert "on 3 texts" in done.out
    text = ROOT / "lm_eval_pruned" / "pruning" / "calibration_text.jsonl"
    assert pruned(*words, "--calibration", text).out == done.out


@pytest.mark.parametrize("cut", [["--criterion", "maw"], ["--recipe", "study"]])
def test_sensitivity_takes_what_says_how_a_layer_is_cut(cut, tiny, text):
    words = ["sensitivity", "--model_args", f"pretrained={tiny}", "--calibration", text]
    assert "criterion=maw, repair=none" in pruned(*words, *cut).out


# Let the layers share a cut


@pytest.fixture
def shared(text):
    """Return arguments that share a cut of 40 % among the layers."""
    return {
        "prune_percent": 40,
        "allocation": "sensitivity",
        "calibration": text,
    }


def test_as_many_neurons_remain_as_after_the_uniform_cut(shared, tiny):
    uniform = widths_of(load_pruned(str(tiny), prune_percent=40))
    widths = widths_of(load_pruned(str(tiny), **shared))
    assert sum(widths) == sum(uniform)
    assert len({*widths}) > 1


@pytest.mark.parametrize(
    ("size", "fewest"),
    [({"prune_percent": 60}, WIDTH // 8), ({"intermediate_size": 9}, 9)],
)
def test_a_layer_keeps_an_eighth_unless_the_size_asks_for_less(
    size, fewest, tiny, text
):
    asked = {"allocation": "sensitivity", "calibration": text}
    assert min(widths_of(load_pruned(str(tiny), **size, **asked))) == fewest


def test_a_layer_keeps_an_eighth_of_its_own_neurons_beside_a_narrower_one(tiny, text):
    model = load_pruned(str(tiny), intermediate_size=10, layers="1")
    asked = {"allocation": "sensitivity", "calibration": text}
    prune_model(model, tokenizer=byte_tokenizer(), prune_percent=80, **asked)
    first, _, last = widths_of(model)
    assert min(first, last) >= WIDTH // 8


def test_a_layer_that_has_its_width_already_stays(tiny, text):
    size = {"intermediate_size": 40, "layers": "0"}
    model = load_pruned(str(tiny), **size)
    before = [parameter.clone() for parameter in model.parameters()]
    asked = {"recipe": "best", "calibration": text, **size}
    prune_model(model, tokenizer=byte_tokenizer(), **asked)
    assert all(map(torch.equal, model.parameters(), before))


def test_each_width_is_a_multiple(shared, tiny):
    widths = widths_of(load_pruned(str(tiny), **shared, multiple_of=8))
    assert all(width % 8 == 0 for width in widths)
    assert sum(widths) == 3 * 48


@pytest.mark.parametrize("more", [{"layers": "0+2"}, {"skip_layers": 1}])
def test_a_cut_is_shared_among_some_layers_only(more, shared, tiny):
    widths = widths_of(load_pruned(str(tiny), **shared, **more))
    assert widths[1] == WIDTH
    assert widths[0] + widths[2] == 2 * 53


@pytest.mark.slow
def test_plan_shows_the_width_of_each_layer_and_results_record_them(
    shared, tiny, tmp_path
):
    asked = ",".join(f"{k}={v}" for k, v in {"pretrained": tiny, **shared}.items())
    done = pruned("plan", "--model_args", asked, "--format", "json")
    (row,) = json.loads(done.out)
    words = ["--model", "pruned-hf", "--model_args", asked, "--device", "cpu"]
    words += ["--tasks", "pruned_demo_bias", "--limit", 1]
    words += ["--output_path", tmp_path / "out"]
    assert lm_eval(*words).code == 0
    record = results_in(tmp_path / "out")["config"]["pruning"]
    widths = widths_of(load_pruned(str(tiny), **shared))
    assert record["layer_widths"] == {str(n): width for n, width in enumerate(widths)}
    assert row["layer_widths"] == ",".join(f"{n}:{w}" for n, w in enumerate(widths))


# Set the widths yourself


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("w.json", '{"0": 20, "2": 7}'),
        ("w.json", "[20, null, 7]"),
        ("w.csv", "layer,loss,width\n2,0.5,7\n0,0.1,20\n"),
        (None, {0: 20, 2: 7}),
    ],
)
def test_forms_of_widths(name, content, tiny, tmp_path):
    widths = content
    if name is not None:
        widths = str(tmp_path / name)
        (tmp_path / name).write_text(content)
    assert widths_of(load_pruned(str(tiny), widths=widths)) == [20, WIDTH, 7]


@pytest.mark.parametrize(
    "more", [{"ratio": 1}, {"prune_percent": 9}, {"layers": 0}, {"skip_layers": 0}]
)
def test_widths_excludes_the_other_sizes_and_choices_of_layers(more, tiny):
    assert "widths" in refusal(tiny, widths={0: 20}, **more)


def test_multiple_of_rounds_down_each_width_that_is_smaller_than_the_layers(tiny):
    model = load_pruned(str(tiny), widths={0: 30, 1: WIDTH, 2: 85}, multiple_of=16)
    assert widths_of(model) == [16, WIDTH, 80]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"0": 20, "1": 9, "0": 30}', "layer 0 twice"),
        ("layer,width\n1,9\n1,8\n", "layer 1 twice"),
        ('{"3": 20}', "layer 3"),
        ("[0]", "layer 0 0 neurons"),
        (f"[{WIDTH + 1}]", f"from 1 to {WIDTH}"),
        ("[2.5]", "2.5"),
        ("{", "cannot be read"),
    ],
)
def test_invalid_widths_fail_before_loading_with_one_sentence(
    content, words, tiny, tmp_path
):
    (tmp_path / "w").write_text(content)
    sentence = refusal(tiny, widths=str(tmp_path / "w"))
    assert words in sentence
    assert sentence.startswith("widths=w ")


def test_one_number_for_the_model_is_the_mean_over_the_layers(tiny):
    words = ["--model_args", f"pretrained={tiny}", "--format", "json", "--widths"]
    file = tiny / "widths.json"
    file.write_text("[30, 60, 60]")
    (row,) = json.loads(pruned("plan", *words, file).out)
    assert row["intermediate_size"] == 50
    assert row["expansion_ratio"] == 50 / 32


def test_a_number_is_that_layer_of_the_encoder_and_of_the_decoder(tmp_path):
    save_family(tmp_path / "t5", "t5", 40)
    given = {"widths": {0: 11}, "auto_class": AutoModelForSeq2SeqLM}
    model = load_pruned(str(tmp_path / "t5"), **given)
    for half in (model.encoder, model.decoder):
        widths = [
            block.layer[-1].DenseReluDense.wi_0.out_features for block in half.block
        ]
        assert widths[0] == 11 and {*widths[1:]} <= {40}


@pytest.mark.parametrize("more", [{"layers": "1-2"}, {"skip_layers": 0}])
def test_only_some_layers_are_pruned_by_a_size(more, tiny):
    assert widths_of(load_pruned(str(tiny), ratio=1, **more)) == [WIDTH, 32, 32]


# Save and open a model of several widths


@pytest.fixture(scope="module")
def exported(tiny_llama, tmp_path_factory):
    """A model of several widths, which ``lm-eval-pruned prune`` wrote."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "w.json").write_text("[40, 60, 88]")
    words = ["--model_args", f"pretrained={tiny_llama},widths={folder / 'w.json'}"]
    done = pruned("prune", *words, "--output_path", folder / "uneven")
    assert done.code == 0, done.err
    return folder / "uneven"


@pytest.fixture
def uneven(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "uneven")


def test_several_widths_are_those_of_the_tensors(uneven):
    config = json.loads((uneven / "config.json").read_text())
    assert config["intermediate_size"] == WIDTH
    model = load_pruned(str(uneven))
    assert widths_of(model) == [40, 60, 88]
    assert all(
        torch.equal(t, model.state_dict()[n]) for n, t in state_of(uneven).items()
    )


def test_stock_transformers_refuses_it(uneven):
    with pytest.raises(Exception, match="size"):
        AutoModelForCausalLM.from_pretrained(uneven)


@pytest.mark.slow
def test_an_export_prints_a_notice_and_the_model_card_repeats_it(
    tiny, tmp_path, caplog
):
    words = ["--model_args", f"pretrained={tiny}", "--output_path", tmp_path / "out"]
    (tmp_path / "w.json").write_text("[40, 60, 88]")
    assert pruned("prune", *words, "--widths", tmp_path / "w.json").code == 0
    (notice,) = (told for told in caplog.messages if "cannot build MLPs" in told)
    assert "open the saved model with --model pruned-hf" in notice
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "`lm_eval --model pruned-hf`" in card


def test_the_record_says_that_no_key_of_the_config_expresses_the_widths(tiny):
    record = load_pruned(str(tiny), widths=[40, 60, 88]).prune_record
    assert record.as_dict()["config_expresses_widths"] is False
    assert load_pruned(str(tiny), ratio=1).prune_record.as_dict()[
        "config_expresses_widths"
    ]


@pytest.mark.parametrize(
    ("size", "widths"),
    [
        ({"intermediate_size": 50}, [40, 50, 50]),
        ({"ratio": "50/32"}, [40, 50, 50]),
        ({"prune_percent": 50}, [20, 30, 44]),
        ({"widths": [30, 60, 10]}, [30, 60, 10]),
    ],
)
def test_sizes_of_a_model_of_several_widths_that_is_pruned_again(size, widths, uneven):
    assert widths_of(load_pruned(str(uneven), **size)) == widths


def test_plan_reads_the_widths_from_the_headers_of_the_files(uneven):
    words = ["--model_args", f"pretrained={uneven}", "--format", "json"]
    (row,) = json.loads(pruned("plan", *words, "--prune_percents", 50).out)
    record = load_pruned(str(uneven), prune_percent=50).prune_record
    assert row["parameters"] == record.parameters_after
    assert row["reduction"] == pytest.approx(
        1 - record.parameters_after / record.parameters_before
    )
