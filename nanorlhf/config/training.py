"""Every option of a training run, over those of its task: what all share, what sampling adds, what gradients add."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Literal

from nanorlhf.config.option import config, option, split_names
from nanorlhf.config.task import TaskConfig
from nanorlhf.errors import nearest

DIAGNOSES = ("truncation", "no_spread", "entropy_collapse", "kl_runaway", "gradient_spike", "stale_engine")
WITHOUT_REWARDS = ("truncation", "gradient_spike")  # what may be wrong with demonstrations and pairs too

Norm = Literal["token", "sequence", "constant"]
TRACKERS = ("wandb", "tensorboard", "trackio")


@config
class TrainConfig(TaskConfig):
    """Options that every trainer shares."""

    # model
    lora: str = option(
        "all-linear",
        "What LoRA adapts: all-linear (without experts), module names with commas, or none (train all weights).",
        "model",
    )
    lora_r: int = option(32, "Rank of the adapter.", "model", first=True, above=0)
    lora_alpha: int = option(32, "Its scale: alpha / r (alpha / sqrt(r) with use_rslora).", "model", above=0)
    lora_dropout: float = option(0.0, "Dropout before the adapter, in updates only.", "model", least=0, below=1)
    use_rslora: bool = option(False, "Rank-stabilised scaling of the adapter.", "model")
    gradient_checkpointing: bool | Literal["auto"] = option(
        "auto",
        "Recompute activations in backward: less memory, a third more time; auto: on CUDA, as many as must be.",
        "model",
    )
    offload: Literal["auto", "always", "never"] = option(
        "auto",
        "What a phase does not need leaves the GPU for main memory (engine, reward model, optimizer, policy): "
        "auto moves only what does not fit.",
        "model",
    )
    shard_base: bool = option(
        False,
        "Of the base's layers each of several processes keeps a part (FSDP): for bases that one card cannot hold.",
        "model",
    )
    activation_offload: Literal["auto", "on", "off"] = option(
        "auto",
        "With gradient_checkpointing, the inputs of layers wait in main memory; auto: on CUDA, where they would take "
        "a twentieth of what may be used.",
        "model",
    )

    # rollout
    weight_sync: Literal["auto", "lora", "merged"] = option(
        "auto", "How weights reach the engine; auto: merged for float32, and for vLLM on a CPU; else lora.", "rollout"
    )
    head_dtype: Literal["model", "float32"] = option(
        "model",
        "float32: vLLM computes logits from 16-bit weights in float32, as the policy does, so that their "
        "log-probabilities are nearer.",
        "rollout",
    )
    engine_check: Literal["on", "off"] = option(
        "on",
        "Before the first step (under random weights) and after the first update the engine's log-probabilities are "
        "compared with the trainer's; where they differ the run ends.",
        "rollout",
    )
    prompts_per_step: int = option(64, "Prompts in a step.", "rollout", first=True, above=0)

    # training
    max_steps: int = option(100, "Steps to train.", "training", first=True, above=0)
    num_train_epochs: float | None = option(
        None,
        "Passes over the rows to train, in place of max_steps, which follows from their number.",
        "training",
        above=0,
    )
    max_minutes: float | None = option(
        None,
        "Minutes of training, evaluations not counted, after which the run ends; none: max_steps ends it.",
        "training",
        above=0,
    )
    learning_rate: float = option(1e-5, "Peak learning rate.", "training", first=True, above=0)
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = option(
        "cosine", "Course of the learning rate.", "training"
    )
    lr_min_ratio: float = option(0.1, "Where cosine ends, as a share of the peak.", "training", least=0)
    warmup_steps: int = option(0, "Optimizer steps of linear warm-up.", "training", least=0)
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm.", "training", above=0)
    weight_decay: float = option(0.0, "AdamW's weight decay.", "training", least=0)
    adam_beta1: float = option(0.9, "AdamW's first beta.", "training", least=0, below=1)
    adam_beta2: float = option(0.999, "AdamW's second beta.", "training", least=0, below=1)
    token_budget: int | Literal["auto"] = option(
        "auto",
        "Tokens in a micro-batch; auto: 2,048 on a CPU, 4,096 on MPS, on CUDA what fits, 16,384 or the longest sample.",
        "training",
        above=0,
    )

    # run
    output_dir: str | None = option(None, "Run directory; none: runs/<algorithm>-<time>.", "run", first=True)
    overwrite_output_dir: bool = option(False, "Delete what an earlier run left in output_dir.", "run")
    resume: str | None = option(None, "A run to continue; its own config.yaml is the base.", "run", first=True)
    save_steps: int = option(
        50, "A checkpoint every so many steps, and at the end; 0: only at the end.", "run", least=0
    )
    save_total_limit: int = option(2, "Checkpoints to keep.", "run", above=0)
    eval_steps: int = option(
        10, "Evaluate every so many steps, at the start and the end; 0: only there.", "run", first=True, least=0
    )
    stop_on: list[str] = option(
        [],
        f"End the run, with a checkpoint, at the first step that has one of these: {', '.join(DIAGNOSES)}; "
        f"without rewards only {' and '.join(WITHOUT_REWARDS)} are looked for.",
        "run",
    )
    report_to: str | list[str] = option([], "Trackers: wandb, tensorboard, trackio.", "run", first=True)
    project: str = option("nanorlhf", "Project name for trackers.", "run")
    run_name: str | None = option(None, "Run name for trackers; none: the run directory's.", "run")
    tags: list[str] = option([], "Tags for trackers.", "run")

    def validate(self) -> None:
        super().validate()
        recomputed = self.gradient_checkpointing is not False or self.activation_offload != "on"
        self.require(recomputed, "activation_offload", "there is nothing to move without gradient_checkpointing: true")
        self.require(not (self.shard_base and self.full_finetuning), "shard_base", "it needs an adapter to train")
        adapter = not (self.full_finetuning and self.weight_sync == "lora")
        self.require(adapter, "weight_sync", "lora: none has no adapter; use merged")
        for name in self.stop_on:
            self.require(name in self.ailments, "stop_on", nearest(name, self.ailments))
        for name in self.trackers:
            self.require(name in TRACKERS, "report_to", nearest(name, TRACKERS))

    def over(self, steps: int, seconds: float) -> bool:
        """Whether a run of so many steps and seconds of training has used up what it may."""
        return steps >= self.max_steps or (self.max_minutes is not None and seconds >= 60 * self.max_minutes)

    @property
    def full_finetuning(self) -> bool:
        return self.lora == "none"

    @property
    def ailments(self) -> Collection[str]:
        """Names of what each step is looked at for."""
        return WITHOUT_REWARDS

    @property
    def trackers(self) -> list[str]:
        return [name for name in split_names(self.report_to) if name != "none"]

    @property
    def updates(self) -> int:
        """Disjoint parts of a step's samples, each with an optimizer step."""
        return 1

    @property
    def epochs(self) -> int:
        """Passes over a step's samples."""
        return 1


@config
class OnPolicyConfig(TrainConfig):
    """Options of trainers that learn from their own samples."""

    algorithm: str | None = option(None, "Your own algorithm instead: path/to/file.py:Class.", "run")
    num_generations: int = option(8, "Completions for each prompt.", "rollout", first=True, above=0)
    keep_rollouts: bool = option(
        True, "Keep every rollout, tokens and log-probabilities too, in rollouts/step_*.parquet.", "run"
    )
    rollouts_from: str | None = option(
        None,
        "Train on the rollouts that another run kept (its directory) instead of new ones; a policy gradient is "
        "corrected for that. Rewards that are named score them anew.",
        "rollout",
    )
    dynamic_sampling: int = option(
        0,
        "Rounds in which groups without spread are replaced by groups of new prompts (DAPO); 0: they stay.",
        "rollout",
        least=0,
    )
    overlong_buffer: int = option(
        0,
        "Completions lose up to 1 reward, linearly, over the last so many tokens before the limit (DAPO).",
        "reward",
        least=0,
    )
    mask_truncated_completions: bool = option(
        False, "Completions cut off at the limit stay out of the loss.", "training"
    )
    updates_per_step: int = option(
        1, "Optimizer steps a rollout gives, on disjoint sets of whole groups.", "training", above=0
    )
    epochs_per_step: int = option(1, "Passes over each rollout.", "training", above=0)
    norm: Norm = option(
        "token", "What a token weighs: token 1/N, sequence 1/(S len), constant 1/(S max_completion_length).", "training"
    )
    kl_coef: float = option(0.0, "Weight of the KL from the starting policy.", "training", first=True, least=0)
    kl_in: Literal["reward", "loss"] = option("reward", "Where the KL enters.", "training")
    kl_estimator: Literal["k1", "k2", "k3"] = option("k1", "How it is estimated from each token.", "training")
    kl_target: float | None = option(
        None, "Steer kl_coef so that the KL of a token comes to this.", "training", above=0
    )
    ref_refresh_steps: int = option(
        0, "The reference becomes the policy every so many steps; 0: never.", "training", least=0
    )

    def validate(self) -> None:
        super().validate()
        groups = f"each update takes whole groups, so at most prompts_per_step={self.prompts_per_step}"
        self.require(self.updates_per_step <= self.prompts_per_step, "updates_per_step", groups)
        self.require(
            self.overlong_buffer < self.max_completion_length,
            "overlong_buffer",
            "it must be below max_completion_length",
        )
        self.require(
            self.kl_target is None or self.kl_coef > 0, "kl_target", "it steers kl_coef, which must start above 0"
        )
        several = not self.dynamic_sampling or self.num_generations > 1
        self.require(several, "dynamic_sampling", "a group of one answer has no spread; give more num_generations")
        refers = self.ref_refresh_steps == 0 or self.has_reference
        self.require(refers, "ref_refresh_steps", "with kl_coef 0 there is no reference to refresh")

    @property
    def ailments(self) -> Collection[str]:
        return DIAGNOSES

    @property
    def has_reference(self) -> bool:
        """Whether anything compares the policy with a reference."""
        return self.kl_coef > 0

    @property
    def updates(self) -> int:
        return self.updates_per_step

    @property
    def epochs(self) -> int:
        return self.epochs_per_step

    @property
    def prompts_in_flight(self) -> int:
        """Prompts that are being answered at once."""
        return self.prompts_per_step


@config
class PolicyGradientConfig(OnPolicyConfig):
    """Options of algorithms that weigh log-probabilities by advantages."""

    partial_rollouts: float | None = option(
        None,
        "A step's rollout ends when this share of the prompts in flight is answered, prompts_per_step of them; what is "
        "not finished goes on in the next step, under its weights. None: a step waits for its longest answer.",
        "rollout",
        above=0,
        below=1,
    )
    partial_max_age: int = option(
        4, "With partial_rollouts: steps after its first by which an answer must be done.", "rollout", above=0
    )
    partial_too_old: Literal["finish", "drop"] = option(
        "finish",
        "What becomes of older ones: finish, the step waits for them; drop, their prompt's answers are left out.",
        "rollout",
    )
    policy_loss: Literal["clipped", "sequence", "gspo", "cispo", "sapo"] = option(
        "clipped",
        "clipped: a ratio for each token; sequence: one, their product; gspo: one, their geometric mean; "
        "cispo: clipped weights on log-probabilities; sapo: a soft gate.",
        "training",
    )
    clip_low: float = option(0.2, "Ratios below 1 - clip_low earn nothing more.", "training", above=0, below=1)
    clip_high: float | None = option(
        None, "Ratios above 1 + clip_high earn nothing more; none: as clip_low.", "training", above=0
    )
    dual_clip: float | None = option(None, "With a negative advantage the loss is at most -A times this.", "training")
    sapo_tau_pos: float = option(1.0, "SAPO's temperature where the advantage is positive.", "training", above=0)
    sapo_tau_neg: float = option(1.05, "SAPO's temperature where it is negative.", "training", above=0)
    whiten_advantages: Literal["auto", "on", "off"] = option(
        "auto", "Advantages of an update to mean 0 and std 1; auto: REINFORCE with baseline none or group.", "training"
    )
    entropy_coef: float = option(0.0, "Weight of an entropy bonus.", "training")
    top_entropy_fraction: float = option(
        1.0, "Only this share of tokens, the least certain ones, gets an advantage.", "training", above=0, most=1
    )
    importance_correction: Literal["none", "token", "sequence", "geometric"] = option(
        "none",
        "Weigh the loss by trainer over engine probability: of a token, a sequence, or its geometric mean.",
        "training",
    )
    importance_cap: float = option(2.0, "Such weights are cut off here.", "training", above=0)

    def validate(self) -> None:
        super().validate()
        dual = self.dual_clip is None or self.dual_clip > 1
        self.require(dual, "dual_clip", "it must be above 1, for a ratio of 1 must not be cut")
        clips = self.dual_clip is None or self.policy_loss in ("clipped", "sequence", "gspo")
        self.require(clips, "dual_clip", f"policy_loss {self.policy_loss} has no such clip")

    @property
    def prompts_in_flight(self) -> int:
        return math.ceil(round(self.prompts_per_step / (self.partial_rollouts or 1), 6))

    @property
    def clip_range(self) -> tuple[float, float]:
        return self.clip_low, self.clip_low if self.clip_high is None else self.clip_high


@config
class CriticConfig(PolicyGradientConfig):
    """Options of algorithms with a critic."""

    gamma: float = option(1.0, "Discount of rewards to come.", "training", least=0, most=1)
    lam: float = option(0.95, "GAE's lambda: 1 trusts returns, 0 the critic.", "training", first=True, least=0, most=1)
    critic_learning_rate: float = option(1e-5, "Peak learning rate of the critic.", "training", first=True, above=0)
    critic_model_name_or_path: str | None = option(
        None, "A model of its own for the critic; none: a second adapter.", "training"
    )
    value_clip: float = option(
        0.2, "How far a value may move from its old one before it earns nothing more.", "training", above=0
    )
    value_init_prompts: int = option(
        500,
        "Before the first update the critic learns from the answers to so many prompts; 0, or rollouts_from: none.",
        "training",
        least=0,
    )
    value_init_epochs: int = option(
        10,
        "Its epochs at most; the best on held-out prompts stays. 0: only the head, by least squares.",
        "training",
        least=0,
    )
    value_init_learning_rate: float = option(1e-4, "Its learning rate, for adapter and head.", "training", above=0)

    def validate(self) -> None:
        super().validate()
        apart = not self.full_finetuning or bool(self.critic_model_name_or_path)
        self.require(
            apart, "lora", "without an adapter the critic cannot share the base; give critic_model_name_or_path"
        )
