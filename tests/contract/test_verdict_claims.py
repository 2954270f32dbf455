"""What docs/verdict.md promises of claims: on few documents, groups, other measures, and in `check`, too."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from tests.contract.commands import compared, pruned
from tests.helpers.results_files import (
    answered,
    losses,
    write_run,
    write_sweep,
    write_two,
    yes_or_no,
)


CODES = {"ship": 0, "do not ship": 1, "not decided": 3}
#: Numbers folders, because an example of a property leaves its files behind.
FOLDERS = itertools.count()


@pytest.fixture
def both(tmp_path):
    """Return the exit codes of `verdict` and `check` on the same files and margins, and what the first says."""

    def both(base, candidate, *words, **about):
        folder = tmp_path / str(next(FOLDERS))
        paths = write_two(folder, base, candidate, **about)
        done = pruned("verdict", *paths, *words, "--output_path", folder / "out")
        file = folder / "baseline.json"
        margin = [word for word in words if word != "--margin"]
        rule = ("--not_worse", *margin)
        made = pruned("check", paths[0], "--baseline", file, "--update", *rule)
        assert made.code == 0, made.err
        checked = pruned("check", paths[1], "--baseline", file)
        return done.code, checked.code, done.out + done.err

    return both


def floors(**scores):
    """Return the configuration of a task that declares exact floors, the first of which counts."""
    about = {"primary_metric": next(iter(scores)), "floors": scores}
    return {"configs": {"t": {"metadata": about}}}


def acc(values):
    return {"t": {"acc,none": [float(v) for v in values]}}


@pytest.mark.parametrize(
    ("base", "candidate"),
    [
        ([1] * 10 + [0] * 10, [1] * 11 + [0] * 9),
        # 5 % of what lies above the floor are 1.25 points, of the score 2.5.
        ([1] * 60 + [0] * 60, [1] * 60 + [0] * 60),
        ([1] * 60 + [0] * 60, [0] + [1] * 60 + [0] * 59),
    ],
)
def test_95_percent_above_a_floor_take_more_documents_than_can_show_it(
    base, candidate, both
):
    code, checked, said = both(acc(base), acc(candidate), **floors(acc=0.25))
    assert (code, checked) == (3, 3), said
    assert "not decided" in said


def test_what_is_kept_has_an_interval_whose_lower_end_holds(both):
    """10 of 20 before and 11 after: the next document could be lost."""
    said = both(acc([1] * 10 + [0] * 10), acc([1] * 11 + [0] * 9), **floors(acc=0.25))[
        2
    ]
    low = re.search(r"kept 120 % \[(-?\d+|\?), ", said)[1]
    assert low == "?" or int(low) <= 60


def boolq(share, documents):
    return {"boolq": yes_or_no(share, documents)}


def test_where_the_base_is_at_its_floor_verdict_and_check_decide_nothing(both):
    tasks = boolq(0.51, 800)
    assert both(tasks, tasks)[:2] == (3, 3)


def sure(seed, documents, lost=0.0):
    rng = np.random.default_rng(seed)
    return {"mc2,none": [*(rng.uniform(0.5, 0.9, documents) - lost)]}


def test_several_tasks_are_one_claim_in_verdict_and_check(both):
    tasks = {f"t{n}": sure(n, 80) for n in range(3)}
    assert both(tasks, tasks)[:2] == (0, 0)
    worse = {**tasks, "t1": sure(1, 80, lost=0.2)}
    assert both(tasks, worse)[:2] == (1, 1)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["acc", "mc2", "lift", "word_perplexity", "bias"]),
            st.sampled_from([20, 80, 200, 400]),
            st.sampled_from([0.0, 0.01, 0.05, 0.2]),
        ),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 99),
    st.sampled_from([(), ("--margin", "3pt"), ("--margin", "10%")]),
)
def test_verdict_and_check_give_one_answer(both, tasks, seed, margin):
    rng, about = np.random.default_rng(seed), {}
    if margin[-1:] == ("3pt",):
        tasks = [task for task in tasks if task[0] in ("acc", "mc2")] or [
            ("acc", 80, 0)
        ]
    before, after = {}, {}
    for number, (metric, documents, lost) in enumerate(tasks):
        name = f"t{number}"
        metrics = {}
        if metric in ("acc", "bias"):
            base = (rng.random(documents) < 0.7).astype(float)
            run = np.where(rng.random(documents) < lost, 0.0, base)
            metrics = {"higher_is_better": None if metric == "bias" else True}
        elif metric == "mc2":
            base = rng.uniform(0.4, 0.9, documents)
            run = base - lost * rng.random(documents)
        elif metric == "lift":
            base = rng.normal(4, 3, documents)
            run = base * (1 - lost) + rng.normal(0, lost, documents)
            about[name] = {"metadata": {"floors": {"lift": 0.0}}}
        else:
            base = rng.normal(-3, 0.2, documents)
            run = base - lost * rng.random(documents)
            metrics = {"aggregation": "perplexity", "higher_is_better": False}
        before[name] = {f"{metric},none": {"values": [*base], **metrics}}
        after[name] = {f"{metric},none": {"values": [*run], **metrics}}
    code, checked, said = both(before, after, *margin, configs=about)
    assert code == checked, said
    assert code in (0, 1, 3)


@settings(
    max_examples=6,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.integers(0, 999), st.sampled_from([0.0, 0.01, 0.03]), st.integers(0, 299))
def test_a_document_made_worse_never_turns_another_answer_into_ship(
    both, seed, lost, which
):
    rng = np.random.default_rng(seed)
    base = rng.uniform(0.4, 0.9, 300)
    run = np.clip(base + rng.normal(-lost, 0.05, 300), 0, 1)
    worse = run.copy()
    worse[which] = max(0.0, worse[which] - 0.3)
    codes = [
        both({"t": {"mc2,none": [*base]}}, {"t": {"mc2,none": [*values]}})[0]
        for values in (run, worse)
    ]
    assert codes[1] != 0 or codes[0] == 0


@pytest.mark.parametrize("times", [1, 2, 4])
def test_documents_that_repeat_count_once(times, tmp_path):
    """60 answers, of which six became wrong and one right, each listed so many times."""
    before = [1.0] * 6 + [0.0] + [1.0] * 53
    after = [0.0] * 6 + [1.0] + [1.0] * 53
    docs = {n: {"question": n % 60} for n in range(60 * times)}
    tasks = (
        {"t": {"acc,none": {"values": times * values, "docs": docs}}}
        for values in (before, after)
    )
    paths = write_two(tmp_path, *tasks)
    (row,) = compared(*paths)["rows"]
    assert row["p"] == pytest.approx(2 * sum((1, 7)) / 2**7, rel=1e-4)


def grouped(values_by_task):
    """Return tasks of a group, and the sections that declare it."""
    tasks = {name: {"acc,none": values} for name, values in values_by_task.items()}
    score = float(np.mean([v for values in values_by_task.values() for v in values]))
    scores = {"g": {"acc,none": score}}
    return tasks, {"groups": {"g": [*tasks]}, "group_scores": scores}


def test_a_group_does_not_hide_a_subject_that_fell(tmp_path):
    rng = np.random.default_rng(0)
    base = {f"s{n}": (rng.random(100) < 0.73).astype(float).tolist() for n in range(20)}
    lost = {**base, "s7": [float(n < 22) for n in range(100)]}
    paths = []
    for name, values in (("old", base), ("new", lost)):
        tasks, group = grouped(values)
        paths.append(write_run(tmp_path / name, tasks, **group).parent)
    words = "--margin", "4pt", "--measure", "acc", "--output_path", tmp_path / "out"
    done = pruned("verdict", *paths, *words)
    assert done.code == 1
    first = done.out.partition("\n")[0]
    assert re.match(
        r"do not ship: g: s7 acc fell by \d\d points \[-\d+\.?\d*, -\d+", first
    )
    assert "|g: s7" in done.out
    # Without that subject the group is shipped, and its members are shown to be, too.
    done = pruned("verdict", paths[0], paths[0], *words)
    assert done.code == 0


def test_members_of_a_group_with_few_documents_keep_it_from_being_decided(tmp_path):
    rng = np.random.default_rng(0)
    base = {f"s{n}": (rng.random(20) < 0.8).astype(float).tolist() for n in range(20)}
    tasks, group = grouped(base)
    path = write_run(tmp_path / "old", tasks, **group).parent
    done = pruned("verdict", path, path, "--output_path", tmp_path / "out")
    assert done.code == 3
    more = r"g: s0 acc: undecided\. It would take about \d+ documents instead of 20"
    assert re.search(more, done.out)


def two_measures(rights, probs):
    """Return a task of two choices by which answers are right and how likely the right one is."""
    expected = [n % 2 for n in range(len(rights))]
    pairs = zip(expected, rights, strict=True)
    task = answered([r if ok else 1 - r for r, ok in pairs], expected)
    for number, row in task["acc,none"]["rows"].items():
        of_right, right = probs[number], expected[number]
        pair = [np.log(1 - of_right), np.log(of_right)]
        row["filtered_resps"] = [[str(pair[n == right]), "False"] for n in (0, 1)]
    return {"boolq": task}


def test_another_measure_that_is_worse_stands_in_the_first_line(tmp_path):
    """Right answers, but hardly less likely ones: accuracy falls by 2.5 points, and by 8."""
    rng = np.random.default_rng(3)
    for lost, code, words in (
        (0.025, 0, "ship, although boolq acc fell by 2.5 points [-3"),
        (0.08, 1, "do not ship: boolq acc fell by 8 points [-"),
    ):
        rights = rng.random(2000) < 0.7
        probs = np.where(rights, 0.6, 0.4) + rng.uniform(-0.05, 0.05, 2000)
        # Of some, which is likelier changes, and the probability hardly does.
        turned = np.flatnonzero(rights)[: int(lost * 2000)]
        probs[turned] = 0.501
        after, right_after = probs.copy(), rights.copy()
        after[turned], right_after[turned] = 0.499, False
        paths = [
            write_run(tmp_path / f"{name}{code}", two_measures(*of)).parent
            for name, of in (("old", (rights, probs)), ("new", (right_after, after)))
        ]
        done = pruned("verdict", *paths, "--output_path", tmp_path / f"out{code}")
        first = done.out.partition("\n")[0]
        assert (done.code, first.startswith(words)) == (code, True), first


def test_a_guess_is_never_a_floor_where_chance_is_known(tmp_path):
    """A base that knows 0.62 of 100 questions with two choices, and a guess that had luck."""
    rng = np.random.default_rng(0)
    rights = rng.permutation([0, 1] * 50)
    order = rng.permutation(100)

    def task(share):
        pairs = zip(rights, order, strict=True)
        picks = [r if place < 100 * share else 1 - r for r, place in pairs]
        return {"boolq": answered(picks, rights)}

    runs = {"base": (0, task(0.62)), "p20": (20, task(0.6))}
    runs["floor-echo-equal"] = "echo", task(0.57)
    (row,) = compared(write_sweep(tmp_path / "sweep", runs))["rows"]
    floor = row["floor"]
    assert (floor["floor_name"], floor["floor"]) == ("chance", 0.5)
    assert floor["base_above_floor"]


def test_what_always_gives_one_answer_is_a_floor_where_it_is_more_than_luck(tmp_path):
    rights = [1] * 70 + [0] * 30
    task = {"boolq": answered([1] * 65 + [0] * 5 + [0] * 25 + [1] * 5, rights)}
    always = {"boolq": answered([1] * 100, rights)}
    runs = {"base": (0, task), "p20": (20, task), "floor-yes": ("constant", always)}
    (row,) = compared(write_sweep(tmp_path / "s", runs))["rows"]
    assert row["floor"]["floor"] == pytest.approx(0.7)


def test_few_documents_are_not_called_a_floor(tmp_path):
    """Eight texts: a claim on scores without limits takes 60, and a floor is tested on 10."""
    rng = np.random.default_rng(0)
    values = rng.normal(-3, 0.2, 8)
    runs = [
        {"text": {"word_perplexity,none": losses(of)}}
        for of in (values, values - rng.normal(0, 1e-4, 8), np.full(8, -5.5))
    ]
    write_sweep(tmp_path / "s", {"base": (0, runs[0]), "floor-echo": ("echo", runs[2])})
    write_run(tmp_path / "new", runs[1])
    done = pruned(
        "verdict", tmp_path / "s", tmp_path / "new", "--output_path", tmp_path / "out"
    )
    assert done.code == 3
    assert "can show a loss, because" not in done.out
    assert (
        "takes 52 more independent documents than the 8 that were evaluated" in done.out
    )
    assert "60 independent documents" in done.out


def test_of_few_documents_the_page_says_how_many_show_the_base_above_its_floor(both):
    tasks = boolq(0.6, 40)
    said = both(tasks, tasks)[2]
    assert re.search(
        r"0\.5462 on few documents, of which it takes about \d+ to show", said
    )


@pytest.mark.parametrize("values", [(0.83, 0.41), (4.66, 4.1)])
def test_whether_a_score_is_a_share_is_known_from_the_metric(values, tmp_path):
    runs = [{"t": {"lift,none": {"values": [value] * 20}}} for value in values]
    paths = [write_run(tmp_path / str(n), tasks).parent for n, tasks in enumerate(runs)]
    done = pruned("compare", *paths, "--not_worse", "2pt")
    assert "2pt is not a margin for t" in done.out


def test_a_task_can_declare_the_limits_of_its_metric(tmp_path):
    about = {"configs": {"t": {"metadata": {"bounds": {"points": [0, 1]}}}}}
    path = write_run(
        tmp_path / "a", {"t": {"points,none": [0.4, 0.6] * 80}}, **about
    ).parent
    done = pruned("verdict", path, path, "--output_path", tmp_path / "out")
    assert (done.code, "2pt" in done.out) == (0, True)
    about["configs"]["t"]["metadata"]["bounds"]["points"] = [0, 0.5]
    path = write_run(
        tmp_path / "b", {"t": {"points,none": [0.4, 0.6] * 80}}, **about
    ).parent
    done = pruned("verdict", path, path, "--output_path", tmp_path / "out")
    assert "has documents of 0.4 to 0.6" in done.sentence


def test_the_order_of_samples_and_tasks_changes_nothing(tmp_path):
    tasks = {f"t{n}": sure(n, 80, lost=0.0) for n in range(3)}
    lost = {name: sure(n, 80, lost=0.01) for n, name in enumerate(tasks)}
    said = []
    for turned in (False, True):
        paths = []
        for name, made in (("old", tasks), ("new", lost)):
            folder = tmp_path / str(turned) / name
            order = dict(reversed(made.items())) if turned else made
            paths.append(write_run(folder, order).parent)
            for file in folder.glob("samples_*.jsonl") if turned else ():
                lines = file.read_text().splitlines(keepends=True)
                file.write_text("".join(reversed(lines)))
        done = pruned("verdict", *paths, "--output_path", tmp_path / str(turned) / "o")
        mean = re.search(r"the mean differs by ([^.]*\.\d[^.]*)", done.out)[1]
        said.append((done.code, mean))
    assert said[0] == said[1]
