"""Episodes of many turns: what the environment says is context, what the policy says is trained, and both add up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanorlhf.algorithm import Samples
from nanorlhf.config.names import shipped_model
from nanorlhf.engines.base import Completion, Request, Sampling
from nanorlhf.environments.episodes import Episodes
from nanorlhf.environments.protocol import find_environment, own_questions, stops
from nanorlhf.errors import UsageError
from nanorlhf.grpo import GRPOConfig, GRPOTrainer
from nanorlhf.grpo.algorithm import GRPO
from nanorlhf.loop import Loop
from nanorlhf.policy.policy import Policy
from nanorlhf.rollouts.sampler import Sampler
from nanorlhf.scoring.reward import Reward
from nanorlhf.scoring.scorer import Scorer
from nanorlhf.tasks.guessing import Guessing
from nanorlhf.types import Prompt, Rollout, Sample
from tests.samples import batches, rollout, sample

TOKENIZER: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(shipped_model("nanorlhf:adder"))
END = int(TOKENIZER.convert_tokens_to_ids("<|im_end|>"))  # type: ignore[arg-type]
ASKED: list[dict[str, str]] = [{"role": "user", "content": "1+1="}]


PARROT = """
class Parrot:
    def reset(self, **_):
        self.turn = 0

    def step(self, completion):
        self.turn += 1
        return f"{completion}+1=", float(len(completion) % 3), self.turn == 3
"""


class Countdown:
    """Lets the policy speak three times; each turn earns its length."""

    def reset(self, **_: Any) -> None:
        self.left = 3

    def step(self, completion: str) -> tuple[str, float, bool]:
        self.left -= 1
        if completion == "boom":
            raise KeyError("boom")
        return f"{self.left} left", float(len(completion)), self.left == 0


class Faulty(Countdown):
    """Begins with the first word of a prompt only, earns numbers of numpy's, and forgets to answer."""

    def reset(self, **columns: Any) -> None:
        super().reset()
        if columns.get("answer") == "unknown":
            raise KeyError("unknown")

    def step(self, completion: str) -> tuple[Any, Any, bool]:
        observation, earned, done = super().step(completion)
        return None if completion == "hush" else observation, np.float32(earned), done


class Scripted:
    """An engine that says what a test tells it to, turn by turn."""

    version = 0

    def forget(self) -> None:
        """Nothing is kept."""

    def __init__(self, *turns: list[str]) -> None:
        self.turns, self.asked = iter(turns), list[Sequence[Request]]()

    def generate(
        self, requests: Sequence[Request], seed: int, sampling: Sampling | None = None
    ) -> Iterator[Completion]:
        self.asked.append(requests)
        for request, text in zip(requests, next(self.turns), strict=True):
            ids = [*TOKENIZER(text)["input_ids"], END][: request.max_tokens]
            yield Completion(request.id, ids, [-float(len(self.asked))] * len(ids), ids[-1] == END)


def play(
    engine: Scripted,
    limit: int = 200,
    turns: int = 9,
    prompt: Any = ASKED,
    world: type[Countdown] = Countdown,
    answers: Sequence[str] = ("", ""),
) -> list[Sample]:
    """One episode for each text of the engine's first turn."""
    from nanorlhf.environments.protocol import environment

    config = GRPOConfig(reward_workers=0, reward_failure_limit=1)
    stage = Episodes(world, TOKENIZER, (END,), limit, {})
    scorer = Scorer([Reward("environment", environment, file=__file__)], config)
    sampler = Sampler(engine, TOKENIZER, scorer, limit, stage, turns)  # type: ignore[arg-type]
    text = (
        prompt
        if isinstance(prompt, str)
        else TOKENIZER.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    )
    asked = [Prompt(0, list(TOKENIZER(str(text))["input_ids"]), prompt, {"answer": answer}) for answer in answers]
    samples, _ = sampler.write(asked, Samples(1), 0)
    scorer.finish(samples)
    return samples


def test_turns_follow_each_other_as_the_chat_template_has_it() -> None:
    engine = Scripted(["a", "bb"], ["cc", "d"], ["e", "f"])
    first, second = play(engine)
    chat = [*ASKED, say("assistant", "a"), say("user", "2 left"), say("assistant", "cc"), say("user", "1 left")]
    whole = str(TOKENIZER.apply_chat_template([*chat, say("assistant", "e")], tokenize=False)).removesuffix("\n")
    assert TOKENIZER.decode(first.prompt.ids + first.completion_ids) == whole
    assert engine.asked[2][0].prompt_ids == TOKENIZER.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )
    assert (first.reward, second.reward) == (1 + 2 + 1, 2 + 1 + 1)
    assert first.own is not None
    mine = [t for t, own in zip(first.completion_ids, first.own, strict=True) if own]
    assert TOKENIZER.decode(mine) == "a<|im_end|>cc<|im_end|>e<|im_end|>"
    assert first.engine_logprobs == [-1.0] * 2 + [-2.0] * 3 + [-3.0] * 2
    assert first.stopped


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_text_goes_on_as_text() -> None:
    episode = play(Scripted(["a", "b"], ["c", "d"], ["e", "f"]), prompt="once")[0]
    assert TOKENIZER.decode(episode.completion_ids) == "a<|im_end|>2 leftc<|im_end|>1 lefte<|im_end|>"


def test_turn_and_token_limits_cut_an_episode_off() -> None:
    short, _ = play(Scripted(["a", "b"]), turns=1)
    assert (short.stopped, short.reward, len(short.completion_ids)) == (False, 1, 2)
    engine = Scripted(["a", "b"])
    narrow, _ = play(engine, limit=12)
    assert (narrow.stopped, len(narrow.completion_ids)) == (False, 2), "no room for what the environment says"
    engine = Scripted(["a", "b"], ["c" * 50, "d"], ["f"])
    cut, _ = play(engine, limit=60)
    assert len(cut.completion_ids) <= 60
    assert not cut.stopped
    assert engine.asked[1][0].max_tokens == 60 - (len(engine.asked[1][0].prompt_ids) - len(cut.prompt.ids))
    assert len(engine.asked[2]) == 1, "the other episode went on alone"


def test_an_environment_that_raises_leaves_its_sample_unscored() -> None:
    bad, good = play(Scripted(["boom", "b"], ["c"], ["d"]))
    assert (bad.reward, good.reward) == (None, 3)
    line = next(at for at, text in enumerate(Path(__file__).read_text().splitlines(), 1) if 'KeyError("boom")' in text)
    assert bad.fault == f"environment: raised KeyError: 'boom' ({__file__}:{line})"


def test_whatever_else_an_environment_does_costs_its_sample_alone() -> None:
    script = Scripted(["hush", "b", "a"], ["c"], ["d"])
    mute, good, unknown = play(script, world=Faulty, answers=("", "", "unknown"))
    assert (mute.reward, good.reward, unknown.reward) == (None, 3, None)
    assert mute.fault is not None and "step() gave None as an observation" in mute.fault
    assert unknown.fault is not None and "KeyError: 'unknown'" in unknown.fault
    assert [len(asked) for asked in script.asked] == [3, 1, 1], "neither goes on"


def test_the_loss_touches_no_token_of_the_environments() -> None:
    torch.manual_seed(0)
    config = GRPOConfig(model_name_or_path="nanorlhf:adder", device="cpu", max_completion_length=64)
    policy = Policy(config)
    own = [True, True, False, False, False, True, False, True]
    step = rollout([sample(4, 8, vocabulary=200, seed=i, own=own) for i in range(2)], group_size=2)
    step.rewards = torch.tensor([1.0, 0.0])
    loop = Loop(config, GRPO(config), policy, source=None)  # type: ignore[arg-type]
    credit = loop.algorithm.credit(step)
    (batch,) = batches(loop, step, credit, credit.keep)
    states: list[torch.Tensor] = []
    norm: Any = policy.base.get_decoder().norm

    def watch(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        states.append(output)

    handle = norm.register_forward_hook(watch)
    logprobs, entropy = policy.logprobs(batch)
    handle.remove()
    batch.columns["old_logprobs"] = logprobs.detach()
    (batch.weights * loop.algorithm.loss(logprobs, entropy, batch).tokens).sum().backward()
    assert states[0].grad is not None
    touched = states[0].grad.reshape(-1, states[0].shape[-1]).abs().sum(-1) > 0
    expected = [False] * 3 + own + [False]  # the state before a token predicts it
    assert touched.tolist() == expected * 2


def test_a_run_learns_from_episodes_and_both_sides_agree_on_their_probabilities(tmp_path: Path) -> None:
    file = tmp_path / "world.py"
    file.write_text(PARROT)
    options: dict[str, Any] = {"model_name_or_path": "nanorlhf:adder", "engine": "hf", "dataset_name": "arithmetic"}
    options |= {"prompts_per_step": 4, "num_generations": 4, "max_completion_length": 96, "max_prompt_length": 32}
    options |= {
        "learning_rate": 1e-3,
        "max_steps": 3,
        "environment": f"{file}:Parrot",
        "output_dir": str(tmp_path / "r"),
    }
    trainer = GRPOTrainer(args=GRPOConfig(**options))
    rollouts: list[Rollout] = []
    step = trainer.loop.step
    trainer.loop.step = lambda *a: (made := step(*a), rollouts.append(made.rollout))[0]  # type: ignore[method-assign]
    history = trainer.train()
    assert all(row["mismatch/max_abs"] < 1e-3 for row in history[1:])
    assert any(s.own and not all(s.own) for r in rollouts for s in r.samples), "there were second turns"
    assert history[1]["tokens/trained"] == sum(s.trained for s in rollouts[0].samples)
    assert history[1]["grad_norm"] > 0


def test_guessing_brings_its_own_questions() -> None:
    config = GRPOConfig(dataset_test_split="test")
    train, held_out = own_questions(Guessing, config)  # type: ignore[arg-type]
    assert held_out is not None
    assert len(train) + len(held_out) == 1000
    game = Guessing()
    game.reset(**{k: v for k, v in train[0].items() if k != "prompt"})
    secret = train[0]["secret"]
    assert game.step("0") == ("higher", 0.0, False)
    assert game.step("what?") == ("Say a number.", 0.0, False)
    assert game.step("is it 101") == ("lower", 0.0, False)
    assert game.step(f"it is {secret}") == ("", 0.5, True)


def test_questions_of_its_own_are_cut_and_whatever_is_wrong_with_them_is_said() -> None:
    class Lines(Countdown):
        stop = "</calc>"

        @staticmethod
        def rows(split: str) -> Iterator[dict[str, Any]]:
            yield from ({"number": n} for n in range({"train": 30, "test": 10}[split]))

        def reset(self, **columns: Any) -> Any:
            return str(columns["number"])

    train, held_out = own_questions(
        Lines,
        GRPOConfig(dataset_train_split="train[:20]", dataset_test_split="test[50%:]"),  # type: ignore[arg-type]
    )
    assert (len(train), held_out and held_out[0]["number"]) == (20, 5)
    elsewhere = GRPOConfig(dataset_test_split="test", dataset_test_name="arithmetic")
    assert own_questions(Lines, elsewhere)[1] is None, "they are those of the dataset that is named"
    with pytest.raises(UsageError, match="Lines gives no questions for 'validation': KeyError"):
        own_questions(Lines, GRPOConfig(dataset_train_split="validation"))
    assert stops(Lines) == ("</calc>",)


def test_wrong_settings_are_refused_early(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'calculator'"):
        find_environment("calculater")
    (tmp_path / "e.py").write_text("class Half:\n    def reset(self): ...\n")
    with pytest.raises(UsageError, match=r"reset\(\*\*columns\) and step\(completion\)"):
        find_environment(f"{tmp_path}/e.py:Half")
    with pytest.raises(UsageError, match="no questions of its own"):
        own_questions(Countdown, GRPOConfig())  # type: ignore[arg-type]
