"""From the arguments of ``from_pretrained`` to a config, from a config to a model, and what is wrong.

The model is one without weights, or one whose MLPs have other widths than the config says.
transformers initialises missing tensors at random, and reports many mistakes far from their cause.
Here they are refused, with one sentence that names the checkpoint.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import inspect
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.pruning.arguments import DECLARED
from lm_eval_pruned.pruning.layouts import (
    BUILDING,
    NEURON_AXIS,
    UnsupportedModelError,
    find_glu_mlps,
    regions_by_parameter,
    resize,
)
from lm_eval_pruned.util.options import nearest


if TYPE_CHECKING:
    from collections.abc import (
        Callable,
        Collection,
        Iterable,
        Iterator,
        Mapping,
        Sequence,
    )

    from transformers import PretrainedConfig, PreTrainedModel

    from lm_eval_pruned.pruning.layouts import GluMlp
    from lm_eval_pruned.pruning.widths import Widths

    #: Name, shape in the checkpoint, and shape in the model, of a parameter that does not fit.
    Mismatch = tuple[str, Sequence[int], Sequence[int]]

#: Arguments of `from_pretrained` that say where to find the files of a model.
HUB = (
    *("cache_dir", "force_download", "local_files_only", "proxies"),
    *("revision", "subfolder", "token"),
)
#: Those that say how to read a checkpoint.
READING = (*HUB, "gguf_file", "trust_remote_code", "use_safetensors", "variant")
#: Those that say where the finished model goes, and in what form.
PLACING = re.compile(
    r"device_map|max_memory|tp_(plan|size)|distributed_config|offload_\w+|quantization_config|dtype"
)
#: Arguments of `transformers.BitsAndBytesConfig`, which lm-evaluation-harness passes on as they are.
_BITSANDBYTES = re.compile(r"load_in_[48]bit|bnb_4bit_\w+|llm_int8_\w+")
#: Errors whose own message says what is wrong, and kinds of them that do not name the file.
_CLEAR = (ValueError, OSError, ImportError, MemoryError, torch.OutOfMemoryError)
_UNCLEAR = (json.JSONDecodeError, UnicodeDecodeError)
#: What ``from_pretrained`` takes without naming it in its signature, and resembles arguments of ours.
_TAKEN_UNNAMED = ("code_revision", "device_map", "max_memory", "offload_buffers")


class NoModelError(FileNotFoundError):
    """No model was found under the given name."""


class ArgumentError(ValueError, SystemExit):
    """An argument of a model type cannot be used.

    If it is not caught, as in the ``lm_eval`` command, Python prints its sentence without a
    traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = message


@contextlib.contextmanager
def argument_errors() -> Iterator[None]:
    """Turn the ValueErrors of checks of arguments, and NoModelErrors, into ArgumentErrors."""
    try:
        yield
    except (ValueError, NoModelError) as error:
        if type(error) not in (ValueError, NoModelError):
            raise
        raise ArgumentError(str(error)) from error


def misspelt(
    given: Iterable[str], known: Collection[str], config: Callable[[], Any]
) -> tuple[str, str] | None:
    """Return the first name that is unknown but resembles a known one, and that one.

    What transformers or the `config` of the model knows may be given as well.
    """
    from transformers import PreTrainedModel

    taken = inspect.signature(PreTrainedModel.from_pretrained).parameters
    for name in given:
        if name in known or name in taken or name in _TAKEN_UNNAMED:
            continue
        near = difflib.get_close_matches(str(name), known, 1, cutoff=0.8)
        if near and not hasattr(config(), str(name)):
            return name, near[0]
    return None


@contextlib.contextmanager
def clear_errors(
    pretrained: str, arguments: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Turn what transformers raises into a ValueError or NoModelError that names the cause.

    `arguments` are those of ``from_pretrained``, None while only the model's config is used.
    """
    try:
        yield
    except Exception as error:
        if Path(pretrained).is_dir():
            if lacks := _missing_file(Path(pretrained), error):
                raise NoModelError(
                    f"pretrained={pretrained} is a folder without {lacks}: pass the folder of a "
                    "complete checkpoint."
                ) from error
        elif sentence := not_found("pretrained", pretrained, error):
            raise NoModelError(sentence) from error
        if isinstance(error, _CLEAR) and not isinstance(error, _UNCLEAR):
            raise
        summary = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if arguments is None:
            raise ValueError(
                f"No model can be built from the config of {pretrained} ({summary}): correct its "
                "config.json, or copy it again."
            ) from error
        unknown = re.search(r"unexpected keyword argument '(.*)'", str(error))
        if unknown and unknown[1] in arguments:
            name = unknown[1]
            advice = nearest(name, DECLARED, "look for a slip in the name.")
            raise ArgumentError(
                f"{name}={arguments[name]} is not understood: neither this package nor the model "
                f"in {pretrained} has an argument of that name; {advice}"
            ) from error
        names = ", ".join(n for n, value in arguments.items() if value is not None)
        raise ValueError(
            f"{pretrained} cannot be loaded ({summary}): its files or the index of its shards are "
            f"damaged, or an argument is wrong ({names or 'none was given'})."
        ) from error


def _missing_file(folder: Path, error: Exception) -> str | None:
    """Return which file of a checkpoint a folder lacks; None for another error."""
    message = str(error)
    if message.startswith("Unrecognized model in"):
        return None if (folder / "config.json").exists() else "config.json"
    if message.startswith("Error no file named"):
        return "weights"
    shard = re.search(
        r"No such file or directory: .*?([^/]+\.(safetensors|bin))", message
    )
    return shard and shard[1]


def not_found(argument: str, name: str, error: Exception) -> str | None:
    """Return the sentence about a `name` for which the Hub has no files; None for another error."""
    from huggingface_hub import errors

    cause = error.__cause__ or error
    if isinstance(cause, errors.GatedRepoError):
        return None
    if isinstance(cause, errors.HFValidationError):
        why = "no model on the Hub can have that name"
    elif isinstance(cause, errors.RepositoryNotFoundError):
        why = "the Hub has no such model, or shows it only after `hf auth login`"
    elif isinstance(cause, errors.LocalEntryNotFoundError):
        why = "the Hub could not be asked for what the cache does not hold"
    else:
        return None
    return f"{argument}={name} was not found: no folder here has that name, and {why}."


def skeleton(
    auto_class: Any, config: PretrainedConfig, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build the model that `config` describes on the meta device, without weights."""
    from transformers.initialization import no_init_weights

    with BUILDING:
        with no_init_weights(), torch.device("meta"):
            model = auto_class.from_config(
                copy.deepcopy(config), trust_remote_code=trust_remote_code
            )
        # Ties are part of the initialisation that was left out.
        model.tie_weights()
    return model


def quantising_arguments(arguments: Mapping[str, Any]) -> list[str]:
    """Return the names of the arguments that quantise the model while it loads."""
    names = ("quantization_config", "load_in_8bit", "load_in_4bit")
    return [name for name in arguments if name in names and arguments[name]]


def auto_class_for(config: PretrainedConfig) -> Any:
    """Choose the Auto class as `lm_eval.models.huggingface.HFLM` does by default."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as ENCODER_DECODERS,
    )

    encodes = config.model_type in ENCODER_DECODERS
    return AutoModelForSeq2SeqLM if encodes else AutoModelForCausalLM


def config_and_rest(
    pretrained: str, from_pretrained: dict[str, Any]
) -> tuple[PretrainedConfig, dict[str, Any]]:
    """Split arguments of ``from_pretrained`` into the config they describe and the rest.

    Mirrors `transformers.models.auto.auto_factory._BaseAutoModelClass.from_pretrained`.
    """
    from transformers import AutoConfig

    trusted = from_pretrained.get("trust_remote_code")
    if not any(trusted is known for known in (None, True, False)):
        # Any text counts as true to transformers, "off" included.
        raise ValueError(
            f"trust_remote_code={trusted!r} is not understood: pass true or false."
        )
    given = _with_quantisation(from_pretrained)
    if (dtype := given.pop("torch_dtype", None)) is not None:
        given["dtype"] = given.get("dtype") or dtype
    check_dtype("dtype", given.get("dtype"))
    # AutoConfig would take the dtype for a setting.
    placing = {name: given.pop(name) for name in list(given) if PLACING.fullmatch(name)}
    kept = {name: given[name] for name in READING if name in given}
    config, unused = AutoConfig.from_pretrained(
        pretrained, return_unused_kwargs=True, **given
    )
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None and given.get("gguf_file") is None:
        method = quantised.get("quant_method", "unknown")
        raise UnsupportedModelError(
            f"The checkpoint is quantised already (quant_method={method}), and quantised neurons "
            "can be neither ranked nor sliced: pass the unquantised checkpoint it was made from."
        )
    return config, {**unused, **kept, **placing}


def check_dtype(name: str, value: Any) -> None:
    """Refuse what is neither a floating-point dtype of torch, nor its name, ``auto`` or None.

    Raises:
        ValueError: It is something else.
    """
    found = getattr(torch, value, value) if isinstance(value, str) else value
    is_floating = isinstance(found, torch.dtype) and found.is_floating_point
    if not (is_floating or found in (None, "auto")):
        raise ValueError(
            f"{name}={value} is not understood: pass a dtype such as bfloat16."
        )


def _with_quantisation(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of ``from_pretrained`` with one object that says how to quantise."""
    others = {k: v for k, v in arguments.items() if not _BITSANDBYTES.fullmatch(k)}
    given = {k: v for k, v in arguments.items() if k not in others}
    config = others.get("quantization_config")
    asked = quantising_arguments(given)
    if asked and config is not None:
        raise ValueError(
            f"{asked[0]} and quantization_config both say how to quantise: pass one."
        )
    if asked:
        from transformers import BitsAndBytesConfig

        others["quantization_config"] = BitsAndBytesConfig(**given)
    elif isinstance(config, dict):
        from transformers.quantizers import AutoQuantizationConfig

        others["quantization_config"] = AutoQuantizationConfig.from_dict(config)
    return others


def class_with_widths(model_class: Any, widths: Mapping[str, int]) -> Any:
    """Derive a class of models whose MLPs have other widths, by name, than their config says."""

    def build(self, config, *args, **kwargs) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        odd = [mlp for mlp in find_glu_mlps(self) if mlp.width != widths[mlp.name]]
        pieces = {}
        for mlp in odd:
            for place in mlp.regions:
                whole = mlp.weight(*place)
                shape = list(whole.shape)
                shape[_neuron_axis(place)] = widths[mlp.name]
                key = (mlp.name, *place)
                pieces[key] = whole.new_empty(shape)
        resize(odd, pieces)

    # transformers asks for the name of the class.
    names = {
        name: getattr(model_class, name) for name in ("__module__", "__qualname__")
    }
    return type(model_class)(
        model_class.__name__, (model_class,), {**names, "__init__": build}
    )


def stored_widths(mismatched: Iterable[Mismatch], widths: Widths) -> dict[str, int]:
    """Return the width of each MLP, by name, in a checkpoint that does not fit `widths`.

    Raises:
        ValueError: The tensors of an MLP do not fit together, or all layers have a width that is
            not the config's.
    """
    shapes = {name: shape for name, shape, _ in mismatched}
    found = {}
    for mlp in widths.mlps:
        names = {place: region.parameter for place, region in mlp.regions.items()}
        odd = {place: name for place, name in names.items() if name in shapes}
        own = {_width(mlp, place, shapes[name]) for place, name in odd.items()}
        if len(odd) < len(names):
            own.add(widths.actual[mlp.name])
        width = own.pop()
        if own or width is None:
            name = next(iter(odd.values()))
            raise ValueError(
                f"{name} has shape {list(shapes[name])} in the checkpoint, which does not fit the "
                "other tensors of its MLP, or the hidden size in config.json: copy the checkpoint "
                "again."
            )
        found[mlp.name] = width
    changed = [name for name, width in found.items() if width != widths.actual[name]]
    if changed and (len({*found.values()}) == 1 or widths.actual != widths.configured):
        name = changed[0]
        raise ValueError(
            f"{name} has {found[name]} neurons in the checkpoint, but its config.json "
            f"says {widths.actual[name]}: correct {widths.keys[name]} there, or copy the "
            "checkpoint again."
        )
    return found


def check_filled(
    model: PreTrainedModel,
    found: Mapping[str, Any],
    widths: Widths,
    ignore_sizes: Any,
) -> None:
    """Refuse a model that its checkpoint filled in part, or that leaves part of it out.

    `found` is transformers' loading info, `ignore_sizes` its ``ignore_mismatched_sizes``.

    Raises:
        ValueError: The checkpoint does not fit its config.
        RuntimeError: Another thread disturbed the load.
    """
    if missing := found["missing_keys"]:
        if missing <= model.all_tied_weights_keys.keys():
            raise RuntimeError(
                f"{min(missing)} was not tied: another thread was in from_pretrained of stock "
                "transformers, which replaces tie_weights of all models meanwhile, and may leave it "
                "replaced. Start Python anew, and load stock models before or after those of "
                "lm_eval_pruned."
            )
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"The checkpoint holds no tensor for {min(missing)}{others}: it is incomplete, or its "
            "config.json describes another model."
        )
    mismatched = sorted(found["mismatched_keys"])
    if mismatched and not ignore_sizes:
        name, stored, own = mismatched[0]
        raise ValueError(
            f"{name} has shape {list(stored)} in the checkpoint, but its config.json says "
            f"{list(own)}."
        )
    state = model.state_dict().keys()
    layers = {re.sub(r"\.\d+\.", ".*.", p) for p in regions_by_parameter(widths.mlps)}
    # Stock classes leave out the layers that predict more tokens at once.
    if getattr(model.config, "num_nextn_predict_layers", None):
        layers.clear()
    for key in sorted(found["unexpected_keys"]):
        is_bias = key.endswith(".bias") and f"{key[:-5]}.weight" in state
        if is_bias or re.sub(r"\.\d+\.", ".*.", key) in layers:
            raise ValueError(
                f"The checkpoint holds {key}, which its config.json does not describe: correct "
                "the number of layers or the key for that bias in config.json, or copy the "
                "checkpoint again."
            )


def _neuron_axis(place: tuple[str, str]) -> int:
    projection, part = place
    return NEURON_AXIS[projection] if part == "weight" else 0


def _width(mlp: GluMlp, place: tuple[str, str], shape: Sequence[int]) -> int | None:
    """Return the neurons in a parameter of `shape`; None where it does not hold `place`."""
    try:
        whole = torch.empty(list(shape), device="meta")
        cut = list(mlp.regions[place].view(whole).shape)
        width = cut.pop(_neuron_axis(place))
    except (IndexError, RuntimeError):
        return None
    return width if width and cut in ([], [mlp.hidden_size]) else None
