"""Words to tokens: chat templates, solved examples before a prompt, and what a template has begun to answer."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanorlhf.config.names import shipped_model
from nanorlhf.config.training import TrainConfig
from nanorlhf.data.row_schemas import Messages, UnfitError, agreement
from nanorlhf.errors import UsageError, error_line, first_line, nearest, shown
from nanorlhf.types import Prompt, Text

PLAIN = """\
{%- for message in messages -%}
{%- if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n\\n' }}
{%- else %}{{ 'Assistant: ' + message['content'] + (eos_token or '') + '\\n\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif -%}
"""
# Table 1 of DeepSeek-R1 (arXiv:2501.12948), for base models; the answer is begun with the tag.
R1_ZERO = """\
{%- if messages[0]['role'] != 'system' -%}
{{ 'A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant ' +
'first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning ' +
'process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> ' +
'reasoning process here </think> <answer> answer here </answer>.\\n' }}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' %}{{ message['content'] + '\\n' }}
{%- elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n' }}
{%- else %}{{ 'Assistant: ' + message['content'] + (eos_token or '') + '\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'Assistant: <think>\\n' }}{% endif -%}
"""
READY = {"plain": PLAIN, "r1_zero": R1_ZERO}
QUESTION = "Question: {}\nAnswer:\n"  # how a model without a chat template is asked a bare question
OPENED = re.compile(r"(?:<(?!(?:assistant|model|bot)>)(\w+)>\s*(?:</\1>\s*)?)+\Z")  # tags, but for a speaker's


def read_tokenizer(name: str, option: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of the model that an option names; refuses one without words, which is made if there is no file."""
    otherwise = "save one into the model's folder, or pass processing_class in Python"
    try:
        tokenizer = AutoTokenizer.from_pretrained(shipped_model(name), trust_remote_code=trust_remote_code)
    except Exception as error:  # of a dozen kinds, by the file that is broken or missing
        why = f"cannot be loaded: there is no tokenizer that can be read ({first_line(error)})"
        raise UsageError(f"{option}={name!r} {why}; {otherwise}") from error
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):
        raise UsageError(f"{option}={name!r} has no tokenizer; {otherwise}")
    return tokenizer


def use_template(tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> None:
    """Gives the tokenizer the chat template that was chosen, for good: it is saved with every checkpoint."""
    name = config.chat_template
    if name in READY:
        first = list(tokenizer("")["input_ids"]) == [tokenizer.bos_token_id]  # as it begins any text
        tokenizer.chat_template = ("{{ bos_token }}" if first else "") + READY[name]
    elif name is not None:
        path = Path(name)
        if not path.is_file():
            raise UsageError(
                f"chat_template={name!r}: it is {' or '.join(READY)}, or a file; {nearest(name, READY, listed=True)}"
            )
        try:
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"chat_template={name!r} cannot be read: {error_line(error)}") from None
    reserved = inspect.signature(tokenizer.apply_chat_template).parameters.keys() - {"tools", "documents"}
    for option in config.chat_template_kwargs:
        if option in reserved:
            raise UsageError(f"chat_template_kwargs: {option!r} is set by the trainer itself")
    check_tools(tokenizer, config.chat_template_kwargs)


def check_tools(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> None:
    """Refuses tools that the chat template does not tell the model of."""
    if not options.get("tools"):
        return
    asked, none = as_messages("?"), {**options, "tools": []}
    if render(tokenizer, asked, options, opens=True) == render(tokenizer, asked, none, opens=True):
        raise UsageError(
            "tools: the chat template has no place for them, so the model would never know of them; give a .jinja file "
            "that writes `tools` as chat_template, or take a model that was made to call tools"
        )


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, options: Mapping[str, Any], opens: bool = False
) -> str:
    """Messages as the chat template writes them; `opens`: up to where the answer begins."""
    if not tokenizer.chat_template:
        choices = f"choose one in chat_template: {', '.join(READY)}, or a .jinja file"
        raise UsageError(f"chat messages need a chat template, and the tokenizer has no chat template; {choices}")
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=opens, tokenize=False, **options)
    except Exception as error:  # whatever a template raises, it is about these messages
        raise UsageError(f"the chat template cannot write {shown(messages)}: {error_line(error)}") from error
    return str(text)


def opened_tags(text: str) -> str:
    """The tags that a text ends with, such as <think>, with the white space after them."""
    found = OPENED.search(text)
    return found[0] if found else ""


class PromptFormatter:
    """A question to what the model is shown: examples, system prompt and template around it, then tokens."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: TrainConfig,
        asks: bool,
        examples: Sequence[tuple[Text, str]] = (),
    ) -> None:
        self.tokenizer, self.config, self.examples = tokenizer, config, examples
        self.made = config.prompt_template is not None
        self.bare = asks and not self.made
        self.tools = bool(config.chat_template_kwargs.get("tools"))
        chosen = asks or self.made or self.tools or config.system_prompt is not None
        auto = bool(tokenizer.chat_template) and chosen
        self.chats = {"auto": auto, "chat": True, "text": False}[config.prompt_format]

    def __call__(self, prompt: Text) -> tuple[Text, list[int], str]:
        """The prompt as rewards see it, its tokens, and what the template has opened the answer with."""
        asked, opened = self.opened(prompt)
        if isinstance(asked, str):
            begun = self.config.prompt_template or ""
        else:
            closed = render(self.tokenizer, asked, self.config.chat_template_kwargs)
            begun = opened[agreement(opened, closed) :]
        return asked, self.encoded([(asked, opened)])[0], opened_tags(begun)

    def opened(self, prompt: Text) -> tuple[Text, str]:
        """The prompt as rewards see it, and as the model does."""
        before = [(question, answer) for question, answer in self.examples if question != prompt]
        before = before[: self.config.few_shot]
        if isinstance(prompt, str) and not self.chats:
            if self.tools:
                raise UsageError("tools are told to the model by its chat template, so prompt_format must be chat")
            asked: Text = self.text(prompt, before)
            opened = asked
        else:
            asked = self.messages(prompt, before)
            opened = render(self.tokenizer, asked, self.config.chat_template_kwargs, opens=True)
        try:
            opened.encode()
        except UnicodeEncodeError:
            raise UnfitError("with half a character (a lone surrogate)") from None
        return asked, opened

    def encoded(self, prompts: Sequence[tuple[Text, str]]) -> list[list[int]]:
        """The tokens of such pairs; a chat template has written special tokens, plain text gets the tokenizer's."""
        ids: dict[int, list[int]] = {}
        for plain in (True, False):
            places = [i for i, (asked, _) in enumerate(prompts) if isinstance(asked, str) == plain]
            texts = [prompts[i][1] for i in places]
            if texts:
                found = cast(list[list[int]], self.tokenizer(texts, add_special_tokens=plain)["input_ids"])
                ids |= zip(places, map(list, found), strict=True)
        return [ids[i] for i in range(len(prompts))]

    def text(self, prompt: str, before: Sequence[tuple[Text, str]]) -> str:
        """Blocks of plain text: system prompt, solved examples, the question."""
        blocks = [self.config.system_prompt] if self.config.system_prompt else []
        for question, answer in before:
            asked = self.asked(str(question))
            gap = "" if asked[-1:].isspace() or answer[:1].isspace() else " "
            blocks.append(asked + gap + answer)
        return "\n\n".join([*blocks, self.asked(prompt)])

    def asked(self, question: str) -> str:
        return QUESTION.format(question) if self.bare else question

    def messages(self, prompt: Text, before: Sequence[tuple[Text, str]]) -> Messages:
        """A conversation: system prompt, solved examples, the question."""
        system, turns = apart(as_messages(prompt))
        if self.config.system_prompt:
            system = [{"role": "system", "content": self.config.system_prompt}]
        for question, answer in reversed(before):
            turns = [*apart(as_messages(question))[1], {"role": "assistant", "content": answer}, *turns]
        return [*system, *turns]


def as_messages(prompt: Text) -> Messages:
    """A conversation as it is, plain text as the user's message."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def apart(messages: Messages) -> tuple[Messages, Messages]:
    """The system prompt that a conversation begins with, if any, and what follows."""
    begins = int(messages[0]["role"] == "system")
    return messages[:begins], messages[begins:]


def answer_ids(
    prompt: Prompt, answer: str, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], options: Mapping[str, Any]
) -> list[int]:
    """The tokens that follow the prompt's, with the end token that the chat template gives, or else the tokenizer's."""
    text = continued(answer, prompt.prefill)
    if not isinstance(prompt.text, str):
        opened = render(tokenizer, prompt.text, options, opens=True)
        whole = render(tokenizer, [*prompt.text, {"role": "assistant", "content": answer}], options)
        rest = whole.removeprefix(opened)
        again = text != answer  # the thought is open already, and the template may open it twice
        if whole.startswith(opened) and text.strip() in rest and not again:
            text = rest
        elif text.strip() and text.strip() in whole:  # else the template drops thoughts
            text += whole.rpartition(text.strip())[2]
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    last = max((place for place, token in enumerate(ids) if token in ends), default=None)
    if last is not None:
        return ids[: last + 1]
    return ids + ([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else list(ends[:1]))


def continued(answer: str, prefill: str) -> str:
    """The answer without what the template has opened it with, whichever white space stands around that."""
    tags, own = prefill.strip(), answer.lstrip()
    if answer.startswith(prefill) or not own.startswith(tags):
        return answer.removeprefix(prefill)
    return own.removeprefix(tags).lstrip()


def conversation_ids(tokenizer: Any, prompt: Any, completion: Any) -> Any:
    """The input of a sequence classifier: a conversation by its own template, else question and answer as a pair."""
    if not isinstance(prompt, str) and tokenizer.chat_template:
        return tokenizer.apply_chat_template([*prompt, *completion], tokenize=True, return_dict=True)
    question = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
    answer = completion if isinstance(completion, str) else completion[-1]["content"]
    return tokenizer(question, answer, truncation=True)
