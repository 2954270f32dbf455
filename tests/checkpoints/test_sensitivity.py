"""What cutting one layer costs: held against errors of outputs, and against losses, by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.checkpoints.checkpoint import Checkpoint
from lm_eval_pruned.checkpoints.load import measure_sensitivity
from lm_eval_pruned.pruning.arguments import PruneArguments
from lm_eval_pruned.pruning.curvature import curvature
from lm_eval_pruned.pruning.layouts import (
    UnsupportedModelError,
    find_glu_mlps,
    norm_follows,
)
from lm_eval_pruned.pruning.measuring import text_loss
from tests.helpers.checkpoints import byte_tokenizer, save_tiny
from tests.helpers.layouts import breadth, save_family
from tests.helpers.ways_to_load import write_texts
from tests.pruning.test_repair import made


REPAIR = "least_squares"
WORDS = [
    "One two three four five six seven eight nine ten. " * 4,
    "A model is cut, and what is left of it is asked again. " * 4,
]
#: Kinds of models whose layers hold their MLPs in different ways.
LAYOUTS = ("llama", "phi3", "gemma2", "gemma3n_text", "lfm2", "mixtral", "qwen2_moe")


@pytest.fixture
def text(tmp_path):
    return write_texts(tmp_path / "text.jsonl", WORDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a model that knows the text; in layer 1, eight neurons could make up all others."""
    folder = save_tiny(tmp_path_factory.mktemp("model"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    mlp = model.model.layers[1].mlp
    generator = torch.Generator().manual_seed(0)
    gates, ups, mixing = (
        torch.randn(*shape, generator=generator)
        for shape in ((4, 32), (4, 2, 32), (88, 2))
    )
    of = torch.arange(88) % 4
    for part, rows in (
        (mlp.gate_proj, gates[of]),
        (mlp.up_proj, torch.einsum("nk,nkh->nh", mixing, ups[of])),
    ):
        part.weight.requires_grad_(False).copy_(0.3 * rows)
    ids = ids_of_text()
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        sum(model(each, labels=each).loss for each in ids).backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def ids_of_text() -> list[torch.Tensor]:
    return [torch.tensor([each]) for each in byte_tokenizer()(WORDS)["input_ids"]]


def curves(
    folder, text, percents=(25, 50, 75), auto_class=AutoModelForCausalLM, **asked
):
    asked |= {"allocation": "sensitivity", "prune_percent": 50, "calibration": text}
    arguments = PruneArguments(**asked)
    checkpoint = Checkpoint.of(str(folder), arguments, {}, auto_class)
    return measure_sensitivity(checkpoint, percents)


@pytest.mark.parametrize("family", breadth(("llama", "phi3", "gemma2"), "llama"))
def test_without_repair_a_rise_is_half_the_error_that_the_loss_minds(
    family, tmp_path, text
):
    folder = save_tiny(tmp_path / "model", family)
    found = curves(folder, text, (25, 50))
    model, ids = AutoModelForCausalLM.from_pretrained(folder).eval(), ids_of_text()
    roots = curvature(model, ids, find_glu_mlps(model)).roots
    scores = load_pruned(str(folder), prune_percent=50).prune_record.kept
    for mlp, curve, kept in zip(
        find_glu_mlps(model), found.curves, scores, strict=True
    ):
        seen = []
        down = mlp.projection("down_proj")
        # Where a norm follows, an error is a share of the size of the output.
        normed = norm_follows(model, mlp)
        assert normed == (family == "gemma2")

        def note(_, given, output, seen=seen, normed=normed):
            size = output.square().mean(-1, keepdim=True).sqrt()
            seen.append(given[0] / size if normed else given[0])

        handle = down.register_forward_hook(note)
        with torch.no_grad():
            for each in ids:
                model(each)
        handle.remove()
        x = torch.cat([each.flatten(0, -2) for each in seen]).double()
        x[:, kept] = 0
        error = (
            roots[mlp.name].double() @ mlp.weight("down_proj").detach().double() @ x.T
        )
        expected = float(error.square().sum(0).mean()) / 2
        # The matrix of activations is summed in float32.
        assert curve.rises[0] == pytest.approx(expected, rel=1e-3)
        assert [*curve.widths] == sorted(curve.widths) and len(curve.widths) == 2


@torch.no_grad()
def loss_of(model) -> float:
    ids = ids_of_text()
    total = sum(text_loss(model.eval(), each) for each in ids)
    return total / sum(each.numel() - 1 for each in ids)


def test_the_layer_that_costs_most_is_the_one_that_costs_most_by_the_curves(
    folder, text
):
    """On the scale of the loss, too, within what the second order leaves out."""
    found = curves(folder, text, (50,), recipe="best")
    whole = loss_of(AutoModelForCausalLM.from_pretrained(folder))
    assert found.loss == pytest.approx(whole, rel=1e-5)
    rises = {}
    for curve in found.curves:
        cut = {"prune_percent": 50, "layers": curve.layer, "recipe": "best"}
        model = load_pruned(str(folder), calibration=text, **cut)
        rises[curve.rises[0]] = loss_of(model) - whole
    said, was = zip(*sorted(rises.items()), strict=True)
    # The two others are as good as equal by the curves.
    assert was[-1] == max(was)
    assert said[-1] / 4 < was[-1] < 4 * said[-1]


def test_what_neurons_make_up_for_each_other_costs_nothing_after_repair(folder, text):
    plain = curves(folder, text)
    repaired = curves(folder, text, repair=REPAIR)
    best = curves(folder, text, recipe="best")
    assert (plain.criterion, plain.repair) == ("maw", "none")
    assert (best.criterion, best.repair) == ("obs", REPAIR)
    for layer, rises in enumerate(curve.rises for curve in repaired.curves):
        before, chosen = plain.curves[layer].rises, best.curves[layer].rises
        if layer == 1:
            assert max(rises) < 0.02 * max(before)
            continue
        # Narrower is worse.
        assert [*rises] == sorted({*rises}, reverse=True)
        assert all(after < rise for after, rise in zip(rises, before, strict=True))
        # The order of removal that minds the loss costs least.
        assert chosen[0] < rises[0]


def test_random_cuts_have_curves_for_each_seed(tiny_llama, text):
    zero, again, five = (
        curves(tiny_llama, text, criterion="random", seed=seed) for seed in (0, 0, 5)
    )
    assert zero == again != five


@pytest.mark.parametrize("family", breadth(LAYOUTS, "qwen2_moe", "gemma3n_text"))
def test_an_allocation_finds_curves_in_each_kind_of_model(family, tmp_path, text):
    made(tmp_path / "model", family)
    byte_tokenizer().save_pretrained(tmp_path / "model")
    asked = {"prune_percent": 40, "recipe": "best", "allocation": "sensitivity"}
    model = load_pruned(str(tmp_path / "model"), calibration=text, **asked)
    widths = model.prune_record.as_dict()["layer_widths"]
    assert len({*widths.values()}) > 1


def test_an_allocation_takes_from_what_repair_makes_up_for(folder, text):
    asked = {"prune_percent": 40, "recipe": "best", "calibration": text}
    asked["allocation"] = "sensitivity"
    model = load_pruned(str(folder), **asked)
    record = model.prune_record.as_dict()
    widths = record["layer_widths"]
    assert widths["1"] < min(widths["0"], widths["2"]) and sum(widths.values()) == 159
    assert record["mlps_repaired"] == sum(each < 88 for each in widths.values())
    # Those of another criterion without repair are other widths.
    other = load_pruned(str(folder), **asked, criterion="act", repair="none")
    assert other.prune_record.digest != model.prune_record.digest
    whole = AutoModelForCausalLM.from_pretrained(folder)
    in_memory = prune_model(whole, tokenizer=byte_tokenizer(), **asked)
    assert in_memory.prune_record.digest == model.prune_record.digest
    for one, other in zip(model.parameters(), in_memory.parameters(), strict=True):
        assert one.equal(other)


@pytest.mark.parametrize(
    ("percents", "asked", "word"),
    [
        ((), {}, "nothing to measure"),
        ((0, 25), {}, "prune_percents=0 25"),
        ((100,), {}, "prune_percents=100"),
        (("much",), {}, "prune_percents=much"),
        ((25,), {"calibration_samples": 9}, "holds 2 texts, but 9"),
        ((25,), {"criterion": "nonsense"}, "criterion=nonsense"),
    ],
)
def test_what_cannot_be_measured_is_refused(percents, asked, word, tiny_llama, text):
    with pytest.raises(ValueError, match=word):
        curves(tiny_llama, text, percents, **asked)


def test_a_model_with_an_encoder_cannot_be_measured(tmp_path, text):
    save_family(tmp_path / "t5", "t5", 40)
    with pytest.raises(UnsupportedModelError, match="encoder"):
        curves(tmp_path / "t5", text, auto_class=AutoModelForSeq2SeqLM)
