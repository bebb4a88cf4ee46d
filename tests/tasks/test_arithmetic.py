"""The shipped task and the shipped starting model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanorlhf.config.names import shipped_model
from nanorlhf.tasks.arithmetic import arithmetic, digits

FOLDER = Path(shipped_model("nanorlhf:adder"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER)


def test_every_sum_is_in_exactly_one_split_and_right() -> None:
    train, test = arithmetic("train"), arithmetic("test")
    questions = [messages[0]["content"] for split in (train, test) for messages in split["prompt"]]
    assert (len(train), len(test)) == (7279, 821)
    assert sorted(questions) == sorted(f"{a}+{b}=" for a in range(10, 100) for b in range(10, 100))
    for messages, answer in zip(test["prompt"], test["answer"], strict=True):
        a, b = re.findall(r"\d+", messages[0]["content"])
        assert answer == str(int(a) + int(b))


def test_problems_of_one_digit_are_in_one_split_each_with_a_right_and_a_wrong_answer() -> None:
    train, test = digits("train"), digits("test")
    questions = [messages[0]["content"] for split in (train, test) for messages in split["prompt"]]
    every = [(a, sign, b) for sign in "+-*" for a in range(10) for b in range(10)]
    assert sorted(questions) == sorted(f"{a}{sign}{b}=" for a, sign, b in every if sign != "-" or a >= b)
    assert {messages[0]["content"][1] for messages in test["prompt"]} == set("+-*") and 40 <= len(test) <= 70
    row: Any
    for row in [*train, *test]:
        right = str(eval(row["prompt"][0]["content"][:-1]))  # noqa: S307  one digit, one sign, one digit
        assert row["answer"] == right and row["chosen"] == row["completion"]
        assert row["chosen"][0]["content"] == f"<answer>{right}</answer>" != row["rejected"][0]["content"]


def test_both_splits_hold_every_digit_everywhere() -> None:
    """Each of the 90 numbers meets the model on either side in training, and no last digit is left out of the test."""
    train, test = ([row[0]["content"] for row in arithmetic(split)["prompt"]] for split in ("train", "test"))
    assert {q.split("+")[0] for q in train} == {q.split("+")[1][:-1] for q in train} == {str(n) for n in range(10, 100)}
    assert {(q[1], q[4]) for q in test} == {(x, y) for x in "0123456789" for y in "0123456789"}


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'validation'"):
        arithmetic("validation")


def test_the_model_is_small_and_float32(model: Any) -> None:
    files = list(FOLDER.iterdir())
    assert sum(file.stat().st_size for file in files) <= 3 * 2**20
    assert all(file.stat().st_mode & 0o044 for file in files)
    assert 600_000 <= model.num_parameters() <= 1_000_000
    assert model.dtype == torch.float32


def test_a_chat_is_the_question_then_the_completion(tokenizer: Any, model: Any) -> None:
    """Generation starts exactly where the assistant's words do, and the end token closes them."""
    chat = [{"role": "system", "content": "Add."}, {"role": "user", "content": "12+34="}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": "46"}], tokenize=False)
    assert prompt == "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n12+34=<|im_end|>\n<|im_start|>assistant\n"
    assert whole == prompt + "46" + tokenizer.eos_token + "\n"
    assert tokenizer.encode(prompt) + tokenizer.encode("46<|im_end|>\n") == tokenizer.encode(whole)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


@pytest.mark.parametrize("text", ["<answer>46</answer>", "Añadir 12 🙂\n  users  ", "a  b\tc"])
def test_any_text_comes_back(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_it_leaves_room_to_learn(tokenizer: Any, model: Any) -> None:
    """Some held-out samples earn the reward, most do not, and nearly all of them end."""
    torch.manual_seed(0)
    rows: Any = arithmetic("test")[::2]
    prompts = tokenizer.apply_chat_template(
        rows["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=24)[:, prompts["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    found = [re.findall(r"<answer>\s*(.*?)\s*</answer>", text) for text in texts]
    ended = (output == tokenizer.eos_token_id).any(1)
    right = [bool(answers) and answers[-1] == answer for answers, answer in zip(found, rows["answer"], strict=True)]
    accuracy = (torch.tensor(right) & ended).float().mean().item()
    assert 0.10 <= accuracy <= 0.45
    assert ended.float().mean().item() > 0.98
