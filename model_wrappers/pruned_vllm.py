"""The model type ``pruned-vllm``: the harness's ``vllm`` with narrowed GLU-MLPs.

A sibling of `lm_eval_pruned.model_wrappers.pruned_hf`. vLLM prunes while it loads, with the
loader of `lm_eval_pruned.model_wrappers.vllm_loader`.
"""

from __future__ import annotations

import atexit
import logging
import selectors
import threading
import weakref
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM


try:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.exceptions import EngineDeadError
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "--model pruned-vllm needs vLLM, which is not installed: run "
        "`pip install 'lm-eval-pruned[vllm]'`, or use --model pruned-hf.",
        name="vllm",
    ) from missing

from lm_eval_pruned.checkpoints.adapters import (
    adapted_modules,
    check_adapter,
    check_kept,
)
from lm_eval_pruned.checkpoints.damage import argument_errors
from lm_eval_pruned.checkpoints.default_model import find_default_model
from lm_eval_pruned.checkpoints.engines import (
    check_buildable,
    divide_among,
    record_of,
)
from lm_eval_pruned.checkpoints.request import LoadRequest
from lm_eval_pruned.model_wrappers.hf_arguments import argument_names, check_names
from lm_eval_pruned.model_wrappers.vllm_arguments import (
    LOAD_FORMAT,
    check_vllm_arguments,
    loader_config,
)
from lm_eval_pruned.model_wrappers.vllm_energy import EnergyLoggingVLLM
from lm_eval_pruned.pruning.arguments import PruneArguments, takes_prune_arguments
from lm_eval_pruned.pruning.calibration import Calibration


if TYPE_CHECKING:
    from lm_eval_pruned.pruning.measuring import KnownScores
    from lm_eval_pruned.pruning.record import PruneRecord

eval_logger = logging.getLogger("lm_eval.models.pruned_vllm")

#: Lets the processes of the engine say what they kept.
_EXTENSION = "lm_eval_pruned.model_wrappers.vllm_loader.PruneRecordExtension"
#: How many seconds the exit waits for the thread that takes the answers of an engine.
_PATIENCE = 30


class PrunedVLLM(EnergyLoggingVLLM):
    #: Whether the processes of the engine ended before their time.
    engine_died = False

    @takes_prune_arguments
    def __init__(
        self,
        pretrained: str | None = None,
        *,
        known_scores: KnownScores | None = None,
        **kwargs: Any,
    ) -> None:
        """VLLM whose GLU-MLPs are narrowed while the engine loads the model.

        Args:
            pretrained: As in VLLM. If omitted, SmolLM2-135M-Instruct.
            ratio, ...: The arguments of `lm_eval_pruned.pruning.arguments.PruneArguments`.
            known_scores: Not used: the processes of an engine score for themselves.
            **kwargs: Everything VLLM takes, and the arguments ``energy...`` of
                `EnergyWindows`. ``seed`` is that of the engine as well.

        Raises:
            ValueError: A size, the criterion or the model cannot be pruned as asked.
        """
        seed = kwargs.get("seed")
        with argument_errors():
            prune_arguments = PruneArguments.taken_from(kwargs)
            given = {**kwargs, "pretrained": pretrained}
            check_names(given, self.argument_names())
            check_vllm_arguments(kwargs)
        if seed is not None:
            kwargs["seed"] = seed
        if pretrained is None:
            default = find_default_model()
            kwargs |= default.model_args()
            check_vllm_arguments(kwargs)
            pretrained = kwargs.pop("pretrained")
            eval_logger.warning(
                "pretrained was not given: evaluating SmolLM2-135M-Instruct, from %s.",
                default.source,
            )
        request, prune_arguments = _checked(pretrained, prune_arguments, kwargs)
        self._adapted = adapted_modules(kwargs.get("lora_local_path"))
        if self._adapted:
            # vLLM else prepares the head as well, whose code for CPUs cannot score prompts.
            kwargs.setdefault("lora_target_modules", sorted(self._adapted))
        self._notes: list[str] = []
        loader = dict(kwargs.pop("model_loader_extra_config", None) or {})
        kwargs.setdefault("worker_extension_cls", _EXTENSION)
        super().__init__(
            pretrained,
            **kwargs
            | {
                "load_format": LOAD_FORMAT,
                "model_loader_extra_config": loader | loader_config(prune_arguments),
            },
        )
        if self.data_parallel_size <= 1:
            client = self.model.llm_engine.engine_core
            _wake_when_the_engine_ends(client)
            _end_before_the_interpreter(client)
        self._prune_record = self._record(request)
        adapter = kwargs.get("lora_local_path")
        if adapter is not None and not self._notes:
            check_kept(adapter, self._prune_record, argument="lora_local_path")
        eval_logger.info("Pruning:\n%s", self._prune_record.as_table())

    @classmethod
    def argument_names(cls) -> set[str]:
        """Return the names of all arguments, those of vLLM's engine among them."""
        return argument_names(cls) | {each.name for each in fields(EngineArgs)}

    def _record(self, request: LoadRequest) -> PruneRecord:
        """Return what the engine did, as far as its processes tell."""
        if not request.plan.prunes:
            return record_of(request, request.widths, ())
        if self.data_parallel_size > 1:
            self._notes.append(
                "kept_digest is null: with data_parallel_size > 1 each replica loads in a process "
                "that ends with its requests"
            )
            return record_of(request, request.widths, None)
        if self.model_args["worker_extension_cls"] != _EXTENSION:
            self._notes.append(
                "kept_digest is null: worker_extension_cls is another than the one that tells it"
            )
            return record_of(request, request.widths, None)
        told = self.model.collective_rpc("pruned_record")[0]
        kept = [np.frombuffer(each, "<i8").astype(np.int64) for each in told["kept"]]
        text = told["calibration"]
        return record_of(
            request,
            request.widths.of(told["widths_before"]),
            tuple(torch.from_numpy(each) for each in kept),
            text and Calibration(**text, activity={}),
        )

    def _measured(self, request_type: str, *args: Any) -> list:
        if request_type != "generate_until" and "lm_head" in self._adapted:
            from vllm.platforms import current_platform

            if current_platform.is_cpu():
                raise ValueError(
                    "lora_local_path adapts lm_head, and vLLM has no log-probabilities of prompts "
                    "with that on a CPU: use --model pruned-hf with peft, or tasks that generate."
                )
        return super()._measured(request_type, *args)

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._model_generate(*args, **kwargs)
        except EngineDeadError as error:
            self.engine_died = True
            raise RuntimeError(
                "The engine of vLLM ended while it worked on requests; its own messages above "
                "say why. Too little memory is the usual cause: lower max_num_seqs, "
                "gpu_memory_utilization or max_model_len."
            ) from error

    def close(self) -> None:
        """End the engine; the model answers nothing afterwards."""
        engine = getattr(self, "model", None)
        if engine is not None:
            engine.llm_engine.engine_core.shutdown()
            del self.model

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness records of a model: what was pruned, under ``pruning``."""
        pruning = self._prune_record.as_dict()
        if self._notes:
            pruning["notes"] = self._notes
        info: dict[str, Any] = {
            "model_num_parameters": self._prune_record.parameters_after,
            "model_dtype": str(self.model_args["dtype"]),
            "model_revision": self.model_args["revision"] or "main",
        }
        if self.data_parallel_size <= 1:
            info["model_dtype"] = str(self.model.llm_engine.model_config.dtype)
        return {**info, "pruning": pruning, **self.energy_info()}


def _wake_when_the_engine_ends(client: Any) -> None:
    """Have a call that waits for an engine's answers raise when its process ends.

    vLLM's client notices the end of the process and closes its sockets, but a call that waits for
    outputs by then is never told (``SyncMPClient.get_output`` in vllm/v1/engine/core_client.py).
    """
    manager = getattr(getattr(client, "resources", None), "engine_manager", None)
    processes = getattr(manager, "processes", None)
    outputs = getattr(client, "outputs_queue", None)
    if processes is None or outputs is None:
        return

    def watch() -> None:
        with selectors.DefaultSelector() as ends:
            for each in processes:
                ends.register(each.sentinel, selectors.EVENT_READ)
            ends.select()
        outputs.put(EngineDeadError())

    threading.Thread(target=watch, name="EngineEndWatch", daemon=True).start()


def _end_before_the_interpreter(client: Any) -> None:
    """Have an engine and the thread that takes its answers end before Python is taken down.

    vLLM ends the engine at exit, but does not wait for that thread. When it ends late, it frees
    the tensors of the last log-probabilities while Python is being taken down; torch's destructors
    give the interpreter's lock away and cannot be unwound when it does not come back, so that the
    process aborts after its work is done ("terminate called without an active exception").
    """
    thread = getattr(client, "output_queue_thread", None)
    if thread is None:
        return
    running = weakref.ref(client)

    def end() -> None:
        if (still := running()) is not None:
            still.shutdown()
        thread.join(_PATIENCE)

    atexit.register(end)


def _checked(
    pretrained: str, prune_arguments: PruneArguments, arguments: dict[str, Any]
) -> tuple[LoadRequest, PruneArguments]:
    """Return what the engine is to load, after everything that can be refused without it.

    The arguments come back too: their widths divide among the engine's processes.

    Raises:
        ValueError: An argument is out of range, or the widths do not suit the engine.
        UnsupportedModelError: The model cannot be pruned while an engine loads it.
        OSError: The checkpoint is missing or damaged.
    """

    def resolve(asked: PruneArguments) -> LoadRequest:
        return LoadRequest.resolve(
            AutoModelForCausalLM,
            pretrained,
            asked,
            {
                "revision": arguments.get("revision"),
                "trust_remote_code": arguments.get("trust_remote_code"),
                "cache_dir": arguments.get("download_dir"),
            },
        )

    request = resolve(prune_arguments)
    check_buildable(request)
    if request.plan.prunes:
        request.check_text()
        processes = int(arguments.get("tensor_parallel_size") or 1)
        given = prune_arguments
        prune_arguments = divide_among(
            resolve, given, processes, "tensor_parallel_size"
        )
        if prune_arguments is not given:
            request = resolve(prune_arguments)
    adapter = arguments.get("lora_local_path")
    if adapter is not None:
        check_adapter(adapter, request, "after", argument="lora_local_path")
    return request, prune_arguments
