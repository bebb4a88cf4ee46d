"""TRL's side of the same updates, in the setting asked for; float32 and every norm as ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evidence.speed.workloads import LORA_R, RATE, Meter, Run, Setting, Workload, disturb


def adapter(rank: int) -> Any:
    """TRL's word for our LoRA on all linear layers."""
    from trl import ModelConfig, get_peft_config  # type: ignore[import-not-found]

    shape = {"lora_r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "lora_target_modules": ["all-linear"]}
    return get_peft_config(ModelConfig(use_peft=True, **shape))


def arguments(folder: Path, setting: Setting, size: int, together: int = 1) -> dict[str, Any]:
    """Arguments of every TRL trainer; `size` completions are one step, `together` of them one row of its data."""
    return {
        "output_dir": str(folder / "trl"), "use_cpu": True, "bf16": False, "max_steps": 1, "learning_rate": RATE,
        "per_device_train_batch_size": setting.micro_batch // together,
        "gradient_accumulation_steps": size // setting.micro_batch,
        "gradient_checkpointing": setting.checkpointing, "logging_steps": 1, "report_to": [],
        "save_strategy": "no", "disable_tqdm": True, "seed": setting.seed,
    }  # fmt: skip


def step_callback(begin: Callable[[], Any] | None = None, end: Callable[[Any], Any] | None = None) -> Any:
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
    callback = step_callback(meter.start if from_others else None, lambda _: measured.update(meter.stop()))
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
    """The options that make TRL's GRPO ours; the ratio times its KL is its default, too."""
    return {
        "num_generations": work.generations, "max_completion_length": work.limit, "beta": work.kl,
        "use_bias_correction_kl": True, "loss_type": "dapo", "scale_rewards": "group",
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
