"""Before training: the longest sample and a full row, there and back, so that a budget that cannot be is known now."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from nanorlhf.learning.packing import pack
from nanorlhf.learning.passes import TooLongError
from nanorlhf.system import random_state
from nanorlhf.system.device import empty_cache
from nanorlhf.types import MicroBatch, Prompt, Rollout, Sample

if TYPE_CHECKING:
    from nanorlhf.learning.optimizer import Optimizer
    from nanorlhf.loop import Loop


def rehearse(loop: Loop) -> None:
    """Lowers the loop's budget until both fit; weights, optimizers and random numbers stay as they are.

    Where not even the longest sample fits, activations are recomputed from now on, if that was left open.
    """
    planned = loop.budget.tokens
    if passes(loop):
        return
    # Out here the failed call's tensors have gone with its frames.
    empty_cache()
    for body in loop.bodies:
        body.recompute()
    loop.budget.tokens, loop.budget.lowered = planned, False
    loop.budget.remarks = ["activations take more than was planned, so they are recomputed: gradient_checkpointing"]
    passes(loop)


def passes(loop: Loop) -> bool:
    """Whether there is a budget that fits; an error where nothing more can be done about it."""
    try:
        try_out(loop)
    except TooLongError:
        if loop.config.gradient_checkpointing != "auto" or loop.policy.recomputes:
            raise
        return False
    return True


def try_out(loop: Loop) -> None:
    """The longest sample and a full row, in ever smaller rows."""
    config, together = loop.config, loop.algorithm.together
    longest = (config.max_prompt_length + config.max_completion_length) * together
    before = random_state.random_state()

    def everything() -> None:
        for tokens in (longest, max(longest, loop.token_budget)):
            for batch in rows(loop, longest, 0 if loop.policy.one_per_row else tokens):
                there_and_back(loop, batch.to(loop.policy.device))

    lengths = [longest] * (1 if loop.policy.one_per_row else -(-loop.token_budget // longest))
    try:
        with loop.policy.training(), filled(loop.optimizers):
            loop.budget.fit("rehearsal", lengths, everything, lambda: None)
    finally:
        loop.clear()
        random_state.restore_random(before)


def rows(loop: Loop, longest: int, tokens: int) -> list[MicroBatch]:
    """A row of samples as long as they come, and what is left of `tokens`; mostly of answers, which cost most."""
    together = loop.algorithm.together
    prompt = max(1, min(loop.config.max_prompt_length, longest // together - loop.config.max_completion_length))
    units = [longest] * max(1, tokens // longest)
    if tokens > longest and tokens % longest >= 2 * together:
        units.append(tokens % longest)
    vocabulary = loop.policy.base.config.get_text_config().vocab_size
    samples = []
    for length in (unit // together for unit in units for _ in range(together)):
        ids = (torch.arange(length) % vocabulary).tolist()
        asked = min(prompt, length - 1)
        samples.append(Sample(Prompt(0, ids[:asked], "", {}), ids[asked:], [], True, ""))
    rollout = Rollout(samples, torch.zeros(len(samples), dtype=torch.long), torch.zeros(len(samples)))
    everything = torch.ones(len(samples), dtype=torch.bool)
    weights = torch.zeros(int(rollout.lengths.sum()))
    return list(pack(rollout, everything, weights, sum(units), loop.policy.one_per_row, together))


def there_and_back(loop: Loop, batch: MicroBatch) -> None:
    """What an update does with a row, the critic's share too."""
    logprobs, entropy = loop.policy.logprobs(batch, entropy_grad=loop.algorithm.entropy_grad)
    total = logprobs.sum() + entropy.sum() if entropy.requires_grad else logprobs.sum()
    (0.0 * total).backward()
    critic = loop.critic
    if critic is not None:
        with critic.active(), critic.body.training():
            (0.0 * critic.evaluate(critic.features(batch)).sum()).backward()


@contextlib.contextmanager
def filled(optimizers: list[Optimizer]) -> Iterator[None]:
    """With gradients and moments in their places, as they will be from the second micro-batch and step on."""
    parameters = [p for optimizer in optimizers for p in optimizer.parameters]
    held: list[nn.Parameter | torch.Tensor] = []
    for p in parameters:
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        held += [torch.empty_like(p) for p in optimizer.parameters if p not in optimizer.adam.state for _ in range(2)]
    yield
    held.clear()
