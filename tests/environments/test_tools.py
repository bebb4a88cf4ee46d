"""Functions that a model calls: what they return is what it reads next, and nothing it writes can break a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from nanorlhf.config.names import shipped_model
from nanorlhf.config.training import TrainConfig
from nanorlhf.data.templates import PromptFormatter, use_template
from nanorlhf.environments.tools import tool_environment
from nanorlhf.errors import UsageError
from nanorlhf.grpo import GRPOConfig, GRPOTrainer
from nanorlhf.preflight import environment_of


def multiply(a: int, b: int) -> int:
    """Multiplies two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a * b


@pytest.mark.parametrize(
    ("message", "answer"),
    [
        ('<tool_call>\n{"name": "multiply", "arguments": {"a": 3, "b": 4}}\n</tool_call>', "12"),
        ('<tool_call>{"name": "multiply", "arguments": {"a": 3}}</tool_call>', "error: TypeError"),
        ('<tool_call>{"name": "divide", "arguments": {}}</tool_call>', "error: KeyError: 'divide'"),
        ("<tool_call>multiply(3, 4)</tool_call>", "error: JSONDecodeError"),
        ("<tool_call>[1]</tool_call>", "error: TypeError"),
        ('<tool_call>{"name": "multiply", "arguments": [3, 4]}</tool_call>', "error: TypeError"),
    ],
)
def test_calls(message: str, answer: str) -> None:
    found, _ = tool_environment([multiply])
    observation, earned, done = found().step(f"let me see {message}")
    assert observation.startswith(answer)
    assert (earned, done) == (0, False)


def test_several_calls_and_none() -> None:
    tools = tool_environment([multiply])[0]()
    call = '<tool_call>{"name": "multiply", "arguments": {"a": %d, "b": 2}}</tool_call>'
    assert tools.step(call % 2 + call % 3) == ("4\n6", 0, False)
    assert tools.step("it is 6") == ("", 0, True)


def test_the_template_is_told_and_episodes_are_rewarded_by_functions(tmp_path: Path) -> None:
    (tmp_path / "template.jinja").write_text(
        "{% for tool in tools %}[{{ tool.function.name }}]{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    options: dict[str, Any] = {"model_name_or_path": "nanorlhf:adder", "engine": "hf", "dataset_name": "arithmetic"}
    options |= {"reward_funcs": "exact_answer", "max_steps": 1, "prompts_per_step": 2, "num_generations": 2}
    options |= {"max_prompt_length": 64, "max_completion_length": 32}
    options |= {"chat_template": str(tmp_path / "template.jinja"), "output_dir": str(tmp_path / "run")}
    trainer = GRPOTrainer(args=GRPOConfig(**options), tools=[multiply])
    assert str(trainer.tokenizer.decode(trainer.prompts.batch(0, 1)[0].ids)).startswith("[multiply]<|im_start|>user")
    assert trainer.sampler.episodes is not None
    ids = trainer.sampler.episodes.observed([{"role": "user", "content": "2*3"}], "6", ended=True)
    assert trainer.tokenizer.decode(ids) == "\n<|im_start|>tool\n6<|im_end|>\n<|im_start|>assistant\n"
    history = trainer.train()
    assert "reward/exact_answer" in history[1] and "reward/environment" not in history[1]


TELLS = (
    "{% for tool in tools %}[{{ tool.function.name }}]{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}"
)


def wording(template: str | None, **options: Any) -> PromptFormatter:
    """Prompts as a model with this template words them that is given a tool."""
    tokenizer = AutoTokenizer.from_pretrained(shipped_model("nanorlhf:adder"))
    tokenizer.chat_template = template
    config, _ = environment_of(TrainConfig(**options), [multiply])
    use_template(tokenizer, config)
    return PromptFormatter(tokenizer, config, asks=False)


@pytest.mark.parametrize("prompt", ["6*7=", [{"role": "user", "content": "6*7="}]])
def test_the_model_is_told_of_tools_whatever_the_prompt(prompt: Any) -> None:
    worded = wording(TELLS)
    assert worded.tokenizer.decode(worded(prompt)[1]) == "[multiply]6*7="


def test_tools_that_the_model_would_not_know_of_are_refused() -> None:
    with pytest.raises(UsageError, match="tools: the chat template has no place for them"):
        wording("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(UsageError, match="the tokenizer has no chat template"):
        wording(None)
    with pytest.raises(UsageError, match="tools: the chat template has no place for them"):
        wording(TELLS, chat_template="plain")
    with pytest.raises(UsageError, match="prompt_format must be chat"):
        wording(TELLS, prompt_format="text")("6*7=")


def test_wrong_settings_are_refused_early() -> None:
    with pytest.raises(UsageError, match="docstring"):
        tool_environment([lambda x: x])
    with pytest.raises(UsageError, match=r"say path/to/file.py:function"):
        tool_environment(["multiply"])
    args = GRPOConfig(environment="calculator", dataset_name="arithmetic", model_name_or_path="nanorlhf:adder")
    with pytest.raises(UsageError, match="choose one"):
        GRPOTrainer(args=args, tools=[multiply])
