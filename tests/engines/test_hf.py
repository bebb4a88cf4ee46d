"""The transformers engine: what it samples, what it says of it, and how it is refreshed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from nanorlhf.config.names import shipped_model
from nanorlhf.config.training import TrainConfig
from nanorlhf.engines.base import Completion, Request, Sampling
from nanorlhf.engines.hf import HFEngine, pick
from nanorlhf.errors import UsageError
from nanorlhf.policy.policy import Policy

TOKENIZER = AutoTokenizer.from_pretrained(shipped_model("nanorlhf:adder"))
END = TOKENIZER.eos_token_id
HOT = Sampling(temperature=1.3, max_new_tokens=12, stop_token_ids=(END,))


def prompts(*texts: str) -> list[list[int]]:
    return [
        TOKENIZER.apply_chat_template([{"role": "user", "content": t}], add_generation_prompt=True, return_dict=False)
        for t in texts
    ]


def requests(count: int = 12) -> list[Request]:
    ids = prompts("12+34=", "99+99=", "1+")
    return [Request(i, ids[i % 3]) for i in range(count)]


def perturb(policy: Policy, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in policy.trainable.values():
        p.data += 0.02 * torch.randn(p.shape, generator=generator)
    policy.version += 1


@pytest.fixture(scope="module")
def policy() -> Policy:
    torch.manual_seed(0)
    return Policy(TrainConfig(model_name_or_path="nanorlhf:adder", device="cpu"))


@pytest.mark.parametrize("sync", ["lora", "merged"])
def test_logprobs_are_those_of_the_distribution_sampled(policy: Policy, sync: str) -> None:
    engine = HFEngine(policy, TOKENIZER, HOT, sync)  # type: ignore[arg-type]
    for seed in range(3):
        perturb(policy, seed)
        before = [c.logprobs for c in engine.generate(requests(), seed=5)]
        engine.update(policy)
        done = list(engine.generate(requests(), seed=5))
        assert engine.version == policy.version
        assert [c.logprobs for c in done] != before
        plain: Any = policy.serving_copy("merged")
        plain.set_attn_implementation("eager")
        for c in done:
            prompt = requests()[c.id].prompt_ids
            logits = plain(torch.tensor([prompt + c.token_ids])).logits[0, len(prompt) - 1 : -1] / 1.3
            said = logits.log_softmax(-1).gather(-1, torch.tensor(c.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(c.logprobs), said, atol=1e-4, rtol=0)


def test_same_seed_same_tokens_and_the_trainers_random_state_is_untouched(policy: Policy) -> None:
    engine = HFEngine(policy, TOKENIZER, HOT, "merged")
    state = torch.get_rng_state()
    runs = [sorted((c.id, tuple(c.token_ids)) for c in engine.generate(requests(), seed)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_prompt_passes_through_once_for_all_its_answers(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, seen = HFEngine(policy, TOKENIZER, HOT, "merged"), list[tuple[int, ...]]()
    forward = engine.forward

    def counted(ids: torch.Tensor, mask: torch.Tensor, cache: Any) -> Any:
        seen.append(tuple(ids.shape))
        return forward(ids, mask, cache)

    monkeypatch.setattr(engine, "forward", counted)
    list(engine.generate(requests(), seed=5))
    assert seen[0] == (3, max(len(r.prompt_ids) for r in requests())) and seen[1] == (12, 1)


def test_ends_and_limits(policy: Policy) -> None:
    engine = HFEngine(policy, TOKENIZER, HOT, "merged")
    done = list(engine.generate(requests(60), seed=0))
    assert sorted(c.id for c in done) == list(range(60))
    for c in done:
        assert len(c.token_ids) == len(c.logprobs) <= 12
        assert c.stopped == (c.token_ids[-1] == END)
        assert END not in c.token_ids[:-1]
    assert len({len(c.token_ids) for c in done}) > 1
    assert [len(c.token_ids) for c in done] == sorted(len(c.token_ids) for c in done)  # as they finish


def test_stop_strings_and_greedy(policy: Policy) -> None:
    engine = HFEngine(policy, TOKENIZER, Sampling(1.0, 12, (END,), stop=("</answer>",)), "merged")
    tagged = [c for c in engine.generate(requests(60), seed=0) if "</answer>" in TOKENIZER.decode(c.token_ids)]
    assert tagged
    for c in tagged:
        assert TOKENIZER.decode(c.token_ids).endswith("</answer>")
        assert c.stopped
    greedy = [Request(i, prompts("12+34=")[0], greedy=True) for i in range(3)]
    assert len({tuple(c.token_ids) for seed in (0, 1) for c in engine.generate(greedy, seed)}) == 1


def test_pick_samples_the_distribution() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0]]).expand(40_000, 3)
    tokens, logprobs = pick(logits, 0.5, torch.zeros(40_000, dtype=torch.bool), torch.Generator().manual_seed(0))
    expected = torch.softmax(torch.tensor([2.0, 0.0, -2.0]), 0)
    torch.testing.assert_close(torch.bincount(tokens, minlength=3) / 40_000, expected, atol=0.01, rtol=0)
    torch.testing.assert_close(logprobs, expected.log()[tokens])


def test_full_memory_halves_the_batch_and_loses_nothing(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = HFEngine(policy, TOKENIZER, HOT, "merged")
    forward, asked = engine.forward, list[int]()

    def limited(ids: torch.Tensor, mask: torch.Tensor, cache: Any) -> Any:
        asked.append(len(ids))
        if mask.numel() > 6 * 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(ids, mask, cache)

    monkeypatch.setattr(engine, "forward", limited)
    done = list(engine.generate(requests(), seed=5))
    assert sorted(c.id for c in done) == list(range(12))
    assert all(c.stopped or len(c.token_ids) == 12 for c in done)
    assert max(asked) == 12 and engine.batch < 12
    assert caplog.messages and all("rows decode together" in line for line in caplog.messages)
    again = len(asked)
    assert sorted(c.id for c in engine.generate(requests(), seed=5)) == list(range(12))
    assert max(asked[again:]) == engine.batch


def test_one_row_that_does_not_fit_is_said(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = HFEngine(policy, TOKENIZER, HOT, "merged")

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine, "forward", full)
    with pytest.raises(UsageError, match="the key-value cache of one completion does not fit"):
        list(engine.generate(requests(), seed=5))


def after(count: int, done: list[Completion]) -> Callable[[], bool]:
    """Enough once so many are done."""
    return lambda: sum(c.ended for c in done) >= count


def collected(engine: HFEngine, count: int, asked: list[Request]) -> list[Completion]:
    done: list[Completion] = []
    for completion in engine.generate(asked, seed=5, enough=after(count, done)):
        done.append(completion)  # noqa: PERF402  one by one, for it is looked at in between
    return done


@pytest.mark.parametrize("batch", [256, 5])
def test_when_there_is_enough_the_others_come_as_far_as_they_are(policy: Policy, batch: int) -> None:
    engine = HFEngine(policy, TOKENIZER, HOT, "merged", rows=batch)
    whole = {c.id: c for c in engine.generate(requests(), seed=5)}
    done = collected(engine, 3, requests())
    assert sorted(c.id for c in done) == list(range(12)), "each once"
    ended = [c for c in done if c.ended]
    assert 3 <= len(ended) < 12 and all(c == whole[c.id] for c in ended)
    for c in done[len(ended) :]:
        assert not c.ended and not c.stopped and len(c.logprobs) == len(c.token_ids)
        assert c.token_ids == whole[c.id].token_ids[: len(c.token_ids)], "the same tokens as if nobody had stopped it"
    began = [c for c in done if not c.ended and c.token_ids]
    assert {len(c.token_ids) for c in began} == {max(len(c.token_ids) for c in ended)}
    assert collected(engine, 0, requests()) == [Completion(r.id, [], [], False, ended=False) for r in requests()]


def test_a_stop_string_may_lie_across_the_place_where_an_answer_was_cut(policy: Policy) -> None:
    engine = HFEngine(policy, TOKENIZER, Sampling(1.0, 12, (END,), stop=("2+34",)), "merged")
    begun, rest = TOKENIZER("1+2+")["input_ids"], TOKENIZER("34=")["input_ids"]
    engine.model = Parrot(engine.model, rest)
    asked = prompts("12+34=")[0]
    (across,) = engine.generate([Request(0, asked + begun, begun=begun[-4:])], seed=0)
    assert across.stopped and across.token_ids == rest[:2]
    (without,) = engine.generate([Request(0, asked + begun)], seed=0)
    assert not without.stopped


class Parrot:
    """A model that says what it was given, again and again."""

    def __init__(self, model: Any, words: list[int]) -> None:
        self.model, self.words, self.at = model, words, 0

    def __call__(self, **inputs: Any) -> Any:
        out = self.model(**inputs)
        if inputs["past_key_values"] is None:
            self.at = 0
        out.logits[:] = -1e4
        out.logits[:, -1, self.words[self.at % len(self.words)]] = 0.0
        self.at += 1
        return out


def test_the_pace_is_noted_step_by_step(policy: Policy) -> None:
    engine = HFEngine(policy, TOKENIZER, HOT, "merged")
    done = list(engine.generate(requests(), seed=5))
    lengths = [len(c.token_ids) for c in done]
    assert engine.pace.sequences == [sum(n > step for n in lengths) for step in range(max(lengths))]
    assert all(s > 0 for s in engine.pace.seconds)
