"""How TRL does the same work, in the setting asked for; float32 and every norm as ours."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nanorlhf.scripts import goal
from nanorlhf.scripts.goal import Goal
from nanorlhf.scripts.workloads import (
    LORA_R,
    RATE,
    REFRESHES,
    STEPS,
    Meter,
    Run,
    Setting,
    Workload,
    disturb,
    spread_out,
    typical,
)

COLOCATED = "vLLM, patched"  # TRL's colocated vLLM as far as it goes on a CPU, see `reload_instead`
CONTINUOUS = "continuous batching"


def adapter(rank: int) -> Any:
    """TRL's word for our LoRA on all linear layers."""
    from trl import ModelConfig, get_peft_config  # type: ignore[import-not-found]

    shape = {"lora_r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "lora_target_modules": ["all-linear"]}
    return get_peft_config(ModelConfig(use_peft=True, **shape))


def arguments(folder: Path, setting: Setting, size: int, together: int = 1) -> dict[str, Any]:
    """What every trainer of TRL's is told; `size` completions are one step, `together` of them one row of its data."""
    return {
        "output_dir": str(folder / "trl"), "use_cpu": True, "bf16": False, "max_steps": 1, "learning_rate": RATE,
        "per_device_train_batch_size": setting.micro_batch // together,
        "gradient_accumulation_steps": size // setting.micro_batch,
        "gradient_checkpointing": setting.checkpointing, "logging_steps": 1, "report_to": [],
        "save_strategy": "no", "disable_tqdm": True, "seed": setting.seed,
    }  # fmt: skip


def told(begin: Callable[[], Any] | None = None, end: Callable[[Any], Any] | None = None) -> Any:
    """A callback: `begin` as a step begins, `end` with the trainer's control after it."""
    from transformers import TrainerCallback

    class AtBothEnds(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if begin:
                begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if end:
                end(control)

    return AtBothEnds()


def update(folder: Path, work: Workload, samples: Sequence[dict[str, Any]], setting: Setting) -> Run:
    """One step from the moment it has its completions."""
    from transformers import AutoTokenizer

    meter, measured = Meter(), {}
    from_others = work.algorithm in WITH_DATA
    callback = told(meter.start if from_others else None, lambda _: measured.update(meter.stop()))
    common = {
        "model": str(folder), "processing_class": AutoTokenizer.from_pretrained(folder),
        "peft_config": adapter(LORA_R), "callbacks": [callback],
    }  # fmt: skip
    if from_others:
        trainer = WITH_DATA[work.algorithm](samples, common, folder, setting)
    else:
        options = arguments(folder, setting, len(samples))
        trainer = WITH_ROLLOUTS[work.algorithm](samples, common, options, work, meter)
    disturb(trainer.model)
    trainer.train()
    return measured | {name: trainer.state.log_history[0][name] for name in ("loss", "grad_norm")}


def grpo(samples: Any, common: dict[str, Any], options: dict[str, Any], work: Workload, meter: Meter) -> Any:
    """The mean over tokens is loss_type dapo there."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer  # type: ignore[import-not-found]

    def given(*_: Any) -> dict[str, list[Any]]:
        columns = {name: [s[name] for s in samples] for name in samples[0]}
        meter.start()
        return columns

    return GRPOTrainer(
        **common,
        reward_funcs=lambda reward, **_: reward,
        rollout_func=given,
        train_dataset=Dataset.from_dict({"prompt": ["w2"] * work.prompts}),
        args=GRPOConfig(**options, **grpo_options(work)),
    )


def grpo_options(work: Workload) -> dict[str, Any]:
    """What makes TRL's GRPO ours."""
    return {
        "num_generations": work.generations, "max_completion_length": work.limit, "beta": work.kl,
        "use_bias_correction_kl": False, "loss_type": "dapo", "scale_rewards": "group",
    }  # fmt: skip


def rloo(samples: Any, common: dict[str, Any], options: dict[str, Any], work: Workload, meter: Meter) -> Any:
    """It takes no rollouts from outside, so the two methods that make them hand over the given ones."""
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer  # type: ignore[import-not-found]

    class Given(RLOOTrainer):
        def _tokenize_prompts(self, prompts: Any) -> Any:
            return [s["prompt_ids"] for s in samples], None, {}

        def _generate_single_turn(self, prompt_ids: Any, images: Any, multimodal_fields: Any) -> Any:
            completions = [list(s["completion_ids"]) for s in samples]
            meter.start()
            return completions

    return Given(
        **common,
        reward_funcs=lambda completions, **_: [s["reward"] for s in samples],
        train_dataset=Dataset.from_dict({"prompt": ["w2"] * work.prompts}),
        args=RLOOConfig(
            **options,
            num_generations=work.generations,
            max_completion_length=work.limit,
            beta=work.kl,
        ),
    )


def sft(samples: Any, common: dict[str, Any], folder: Path, setting: Setting) -> Any:
    """Tokens as they are, only the completions' learned."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]

    rows = {
        "input_ids": [s["prompt_ids"] + s["completion_ids"] for s in samples],
        "labels": [[-100] * len(s["prompt_ids"]) + s["completion_ids"] for s in samples],
    }
    options = arguments(folder, setting, len(samples)) | {
        "dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, "padding_free": setting.padding_free,
    }  # fmt: skip
    return SFTTrainer(**common, train_dataset=Dataset.from_dict(rows), args=SFTConfig(**options))


def dpo(samples: Any, common: dict[str, Any], folder: Path, setting: Setting) -> Any:
    """Tokens as they are: those of a text would get another end token."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer  # type: ignore[import-not-found]

    class Tokenized(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
            return dataset

    chosen, rejected = samples[::2], samples[1::2]
    rows = {
        "prompt_ids": [s["prompt_ids"] for s in chosen],
        "chosen_ids": [s["completion_ids"] for s in chosen],
        "rejected_ids": [s["completion_ids"] for s in rejected],
    }
    options = arguments(folder, setting, len(samples), together=2) | {"max_length": None, "beta": 0.1}
    return Tokenized(**common, train_dataset=Dataset.from_dict(rows), args=DPOConfig(**options))


WITH_ROLLOUTS: dict[str, Callable[..., Any]] = {"grpo": grpo, "rloo": rloo}
WITH_DATA: dict[str, Callable[..., Any]] = {"sft": sft, "dpo": dpo}


def engine_options(setting: Setting, longest: int) -> dict[str, Any]:
    """Who writes completions."""
    if setting.engine == CONTINUOUS:
        return {"use_transformers_continuous_batching": True}
    if setting.engine != COLOCATED:
        return {}
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    correct = {"vllm_importance_sampling_correction": False}  # ours has none either
    return {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": longest} | correct


def reload_instead(trainer: Any) -> None:
    """On a CPU vLLM packs weights and can no longer `load_weights`, which TRL calls: the same tensors, merged and
    unmerged by TRL, go through vLLM's `reload_weights` instead."""
    generation = trainer.vllm_generation

    def sync() -> None:
        weights = generation._iter_named_params()  # noqa: SLF001 TRL's own merging is what is measured
        generation.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        generation.llm.reset_prefix_cache()

    generation.sync_weights = sync


def stepping(folder: Path, work: Workload, setting: Setting, steps: int, callback: Any) -> Any:
    """TRL's GRPO with an engine."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer  # type: ignore[import-not-found]

    size = work.prompts * work.generations
    options = arguments(folder, setting, size) | {"max_steps": steps, "logging_strategy": "no"} | grpo_options(work)
    trainer = GRPOTrainer(
        model=str(folder),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=adapter(LORA_R),
        callbacks=[callback],
        reward_funcs=spread_out,
        train_dataset=Dataset.from_dict({"prompt": work.texts * steps}),
        args=GRPOConfig(**options, **engine_options(setting, work.limit + 32)),
    )
    if setting.engine == COLOCATED:
        reload_instead(trainer)
    return trainer


def step(folder: Path, work: Workload, setting: Setting) -> Run:
    """Whole steps: weights for the engine, completions, rewards, update; the first one warms up."""
    meter, laps = Meter(), []
    meter.start()
    trainer = stepping(folder, work, setting, STEPS + 1, told(meter.go, lambda _: laps.append(meter.lap())))
    lengths = trainer._metrics["train"]["completions/mean_length"]  # noqa: SLF001 kept there without a log
    trainer.train()
    tokens = sum(lengths) * work.prompts * work.generations
    return typical(laps[1:]) | meter.peak() | {"tokens": round(tokens)}


def refresh(folder: Path, work: Workload, setting: Setting) -> Run:
    """New weights for the engine, again and again; the first time warms up."""
    meter, laps = Meter(), []
    meter.start()
    trainer = stepping(folder, work, setting, 1, told())
    disturb(trainer.model)
    for _ in range(REFRESHES + 1):
        meter.go()
        trainer.vllm_generation.sync_weights()
        laps.append(meter.lap())
    return typical(laps[1:]) | meter.peak()


def reach(folder: Path, work: Goal, setting: Setting) -> Run:
    """Trains by the recipe's numbers on our prompts until held-out reward is high enough; only training counts."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer  # type: ignore[import-not-found]

    from nanorlhf.rewards.exact_answer import exact_answer

    meter = Meter()
    meter.start()
    judge, course = goal.Judge(folder, work, setting.seed), goal.Course(work, meter)
    recipe = judge.trainer.config

    def end(control: Any) -> None:
        control.should_training_stop |= course.step(lambda: judge(trainer.model))

    options = arguments(folder, setting, work.prompts * work.generations) | {
        "max_steps": work.max_steps, "learning_rate": recipe.learning_rate, "logging_strategy": "no",
        "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": recipe.lr_min_ratio},
        "num_generations": work.generations, "max_completion_length": recipe.max_completion_length,
        "beta": recipe.kl_coef, "loss_type": "dapo", "scale_rewards": "group", "shuffle_dataset": False,
    }  # fmt: skip
    trainer = GRPOTrainer(
        model=str(folder),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=adapter(recipe.lora_r),
        callbacks=[told(meter.go, end)],
        reward_funcs=exact_answer,
        train_dataset=Dataset.from_dict(judge.rows(work)),
        args=GRPOConfig(**options, **engine_options(setting, recipe.max_prompt_length + recipe.max_completion_length)),
    )
    if setting.engine == COLOCATED:
        reload_instead(trainer)
    try:
        trainer.train()
    finally:
        judge.trainer.close()
    return course.run()
