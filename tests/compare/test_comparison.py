from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest

from lm_eval_pruned import cli
from lm_eval_pruned.compare import comparison, comparison_table
from lm_eval_pruned.compare.verdicts import Margin
from lm_eval_pruned.results.files import ResultsError
from lm_eval_pruned.results.groups import series_of
from lm_eval_pruned.results.runs import read_run
from tests.helpers.results_files import pruning, write_run, write_sweep


N = 80


def answers(share: float, n: int = N) -> list[float]:
    """Return n zeros and ones; a higher share keeps the ones of a lower share."""
    order = np.random.default_rng(7).permutation(n)
    return (order < share * n).astype(float).tolist()


def runs(tmp_path, base, *others, **options):
    return [
        read_run(write_run(tmp_path / str(number), tasks, **options), str(number))
        for number, tasks in enumerate([base, *others])
    ]


def rows_of(base, *others, **options):
    rows = comparison.compare(base, others, **options).rows
    return {(row.run, row.task, row.metric): row for row in rows}


def test_verdicts_follow_the_direction_of_the_metric(tmp_path):
    loglikelihoods = np.random.default_rng(0).normal(-3, 0.1, size=N)
    perplexity = {"aggregation": "perplexity", "higher_is_better": False}
    base, run = runs(
        tmp_path,
        {
            "tf": {"acc,none": answers(0.3)},
            "boolq": {"acc,none": answers(0.7)},
            "lambada": {
                "perplexity,none": {"values": list(loglikelihoods), **perplexity}
            },
            "same": {"acc,none": answers(0.5)},
        },
        {
            "tf": {"acc,none": answers(0.6)},
            "boolq": {"acc,none": answers(0.4)},
            "lambada": {
                "perplexity,none": {"values": list(loglikelihoods - 1), **perplexity}
            },
            "same": {"acc,none": answers(0.51)},
        },
    )
    rows = rows_of(base, run)
    verdicts = {task: row.verdict for (_, task, _), row in rows.items()}
    assert verdicts == {
        "tf": "better",
        "boolq": "worse",
        "lambada": "worse",
        "same": "not shown",
    }
    row = rows["1", "tf", "acc,none"]
    assert (row.method, row.documents) == ("McNemar mid-p", N)
    assert row.difference == pytest.approx(0.3)
    assert row.low < row.difference < row.high
    assert row.relative == pytest.approx(1.0)
    assert all(row.q >= row.p for row in rows.values())


def test_documents_are_matched_by_hash_not_by_place(tmp_path):
    base, run = runs(
        tmp_path, *[{"tf": {"acc,none": answers(share)}} for share in (0.4, 0.6)]
    )
    before = rows_of(base, run)
    file = run.samples["tf"]
    lines = file.read_text().splitlines()
    for number, line in enumerate(lines):
        row = json.loads(line)
        row["doc_id"] = N - number
        lines[number] = json.dumps(row)
    file.write_text("\n".join(lines[::-1]) + "\n")
    assert rows_of(base, run) == before


def test_other_documents_are_an_error(tmp_path):
    base, run = runs(
        tmp_path,
        {"tf": {"acc,none": answers(0.4, 20)}},
        {"tf": {"acc,none": answers(0.4, 15)}},
    )
    with pytest.raises(
        ResultsError, match=r"5 of 20 only in 0, 0 of 15 only in 1.*--limit"
    ):
        comparison.compare(base, [run])


def test_another_version_of_a_task_is_an_error(tmp_path):
    tasks = {"tf": {"acc,none": answers(0.4)}}
    base = read_run(write_run(tmp_path / "a", tasks))
    run = read_run(write_run(tmp_path / "b", tasks, versions={"tf": 2.0}))
    with pytest.raises(ResultsError, match=r"version 1\.0 in .* and 2\.0"):
        comparison.compare(base, [run])


def test_without_samples_the_weaker_test_says_so(tmp_path):
    tasks = [
        {"tf": {"acc,none": {"values": answers(share), "stderr": 0.05}}}
        for share in (0.3, 0.4)
    ]
    base, run = runs(tmp_path, *tasks, samples=False)
    result = comparison.compare(base, [run])
    assert "weaker" in result.rows[0].method
    assert any("--log_samples" in note for note in result.notes)
    with_samples = runs(tmp_path / "with", *tasks)
    paired = comparison.compare(with_samples[0], with_samples[1:])
    assert paired.rows[0].p < result.rows[0].p


def test_without_anything_there_is_no_test(tmp_path):
    base, run = runs(tmp_path, *[{"tf": {"acc,none": answers(0.3)}}] * 2, samples=False)
    row = comparison.compare(base, [run]).rows[0]
    assert (row.p, row.q, row.verdict) == (None, None, "not tested")


def test_nan_is_not_comparable_and_does_not_spoil_the_rest(tmp_path):
    broken = [float("nan"), *answers(0.3)[1:]]
    base, run = runs(
        tmp_path,
        {"tf": {"mc2,none": answers(0.3)}, "boolq": {"acc,none": answers(0.3)}},
        {"tf": {"mc2,none": broken}, "boolq": {"acc,none": answers(0.8)}},
    )
    rows = rows_of(base, run)
    assert rows["1", "tf", "mc2,none"].verdict == "not comparable"
    assert "the score of 1 is no finite number" in rows["1", "tf", "mc2,none"].method
    other = rows["1", "boolq", "acc,none"]
    assert other.verdict == "better"
    assert other.q == other.p
    json.loads(comparison_table.as_json(comparison.compare(base, [run])))


def test_tasks_of_one_run_only_are_named(tmp_path):
    base, run = runs(
        tmp_path,
        {"tf": {"acc,none": answers(0.3)}, "ifeval": {"acc,none": answers(0.3)}},
        {"tf": {"acc,none": answers(0.3)}},
    )
    result = comparison.compare(base, [run])
    assert any("1 has no results for ifeval" in note for note in result.notes)
    other = read_run(write_run(tmp_path / "x", {"arc": {"acc,none": [1.0]}}))
    with pytest.raises(ResultsError, match="no task in common"):
        comparison.compare(base, [other])


def test_other_settings_are_named(tmp_path):
    tasks = {"tf": {"acc,none": answers(0.4)}}
    base = read_run(write_run(tmp_path / "a", tasks), "a")
    file = write_run(
        tmp_path / "b", tasks, chat_template_sha="f00", **{"n-shot": {"tf": 5}}
    )
    run = read_run(file, "b")
    (note,) = comparison.compare(base, [run]).notes
    assert "other settings than a (num_fewshot, chat template)" in note
    assert comparison.compare(base, [base]).notes == ()


@pytest.mark.parametrize("alpha", [0, 1, -0.1, float("nan")])
def test_alpha_out_of_range(tmp_path, alpha):
    base, run = runs(tmp_path, *[{"tf": {"acc,none": answers(0.3)}}] * 2)
    with pytest.raises(ValueError, match="alpha="):
        comparison.compare(base, [run], alpha=alpha)


def sweep(tmp_path):
    shares = {0: (0.8, 0.2), 20: (0.6, 0.3), 40: (0.5, 0.6), 60: (0.3, 0.5)}
    return write_sweep(
        tmp_path,
        {
            f"p{percent}": (
                percent,
                {
                    "mmlu": {"acc,none": answers(knows)},
                    "tf": {"acc,none": answers(true)},
                },
            )
            for percent, (knows, true) in shares.items()
        },
    )


@pytest.mark.smoke
def test_a_sweep_is_compared_with_its_baseline(tmp_path):
    base, others = comparison.read_comparands([str(sweep(tmp_path))])
    assert base.name == "p0"
    assert [run.name for run in others] == ["p20", "p40", "p60"]
    result = comparison.compare(base, others)
    assert len(result.rows) == 6
    (pair,) = result.correlations
    assert pair.series == "maw"
    assert pair.tasks == (("mmlu", "acc,none"), ("tf", "acc,none"))
    assert (pair.correlation.n, pair.correlation.pearson < -0.7) == (4, True)
    trends = {trend.task: trend.trend for trend in result.trends}
    assert trends["mmlu"].slope > 0 > trends["tf"].slope
    assert trends["mmlu"].p < 1e-6


def test_no_number_of_a_table_is_drawn(tmp_path, monkeypatch):
    folder = sweep(tmp_path)

    def refuse(*arguments, **options):
        raise AssertionError("a random number was asked for")

    for name in ("default_rng", "RandomState", "Generator"):
        monkeypatch.setattr(np.random, name, refuse)
    base, others = comparison.read_comparands([str(folder)])
    result = comparison.compare(base, others)
    assert all(row.q is not None for row in result.rows)


def test_without_samples_a_sweep_has_slopes_and_no_test_of_them(tmp_path):
    folder = sweep(tmp_path)
    for file in folder.glob("units/p40/*/samples_*.jsonl"):
        file.unlink()
    base, others = comparison.read_comparands([str(folder)])
    result = comparison.compare(base, others)
    for each in result.trends:
        assert (each.trend.n, each.trend.p, each.q) == (4, None, None)
        assert each.trend.slope != 0
        assert "needs logged samples" in each.trend.method
    assert "needs logged samples" in comparison_table.as_table(result)


def test_perplexities_are_correlated_as_logarithms(tmp_path):
    shares = {0: 0.8, 20: 0.6, 40: 0.5, 60: 0.3}
    noise = np.random.default_rng(0).normal(0, 0.1, size=N)
    folder = write_sweep(
        tmp_path,
        {
            f"p{percent}": (
                percent,
                {
                    "mmlu": {"acc,none": answers(share)},
                    # Log perplexity falls linearly with the share of right answers.
                    "wikitext": {
                        "word_perplexity,none": {
                            "values": list(noise + 20 * np.mean(answers(share)) - 25),
                            "aggregation": "perplexity",
                            "higher_is_better": False,
                        }
                    },
                },
            )
            for percent, share in shares.items()
        },
    )
    base, others = comparison.read_comparands([str(folder)])
    result = comparison.compare(base, others)
    (pair,) = result.correlations
    assert pair.correlation.pearson == pytest.approx(-1)
    assert "wikitext log word_perplexity,none" in comparison_table.as_table(result)
    slopes = {each.task: each.trend.slope for each in result.trends}
    assert slopes["wikitext"] == pytest.approx(-20 * slopes["mmlu"])


def family(tmp_path):
    """Compare a run on four tasks, two of which have two metrics."""
    sides = []
    for side in (0, 1):
        perplexity = {"aggregation": "perplexity", "higher_is_better": False}
        values = np.random.default_rng(side).normal(-3, 0.1, size=N)
        sides.append(
            {
                "little": {"acc,none": answers((0.5, 0.4)[side])},
                "certain": {"acc,none": answers((0.9, 0.1)[side])},
                "arc": {"acc,none": answers(0.6), "acc_norm,none": answers(0.5)},
                "wikitext": {
                    f"{unit}_perplexity,none": {"values": list(values), **perplexity}
                    for unit in ("word", "byte")
                },
            }
        )
    base, run = runs(tmp_path, *sides)
    return comparison.compare(base, [run])


@pytest.mark.parametrize("margin", [None, Margin("not_worse", "15pt")])
def test_certain_tasks_and_random_controls_are_no_part_of_the_family(tmp_path, margin):
    shares = {0: 0.5, 10: 0.4, 20: 0.48, 30: 0.47, 40: 0.1, 50: 0.1}

    def rows(name, certain: int, largest: str):
        runs = [
            read_run(
                write_run(
                    tmp_path / name / str(percent),
                    {"asked": {"acc,none": answers(share)}}
                    | {
                        f"held{n}": {"acc,none": answers(0.1 if percent else 0.9)}
                        for n in range(certain)
                    },
                    pruning=pruning(
                        percent, criterion=largest if percent >= 40 else "maw"
                    ),
                ),
                str(percent),
            )
            for percent, share in shares.items()
        ]
        found = rows_of(*runs, margin=margin)
        return {key[0]: row for key, row in found.items() if key[1] == "asked"}

    alone = rows("alone", 0, "maw")
    assert rows("beside", 3, "maw") == alone
    one, other = alone["10"], rows("random", 0, "random")["10"]
    assert one.p == other.p
    # Where the two that lost for certain were cut at random, only three are asked about.
    assert one.q == pytest.approx(5 / 3 * one.p)
    assert other.q == pytest.approx(3 * other.p)
    if margin is not None:
        assert one.claim.q == pytest.approx(5 / 3 * other.claim.q)


def test_intervals_agree_with_verdicts_after_the_correction(tmp_path):
    soft = np.random.default_rng(5).random(N)
    noise = np.random.default_rng(6).normal(0, 0.1, size=(6, N))
    shares = (0.5, 0.42, 0.48, 0.49, 0.5, 0.5)
    tasks = [
        {
            "tf": {"acc,none": answers(share)},
            "mc": {"mc2,none": (soft + share / 4 + noise[number]).tolist()},
        }
        for number, share in enumerate(shares)
    ]
    base, *others = runs(tmp_path, *tasks)
    result = comparison.compare(base, others)
    apart = {row.task for row in result.rows if row.p < 0.05 <= row.q}
    assert apart == {"tf", "mc"}
    for row in result.rows:
        assert (row.low > 0 or row.high < 0) == (row.q < 0.05), row
        assert row.low <= row.difference <= row.high
    assert "so that it leaves out 0 exactly where a difference is shown" in (
        comparison_table.as_table(result)
    )


def test_one_metric_stands_for_a_task_in_the_correction(tmp_path):
    result = family(tmp_path)
    rows = {(row.task, row.metric): row for row in result.rows}
    restated = {key for key, row in rows.items() if not row.primary}
    assert restated == {("arc", "acc,none"), ("wikitext", "byte_perplexity,none")}
    for key in restated:
        assert rows[key].p is not None
        assert rows[key].low is None or rows[key].low < rows[key].high
        assert (rows[key].q, rows[key].verdict) == (None, "restated")
        assert rows[key].smallest_detectable is None
    table = comparison_table.as_table(result)
    assert "over the runs of each task, random controls apart" in table
    assert table.count("|restated|") == 2


def test_subtasks_have_a_primary_metric_each(tmp_path):
    tasks = {
        f"mmlu_{n}": {"acc,none": answers(0.5, 20), "acc_norm,none": answers(0.5, 20)}
        for n in range(3)
    }
    groups = {"mmlu": list(tasks)}
    scores = {"mmlu": {"acc,none": 0.5, "acc_norm,none": 0.5}}
    base, run = runs(tmp_path, tasks, tasks, groups=groups, group_scores=scores)
    result = comparison.compare(base, [run], subtasks=True)
    assert sum(row.primary for row in result.rows) == 4
    assert all(row.metric == "acc_norm,none" for row in result.rows if row.primary)


def test_the_smallest_detectable_is_that_of_the_corrected_level(tmp_path):
    def smallest(*others):
        shares = (0.5, 0.4, *others)
        tasks = [{"tf": {"acc,none": answers(share)}} for share in shares]
        rows = rows_of(*runs(tmp_path / str(others), *tasks))
        return rows["1", "tf", "acc,none"].smallest_detectable

    # Among runs without a difference it has a part of alpha; among certain ones nearly all.
    assert smallest(0.5, 0.5) > smallest(0.1, 0.1) == smallest()


@pytest.mark.parametrize(
    ("task", "field"),
    [
        ("hellaswag", "source_id"),
        ("drop", "passage"),
        ("squadv2", "context"),
        ("squad_completion", "context"),
        ("boolq", "passage"),
    ],
)
def test_documents_about_one_text_are_one_unit(tmp_path, task, field):
    docs = {number: {"n": number, field: f"text {number // 4}"} for number in range(N)}
    base, run = runs(
        tmp_path,
        *[
            {task: {"acc,none": {"values": answers(share), "docs": docs}}}
            for share in (0.4, 0.6)
        ],
    )
    row = comparison.compare(base, [run]).rows[0]
    assert row.method == "paired t test over clusters"
    assert row.documents == N


@pytest.mark.parametrize("weighted", [True, False])
def test_subjects_of_mmlu_are_no_clusters(tmp_path, weighted):
    sizes = range(6, 18)

    def subjects(share):
        return {f"mmlu_{n}": {"acc,none": answers(share, n)} for n in sizes}

    def average(share):
        values = [tasks["acc,none"] for tasks in subjects(share).values()]
        return np.mean(np.concatenate(values) if weighted else [*map(np.mean, values)])

    base, run = (
        read_run(
            write_run(
                tmp_path / str(share),
                subjects(share),
                groups={"mmlu": list(subjects(share))},
                group_scores={"mmlu": {"acc,none": float(average(share))}},
            ),
            str(share),
        )
        for share in (0.4, 0.6)
    )
    (row,) = comparison.compare(base, [run]).rows
    assert row.method == (
        "McNemar mid-p" if weighted else "paired t test over documents"
    )
    assert row.verdict == "better"


def test_criteria_are_series_of_their_own(tmp_path):
    members = [
        read_run(
            write_run(
                tmp_path / f"{criterion}{percent}",
                {"tf": {"acc,none": answers(0.5)}},
                pruning=pruning(percent, criterion=criterion, seed=seed),
            )
        )
        for criterion, seed, percent in [
            ("maw", None, 0),
            ("maw", None, 20),
            ("random", 1, 20),
            ("random", 2, 20),
            ("maw", None, 40),
        ]
    ]
    series = series_of(members)
    assert {name: len(runs) for name, runs in series.items()} == {
        "maw": 3,
        "random, seed 1": 2,
        "random, seed 2": 2,
    }


def test_what_cuts_layers_otherwise_is_a_series_of_its_own(tmp_path):
    members = []
    for name, percent, own in (
        ("a", 0, {}),
        ("b", 20, {}),
        ("c", 20, {"layer_widths": {"0": 9}}),
        ("d", 20, {"layer_widths": {"0": 9}, "allocation": "sensitivity"}),
        ("e", 30, {"layer_widths": {"0": 8}, "allocation": "sensitivity"}),
        ("f", 20, {"layers_pruned": "1-29"}),
    ):
        tasks = {"tf": {"acc,none": answers(0.5)}}
        described = pruning(percent) | own
        members.append(read_run(write_run(tmp_path / name, tasks, pruning=described)))
    series = series_of(members)
    assert {name: len(runs) for name, runs in series.items()} == {
        "maw": 2,
        "maw, widths by layer": 2,
        "maw, allocation sensitivity": 3,
        "maw, layers 1-29": 2,
    }


def test_a_sweep_without_baseline_is_refused(tmp_path):
    write_sweep(tmp_path, {"p20": (20, {"tf": {"acc,none": [1.0]}})})
    with pytest.raises(ResultsError, match="no finished run of the unpruned model"):
        comparison.read_comparands([str(tmp_path)])


def test_one_run_alone_cannot_be_compared(tmp_path):
    write_run(tmp_path, {"tf": {"acc,none": [1.0]}})
    with pytest.raises(ResultsError, match="nothing to compare"):
        comparison.read_comparands([str(tmp_path)])


def test_the_command_in_a_terminal(tmp_path, capsys, monkeypatch):
    folders = [
        str(
            write_run(
                tmp_path / str(share),
                {"tf": {"acc,none": answers(share), "acc_norm,none": answers(share)}},
            )
        )
        for share in (0.5, 0.3, 0.49)
    ]

    def shown(*options):
        assert cli.main(["compare", *folders, *options]) == 0
        return capsys.readouterr().out

    markdown = shown()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert shown("--format", "markdown") == markdown
    first, *table = shown().splitlines()
    assert "--all shows all columns" in first
    rows = [line for line in table if line]
    assert len({len(line) for line in rows}) == 1
    assert len(rows) == 4
    for column in ("score", "difference", "95% interval", "verdict"):
        assert column in rows[0]
    assert "smallest detectable" not in rows[0]
    # The same as elsewhere, in columns of one width.
    assert re.sub("[ -]", "", shown("--all")) == re.sub("[ -]", "", markdown)
    assert markdown.count("|restated|") == 2


@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_the_command(tmp_path, capsys, form):
    folder = sweep(tmp_path)
    assert cli.main(["compare", str(folder), "--format", form]) == 0
    text = capsys.readouterr().out
    assert "p60" in text and "McNemar mid-p" in text
    if form == "json":
        assert len(json.loads(text)["rows"]) == 6


def test_the_command_on_unusable_input(tmp_path, capsys):
    assert cli.main(["compare", str(tmp_path), str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("lm-eval-pruned compare: error: ")
    assert message.count("\n") == 1


def margin(text: str, claim: str = "equivalent") -> Margin:
    return Margin(claim, text)


def nearly(share: float, changed: int, n: int) -> list[float]:
    """The answers of `answers`, of which some changed: as many for the better as the worse."""
    values = np.array(answers(share, n))
    for old in (0.0, 1.0):
        values[np.flatnonzero(values == old)[: changed // 2]] = 1 - old
    return values.tolist()


def test_the_same_and_better_and_worse_and_not_known(tmp_path):
    n = 1200
    base, run = runs(
        tmp_path,
        {task: {"acc,none": answers(0.5, n)} for task in ("up", "down", "same", "few")},
        {
            "up": {"acc,none": answers(0.7, n)},
            "down": {"acc,none": answers(0.3, n)},
            "same": {"acc,none": nearly(0.5, 20, n)},
            "few": {"acc,none": nearly(0.5, 600, n)},
        },
    )
    rows = rows_of(base, run, margin=margin("2pt"))
    assert {task: row.verdict for (_, task, _), row in rows.items()} == {
        "up": "better",
        "down": "worse",
        "same": "equivalent",
        "few": "undecided",
    }
    for row in rows.values():
        assert row.claim.margin == 0.02
        assert (row.claim.q < 0.05) == (row.verdict == "equivalent")
    rows = rows_of(base, run, margin=margin("2pt", "not_worse"))
    assert {task: row.verdict for (_, task, _), row in rows.items()} == {
        "up": "better",
        "down": "worse",
        "same": "not worse",
        "few": "undecided",
    }
    # Without a margin nothing of this is said.
    assert {row.claim for row in rows_of(base, run).values()} == {None}


def test_a_difference_that_is_certain_may_be_within_the_margin(tmp_path):
    n = 2000
    before = np.zeros(n)
    after = before.copy()
    after[:12] = 1
    base, run = runs(
        tmp_path,
        {"t": {"acc,none": before.tolist()}},
        {"t": {"acc,none": after.tolist()}},
    )
    (row,) = rows_of(base, run, margin=margin("2pt")).values()
    assert row.q < 0.05
    assert row.verdict == "equivalent"


def test_not_worse_follows_the_direction_of_the_metric(tmp_path):
    loglikelihoods = np.random.default_rng(0).normal(-3, 0.1, size=N)
    metric = {"aggregation": "perplexity", "higher_is_better": False}

    def of(shift):
        noise = np.random.default_rng(1).normal(0, 0.01, size=N)
        values = list(loglikelihoods + shift + (noise if shift else 0))
        return {"wiki": {"word_perplexity,none": {"values": values, **metric}}}

    base, lower, higher = runs(tmp_path, of(0), of(0.2), of(-0.2))
    rows = rows_of(base, lower, higher, margin=margin("5%", "not_worse"))
    assert [row.verdict for row in rows.values()] == ["better", "worse"]
    assert next(iter(rows.values())).claim.margin == pytest.approx(
        0.05 * rows["1", "wiki", "word_perplexity,none"].base_score
    )


def test_percentage_points_of_a_perplexity_are_no_margin(tmp_path):
    metric = {"aggregation": "perplexity", "higher_is_better": False}
    tasks = {"wiki": {"perplexity,none": {"values": [-3.0] * 20, **metric}}}
    base, run = runs(tmp_path, tasks, tasks)
    result = comparison.compare(base, [run], margin=margin("1pt"))
    assert [row.verdict for row in result.rows] == ["undecided"]
    assert any("1pt is no margin for wiki" in note for note in result.notes)


@pytest.mark.parametrize(
    "text", ["", "pt", "-1pt", "0", "0pt", "1 point", "nan", "inf%"]
)
def test_what_is_no_margin(text):
    with pytest.raises(ValueError, match="is no margin: give percentage points"):
        margin(text)


def test_the_command_with_a_margin(tmp_path, capsys):
    tasks = {"t": {"acc,none": answers(0.5, 400)}}
    paths = [str(write_run(tmp_path / name, tasks)) for name in "ab"]
    assert cli.main(["compare", *paths, "--equivalent", "3pt"]) == 0
    shown = capsys.readouterr().out
    assert "Margin: 3pt" in shown
    assert "|equivalent|" in shown
    assert cli.main(["compare", *paths, "--not_worse", "3pt", "--format", "csv"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.endswith("verdict,margin,p_margin,q_margin")
    assert ",not worse,0.03," in row
    assert cli.main(["compare", *paths, "--not_worse", "3pt", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["margin"]["text"] == "3pt"
    two = ["--not_worse", "3pt", "--equivalent", "1pt"]
    with pytest.raises(SystemExit):
        cli.main(["compare", *paths, *two])
    assert "not allowed with argument" in capsys.readouterr().err
