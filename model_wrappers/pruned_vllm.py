"""The model type ``pruned-vllm``: the harness's ``vllm`` with narrowed GLU-MLPs."""

from __future__ import annotations

import atexit
import logging
import selectors
import threading
import weakref
from dataclasses import fields
from typing import Any


try:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.core_client import SyncMPClient
    from vllm.v1.engine.exceptions import EngineDeadError
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "--model pruned-vllm needs vLLM, which is not installed: run "
        "`pip install 'lm-eval-pruned[vllm]'`, or use --model pruned-hf.",
        name="vllm",
    ) from missing

from lm_eval.models.vllm_causallms import VLLM

from lm_eval_pruned.checkpoints.adapters import (
    adapted_modules,
    check_adapter,
    check_kept,
)
from lm_eval_pruned.checkpoints.configs import argument_errors
from lm_eval_pruned.checkpoints.default_model import find_default_model
from lm_eval_pruned.model_wrappers.batching.fast_path import AnswerPaths, TokenCounts
from lm_eval_pruned.model_wrappers.energy_windows import WARM_UP_TOKENS, EnergyWindows
from lm_eval_pruned.model_wrappers.hf_prefix import CheckedArguments
from lm_eval_pruned.model_wrappers.vllm_loader import LOAD_FORMAT, engine_checkpoint
from lm_eval_pruned.pruning.arguments import (
    DECLARED,
    PruneArguments,
    take_prune_arguments,
)
from lm_eval_pruned.pruning.record import PruneRecord


eval_logger = logging.getLogger("lm_eval.models.pruned_vllm")

#: Lets the processes of the engine say what they kept.
_EXTENSION = "lm_eval_pruned.model_wrappers.vllm_loader.PruneRecordExtension"


class PrunedVLLM(CheckedArguments, EnergyWindows, VLLM):
    engine_died = False
    more_arguments = (*DECLARED, *(field.name for field in fields(EngineArgs)))

    def __init__(
        self,
        pretrained: str | None = None,
        **kwargs: Any,
    ) -> None:
        """VLLM whose GLU-MLPs are narrowed while the engine loads the model.

        Args:
            pretrained: As in VLLM. If omitted, SmolLM2-135M-Instruct.
            **kwargs: The arguments of `lm_eval_pruned.pruning.arguments.PruneArguments`,
                everything VLLM takes, and the arguments ``energy...`` of `EnergyWindows`.
                ``seed`` is that of the engine as well.

        Raises:
            ValueError: A size, the criterion or the model cannot be pruned as asked.
        """
        self.token_counts = TokenCounts()
        seed = {"seed": kwargs["seed"]} if kwargs.get("seed") is not None else {}
        with argument_errors():
            arguments = PruneArguments(**take_prune_arguments(kwargs))
            self.check_arguments({**kwargs, "pretrained": pretrained})
            for name, ours in (
                ("load_format", LOAD_FORMAT),
                ("worker_extension_cls", _EXTENSION),
            ):
                if kwargs.get(name) not in (None, ours):
                    raise ValueError(
                        f"{name}={kwargs[name]} cannot be combined with pruning while vLLM loads: "
                        "leave it out, or use --model vllm."
                    )
        if pretrained is None:
            pretrained = find_default_model()
        checkpoint = engine_checkpoint(
            pretrained,
            arguments,
            int(kwargs.get("tensor_parallel_size") or 1),
            revision=kwargs.get("revision"),
            trust_remote_code=kwargs.get("trust_remote_code"),
            cache_dir=kwargs.get("download_dir"),
        )
        adapter = kwargs.get("lora_local_path")
        if adapter is not None:
            check_adapter(adapter, checkpoint, "after", argument="lora_local_path")
            # vLLM else prepares the head as well, whose code for CPUs cannot score prompts.
            if adapted := adapted_modules(adapter):
                kwargs.setdefault("lora_target_modules", sorted(adapted))
        loader = dict(kwargs.pop("model_loader_extra_config", None) or {})
        for name, value in vars(arguments).items():
            if value != DECLARED[name].default:
                loader[name] = value
        kwargs |= {
            "load_format": LOAD_FORMAT,
            "worker_extension_cls": _EXTENSION,
            "model_loader_extra_config": loader,
        }
        super().__init__(pretrained, **{**kwargs, **seed})
        # Otherwise, each replica loads in a process that ends with its requests.
        tells = self.data_parallel_size <= 1
        self.answer_paths = AnswerPaths()
        self._plain_because: str | None = "data_parallel_size is above 1"
        #: Tokens of the answer that each prompt ends with, while prompts are scored.
        self._answer_lengths: dict[tuple[int, ...], int] = {}
        if tells:
            engine = self.model.llm_engine
            _end_with(engine.engine_core)
            caches = engine.vllm_config.cache_config.enable_prefix_caching
            self._plain_because = None if caches else "enable_prefix_caching is off"
        if tells and checkpoint.cut.plan.prunes:
            pruned = self.model.collective_rpc("pruned_record")[0]
        else:
            record = PruneRecord(checkpoint.cut.widths, checkpoint.cut.plan)
            pruned = {"record": record.as_dict(), "table": record.as_table()}
        self._pruning: dict[str, Any] = pruned["record"]
        if adapter is not None and tells:
            check_kept(adapter, self._pruning, argument="lora_local_path")
        eval_logger.info("Pruning:\n%s", pruned["table"])

    def _runs_on_gpu(self) -> bool:
        from vllm.platforms import current_platform

        return current_platform.is_cuda_alike()

    def _first_pass(self) -> None:
        self._ask([[self.eot_token_id] * WARM_UP_TOKENS], False)

    def _loglikelihood_tokens(
        self, requests: list[Any], *args: Any, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        most, lengths = self.max_length - 1, self._answer_lengths
        for _, context, answer in requests:
            prompt = tuple((context + answer)[-most:])
            # Two requests may split the same tokens in different places.
            lengths[prompt] = max(lengths.get(prompt, 0), min(len(answer), most))
        before = self.token_counts.processed
        answers = super()._loglikelihood_tokens(requests, *args, **kwargs)
        lengths.clear()
        # As the harness does for windows of a longer text.
        rolling = "_rolling" if requests and requests[0][0] is None else ""
        computed = self.token_counts.processed - before
        self._count_path(f"loglikelihood{rolling}", len(requests), computed)
        return answers

    def _model_generate(
        self,
        requests: list[list[int]],
        generate: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        counts = self.token_counts
        before = counts.processed
        counts.prompt += sum(map(len, requests))
        if generate:
            outputs = self._ask(requests, True, *args, **kwargs)
            for output in outputs:
                generated = len(output.outputs[0].token_ids)
                counts.generated += generated
                # The last token is never fed back.
                counts.processed += max(generated - 1, 0)
            computed = counts.processed - before
            self._count_path("generate_until", len(requests), computed)
            return outputs
        if self._plain_because is not None:
            return self._ask(requests, False)
        return self._scores_of_answers(requests)

    def _scores_of_answers(self, requests: list[list[int]]) -> list[Any]:
        """Return outputs with the log-probabilities of answers, whose contexts may come from the cache.

        vLLM computes no log-probabilities of tokens that it finds in its prefix cache, so prompts
        of whose answer it found a part there are sent again. What it says of such tokens is left
        out (its newer runner) or uninitialised memory (the other one, which CPUs have).
        """
        outputs = self._ask(requests, True, _scoring())
        lengths = [self._answer_lengths[tuple(tokens)] for tokens in requests]
        again = []
        for index, output in enumerate(outputs):
            cached = output.num_cached_tokens or 0
            if cached and len(requests[index]) - lengths[index] <= cached:
                again.append(index)
        if again:
            computed = self._ask([requests[index] for index in again], False)
            for index, output in zip(again, computed, strict=True):
                outputs[index] = output
        for tokens, length, output in zip(requests, lengths, outputs, strict=True):
            known = output.prompt_logprobs
            context = [None] * (len(tokens) - length)
            output.prompt_logprobs = context + known[len(known) - length :]
        return outputs

    def _ask(self, requests: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        """Return what the engine answers, and count the tokens of prompts that it computed."""
        try:
            outputs = super()._model_generate(requests, *args, **kwargs)
        except EngineDeadError as error:
            self.engine_died = True
            raise RuntimeError(
                "The engine of vLLM ended while it worked on requests, usually for lack of memory; "
                "see its messages: lower max_num_seqs, gpu_memory_utilization or max_model_len."
            ) from error
        for tokens, output in zip(requests, outputs, strict=True):
            computed = len(tokens) - (output.num_cached_tokens or 0)
            self.token_counts.processed += computed
        return outputs

    def _count_path(self, request_type: str, requests: int, computed: int) -> None:
        why = self._plain_because
        path = "prefix_cache" if why is None else "plain"
        reasons = [why] * requests if why is not None else []
        self.answer_paths[request_type].add(path, requests, computed, reasons)

    def close(self) -> None:
        """End the engine; the model answers nothing afterwards."""
        engine = getattr(self, "model", None)
        if engine is not None:
            engine.llm_engine.engine_core.shutdown()
            del self.model

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness records of a model, ``pruning`` and ``energy``."""
        dtype = self.model_args["dtype"]
        if self.data_parallel_size <= 1:
            dtype = self.model.llm_engine.model_config.dtype
        return {
            "model_num_parameters": self._pruning["parameters_after"],
            "model_dtype": str(dtype),
            "model_revision": self.model_args["revision"] or "main",
            "pruning": self._pruning,
            "answer_paths": self.answer_paths.take(),
            **self.energy_info(),
        }


def _scoring() -> SamplingParams:
    """Return the harness's parameters for scoring, of which vLLM else says not to read its cache."""
    return SamplingParams(
        temperature=0,
        prompt_logprobs=1,
        max_tokens=1,
        detokenize=False,
        skip_reading_prefix_cache=False,
    )


def _end_with(client: Any) -> None:
    """Have calls end with the engine's processes, and the engine end before Python is taken down.

    vLLM never tells a call that waits for outputs that the processes ended
    (``SyncMPClient.get_output`` in vllm/v1/engine/core_client.py). At exit it does not wait for the
    thread that takes its answers, which aborts Python where it frees tensors by then.
    """
    if not isinstance(client, SyncMPClient):
        return
    running, thread = weakref.ref(client), client.output_queue_thread
    outputs, processes = client.outputs_queue, client.resources.engine_manager.processes

    def tell() -> None:
        with selectors.DefaultSelector() as ends:
            for process in processes:
                ends.register(process.sentinel, selectors.EVENT_READ)
            ends.select()
        outputs.put(EngineDeadError())

    def end() -> None:
        if (still := running()) is not None:
            still.shutdown()
        thread.join(timeout=30)

    threading.Thread(target=tell, name="EngineEndWatch", daemon=True).start()
    atexit.register(end)
