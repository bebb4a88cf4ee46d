"""Every option and every kind of file that can be wrong, and the one line that says so before a model loads."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml

from nanorlhf.__main__ import ALGORITHMS
from nanorlhf.config.names import shipped_model
from nanorlhf.config.training import TrainConfig
from nanorlhf.policy.policy import Policy
from tests.test_trainer import small


def config_class(algorithm: str) -> type[TrainConfig]:
    """The options of an algorithm."""
    module = f"nanorlhf.{algorithm}.config"
    found = vars(importlib.import_module(module)).values()
    (own,) = [c for c in found if isinstance(c, type) and issubclass(c, TrainConfig) and c.__module__ == module]
    return own


OPTIONS = {name: get_type_hints(config_class(name)) for name in ALGORITHMS}
EVERY = {name: (algorithm, hint) for algorithm in reversed(ALGORITHMS) for name, hint in OPTIONS[algorithm].items()}

SIGNED = {"entropy_coef"}  # a malus is a choice
# Nothing that can be written there is wrong.
FREE = {"project", "run_name", "tags", "system_prompt", "stop"}
# What is wrong with these is that the hub does not have it, under another name that has rows of its own.
ON_THE_HUB = {"dataset_config", "dataset_test_config"}

# Options, by a word for what is wrong; then a part of what is said. Files are those of `files` below.
WRONG: dict[str, tuple[list[str], str]] = {
    "model_name_or_path: missing": (["--model_name_or_path", "./nowhere"], "nowhere"),
    "model_name_or_path: not shipped": (["--model_name_or_path", "nanorlhf:addder"], "did you mean 'adder'?"),
    "model_name_or_path: none": (["--model_name_or_path", ""], "no model: say model_name_or_path"),
    "model_name_or_path: broken": (["--model_name_or_path", "broken_model"], "cannot be loaded"),
    "model_name_or_path: a file": (["--model_name_or_path", "text.txt"], "cannot be loaded"),
    "model_name_or_path: empty folder": (["--model_name_or_path", "folder"], "cannot be loaded"),
    "model_name_or_path: a router's loss": (["--model_name_or_path", "router"], "set output_router_logits to false"),
    "model_name_or_path: no tokenizer": (["--model_name_or_path", "untokenized"], "has no tokenizer; save one"),
    "model_name_or_path: no tokenizer file": (
        ["--model_name_or_path", "untokenized_llama"],
        "no tokenizer that can be read",
    ),
    "model_name_or_path: a broken tokenizer": (
        ["--model_name_or_path", "mistokenized"],
        "no tokenizer that can be read",
    ),
    "ppo critic_model_name_or_path: no tokenizer": (
        ["--critic_model_name_or_path", "untokenized"],
        "critic_model_name_or_path='untokenized' has no tokenizer",
    ),
    "adapter_name_or_path: missing": (["--adapter_name_or_path", "./nowhere"], "holds no adapter"),
    "adapter_name_or_path: broken": (["--adapter_name_or_path", "broken_adapter"], "holds no adapter"),
    "adapter_name_or_path: with all weights": (["--adapter_name_or_path", "x", "--lora", "none"], "leave lora"),
    "device: unknown": (["--device", "gpu"], "device='gpu' cannot work"),
    "device: not there": (["--device", "mps"], "device='mps' cannot work"),
    "dataset_name: none": (["--dataset_name", ""], "no dataset: say dataset_name"),
    "dataset_name: missing": (["--dataset_name", "nowhere.jsonl"], "no such file"),
    "dataset_name: empty": (["--dataset_name", "empty.jsonl"], "the file is empty"),
    "dataset_name: no JSON": (["--dataset_name", "broken.jsonl"], "cannot be loaded"),
    "dataset_name: no parquet": (["--dataset_name", "broken.parquet"], "cannot be loaded"),
    "dataset_name: numbers": (["--dataset_name", "numbers.jsonl"], "cannot be loaded"),
    "dataset_name: no rows": (["--dataset_name", "no_rows.csv"], "corresponds to no data"),
    "dataset_name: empty folder": (["--dataset_name", "folder"], "cannot be loaded"),
    "dataset_name: a folder of nothing known": (["--dataset_name", "odd_folder"], "cannot be loaded"),
    "dataset_name: no function": (["--dataset_name", "mine.py:rowz"], "did you mean 'rows'?"),
    "dataset_name: a function that raises": (["--dataset_name", "mine.py:raises"], "failed on split 'train'"),
    "dataset_name: a function without rows": (["--dataset_name", "mine.py:nothing"], "there are no rows"),
    "dataset_name: a function of numbers": (["--dataset_name", "mine.py:numbers"], "a row maps columns to values"),
    "dataset_name: rows of two kinds": (["--dataset_name", "mine.py:mixed"], "the rows make no table"),
    "dataset_name: no module": (["--dataset_name", "no.such:rows"], "cannot be imported"),
    "dataset_name: no task": (["--dataset_name", "reasoning_gym:chain_summ"], "chain_sum"),
    "dataset_name: no prompt": (["--dataset_name", "odd.jsonl"], "needs the column 'prompt'"),
    "dataset_name: no answer": (["--dataset_name", "unanswered.jsonl"], "needs the column 'answer'"),
    "dataset_name: a prompt of numbers": (["--dataset_name", "number_prompt.jsonl"], "text or a list of messages"),
    "dataset_name: empty prompts": (["--dataset_name", "empty_prompts.jsonl"], "no prompt of the dataset can be used"),
    "dataset_train_split: unknown": (["--dataset_train_split", "trian"], "choose 'train' or 'test'"),
    "dataset_train_split: no part": (["--dataset_train_split", "train[5"], "train[5"),
    "dataset_train_split: empty part": (["--dataset_train_split", "train[:0]"], "has no rows"),
    "dataset_test_name: missing": (["--dataset_test_name", "nowhere.csv"], "no such file"),
    "dataset_test_split: unknown": (["--dataset_test_split", "tset"], "tset"),
    "streaming: of a part": (
        ["--dataset_name", "rows.jsonl", "--streaming", "--dataset_train_split", "train[:2]"],
        "part",
    ),
    "columns: no such prompt": (["--prompt_column", "promt"], "did you mean 'prompt'?"),
    "columns: missing": (["--columns", "{answer: solution}"], "columns needs the column 'solution'"),
    "answer_pattern: no expression": (["--answer_pattern", "("], "answer_pattern"),
    "answer_pattern: no group": (["--answer_pattern", "a.c"], "answer_pattern"),
    "answer_pattern: never found": (["--answer_pattern", "(xyz)"], "finds no answer"),
    "prompt_template: missing": (["--prompt_template", "{question}"], "prompt_template needs the column 'question'"),
    "few_shot: more than there are": (["--dataset_name", "rows.jsonl", "--few_shot", "9"], "needs 10 rows"),
    "chat_template: unknown": (["--chat_template", "plan"], "did you mean 'plain'?"),
    "chat_template: no jinja": (["--chat_template", "broken.jinja"], "the chat template cannot"),
    "chat_template: no text": (["--chat_template", "broken.parquet"], "chat_template"),
    "chat_template_kwargs: ours": (["--chat_template_kwargs", "{tokenize: true}"], "set by the trainer itself"),
    "max_completion_length: context": (["--max_completion_length", "100000"], "the model takes"),
    "max_prompt_length: too short": (["--max_prompt_length", "1"], "longer than 1 tokens"),
    "environment: unknown": (["--environment", "calculater"], "did you mean 'calculator'?"),
    "environment: no class": (["--environment", "mine.py:rows"], "mine.py:rows"),
    "environment: missing": (["--environment", "nowhere.py:Lock"], "there is no file nowhere.py"),
    "tools: missing": (["--tools", "nowhere.py:add"], "there is no file nowhere.py"),
    "tools: undescribed": (["--tools", "mine.py:bare"], "it has no docstring"),
    "tools: no place in the template": (["--tools", "mine.py:add"], "tools: the chat template has no place for them"),
    "tools: and an environment": (["--tools", "mine.py:bare", "--environment", "guessing"], "choose one"),
    "reward_funcs: none": (["--reward_funcs", ""], "no reward: name one"),
    "reward_funcs: unknown": (["--reward_funcs", "exact_anser"], "did you mean 'exact_answer'?"),
    "reward_funcs: missing": (["--reward_funcs", "nowhere.py:near"], "there is no file nowhere.py"),
    "reward_funcs: only a file": (["--reward_funcs", "mine.py"], "say which function of the file, mine.py:FUNCTION"),
    "reward_funcs: broken": (["--reward_funcs", "broken.py:near"], "cannot be imported: SyntaxError"),
    "reward_funcs: exits": (["--reward_funcs", "exits.py:near"], "cannot be imported: SystemExit"),
    "reward_funcs: not in the file": (["--reward_funcs", "mine.py:nearr"], "did you mean 'near'?"),
    "reward_funcs: no function": (["--reward_funcs", "mine.py:NUMBER"], "must name a function"),
    "reward_funcs: twice": (["--reward_funcs", "length,length"], "a name of its own"),
    "reward_funcs: an argument too many": (["--reward_funcs", "exact_answer:x"], "takes no :x"),
    "reward_funcs: no such judge": (["--reward_funcs", "model:./nowhere"], "nowhere"),
    "reward_weights: too many": (["--reward_weights", "[1,2]"], "one weight"),
    "reward_weights: nothing is learned": (["--reward_weights", "0"], "one other than 0"),
    "max_steps: no number": (["--max_steps", "many"], "max_steps='many' is of the wrong type: it takes a whole number"),
    "engine: none of them": (
        ["--engine", "sglang"],
        "engine='sglang' is of the wrong type: it takes one of auto, vllm, hf",
    ),
    "max_minutes: no number": (["--max_minutes", "soon"], "it takes a number or nothing (null)"),
    "reward_weights: no number": (["--reward_weights", "1,a"], "reward_weights='1,a' is of the wrong type"),
    "reward_weights: not finite": (["--reward_weights", "[.nan]"], "a finite number"),
    "reward_options: no such reward": (["--reward_options", "{exact: {}}"], "none of this run's rewards"),
    "reward_options: no such option": (["--reward_options", "{exact_answer: {x: 1}}"], "has no option 'x'"),
    "reward_options: wrong type": (
        ["--reward_funcs", "lexical_richness", "--reward_options", "{lexical_richness: {brevity_penalty_scale: a}}"],
        "of the wrong type",
    ),
    "reward_together: unknown": (["--reward_together", "exact_anser"], "did you mean 'exact_answer'?"),
    "reward_secrets: not there": (["--reward_secrets", "[NO_SUCH_KEY]"], "the environment has no NO_SUCH_KEY"),
    "algorithm: a name that is a path": (["--algorithm", "mine.py:Elsewhere"], "folders are named after its name"),
    "lora_r: more than fits": (["--lora_r", "1000000000"], "weights, their gradients and moments need"),
    "lora_dropout: all": (["--lora_dropout", "1"], "below 1"),
    "adam_beta1: 1": (["--adam_beta1", "1"], "below 1"),
    "adam_beta2: 1": (["--adam_beta2", "1"], "below 1"),
    "reward_failure_limit: above 1": (["--reward_failure_limit", "2"], "between 0 and 1"),
    "activation_offload: without recomputing": (
        ["--gradient_checkpointing", "false", "--activation_offload", "on"],
        "nothing to move",
    ),
    "weight_sync: without an adapter": (["--weight_sync", "lora", "--lora", "none"], "no adapter; use merged"),
    "output_dir: below a file": (["--output_dir", "text.txt/run"], "cannot be written"),
    "output_dir: not ours": (["--output_dir", "odd_folder"], "is not empty"),
    "output_dir: not ours to replace": (["--output_dir", "odd_folder", "--overwrite_output_dir"], "no run of ours"),
    "resume: missing": (["--resume", "nowhere"], "no run to continue"),
    "resume: no options": (["--resume", "broken_run"], "config.yaml"),
    "resume: no facts": (["--resume", "half_run"], "run.json"),
    "resume: another algorithm's": (["--resume", "ppo_run"], "nanorlhf ppo --resume ppo_run"),
    "resume: another algorithm's, by TRL's name": (["--resume_from_checkpoint", "ppo_run"], "is a run of ppo"),
    "output_dir: not that of the run resumed": (
        ["--resume", "grpo_run/checkpoints/step_000001", "--output_dir", "elsewhere"],
        "output_dir='elsewhere' cannot work: what is resumed goes on where it is, in grpo_run",
    ),
    "stop_on: unknown": (["--stop_on", "[truncations]"], "did you mean 'truncation'?"),
    "sft stop_on: of rewards": (["--stop_on", "entropy_collapse"], "stop_on=['entropy_collapse'] cannot work"),
    "report_to: unknown": (["--report_to", "wandbb"], "did you mean 'wandb'?"),
    "algorithm: missing": (["--algorithm", "nowhere.py:Mine"], "there is no file nowhere.py"),
    "algorithm: no algorithm": (["--algorithm", "mine.py:near"], "must be a class derived from"),
    "num_generations: one": (["--num_generations", "1"], "at least 2"),
    "num_generations: more than fit": (["--num_generations", "1000000000"], "max_completion_length 32 token ids need"),
    "prompts_per_step: more than fit": (["--prompts_per_step", "1000000000"], "prompts_per_step=1000000000 cannot"),
    "sft prompts_per_step: more than fit": (["--prompts_per_step", "9000000000"], "prompts_per_step=9000000000 cannot"),
    "reward_workers: more than fit": (["--reward_workers", "1000000000"], "such processes need"),
    "top_p without a counterpart": (["--top_p", "0.9"], "top_p has no counterpart here"),
    "top_k without a counterpart": (["--top_k", "5"], "use temperature"),
    "rollouts_from: missing": (["--rollouts_from", "nowhere"], "there are no rollouts"),
    "rollouts_from: broken": (["--rollouts_from", "broken_rollouts"], "rollouts_from"),
    "overlong_buffer: all of it": (["--overlong_buffer", "32"], "below max_completion_length"),
    "updates_per_step: more than groups": (["--updates_per_step", "33"], "at most prompts_per_step=32"),
    "kl_estimator: unknown": (["--kl_estimator", "k4"], "kl_estimator"),
    "kl_target: nothing to steer": (["--kl_target", "0.1"], "must start above 0"),
    "ref_refresh_steps: no reference": (["--ref_refresh_steps", "1"], "no reference to refresh"),
    "clip_low: all": (["--clip_low", "1"], "below 1"),
    "dual_clip: 1": (["--dual_clip", "1"], "above 1"),
    "dual_clip: no such clip": (["--dual_clip", "3", "--policy_loss", "sapo"], "no such clip"),
    "top_entropy_fraction: none": (["--top_entropy_fraction", "0"], "above 0"),
    "seed: too large": (["--seed", "4294967296"], "below 4,294,967,296"),
    "max_steps: too large": (["--max_steps", "99999999999999999999"], "max_steps"),
    "unknown option": (["--learning_rat", "1"], "unknown option 'learning_rat': did you mean 'learning_rate'?"),
    "no option": (["learning_rate"], "learning_rate"),
    "an alias of the wrong type": (["--total_episodes", "many"], "total_episodes='many'"),
    "an alias beside its option": (["--lr", "1", "--learning_rate", "1"], "both are given"),
    "an alias without a counterpart": (["--gradient_accumulation_steps", "4"], "no counterpart"),
    "recipe: unknown": (["--recipe", "tinny"], "did you mean 'tiny'?"),
    "recipe: missing": (["--recipe", "nowhere.yaml"], "unknown recipe"),
    "recipe: no YAML": (["--recipe", "broken.yaml"], "broken.yaml"),
    "recipe: a list": (["--recipe", "list.yaml"], "list.yaml"),
    "recipe: unknown option": (["--recipe", "unknown.yaml"], "did you mean 'learning_rate'?"),
    "recipe: wrong type": (["--recipe", "typed.yaml"], "typed.yaml: learning_rate=['fast'] is of the wrong type"),
    "recipe: no text": (["--recipe", "binary.yaml"], "binary.yaml"),
    "ppo critic_model_name_or_path: missing": (["--critic_model_name_or_path", "./nowhere"], "nowhere"),
    "ppo lora: no critic": (["--lora", "none"], "the critic cannot share the base"),
    "ppo gamma: above 1": (["--gamma", "2"], "between 0 and 1"),
    "ppo lam: above 1": (["--lam", "2"], "between 0 and 1"),
    "reinforce ema_beta: 1": (["--ema_beta", "1"], "below 1"),
    "reinforce baseline: one answer": (["--baseline", "group"], "2 answers or more"),
    "dpo beta: 0": (["--beta", "0"], "above 0"),
    "dpo dataset_name: no pairs": (["--dataset_name", "rows.jsonl", "--reward_funcs", ""], "chosen"),
    "sft dataset_name: no completions": (
        ["--dataset_name", "unanswered.jsonl", "--reward_funcs", ""],
        "demonstrations have the columns",
    ),
    "sft reward_funcs: nobody to judge": (["--reward_funcs", "numeric", "--dataset_test_split", "null"], "held-out"),
}
SPECIFIC = tuple(name for name in ALGORITHMS if name != "grpo")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything in it that can be wrong with a file, as the working directory."""
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(4)]
    jsonl = {
        "rows": rows,
        "odd": [{"x": 1}],
        "unanswered": [{"prompt": "1+1="}],
        "number_prompt": [{"prompt": 3, "answer": "3"}],
        "empty_prompts": [{"prompt": "", "answer": "3"}],
        "numbers": [1, 2],
    }
    for name, values in jsonl.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    texts = {
        "empty.jsonl": "",
        "broken.jsonl": '{"prompt": "1+1=", \n',
        "broken.parquet": "PAR1\xff, but not so",
        "no_rows.csv": "prompt,answer\n",
        "text.txt": "text",
        "broken.jinja": "{% for message in %}",
        "broken.py": "def near(:",
        "exits.py": "raise SystemExit(3)",
        "mine.py": MINE,
        "broken.yaml": "learning_rate: [1",
        "list.yaml": "- learning_rate\n",
        "unknown.yaml": "learning_rat: 1\n",
        "typed.yaml": "learning_rate: [fast]\n",
        "broken_model/config.json": "{",
        "broken_adapter/adapter_config.json": "{",
        "router/config.json": '{"model_type": "mixtral", "output_router_logits": true}',
        "odd_folder/thesis.xyz": "years of work",
        "broken_run/config.yaml": "a: [",
        "half_run/config.yaml": yaml.safe_dump(small(Path("half_run"))),
        "ppo_run/config.yaml": yaml.safe_dump(small(Path("ppo_run")) | {"gamma": 1.0, "algorithm": None}),
        "ppo_run/run.json": json.dumps({"algorithm": "ppo"}),
        "grpo_run/config.yaml": yaml.safe_dump(small(Path("grpo_run"))),
        "grpo_run/run.json": json.dumps({"algorithm": "grpo"}),
        "broken_rollouts/step_000001.parquet": "PAR1",
        "folder/.keep": "",
        "untokenized/config.json": ABOUT,
        "untokenized_llama/config.json": json.dumps({"model_type": "llama"}),
        "mistokenized/config.json": ABOUT,
        "mistokenized/tokenizer.json": "{",
    }
    for name, text in texts.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="latin-1")
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


ABOUT = (Path(shipped_model("nanorlhf:adder")) / "config.json").read_text()
MINE = """
NUMBER = 3

def near(completions, **columns):
    return [1.0 for _ in completions]

def rows(split):
    return [{"prompt": "1+1=", "answer": "2"}]

def raises(split):
    raise KeyError(split)

def nothing(split):
    return []

def numbers(split):
    return [1]

def mixed(split):
    return [{"prompt": "1+1=", "answer": 2}, {"prompt": ["a"], "answer": {"b": 1}}]

def bare(a, b):
    return a + b

def add(a: int, b: int) -> int:
    \'\'\'Adds.

    Args:
        a: One number.
        b: The other.
    \'\'\'
    return a + b

from nanorlhf.algorithm import PolicyGradient

class Elsewhere(PolicyGradient):
    name = "../elsewhere"
"""


def answer(algorithm: str, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The answer to a command line on stderr; it must be one line, and a mistake of the user's."""
    capsys.readouterr()
    given = [] if "--recipe" in argv or "--resume" in argv else ["--recipe", "tiny"]
    if "--dataset_name" in argv and "--dataset_test_split" not in argv:
        given += ["--dataset_test_split", "null"]
    status = importlib.import_module(f"nanorlhf.{algorithm}.__main__").main([*given, *argv])
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith(f"nanorlhf {algorithm}")]
    assert status == 2, error
    assert "Traceback" not in error
    assert len(lines) == 1 and error.rstrip("\n").endswith(lines[0]), error
    assert lines[0].isprintable()
    return lines[0]


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model may be loaded."""

    def loads(*_: object, **__: object) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr(Policy, "__init__", loads)


@pytest.mark.usefixtures("files", "unloaded")
@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    first = case.split(maxsplit=1)[0]
    argv, said = WRONG[case]
    assert said in answer(first if first in SPECIFIC else "grpo", argv, capsys)


def choices(hint: Any) -> list[Any]:
    """The parts of a union, or the hint itself."""
    plain = get_origin(hint) in (None, Literal, list, dict)
    return [hint] if plain else list(get_args(hint))


def wrong_values(hint: Any) -> list[str]:
    """Texts that no value of this type can look like on the command line; none, if any text is a value."""
    parts = choices(hint)
    if str in parts:
        return []
    if list[str] in parts:  # a word is a list of one, and nothing a list of none
        return ["[[1]]", "{a: {b: [c]}}"]
    values = (
        ["perhaps", "[[1]]", "{a: {b: [c]}}"]
        if not any(get_origin(part) is dict for part in parts)
        else ["perhaps", "[1]"]
    )
    return [*values, ""] if bool not in parts else values


def unusual_numbers(hint: Any) -> list[str]:
    """Numbers that no option takes, or few."""
    return [".nan", ".inf", "-.inf"] if float in choices(hint) else ["1.5"] if int in choices(hint) else []


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("name", EVERY)
def test_a_value_of_the_wrong_type_is_refused_by_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    algorithm, hint = EVERY[name]
    for value in [*wrong_values(hint), *unusual_numbers(hint)]:
        assert name in answer(algorithm, [f"--{name}", value], capsys), value


NUMBERS = [name for name, (_, hint) in EVERY.items() if {int, float} & {*choices(hint)}]


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("name", [name for name in NUMBERS if name not in SIGNED])
def test_a_number_below_all_that_work_is_refused_by_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert name in answer(EVERY[name][0], [f"--{name}", "-2"], capsys)


def test_every_option_has_its_mistake_in_these_tables() -> None:
    rows = {case.split(":")[0].split()[-1] for case in WRONG}
    unmentioned = {
        name for name, (_, hint) in EVERY.items() if not wrong_values(hint) and name not in rows | FREE | ON_THE_HUB
    }
    assert unmentioned == set()
    known = EVERY.keys() | {"unknown option", "no option", "recipe"}
    assert {row for row in rows if row not in known} <= {"option", "type", "counterpart"}
    assert not (FREE | ON_THE_HUB) & rows


@pytest.mark.usefixtures("files")
def test_layers_that_the_model_does_not_have_are_refused_once_it_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert "lora='q_prj' cannot work: Target modules" in answer("grpo", ["--lora", "q_prj"], capsys)
