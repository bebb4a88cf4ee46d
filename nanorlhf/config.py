"""Every option of a run: one frozen dataclass that algorithms extend, checked when it is made."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, dataclass_transform, get_type_hints

import typeguard

from nanorlhf.aliases import rename
from nanorlhf.errors import UsageError, nearest

C = TypeVar("C")
Norm = Literal["token", "sequence", "constant"]


def option(default: Any, help: str, group: str) -> Any:
    """A dataclass field with its line of help."""
    metadata = {"help": help, "group": group}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(option,))
def config(cls: type[C]) -> type[C]:
    """A frozen dataclass that understands other trainers' names and refuses unknown ones and wrong types."""
    cls = dataclass(frozen=True, kw_only=True)(cls)
    plain_init: Callable[..., None] = cls.__init__
    hints = get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]

    @functools.wraps(plain_init)
    def checked_init(self: C, **options: Any) -> None:
        options = rename(options)
        for name, value in options.items():
            if name not in known:
                raise UsageError(f"unknown option {name!r}: {nearest(name, known)}")
            try:
                typeguard.check_type(value, hints[name])
            except typeguard.TypeCheckError:
                wanted = getattr(hints[name], "__name__", None) if isinstance(hints[name], type) else None
                wanted = wanted or str(hints[name]).replace("typing.", "")
                raise UsageError(f"{name}={value!r} is of the wrong type: it takes {wanted}") from None
        plain_init(self, **options)
        self.validate()  # type: ignore[attr-defined]

    cls.__init__ = checked_init
    return cls


@config
class TrainConfig:
    """Options that every algorithm shares."""

    # model
    model_name_or_path: str = option("", "Model: a Hugging Face name, a folder, or nanorlhf:adder (shipped).", "model")
    lora: str = option(
        "all-linear", "What LoRA adapts: all-linear, module names with commas, or none (train all weights).", "model"
    )
    lora_r: int = option(32, "Rank of the adapter.", "model")
    lora_alpha: int = option(32, "Its scale: alpha / r (alpha / sqrt(r) with use_rslora).", "model")
    lora_dropout: float = option(0.0, "Dropout before the adapter, in updates only.", "model")
    use_rslora: bool = option(False, "Rank-stabilised scaling of the adapter.", "model")
    adapter_name_or_path: str | None = option(
        None, "An adapter to go on from, such as an earlier stage's checkpoint.", "model"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "Of the base weights: auto is bfloat16 on CUDA, else float32.", "model"
    )
    device: str = option("auto", "cuda, mps or cpu; auto takes the first there is.", "model")
    trust_remote_code: bool = option(False, "Run code that comes with a model.", "model")
    gradient_checkpointing: bool = option(
        False, "Recompute activations in backward: less memory, a third more time.", "model"
    )

    # data
    dataset_name: str = option(
        "", "Dataset: arithmetic (built in), a json/jsonl/csv/parquet file, a folder, or a hub name.", "data"
    )
    dataset_config: str | None = option(None, "The dataset's configuration on the hub.", "data")
    dataset_train_split: str = option("train", "Split to train on.", "data")
    dataset_test_split: str | None = option(None, "Split to evaluate on; none: no evaluation.", "data")
    prompt_column: str = option("prompt", "Column with the prompt: text, or chat messages.", "data")
    system_prompt: str | None = option(None, "Put before every conversational prompt.", "data")
    max_prompt_length: int = option(512, "Longer prompts are dropped, and counted.", "data")

    # rollout
    engine: Literal["auto", "vllm", "hf"] = option(
        "auto", "Who writes completions; auto: vLLM where it is installed.", "rollout"
    )
    weight_sync: Literal["auto", "lora", "merged"] = option(
        "auto", "How weights reach the engine; auto: lora for 16-bit, merged for float32.", "rollout"
    )
    prompts_per_step: int = option(64, "Prompts in a step.", "rollout")
    num_generations: int = option(8, "Completions for each prompt.", "rollout")
    max_completion_length: int = option(512, "Tokens a completion may have.", "rollout")
    temperature: float = option(
        1.0, "Sampling temperature; log-probabilities are those of this distribution.", "rollout"
    )
    top_p: float = option(
        1.0, "Only 1 in training: what is cut from the sample would be missing from the gradient.", "rollout"
    )
    top_k: int = option(0, "Only 0 in training, for the same reason.", "rollout")
    stop: str | list[str] = option([], "Strings that end a completion, beside the model's end tokens.", "rollout")
    gpu_memory_utilization: float = option(0.4, "Share of the GPU that vLLM may take.", "rollout")
    engine_sleep: bool = option(False, "On CUDA, the engine leaves the GPU while the policy trains.", "rollout")
    engine_logs: bool = option(False, "Show the engine's own log.", "rollout")

    # reward
    reward_funcs: str | list[str] = option(
        [], "Rewards: names, or path/to/file.py:function; several with commas.", "reward"
    )
    reward_weights: list[float] | None = option(None, "A weight for each reward; 1 each where not given.", "reward")

    # training
    max_steps: int = option(100, "Steps to train.", "training")
    updates_per_step: int = option(1, "Optimizer steps a rollout gives, on disjoint sets of whole groups.", "training")
    epochs_per_step: int = option(1, "Passes over each rollout.", "training")
    learning_rate: float = option(1e-5, "Peak learning rate.", "training")
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = option(
        "cosine", "Course of the learning rate.", "training"
    )
    lr_min_ratio: float = option(0.1, "Where cosine ends, as a share of the peak.", "training")
    warmup_steps: int = option(0, "Optimizer steps of linear warm-up.", "training")
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm.", "training")
    weight_decay: float = option(0.0, "AdamW's weight decay.", "training")
    adam_beta1: float = option(0.9, "AdamW's first beta.", "training")
    adam_beta2: float = option(0.999, "AdamW's second beta.", "training")
    token_budget: int | Literal["auto"] = option(
        "auto", "Tokens in a micro-batch; auto: 4,096 on a CPU, 16,384 on a GPU.", "training"
    )
    clip_low: float = option(0.2, "Ratios below 1 - clip_low earn nothing more.", "training")
    clip_high: float | None = option(
        None, "Ratios above 1 + clip_high earn nothing more; none: as clip_low.", "training"
    )
    kl_coef: float = option(0.0, "Weight of the KL divergence from the starting policy.", "training")
    norm: Norm = option(
        "token", "What a token weighs: token 1/N, sequence 1/(S len), constant 1/(S max_completion_length).", "training"
    )
    seed: int = option(0, "Of data order, adapter and sampling.", "training")

    # run
    output_dir: str | None = option(None, "Run directory; none: runs/<algorithm>-<time>.", "run")
    overwrite_output_dir: bool = option(False, "Delete what an earlier run left in output_dir.", "run")
    resume: str | None = option(None, "A run directory to continue; its own config.yaml is the base.", "run")
    save_steps: int = option(50, "A checkpoint every so many steps, and at the end; 0: only at the end.", "run")
    save_total_limit: int = option(2, "Checkpoints to keep.", "run")
    eval_steps: int = option(
        10, "Evaluate every so many steps, at the start and at the end; 0: start and end only.", "run"
    )
    eval_prompts: int = option(256, "Held-out prompts to evaluate on.", "run")
    report_to: str | list[str] = option([], "Trackers: wandb, tensorboard, trackio.", "run")
    project: str = option("nanorlhf", "Project name for trackers.", "run")
    run_name: str | None = option(None, "Run name for trackers; none: the run directory's.", "run")
    tags: list[str] = option([], "Tags for trackers.", "run")

    def validate(self) -> None:
        """Refuses values that cannot work, with what is allowed."""
        positive = ["lora_r", "lora_alpha", "max_prompt_length", "prompts_per_step", "num_generations", "max_steps"]
        positive += ["max_completion_length", "temperature", "updates_per_step", "epochs_per_step", "learning_rate"]
        positive += ["max_grad_norm", "clip_low", "save_total_limit", "eval_prompts"]
        not_negative = [
            "lora_dropout",
            "lr_min_ratio",
            "warmup_steps",
            "weight_decay",
            "kl_coef",
            "save_steps",
            "eval_steps",
        ]
        for name in positive:
            self.require(getattr(self, name) > 0, name, "it must be above 0")
        for name in not_negative:
            self.require(getattr(self, name) >= 0, name, "it must be 0 or more")
        self.require(
            self.top_p == 1, "top_p", "training samples from the whole distribution, so only 1; use temperature"
        )
        self.require(
            self.top_k in (0, -1), "top_k", "training samples from the whole distribution, so only 0; use temperature"
        )
        self.require(self.lora_dropout < 1, "lora_dropout", "it must be below 1")
        self.require(self.clip_low < 1, "clip_low", "it must be below 1")
        self.require(self.clip_high is None or self.clip_high > 0, "clip_high", "it must be above 0")
        self.require(0 < self.gpu_memory_utilization <= 1, "gpu_memory_utilization", "it must be above 0 and at most 1")
        self.require(
            self.token_budget == "auto" or self.token_budget > 0, "token_budget", "it must be above 0, or auto"
        )
        self.require(
            self.updates_per_step <= self.prompts_per_step,
            "updates_per_step",
            f"each update takes whole groups, so at most prompts_per_step={self.prompts_per_step}",
        )
        self.require(
            not (self.full_finetuning and self.weight_sync == "lora"),
            "weight_sync",
            "lora: none has no adapter; use merged",
        )
        self.require(
            self.reward_weights is None or len(self.reward_weights) == len(self.rewards) or not self.rewards,
            "reward_weights",
            f"one weight for each of {', '.join(self.rewards)}",
        )
        for name in self.trackers:
            known = ["wandb", "tensorboard", "trackio"]
            self.require(name in known, "report_to", nearest(name, known))

    def require(self, holds: bool, name: str, why: str) -> None:
        """Raises a UsageError about option `name` unless `holds`."""
        if not holds:
            raise UsageError(f"{name}={getattr(self, name)!r} cannot work: {why}")

    @property
    def full_finetuning(self) -> bool:
        return self.lora == "none"

    @property
    def rewards(self) -> list[str]:
        return split_names(self.reward_funcs)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def trackers(self) -> list[str]:
        return [name for name in split_names(self.report_to) if name != "none"]

    @property
    def clip_range(self) -> tuple[float, float]:
        return self.clip_low, self.clip_low if self.clip_high is None else self.clip_high

    def to_dict(self) -> dict[str, Any]:
        """Every option as plain values, as `config.yaml` holds them."""
        return dataclasses.asdict(self)


def split_names(value: str | list[str]) -> list[str]:
    """Names from a list or from one string with commas."""
    parts = value.split(",") if isinstance(value, str) else value
    return [part.strip() for part in parts if part.strip()]


def shipped_model(name: str) -> str:
    """The folder of a model that comes with the package (`nanorlhf:adder`), any other name as it is."""
    if not name.startswith("nanorlhf:"):
        return name
    folder = Path(__file__).parent / "models"
    path = folder / name.removeprefix("nanorlhf:")
    if not path.is_dir():
        raise UsageError(f"no shipped model {name!r}: {nearest(path.name, [p.name for p in folder.iterdir()])}")
    return str(path)
