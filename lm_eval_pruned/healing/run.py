"""Healing from the arguments to the adapter: load, train with or without a teacher, write."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForCausalLM

from lm_eval_pruned.checkpoints.adapters import adapted_shapes, write_healing
from lm_eval_pruned.checkpoints.cards import adapter_card, model_card
from lm_eval_pruned.checkpoints.checkpoint import Checkpoint
from lm_eval_pruned.checkpoints.configs import quantising_arguments
from lm_eval_pruned.checkpoints.export import (
    check_trainable,
    save_loaded,
    source_folder,
)
from lm_eval_pruned.checkpoints.load import load_checkpoint
from lm_eval_pruned.healing.options import ADAPTERS, WEIGHTS
from lm_eval_pruned.healing.training import Training
from lm_eval_pruned.pruning.arguments import (
    OWN_TEXT,
    PruneArguments,
    take_prune_arguments,
)
from lm_eval_pruned.pruning.layouts import without_weights
from lm_eval_pruned.util.atomic import appearing_whole


if TYPE_CHECKING:
    import os

    from peft import LoraConfig

    from lm_eval_pruned.healing.options import HealingOptions


def resolved(
    model_args: dict[str, Any], options: HealingOptions, adapter: LoraConfig | None
) -> Checkpoint:
    """Return the model with its pruning.

    Raises:
        ValueError: `heal` cannot train it. No weight was read.
    """
    where = "training_args say where to train, such as use_cpu=true"
    quantised = "quantised weights cannot be trained, so quantise the result"
    refused = {"peft": "merge it into a checkpoint first"}
    refused |= {"device": where, "device_map": where}
    refused |= dict.fromkeys(quantising_arguments(model_args), quantised)
    for name, advice in refused.items():
        if model_args.get(name) is not None:
            raise ValueError(
                f"model_args has {name}={model_args[name]}, which heal does not accept: leave it "
                f"out; {advice}."
            )
    loading = dict(model_args)
    pretrained = str(loading.pop("pretrained"))
    pruning = PruneArguments(**take_prune_arguments(loading))
    base = Checkpoint.of(pretrained, pruning, loading, AutoModelForCausalLM)
    check_trainable(base)
    if options.teacher_weight and pruning.size is None:
        raise ValueError(
            f"teacher_weight={options.teacher_weight} takes the unpruned model as teacher, but no "
            "size was given, so that it would teach itself: add one such as prune_percent=40 to "
            "model_args, or pass teacher_weight=0."
        )
    if adapter is not None:
        # peft refuses modules that the model lacks.
        widths = base.cut.widths
        skeleton = without_weights(type(widths.skeleton), widths.config)
        adapted_shapes(skeleton, adapter)
    return base


def heal(
    model_args: dict[str, Any],
    data: str | None,
    output: str | os.PathLike[str],
    options: HealingOptions,
    *,
    resume: bool = False,
    merge: bool = False,
) -> dict[str, Any]:
    """Train a pruned model, to recover some of what pruning cost, and return its record.

    Checkpoints go to ``OUTPUT.checkpoints``; `output` appears when the training is over. Ctrl-C ends
    it after a step: `output` then holds what was best on held text, and `resume` goes on.

    Args:
        model_args: ``pretrained``, arguments of pruning and what else ``from_pretrained`` takes.
        data: Text to train on, which must not contain text of a benchmark; see `training_text`.
            Default: the text of this package.
        output: Folder to write; it must not exist, or be empty.
        resume: Continue from the last checkpoint of the same training.
        merge: Also write the merged model, as a checkpoint in the folder ``merged`` below `output`.

    Raises:
        ValueError: An argument, the text or the checkpoint to resume from is of no use.
        UnsupportedModelError: The model cannot be pruned, or has an encoder.
        OSError: The model cannot be read, or the result not be written.
    """
    if merge and options.method in WEIGHTS:
        raise ValueError(
            f"merge adds an adapter to its model, but method={options.method} trains none: leave it out, the "
            "output is an ordinary checkpoint already."
        )
    sources = [str(OWN_TEXT) if data is None else data]
    training = Training(options, Path(output), sources, "data", resume=resume)
    training.check_output()
    base = resolved(model_args, options, options.adapter_config(options.method))
    training.check_model(base.cut.widths.skeleton, base.config)
    tokenizer = base.load_tokenizer()
    training.read(tokenizer)
    if options.teacher_weight and training.expected is None:
        teacher = base.with_stored_widths().load_whole().eval()
        training.listen(teacher, tokenizer, training.device)
        del teacher
    model: Any = load_checkpoint(base, tokenizer)
    pruned = model.prune_record
    trained = training.train(model)
    record = training.record
    if training.writes:
        with appearing_whole(Path(output)) as unfinished, training.replacing():
            source, folder = source_folder(base), unfinished
            if adapts := record["method"] in ADAPTERS:
                trained.save_pretrained(folder)
                # In place of peft's, an empty template that names a folder of this machine.
                method, how = record["method"], training.sentence()
                card = adapter_card(base, source, pruned, method, how)
                (folder / "README.md").write_text(card, encoding="utf-8")
                folder /= "merged"
            if merge and adapts:
                trained = trained.merge_and_unload()
                folder.mkdir()
            if merge or not adapts:
                save_loaded(trained, base, source, folder)
                if pruned.plan.prunes:
                    how = training.sentence()
                    card = model_card(base, source, pruned, folder, how)
                    (folder / "README.md").write_text(card, encoding="utf-8")
            write_healing(unfinished, record)
    training.wait()
    return record
