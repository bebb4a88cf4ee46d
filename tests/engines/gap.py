"""The distance of an engine from the policy that it serves."""

from __future__ import annotations

import torch

from nanorlhf.engines.base import Engine, Request
from nanorlhf.learning.packing import pack
from nanorlhf.policy.policy import Policy
from nanorlhf.types import Prompt, Sample
from tests.models import VOCABULARY
from tests.samples import rollout


def gap(policy: Policy, engine: Engine) -> float:
    """Nats by which the two differ about a token, after all that learns was moved."""
    draw = torch.Generator().manual_seed(policy.version)
    for p in policy.trainable.values():
        p.data += 0.05 * torch.randn(p.shape, generator=draw)
    policy.version += 1
    engine.update(policy)
    asked = [Request(i, torch.randint(3, VOCABULARY, (20 + i,), generator=draw).tolist()) for i in range(6)]
    written = sorted(engine.generate(asked, seed=0), key=lambda c: c.id)
    samples = [
        Sample(Prompt(r.id, r.prompt_ids, "", {}), c.token_ids, c.logprobs, c.stopped, "")
        for r, c in zip(asked, written, strict=True)
    ]
    made = rollout(samples)
    (row,) = pack(made, torch.ones(6, dtype=torch.bool), torch.zeros(int(made.lengths.sum())), 4096)
    with torch.no_grad():
        return (policy.logprobs(row)[0] - row.columns["engine_logprobs"]).abs().mean().item()
