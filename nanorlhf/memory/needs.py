"""Finds what a recipe puts on a GPU: residents by exact counts, workspaces by tracing, before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from nanorlhf.algorithm import Algorithm, OnPolicy
from nanorlhf.config.names import shipped_model
from nanorlhf.config.training import CriticConfig, OnPolicyConfig, TrainConfig
from nanorlhf.engines.kv_cache import CPU_BLOCK, sequence_bytes
from nanorlhf.engines.vllm import BLOCK, PREFILL, SEQUENCES, room_for
from nanorlhf.learning.packing import GATHERED
from nanorlhf.memory.activation_sizes import Family, skeleton, trace
from nanorlhf.memory.plan import PHASES, Needs, Phase, Resident
from nanorlhf.memory.workspace import Line, Workspace, largest
from nanorlhf.policy import recomputation
from nanorlhf.policy.loading import dtype_of, rank_of, saved_adapter
from nanorlhf.policy.sharding import layers_of
from nanorlhf.system.device import GIB
from nanorlhf.system.distributed import world

LEARNING: frozenset[Phase] = frozenset({"measure", "update"})
UPDATE: frozenset[Phase] = frozenset({"update"})
ALWAYS: frozenset[Phase] = frozenset(PHASES)
GRAPHS = GIB  # vLLM's CUDA graphs and buffers, which do not sleep
AT_HAND = 2  # layers whose inputs are on the card when all are parked: one at work, one on its way
SAMPLED = 5  # (sequences, vocabulary) tensors in float32 that sampling holds


@dataclass(frozen=True, slots=True)
class ModelSize:
    """A model as a recipe trains it."""

    config: TrainConfig
    about: PretrainedConfig
    peft_config: Any
    base: int  # bytes of what does not learn
    layered: int  # of these, in the layers
    trained: int  # and of what does
    weights: int  # number of those without an adapter's
    rank: int  # of the adapter; 0 without one

    @classmethod
    def of(cls, config: TrainConfig, about: PretrainedConfig, peft_config: Any = None) -> ModelSize:
        model = skeleton(config, about, peft_config)
        trained = [p for p in model.parameters() if p.requires_grad]
        base = [p for p in model.parameters() if not p.requires_grad]
        rank = rank_of(model)
        weights = sum(p.numel() for p in (base if rank else trained))
        layered = [p for layer in layers_of(model) for p in layer.parameters() if not p.requires_grad]
        return cls(config, about, peft_config, size(base), size(layered), size(trained), weights, rank)

    @property
    def half(self) -> bool:
        """Whether it computes in bfloat16, as the engine then does."""
        return self.config.dtype != "float32"

    @property
    def layers(self) -> int:
        return self.about.get_text_config().num_hidden_layers

    def workspace(
        self,
        family: Family,
        *,
        grad: bool,
        recompute: bool = False,
        entropy_grad: bool = False,
        layers: int | None = None,
    ) -> Workspace:
        """The workspace of a pass through it (or through its first `layers`)."""
        return trace(
            lambda depth: skeleton(self.config, self.about, self.peft_config, depth),
            layers or self.layers,
            family,
            grad=grad,
            half=self.half,
            recompute=recompute,
            entropy_grad=entropy_grad,
        )


@dataclass(frozen=True, slots=True)
class RewardModelSize:
    """A reward model."""

    bytes: int
    scoring: int  # bytes it works in


def needs_of(
    config: TrainConfig,
    about: PretrainedConfig,
    algorithm: Algorithm,
    *,
    peft_config: Any = None,  # of an adapter that does not come from the options
    judges: Sequence[RewardModelSize] = (),
    engine: str | None = "vllm",
) -> Needs:
    """The memory that a recipe needs on a card; `engine` is the one that generates, if any does."""
    if config.adapter_name_or_path and peft_config is None:
        peft_config = saved_adapter(config.adapter_name_or_path)
    body = ModelSize.of(config, about, peft_config)
    critic = own_critic(config)
    residents = learners(body, critic, algorithm)
    if judged := sum(j.bytes for j in judges):
        residents.append(Resident("reward model", judged, frozenset({"score"}), "reward model", kept=True))
    residents += engine_residents(body, engine) if engine else []
    prompt, answer = config.max_prompt_length, config.max_completion_length
    longest, answers = prompt + answer * algorithm.together, algorithm.answers
    # What answers gather is most if they are short; for so much there is room in every row.
    family = (longest - GATHERED + 1, [1] * (GATHERED - 1)) if answers > 1 and longest > GATHERED else (longest, [0])
    bodies = [body, critic] if critic else [body]

    def widest(**how: Any) -> Workspace:
        return largest([b.workspace(family, **how) for b in bodies], longest)

    backward = {"grad": True, "entropy_grad": algorithm.entropy_grad}
    return Needs(
        tuple(residents),
        longest,
        plain=widest(**backward),
        recomputed=widest(**backward, recompute=True),
        parked=widest(**backward, recompute=True, layers=AT_HAND),
        inputs=Line(0, max(b.layers * b.about.get_text_config().hidden_size * (2 if b.half else 4) for b in bodies)),
        parks_from={"on": 0.0, "off": math.inf, "auto": recomputation.SHARE}[config.activation_offload],
        reading=widest(grad=False),
        scoring=max((j.scoring for j in judges), default=0),
        decoding=decoding(body, requests(config, algorithm)) if engine else 0,
        sequence=cached(body, engine) if engine else 0,
        requests=requests(config, algorithm) if engine else 0,
        layers=body.layers,
        group=(prompt + answers * answer, answers * (prompt + answer)),
        advice=advice(config),
    )


def learners(body: ModelSize, critic: ModelSize | None, algorithm: Algorithm) -> list[Resident]:
    """The policy, its reference and its critic, with what training them takes."""
    config, adapted = body.config, body.rank > 0
    residents, learned = [], [body.trained]
    if adapted:
        whole = body.base - (body.layered if config.shard_base else 0)
        residents += [Resident("policy", whole, LEARNING, "policy", kept=True)]
        if config.shard_base:  # a part of every layer stays, and of two that are at work there is all
            part, work = body.layered // world().size, AT_HAND * body.layered // body.layers
            residents += [Resident("part of layers", part, ALWAYS)]
            residents += [Resident("layers at work", work, LEARNING, passing=True)]
        residents += [Resident("adapter", body.trained, LEARNING, "policy")]
    else:
        residents += [Resident("policy", body.trained, LEARNING, "policy")]
    refreshed = isinstance(config, OnPolicyConfig) and config.ref_refresh_steps > 0
    if "ref_logprobs" in algorithm.needs and not adapted:
        residents += [Resident("reference", body.trained, frozenset({"measure"}), "reference", kept=True)]
    elif "ref_logprobs" in algorithm.needs and (config.adapter_name_or_path or refreshed):
        residents += [Resident("reference", body.trained, frozenset({"measure"}), "policy", kept=True)]
    if isinstance(config, CriticConfig):
        own = critic or body
        head = 4 * (own.about.get_text_config().hidden_size + 1)
        learned.append(own.trained + head)
        if critic:
            residents += [
                Resident("critic", critic.base + critic.trained + head, LEARNING, "critic", kept=critic.rank > 0)
            ]
        else:
            residents += [Resident("critic", body.trained + head, LEARNING, "critic")]
    # One after the other takes its step, so their gradients are never there together.
    residents += [Resident("gradients", max(learned), UPDATE, passing=True)]
    return [*residents, Resident("optimizer", 2 * sum(learned), UPDATE, "optimizer")]


def own_critic(config: TrainConfig) -> ModelSize | None:
    """The critic's own model, if it has one."""
    name = config.critic_model_name_or_path if isinstance(config, CriticConfig) else None
    if name is None:
        return None
    about = AutoConfig.from_pretrained(shipped_model(name), trust_remote_code=config.trust_remote_code)
    return ModelSize.of(dataclasses.replace(config, model_name_or_path=name, adapter_name_or_path=None), about)


def engine_residents(body: ModelSize, engine: str) -> list[Resident]:
    """The engine's weights, room for the adapter it serves, and vLLM's buffers."""
    sync, generate = body.config.weight_sync, frozenset[Phase]({"generate"})
    lora = body.rank > 0 and (sync == "lora" or (sync == "auto" and body.half))
    if engine == "hf":  # a copy of the policy in its own precision
        copied = body.base + body.trained if lora or not body.rank else body.base
        return [Resident("engine", copied, generate, "engine")]
    weights = body.weights * (2 if body.half else 4)
    if lora:
        weights += body.trained // 4 * 2 * room_for(body.rank) // body.rank
    # Weights that vLLM copies out lie in pinned memory, of which torch takes the next power of two for each.
    return [
        Resident("engine", weights, generate, "engine", kept=not lora, waiting=2 * weights if lora else 0),
        Resident("engine's graphs", GRAPHS, frozenset()),
    ]


def decoding(body: ModelSize, sequences: int) -> int:
    """Bytes that the engine works in: a prefill's widest layer, and logits of every sequence."""
    text: Any = body.about.get_text_config()
    wide = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    layer = PREFILL * (3 * wide + 4 * text.hidden_size) * (2 if body.half else 4)
    return max(layer, SAMPLED * sequences * text.vocab_size * 4)


def cached(body: ModelSize, engine: str) -> int:
    """Bytes of cache for one completion of full length."""
    tokens = body.config.max_prompt_length + body.config.max_completion_length
    if engine == "hf":
        return sequence_bytes(body.about, dtype_of(body.config, "cuda"), tokens, BLOCK)
    dtype = torch.bfloat16 if body.half else torch.float32
    return sequence_bytes(body.about, dtype, tokens + BLOCK, BLOCK)  # vLLM keeps one block to itself


def requests(config: TrainConfig, algorithm: Algorithm) -> int:
    """Completions that may decode at once: as many as are asked for, and the engine takes."""
    return min(SEQUENCES, max(answers for _, answers in asked(config, algorithm)))


def cached_tokens(config: TrainConfig, algorithm: Algorithm) -> int:
    """Tokens whose keys and values an engine on a CPU holds at once: a prompt's once for all its answers."""
    prompt, answer = (-(-n // CPU_BLOCK) * CPU_BLOCK for n in (config.max_prompt_length, config.max_completion_length))
    return max(prompts * prompt + answers * (answer + CPU_BLOCK) for prompts, answers in asked(config, algorithm))


def asked(config: TrainConfig, algorithm: Algorithm) -> list[tuple[int, int]]:
    """Prompts and answers that a step, or an evaluation, asks for at once."""
    if not isinstance(algorithm, OnPolicy):
        return [(config.eval_prompts, config.eval_prompts)]
    evaluated = config.eval_prompts if config.dataset_test_split or config.dataset_test_name else 0
    wanted, prompts = algorithm.samples(), algorithm.config.prompts_in_flight
    return [(prompts, prompts * (wanted.each + wanted.greedy)), (evaluated, evaluated)]


def advice(config: TrainConfig) -> tuple[str, ...]:
    """Options that would make this recipe smaller."""
    ways = ["lora all-linear"] if config.full_finetuning else [f"lora_r below {config.lora_r}"]
    ways += ["dtype auto (bfloat16)"] if config.dtype == "float32" else []
    own = isinstance(config, CriticConfig) and config.critic_model_name_or_path and not config.full_finetuning
    return (*ways, *(["no critic_model_name_or_path (an adapter then)"] if own else []))


def size(parameters: Sequence[nn.Parameter]) -> int:
    return sum(p.numel() * p.itemsize for p in parameters)
