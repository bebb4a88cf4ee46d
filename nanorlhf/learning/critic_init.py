"""A critic that knows what the starting policy earns, before step 1: head by least squares, adapter by descent."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanorlhf.formulas.advantages import reward_to_go, token_rewards
from nanorlhf.learning.critic import Critic
from nanorlhf.learning.passes import Attempt, Passes, Rows
from nanorlhf.records.metrics import explained_variance
from nanorlhf.system import random_state
from nanorlhf.system.distributed import world
from nanorlhf.system.files import whole_folder
from nanorlhf.system.seeds import derive
from nanorlhf.system.terminal import log
from nanorlhf.types import Rollout

FOLDER, WEIGHTS, RESULT = "value_init", "critic.safetensors", "result.json"
EVERY = 5  # one prompt in so many is held out
BATCH = 16  # episodes in an optimizer step
PATIENCE = 2  # epochs that may pass without a better held-out explained variance
RIDGES = [10.0**k for k in range(-6, 3)]  # penalties on the head, as shares of its input's mean variance

Write = Callable[[], tuple[Rollout, Tensor]]
Result = dict[str, Any]


def initialise(critic: Critic, passes: Passes, run: Path, write: Write, phase: AbstractContextManager[None]) -> Result:
    """Teaches the critic once in a run's life, and gives the metrics of it; a run that goes on takes what is kept.

    `write` gives episodes of the starting policy, and which of them count; `phase` has the critic on the card.
    """
    folder = run / FOLDER
    if not world().first_only(folder.is_dir):
        before = random_state.random_state()
        learned = learn(critic, passes, write, phase)
        world().first_only(lambda: keep(folder, *learned))
        random_state.restore_random(before)  # what follows is the same, whether this was done now or earlier
    critic.restore(load_file(folder / WEIGHTS))
    return json.loads((folder / RESULT).read_text())


def keep(folder: Path, weights: dict[str, Tensor], result: Result) -> None:
    """Writes the folder so that it is there whole or not at all."""
    with whole_folder(folder) as draft:
        save_file(weights, draft / WEIGHTS)
        (draft / RESULT).write_text(json.dumps(result, indent=1) + "\n")


def learn(
    critic: Critic, passes: Passes, write: Write, phase: AbstractContextManager[None]
) -> tuple[dict[str, Tensor], Result]:
    """The critic's weights after it saw episodes of the starting policy, and how well they explain held-out ones."""
    start = time.perf_counter()
    rollout, usable = write()
    rollout.columns["returns"] = returns(rollout, critic.config.gamma)
    held_out = rollout.group % EVERY == 0
    log.info(f"value initialisation: {int(usable.sum())} episodes in {time.perf_counter() - start:.0f} s")
    study = Study(critic, passes, rollout, usable & ~held_out, usable & held_out)
    with phase:
        before = study.explained()
        study.solve_head()
        with_head = study.explained()
        epochs = study.fit() if with_head is not None else 0
        after = study.explained()
    seconds = time.perf_counter() - start
    shown = " -> ".join("-" if x is None else f"{x:.3f}" for x in (before, with_head, after))
    log.info(
        f"value initialisation: explained variance of held-out returns {shown} "
        f"(untrained, head, {epochs} epochs of head and adapter), {seconds:.0f} s"
    )
    named = {
        "explained_variance_before": before,
        "explained_variance_head": with_head,
        "explained_variance_after": after,
        "epochs": epochs,
        "episodes": int(usable.sum()),
        "seconds": seconds,
    }
    return critic.snapshot(), {f"value_init/{name}": value for name, value in named.items()}


def returns(rollout: Rollout, gamma: float) -> Tensor:
    """(N,) Monte-Carlo returns; no KL is in their rewards, for the policy still is the reference."""
    scores = rollout.rewards.nan_to_num(0.0)
    rewards = token_rewards(scores, torch.zeros(int(rollout.lengths.sum())), rollout.lengths)
    return reward_to_go(rewards, rollout.lengths, gamma)


class Study:
    """Episodes to learn from, and episodes to be examined on."""

    def __init__(self, critic: Critic, passes: Passes, rollout: Rollout, train: Tensor, held_out: Tensor) -> None:
        self.critic, self.passes, self.rollout = critic, passes, rollout
        self.train, self.held_out = train, held_out

    def attempts(self, chosen: Tensor) -> Iterator[Attempt]:
        """Attempts at the samples `chosen (S,)`."""
        return self.passes.attempts("value initialisation", self.rollout, chosen)

    @torch.no_grad()
    def explained(self) -> float | None:
        """Explained variance of the held-out returns."""
        mine: list[tuple[Tensor, Tensor]] = []
        for attempt in self.attempts(self.held_out):
            with attempt as rows:
                mine = [
                    (self.critic.values(row).cpu(), row.columns["returns"].cpu()) for row in self.critic.on_device(rows)
                ]
        if not (pairs := world().concat(mine)):
            return None
        return explained_variance(*(torch.cat(column) for column in zip(*pairs, strict=True)))

    @torch.no_grad()
    def solve_head(self) -> None:
        """Ridge regression of returns on features: exact, in one pass; held-out episodes choose the penalty."""
        if not self.train.any():
            return
        mean, covariance = self.moments(self.train)
        inputs, towards = covariance[:-1, :-1], covariance[:-1, -1]
        variances, directions = torch.linalg.eigh(inputs)
        along = directions.T @ towards
        scale = inputs.diagonal().mean()
        weights = [directions @ (along / (variances.clamp(min=0) + ridge * scale)) for ridge in RIDGES if scale > 0]
        weights.append(torch.zeros_like(towards))  # if nothing carries over, the mean is the best guess
        _, unseen = self.moments(self.held_out) if self.held_out.any() else (mean, covariance)
        misses = [float(w @ unseen[:-1, :-1] @ w - 2 * w @ unseen[:-1, -1]) for w in weights]
        best = weights[misses.index(min(misses))]
        self.critic.head.weight.copy_(best[None])
        self.critic.head.bias.copy_(mean[-1] - mean[:-1] @ best)

    def moments(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """(H + 1,) means and (H + 1, H + 1) covariance of features and return, with no more kept than these."""
        count, total, products = torch.zeros(3)
        for attempt in self.attempts(chosen):
            with attempt as rows:
                count, total, products = self.sums(rows)
        world().sum([count, total, products])
        mean = total / int(count.item())
        return mean, products / int(count.item()) - mean.outer(mean)

    def sums(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """The number of these rows' tokens, and the sums of their features and returns and of the products of these."""
        size = self.critic.head.in_features + 1
        device = torch.device("cpu") if self.critic.body.device.type == "mps" else self.critic.body.device  # no float64
        count, total = 0, torch.zeros(size, dtype=torch.double, device=device)
        products = torch.zeros(size, size, dtype=torch.double, device=device)
        with self.critic.active():
            for row in self.critic.on_device(rows):
                both = torch.cat([self.critic.features(row), row.columns["returns"][:, None]], 1)
                both = both.to(device).double()
                count, total, products = count + len(both), total + both.sum(0), products + both.T @ both
        return torch.tensor([count], dtype=torch.double), total, products

    def fit(self) -> int:
        """Adapter and head by Adam while the held-out explained variance rises; the best epoch's weights stay."""
        critic, limit = self.critic, self.critic.config.value_init_epochs
        adam = torch.optim.Adam(critic.weights.values(), critic.config.value_init_learning_rate)
        order = torch.Generator().manual_seed(derive(critic.config.seed, "value_init"))
        best, best_epoch, weights = self.explained(), 0, critic.snapshot()
        for epoch in range(1, limit + 1):
            trained = self.train.nonzero().flatten()
            for chosen in trained[torch.randperm(len(trained), generator=order)].split(BATCH):
                self.descend(chosen, adam)
            now = self.explained()
            log.info(f"value initialisation: epoch {epoch} of at most {limit}, explained variance {now or 0.0:.3f}")
            if now is not None and best is not None and now > best:
                best, best_epoch, weights = now, epoch, critic.snapshot()
            elif epoch - best_epoch >= PATIENCE:
                break
        critic.restore(weights)
        return best_epoch

    def descend(self, chosen: Tensor, adam: torch.optim.Optimizer) -> None:
        """One step on the squared error of the samples at `chosen`."""
        mask = torch.zeros_like(self.train).index_fill(0, chosen, True)
        total = int(self.rollout.lengths[chosen].sum())
        for attempt in self.attempts(mask):
            with attempt as rows, self.critic.learning():
                for row in self.critic.on_device(rows):
                    error = self.critic.evaluate(self.critic.features(row)) - row.columns["returns"]
                    (0.5 * (error**2).sum() / total).backward()
        weights = list(self.critic.weights.values())
        world().sum_gradients(weights, 0.0)
        nn.utils.clip_grad_norm_(weights, self.critic.config.max_grad_norm)
        adam.step()
        adam.zero_grad(set_to_none=True)
