"""TRL's side of whole steps, refreshes and the shipped task, with the engines it has here.

Transformers' continuous batching is left out: on a CPU it took thirty times as long and 12 GB.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from evidence.speed import time_to_reward
from evidence.speed.time_to_reward import Goal
from evidence.speed.trl_updates import adapter, arguments, grpo_options, step_callback
from evidence.speed.workloads import (
    LORA_R,
    REFRESHES,
    Meter,
    Run,
    Setting,
    Workload,
    disturb,
    spread_out,
    typical,
)

COLOCATED = "vLLM, patched"  # TRL's colocated vLLM as far as it goes on a CPU, see `reload_instead`


def engine_options(setting: Setting, longest: int) -> dict[str, Any]:
    """TRL's options for the engine that writes completions."""
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
        args=GRPOConfig(**options, **engine_options(setting, work.limit + work.longest_prompt)),
    )
    if setting.engine == COLOCATED:
        reload_instead(trainer)
    return trainer


def step(folder: Path, work: Workload, setting: Setting) -> Run:
    """Whole steps: weights for the engine, completions, rewards, update; the first one warms up."""
    meter, laps = Meter(), []
    meter.start()
    trainer = stepping(
        folder, work, setting, work.steps + 1, step_callback(meter.go, lambda _: laps.append(meter.lap()))
    )
    lengths = trainer._metrics["train"]["completions/mean_length"]  # noqa: SLF001 kept there without a log
    trainer.train()
    tokens = sum(lengths) * work.prompts * work.generations
    return typical(laps[1:]) | meter.peak() | {"tokens": round(tokens)}


def refresh(folder: Path, work: Workload, setting: Setting) -> Run:
    """New weights for the engine, again and again; the first time warms up."""
    meter, laps = Meter(), []
    meter.start()
    trainer = stepping(folder, work, setting, 1, step_callback())
    disturb(trainer.model)
    for _ in range(REFRESHES + 1):
        meter.go()
        trainer.vllm_generation.sync_weights()
        laps.append(meter.lap())
    return typical(laps[1:]) | meter.peak()


def reach(folder: Path, work: Goal, setting: Setting) -> Run:
    """Trains by the recipe's numbers on our prompts until held-out reward is high enough; only training counts."""
    meter = Meter()
    meter.start()  # before its libraries, as ours is
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer  # type: ignore[import-not-found]

    from nanorlhf.rewards.exact_answer import exact_answer

    start = time.perf_counter()
    judge, course = time_to_reward.Judge(folder, work, setting.seed), time_to_reward.Course(work, meter)
    course.apart = time.perf_counter() - start
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
        callbacks=[step_callback(meter.go, end)],
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
