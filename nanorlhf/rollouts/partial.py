"""Rollouts that do not wait for their longest answers: what is not finished goes on in the next step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nanorlhf.algorithm import Samples
from nanorlhf.config.training import PolicyGradientConfig
from nanorlhf.data.prompts import Prompts
from nanorlhf.engines.base import Request
from nanorlhf.records.metrics import Clock
from nanorlhf.rollouts.on_policy import OnPolicySource
from nanorlhf.rollouts.sampler import Sampler
from nanorlhf.system.seeds import derive
from nanorlhf.system.terminal import log
from nanorlhf.types import Progress, Prompt, Rollout, Sample

State = dict[str, Any]


@dataclass(slots=True)
class Group:
    """The answers to one prompt, the greedy one last if there is one."""

    place: int  # of the prompt in the run's order
    begun: int  # the step in which its first token was due
    samples: list[Sample]
    done: list[bool]  # which of them are finished

    @property
    def complete(self) -> bool:
        return all(self.done)


class PartialRollouts(OnPolicySource):
    """Samples of whole groups, begun in this step or in one before it (arXiv:2501.12599, arXiv:2509.18521).

    More prompts are being answered than a step takes. It ends as soon as enough groups are complete; those it does not
    take wait, the unfinished answers among them to go on with the next step's weights. Between steps they are kept as a
    checkpoint has them, so that a resumed run begins a step as any other.
    """

    config: PolicyGradientConfig

    def __init__(self, config: PolicyGradientConfig, wanted: Samples, sampler: Sampler, prompts: Prompts) -> None:
        super().__init__(config, wanted, sampler, prompts)
        self.size, self.oldest = config.prompts_per_step, config.partial_max_age
        self.after: dict[int, State] = {}  # by step; the last two, for a step that broke off may be asked for again
        self.known: dict[int, Prompt] = {}  # by place

    def rollout(self, step: int, clock: Clock, progress: Progress) -> Rollout:
        """The oldest complete groups, as many as a step takes."""
        with clock("rollout"):
            groups, following, dropped = self.begin(step)
            written = self.write(groups, step, progress)
        complete = [group for group in groups if group.complete]
        taken, each = complete[: self.size], self.wanted.each
        places = {group.place for group in taken}
        left = [group for group in groups if group.place not in places]
        self.sampler.scorer.withdraw([s for group in complete[self.size :] for s in group.samples])
        samples = [s for group in taken for s in group.samples[:each]]
        rollout = self.scored(samples, [s for group in taken for s in group.samples[each:]], clock)
        rollout.written = written
        rollout.columns["age"] = self.ages(samples)
        unfinished = [s for group in left for s, done in zip(group.samples, group.done, strict=True) if not done]
        rollout.figures = {
            "partial/carried": len(unfinished),
            "partial/carried_tokens": sum(len(s.completion_ids) for s in unfinished),
            "partial/dropped": dropped,
        }
        before = {step - 1: self.after[step - 1]} if step - 1 in self.after else {}
        self.after = before | {step: packed(left, following)}
        return rollout

    def begin(self, step: int) -> tuple[list[Group], int, int]:
        """The groups of this step, the oldest first, the place of the next one, and how many answers were dropped."""
        state = self.after.get(step - 1)
        groups = self.unpacked(state) if state else []
        old = [g for g in groups if step - g.begun > self.oldest] if self.config.partial_too_old == "drop" else []
        groups = groups[len(old) :]
        first = state["following"] if state else (step - 1) * self.size
        following = first + max(self.config.prompts_in_flight - len(groups), 0)
        rows = self.wanted.each + self.wanted.greedy
        for place in range(first, following):
            samples = [Sample(self.prompt(place), [], [], False, "", versions=[]) for _ in range(rows)]
            groups.append(Group(place, step, samples, [False] * rows))
        self.known = {group.place: group.samples[0].prompt for group in groups}
        return groups, following, rows * len(old)

    def write(self, groups: Sequence[Group], step: int, progress: Progress) -> int:
        """Lets the engine go on with what is not finished until there is enough; gives the tokens that it wrote."""
        sampler, written = self.sampler, 0
        answers = [(group, i) for group in groups for i in range(len(group.samples))]
        asked = [self.request(n, group, i) for n, (group, i) in enumerate(answers) if not group.done[i]]
        for group in groups:
            self.score(group)
        with sampler.residency.phase("generate"):
            sampler.engine.forget()
            seed = derive(self.config.seed, "step", step)
            for completion in sampler.engine.generate(asked, seed, enough=lambda: self.enough(groups, step)):
                group, i = answers[completion.id]
                sample, count = group.samples[i], len(completion.token_ids)
                sampler.extend(sample, completion, last=True)
                sample.versions = [*(sample.versions or []), *[sampler.engine.version] * count]
                group.done[i], written = completion.ended, written + count
                self.score(group)
                progress(count)
        return written

    def request(self, number: int, group: Group, row: int) -> Request:
        """The rest of an answer; the end of what is there may be the beginning of a stop string."""
        sample, longest = group.samples[row], max(map(len, self.config.stop_strings), default=0)
        asked = self.sampler.request(number, sample, row >= self.wanted.each, self.sampler.limit)
        return replace(asked, begun=sample.completion_ids[-longest:] if longest else [])

    def score(self, group: Group) -> None:
        """Hands the answers to the rewards once all of them are done, so that a step scores what it takes."""
        if group.complete:
            for sample in group.samples:
                self.sampler.scorer.begin(sample)

    def enough(self, groups: Sequence[Group], step: int) -> bool:
        """Whether as many groups are complete as the step takes, and enough of the old ones among them.

        If none may be dropped, those that must be done after so many steps more have to fit into these steps.
        """
        complete = [group.begun for group in groups if group.complete]
        if len(complete) < self.size or self.config.partial_too_old == "drop":
            return len(complete) >= self.size
        for more in range(self.oldest):
            due = step - self.oldest + more
            ready = sum(begun <= due for begun in complete)
            if sum(group.begun <= due for group in groups) - min(ready, self.size) > more * self.size:
                return False
        return True

    def ages(self, samples: Sequence[Sample]) -> Tensor:
        """(N,) the steps' updates between the weights that wrote a token and those of now."""
        versions = torch.tensor([version for s in samples for version in s.versions or []])
        return (self.sampler.engine.version - versions) / (self.config.updates * self.config.epochs)

    def prompt(self, place: int) -> Prompt:
        """The prompt at a place in the run's order."""
        return self.known.get(place) or self.prompts.batch(place, 1)[0]

    def unpacked(self, state: State) -> list[Group]:
        """The groups as they were when they were packed."""
        groups, lengths, rows = list[Group](), state["lengths"].tolist(), self.wanted.each + self.wanted.greedy
        flat = (state[name].split(lengths) for name in ("ids", "logprobs", "versions"))
        parts = zip(*flat, state["stopped"].tolist(), strict=True)
        for place, begun, done in zip(*(state[name].tolist() for name in ("place", "begun", "done")), strict=True):
            group = Group(place, begun, [], done)
            for i, (ids, logprobs, versions, stopped) in enumerate([next(parts) for _ in done]):
                sample = Sample(self.prompt(place), ids.tolist(), logprobs.tolist(), stopped, "")
                sample.text, sample.versions = self.sampler.text(sample, sample.completion_ids), versions.tolist()
                group.samples.append(sample)
                done[i] = done[i] or len(ids) >= self.sampler.limit  # which may be lower than it was
            groups.append(group)
        asked = zip(groups, state["asked"], strict=True)
        same = [len(group.done) == rows and group.samples[0].prompt.ids == ids for group, ids in asked]
        if not all(same):
            log.warning(f"{same.count(False)} prompts in flight are other ones by now, or have more answers: left out")
        return [group for group, fits in zip(groups, same, strict=True) if fits]

    def state_dict(self, step: int) -> State:
        """The groups that wait after this step."""
        return {"step": step, "waiting": self.after.get(step)}

    def load_state_dict(self, state: State) -> None:
        self.after = {state["step"]: state["waiting"]} if state.get("waiting") else {}


def packed(groups: Sequence[Group], following: int) -> State:
    """Groups, and the place of the next one, as a checkpoint has them."""
    samples = [sample for group in groups for sample in group.samples]
    return {
        "following": following,
        "asked": [group.samples[0].prompt.ids for group in groups],
        "place": torch.tensor([group.place for group in groups]),
        "begun": torch.tensor([group.begun for group in groups]),
        "done": torch.tensor([group.done for group in groups]),
        "stopped": torch.tensor([s.stopped for s in samples]),
        "lengths": torch.tensor([len(s.completion_ids) for s in samples]),
        "ids": torch.tensor([x for s in samples for x in s.completion_ids], dtype=torch.int32),
        "logprobs": torch.tensor([x for s in samples for x in s.engine_logprobs], dtype=torch.double),
        "versions": torch.tensor([x for s in samples for x in s.versions or []], dtype=torch.int32),
    }
