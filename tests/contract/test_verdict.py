"""What docs/verdict.md promises."""

from __future__ import annotations

import re

import numpy as np
import pytest
from scipy import stats

from tests.contract.commands import lm_eval, pruned, results_in
from tests.helpers.bbq import CATEGORIES, made_documents, write_bbq
from tests.helpers.checkpoints import edit_config, save_tiny
from tests.helpers.results_files import answered, lifts, losses, write_run, yes_or_no
from tests.helpers.sweeping import full_disk, write_tasks
from tests.sweeps.conftest import quick  # noqa: F401


RIGHTS = [n % 2 for n in range(800)]


def right(share, documents=800):
    return yes_or_no(share, documents)


@pytest.fixture
def verdict(tmp_path):
    """Return what the command says of two finished results, by `measure`, of tasks that have it."""

    def verdict(base, candidate, *words, measure="acc", **about):
        if any(f"{measure},none" in metrics for metrics in base.values()):
            words = *words, "--measure", measure
        paths = [write_run(tmp_path / "old", base).parent]
        paths += [write_run(tmp_path / "new", candidate, **about).parent]
        return pruned("verdict", *paths, *words, "--output_path", tmp_path / "out")

    return verdict


def rows_of(done):
    """Return verdict, interval and margin of the first score of each task, which is the one that is judged."""
    table = done.out.partition("## Scores")[2].partition("\n## ")[0]
    lines = [line.split("|")[1:-1] for line in table.splitlines() if line[:1] == "|"]
    head, _, *rows = [[cell.strip() for cell in line] for line in lines]
    scores = [dict(zip(head, row, strict=True)) for row in rows]
    judged = [row for row in scores if row["verdict"] != "not judged"]
    return {row["task"]: row for row in reversed(judged)}


def test_ship_do_not_ship_and_not_decided_by_exit_code(verdict):
    for share, documents, code, word in (
        (0.7925, 800, 0, "Ship"),
        (0.7, 800, 1, "Do not ship"),
        (0.8, 60, 3, "Not decided"),
    ):
        tasks = [{"boolq": right(of, documents)} for of in (0.8, share)]
        done = verdict(*tasks)
        assert (done.code, word in done.out) == (code, True), done.out


def test_by_default_scores_between_0_and_1_may_lose_2_points(verdict):
    values = np.random.default_rng(0).normal(-3, 0.2, size=80)
    wiki, more = ({"word_perplexity,none": losses(values - lost)} for lost in (0, 0.01))
    both = [[[float(loss), 9.0] for loss in 9 * of] for of in (values, values - 0.01)]
    byte, more_byte = (
        {"bits_per_byte,none": losses(each, "bits_per_byte")} for each in both
    )
    done = verdict(
        {"boolq": right(0.8), "w": wiki, "b": byte},
        {"boolq": right(0.775), "w": more, "b": more_byte},
    )
    found = {task: row["margin"] for task, row in rows_of(done).items()}
    assert found == {"boolq": "2pt", "w": "2%", "b": "2%"}
    # 2.5 points are lost for certain, which a margin of 20 points would not mind.
    assert done.code == 1


def test_the_interval_is_that_of_90_percent_and_decides(verdict):
    """20 of 800 answers became wrong, and none right: Clopper and Pearson's interval."""
    done = verdict({"boolq": right(0.8)}, {"boolq": right(0.775)}, "--margin", "4pt")
    row = rows_of(done)["boolq"]
    low, high = (float(end) for end in row["90% interval"].strip("[]").split(","))
    ends = stats.beta.ppf(0.05, 20, 781), stats.beta.ppf(0.95, 21, 780)
    assert -low == pytest.approx(ends[1], abs=1e-4)
    # The document that nobody has seen may become right, so this end is lower than theirs.
    assert ends[0] - 1 / 800 < -high + 1e-3 < ends[0]
    # The 95 % interval would reach beyond the margin that the 90 % interval keeps.
    margin = f"{100 * ends[1] + 0.02:.2f}pt"
    done = verdict({"boolq": right(0.8)}, {"boolq": right(0.775)}, "--margin", margin)
    assert (done.code, rows_of(done)["boolq"]["verdict"]) == (0, "equivalent")


@pytest.mark.parametrize(
    ("candidate", "word"),
    [
        (0.8, "equivalent"),
        (0.81, "equivalent"),
        (0.87, "better"),
        (0.79, "equivalent"),
    ],
)
def test_what_is_within_the_margin_or_better_ships(verdict, candidate, word):
    done = verdict({"boolq": right(0.8)}, {"boolq": right(candidate)})
    assert (done.code, rows_of(done)["boolq"]["verdict"]) == (0, word)


def test_not_worse_is_above_only_the_lower_end(verdict):
    picks = [r if n < 640 else 1 - r for n, r in enumerate(RIGHTS)]
    # 14 answers become right and 10 wrong.
    after = [1 - p if n < 10 or 640 <= n < 654 else p for n, p in enumerate(picks)]
    tasks = [{"boolq": answered(of, RIGHTS)} for of in (picks, after)]
    done = verdict(*tasks)
    row = rows_of(done)["boolq"]
    low, high = (float(end) for end in row["90% interval"].strip("[]").split(","))
    assert low > -0.02 and high < 0.02 and row["verdict"] == "equivalent"
    done = verdict(*tasks, "--margin", f"{high - 0.0005:.4f}")
    assert low > -(high - 0.0005)
    assert (done.code, rows_of(done)["boolq"]["verdict"]) == (0, "not worse")


def test_a_candidate_that_is_the_base_ships_whatever_its_perplexity_is_of(verdict):
    values = np.random.default_rng(0).normal(-3, 0.2, size=20)
    tasks = {"boolq": right(0.8), "w": {"word_perplexity,none": losses(values)}}
    done = verdict(tasks, tasks)
    assert done.code == 0, done.out
    assert rows_of(done)["w"]["verdict"] == "equivalent"


@pytest.mark.slow
def test_rare_large_losses_of_the_size_of_the_margin_are_not_shipped(verdict):
    shipped = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        base = rng.uniform(0.5, 0.9, size=40)
        run = base - np.where(rng.random(40) < 0.04, 0.5, 0) + rng.normal(0, 1e-3, 40)
        tasks = [{"t": {"mc2,none": [*values]}} for values in (base, run)]
        shipped += verdict(*tasks).code == 0
    # A t test ships 5 of these 20.
    assert shipped <= 1


def test_where_the_base_is_at_its_floor_no_score_ships(verdict):
    done = verdict({"boolq": right(0.51)}, {"boolq": right(0.51)})
    assert done.code == 3
    assert rows_of(done)["boolq"]["verdict"] == "cannot show a loss (at floor)"
    assert "Not decided" in done.out and "No score can show a loss" in done.out
    # Beside another that can show one, it neither ships nor stands in the way.
    both = {"boolq": right(0.51), "piqa": right(0.8)}
    done = verdict(both, both)
    assert (done.code, "Each score that can show a loss" in done.out) == (0, True)
    lost = {"boolq": right(0.3), "piqa": right(0.8)}
    assert verdict(both, lost).code == 1


def test_the_table_says_which_share_is_kept(verdict):
    base = {"boolq": right(0.9), "piqa": right(0.51)}
    done = verdict(base, {"boolq": right(0.7), "piqa": right(0.51)})
    kept = {task: row["kept"] for task, row in rows_of(done).items()}
    assert kept["boolq"].startswith("50 % [4") and kept["boolq"].endswith("]")
    assert kept["piqa"] == "cannot show a loss"
    first = done.out.partition("\n")[0]
    assert first == "do not ship: boolq acc worse"


@pytest.mark.parametrize("model", ["echo", "constant"])
def test_a_model_that_knows_nothing_is_no_candidate(verdict, model):
    done = verdict(
        {"boolq": right(0.8)}, {"boolq": right(0.5)}, config={"model": model}
    )
    assert "is a model that knows nothing" in done.sentence


OLD = {"boolq": right(0.8)}
FEW = {"boolq": right(0.8, 100)}


@pytest.mark.parametrize(
    ("base", "candidate", "about", "why"),
    [
        (
            OLD,
            OLD,
            {"n-shot": {"boolq": 5}},
            "num_fewshot is 5, but 0 in old.*the same",
        ),
        (OLD, OLD, {"chat_template_sha": 64 * "a"}, "is a{12}, but none in.*the same"),
        (OLD, OLD, {"versions": {"boolq": 2.0}}, "1.0 in old and 2.0 in new.*again"),
        (OLD, OLD, {"samples": False}, "no logged samples of boolq.*--log_samples"),
        (OLD, FEW, {}, "documents is 100, but 800 in old"),
        (OLD, FEW, {"samples": False}, "documents is 100, but 800 in old"),
        ({**OLD, "piqa": right(0.8)}, OLD, {}, "has no piqa acc,none, which the base"),
    ],
)
def test_results_that_were_asked_otherwise_or_have_no_samples_are_refused(
    verdict, base, candidate, about, why
):
    assert re.search(why, verdict(base, candidate, **about).sentence)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"), documents=40)


@pytest.fixture(scope="module")
def tiny2(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny2"), seed=1)


@pytest.fixture
def verdict_on_models(made, tmp_path):
    """Run the command on two models and some of two tasks, always into one folder."""

    def on_models(base, candidate, *tasks):
        models = [f"hf,pretrained={path},dtype=float32" for path in (base, candidate)]
        words = ["--tasks", *tasks, "--include_path", made, "--device", "cpu"]
        words += ["--gen_kwargs", "do_sample=false", "--margin", "10pt"]
        return pruned("verdict", *models, *words, "--output_path", tmp_path / "out")

    return on_models


BOTH = ("tiny_choice", "tiny_sentence")


def scored(done):
    """Return the tasks of the table of scores."""
    table = done.out.partition("## Scores")[2].partition("\n## ")[0]
    return {task for task in BOTH if f"|{task}" in table}


@pytest.mark.slow
def test_another_candidate_or_base_in_the_same_folder_gets_no_score_of_the_first(
    verdict_on_models, tiny_llama, tiny2, tmp_path
):
    assert scored(verdict_on_models(tiny_llama, tiny2, *BOTH)) == {*BOTH}
    base = tmp_path / "out" / "base" / "units"
    before = {*base.rglob("results_*.json")}
    second = verdict_on_models(tiny_llama, tiny_llama, "tiny_choice")
    assert second.code == 3, "an untrained model is at the floor"
    assert scored(second) == {"tiny_choice"}
    assert "candidate (tiny_sentence)" in second.out
    assert {*base.rglob("results_*.json")} == before, "the base's results are reused"
    third = verdict_on_models(tiny2, tiny2, "tiny_choice")
    assert scored(third) == {"tiny_choice"}
    assert "base (tiny_sentence)" in third.out


def test_a_disk_that_fills_up_is_no_answer(verdict_on_models, tiny_llama, tmp_path):
    with full_disk(tmp_path / "out" / "base"):
        done = verdict_on_models(tiny_llama, tiny_llama, *BOTH)
    assert "No space left on device" in done.out
    assert f"the base hf,pretrained={tiny_llama}" in done.sentence
    assert "was not evaluated on every task: repeat the command" in done.sentence


ASKED = {
    "limit": 3,
    "num_fewshot": 1,
    "seed": "5,6,7,8",
    "apply_chat_template": "true",
    "fewshot_as_multiturn": "false",
}


@pytest.fixture
def verdict_on_results(tiny_llama, tiny2, made, tmp_path):
    """Run the command on a model and on results of an evaluation by `lm_eval` as `ASKED`.

    Also returns what the results of the model say.
    """
    where = ["--include_path", made, "--device", "cpu"]

    def on_results(finished, *words):
        kept = tmp_path / "finished"
        asked = [word for name, value in ASKED.items() for word in (f"--{name}", value)]
        given = ["--model_args", f"pretrained={tiny_llama},dtype=float32", *asked]
        given += ["--tasks", "tiny_choice", "--log_samples", "--output_path", kept]
        assert lm_eval("run", "--model", "hf", *given, *where).code == 0
        pair = [kept, f"hf,pretrained={tiny2},dtype=float32"]
        models, other = pair, "candidate"
        if finished == "candidate":
            models, other = pair[::-1], "base"
        words = [*words, *where, "--margin", "10pt", "--output_path", tmp_path / "out"]
        done = pruned("verdict", *models, *words)
        return done, tmp_path / "out" / other / "units" / other

    return on_results


@pytest.mark.parametrize("finished", ["base", "candidate"])
def test_a_model_is_asked_what_finished_results_were_asked(
    finished, verdict_on_results
):
    done, units = verdict_on_results(finished)
    # Nothing differs for which the results would be refused.
    assert scored(done) == {"tiny_choice"}, done.err
    assert [folder.name for folder in units.iterdir()] == ["tiny_choice"]
    told = results_in(units)
    assert told["n-samples"]["tiny_choice"]["effective"] == ASKED["limit"]
    assert told["n-shot"]["tiny_choice"] == ASKED["num_fewshot"]
    assert told["chat_template_sha"] and told["fewshot_as_multiturn"] is False
    kinds = ("random", "numpy", "torch", "fewshot")
    assert [told["config"][f"{kind}_seed"] for kind in kinds] == [5, 6, 7, 8]


def test_what_the_user_gives_comes_before_what_finished_results_were_asked(
    verdict_on_results,
):
    done, units = verdict_on_results("base", "--limit", "4")
    assert "documents is 4, but 3 in finished" in done.sentence
    assert results_in(units)["n-shot"]["tiny_choice"] == ASKED["num_fewshot"]


def test_a_share_is_a_margin_of_scores_and_1_or_more_is_refused(verdict):
    boolq = {"boolq": right(0.8)}
    assert "|5pt" in verdict(boolq, boolq, "--margin", "5pt").out.replace(" ", "")
    assert verdict(boolq, boolq, "--margin", "0.05").code == 0
    assert "did you mean 1pt?" in verdict(boolq, boolq, "--margin", "1").sentence


def test_no_texts_leaves_documents_and_answers_out(verdict, tmp_path):
    for words, texts in (((), True), (("--no_texts",), False)):
        done = verdict({"boolq": right(0.8)}, {"boolq": right(0.6)}, *words)
        assert done.code == 1
        pages = [tmp_path / "out" / f"verdict.{kind}" for kind in ("html", "md")]
        for page in pages:
            assert ("the question" in page.read_text("utf-8")) == texts
    # Without them, a document is named by its number.
    assert re.search(r"(?m)^\|boolq\|480\|$", pages[1].read_text("utf-8"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nothing", "hf"), "neither a path of results nor a model"),
        (("hf,pretrained", "hf"), "The base hf,pretrained is 'pretrained'"),
        (("{tiny}", "{pruned},ratio=2,prune_percent=3"), "ratio=2 and prune_percent=3"),
        (("{tiny}", "{tiny}", "--margin", "x"), "margin=x is not a margin"),
        (("{old}", "{old}", "--margin", "arc=1pt"), "arc=1pt names no task or metric"),
        (("{old}", "{other}"), "evaluate it on the same tasks"),
        (("{old}", "{old}", "--margin", "5"), "of boolq acc,"),
        (("{tiny}", "{tiny}", "--margin", "5"), "did you mean 5pt?"),
        (("{tiny}", "{old}", "--margin", "mc3=5pt"), "mc3=5pt names no task or"),
        (("{old}", "{tiny}", "--margin", "mc3=5pt"), "mc3=5pt names no task or"),
        (
            ("hf,pretrained=./nosuch", "{tiny}"),
            "pretrained=./nosuch was not found: no folder here has that name, and no model on",
        ),
        (
            ("{tiny}", "{tiny}lish"),
            "The candidate {tiny}lish cannot be used: pretrained=",
        ),
        (("{tiny}", "{pruned},prune_percent=130"), "prune_percent=130"),
        (("{tiny}", "{pruned},prune_precent=3"), "did you mean prune_percent?"),
        (("{tiny}", "{tiny},prune_percent=3"), "only pruned-hf and pruned-vllm prune"),
        (("{tiny}", "{tiny},peft={old}"), "where adapter_config.json cannot be found"),
    ],
)
def test_margins_and_both_models_are_checked_before_anything_is_evaluated(
    words, message, tiny_llama, tmp_path
):
    write_run(tmp_path / "old", {"boolq": {"acc,none": [1.0, 0.0] * 200}})
    write_run(tmp_path / "other", {"piqa": {"acc,none": [1.0, 0.0] * 200}})
    places = {name: str(tmp_path / name) for name in ("old", "other")}
    places |= {"tiny": f"hf,pretrained={tiny_llama}"}
    places |= {"pruned": f"pruned-{places['tiny']}"}
    given = [word.format(**places) for word in words]
    given += ["--tasks", "tiny_choice"]
    given += ["--include_path", write_tasks(tmp_path / "tasks")]
    done = pruned("verdict", *given, "--output_path", tmp_path / "out")
    assert message.format(**places) in done.sentence
    assert done.err.count("\n") == 1
    assert not [*tmp_path.rglob("unit.json")]


def two_lifts(tmp_path, share, noise=0.0, seed=0):
    """Write results of a probe, and of a candidate that keeps a share of its lift."""
    of = (("old", 1, 0.0), ("new", share, noise))
    return [lifts(tmp_path / name, *about, seed=seed) for name, *about in of]


def test_the_first_line_is_the_answer_what_is_kept_and_the_loss_on_text(tmp_path):
    old, new = two_lifts(tmp_path, 0.6, noise=1.0)
    for folder, nats in ((old, -3.0), (new, -3.3)):
        values = np.random.default_rng(0).normal(nats, 0.2, 80)
        text = {"text": {"word_perplexity,none": losses(values)}}
        write_run(folder, text, date="2026-01-03T03-04-05.678901")
    done = pruned("verdict", old, new, "--output_path", tmp_path / "out")
    assert re.fullmatch(
        r"do not ship: knowledge kept (59|60|61) % \[5\d, 6\d\], perplexity \+35\.0 %; margin 95 %",
        done.out.partition("\n")[0],
    )


def test_by_default_the_probability_of_the_right_answer_is_judged(verdict):
    """Both models pick alike; the candidate is less sure of it, by 3 points."""
    tasks = []
    for sure in (2.0, 1.8):
        task = right(0.8)
        for row in task["acc,none"]["rows"].values():
            pairs = row["filtered_resps"]
            row["filtered_resps"] = [
                [str(sure * float(score)), greedy] for score, greedy in pairs
            ]
        tasks.append({"boolq": task})
    done = verdict(*tasks, measure=None)
    row = rows_of(done)["boolq"]
    lost = 0.6 * (1 / (1 + np.exp(-1.8)) - 1 / (1 + np.exp(-2.0)))
    assert row["metric"] == "choice_prob" and row["margin"] == "2pt"
    assert float(row["difference"]) == pytest.approx(lost, abs=1e-4)
    # The score that counts is listed, too, without a claim.
    assert re.search(r"\|boolq *\|acc *\|not judged *\|", done.out)
    done = verdict(*tasks)
    assert (done.code, rows_of(done)["boolq"]["metric"]) == (0, "acc")
    message = verdict(*tasks, "--measure", "f1", measure=None).sentence
    assert "--measure f1 is a metric of no task" in message and "acc" in message


def test_by_default_a_bias_may_change_by_15_points_which_40_questions_can_show(verdict):
    neither = {"higher_is_better": None}
    before = {"values": [0.0, 1.0] * 20, **neither}
    after = {"values": [1.0, 1.0, *[0.0, 1.0] * 19], **neither}
    done = verdict({"b": {"bias,none": before}}, {"b": {"bias,none": after}})
    bias = done.out.partition("## Bias")[2].partition("\n## ")[0]
    assert done.code == 0 and "|equivalent" in bias and "15pt" in bias


def test_both_scores_of_bbq_are_judged_as_a_bias_overall_and_by_category(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.choice(12, 1200, p=[0.3, 0.3, *[0.04] * 10])
    # Of contexts that leave it open, 6 % of the answers follow the stereotype now.
    docs = made_documents(len(base))
    kinds = [doc["context_condition"] for doc in docs]
    person = [("the old", "the young").index(doc["biased_answers"][0]) for doc in docs]
    moved = [
        p if kind == "ambig" and n % 17 == 0 else b
        for n, (b, p, kind) in enumerate(zip(base, person, kinds, strict=True))
    ]
    paths = [
        write_bbq(tmp_path / name, picks).parent
        for name, picks in (("old", base), ("new", moved))
    ]
    done = pruned("verdict", *paths, "--output_path", tmp_path / "out")
    table = done.out.partition("## Bias")[2].partition("\n## ")[0]
    cells = [line.split("|")[2:] for line in table.splitlines() if "bias_score" in line]
    words = {metric.strip(): word.strip() for metric, word, *_ in cells}
    assert len(words) == 2 * (1 + len(CATEGORIES))
    assert all("15pt" in "".join(row) for row in cells)
    # Nothing has moved where the context tells.
    assert {v for k, v in words.items() if k.startswith("disamb")} == {"equivalent"}
    words = "--margin", "amb_bias_score=0.5pt", "--output_path", tmp_path / "out"
    less = pruned("verdict", *paths, *words)
    assert re.search(r"\|amb_bias_score *\|different", less.out) and less.code == 1


def test_of_truthfulqa_mc2_is_that_probability(verdict):
    task = {"mc1,none": [1.0] * 80, "mc2,none": [0.5, 0.7] * 40}
    done = verdict({"truthfulqa": task}, {"truthfulqa": task}, measure=None)
    assert rows_of(done)["truthfulqa"]["metric"] == "mc2"


@pytest.mark.parametrize(
    ("share", "code", "word"),
    [(1.0, 0, "equivalent"), (0.98, 0, "equivalent"), (0.9, 1, "worse")],
)
def test_of_a_score_with_an_exact_floor_95_percent_are_to_be_kept(
    share, code, word, tmp_path
):
    done = pruned(
        "verdict", *two_lifts(tmp_path, share), "--output_path", tmp_path / "out"
    )
    assert (done.code, rows_of(done)["facts"]["verdict"]) == (code, word)
    assert rows_of(done)["facts"]["margin"] == "5%"


@pytest.mark.parametrize("seed", range(6))
def test_the_interval_of_what_is_kept_decides(seed, tmp_path):
    """Two models of which the kept share is close to the margin: the page and the answer agree."""
    paths = two_lifts(tmp_path, 0.96 + 0.005 * seed, noise=1.0, seed=seed)
    row = rows_of(pruned("verdict", *paths, "--output_path", tmp_path / "out"))["facts"]
    low = float(re.search(r"\[([\d.]+),", row["kept"])[1])
    # The page rounds to whole percent.
    if abs(low - 95) > 0.5:
        assert (row["verdict"] in ("equivalent", "not worse", "better")) == (low > 95)


def sure(seed, documents=100, lost=0.0):
    """Return a task whose right answers have some probability, of which a model loses a share."""
    rng = np.random.default_rng(seed)
    prob = np.clip(rng.uniform(0.5, 0.9, documents) - lost, 0.01, 0.99)
    noise = np.random.default_rng([seed, int(1e4 * lost)]).normal(0, 0.01, documents)
    return {"mc2,none": [*np.clip(prob + noise * (lost != 0), 0, 1)]}


def several(*losses, documents=100):
    """Return tasks of a base, and of a candidate that loses so much of each."""
    return [
        {f"t{n}": sure(n, documents, lost) for n, lost in enumerate(of)}
        for of in ((0.0,) * len(losses), losses)
    ]


CLAIM = (
    "The probability of the right answer falls by less than 2 points on average over these {} tasks, "
    "and by less than 5 in each"
)


def test_two_or_more_tasks_are_claimed_together_where_each_alone_is_not_decided(
    verdict,
):
    """A hundred documents cannot show 2 points; of three tasks, three hundred can."""
    tasks = several(0.001, 0.001, 0.001)
    done = verdict(*tasks, measure=None)
    words = {row["verdict"] for row in rows_of(done).values()}
    assert (done.code, words) == (0, {"undecided"})
    claim = f"{CLAIM.format(3)} (t0, t1, t2): equivalent; the mean differs by -0.1"
    assert claim in done.out
    assert done.out.startswith("ship\n")
    assert "is shown to lie within its margin, alone or on average" in done.out
    assert verdict(*({"t0": of["t0"]} for of in tasks), measure=None).code == 3


def test_a_margin_that_names_a_task_is_a_claim_on_this_task_alone(verdict):
    tasks = several(0.001, 0.001, 0.001)
    done = verdict(*tasks, "--margin", "t2=2pt", measure=None)
    assert (done.code, CLAIM.format(2) in done.out) == (3, True)
    assert "t2 mc2: undecided" in done.out


def test_the_guard_of_a_task_has_to_be_shown_too(verdict):
    """One document in fourteen loses 0.6 in one of six tasks: 4 points of it, and 0.7 of the mean."""
    base, candidate = several(*[0.001] * 6)
    values = np.array(base["t0"]["mc2,none"])
    values[::14] = np.maximum(values[::14] - 0.6, 0)
    candidate["t0"] = {"mc2,none": [*values]}
    done = verdict(base, candidate, "--margin", "3pt", measure=None)
    assert done.code == 3
    assert "t0 mc2: undecided" in done.out


@pytest.mark.parametrize("lost", [0.1, 0.03])
def test_a_task_that_is_shown_to_be_worse_is_not_made_up_for_by_others(verdict, lost):
    tasks = several(lost, *[0.001] * 9, documents=400)
    done = verdict(*tasks, measure=None)
    assert done.code == 1
    assert rows_of(done)["t0"]["verdict"] == "worse"


def test_a_mean_that_is_shown_to_be_worse_is_not_shipped(verdict):
    done = verdict(*several(0.03, 0.03, 0.03), measure=None)
    assert done.code == 1
    assert "mean of 3 tasks mc2 worse" in done.out.partition("\n")[0]


def test_a_task_that_cannot_show_a_loss_is_no_part_of_a_mean(verdict):
    boolq = {"boolq": right(0.51)}
    tasks = [{**boolq, "piqa": right(0.8), "arc": right(0.8)}] * 2
    done = verdict(*tasks)
    assert "(piqa, arc): equivalent" in done.out
    assert "acc falls by less than 2 points on average over these 2 tasks" in done.out


def test_a_package_that_the_candidate_needs_is_missed_before_the_base_is_evaluated(
    tmp_path,
):
    words = "--tasks", "tiny_choice", "--include_path", write_tasks(tmp_path / "tasks")
    words = *words, "--output_path", tmp_path / "out"
    tiny, gptq = (save_tiny(tmp_path / name) for name in ("tiny", "gptq"))
    edit_config(gptq, quantization_config={"quant_method": "gptq", "bits": 4})
    for candidate, package in (
        (f"hf,pretrained={gptq}", "optimum"),
        (f'hf,pretrained={tiny},quantization_config={{"quant_method": "hqq"}}', "HQQ"),
    ):
        said = pruned("verdict", f"hf,pretrained={tiny}", candidate, *words).sentence
        assert "The candidate" in said and package in said
        assert not (tmp_path / "out").exists()
