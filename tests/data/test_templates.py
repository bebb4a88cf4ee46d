"""Chat templates: which one, what is asked of it, and what it has begun to answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanorlhf.config.names import shipped_model
from nanorlhf.config.training import TrainConfig
from nanorlhf.data.prompts import Prompts
from nanorlhf.data.templates import PromptFormatter, opened_tags, render, use_template
from nanorlhf.errors import UsageError
from nanorlhf.types import Prompt
from tests.samples import R1, turns

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\nTAGS{% endif %}"
)
QWEN3 = CHATML.replace(
    "TAGS", "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
# What TRL's think_format_reward asks for, which rewards may ask for too.
THINKS = re.compile(r"^<think>(?!.*<think>)(.*?)</think>.*$", re.DOTALL | re.MULTILINE)

Make = Callable[..., Prompt]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(shipped_model("nanorlhf:adder"))


@pytest.fixture
def make(tokenizer: PreTrainedTokenizerBase) -> Make:
    """The prompt of a row, with the tokenizer's template replaced."""

    def made(row: dict[str, Any], template: Any = tokenizer.chat_template, **options: Any) -> Prompt:
        config = TrainConfig(**options)
        tokenizer.chat_template = template
        use_template(tokenizer, config)
        prompts = Prompts(datasets.Dataset.from_list([row]), tokenizer, config, examples=[("1+1=", "2"), ("2+2=", "4")])
        return prompts.batch(0, 1)[0]

    return made


@pytest.mark.parametrize(
    ("template", "options", "prefill", "completion"),
    [
        (R1, {}, "<think>\n", "6*7</think>42"),
        (QWEN3, {"enable_thinking": False}, "<think>\n\n</think>\n\n", "42"),
        (QWEN3, {}, "", "<think>6*7</think>42"),
        (CHATML.replace("TAGS", "<think>"), {}, "<think>", "\n6*7</think>42"),
    ],
)
def test_what_the_template_opened_is_part_of_the_answer(
    template: str,
    options: dict[str, Any],
    prefill: str,
    completion: str,
    make: Make,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    prompt = make({"prompt": turns("6*7=</think> <think>")}, template, chat_template_kwargs=options)
    assert prompt.prefill == prefill
    assert str(tokenizer.decode(prompt.ids)).endswith(f"assistant\n{prefill}")
    assert THINKS.match(prompt.prefill + completion)
    assert not prefill or not THINKS.match(completion)


def test_what_the_user_opened_is_not(make: Make) -> None:
    assert make({"prompt": turns("How do I close <b>")}, "{{ messages[0]['content'] }}").prefill == ""


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("assistant\n", ""),
        ("<|assistant|>\n", ""),
        ("</user>\n<assistant>\n", ""),
        ("<assistant>\n<think>\n", "<think>\n"),
        ("<think> </think> <answer>", "<think> </think> <answer>"),
        ("</think>\n", ""),
        ("<think>\nOkay,", ""),
        ("<\uff5cAssistant\uff5c><think>\n", "<think>\n"),
    ],
)
def test_tags_that_are_open(text: str, tags: str) -> None:
    assert opened_tags(text) == tags


def test_text_is_taken_as_it_is_and_chats_go_through_the_template(
    make: Make, tokenizer: PreTrainedTokenizerBase
) -> None:
    plain = make({"prompt": "1+2="})
    assert (plain.text, tokenizer.decode(plain.ids)) == ("1+2=", "1+2=")
    chat = make({"prompt": turns("1+2="), "answer": "3"})
    assert tokenizer.decode(chat.ids) == "<|im_start|>user\n1+2=<|im_end|>\n<|im_start|>assistant\n"
    assert chat.text == turns("1+2=")
    assert chat.columns == {"answer": "3"}


def test_when_text_becomes_a_users_message(make: Make) -> None:
    question, text = {"question": "1+2=", "answer": "3"}, {"prompt": "1+2="}
    assert make(question).text == turns("1+2=")
    assert make(text, prompt_template="{prompt}?").text == turns("1+2=?")
    assert make(text, system_prompt="add").text == [{"role": "system", "content": "add"}, *turns("1+2=")]
    assert make(text, prompt_format="chat").text == turns("1+2=")
    assert make(question, prompt_format="text").text == "Question: 1+2=\nAnswer:\n"
    assert make(question, None).text == "Question: 1+2=\nAnswer:\n"
    assert make(question, None, prompt_template="{question} It is <b>").text == "1+2= It is <b>"
    assert make(question, None, prompt_template="{question} It is <b>").prefill == "<b>"
    assert make({"prompt": "It is <b>"}, None).prefill == ""
    assert make(text, None, system_prompt="Add.").text == "Add.\n\n1+2="


def test_a_system_prompt_takes_the_place_of_the_rows_own(make: Make) -> None:
    row = {"prompt": [{"role": "system", "content": "subtract"}, *turns("1+2=")]}
    assert make(row).text == row["prompt"]
    assert make(row, system_prompt="add").text == [{"role": "system", "content": "add"}, *turns("1+2=")]
    shown = make(row, few_shot=1).text
    assert [m["content"] for m in shown if not isinstance(m, str)] == ["subtract", "1+1=", "2", "1+2="]


def test_examples(make: Make) -> None:
    assert make({"prompt": "3+3="}, None, few_shot=2).text == "1+1= 2\n\n2+2= 4\n\n3+3="
    assert make({"prompt": "1+1="}, None, few_shot=1).text == "2+2= 4\n\n1+1="
    shown = make({"question": "3+3=", "answer": ""}, None, few_shot=1, system_prompt="Add.").text
    assert shown == "Add.\n\nQuestion: 1+1=\nAnswer:\n2\n\nQuestion: 3+3=\nAnswer:\n"


def test_ready_templates(make: Make, tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"prompt": [{"role": "system", "content": "Add."}, *turns("1+1=", "2", "2+2=")]}
    plain = make(row, None, chat_template="plain")
    assert tokenizer.decode(plain.ids) == "Add.\n\nUser: 1+1=\n\nAssistant: 2<|im_end|>\n\nUser: 2+2=\n\nAssistant:"
    zero = make({"prompt": turns("1+1=")}, None, chat_template="r1_zero")
    text = str(tokenizer.decode(zero.ids))
    assert text.startswith("A conversation between User and Assistant. The user asks")
    assert text.endswith("</answer>.\nUser: 1+1=\nAssistant: <think>\n")
    assert zero.prefill == "<think>\n"
    assert str(tokenizer.decode(make(row, None, chat_template="r1_zero").ids)).startswith(
        "Add.\nUser: 1+1=\nAssistant: 2"
    )


@pytest.fixture
def beginning(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer that begins any text with a token of its own."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.bos_token = "<|im_start|>"
    begin = ("<|im_start|>", tokenizer.bos_token_id)
    backend: Any = tokenizer
    backend.backend_tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[begin])
    return tokenizer


def test_a_ready_template_begins_as_the_tokenizer_begins_any_text(beginning: PreTrainedTokenizerBase) -> None:
    use_template(beginning, TrainConfig(chat_template="plain"))
    assert render(beginning, turns("1"), {}, opens=True) == "<|im_start|>User: 1\n\nAssistant:"


def test_plain_text_is_begun_by_the_tokenizer_and_a_conversation_by_its_template(
    beginning: PreTrainedTokenizerBase,
) -> None:
    wording = PromptFormatter(beginning, TrainConfig(prompt_format="text"), asks=False)
    asked = [wording.opened(prompt) for prompt in (turns("1"), "2", turns("3"))]
    chat = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert beginning.batch_decode(wording.encoded(asked)) == [chat.format(1), "<|im_start|>2", chat.format(3)]


def test_a_template_of_ones_own(make: Make, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ greeting }} {{ messages[0]['content'] }}")
    mine = str(tmp_path / "mine.jinja")
    prompt = make({"prompt": turns("1+1=")}, chat_template=mine, chat_template_kwargs={"greeting": "Hi"})
    assert tokenizer.decode(prompt.ids) == "Hi 1+1="
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == (tmp_path / "mine.jinja").read_text()


@pytest.mark.parametrize(
    ("options", "template", "complaint"),
    [
        ({}, None, "no chat template; choose one in chat_template: plain, r1_zero, or a .jinja file"),
        ({"chat_template": "plane"}, None, "did you mean 'plain'"),
        ({}, "{{ raise_exception('no\nsystem') }}", "cannot write .*: TemplateError: no system"),
        ({}, "{% if %}", "TemplateSyntaxError"),
        ({}, "{{ '' }}", "no prompt of the dataset can be used: of 1 rows 1 dropped: 1 empty"),
        ({"chat_template_kwargs": {"tokenize": True}}, CHATML, "'tokenize' is set by the trainer"),
    ],
)
def test_mistakes(options: dict[str, Any], template: str | None, complaint: str, make: Make) -> None:
    with pytest.raises(UsageError, match=complaint) as caught:
        make({"prompt": turns("1+1=")}, template, **options)
    assert len(str(caught.value).splitlines()) == 1
