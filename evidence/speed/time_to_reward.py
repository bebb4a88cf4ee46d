"""A recipe as a race: who is first at a held-out reward, by one and the same evaluation."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from evidence.speed.workloads import Meter, Run

STARTED = "MEASUREMENT_STARTED"  # the variable that says when the process began, in seconds of the clock


@dataclass(frozen=True, slots=True)
class Goal:
    """A recipe of GRPO's, until `reward` is reached."""

    recipe: str = "tiny"
    model: str = "nanorlhf:adder"
    reward: float = 0.9
    every: int = 2  # steps between evaluations
    prompts: int = 32
    generations: int = 8
    max_steps: int = 60
    eval_prompts: int = 256
    patience: float = 0.0  # a rival gives up after so many times our seconds (0: never)
    limit: float = 0.0  # seconds of steps after which a side gives up (0: never)


def prepare(folder: Path, work: Goal) -> None:
    """Copies the model to the folder from which both sides load it."""
    from nanorlhf.config.names import shipped_model

    shutil.copytree(shipped_model(work.model), folder, dirs_exist_ok=True)


def trainer_of(folder: Path, work: Goal, seed: int, engine: str) -> Any:
    """Our trainer by the recipe, with the rewards and the held-out prompts."""
    import nanorlhf.grpo
    from nanorlhf.grpo import GRPOConfig, GRPOTrainer

    recipe = Path(nanorlhf.grpo.__file__).parent / "recipes" / f"{work.recipe}.yaml"
    options = yaml.safe_load(recipe.read_text()) | {
        "model_name_or_path": str(folder), "device": "cpu", "engine": engine, "seed": seed,
        "prompts_per_step": work.prompts, "num_generations": work.generations, "max_steps": work.max_steps,
        "eval_prompts": work.eval_prompts, "output_dir": str(folder / "run"), "overwrite_output_dir": True,
    }  # fmt: skip
    return GRPOTrainer(args=GRPOConfig(**options))


class Course:
    """Adds up the training on the way, and evaluates it now and then."""

    def __init__(self, work: Goal, meter: Meter) -> None:
        self.work, self.meter, self.laps = work, meter, list[Run]()
        self.held_out: list[tuple[int, float]] = []
        self.apart = 0.0  # seconds of this process that are the judge's

    @property
    def reached(self) -> bool:
        return bool(self.held_out) and self.held_out[-1][1] >= self.work.reward

    @property
    def gave_up(self) -> bool:
        spent = sum(lap["seconds"] for lap in self.laps)
        return not self.reached and 0 < self.work.limit < spent

    def step(self, judge: Callable[[], float]) -> bool:
        """Takes a step's time, evaluates if that is due, and says whether this is the end."""
        self.laps.append(self.meter.lap())
        if len(self.laps) % self.work.every == 0:
            start = time.perf_counter()
            self.held_out.append((len(self.laps), judge()))
            self.apart += time.perf_counter() - start
        self.meter.go()
        return self.reached or self.gave_up

    def run(self) -> Run:
        sums = {name: sum(lap[name] for lap in self.laps) for name in self.laps[0]}
        about = {"steps": len(self.laps), "reached": self.reached, "gave_up": self.gave_up, "held_out": self.held_out}
        if STARTED in os.environ:
            about["from_start_seconds"] = time.time() - float(os.environ[STARTED]) - self.apart
        return sums | self.meter.peak() | about


class Judge:
    """Held-out reward of a model that someone else trains: our evaluation, on our copy, with its adapter."""

    def __init__(self, folder: Path, work: Goal, seed: int) -> None:
        self.trainer = trainer_of(folder, work, seed, "hf")

    def __call__(self, model: Any) -> float:
        from nanorlhf.policy.serialization import restore

        policy = self.trainer.policy
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            restore(policy, Path(folder))
        policy.version += 1
        return self.trainer.evaluate()["eval/reward"]

    def rows(self, work: Goal) -> dict[str, list[Any]]:
        """The prompts of every step in our order, with their answers, each checked to be read as we read it."""
        tokenizer = self.trainer.tokenizer
        prompts = [p for step in range(work.max_steps) for p in self.trainer.prompts.batch(step, work.prompts)]
        for prompt in prompts[:: work.prompts]:
            written = tokenizer.apply_chat_template(prompt.text, add_generation_prompt=True, return_dict=True)
            assert list(written["input_ids"]) == prompt.ids, "the same prompt is other tokens elsewhere"
        return {"prompt": [p.text for p in prompts], "answer": [p.columns["answer"] for p in prompts]}
