"""The parts of a run, put together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from nanorlhf.algorithm import Algorithm, OnPolicy
from nanorlhf.config.task import TaskConfig
from nanorlhf.config.training import CriticConfig, OnPolicyConfig, PolicyGradientConfig, TrainConfig
from nanorlhf.data.prompts import AnswerPicker, Prompts
from nanorlhf.data.streaming import prompts_of
from nanorlhf.data.templates import read_tokenizer
from nanorlhf.engines.base import Engine, Sampling
from nanorlhf.engines.launch import build_engine, engine_name
from nanorlhf.engines.restart import Restarting
from nanorlhf.environments.episodes import Episodes
from nanorlhf.environments.protocol import Environment
from nanorlhf.errors import UsageError
from nanorlhf.learning.critic import Critic
from nanorlhf.memory.plan import Plan
from nanorlhf.memory.planning import plan_run
from nanorlhf.memory.residency import CPU, Offloadable, Residency
from nanorlhf.policy.policy import Policy
from nanorlhf.preflight import Preflight, reward_models
from nanorlhf.rollouts.demonstrations import Demonstrations
from nanorlhf.rollouts.on_policy import OnPolicySource
from nanorlhf.rollouts.partial import PartialRollouts
from nanorlhf.rollouts.sampler import Sampler
from nanorlhf.rollouts.saved import SavedRollouts
from nanorlhf.rollouts.source import Source
from nanorlhf.scoring.reward import Reward
from nanorlhf.scoring.scorer import Scorer
from nanorlhf.system.device import pick_device
from nanorlhf.system.terminal import log
from nanorlhf.types import Prompt


def plan_memory(entry: Preflight, peft_config: Any) -> Plan | None:
    """The plan of who is on the card, when; None without a GPU."""
    config = entry.config
    if pick_device(config.device).type != "cuda":
        if config.device == "auto" and torch.version.cuda:
            log.warning(
                "torch is built for CUDA and sees no card, so this runs on the CPU; is the driver too old for it?"
            )
        return None
    engine = engine_name(config) if entry.generates else None
    judges = reward_models(entry.rewards, config)
    return plan_run(config, entry.about, entry.algorithm(config), judges, engine, peft_config)


def load_tokenizer(config: TrainConfig, model: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to the model."""
    name = config.model_name_or_path if model is None else model.config.name_or_path
    return read_tokenizer(name, "model_name_or_path", config.trust_remote_code)


def check_critic(config: CriticConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a critic that cannot be found, or that would read the policy's tokens as other words."""
    name = config.critic_model_name_or_path
    if name is None:
        return
    own = read_tokenizer(name, "critic_model_name_or_path", config.trust_remote_code)
    if own.get_vocab() != tokenizer.get_vocab():
        raise UsageError(
            f"critic_model_name_or_path={name!r} has another vocabulary than the policy, so it would misread "
            "completions; take a model of the same family"
        )


def read_prompts(
    entry: Preflight, tokenizer: PreTrainedTokenizerBase, reader: AnswerPicker | None
) -> tuple[Prompts, list[Prompt]]:
    """The prompts to train on, and those held out."""
    prompts = prompts_of(entry.train, tokenizer, entry.config, reader)
    if entry.held_out is None:
        return prompts, []
    unseen = prompts_of(entry.held_out, tokenizer, entry.config, reader, prompts.examples)
    return prompts, unseen.held_out(entry.config.eval_prompts)


def make_algorithm(entry: Preflight, policy: Policy) -> Algorithm:
    """The algorithm, and the reference if it needs one."""
    algorithm = entry.algorithm(entry.config)
    if policy.one_per_row and algorithm.together > 1:
        raise UsageError(f"{algorithm.name} packs pairs into rows, and this model's layers would mix the two")
    if "ref_logprobs" in algorithm.needs:
        policy.keep_reference()
    return algorithm


def how_to_sample(
    config: TrainConfig, policy: Policy, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...]
) -> Sampling:
    """Settings of completions, and what ends them: every end token that the model's generation config names."""
    named = getattr(policy.base, "generation_config", None) or GenerationConfig()
    ends = named.eos_token_id if isinstance(named.eos_token_id, list) else [named.eos_token_id]
    stop_ids = {token for token in [*ends, tokenizer.eos_token_id] if token is not None}
    if not stop_ids and not config.stop_strings:
        raise UsageError(
            "neither the model nor its tokenizer names an end token, so no completion could end; give a stop string"
        )
    strings = (*config.stop_strings, *stop)
    return Sampling(config.temperature, config.max_completion_length, tuple(sorted(stop_ids)), strings)


def register(residency: Residency, policy: Policy, critic: Critic | None, rewards: list[Reward]) -> None:
    """Gives what is on the card into the residency's charge."""
    apart = {id(p) for p in critic.weights.values()} if critic and critic.shares_base else set()
    residency.add("policy", Offloadable(lambda: (t for t in policy.tensors() if id(t) not in apart)))
    if policy.frozen is not None:
        residency.add("reference", Offloadable(policy.frozen.state_dict(keep_vars=True).values))
    if critic is not None:
        residency.add("critic", Offloadable(critic.tensors))
    judges = [judge for reward in rewards if (judge := getattr(reward.function, "classifier", None))]
    waits = residency.plan is not None and "reward model" in residency.plan.moved
    for judge in judges:
        if residency.device.type == "cuda":
            judge.enter(CPU if waits else residency.device)  # there may be no room beside the policy
        residency.add("reward model", judge)
    if judges and waits:
        residency.away.add("reward model")


def start_engine(
    config: TrainConfig,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    run: Path,
    plan: Plan | None,
    cache_tokens: int,
) -> Restarting:
    """The engine, as large as planned or as so many tokens need, which is started anew if it fails."""
    cache = plan.engine_cache if plan else None

    def start(part: float) -> Any:
        return build_engine(config, policy, tokenizer, sampling, run / "base_model", cache, part, cache_tokens)

    return Restarting(start, policy, str(run))


def make_sampler(
    config: TaskConfig,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    scorer: Scorer,
    ends: tuple[int, ...],
    environment: type[Environment] | None,
    residency: Residency | None = None,
) -> Sampler:
    """The sampler of the completions that this task asks for, or of its episodes."""
    limit = config.max_completion_length
    if environment is None:
        return Sampler(engine, tokenizer, scorer, limit, residency=residency)
    episodes = Episodes(environment, tokenizer, ends, limit, config.chat_template_kwargs)
    return Sampler(engine, tokenizer, scorer, limit, episodes, config.max_turns, residency)


def make_source(
    entry: Preflight,
    tokenizer: PreTrainedTokenizerBase,
    algorithm: Algorithm,
    prompts: Prompts,
    held_out: list[Prompt],
    scorer: Scorer,
    sampling: Sampling,
    sampler: Sampler | None,
    answers: type[Demonstrations],
) -> Source:
    """The source of a step's samples: the dataset's own answers, another run's rollouts, or the policy."""
    config = entry.config
    if entry.source == "dataset":
        return answers(config, tokenizer, prompts, held_out, sampling.stop_token_ids)
    assert isinstance(config, OnPolicyConfig) and isinstance(algorithm, OnPolicy)
    if entry.source == "run":
        return SavedRollouts(config, scorer, algorithm.samples())
    assert sampler is not None
    if isinstance(config, PolicyGradientConfig) and config.partial_rollouts:
        return PartialRollouts(config, algorithm.samples(), sampler, prompts)
    return OnPolicySource(config, algorithm.samples(), sampler, prompts)
