"""Option names that people bring from other trainers, and what each became here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nanorlhf.errors import UsageError
from nanorlhf.system.terminal import log


@dataclass(frozen=True)
class Became:
    """The option it is here; `value` translates if the values differ too, seeing all options given."""

    name: str
    value: Callable[[Any, Mapping[str, Any]], Any] = lambda value, _: value


@dataclass(frozen=True)
class Gone:
    """An option that has no counterpart, what to do instead, and the values that ask for nothing."""

    instead: str
    nothing: tuple[Any, ...] = (False, "false", "False")


@dataclass(frozen=True)
class Moot:
    """An option that changes nothing here, and why."""

    why: str


YES = (True, "true", "True")


def _kind(value: Any, options: Mapping[str, Any]) -> str:
    """Half precision in the Trainer's sense keeps master weights in float32, as auto does if all weights learn."""
    if value not in YES:
        return "float32"
    return "auto" if options.get("lora") == "none" else "bfloat16"


def _steps(episodes: Any, options: Mapping[str, Any]) -> int:
    """Episodes are samples; what makes one of a demonstration or a pair has no `num_generations`."""
    return max(1, int(episodes) // (options["prompts_per_step"] * options.get("num_generations", 1)))


def _columns(prompt: Any, options: Mapping[str, Any]) -> dict[str, str]:
    """The column of the prompt among the other names for columns."""
    given = options.get("columns", {})
    return given if prompt == "prompt" else {**given, "prompt": prompt}


def _lora(peft: Any, options: Mapping[str, Any]) -> str:
    """The layers that are named, if an adapter is asked for."""
    if peft not in YES:
        return "none"
    return options["lora"] if options["lora"] != "none" else "all-linear"


def _norm(loss: Any, _: Mapping[str, Any]) -> Any:
    """The weights of tokens that a loss is named for; other losses are an option of their own."""
    if loss in ("cispo", "sapo"):
        raise UsageError(f"loss_type={loss} is policy_loss={loss} here; say that")
    return {"grpo": "sequence", "dapo": "token", "bnpo": "token", "dr_grpo": "constant"}.get(loss, loss)


ALIASES: dict[str, Became | Gone | Moot] = {
    # model
    "model": Became("model_name_or_path"),
    "model_name": Became("model_name_or_path"),
    "sft_model_path": Became("model_name_or_path"),
    "lora_rank": Became("lora_r"),
    "lora_target_modules": Became("lora", lambda v, _: v if isinstance(v, str) else ",".join(v)),
    "torch_dtype": Became("dtype"),
    "fp16": Gone("its gradients would need scaling; use bf16, or dtype float32"),
    # rollout
    "max_new_tokens": Became("max_completion_length"),
    "response_length": Became("max_completion_length"),
    "max_response_length": Became("max_completion_length"),
    "group_size": Became("num_generations"),
    "rollout_n": Became("num_generations"),
    "rloo_k": Became("num_generations"),
    "use_vllm": Became("engine", lambda v, _: "vllm" if v in YES else "hf"),
    "vllm_gpu_memory_utilization": Gone("the memory plan sizes the engine; gpu_memory_gib says how much there is"),
    "vllm_enable_sleep_mode": Became("offload", lambda v, _: "auto" if v in YES else "never"),
    "vllm_mode": Gone("the engine always runs inside the trainer's process", ("colocate",)),
    "rollout_batch_size": Became("prompts_per_step"),
    "train_batch_size": Became("prompts_per_step"),
    "top_p": Gone("completions are sampled from the whole distribution; use temperature", (1,)),
    "top_k": Gone("completions are sampled from the whole distribution; use temperature", (0, -1)),
    # reward
    "reward_model_path": Became("reward_funcs", lambda v, _: f"model:{v}"),
    "reward_model": Became("reward_funcs", lambda v, _: f"model:{v}"),
    "reward_fn": Became("reward_funcs"),
    "brevity_penalty_scale": Became("reward_options", lambda v, _: {"lexical_richness": {"brevity_penalty_scale": v}}),
    # training
    "lr": Became("learning_rate"),
    "beta": Became("kl_coef"),
    "init_kl_coef": Became("kl_coef"),
    "kl_loss_coef": Became("kl_coef"),
    "kl_beta": Became("kl_coef"),
    "epsilon": Became("clip_low"),
    "epsilon_low": Became("clip_low"),
    "epsilon_high": Became("clip_high"),
    "cliprange": Became("clip_low"),
    "clip_ratio": Became("clip_low"),
    "num_ppo_epochs": Became("epochs_per_step"),
    "ppo_epochs": Became("epochs_per_step"),
    "num_iterations": Became("epochs_per_step"),
    "num_mini_batches": Became("updates_per_step"),
    "num_steps": Became("max_steps"),
    "total_steps": Became("max_steps"),
    "loss_type": Became("norm", _norm),
    "importance_sampling_level": Gone("policy_loss gspo has one ratio for a sequence", ("token",)),
    "max_length": Gone("max_prompt_length and max_completion_length bound the two parts of it", (None,)),
    "max_token_len_per_gpu": Became("token_budget"),
    "per_device_train_batch_size": Gone(
        "a step is prompts_per_step x num_generations; micro-batches follow from token_budget"
    ),
    "gradient_accumulation_steps": Gone("micro-batches follow from token_budget, and add up to the same gradient"),
    # run
    "resume_from_checkpoint": Became("resume"),
    "wandb_project": Became("project"),
    "logging_steps": Moot("every step is logged"),
    "eval_every": Became("eval_steps"),
    "save_every": Became("save_steps"),
    # what depends on other options comes after them
    "use_peft": Became("lora", _lora),
    "bf16": Became("dtype", _kind),
    "prompt_column": Became("columns", _columns),
    "total_episodes": Became("max_steps", _steps),
}


def rename(options: Mapping[str, Any], below: Mapping[str, Any]) -> dict[str, Any]:
    """Options under the names they have here, each translation said; `below` are all names here, with values so far."""
    foreign = {name: options[name] for name in ALIASES if name in options and name not in below}
    ours, translated = {name: value for name, value in options.items() if name not in foreign}, dict[str, Any]()
    for name, value in foreign.items():
        match ALIASES[name]:
            case Moot(why):
                log.info(f"{name} changes nothing here: {why}")
            case Gone(instead, nothing):
                if value not in nothing:
                    raise UsageError(f"{name} has no counterpart here: {instead}")
            case Became(target) as alias:
                became = translation(name, alias, value, {**below, **ours})
                if target in translated and became == translated[target]:
                    continue
                if target in ours and not extends(became, ours[target]):
                    raise UsageError(f"{name} is {target} here, and both are given; keep {target}")
                if became != ours.get(target):
                    log.info(f"{name} is {target} here: {became}")
                ours[target] = translated[target] = became
    return ours


def translation(name: str, alias: Became, value: Any, options: Mapping[str, Any]) -> Any:
    """The value that an option of another name has here, beside all other options."""
    if alias.name not in options:
        raise UsageError(f"{name} is {alias.name} in other algorithms, and this one has nothing of the kind")
    try:
        return alias.value(value, options)
    except UsageError:
        raise
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"{name}={value!r} is of the wrong type to become {alias.name}") from None


def extends(became: Any, given: Any) -> bool:
    """Whether a translation keeps all names and values that were given."""
    return isinstance(became, dict) and isinstance(given, dict) and became.items() >= given.items()
