"""Our side of what is measured; evidence/speed/trl_updates.py does the same work with TRL."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evidence.speed import time_to_reward
from evidence.speed.time_to_reward import Goal
from evidence.speed.workloads import (
    LORA_R,
    OURS,
    RATE,
    REFRESHES,
    Meter,
    Run,
    Setting,
    Workload,
    disturb,
    spread_out,
    typical,
)

if TYPE_CHECKING:
    from nanorlhf.types import Rollout

LEARN_FROM_OTHERS = ("sft", "dpo")  # whose completions nobody sampled


def as_rollout(samples: Sequence[dict[str, Any]], work: Workload) -> Rollout:
    """The same samples as our loop takes them."""
    import torch

    from nanorlhf.types import Prompt, Rollout, Sample

    group = torch.arange(len(samples)) // work.generations
    sampled = {"engine_logprobs": torch.tensor([x for s in samples for x in s["logprobs"]])}
    return Rollout(
        [Sample(Prompt(i, s["prompt_ids"], "", {}), s["completion_ids"], s["logprobs"], True, "")
         for i, s in zip(group.tolist(), samples, strict=True)],
        group,
        torch.tensor([s["reward"] for s in samples]),
        columns={} if work.algorithm in LEARN_FROM_OTHERS else sampled,
    )  # fmt: skip


class Given:
    """A source whose rollouts were made elsewhere; the meter starts as one is asked for."""

    def __init__(self, meter: Meter, *rollouts: Rollout) -> None:
        self.meter, self.rollouts = meter, iter(rollouts)

    def rollout(self, step: int, clock: Any, progress: Any) -> Rollout:
        rollout = next(self.rollouts)
        self.meter.start()
        return rollout


def configured(folder: Path, work: Workload, **more: Any) -> tuple[Any, Any]:
    """The algorithm's class and its configuration for this work."""
    module, name = import_module(f"nanorlhf.{work.algorithm}"), work.algorithm.upper()
    if work.algorithm not in LEARN_FROM_OTHERS:
        more |= {"num_generations": work.generations, "kl_coef": work.kl}
    options = {
        "model_name_or_path": str(folder), "device": "cpu", "lora_r": LORA_R, "lora_alpha": LORA_R,
        "learning_rate": RATE, "prompts_per_step": work.prompts, "max_completion_length": work.limit,
    } | more  # fmt: skip
    return getattr(module, name), getattr(module, f"{name}Config")(**options)


def update(
    folder: Path, work: Workload, samples: Sequence[dict[str, Any]], setting: Setting = OURS, warm: int = 0
) -> Run:
    """One step of our loop from the moment it has its completions; before it, one on `warm` groups."""
    from nanorlhf.loop import Loop
    from nanorlhf.policy.policy import Policy

    rows = {"token_budget": setting.token_budget or "auto", "gradient_checkpointing": setting.checkpointing or "auto"}
    algorithm, config = configured(folder, work, **rows)
    policy, meter = Policy(config), Meter()
    disturb(policy.model)
    first = [as_rollout(samples[-warm * work.generations :], work)] if warm else []
    source: Any = Given(meter, *first, as_rollout(samples, work))
    loop = Loop(config, algorithm(config), policy, source)
    for step in range(len(first)):
        loop.step(step + 1)
    passed = list[int]()
    policy.base.base_model.register_forward_pre_hook(
        lambda _, __, given: passed.append(given["input_ids"].numel()), with_kwargs=True
    )
    metrics = loop.step(len(first) + 1).metrics
    figures = ("loss", "grad_norm", "tokens/trained", "samples/dropped_fraction")
    return meter.stop() | {name: metrics[name] for name in figures} | {"row_tokens": sum(passed)}


def trainer_of(folder: Path, work: Workload, setting: Setting, steps: int) -> Any:
    """Everything a run needs, the engine too."""
    from datasets import Dataset

    from nanorlhf.grpo import GRPOTrainer

    _, config = configured(
        folder, work, output_dir=str(folder / "run"), overwrite_output_dir=True, max_steps=steps,
        max_prompt_length=work.longest_prompt, reward_funcs=[], seed=setting.seed, engine=setting.engine or "auto",
        weight_sync=setting.sync or "auto",
    )  # fmt: skip
    rows = Dataset.from_dict({"prompt": work.texts * steps})
    return GRPOTrainer(reward_funcs=spread_out, args=config, train_dataset=rows)


def step(folder: Path, work: Workload, setting: Setting) -> Run:
    """Whole steps: completions, rewards, update, new weights for the engine; the first one warms up."""
    meter, laps, tokens = Meter(), [], []
    meter.start()
    trainer = trainer_of(folder, work, setting, work.steps + 1)
    try:
        for number in range(1, work.steps + 2):
            meter.go()
            done = trainer.loop.step(number)
            laps.append(meter.lap())
            tokens.append(int(done.rollout.lengths.sum()))
    finally:
        trainer.close()
    return typical(laps[1:]) | meter.peak() | {"tokens": sum(tokens), "engine": trainer.engine.name}


def refresh(folder: Path, work: Workload, setting: Setting) -> Run:
    """New weights for the engine, again and again; the first time warms up."""
    meter, laps = Meter(), []
    meter.start()
    trainer = trainer_of(folder, work, setting, 1)
    disturb(trainer.policy.model)
    try:
        for _ in range(REFRESHES + 1):
            trainer.policy.version += 1
            meter.go()
            trainer.engine.update(trainer.policy)
            laps.append(meter.lap())
    finally:
        trainer.close()
    return typical(laps[1:]) | meter.peak() | {"engine": trainer.engine.name}


def reach(folder: Path, work: Goal, setting: Setting) -> Run:
    """Trains until held-out reward is what `work` asks for; only the training counts."""
    meter = Meter()
    meter.start()
    trainer = time_to_reward.trainer_of(folder, work, setting.seed, setting.engine or "auto")
    course = time_to_reward.Course(work, meter)
    try:
        for number in range(1, work.max_steps + 1):
            meter.go()
            trainer.loop.step(number)
            if course.step(lambda: trainer.evaluate()["eval/reward"]):
                break
    finally:
        trainer.close()
    return course.run() | {"engine": trainer.engine.name}
