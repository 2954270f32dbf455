"""Model arguments as people mistype them: a clear error, or a model."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given, strategies as st
from lm_eval.__main__ import cli_evaluate
from lm_eval.utils import simple_parse_args_string

from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM


def words(text):
    return st.sampled_from(text.split())


numbers = st.one_of(
    words("nan inf -inf 1e308 1e999 -1 0 -0 1e-400 1/2 1/0 1e3 0x10 1_000 --3 ٣ ²"),
    st.sampled_from(["9" * 400, "9" * 5000]),
    st.integers(-3, 100).map(str),
    st.floats(-10, 110).map(str),
)
plain = st.characters(
    exclude_characters=",", exclude_categories=["Cs", "Cc", "Zl", "Zp"]
)
texts = st.one_of(
    words("true False None [1] {} '1' a=b \0"),
    st.sampled_from(["", " "]),
    st.text(plain, max_size=9),
)
layers = words("0 1-2 2-1 0+2 7 0-99999 0-999999999 [0 1- -1 +")
values = st.one_of(numbers, texts)
SIZES = ("ratio", "prune_percent", "intermediate_size", "multiple_of")
OWN = {
    **dict.fromkeys((*SIZES, "seed", "calibration_samples"), numbers),
    **dict.fromkeys(("layers", "skip_layers"), layers),
    **dict.fromkeys(("quantization_config", "prefix_sharing"), values),
    "energy_idle_seconds": numbers,
    "energy_country": values,
    "criterion": words("maw ppm l2 random act none MAW"),
    "calibration": texts.filter(lambda text: "/" not in text),
    "peft_stage": words("after before during"),
}
names = st.one_of(st.sampled_from(sorted(OWN)), words("prune_precent 0"))


@st.composite
def argument_strings(draw):
    """Draw what a person might type after ``--model_args``."""
    chosen = draw(st.lists(names, min_size=1, max_size=4))
    return ",".join(
        f"{name}={draw(st.one_of(OWN.get(name, values), values))}" for name in chosen
    )


@given(argument_strings())
@example("0=")
@example("=5")
@example("quantization_config=abc")
@example("ratio=1,seed=99999999999999999999,criterion=random")
@example("ratio=1e-400")
@example("layers=0-999999,ratio=1")
@example("ratio=1,prune_percent=nan")
@example("ratio=1,criterion=0.5")
@example("ratio=1,layers=0,skip_layers=0")
@example("ratio=1,criterion=act,calibration=\0")
@example("peft_stage=before,ratio=1")
def test_an_argument_is_taken_or_named(tiny_llama, text):
    arguments = simple_parse_args_string(text)
    try:
        PrunedHFLM(str(tiny_llama), device="cpu", **arguments)
    except (ValueError, OSError) as error:
        # One sentence that names an argument.
        message = str(error)
        assert "\n" not in message
        assert any(re.search(rf"{re.escape(n)}[= ]", message) for n in arguments), (
            message
        )


#: What hf and transformers leave unclear: arguments, and what the sentence says of each.
UNCLEAR = {
    "is not understood": "peft=0 peft=2.5 peft=false delta=2.5 dtype=tensor"
    " softmax_dtype=half_precision batch_size=nan batch_size=-1"
    " batch_size=true batch_size=automatic max_batch_size=0 max_length=2.5 max_length=-1"
    " load_in_8bit=2 attn_implementation=1 tokenizer=1"
    " pretrained=1 subfolder=1 energy=nan prefix_sharing=sometimes"
    " slot_refilling=2 slots=0 slots=-1 slots=1.5 slots=many slots=true",
    "is not an adapter": "peft=nowhere/",
    "No model can be built from the config": "hidden_size=0 hidden_size=-8 hidden_size=abc",
    "layers.2.mlp.*config.json does not describe": "num_hidden_layers=2",
    r"did you mean prune_percent\?": "prune_precent=40",
    r"did you mean prefix_sharing\?": "prefix_share=0",
    "neither this package": "frobnicate=3",
}


@pytest.mark.parametrize(
    ("text", "message"), [(t, m) for m, found in UNCLEAR.items() for t in found.split()]
)
def test_what_hf_and_transformers_leave_unclear_is_one_sentence(
    tiny_llama, text, message
):
    arguments = {"pretrained": str(tiny_llama), "device": "cpu", "ratio": 0.5}
    arguments |= simple_parse_args_string(text)
    with pytest.raises(ValueError, match=message) as error:
        PrunedHFLM(**arguments)
    assert "\n" not in str(error.value)


def test_layers_that_a_model_lacks_end_the_command_with_one_sentence(tiny_llama):
    with pytest.raises(SystemExit) as ended:
        PrunedHFLM(str(tiny_llama), device="cpu", ratio=1, layers=9)
    assert str(ended.value.code).startswith("layers=9 names layer 9, but")


@pytest.mark.slow
@pytest.mark.parametrize("text", ["prune_precent=3", "frobnicate=3", "ratio=two"])
def test_the_command_ends_with_the_sentence(tiny_llama, text, monkeypatch):
    """Python prints the code of a SystemExit, and no traceback."""
    command = ["lm_eval", "run", "--model", "pruned-hf", "--tasks", "pruned_demo"]
    given = ["--model_args", f"pretrained={tiny_llama},{text}", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", [*command, *given])
    with pytest.raises(SystemExit) as ended:
        cli_evaluate()
    assert str(ended.value.code).startswith(f"{text} is not ")
    assert isinstance(ended.value, ValueError)
