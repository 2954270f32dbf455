"""The probes: blocks that are Latin squares, and the floors that follow from it."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter, defaultdict
from fractions import Fraction
from itertools import islice
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
from hypothesis import given, strategies as st
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean_stderr
from lm_eval.api.model import LM
from lm_eval.tasks import _yaml_loader

from lm_eval_pruned.model_wrappers.floors import ConstantLM, EchoLM
from tests.helpers import evaluations
from tests.helpers.checkpoints import GEMMA_FILE, ROOT


FOLDER = ROOT / "tasks" / "probes"
utils = _yaml_loader._load_module_with_cache(FOLDER / "utils.py")
PROBES = {
    "knowledge": [*utils.load_knowledge()["test"]],
    "instructions": [*utils.load_instructions()["test"]],
}
VERIFIABLE = [*utils.load_verifiable_instructions()["test"]]
#: At least so many items, families and levels.
SIZES = {"knowledge": (800, 20, 5), "instructions": (300, 15, 3)}

both = pytest.mark.parametrize("probe", PROBES)


def blocks_of(docs) -> list[list[dict]]:
    blocks = defaultdict(list)
    for doc in docs:
        blocks[doc["block"]].append(doc)
    return [*blocks.values()]


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def texts_of(*files) -> list[str]:
    """Return the strings of JSON Lines files, wherever they stand in a row."""

    def strings(value):
        if isinstance(value, str):
            yield value
        elif isinstance(value, (list, dict)):
            for each in value.values() if isinstance(value, dict) else value:
                yield from strings(each)

    lines = (line for file in files for line in file.read_text("utf-8").splitlines())
    return [text for line in lines for text in strings(json.loads(line))]


CALIBRATION = ROOT / "lm_eval_pruned" / "pruning" / "calibration_text.jsonl"
HELD = ROOT / "lm_eval_pruned" / "checkpoints" / "held_text.jsonl"
STOPPING = ROOT / "lm_eval_pruned" / "healing" / "stopping_text.jsonl"


# --- the items


@both
def test_each_block_is_a_latin_square(probe):
    for block in blocks_of(PROBES[probe]):
        choices = block[0]["choices"]
        assert all(doc["choices"] == choices for doc in block)
        assert [doc["target"] for doc in block] == [*range(len(choices))]
        assert len({*choices}) == len({doc["prompt"] for doc in block}) == len(choices)
        assert len({(doc["family"], doc["level"]) for doc in block}) == 1
        # A prefix of another answer could never be less likely than it.
        assert not any(a.startswith(b) for a in choices for b in choices if a != b)


@both
def test_what_follows_a_prompt_starts_alike_in_all_of_a_block(probe):
    for block in blocks_of(PROBES[probe]):
        texts = [*(doc["prompt"] for doc in block), *block[0]["choices"]]
        assert all(text == text.strip() and text.isascii() for text in texts)
        assert len({doc["prompt"][-1].isalnum() for doc in block}) == 1


@both
def test_sizes_families_and_levels(probe):
    docs, (items, families, levels) = PROBES[probe], SIZES[probe]
    assert len(docs) >= items
    assert len({doc["prompt"] for doc in docs}) == len(docs)
    counts = Counter(doc["family"] for doc in docs)
    assert len(counts) >= families
    assert max(counts.values()) <= 0.08 * len(docs)
    assert {doc["level"] for doc in docs} == {*range(1, levels + 1)}


@pytest.mark.parametrize(
    ("name", "floors"),
    [
        ("knowledge", {"lift": 0, "acc": 200 / 800}),
        ("instructions", {"lift": 0, "acc": 82 / 300}),
        # An answer in free text may comply with no prompt of a block.
        ("instructions_generated", {"lift": 0}),
    ],
)
def test_their_yaml_files_declare_what_comparisons_need(name, floors):
    """A file takes no `metadata` over from the one that it includes."""
    config = _yaml_loader.load_yaml(FOLDER / f"pruned_probe_{name}.yaml")
    expected = {"primary_metric": "lift", "floors": floors}
    expected |= {"cluster": "block", "level": "level"}
    assert expected.items() <= config["metadata"].items()


@both
def test_the_first_blocks_are_a_sample_of_all_levels_and_families(probe):
    """``--limit`` takes the first."""
    docs, (_, families, levels) = PROBES[probe], SIZES[probe]
    first = docs[: len(docs) // 3]
    assert len({doc["family"] for doc in first}) >= families
    shares = [
        [sum(doc["level"] == level for doc in of) / len(of) for of in (docs, first)]
        for level in range(1, levels + 1)
    ]
    assert all(abs(whole - part) < 0.1 for whole, part in shares), shares


@both
def test_no_knowledge_of_the_answer_stands_in_the_prompt(probe):
    if probe == "knowledge":
        for doc in PROBES[probe]:
            right = " ".join(words_of(doc["choices"][doc["target"]]))
            assert f" {right} " not in f" {' '.join(words_of(doc['prompt']))} ", doc


def runs_of_eight(texts) -> set[tuple[str, ...]]:
    found = set()
    for words in map(words_of, texts):
        found.update(tuple(words[i : i + 8]) for i in range(len(words) - 7))
    return found


def asked_and_answered():
    return [
        f"{doc['prompt']} {choice}"
        for docs in PROBES.values()
        for doc in docs
        for choice in doc["choices"]
    ]


def test_no_run_of_eight_words_is_in_a_text_of_the_package():
    known = runs_of_eight(texts_of(CALIBRATION, HELD, STOPPING))
    assert len(known) > 20_000
    assert not runs_of_eight(asked_and_answered()) & known


@pytest.mark.parametrize("name", ["truthful_qa", "IFEval", "boolq", "gsm8k"])
def test_no_run_of_eight_words_is_a_benchmark_s(name, shared_data):
    known = runs_of_eight(texts_of(*shared_data.glob(f"**/{name}/**/*.jsonl")))
    assert len(known) > 2_000
    assert not runs_of_eight(asked_and_answered()) & known


#: What stands in many sentences and tells nothing.
COMMON = {
    "a",
    "an",
    "and",
    "are",
    "by",
    "for",
    "from",
    "in",
    "is",
    "of",
    "on",
    "that",
    "the",
}
NUMBERS = {*map(str, range(11)), "one", "two", "three", "four", "five", "six", "seven"}


def test_the_calibration_text_answers_no_item():
    """No sentence of it has a right answer, and all that tells its prompt from the others."""
    texts = texts_of(CALIBRATION)
    sentences = [{*words_of(s)} for t in texts for s in re.split(r"[.!?;\n]", t)]
    answered = []
    for block in blocks_of(PROBES["knowledge"]):
        prompts = [{*words_of(doc["prompt"])} - COMMON for doc in block]
        for doc, prompt in zip(block, prompts, strict=True):
            answer = {*words_of(doc["choices"][doc["target"]])}
            # Everyday words and numbers meet in a sentence that says nothing about them.
            everyday = doc["level"] < 3 or answer <= NUMBERS
            told = prompt if everyday else prompt - set.intersection(*prompts)
            if any(told | answer <= sentence for sentence in sentences):
                answered.append(doc["prompt"])
    # Their sentences are about lawns and parasites.
    assert answered == ["Grass is", "Blood is"]


def test_an_answer_has_the_same_tokens_after_each_prompt(real_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_model)
    for docs in PROBES.values():
        for block in blocks_of(docs):
            for choice in block[0]["choices"]:
                ends = set()
                for doc in block:
                    whole = tokenizer(f"{doc['prompt']} {choice}")["input_ids"]
                    ends.add(tuple(whole[len(tokenizer(doc["prompt"])["input_ids"]) :]))
                assert len(ends) == 1, (block[0], choice)


# --- floors: what is scored without reading the prompt


def check_floor(scored):
    """Check that blocks have the floor: 1/k exactly, and a lift of 0 up to rounding."""
    for scores in scored:
        shares = [Fraction(s["acc"]).limit_denominator(99) for s in scores]
        assert sum(shares) == 1
        largest = max(abs(s["lift"]) for s in scores)
        # Each lift is rounded once in the mean and once in the difference.
        assert abs(sum(s["lift"] for s in scores)) <= 1e-14 * max(1.0, largest) * 99


@both
@given(seed=st.integers(0, 2**32), spread=st.sampled_from([0.0, 1e-9, 1.0, 3.0, 400.0]))
def test_any_prior_over_answers_scores_the_floor(probe, seed, spread):
    draw, scored = np.random.default_rng(seed), []
    for block in blocks_of(PROBES[probe]):
        prior = draw.normal(0, 1, len(block)) * spread
        # Whole numbers, so that several answers share the first place.
        prior = prior if seed % 2 else prior.round()
        results = [(float(ll), False) for ll in prior]
        scored.append([utils.score_choices(doc, results) for doc in block])
    check_floor(scored)


RULES = {
    "longest": lambda choices: [len(c) for c in choices],
    "shortest": lambda choices: [-len(c) for c in choices],
    "first": lambda choices: [-n for n, _ in enumerate(choices)],
    "last of the alphabet": lambda choices: [sorted(choices).index(c) for c in choices],
    "most vowels": lambda choices: [len(re.findall("[aeiou]", c)) for c in choices],
    "most unlike the others": lambda choices: [
        -len({*c} & {*"".join(x for x in choices if x != c)}) for c in choices
    ],
}


@both
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_any_function_of_the_choices_scores_the_floor(probe, rule):
    scored = [
        [
            utils.score_choices(doc, [(float(x), False) for x in rule(doc["choices"])])
            for doc in block
        ]
        for block in blocks_of(PROBES[probe])
    ]
    check_floor(scored)


class Unigrams(LM):
    """Log-likelihoods from the frequencies of words in the calibration text, whatever the context."""

    def __init__(self):
        super().__init__()
        self.counts = Counter(words_of(" ".join(texts_of(CALIBRATION))))

    def loglikelihood(self, requests):
        def of(text):
            total = self.counts.total() + len(self.counts) + 1
            return sum(math.log((self.counts[w] + 1) / total) for w in words_of(text))

        return [(of(request.args[1]), False) for request in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    generate_until = loglikelihood_rolling


@both
@pytest.mark.parametrize(
    "model",
    [ConstantLM(), EchoLM(), Unigrams()],
    ids=lambda model: type(model).__name__,
)
def test_models_that_do_not_read_have_the_floor(model, probe):
    docs, requests = PROBES[probe], []
    for number, doc in enumerate(docs):
        kind = {"request_type": "loglikelihood", "doc": doc, "task_name": probe}
        requests += [
            Instance(**kind, arguments=(doc["prompt"], f" {c}"), idx=n, doc_id=number)
            for n, c in enumerate(doc["choices"])
        ]
    answers = iter(model.loglikelihood(requests))
    scored = [
        utils.score_choices(doc, [*islice(answers, len(doc["choices"]))])
        for doc in docs
    ]
    floor = np.mean([1 / len(doc["choices"]) for doc in docs])
    assert np.mean([s["acc"] for s in scored]) == pytest.approx(floor, abs=1e-12)
    # The answers of `constant` and `echo` differ by 1e-9.
    assert abs(np.mean([s["lift"] for s in scored])) <= 1e-9
    assert np.mean([s["margin"] for s in scored]) <= 0
    # Each block has the floor: between blocks, nothing varies.
    assert utils.block_stderr([s["lift_stderr"] for s in scored]) <= 1e-9


# --- scores


def test_scores_of_an_answer():
    doc = {"block": 3, "target": 1}
    scored = utils.score_choices(doc, [(-4.0, False), (-1.0, True), (-2.0, False)])
    assert scored == {
        "acc": 1.0, "lift": 2.0, "margin": 1.0,
        "acc_stderr": (3, 1.0), "lift_stderr": (3, 2.0), "margin_stderr": (3, 1.0),
    }  # fmt: skip
    shared = utils.score_choices(doc, [(-1.0, False), (-1.0, False), (-2.0, False)])
    assert (shared["acc"], shared["margin"]) == (0.5, 0.0)
    broken = utils.score_choices(doc, [(math.nan, False), (-1.0, True), (-2.0, False)])
    assert all(math.isnan(broken[name]) for name in ("acc", "lift", "margin"))


def test_the_standard_error_is_that_of_blocks():
    draw = np.random.default_rng(0).normal(size=40)
    apart = [*enumerate(draw.tolist())]
    assert utils.block_stderr(apart) == pytest.approx(mean_stderr(draw.tolist()))
    # Prompts that repeat another say nothing more.
    assert utils.block_stderr(apart * 4) == pytest.approx(utils.block_stderr(apart))
    assert math.isnan(utils.block_stderr([(0, 1.0), (0, 2.0)]))


# --- answers in free text


def test_an_answer_complies_with_its_prompt_alone():
    for block in blocks_of(VERIFIABLE):
        for number, pattern in enumerate(block[0]["patterns"]):
            choices = block[0]["choices"]
            matched = [bool(re.fullmatch(pattern, choice)) for choice in choices]
            assert matched == [n == number for n in range(len(choices))], block[0]
            assert not any(re.fullmatch(pattern, doc["prompt"]) for doc in block)
    assert len(VERIFIABLE) >= 250


@given(seed=st.integers(0, 2**32))
def test_an_answer_that_does_not_depend_on_the_prompt_has_no_lift(seed):
    draw, texts = np.random.default_rng(seed), ["", "Yes.", "A dog and a cat"]
    for block in blocks_of(VERIFIABLE):
        answer = str(draw.choice([*block[0]["choices"], *texts]))
        scored = [utils.score_answer(doc, [answer]) for doc in block]
        assert sum(score["lift"] for score in scored) == pytest.approx(0, abs=1e-12)
        own, sibling = (sum(s[name] for s in scored) for name in ("acc", "sibling"))
        assert own == pytest.approx(sibling)


# --- through the harness


@pytest.mark.parametrize(
    "file", sorted(ROOT.glob("tasks/*/*.yaml")), ids=lambda f: f.stem
)
def test_other_processes_can_aggregate(file, tmp_path):
    """lm-eval 0.5 bootstraps in a pool; it names modules by their paths, which break at a dot."""
    folder = shutil.copytree(file.parent, tmp_path / "python3.11" / file.parent.name)
    config = _yaml_loader.load_yaml(folder / file.name)
    for metric in config.get("metric_list", ()):
        assert ForkingPickler.dumps(metric["aggregation"])


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_a_run_reports_errors_by_block(chat, tiny_llama):
    tasks = [f"pruned_probe_{probe}" for probe in PROBES]
    tasks += ["pruned_probe_instructions_generated"]
    done = evaluator.simple_evaluate(
        model="pruned-hf",
        model_args=f"pretrained={tiny_llama},ratio=2",
        tasks=tasks,
        task_manager=evaluations.task_manager(),
        device="cpu",
        batch_size=16,
        limit=16,
        gen_kwargs="max_gen_toks=4",
        apply_chat_template=chat,
    )
    for task in tasks:
        samples, scores = done["samples"][task], done["results"][task]
        for metric in ("acc", "lift"):
            of_block = [(each["doc"]["block"], each[metric]) for each in samples]
            error = utils.block_stderr(of_block)
            assert scores[f"{metric}_stderr,none"] == pytest.approx(error, rel=1e-9)
            mean = np.mean([value for _, value in of_block])
            assert scores[f"{metric},none"] == pytest.approx(mean)
    for task in tasks:
        metadata = done["configs"][task]["metadata"]
        assert (metadata["primary_metric"], metadata["floors"]["lift"]) == ("lift", 0)
    for sample in done["samples"]["pruned_probe_knowledge"]:
        asked = sample["arguments"][0][0]
        assert asked.endswith(sample["doc"]["prompt"])
        assert asked.startswith("<user>" if chat else "Complete the sentence.")


#: One-sided, a p below 1e-6.
Z = 4.76


@pytest.mark.slow
@pytest.mark.parametrize("model", ["real_model", "second_model"])
def test_unpruned_models_are_above_the_floor(model, request):
    folder = request.getfixturevalue(model)
    file = f",gguf_file={GEMMA_FILE}" if model == "second_model" else ""
    done = evaluator.simple_evaluate(
        model="hf-prefix", model_args=f"pretrained={folder}{file}", tasks=["pruned_probes"],
        device="cpu", batch_size=16,
    )  # fmt: skip
    for probe, docs in PROBES.items():
        scores = done["results"][f"pruned_probe_{probe}"]
        floor = np.mean([1 / len(doc["choices"]) for doc in docs])
        assert scores["acc,none"] - floor > Z * scores["acc_stderr,none"]
        assert scores["lift,none"] > Z * scores["lift_stderr,none"]
