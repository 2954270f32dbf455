"""Repair by least squares: what it promises of one layer, and of a model."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaForCausalLM

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.checkpoints.cost import HELD_TEXT
from lm_eval_pruned.healing.text import STOPPING_TEXT
from lm_eval_pruned.pruning import moments as moments_module
from lm_eval_pruned.pruning.arguments import OWN_TEXT
from lm_eval_pruned.pruning.criteria import kept_set
from lm_eval_pruned.pruning.layouts import layers_of
from lm_eval_pruned.pruning.moments import Moments
from lm_eval_pruned.pruning.repair import (
    RIDGE,
    STEPS,
    order_by_cost,
    regularised,
    removed_in_steps,
    repaired,
)
from tests.helpers.checkpoints import (
    byte_tokenizer,
    save_tiny,
    tiny_config,
    tiny_model,
)
from tests.helpers.layouts import FAMILIES, breadth, save_family
from tests.helpers.ways_to_load import (
    Source,
    assert_one_model,
    assert_state,
    write_texts,
)


TEXTS = [
    "One two three four five six seven eight nine ten. " * 12,
    "A model is cut, and what is left of it is asked again. " * 12,
]
seeds = st.integers(0, 2**20)


def layer(seed: int, neurons: int = 24, tokens: int = 60):
    """Return activations (tokens, I), down (H, I) and regularised G of a layer, and H = 5."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(neurons, neurons, generator=generator)
    x = torch.randn(tokens, neurons, generator=generator) @ mixing
    down = torch.randn(5, neurons, generator=generator)
    moments = Moments.none(neurons, torch.device("cpu"))
    moments.add(x[: tokens // 3])
    moments.add(x[tokens // 3 :])
    return x.double(), down.double(), regularised(moments, centred=False).double()


def objective(gram, down, kept, weights) -> float:
    """Return the squared error of the output, with the ridge: the trace of D G D'."""
    change = -down.clone()
    change[:, kept] += weights
    return float((change @ gram @ change.T).diagonal().sum())


@given(seeds)
def test_keeping_all_neurons_changes_nothing(seed):
    _, down, gram = layer(seed)
    assert torch.equal(repaired(gram, down, torch.arange(24)), down)


@given(seeds)
def test_a_neuron_that_others_make_up_goes_without_loss(seed):
    x, down, _ = layer(seed)
    x[:, 7] = x[:, 3] - 2 * x[:, 11]
    gram = x.T @ x + 1e-9 * torch.eye(24)
    kept = torch.tensor([n for n in range(24) if n != 7])
    lost = x[:, kept] @ repaired(gram, down, kept).T - x @ down.T
    assert lost.abs().max() < 1e-6 * (x @ down.T).abs().max()


@given(seeds, st.integers(1, 23), st.sampled_from([4, 60]))
def test_repair_lowers_the_error_and_no_change_does_better(seed, width, tokens):
    # With 4 tokens G has rank 4.
    x, down, gram = layer(seed, tokens=tokens)
    kept = order_by_cost(gram, down, width)
    new = repaired(gram, down, kept)
    wanted = x @ down.T

    def error(weights):
        return float((x[:, kept] @ weights.T - wanted).square().sum())

    assert error(new) <= error(down[:, kept]) * (1 + 1e-9)
    best = objective(gram, down, kept, new)
    generator = torch.Generator().manual_seed(seed)
    for size in (1e-3, 1e-1):
        step = size * torch.randn(new.shape, generator=generator, dtype=torch.float64)
        assert objective(gram, down, kept, new + step) >= best


@given(seeds)
def test_the_first_neuron_to_go_is_the_one_that_costs_least_after_repair(seed):
    _, down, gram = layer(seed, neurons=12)
    costs = []
    for gone in range(12):
        kept = torch.tensor([n for n in range(12) if n != gone])
        costs.append(objective(gram, down, kept, repaired(gram, down, kept)))
    left = order_by_cost(gram, down, 11)
    (gone,) = {*range(12)} - {*left.tolist()}
    assert costs[gone] == pytest.approx(min(costs), rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("by_scores", [False, True])
def test_every_error_on_the_way_is_what_repair_leaves(seed, by_scores):
    _, down, gram = layer(seed, neurons=40)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(40, generator=generator) if by_scores else None
    widths = [39, 30, 17, 4]
    steps = removed_in_steps(gram, down, widths, scores)
    for width, (left, error) in zip(widths, steps, strict=True):
        assert len(left) == width
        assert scores is None or left.equal(kept_set(scores, len(left)))
        remains = objective(gram, down, left, repaired(gram, down, left))
        assert error == pytest.approx(remains, rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_after_each_step_costs_are_those_of_the_neurons_that_are_left(seed):
    _, down, gram = layer(seed, neurons=2 * STEPS)
    left = torch.arange(2 * STEPS)
    # One neuron goes in each step.
    for _ in range(STEPS):
        spared = [left[left != gone] for gone in left]
        costs = [objective(gram, down, s, repaired(gram, down, s)) for s in spared]
        left = spared[costs.index(min(costs))]
    assert order_by_cost(gram, down, STEPS).equal(left)


@given(seeds, st.sampled_from([1e-2, 1e-4, 1e-5]), st.booleans())
def test_in_single_precision_the_order_and_the_errors_are_those_of_double(
    seed, ridge, together
):
    """Neurons of which each has another unit, and that go together up to what the ridge adds."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 2 if together else 24, generator=generator).double()
    x = x @ torch.randn(x.shape[1], 24, generator=generator).double()
    gram = x.T @ x
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    unit = 10 ** (4 * torch.rand(24, generator=generator).double() - 2)
    gram, down = unit[:, None] * gram * unit, torch.randn(5, 24, generator=generator)
    single, down = gram.float(), down.double() / unit
    # What G is in single precision is all that is known of it.
    gram = single.double()
    costs = down.square().sum(0) / gram.inverse().diagonal()
    ((left, _),) = removed_in_steps(single, down, [23])
    (gone,) = {*range(24)} - {*left.tolist()}
    assert costs[gone] <= 1.02 * costs.min()
    widths = [20, 12, 4]
    for left, error in removed_in_steps(single, down, widths):
        new = repaired(gram, down, left)
        best = objective(gram, down, left, new)
        assert error == pytest.approx(best, rel=0.02)
        new = repaired(single, down, left).double()
        assert objective(gram, down, left, new) <= 1.001 * best


def test_a_matrix_that_single_precision_cannot_solve_with_is_solved_in_double():
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(24, 1, generator=generator)
    exact = direction @ direction.T
    exact.diagonal().add_(1e-5)
    down, kept = torch.randn(5, 24, generator=generator), torch.arange(12)
    weights = repaired(exact, down, kept)
    assert weights.dtype == torch.float64
    torch.testing.assert_close(weights, repaired(exact.double(), down, kept))
    exact.diagonal().add_(0.01)
    assert repaired(exact, down, kept).dtype == torch.float32


@given(seeds, st.booleans())
def test_blocks_of_rows_do_not_change_the_order(seed, by_scores):
    _, down, gram = layer(seed)
    scores = torch.rand(24) if by_scores else None
    whole = [*removed_in_steps(gram, down, [17, 4], scores)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments_module, "_ROWS", 5)
        blocks = [*removed_in_steps(gram, down, [17, 4], scores)]
    for (one, first), (other, second) in zip(whole, blocks, strict=True):
        assert one.equal(other)
        assert first == pytest.approx(second, rel=1e-9)


def peak_of(compute) -> int:
    """Return the most bytes that are allocated while a function runs, beside those before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        compute()
    events = profile.profiler.kineto_results.events()
    changes = [e.nbytes() for e in events if e.name() == "[memory]"]
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_order_and_the_repair_hold_three_matrices_at_most(dtype, monkeypatch):
    """Of float64, I x I, the sum over tokens among them: those of float32 are half as large."""
    neurons = 512
    # As many blocks as 8,192 neurons have.
    monkeypatch.setattr(moments_module, "_ROWS", 32)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * neurons, neurons, generator=generator)
    if dtype == torch.float64:
        # The ridge of large means that are alike would be large as well.
        x += 1000
    moments = Moments.none(neurons, x.device)
    moments.add(x)
    down = torch.randn(8, neurons, generator=generator)

    def solve() -> None:
        gram = regularised(moments, centred=False)
        if dtype == torch.float64:
            gram.diagonal().mul_(1 / (1 + 0.999 * RIDGE))
        kept = order_by_cost(gram, down, neurons * 3 // 5)
        assert repaired(gram, down, kept).dtype == dtype

    held = peak_of(solve) + moments.scatter.nbytes
    most = {torch.float32: 2, torch.float64: 3}[dtype]
    # Beside them, a block of rows and what the neurons of a step supply.
    assert held < (most + 0.1) * 8 * neurons**2


@given(seeds)
def test_32_bit_activations_give_the_weights_of_64_bit_ones(seed):
    x, down, gram = layer(seed)
    exact = x.T @ x
    exact.diagonal().add_(0.01 * float(exact.diagonal().mean()))
    kept = torch.arange(0, 24, 2)
    single, double = (repaired(each, down, kept) for each in (gram, exact))
    torch.testing.assert_close(single, double, rtol=1e-4, atol=1e-4)


def tiny(**more) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"intermediate_size": 64, "max_position_embeddings": 1024}
    return LlamaForCausalLM(tiny_config(**sizes, **more)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a tiny checkpoint with a tokenizer, and calibration text beside it."""
    path = tmp_path_factory.mktemp("tiny")
    tiny().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    write_texts(path / "text.jsonl", TEXTS)
    return path


@pytest.fixture
def text(folder):
    return {"calibration": str(folder / "text.jsonl")}


def prune(model, text, **asked):
    asked = {"prune_percent": 40, **asked, **text}
    return prune_model(model, tokenizer=byte_tokenizer(), **asked)


def made(folder: Path, family: str):
    """Return a tiny model of a family; its expert layers keep any width."""
    if family in FAMILIES:
        return save_family(folder, family, 64)
    more = {"num_hidden_layers": 4, "num_kv_shared_layers": 2}
    save_tiny(folder, family, **(more if family == "gemma3n_text" else {}))
    return AutoModelForCausalLM.from_pretrained(folder).eval()


#: Layers that differ in what happens around their MLP.
SHAPES = ("llama", "phi3", "gemma2", "gemma3n_text", "cohere", "granite", "olmo2")
SHAPES += ("lfm2", "falcon_h1", "mixtral", "qwen2_moe", "deepseek_v3")


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_an_error_is_a_share_of_the_output_where_a_norm_follows(family, tmp_path):
    model = made(tmp_path, family)
    text = {"calibration": write_texts(tmp_path / "text.jsonl", [TEXTS[0][:400]])}
    seen: dict = {}
    layers = enumerate(layers_of(model)[1])
    downs = {number: layer.mlp.down_proj for number, layer in layers}
    for number, down in downs.items():

        def note(_, x, y, number=number) -> None:
            seen.setdefault(number, (x[0][0].double(), y[0].double()))

        down.register_forward_hook(note)
    before = {number: down.weight.detach().double() for number, down in downs.items()}
    ids = torch.tensor([byte_tokenizer()(TEXTS[0][:400])["input_ids"]])
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    pruned = prune(model, text, criterion="l2", repair="least_squares")
    for number, (x, y) in seen.items():
        if family == "gemma2":
            x = x / y.square().mean(-1, keepdim=True).sqrt()
        if downs[number].bias is not None:
            x = x - x.mean(0)
        gram = x.T @ x
        gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
        kept = pruned.prune_record.kept[number]
        expected = repaired(gram, before[number], kept)
        after = layers_of(pruned)[1][number].mlp.down_proj.weight.detach().double()
        torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-4)


def test_the_text_runs_once_and_no_further_than_the_last_layer_that_is_cut(
    text, monkeypatch
):
    ran: Counter[str] = Counter()
    for part in (LlamaAttention, LlamaMLP):

        def counting(self, *given, forward=part.forward, name=part.__name__, **named):
            ran[name] += 1
            return forward(self, *given, **named)

        monkeypatch.setattr(part, "forward", counting)
    prune(tiny(), text, repair="least_squares", layers="0-1")
    assert ran == {"LlamaAttention": 2, "LlamaMLP": 2}


def test_a_layer_that_is_cut_is_met_by_no_other_text(text, monkeypatch):
    """Each layer sees what the unpruned model hands to it, in however many groups text runs."""
    together = prune(tiny(), text, recipe="best")
    monkeypatch.setattr(moments_module, "_LEAST", 1)
    monkeypatch.setattr(moments_module, "_SHARE", 0)
    assert_state(prune(tiny(), text, recipe="best"), together.state_dict())


def test_a_model_that_changes_hidden_states_between_its_layers(text):
    model = tiny()
    model.model.layers[1].register_forward_pre_hook(
        lambda _, positional: (2 * positional[0], *positional[1:])
    )
    record = prune(model, text, recipe="best").prune_record
    assert record.repaired == len(model.model.layers)


def test_layers_that_share_keys_and_values_are_calibrated(text, tmp_path):
    kinds = ["sliding_attention", "full_attention"]
    sizes = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 300}
    folder = save_tiny(
        tmp_path / "model",
        "gemma4_text",
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=2 * kinds,
        global_head_dim=8,
        **sizes,
    )
    asked = {"recipe": "best", "prune_percent": 40, **text}
    assert load_pruned(str(folder), **asked).prune_record.repaired == 4


def test_layers_that_no_text_enters_are_cut_by_their_weights_and_not_repaired(text):
    """Mllama's layers of cross-attention have nothing to do without an image."""
    config = MllamaTextConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=88,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        cross_attention_layers=[1],
        pad_token_id=0,
    )
    model = MllamaForCausalLM(config).eval()
    before = model.model.layers[1].mlp.down_proj.weight.clone()
    record = prune(model, text, recipe="best").prune_record
    assert record.repaired == 2
    after = model.model.layers[1].mlp.down_proj.weight
    assert torch.equal(after, before[:, record.kept[1]])


@pytest.mark.parametrize("family", breadth(("mixtral", "qwen3_moe"), "mixtral"))
def test_stacked_experts_are_repaired_and_err_less(family, text, tmp_path, caplog):
    made(tmp_path, family)
    ids = torch.tensor([byte_tokenizer()(TEXTS[0])["input_ids"]])[:, :512]

    def logits(**asked):
        more = asked | text if asked else {}
        model = load_pruned(str(tmp_path), tokenizer=byte_tokenizer(), **more)
        with torch.no_grad():
            return model(input_ids=ids).logits, model.prune_record

    whole, _ = logits()
    best, record = logits(prune_percent=40, criterion="obs", repair="least_squares")
    plain, _ = logits(prune_percent=40, criterion="obs")
    assert (best - whole).norm() < (plain - whole).norm()
    assert record.as_dict()["mlps_repaired"] == len(record.kept)
    assert "keep their weights" not in caplog.text


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_record_says_how_many_tokens_a_kept_neuron_has(
    family, text, tmp_path, caplog
):
    model = made(tmp_path, family)
    config, share = model.config, 1.0
    if family == "mixtral":
        share = config.num_experts_per_tok / config.num_local_experts
        assert share < 1
    pruned = prune(model, text, repair="least_squares")
    record = pruned.prune_record.as_dict()["calibration"]
    expected = record["tokens"] * share / len(pruned.prune_record.kept[0])
    assert record["tokens_per_neuron"] == round(expected, 1) > 5
    assert not [
        e
        for e in caplog.records
        if e.levelno >= logging.WARNING and "kept neuron" in e.message
    ]
    few = {"calibration": write_texts(tmp_path / "few.jsonl", [TEXTS[0][:40]])}
    prune(tiny(), few, repair="least_squares")
    assert "1.0 tokens for each kept neuron" in caplog.text


@pytest.mark.parametrize("criterion", ["maw", "act", "obs", "random"])
@pytest.mark.parametrize("mlp_bias", [False, True])
def test_repair_is_the_same_on_load_in_memory_and_in_an_export(
    text, tmp_path, criterion, mlp_bias
):
    tiny_model(tiny_config(mlp_bias=mlp_bias)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    asked = {"prune_percent": 40, "criterion": criterion, "repair": "least_squares"}
    asked, source = asked | text, Source(tmp_path)
    state, ways = source.load(**asked).state_dict(), ("in memory", "exported")
    record = assert_one_model(source, asked, state, tmp_path, ways).as_dict()
    assert (record["repair"], record["mlps_repaired"]) == ("least_squares", 3)
    assert record["calibration"]["file"] == "text.jsonl"
    del asked["repair"]
    if criterion in ("maw", "random"):
        del asked["calibration"]
    unrepaired = source.load(**asked)
    assert "repair" not in unrepaired.prune_record.as_dict()
    for name, weight in unrepaired.state_dict().items():
        assert ".mlp.down_proj." not in name or not weight.equal(state[name]), name


def by_hand(model, ids, kept):
    """Return weights and bias of the first down after repair, from raw activations in 64 bits."""
    down, seen = model.model.layers[0].mlp.down_proj, []
    handle = down.register_forward_hook(lambda *each: seen.append(each[1][0]))
    with torch.no_grad():
        for each in ids:
            model(torch.tensor([each]))
    handle.remove()
    x = torch.cat([each.flatten(0, -2) for each in seen]).double()
    weight, mean = down.weight.detach().double(), x.mean(0)
    spread = x - mean
    gram = spread.T @ spread
    gram += 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    gone = [n for n in range(x.shape[1]) if n not in kept]
    share = torch.linalg.solve(gram[kept][:, kept], gram[kept][:, gone])
    repaired = weight[:, kept] + weight[:, gone] @ share.T
    lost = weight @ mean - repaired @ mean[kept]
    return repaired, down.bias.detach().double() + lost


@pytest.mark.parametrize(
    "case", ["plain", "one word again and again", "large means", "padding"]
)
def test_beside_a_bias_repair_is_that_of_64_bit_activations(case, tmp_path):
    # A text alone is not padded, so its activations are those of an ordinary pass to the last bit.
    model, texts = tiny(mlp_bias=True), TEXTS[:1]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            for part in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                part.bias.copy_(torch.randn(part.bias.shape, generator=generator))
            if case == "large means":
                layer.mlp.gate_proj.bias[::3] += 300
                layer.mlp.up_proj.bias[::3] += 300
    if case == "one word again and again":
        texts = ["a" * 500]
    if case == "padding":
        texts = [TEXTS[0], "Short.", TEXTS[1][:90]]
    ids = byte_tokenizer()(texts)["input_ids"]
    plain = tiny(mlp_bias=True)
    plain.load_state_dict(model.state_dict())
    text = {"calibration": write_texts(tmp_path / "text.jsonl", texts)}
    prune(model, text, repair="least_squares")
    kept = model.prune_record.kept[0].tolist()
    weight, bias = by_hand(plain, ids, kept)
    down = model.model.layers[0].mlp.down_proj
    # G is summed in 32 bits, and its ridge is a hundredth of its mean eigenvalue.
    close = {"rtol": 1e-3, "atol": 1e-3 * float(weight.abs().max())}
    torch.testing.assert_close(down.weight.double(), weight, **close)
    close["atol"] = 1e-3 * float(bias.abs().max())
    torch.testing.assert_close(down.bias.double(), bias, **close)


def test_what_fails_leaves_the_model_whole(text):
    model = tiny()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.mul_(1e38)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    with pytest.raises(ValueError, match="NaN or infinite"):
        prune(model, text, recipe="best")
    assert_state(model, before)
    assert all(parameters[n] is p for n, p in model.named_parameters())


def test_texts_of_the_package_share_no_run_of_8_words_with_each_other_or_the_demo():
    words = {}
    for file in (OWN_TEXT, HELD_TEXT, STOPPING_TEXT):
        lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        words[file] = {
            tuple(run[n : n + 8])
            for run in (re.findall(r"\w+", line["text"].lower()) for line in lines)
            for n in range(len(run) - 7)
        }
        assert len({line["kind"] for line in lines}) >= 4
    assert OWN_TEXT.stat().st_size < 300_000
    for one, other in itertools.combinations(words.values(), 2):
        assert not one & other
    demo = Path(__file__).parents[2] / "tasks" / "demo"
    for name in ("instructions.jsonl", "misconceptions.jsonl"):
        text = " ".join(re.findall(r"\w+", (demo / name).read_text("utf-8").lower()))
        assert not any(" ".join(run) in text for run in set().union(*words.values()))


@pytest.mark.parametrize("criterion", ["act", "obs"])
def test_an_allocation_goes_with_repair(folder, text, criterion):
    asked = {"criterion": criterion, "repair": "least_squares"}
    asked |= {"allocation": "sensitivity", "prune_percent": 40}
    model = load_pruned(str(folder), **asked, **text)
    widths = dict(model.prune_record.plan.layer_widths)
    assert sum(widths.values()) == 3 * 39
    for number, layer in enumerate(model.model.layers):
        assert layer.mlp.down_proj.weight.shape == (32, widths[number])
