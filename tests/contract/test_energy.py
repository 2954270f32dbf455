"""What docs/energy.md promises."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time

import pytest
from lm_eval.api.registry import get_model

from lm_eval_pruned import load_pruned
from tests.contract.commands import lm_eval, pruned, results_in
from tests.helpers.checkpoints import ROOT
from tests.helpers.made_tasks import write_made_tasks
from tests.sweeps.conftest import quick  # noqa: F401


PAGE = (ROOT / "docs" / "energy.md").read_text("utf-8")
TYPES = {
    "tiny_choice": "loglikelihood",
    "tiny_rolling": "loglikelihood_rolling",
    "tiny_generation": "generate_until",
}
#: What `config.energy` has besides the keys of the page: what measured, and where it ran.
ABOUT = {"schema_version", "meter", "hardware", "country", "notes"}
COMPONENTS = {"cpu", "gpu", "ram"}


def keys_of(table):
    """Return the names in the first column of a table of the page, given its first name."""
    rows = re.search(rf"(?m)^\| `{table}`.*\n(?:\|.*\n)*", PAGE)[0].splitlines()
    return {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_made_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def evaluated(tiny_llama, made):
    """Return a function that runs the stock command and returns its results file."""

    def evaluated(
        folder, model_args, *words, tasks=TYPES, plain=True, model="pruned-hf"
    ):
        if plain:
            model_args += ",prefix_sharing=false,slot_refilling=false"
        if model == "pruned-hf":
            model_args += ",ratio=2.0"
        done = lm_eval(
            *("run", "--model", model, "--device", "cpu"),
            *("--model_args", f"pretrained={tiny_llama},{model_args}"),
            *("--tasks", ",".join(tasks), "--include_path", made),
            *("--output_path", folder, "--batch_size", 2, "--log_samples", *words),
        )
        assert done.code == 0, done.err
        return results_in(folder)

    return evaluated


WITH_ALL = "energy=true,energy_idle_seconds=0.2,energy_country=fra"


@pytest.fixture(scope="module")
def results(evaluated, tmp_path_factory):
    """Results of an evaluation with all arguments of the page."""
    return evaluated(tmp_path_factory.mktemp("measured"), WITH_ALL)


@pytest.fixture(scope="module")
def block(results):
    return results["config"]["energy"]


@pytest.fixture(scope="module")
def records(block):
    """Every record of requests."""
    return [*block["request_types"].values(), block["total"]]


def test_the_results_file_has_all_figures_under_config_energy(block, records):
    assert block.keys() == keys_of("status") | ABOUT
    assert all(record.keys() == keys_of("requests") for record in records)
    assert block["country"] == "FRA"
    assert block["machines"] == 1
    # A load from others on this machine may make its idle power the higher one.
    net = block["total"]["net_joules"]["total"]
    assert block["status"] == ("partial" if net < 0 else "ok")
    assert bool(block["notes"]) == (net < 0)
    assert block["sources"].keys() == COMPONENTS
    kinds = {"measured", "modelled", "constant", "none"}
    assert {source["kind"] for source in block["sources"].values()} <= kinds


def test_each_request_type_is_measured(block):
    assert block["request_types"].keys() == {*TYPES.values()}
    for name in ("requests", "prompt_tokens", "seconds"):
        parts = [record[name] for record in block["request_types"].values()]
        assert block["total"][name] == pytest.approx(sum(parts))


def test_tokens_are_counted_without_padding(block):
    """A token of this model is a byte; before each rolling text stands one more."""
    scored, rolling, made = (block["request_types"][kind] for kind in TYPES.values())
    whole = [
        f"Question: What is {n} plus {n}?\nAnswer: {choice}"
        for n in range(6)
        for choice in (2 * n, 2 * n + 3)
    ]
    texts = [len(f"The number {n} comes before {n + 1}. " * 3) for n in range(4)]
    assert scored["requests"] == len(whole)
    assert scored["prompt_tokens"] == sum(map(len, whole))
    # The last token is not sent through the model, and `hf` sends what is then equal once.
    inputs = {text[:-1] for text in whole}
    assert len(inputs) < len(whole)
    assert scored["processed_tokens"] == sum(map(len, inputs))
    assert rolling["prompt_tokens"] == sum(texts) + len(texts)
    assert made["prompt_tokens"] == sum(texts)
    assert 0 < made["generated_tokens"] <= 8 * len(texts)
    found = made["processed_tokens"] - made["prompt_tokens"]
    # Of each answer the last token is not sent through the model.
    assert found == made["generated_tokens"] - len(texts)
    assert scored["generated_tokens"] == rolling["generated_tokens"] == 0


def test_joules_kwh_watts_and_emissions_are_one_energy(records, block):
    sources = block["sources"]
    for record in [*records, block["idle"]]:
        joules = dict(record["joules"])
        total = joules.pop("total")
        assert total == pytest.approx(sum(filter(None, joules.values())), rel=1e-6)
        # What was not measured is null, never 0.
        missing = {name for name, value in joules.items() if value is None}
        assert missing == {name for name in sources if sources[name]["kind"] == "none"}
        assert record["kwh"] == pytest.approx(total / 3.6e6)
        assert record["mean_watts"] == pytest.approx(total / record["seconds"])
        intensity = record["carbon_intensity_g_co2e_per_kwh"]
        emissions = record["kwh"] * intensity / 1000
        assert record["emissions_kg_co2e"] == pytest.approx(emissions)
        assert 10 < intensity < 200


def test_joules_per_token_are_those_of_all_requests_or_of_generating(records, block):
    made = block["request_types"]["generate_until"]
    for record in records:
        total = record["joules"]["total"]
        per_token = total / record["processed_tokens"]
        assert record["joules_per_processed_token"] == pytest.approx(per_token)
        generates = record["generated_tokens"] and record is not block["total"]
        assert (record["joules_per_generated_token"] is not None) == bool(generates)
    per_token = made["joules"]["total"] / made["generated_tokens"]
    assert made["joules_per_generated_token"] == pytest.approx(per_token)


def test_net_is_gross_minus_idle_power_times_the_time(records, block):
    assert block["idle"]["seconds"] >= 0.2
    for record in records:
        for name, gross in record["joules"].items():
            idle, net = (record[f"{kind}_joules"][name] for kind in ("idle", "net"))
            power = block["idle"]["joules"][name]
            if power is None:
                assert idle is net is None
                continue
            share = record["seconds"] / block["idle"]["seconds"]
            assert idle == pytest.approx(power * share)
            assert net == pytest.approx(gross - idle, abs=1e-9 * (gross + idle))


@pytest.fixture(scope="module")
def forced(evaluated, tmp_path_factory):
    """Results of runs beside a codecarbon configuration: of four documents, all six, and again."""
    folder = tmp_path_factory.mktemp("forced")
    config = folder / ".codecarbon.config"
    config.write_text(
        "[codecarbon]\nforce_cpu_power=40\nforce_ram_power=7\npue=2\nsave_to_file=true\n"
        "output_methods=csv\ncountry_iso_code=POL\nlog_level=debug\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = ("--batch_size", "auto", "--max_batch_size", 2)
        words += ("--use_cache", folder / "out" / "cache")
        found = [
            evaluated(
                folder / "out" / name,
                "energy=true,max_length=64",
                *words,
                *more,
                tasks=["tiny_choice"],
            )
            for name, *more in (("a", "--limit", 4), ("b",), ("c",))
        ]
    assert {path.name for path in folder.iterdir()} == {".codecarbon.config", "out"}
    return found


def test_forced_powers_and_pue_apply_and_the_results_name_them(forced):
    block = forced[0]["config"]["energy"]
    assert "7 W, forced by the user" in block["sources"]["ram"]["description"]
    assert block["sources"]["ram"]["kind"] == "constant"
    assert "PUE 2" in block["scope"]
    if block["sources"]["cpu"]["kind"] != "measured":
        assert "40 W" in block["sources"]["cpu"]["description"]


def test_without_a_country_emissions_are_null_whatever_the_configuration(forced):
    block = forced[0]["config"]["energy"]
    assert block["country"] is None
    assert block["total"]["emissions_kg_co2e"] is None
    assert block["total"]["carbon_intensity_g_co2e_per_kwh"] is None
    assert not {"idle_joules", "net_joules"} & block["total"].keys()
    assert block["idle"] is None


def test_set_up_is_in_no_other_figure(forced, evaluated, tmp_path):
    block = forced[0]["config"]["energy"]
    assert block["set_up"].keys() == {"batch_size_search", "warm_up"}
    for window in block["set_up"].values():
        (record,) = window.values()
        assert record["joules"]["total"] > 0
    words = ("energy=true,max_length=64", "--limit", 4)
    known = evaluated(tmp_path, *words, tasks=["tiny_choice"])
    for name in ("requests", "prompt_tokens", "processed_tokens"):
        assert known["config"]["energy"]["total"][name] == block["total"][name]


def test_answers_from_the_cache_never_reach_the_model_and_are_in_no_figure(forced):
    blocks = [results["config"]["energy"] for results in forced]
    assert [block["total"]["requests"] for block in blocks] == [8, 4, 0]
    assert blocks[2]["request_types"] == {}
    assert blocks[2]["total"]["joules"]["total"] is None
    assert forced[2]["results"] == forced[1]["results"]


def test_scores_are_those_of_a_run_that_measures_nothing(results, evaluated, tmp_path):
    plain = evaluated(tmp_path, "energy=false")
    assert "energy" not in plain["config"]
    for task in TYPES:
        for name, value in plain["results"][task].items():
            assert results["results"][task][name] == value


def test_hf_prefix_measures_the_unpruned_model_with_the_same_arguments(
    results, evaluated, tmp_path
):
    found = evaluated(tmp_path, WITH_ALL, model="hf-prefix")["config"]
    ours, theirs = found["energy"], results["config"]["energy"]
    assert "pruning" not in found
    assert ours.keys() == theirs.keys()
    scored, rolling, _ = TYPES.values()
    for kind in (scored, rolling):
        record, pruned_one = (e["request_types"][kind] for e in (ours, theirs))
        for name in ("requests", "prompt_tokens", "processed_tokens"):
            assert record[name] == pruned_one[name]
    assert ours["total"]["joules"]["total"] > 0


def test_slots_1_generates_one_answer_after_the_other(evaluated, tmp_path):
    tasks = ["tiny_generation"]
    found = evaluated(tmp_path, "energy=true,slots=1", tasks=tasks, plain=False)
    assert found["config"]["answer_paths"]["generate_until"]["slots"] == 1


@pytest.mark.parametrize("model", ["pruned-hf", "hf-prefix"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("energy_country=FRA", "energy_country=FRA.*energy=true"),
        ("energy=true,energy_country=France", "energy_country=France"),
        ("energy=true,energy_idle_seconds=long", "energy_idle_seconds=long"),
        ("energy=maybe", "energy=.?maybe"),
    ],
)
def test_arguments_are_checked_before_the_model_loads(text, message, model):
    with pytest.raises(ValueError, match=message):
        get_model(model).create_from_arg_string(f"pretrained=nowhere,{text}")


# --- lm-eval-pruned profile


@pytest.fixture(scope="module")
def profiled(tiny_llama, tmp_path_factory):
    """Return a function that runs ``profile`` on the first two of three prompts."""
    prompts = tmp_path_factory.mktemp("profile") / "prompts.jsonl"
    rows = [{"prompt": "ab"}, {"prompt": "c\nd"}, {"prompt": "unused"}]
    prompts.write_text("\n".join(map(json.dumps, rows)))

    def profiled(*words, output):
        return pruned(
            *("profile", "--model_args", f"pretrained={tiny_llama}"),
            *("--prompts", prompts, "--limit", 2, "--device", "cpu"),
            *("--max_new_tokens", 3, "--repeats", 1, "--output_path", output, *words),
        )

    return profiled


@pytest.fixture(scope="module")
def profile(profiled, tmp_path_factory):
    """The folder of a profile of the unpruned model and of one with three widths."""
    folder = tmp_path_factory.mktemp("profiled")
    widths = folder / "widths.json"
    widths.write_text("[80, null, 20]")
    # A percentage of nothing is the unpruned model, which is measured once.
    words = ("--widths", widths, "--prune_percents", 0)
    done = profiled(*words, output=folder / "out")
    assert done.code == 0, done.err
    assert done.out.strip() == (folder / "out" / "profile.md").read_text().strip()
    return folder / "out"


@pytest.fixture(scope="module")
def measured(profile):
    return json.loads((profile / "profile.json").read_text())


def test_profile_writes_json_with_a_schema_version_and_markdown(profile, measured):
    names = {"profile.json", "profile.md"}
    assert {path.name for path in profile.iterdir()} == names
    assert measured["schema_version"] == 1
    assert "|0:80,1:88,2:20|" in (profile / "profile.md").read_text()


def test_the_unpruned_model_is_always_in_the_table_as_baseline(measured, tiny_llama):
    baseline, narrow = measured["models"]
    assert (baseline["name"], baseline["intermediate_size"]) == ("baseline", 88)
    assert narrow["parameters"] == baseline["parameters"] - 3 * 32 * (8 + 68)
    # Weights and buffers.
    model = load_pruned(str(tiny_llama), widths=narrow["asked"]["widths"])
    assert narrow["model_bytes"] == model.get_memory_footprint()


def test_at_fixed_length_each_model_generates_exactly_so_many_tokens(measured):
    cells = [each for each in measured["cells"] if each["mode"] == "fixed"]
    assert len(cells) == 2
    for cell in cells:
        assert cell["mean_output_tokens"] == 3
        assert (cell["prompts"], cell["prompt_tokens"]) == (2, len("ab") + len("c\nd"))
    natural = [each for each in measured["cells"] if each["mode"] == "natural"]
    assert all(1 <= each["mean_output_tokens"] <= 3 for each in natural)


def test_a_sample_is_one_batch_in_one_repeat(measured):
    for cell in measured["cells"]:
        for name in ("seconds_to_first_token", "seconds_end_to_end"):
            assert cell[name]["n"] == 2
        first, whole = cell["seconds_to_first_token"], cell["seconds_end_to_end"]
        assert 0 < first["mean"] < whole["mean"]
        # One repeat has no interval.
        for delta in cell["deltas"].values():
            assert delta["verdict"] == "one repeat, no interval"
        assert bool(cell["deltas"]) == (cell["model"] != "baseline")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "pass ratios, prune_percents or widths"),
        (("--widths", "none.json"), "widths=none.json"),
        (("--ratios", 9), "ratio=9"),
        (("--ratios", 1, "--multiple_of", 0), "multiple_of=0"),
        (("--ratios", 1, "--max_new_tokens", 1), "max_new_tokens=1"),
        (("--ratios", 1, "--max_new_tokens", 5000), "max_new_tokens=5000"),
        (("--ratios", 1, "--limit", 0), "limit=0"),
    ],
    ids=str,
)
def test_what_cannot_be_profiled_is_refused(
    words, message, profiled, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert message in profiled(*words, output="out").sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ctrl_c_keeps_the_finished_repeats(profiled, tmp_path):
    folder = tmp_path / "out"

    def interrupt_after_a_repeat():
        while not (folder / "profile.json").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    # Where tests run side by side, their processes ignore Ctrl-C.
    ignoring = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt_after_a_repeat, daemon=True).start()
    try:
        # A pass takes a second at least: the signal comes long before the last one.
        done = profiled("--ratios", 1, "--repeats", 50, output=folder)
    finally:
        signal.signal(signal.SIGINT, ignoring)
    assert done.code == 130, done.err
    found = json.loads((folder / "profile.json").read_text())
    (repeats,) = {cell["repeats"] for cell in found["cells"]}
    assert found["interrupted"] and 1 <= repeats < 50
    assert "repeats, each of which loads" in (folder / "profile.md").read_text()
