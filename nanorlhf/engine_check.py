"""Whether the engine writes what the policy would: tried out before the first step, and once more after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from nanorlhf.engines.base import MISMATCH_LIMIT, Request, Sampling, refresh
from nanorlhf.engines.restart import Restarting
from nanorlhf.errors import RunError
from nanorlhf.learning.packing import pack
from nanorlhf.memory.residency import Residency
from nanorlhf.policy.policy import Policy
from nanorlhf.system.distributed import world
from nanorlhf.system.seeds import derive
from nanorlhf.types import Prompt, Rollout, Sample

COMPLETIONS, TOKENS, PROMPT = 4, 16, 64  # compared, each at most, and the end of the prompt that they follow
SHIFT = 0.5  # nats a token by which random weights differ from the run's own at least
SMALLEST, LARGEST = 2e-3, 0.3  # noise that is tried
NOBODYS = -2  # the version of random weights


class EngineCheck:
    """A few tokens, and both log-probabilities of each."""

    def __init__(
        self,
        policy: Policy,
        engine: Restarting,
        residency: Residency,
        prompt: Prompt,
        sampling: Sampling,
        seed: int,
    ) -> None:
        self.policy, self.engine, self.residency = policy, engine, residency
        self.sampling = replace(sampling, temperature=policy.temperature)
        self.prompt = Prompt(0, prompt.ids[-PROMPT:], "", {})
        self.seed = derive(seed, "engine check")
        self.version: int | None = None  # that the policy had before its first update

    def before_training(self) -> None:
        """Compares under random weights, for a new adapter is nothing yet; then the engine has the run's own."""
        with self.randomised():
            self.compare("random weights")
        self.version = self.policy.version
        with self.residency.phase("generate"):
            refresh(self.engine, self.policy)

    def after_step(self) -> None:
        """Compares under the weights of the first update, once."""
        if self.version is not None and self.version != self.policy.version:
            self.version = None
            self.compare("the first update")

    def compare(self, weights: str) -> None:
        """Ends the run if the engine's log-probabilities of what it writes are not the policy's."""
        asked = [Request(i, self.prompt.ids, max_tokens=TOKENS) for i in range(COMPLETIONS)]
        with self.residency.phase("generate"):
            refresh(self.engine, self.policy)
            written = list(self.engine.generate(asked, self.seed, self.sampling))
        said = torch.tensor([x for c in written for x in c.logprobs])
        own = self.logprobs([Sample(self.prompt, c.token_ids, c.logprobs, c.stopped, "") for c in written])
        limit = MISMATCH_LIMIT[self.policy.compute_dtype]
        gaps = world().gather((own - said).abs().mean().item())
        if not all(gap <= limit for gap in gaps):
            raise RunError(
                f"{self.engine.described} and the trainer differ by {max(gaps):.2g} nats a token under {weights}, "
                f"and {limit:g} is allowed; use {self.engine.instead}; with engine_check off it would go on so"
            )

    @torch.no_grad()
    def logprobs(self, samples: Sequence[Sample]) -> Tensor:
        """(N,) the policy's log-probabilities of the samples' tokens."""
        rollout = Rollout(list(samples), torch.zeros(len(samples), dtype=torch.long), torch.zeros(len(samples)))
        every, found = torch.ones(len(samples), dtype=torch.bool), torch.zeros(int(rollout.lengths.sum()))
        tokens = 0 if self.policy.one_per_row else sum(sample.row_length for sample in samples)
        with self.residency.phase("measure"):
            for row in pack(rollout, every, found, tokens):
                found[row.tokens] = self.policy.logprobs(row.to(self.policy.device))[0].cpu()
        return found

    @contextmanager
    def randomised(self) -> Iterator[None]:
        """With noise on all that learns; copies bring back every bit."""
        learned, version = list(self.policy.trainable.values()), self.policy.version
        kept = [p.detach().to("cpu", copy=True) for p in learned]
        self.policy.version = NOBODYS
        try:
            self.disturb(learned, kept)
            yield
        finally:
            self.policy.version = version
            with torch.no_grad():
                for p, before in zip(learned, kept, strict=True):
                    p.copy_(before)

    @torch.no_grad()
    def disturb(self, learned: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
        """As much noise as makes the prompt's tokens more or less probable by SHIFT nats; drawn apart from the run's
        random numbers."""
        tokens = [Sample(self.prompt, self.prompt.ids, [], False, "")]
        before, size, shift = self.logprobs(tokens), SMALLEST, 0.0
        while shift < SHIFT and size < LARGEST:
            draw = torch.Generator(self.policy.device).manual_seed(self.seed)
            for p, own in zip(learned, kept, strict=True):
                p.copy_(own)
                p.add_(torch.randn(p.shape, generator=draw, device=p.device, dtype=p.dtype), alpha=size)
            shift = min(world().gather((self.logprobs(tokens) - before).abs().mean().item()))
            size *= 2
