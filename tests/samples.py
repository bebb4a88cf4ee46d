"""Samples and rollouts made up for tests."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from nanorlhf.learning.learner import Part
from nanorlhf.loop import Loop
from nanorlhf.types import Credit, MicroBatch, Prompt, Rollout, Sample
from tests.docs.pages import DOCS, blocks


def sample(
    prompt: int = 4, completion: int = 6, vocabulary: int = 64, seed: int = 0, own: list[bool] | None = None
) -> Sample:
    """Random tokens of the given lengths."""
    draw = random.Random(f"{prompt}/{completion}/{seed}")
    ids = [draw.randrange(vocabulary) for _ in range(prompt + completion)]
    trained = completion if own is None else sum(own)
    logprobs = [-draw.random() for _ in range(trained)]
    return Sample(Prompt(seed, ids[:prompt], "p", {}), ids[prompt:], logprobs, True, "c", own=own, reward=draw.random())


def rollout(samples: list[Sample], group_size: int = 1) -> Rollout:
    """A rollout of these samples, in groups of `group_size`."""
    return Rollout(
        samples=samples,
        group=torch.arange(len(samples)) // group_size,
        rewards=torch.tensor([float("nan") if s.reward is None else s.reward for s in samples]),
        columns={"engine_logprobs": torch.tensor([x for s in samples for x in s.engine_logprobs])},
    )


def together(samples: list[Sample], group_size: int, prompt: int) -> list[Sample]:
    """The same, each group of them with one prompt of so many tokens."""
    for i, s in enumerate(samples):
        s.prompt = sample(prompt, 1, seed=1000 + i // group_size).prompt
    return samples


R1 = (  # a chat template of DeepSeek-R1's kind: thoughts of earlier turns are dropped, the next one is begun
    "{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>user\n{{ m['content'] }}"
    "{% else %}<|im_start|>assistant\n{{ m['content'].split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def turns(*contents: str) -> list[dict[str, str]]:
    """A conversation that the user begins."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def said(text: str) -> list[dict[str, str]]:
    """The assistant's turn."""
    return [{"role": "assistant", "content": text}]


def snippet(name: str) -> str:
    """The documentation's code that begins with the comment `# name`."""
    found = [block.text for page in DOCS for block in blocks(page) if block.name == name]
    assert found, f"no page shows {name}"
    return found[-1]


def expect_close(got: torch.Tensor, want: Sequence[float], tolerance: float = 1e-5) -> None:
    """The numbers worked out by hand."""
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float32), atol=tolerance, rtol=0)


def updated(loop: Loop, rollout: Rollout, credit: Credit, trained: torch.Tensor) -> dict[str, Any]:
    """The figures of an update."""
    return loop.update(rollout, credit, trained).metrics(loop.algorithm, rollout, trained)


def batches(loop: Loop, rollout: Rollout, credit: Credit, trained: torch.Tensor) -> list[MicroBatch]:
    """The rows of one update."""
    weights = loop.weigh(rollout, credit, trained, trained)
    (attempt,) = loop.passes.attempts("update", rollout, trained, weights, loop.algorithm.together)
    return list(attempt.rows())


def whole(rollout: Rollout) -> Part:
    """An update's only part."""
    return Part(torch.ones(len(rollout.samples), dtype=torch.bool), int(rollout.lengths.sum()), first=True)
