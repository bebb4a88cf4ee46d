"""Prompts to scored samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nanorlhf.advantages import has_spread
from nanorlhf.algorithm import Samples
from nanorlhf.data import Prompts
from nanorlhf.engines.base import Completion, Engine, Request, Sampling
from nanorlhf.environments import Environment, Stage
from nanorlhf.metrics import Clock
from nanorlhf.options import OnPolicyConfig
from nanorlhf.residency import Residency
from nanorlhf.scoring import Scorer
from nanorlhf.seeds import derive
from nanorlhf.task import TaskConfig
from nanorlhf.team import team
from nanorlhf.types import Prompt, Rollout, Sample

Progress = Callable[[int], object]  # told how many tokens have just arrived


class Source(Protocol):
    """Where a step's samples come from."""

    def rollout(self, step: int, clock: Clock, progress: Progress) -> Rollout:
        """The samples of step `step`, counted from 1; the same ones each time it is asked."""
        ...


class Author:
    """Prompts to samples: completions by the engine, episodes where there is an environment, rewards as they finish."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        scorer: Scorer,
        limit: int,
        stage: Stage | None = None,
        turns: int = 1,
        residency: Residency | None = None,
    ) -> None:
        self.engine, self.tokenizer, self.scorer, self.limit = engine, tokenizer, scorer, limit
        self.stage, self.turns = stage, turns if stage else 1
        self.residency = residency or Residency()

    def write(
        self,
        prompts: Sequence[Prompt],
        wanted: Samples,
        seed: int,
        sampling: Sampling | None = None,
        progress: Progress = lambda tokens: None,
    ) -> tuple[list[Sample], list[Sample]]:
        """Samples in the order of the prompts, and each prompt's greedy one where planned; not scored to the end.

        Among several processes these are those of one's own share of the prompts; `shared` gives everyone all.
        """
        each, rank = wanted.each, team().rank
        prompts, seed = team().share(prompts), derive(seed, "process", rank) if rank else seed
        samples = [Sample(prompt, [], [], False, "") for prompt in prompts for _ in range(each)]
        greedy = [Sample(prompt, [], [], False, "") for prompt in prompts if wanted.greedy]
        everyone, limit = [*samples, *greedy], sampling.max_new_tokens if sampling else self.limit
        if self.stage:
            for sample in everyone:
                self.stage.open(sample)
        playing = list(range(len(everyone)))
        for turn in range(self.turns):
            if not playing:
                break
            asked = [self.request(i, everyone[i], i >= len(samples), limit) for i in playing]
            playing = []
            with self.residency.phase("generate"):
                if not turn:
                    self.engine.forget()
                for completion in self.engine.generate(asked, derive(seed, "turn", turn) if turn else seed, sampling):
                    sample = everyone[completion.id]
                    if self.extend(sample, completion, turn == self.turns - 1):
                        playing.append(completion.id)
                    else:
                        self.scorer.begin(sample)
                    progress(len(completion.token_ids))
            playing.sort()
        assert not playing and all(s.completion_ids for s in everyone), "the engine must finish every request"
        return samples, greedy

    def request(self, number: int, sample: Sample, greedy: bool, limit: int) -> Request:
        """The sample's next turn."""
        context, room = [*sample.prompt.ids, *sample.completion_ids], limit - len(sample.completion_ids)
        return Request(number, context, greedy, room)

    def extend(self, sample: Sample, completion: Completion, last: bool) -> bool:
        """Takes what the engine wrote into the sample; True where the episode goes on."""
        ids = completion.token_ids
        sample.completion_ids = sample.completion_ids + ids
        sample.engine_logprobs = sample.engine_logprobs + completion.logprobs
        sample.stopped = completion.stopped
        written = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        if self.stage is None:
            sample.text = sample.prompt.prefill + written
            return False
        assert sample.own is not None
        sample.own += [True] * len(ids)
        if self.stage.goes_on(sample, completion, sample.prompt.prefill + written, last):
            return True
        whole = str(self.tokenizer.decode(sample.completion_ids, skip_special_tokens=True))
        sample.text = sample.prompt.prefill + whole
        return False


def make_author(
    config: TaskConfig,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    scorer: Scorer,
    ends: tuple[int, ...],
    environment: type[Environment] | None,
    residency: Residency | None = None,
) -> Author:
    """Who writes the completions that this task asks for, or plays its episodes."""
    limit = config.max_completion_length
    if environment is None:
        return Author(engine, tokenizer, scorer, limit, residency=residency)
    stage = Stage(environment, tokenizer, ends, limit, config.chat_template_kwargs)
    return Author(engine, tokenizer, scorer, limit, stage, config.max_turns, residency)


class Sampler:
    """The policy's own samples of a step."""

    def __init__(self, config: OnPolicyConfig, wanted: Samples, author: Author, prompts: Prompts) -> None:
        self.config, self.wanted, self.author, self.prompts = config, wanted, author, prompts

    def rollout(self, step: int, clock: Clock, progress: Progress) -> Rollout:
        """A step's samples; groups without spread are replaced for some rounds, where that is asked for."""
        size = self.config.prompts_per_step
        rollout = self.sample(self.prompts.batch(step - 1, size), ("step", step), clock, progress)
        for attempt in range(self.config.dynamic_sampling):
            teaching = has_spread(rollout.rewards, rollout.group)
            wanting = size - len(rollout.group[teaching].unique())
            if not wanting:
                break
            fresh = self.sample(self.prompts.beside(wanting, step, attempt), ("refill", step, attempt), clock, progress)
            rollout = refilled(rollout, fresh)
        return rollout

    def sample(
        self, prompts: Sequence[Prompt], what: tuple[str | int, ...], clock: Clock, progress: Progress
    ) -> Rollout:
        """Samples for these prompts, with the occasion's seed; the engine's log-probabilities are the first column."""
        seed, each = derive(self.config.seed, *what), self.wanted.each
        with clock("rollout"):
            samples, greedy = self.author.write(prompts, self.wanted, seed, progress=progress)
        with clock("reward"):
            self.author.scorer.finish([*samples, *greedy])
            if self.config.overlong_buffer:
                punish_overlong(samples, self.config.max_completion_length, self.config.overlong_buffer)
            samples, greedy = shared(samples), shared(greedy)
        return Rollout(
            samples=samples,
            group=torch.arange(len(prompts)).repeat_interleave(each),
            rewards=as_tensor(samples),
            written=sum(s.trained for s in [*samples, *greedy]),
            baselines=as_tensor(greedy).repeat_interleave(each) if greedy else None,
            columns={"engine_logprobs": torch.tensor([x for s in samples for x in s.engine_logprobs])},
        )


def shared(samples: Sequence[Sample]) -> list[Sample]:
    """The samples of all processes; the other side of an episode, which has had its say, stays where it is."""
    if team().size == 1:
        return list(samples)
    return team().joined([replace(sample, environment=None, returned=None) for sample in samples])


def as_tensor(samples: Sequence[Sample]) -> Tensor:
    """(S,) rewards, NaN where there is none."""
    return torch.tensor([float("nan") if s.reward is None else s.reward for s in samples])


def punish_overlong(samples: Sequence[Sample], limit: int, buffer: int) -> None:
    """DAPO's soft punishment (arXiv:2503.14476): from 0 where the last `buffer` tokens begin to -1 at the limit."""
    for s in samples:
        excess = max(0, len(s.completion_ids) - (limit - buffer))
        if s.reward is not None:
            s.reward -= excess / buffer


def refilled(rollout: Rollout, fresh: Rollout) -> Rollout:
    """As many groups as before: those with spread from both, then as many of the others as are wanting."""
    groups = int(rollout.group.max()) + 1
    both = rollout.followed_by(fresh)
    teaching = has_spread(both.rewards, both.group)
    order = sorted(range(int(both.group.max()) + 1), key=lambda g: (not teaching[both.group == g].any(), g))
    return both.groups(order[:groups])
