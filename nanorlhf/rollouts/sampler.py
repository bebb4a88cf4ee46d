"""Prompts to scored samples."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from nanorlhf.algorithm import Samples
from nanorlhf.engines.base import Completion, Engine, Request, Sampling
from nanorlhf.environments.episodes import Episodes
from nanorlhf.memory.residency import Residency
from nanorlhf.scoring.scorer import Scorer
from nanorlhf.system.distributed import world
from nanorlhf.system.seeds import derive
from nanorlhf.types import Progress, Prompt, Sample


class Sampler:
    """Prompts to samples: completions by the engine, episodes if there is an environment, rewards as they finish."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        scorer: Scorer,
        limit: int,
        episodes: Episodes | None = None,
        turns: int = 1,
        residency: Residency | None = None,
    ) -> None:
        self.engine, self.tokenizer, self.scorer, self.limit = engine, tokenizer, scorer, limit
        self.episodes, self.turns = episodes, turns if episodes else 1
        self.residency = residency or Residency()

    def write(
        self,
        prompts: Sequence[Prompt],
        wanted: Samples,
        seed: int,
        sampling: Sampling | None = None,
        progress: Progress = lambda tokens: None,
    ) -> tuple[list[Sample], list[Sample]]:
        """Samples in the order of the prompts, and each prompt's greedy one if planned; not scored to the end.

        Among several processes these are those of one's own share of the prompts; `shared` gives all to each process.
        """
        each, rank = wanted.each, world().rank
        prompts, seed = world().share(prompts), derive(seed, "process", rank) if rank else seed
        samples = [Sample(prompt, [], [], False, "") for prompt in prompts for _ in range(each)]
        greedy = [Sample(prompt, [], [], False, "") for prompt in prompts if wanted.greedy]
        everyone, limit = [*samples, *greedy], sampling.max_new_tokens if sampling else self.limit
        if self.episodes:
            for sample in everyone:
                self.episodes.open(sample)
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
        """Takes what the engine wrote into the sample; True if the episode goes on."""
        ids = completion.token_ids
        sample.completion_ids = sample.completion_ids + ids
        sample.engine_logprobs = sample.engine_logprobs + completion.logprobs
        sample.stopped = completion.stopped
        if self.episodes:
            assert sample.own is not None
            sample.own += [True] * len(ids)
            if self.episodes.goes_on(sample, completion, self.text(sample, ids), last):
                return True
        sample.text = self.text(sample, sample.completion_ids)
        return False

    def text(self, sample: Sample, ids: list[int]) -> str:
        """The text of a sample's tokens, behind what the template has opened the answer with."""
        return sample.prompt.prefill + str(self.tokenizer.decode(ids, skip_special_tokens=True))
