"""Generation by transformers, for machines where vLLM cannot be: a batch decodes together, finished rows leave it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nanorlhf.engines.base import Completion, Enough, Request, Sampling, Weights, never
from nanorlhf.errors import UsageError
from nanorlhf.records.pace import Pace
from nanorlhf.system.device import empty_cache, ran_out
from nanorlhf.system.terminal import EACH, log
from nanorlhf.types import WeightSync

BATCH = 256  # rows that decode together, if no plan says how many


@dataclass(slots=True)
class Row:
    """A request in the making."""

    request: Request
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class HFEngine:
    """A second copy of the model, refreshed in memory, that decodes with a key-value cache."""

    release = f"transformers {transformers.__version__}"

    def __init__(
        self,
        weights: Weights,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        sync: WeightSync,
        device: torch.device | None = None,
        rows: int = BATCH,
    ) -> None:
        self.tokenizer, self.sampling = tokenizer, sampling
        self.sync: WeightSync = sync
        self.model: Any = weights.serving_copy(sync)
        if device is not None:
            self.model.to(device)  # the policy may be away
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        base.set_attn_implementation("sdpa")
        self.device: torch.device = base.device
        self.version, self.batch, self.pace = -1, rows, Pace()

    def generate(
        self, requests: Sequence[Request], seed: int, sampling: Sampling | None = None, enough: Enough = never
    ) -> Iterator[Completion]:
        """Completions in the order in which they finish; random numbers come from a generator of its own."""
        generator = torch.Generator(self.device).manual_seed(seed)
        left = list(requests)
        self.pace.begin()
        while left:
            if enough():
                yield from (cut_off(Row(r)) for r in left)
                return
            batch, ended = left[: self.batch], set[int]()
            try:
                for completion in self.decode([Row(r) for r in batch], generator, sampling or self.sampling, enough):
                    ended.add(completion.id)
                    yield completion
            except RuntimeError as error:
                if not ran_out(error):
                    raise
            left = [r for r in left if r.id not in ended]
            if len(ended) < len(batch):
                self.halve(len(batch))

    def halve(self, rows: int) -> None:
        """Fewer rows from now on, when memory ran out over a batch of `rows`; those that had not ended begin again."""
        if rows == 1:
            raise UsageError(
                "out of memory (rollout): the key-value cache of one completion does not fit; lower "
                "max_completion_length, or use engine vllm"
            )
        empty_cache()
        self.batch = rows // 2
        words = f"out of memory (rollout), nothing is lost: {self.batch} rows decode together from now on"
        log.warning(words, extra=EACH)

    def decode(
        self, rows: list[Row], generator: torch.Generator, sampling: Sampling, enough: Enough
    ) -> Iterator[Completion]:
        """One batch, left-padded, until its last row has ended; a prompt passes through the model once for all rows."""
        prompts = list(dict.fromkeys(tuple(row.request.prompt_ids) for row in rows))
        place = {prompt: i for i, prompt in enumerate(prompts)}
        ids, mask = self.left_pad(prompts)
        ends = torch.tensor(sampling.stop_token_ids, device=self.device)
        cache = None
        while rows:
            logits, cache = self.forward(ids, mask, cache)
            if len(mask) < len(rows):
                index = torch.tensor([place[tuple(row.request.prompt_ids)] for row in rows], device=self.device)
                cache.batch_select_indices(index)
                logits, mask = logits[index], mask[index]
            greedy = torch.tensor([row.request.greedy for row in rows], device=self.device)
            tokens, logprobs = pick(logits, sampling.temperature, greedy, generator)
            ended = torch.isin(tokens, ends).tolist()
            for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
                row.ids.append(token)
                row.logprobs.append(logprob)
            self.pace.note(len(rows))
            alive = []
            for i, row in enumerate(rows):
                stopped = ended[i] or self.hits_stop_string(row, sampling)
                if stopped or len(row.ids) >= sampling.limit(row.request):
                    yield Completion(row.request.id, row.ids, row.logprobs, stopped)
                else:
                    alive.append(i)
            if len(alive) < len(rows) and enough():
                yield from (cut_off(rows[i]) for i in alive)
                return
            ids, mask = tokens[:, None], torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            if len(alive) < len(rows) and alive:
                index = torch.tensor(alive, device=self.device)
                cache.batch_select_indices(index)
                ids, mask = ids[index], mask[index]
            rows = [rows[i] for i in alive]

    @torch.no_grad()
    def forward(self, ids: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """(B, V) logits of each row's next token."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1].float(), out.past_key_values

    def left_pad(self, prompts: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        """(B, L) ids and mask, the last token of every prompt in the last column."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        return ids, mask

    def hits_stop_string(self, row: Row, sampling: Sampling) -> bool:
        """Whether the text written so far holds a stop string."""
        if not sampling.stop:
            return False
        text = str(self.tokenizer.decode([*row.request.begun, *row.ids]))
        return any(stop in text for stop in sampling.stop)

    def forget(self) -> None:
        """Nothing is kept from one call to the next."""

    @torch.no_grad()
    def update(self, weights: Weights) -> None:
        """Copies the policy's weights over its own."""
        mine = dict(self.model.named_parameters())
        if self.sync == "lora":
            _, tensors = weights.adapter()
            pairs = (
                (name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."), t)
                for name, t in tensors.items()
            )
        else:
            pairs = weights.merged(everything=self.version == -1)
        for name, tensor in pairs:
            mine[name].copy_(tensor)
        self.version = weights.version

    def sleep(self) -> None:
        """Moves the copy to main memory, if the device has its own."""
        if self.device.type == "cuda":
            self.model.to("cpu")

    def wake(self) -> None:
        """Moves it back."""
        self.model.to(self.device)

    def close(self) -> None:
        """Lets the copy go."""
        self.model = None


def cut_off(row: Row) -> Completion:
    """A completion as far as it was written."""
    return Completion(row.request.id, row.ids, row.logprobs, stopped=False, ended=False)


def pick(logits: Tensor, temperature: float, greedy: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(B,) tokens and their log-probabilities: argmax(p / exponential noise) is a sample of p."""
    logprobs = torch.log_softmax(logits / temperature, -1)
    noise = torch.empty_like(logprobs).exponential_(generator=generator)
    tokens = torch.where(greedy, logprobs.argmax(-1), (logprobs.exp() / noise).argmax(-1))
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]
