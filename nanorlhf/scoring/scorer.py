"""Samples to rewards: each completion goes to the workers once it is written, and all are waited for at the end."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from nanorlhf.config.training import TrainConfig
from nanorlhf.errors import RewardError, UsageError
from nanorlhf.memory.residency import Residency
from nanorlhf.scoring.reward import EPISODES, Reward, TrainerState, Verdict, judge
from nanorlhf.scoring.workers import Pool, packable, without_secrets
from nanorlhf.system.distributed import world
from nanorlhf.system.terminal import log
from nanorlhf.types import Sample

COMPARED = 8  # completions in the one call that shows whether a reward judges each for itself


@dataclass(slots=True)
class Tally:
    """Counts and faults of one reward since the last report."""

    count: int = 0
    unscored: int = 0
    faults: list[tuple[str, Any, str]] = field(default_factory=list)  # what it died of, prompt and completion
    seconds: float = 0.0
    logged: dict[str, list[float]] = field(default_factory=partial(defaultdict, list))

    def metrics(self, name: str) -> dict[str, float]:
        """Time, how many scores there are not, and what the function logged."""
        return {
            f"time/reward/{name}": self.seconds,
            f"reward/{name}/unscored": self.unscored,
            f"reward/{name}/failed": len(self.faults),
            **{f"reward/{name}/{metric}": sum(values) / len(values) for metric, values in self.logged.items()},
        }


class Scorer:
    """The rewards of a run, at work in their own processes or, without any, in the trainer's."""

    def __init__(self, rewards: Sequence[Reward], config: TrainConfig, residency: Residency | None = None) -> None:
        self.rewards, self.config, self.residency = rewards, config, residency or Residency()
        self.at(0)
        self.away: set[str] = set()  # rewards that the workers have
        for reward in rewards if config.workers else []:
            why = "" if reward.in_trainer or EPISODES & reward.names else packable(reward)
            if why is None:
                self.away.add(reward.name)
            elif why:
                log.warning(f"reward {reward.name!r} runs in the trainer, for no worker can have it: {why}")
        chosen = [reward for reward in rewards if reward.name in self.away]
        given = without_secrets(os.environ, config.reward_secrets)
        self.pool = Pool(chosen, config.workers, int(config.reward_memory_gib * 2**30), given) if chosen else None
        self.alone = {r.name for r in chosen if not r.is_async and r.name not in config.reward_together}
        self.unproven = {r.name for r in chosen if r.name in self.alone and not r.ships}  # to judge one like several
        self.begun: dict[int, dict[str, Future[Verdict]]] = {}
        self.forget()

    def at(self, step: int) -> None:
        """Tells rewards that so many steps are done."""
        self.state = TrainerState(step, self.config.max_steps)

    def forget(self) -> None:
        self.tallies = {reward.name: Tally() for reward in self.rewards}

    def begin(self, sample: Sample) -> None:
        """Hands a completion to those workers that judge each for itself."""
        arguments = self.arguments([sample]) if self.alone else {}
        self.begun[id(sample)] = {
            reward.name: self.submit(reward, arguments, 1) for reward in self.rewards if reward.name in self.alone
        }

    def withdraw(self, samples: Sequence[Sample]) -> None:
        """Forgets that these were begun: they come again."""
        for sample in samples:
            for future in self.begun.pop(id(sample)).values():
                future.cancel()

    def submit(self, reward: Reward, arguments: Mapping[str, Any], count: int) -> Future[Verdict]:
        assert self.pool is not None
        limit = self.config.reward_timeout if count == 1 else self.config.reward_step_timeout
        return self.pool.submit(reward.name, reward.wanted(arguments), count, limit)

    def finish(self, samples: Sequence[Sample]) -> None:
        """Fills each sample's rewards, and its total: None if no function of a weight could score it, or one failed."""
        if not samples:
            return
        begun = [self.begun.pop(id(sample)) for sample in samples]
        everything = self.arguments(samples)
        asked = {
            reward.name: self.submit(reward, everything, len(samples))
            for reward in self.rewards
            if reward.name in self.away - self.alone
        }
        calls = {futures[name]: (name, [s]) for s, futures in zip(samples, begun, strict=True) for name in futures}
        self.watch(calls | {future: (name, samples) for name, future in asked.items()}, len(samples))
        for reward in self.rewards:
            if reward.name in self.alone:
                for sample, futures in zip(samples, begun, strict=True):
                    self.take(reward, futures[reward.name].result(), [sample])
                self.prove(reward, samples)
            elif reward.name in asked:
                self.take(reward, asked[reward.name].result(), samples)
            else:
                with self.residency.phase("score"):
                    verdict = judge(reward, everything | self.at_home(samples), len(samples))
                self.take(reward, verdict, samples)
        self.refuse_the_broken(self.tallies)
        for sample in samples:
            terms = [(r.weight, sample.rewards[r.name]) for r in self.rewards if r.weight]
            scored = [weight * value for weight, value in terms if value is not None]
            sample.reward = sum(scored) if scored and not sample.fault else None

    def score(self, samples: Sequence[Sample]) -> None:
        """Both at once, for samples that are all there."""
        for sample in samples:
            self.begin(sample)
        self.finish(samples)

    def take(self, reward: Reward, verdict: Verdict, samples: Sequence[Sample]) -> None:
        """Notes a call's scores with the samples, and what else there is to say."""
        tally = self.tallies[reward.name]
        tally.seconds += verdict.seconds
        tally.count += len(samples)
        tally.faults += failures(verdict, samples)
        for sample, score, fault in zip(samples, verdict.scores, verdict.faults, strict=True):
            sample.rewards[reward.name] = score
            if fault and reward.weight:
                sample.fault = f"{reward.name}: {fault}"
            elif score is None and not fault:
                tally.unscored += 1
        for name, value in verdict.metrics:
            tally.logged[name].append(value)
        for column, values in verdict.extras.items():
            for sample, value in zip(samples, values, strict=False):
                sample.extras[column] = value

    def prove(self, reward: Reward, samples: Sequence[Sample]) -> None:
        """Refuses, once, a reward that judges several completions in one call otherwise than each alone."""
        few = samples[:COMPARED]
        if reward.name not in self.unproven or len(few) < 2 or any(s.rewards[reward.name] is None for s in few):
            return
        self.unproven.remove(reward.name)
        together = self.submit(reward, self.arguments(few), len(few)).result().scores
        for sample, score in zip(few, together, strict=True):
            alone = sample.rewards[reward.name]
            if alone is not None and score is not None and abs(alone - score) > 1e-6 * max(1, abs(alone)):
                raise UsageError(
                    f"reward {reward.name!r} gives the same completion {alone:g} in a call of its own and {score:g} "
                    f"among others: it compares them, or is random; --reward_together {reward.name} has it judge a "
                    f"whole step in one call"
                )

    def watch(self, calls: Mapping[Future[Verdict], tuple[str, Sequence[Sample]]], size: int) -> None:
        """Waits for the workers; ends the run as soon as a reward has failed too often for `size` completions more."""
        tallies = {name: Tally(tally.count + size, faults=[*tally.faults]) for name, tally in self.tallies.items()}
        for call in as_completed(calls):
            name, samples = calls[call]
            tallies[name].faults += failures(call.result(), samples)
            self.refuse_the_broken({name: tallies[name]})

    def refuse_the_broken(self, tallies: Mapping[str, Tally]) -> None:
        """Ends the run if one reward has failed too often."""
        for name, tally in tallies.items():
            if len(tally.faults) > self.config.reward_failure_limit * tally.count:
                raise RewardError(f"{described(name, tally)}\n  (more than reward_failure_limit allows)")

    def report(self, where: str = "") -> dict[str, float]:
        """Gives the metrics since the last report, and warns of failures, each with an example."""
        metrics: dict[str, float] = {}
        everyone = world().gather(self.tallies)
        tallies = {name: joined([tallies[name] for tallies in everyone]) for name in self.tallies}
        for name, tally in tallies.items():
            metrics |= tally.metrics(name)
            if tally.faults:
                log.warning(where + described(name, tally))
        self.forget()
        return metrics

    def arguments(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The arguments of reward functions: prompts, completions, their tokens, every dataset column, the state."""
        columns = dict.fromkeys(name for s in samples for name in s.prompt.columns)  # a stream's rows may differ
        arguments: dict[str, Any] = {name: [s.prompt.columns.get(name) for s in samples] for name in columns}
        return arguments | {
            "prompts": [s.prompt.text for s in samples],
            "completions": [as_completion(s) for s in samples],
            "completion_ids": [s.completion_ids for s in samples],
            "trainer_state": self.state,
        }

    def at_home(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Arguments of rewards in the trainer alone: the environments of the episodes, and what they returned."""
        if samples[0].returned is None and "environment" not in samples[0].rewards:
            return {}
        return {
            "environments": [s.environment for s in samples],
            "environment_returns": [s.returned for s in samples],
        }

    def close(self) -> None:
        """Ends the workers."""
        if self.pool is not None:
            self.pool.end()


def failures(verdict: Verdict, samples: Sequence[Sample]) -> list[tuple[str, Any, str]]:
    """The faults of a call, with the prompt and the completion, for each of these samples that it failed on."""
    judged = zip(samples, verdict.faults, strict=True)
    return [(fault, sample.prompt.text, sample.text) for sample, fault in judged if fault]


def joined(tallies: Sequence[Tally]) -> Tally:
    """Those of all processes as one."""
    whole = Tally()
    for tally in tallies:
        whole.count += tally.count
        whole.unscored += tally.unscored
        whole.faults += tally.faults
        whole.seconds += tally.seconds
        for name, values in tally.logged.items():
            whole.logged[name] += values
    return whole


def as_completion(sample: Sample) -> Any:
    """Text for a text prompt, an assistant's message for a conversation."""
    return sample.text if isinstance(sample.prompt.text, str) else [{"role": "assistant", "content": sample.text}]


def described(name: str, tally: Tally) -> str:
    """A reward's failures in words, with an example to try."""
    fault, prompt, completion = tally.faults[0]
    return (
        f"reward {name!r} failed on {len(tally.faults)} of {tally.count} completions: it {fault}\n"
        f"  prompt: {prompt!r}\n  completion: {completion!r}"
    )
