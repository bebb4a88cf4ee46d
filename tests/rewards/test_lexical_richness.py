"""Lexical richness by hand, what might cheat it, and a model that learns it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanorlhf.config.names import shipped_model
from nanorlhf.config.training import TrainConfig
from nanorlhf.reinforce import REINFORCEConfig, REINFORCETrainer
from nanorlhf.rewards.lexical_richness import lexical_richness, moving_average_ttr, words_of
from nanorlhf.scoring.reward import find_rewards
from nanorlhf.scoring.scorer import Scorer
from nanorlhf.tasks.stories import stories, titles
from nanorlhf.types import Prompt, Sample


def richness(text: str, **options: float) -> float:
    return lexical_richness([text], **options)[0]  # type: ignore[arg-type]


def test_numbers_worked_out_by_hand() -> None:
    fox = "The fox saw the river. The fox slept."  # 8 words, 5 of them distinct
    assert richness(fox, brevity_penalty_scale=0) == 5 / 8
    assert richness(fox, target_words=8) == richness(fox, target_words=3) == 5 / 8
    assert richness(fox, target_words=12) == pytest.approx(5 / 8 * math.exp(-0.5))
    assert richness(fox, target_words=12, brevity_penalty_scale=2) == pytest.approx(5 / 8 * math.exp(-1))
    assert lexical_richness([[{"role": "assistant", "content": fox}]], target_words=8) == [5 / 8]


def test_windows_move_one_word_at_a_time() -> None:
    assert moving_average_ttr(list("abac"), window=2) == 1
    assert moving_average_ttr(list("aaba"), window=3) == 2 / 3
    assert moving_average_ttr(list("aaab"), window=3) == (1 / 3 + 2 / 3) / 2


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=30), st.integers(1, 12))
def test_moving_average_is_its_definition(words: list[str], window: int) -> None:
    size = min(window, len(words))
    ratios = [len(set(words[i : i + size])) / size for i in range(len(words) - size + 1)]
    assert moving_average_ttr(words, window) == pytest.approx(sum(ratios) / len(ratios))


def test_a_long_text_does_not_lose_for_being_long() -> None:
    words = " ".join(f"{a}{b}" for a in "abcdefgh" for b in "abcdefgh")  # 64 distinct words, then once more
    assert richness(f"{words} {words}") == 1


@pytest.mark.parametrize("text", ["", "   \n", "... !? -- :)", "12 345 6.7", "\u200b\u200b", "'"])
def test_without_a_word_there_is_nothing_rich(text: str) -> None:
    assert richness(text) == richness(text, brevity_penalty_scale=0) == 0


def test_one_word_is_rich_only_without_the_penalty() -> None:
    assert richness("fox", brevity_penalty_scale=0) == 1
    assert richness("fox") == pytest.approx(math.exp(-19))
    assert richness("fox " * 40) == 1 / 40
    assert richness("fox", target_words=20) < richness("fox owl", target_words=20) < richness("fox owl bee")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Fox, FOX; fox's!", ["fox", "fox", "foxs"]),
        ("don't don\u2019t DON'T", ["dont"] * 3),
        ("caf\u00e9 cafe\u0301 CAF\u00c9", ["caf\u00e9"] * 3),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("Straße STRASSE", ["strasse"] * 2),
        ("fo\u200bx f\u00adox fox", ["fox"] * 3),
        ("fox-owl_bee/fox1fox2", ["fox", "owl", "bee", "fox", "fox"]),
        ("fox🦊owl", ["fox", "owl"]),
    ],
)
def test_words_are_letters_whatever_their_dress(text: str, words: list[str]) -> None:
    assert words_of(text) == words


def test_options_of_a_recipe_reach_it() -> None:
    sample = Sample(Prompt(0, [1], "The old fox and the river:", {}), [5], [0.0], True, "fox")
    rewards = find_rewards("lexical_richness", None, {"lexical_richness": {"brevity_penalty_scale": 0}})
    Scorer(rewards, TrainConfig(reward_workers=0)).score([sample])
    assert sample.rewards == {"lexical_richness": 1}


def test_the_storyteller_is_small_and_reads_any_text() -> None:
    folder = Path(shipped_model("nanorlhf:storyteller"))
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 3 * 2**20
    assert all(file.stat().st_mode & 0o044 for file in folder.iterdir())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "qwen2" and model.num_parameters() < 1_000_000
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id
    for text in ("The old fox and the river: Golden stars sang.", "Añadir 12 🙂\n  zebra"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.tokenize("The old fox and the river:") == ["The", "Ġold", "Ġfox", "Ġand", "Ġthe", "Ġriver", ":"]


def test_every_title_is_in_one_split() -> None:
    train, test = titles("train"), titles("test")
    assert (len(train), len(test), len({*train, *test})) == (3589, 411, 4000)
    assert stories("test")["prompt"][0] == "The {} {} and the {}:".format(*test[0])
    with pytest.raises(ValueError, match="'validation'"):
        titles("validation")


@pytest.mark.slow
def test_words_become_richer_and_without_the_penalty_stories_become_short(tmp_path: Path) -> None:
    tokens = {}
    for scale in (1.0, 0.0):
        config = REINFORCEConfig(
            model_name_or_path="nanorlhf:storyteller",
            dataset_name="stories",
            dataset_test_split="test",
            reward_funcs="lexical_richness",
            reward_options={"lexical_richness": {"brevity_penalty_scale": scale}},
            baseline="mean",
            engine="hf",
            device="cpu",
            prompts_per_step=128,
            max_prompt_length=16,
            max_completion_length=48,
            max_steps=12,
            learning_rate=1e-3,
            eval_steps=0,
            save_steps=0,
            output_dir=str(tmp_path / str(scale)),
        )
        first, *_, last = REINFORCETrainer(args=config).train()
        assert last["eval/reward"] > first["eval/reward"] + 0.2
        tokens[scale] = last["eval/length_mean"]
    assert tokens[0.0] < 12
    assert tokens[1.0] > 20
