"""A trial before training: the longest sample and a full row, forward and backward, to see whether memory holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from nanorlhf.config.training import TrainConfig
from nanorlhf.learning.learner import Learner
from nanorlhf.learning.optimizer import Optimizer
from nanorlhf.learning.packing import pack
from nanorlhf.learning.passes import Passes, TooLongError
from nanorlhf.system import random_state
from nanorlhf.system.device import empty_cache
from nanorlhf.system.terminal import EACH, log
from nanorlhf.types import MicroBatch, Prompt, Rollout, Sample


def is_needed(config: TrainConfig, device: torch.device) -> bool:
    """Whether the budget is ours to choose, on a card, whose memory is small."""
    return device.type == "cuda" and config.token_budget == "auto" and not config.shard_base


def rehearse(learners: Sequence[Learner], passes: Passes, config: TrainConfig, together: int) -> None:
    """Lowers the budget until both fit; weights, optimizers and random numbers stay as they are.

    If not even the longest sample fits, activations are recomputed from now on, provided that this was left open.
    """
    planned = passes.tokens
    if fits(learners, passes, config, together):
        return
    # Out here the failed call's tensors have gone with its frames.
    empty_cache()
    for learner in learners:
        learner.body.recompute()
    passes.tokens, passes.lowered = planned, False
    log.warning("activations take more than was planned, so they are recomputed: gradient_checkpointing", extra=EACH)
    fits(learners, passes, config, together)


def fits(learners: Sequence[Learner], passes: Passes, config: TrainConfig, together: int) -> bool:
    """Whether there is a budget that fits; an error if nothing more can be done about it."""
    try:
        try_out(learners, passes, config, together)
    except TooLongError:
        if config.gradient_checkpointing != "auto" or learners[0].body.recomputes:
            raise
        return False
    return True


def try_out(learners: Sequence[Learner], passes: Passes, config: TrainConfig, together: int) -> None:
    """The longest sample and a full row, in ever smaller rows."""
    longest = config.max_prompt_length + config.max_completion_length * together
    vocabulary = learners[0].body.base.config.get_text_config().vocab_size
    before = random_state.random_state()

    def rows() -> Iterator[MicroBatch]:
        for tokens in (longest, max(longest, passes.tokens)):
            wanted = 0 if passes.one_per_row else tokens
            for row in full_rows(config, vocabulary, longest, wanted, together):
                yield row.to(learners[0].body.device)

    whole = longest if passes.one_per_row else max(longest, passes.tokens)
    optimizers = [learner.optimizer for learner in learners]
    try:
        with filled(optimizers):
            for attempt in passes.retries("rehearsal", longest, whole, rows, undo=lambda: None):
                with attempt as tried:
                    for row in tried:
                        for learner in learners:
                            learner.rehearse(row)
    finally:
        for optimizer in optimizers:
            optimizer.clear()
        random_state.restore_random(before)


def full_rows(config: TrainConfig, vocabulary: int, longest: int, tokens: int, together: int) -> list[MicroBatch]:
    """A row of samples as long as they come, and what is left of `tokens`; mostly of answers, which cost most."""
    prompt = max(1, min(config.max_prompt_length, longest - config.max_completion_length * together))
    units = [longest] * max(1, tokens // longest)
    if tokens > longest and tokens % longest >= 2 * together:
        units.append(tokens % longest)
    samples = []
    for number, length in enumerate(units):  # no two prompts are the same: it would come once
        answer = (length - min(prompt, length - together)) // together
        ids = [(number + k) % vocabulary for k in range(length)]
        asked = Prompt(number, ids[: length - answer * together], "", {})
        samples += [Sample(asked, ids[-answer:], [], True, "") for _ in range(together)]
    group = torch.arange(len(units)).repeat_interleave(together)
    rollout = Rollout(samples, group, torch.zeros(len(samples)))
    everything = torch.ones(len(samples), dtype=torch.bool)
    weights = torch.zeros(int(rollout.lengths.sum()))
    return list(pack(rollout, everything, weights, sum(units) if tokens else 0, together))


@contextlib.contextmanager
def filled(optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """With gradients and moments in their places, as they will be from the second micro-batch and step on."""
    parameters = [p for optimizer in optimizers for p in optimizer.parameters]
    held: list[nn.Parameter | torch.Tensor] = []
    for p in parameters:
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        held += [torch.empty_like(p) for p in optimizer.parameters if p not in optimizer.adam.state for _ in range(2)]
    yield
    held.clear()
