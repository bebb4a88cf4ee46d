"""Steps as on a card, beside the same on the CPU; results go to a file as JSON: `cases.py COMPILER FOLDER OUT`."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

from tests.cuda_on_cpu import card

if __name__ == "__main__":
    card.insert(card.build(sys.argv[1], Path(sys.argv[2])))

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from nanorlhf import assembly
from nanorlhf.formulas import losses
from nanorlhf.grpo import GRPOTrainer
from nanorlhf.learning.critic import Critic
from nanorlhf.learning.learner import PolicyLearner
from nanorlhf.loop import Loop
from nanorlhf.memory.plan import MOVES
from nanorlhf.memory.rehearsal import is_needed, rehearse
from nanorlhf.memory.residency import Offloadable, Residency
from nanorlhf.policy import attention, logprobs
from nanorlhf.policy.policy import Policy
from nanorlhf.ppo import PPOTrainer
from nanorlhf.records.metrics import Averages
from nanorlhf.rollouts.source import Source
from nanorlhf.system.terminal import log
from nanorlhf.tasks.arithmetic import arithmetic
from nanorlhf.trainer import Trainer
from nanorlhf.types import MicroBatch, Rollout
from tests.cuda_on_cpu import counts
from tests.cuda_on_cpu.kernels import Watch, register
from tests.memory.test_residency import SUM, a_plan
from tests.models import HYBRID, SERVED, tiny
from tests.samples import rollout, sample, together

Plant = Callable[[pytest.MonkeyPatch], Any]


@dataclass(frozen=True)
class Case:
    """A step of an algorithm, from the moment it has its samples."""

    algorithm: str = "grpo"
    options: dict[str, Any] = field(default_factory=dict)
    architecture: str = "qwen2"  # or a model that is shipped
    layers: int = 2
    siblings: bool = False  # whether answers share their group's prompt, which is then longer than a window
    common: int = 0  # tokens with which both prompts begin


PARKED = {"gradient_checkpointing": True, "activation_offload": "on"}
CASES = {
    **{name: Case("grpo", {"kl_coef": 0.1}, name) for name in (*SERVED, *HYBRID)},
    **{name: Case("grpo", {"policy_loss": name}) for name in ("sequence", "gspo", "cispo", "sapo")},
    **{f"by {name}": Case("grpo", {"importance_correction": name}) for name in ("token", "sequence", "geometric")},
    "entropy": Case("grpo", {"entropy_coef": 0.01, "top_entropy_fraction": 0.5, "whiten_advantages": "on"}),
    "two by two": Case("grpo", {"updates_per_step": 2, "epochs_per_step": 2, "kl_coef": 0.1, "dual_clip": 3.0}),
    "float32": Case("grpo", {"dtype": "float32"}),
    "all weights": Case("grpo", {"lora": "none", "kl_coef": 0.1}),
    "all weights, float32": Case("grpo", {"lora": "none", "dtype": "float32", "kl_coef": 0.1}),
    "all weights, bfloat16": Case("grpo", {"lora": "none", "dtype": "bfloat16"}),
    **{f"siblings, {name}": Case("grpo", {"kl_coef": 0.1}, name, siblings=True) for name in ("mistral", "gemma2")},
    **{
        f"begun alike, {name}": Case("grpo", {"kl_coef": 0.1}, name, siblings=True, common=9)
        for name in ("mistral", "gemma2")
    },
    "siblings, recomputed": Case("grpo", {"gradient_checkpointing": True}, "mistral", siblings=True),
    "deep": Case("grpo", {"kl_coef": 0.1}, "qwen3", 5),
    "deep, recomputed": Case("grpo", {"gradient_checkpointing": True, "kl_coef": 0.1}, "qwen3", 5),
    "deep, parked": Case("grpo", PARKED | {"kl_coef": 0.1}, "qwen3", 5),
    **{name: Case(name) for name in ("ppo", "rloo", "remax", "raft", "reinforce", "sft", "dpo", "online_dpo")},
    "ppo, parked": Case("ppo", PARKED),
    "ppo, own critic": Case("ppo", {"critic_model_name_or_path": "nanorlhf:adder"}, "nanorlhf:adder", 3),
}


class Given(Source):
    """The same samples at every step, two groups of four."""

    def __init__(self, algorithm: str, siblings: bool = False, common: int = 0) -> None:
        made, size = [sample(3 + i % 4, 4 + 2 * i, seed=i) for i in range(8)], 2 if algorithm == "dpo" else 4
        self.samples = rollout(together(made, size, 12) if siblings else made, group_size=size)
        for s in self.samples.samples:
            s.prompt.ids[:common] = range(common)
        self.samples.baselines = torch.full((8,), 0.5)
        if algorithm in {"sft", "dpo"}:
            self.samples.rewards, self.samples.columns = torch.tensor([1.0, 0.0] * 4), {}

    def rollout(self, step: int, clock: Any, progress: Any) -> Rollout:
        return self.samples


def loop_of(case: Case, device: str) -> Loop:
    """The loop on this device; weights do not depend on it."""
    module, options = import_module(f"nanorlhf.{case.algorithm}"), dict(case.options)
    if case.algorithm not in {"sft", "dpo"}:
        options = {"num_generations": 4} | options
    given = {
        "model_name_or_path": case.architecture, "device": device, "lora_r": 4, "lora_alpha": 4, "prompts_per_step": 2,
        "token_budget": 60, "max_prompt_length": 6, "max_completion_length": 18, "gradient_checkpointing": False,
    }  # fmt: skip
    name = next(n for n in module.__all__ if n.endswith("Config"))
    config, model = getattr(module, name)(**given | options), None
    if not case.architecture.startswith("nanorlhf:"):
        model = tiny(case.architecture, num_hidden_layers=case.layers)
        if device == "cpu" and config.dtype == "auto" and not config.full_finetuning:
            config = replace(config, dtype="bfloat16")  # as it is on the card
    torch.manual_seed(0)
    policy = Policy(config, model)
    for p in policy.trainable.values():
        p.data += (0.02 * torch.randn(p.shape)).to(p)
    algorithm = getattr(module, name.removesuffix("Config"))(config)
    if "ref_logprobs" in algorithm.needs:
        policy.keep_reference()
    critic = Critic(config, policy) if case.algorithm == "ppo" else None
    return Loop(config, algorithm, policy, Given(case.algorithm, case.siblings, case.common), critic=critic)


@contextlib.contextmanager
def allowed(extra: int) -> Iterator[None]:
    """With so many bytes of the card beside those that are taken."""
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + extra) / card.TOTAL)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(2.0)


HEARD = BufferingHandler(10**6)


def said() -> list[str]:
    """The lines of the log since this was last asked."""
    lines = [record.getMessage() for record in HEARD.buffer]
    HEARD.flush()
    return lines


def play(case: Case, device: str, room: int = card.TOTAL) -> tuple[list[Tensor], dict[str, Any]]:
    """A step on this device: the gradients that its optimizers see, and what the watch saw."""
    loop, seen = loop_of(case, device), list[Tensor]()

    def keep(adam: torch.optim.Optimizer, *_: Any) -> None:
        with _disable_current_modes():
            learning = [p for group in adam.param_groups for p in group["params"]]
            seen.append(torch.cat([p.grad.flatten().cpu().float() for p in learning]))

    for optimizer in [learner.optimizer for learner in loop.learners]:
        optimizer.adam.register_step_pre_hook(keep)
    torch.cuda.reset_peak_memory_stats()
    gc.collect()  # what an earlier case left would go meanwhile
    before = torch.cuda.memory_allocated()
    said()
    with allowed(room), Watch() as watch:
        loop.step(1)
    more = {"waits": dict(card.waits), "peak": torch.cuda.max_memory_allocated() - before, "warnings": said()}
    return seen, watch.seen | more


@functools.cache
def on_cpu(name: str) -> list[Tensor]:
    """The gradients of a case, in the arithmetic that the card would choose."""
    with pytest.MonkeyPatch.context() as patch:
        if CASES[name].options.get("dtype") is None:
            patch.setattr(Policy, "compute_dtype", torch.bfloat16)
        return play(CASES[name], "cpu")[0]


def apart(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """The distance of gradients from others, as a share of these."""
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]


def on_card(name: str, plant: Plant = lambda patch: None) -> dict[str, Any]:
    """A case on the card, with a mistake or none."""
    expected = on_cpu(name)
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        found, seen = play(CASES[name], "cuda")
    return seen | {"apart": apart(found, expected)}


def wrapped(owner: Any, name: str, change: Callable[..., Any]) -> Plant:
    """A function in whose place `change(function, *its arguments)` is called."""
    function = getattr(owner, name)
    return lambda patch: patch.setattr(owner, name, lambda *args, **options: change(function, *args, **options))


def left_behind(name: str) -> Plant:
    """A batch one of whose fields stays on the CPU."""
    return wrapped(MicroBatch, "to", lambda to, b, device: replace(to(b, device), **{name: getattr(b, name)}))


def loss_through(change: Callable[[Tensor], Tensor]) -> Plant:
    """A loss that is changed on its way."""
    return wrapped(losses, "clipped_surrogate", lambda surrogate, *args: change(surrogate(*args)))


def shorter(kernel: Any, *args: Any, window_size: tuple[int, int], **options: Any) -> Tensor:
    return kernel(*args, window_size=(max(-1, window_size[0] - 1), 0), **options)


def wider(kernel: Any, q: Tensor, k: Tensor, v: Tensor, *ends: Any, **options: Any) -> Tensor:
    return kernel(q, k, v, *(e.long() if isinstance(e, Tensor) else e for e in ends), **options)


# A mistake, and a word of what has to be said about it.
PLANTED: dict[str, tuple[Plant, str]] = {
    "targets stay on the CPU": (left_behind("targets"), "same device"),
    "weights stay on the CPU": (left_behind("weights"), "same device"),
    "predict_at stays on the CPU": (left_behind("predict_at"), "mixed: {'policy.Policy.logprobs"),
    "a part of the loss is made on the CPU": (loss_through(lambda x: x + torch.zeros(len(x))), "same device"),
    "the loss is looked at": (loss_through(lambda x: x * (1 if x.max().item() else 2)), "PolicyGradient.loss: _local"),
    "the loss is picked by a mask": (loss_through(lambda x: x[x == x]), "PolicyGradient.loss: index"),  # noqa: PLR0124
    "the loss is float64": (loss_through(torch.Tensor.double), "float64: {'algorithm"),
    "a batch is waited for": (
        wrapped(MicroBatch, "to", lambda f, b, to: replace(f(b, to), sample=b.sample.to(to))),
        "on_device: copy to",
    ),
    "the card is waited for": (
        wrapped(PolicyLearner, "backward", lambda f, *a: (torch.cuda.synchronize(), f(*a))[1]),
        "learn: synchronize",
    ),
    "a figure is read twice": (
        wrapped(Averages, "add", lambda f, *a: (f(*a), f(*a))),
        "Averages.add: _local_scalar_dense': 24",
    ),
    "the head multiplies float32": (
        wrapped(logprobs, "wide_product", lambda f, a, b: f(a.float(), b.float())),
        "products.product: float32",
    ),
    "attention goes segment by segment": (wrapped(attention, "fits_kernel", lambda *_: False), "'_varlen_attn': 0"),
    "a window is one token short": (wrapped(attention, "varlen_attn", shorter), "apart: "),
    "segments end in 64 bits": (wrapped(attention, "varlen_attn", wider), "int32"),
    "Adam is not fused": (wrapped(torch.optim, "AdamW", lambda f, *a, fused, **o: f(*a, **o)), "'_fused_adamw_': 0"),
}


def runs_out() -> dict[str, Any]:
    """A step whose one row does not fit."""
    gc.collect()
    whole, small = (Case("grpo", {"dtype": "float32", "token_budget": tokens}) for tokens in (200, 60))
    (expected, most), (_, least) = play(whole, "cuda"), play(small, "cuda")
    found, seen = play(whole, "cuda", room=(most["peak"] + least["peak"]) // 2)
    return seen | {"apart": apart(found, expected), "fits": least["peak"], "does not": most["peak"]}


def rehearsed() -> dict[str, Any]:
    """The rehearsal of PPO, and again with less memory than it took."""
    loop = loop_of(Case("ppo", {"token_budget": "auto"}), "cuda")
    weights, told, tokens, peak = [p.clone() for p in loop.policy.trainable.values()], [], [], card.TOTAL
    gc.collect()
    before = torch.cuda.memory_allocated()
    said()
    for share in (1.0, 0.7):
        loop.passes.tokens = 480
        torch.cuda.reset_peak_memory_stats()
        with allowed(int(share * peak)):
            if is_needed(loop.config, loop.policy.device):
                rehearse(loop.learners, loop.passes, loop.config, loop.algorithm.together)
            told.append(said())
        tokens.append(loop.passes.tokens)
        peak = torch.cuda.max_memory_allocated() - before
    gc.collect()
    same = all(a.equal(b) for a, b in zip(loop.policy.trainable.values(), weights, strict=True))
    left = torch.cuda.memory_allocated() - before
    return {"told": told, "tokens": tokens, "at_once": loop.passes.at_once, "same": same, "left": left}


def moving(trainer: type[Trainer], **options: Any) -> dict[str, Any]:
    """Two runs in numbers, the clock's apart: in one everybody stays, in the other everybody moves."""
    gc.freeze()  # each move collects garbage, for which there is no need to look at torch's modules
    given = {"device": "cuda", "token_budget": 2048, "learning_rate": 1e-3, "reward_workers": 0, "max_steps": 3}
    misplaced, fused = list[str](), list[bool | None]()

    def check(prepare: Any, residency: Residency, wanted: Any) -> None:
        prepare(residency, wanted)
        for unit, boxes in residency.units.items():
            tensors = [t for box in boxes if isinstance(box, Offloadable) for t in box.tensors]
            misplaced.extend(unit for t in tensors if t.is_cuda == (unit in residency.away))

    def history(folder: Path) -> list[dict[str, Any]]:
        config = trainer.config_class(output_dir=str(folder), prompts_per_step=4, **SUM | given | options)
        run = trainer(args=config, train_dataset=arithmetic("train").select(range(64)))
        clock = ("time/", "throughput/", "memory/", "value_init/seconds")
        steps = [{k: v for k, v in step.items() if not k.startswith(clock)} for step in run.train()]
        learned = [p.detach().cpu().double().abs().sum().item() for p in run.policy.trainable.values()]
        return [*steps, {"learned": sum(learned)}]

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        wrapped(Residency, "prepare", check)(patch)
        wrapped(torch.optim, "AdamW", lambda f, *a, **o: (fused.append(o["fused"]), f(*a, **o))[1])(patch)
        patch.setattr(assembly, "plan_memory", lambda *_: a_plan())
        still = history(Path(folder, "still"))
        patch.setattr(assembly, "plan_memory", lambda *_: a_plan(*MOVES))
        moved = history(Path(folder, "moving"))
    return {"still": still, "moving": moved, "misplaced": misplaced, "fused": fused}


OTHERS: dict[str, Callable[[], dict[str, Any]]] = {
    "moving, grpo": partial(moving, GRPOTrainer, kl_coef=0.1, num_generations=4, updates_per_step=2),
    "moving, all": partial(moving, GRPOTrainer, kl_coef=0.1, num_generations=4, lora="none", ref_refresh_steps=1),
    "moving, ppo": partial(moving, PPOTrainer, value_init_prompts=40, value_init_epochs=1),
    "moving, own critic": partial(moving, PPOTrainer, value_init_prompts=0, critic_model_name_or_path="nanorlhf:adder"),
    "memory runs out": runs_out,
    "rehearsed": rehearsed,
    # As in torch 2.11, whose kernel does not share them.
    "heads repeated": lambda: on_card("mistral", lambda patch: patch.setattr(attention, "GQA", {})),
    "a layer": counts.both,
}


def verified(name: str) -> dict[str, Any]:
    """Packed rows on the card against the model's own attention there."""
    loop_of(CASES[name], "cuda").policy.verify()
    return {}


def main(out: Path) -> None:
    """Everything."""
    log.addHandler(HEARD)
    register()
    work: dict[str, Callable[[], Any]] = {name: partial(on_card, name) for name in CASES}
    work |= {f"verify {name}": partial(verified, name) for name in (*SERVED, *HYBRID)}
    work |= {name: partial(on_card, "mistral", plant) for name, (plant, _) in PLANTED.items()} | OTHERS
    results = {}
    for name, run in work.items():
        try:
            results[name] = {"error": None, **run()}
        except Exception:  # noqa: BLE001  whatever one dies of, the others go on
            results[name] = {"error": traceback.format_exc()}
    out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[3]))
