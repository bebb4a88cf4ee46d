"""The command line: layers, other trainers' names, and mistakes answered before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from nanorlhf.__main__ import ALGORITHMS
from nanorlhf.__main__ import main as nanorlhf
from nanorlhf.cli import parse
from nanorlhf.config.aliases import ALIASES, Became
from nanorlhf.config.option import split_names
from nanorlhf.config.training import CriticConfig
from nanorlhf.dpo import DPOConfig
from nanorlhf.errors import UsageError
from nanorlhf.grpo import GRPOConfig
from nanorlhf.grpo.__main__ import main
from nanorlhf.records import directory
from nanorlhf.scoring.reward import find_rewards
from tests.test_wrong_input import config_class

RECIPES = Path(__file__).parents[1] / "grpo" / "recipes"


def options(*argv: str) -> GRPOConfig:
    return parse(GRPOConfig, "grpo", RECIPES, list(argv))[1]


def test_command_line_lies_over_recipes_in_order(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("learning_rate: 3e-4\nnum_generations: 4\n")
    config = options("--recipe", f"tiny,{mine}", "--num_generations", "16")
    assert (config.learning_rate, config.num_generations, config.prompts_per_step) == (3e-4, 16, 32)


def test_print_config_is_a_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--recipe", "tiny", "--kl_coef", "0.5", "--print_config"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert options("--recipe", str(printed)) == options("--recipe", "tiny", "--kl_coef", "0.5")


def test_other_trainers_names(capsys: pytest.CaptureFixture[str]) -> None:
    config = options(
        "--recipe",
        "tiny",
        "--learning-rate",
        "0.01",
        "--beta",
        "0.04",
        "--max_new_tokens",
        "9",
        "--total_episodes",
        "2560",
    )
    assert (config.kl_coef, config.max_completion_length, config.max_steps) == (0.04, 9, 10)
    assert config.learning_rate == 0.01
    assert "beta is kl_coef here: 0.04" in capsys.readouterr().out
    assert GRPOConfig(group_size=4, loss_type="dr_grpo", reward_model_path="x/y").rewards == ["model:x/y"]  # type: ignore[call-arg]
    assert GRPOConfig(loss_type="dr_grpo").norm == "constant"  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="both are given"):
        GRPOConfig(beta=0.1, kl_coef=0.1)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="token_budget"):
        GRPOConfig(gradient_accumulation_steps=4)  # type: ignore[call-arg]


LISTS: dict[str, tuple[str, list[Any]]] = {
    "reward_weights": ("1,0.1", [1, 0.1]),
    "reward_funcs": ("numeric,think_format", ["numeric", "think_format"]),
    "tags": ("a,b c", ["a", "b c"]),
    "stop_on": ("truncation, kl_runaway", ["truncation", "kl_runaway"]),
    "reward_secrets": ("PATH,HOME", ["PATH", "HOME"]),
    "report_to": ("wandb,tensorboard", ["wandb", "tensorboard"]),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_have_commas_or_brackets_on_the_command_line_in_recipes_and_in_python(name: str, tmp_path: Path) -> None:
    text, listed = LISTS[name]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{name}: {text}\n")
    first = ("--recipe", str(recipe))
    as_text: dict[str, Any] = {name: text}
    as_list: dict[str, Any] = {name: listed}
    found = [options(f"--{name}", text), options(f"--{name}", json.dumps(listed)), options(*first)]
    found += [GRPOConfig(**as_text), GRPOConfig(**as_list)]
    assert [split(getattr(config, name)) for config in found] == [listed] * 5
    alone = options(f"--{name}", text.split(",")[0])
    assert split(getattr(alone, name)) == listed[:1]


def split(value: Any) -> list[Any]:
    """The list that an option stands for which also takes text."""
    return split_names(value) if isinstance(value, str) else value


TEXTS: dict[str, Any] = {
    "answer_pattern": r"#### (-?\d+)", "system_prompt": "### Rules: be brief", "prompt_template": "# {prompt}",
    "stop": "[END]", "run_name": "~", "reward_funcs": "regex,exact_answer",
    "reward_options": {"regex": {"pattern": "[abc]: \\d+ #"}}, "chat_template_kwargs": {"a": "1", "b": "off", "c": 1},
}  # fmt: skip


def test_texts_stay_what_they_are_on_the_command_line_in_recipes_and_in_runs_that_go_on(tmp_path: Path) -> None:
    listed: dict[str, Any] = TEXTS | {"stop": ["[END]"]}  # on the command line brackets are a list's
    words = {name: text if isinstance(text, str) else json.dumps(text) for name, text in listed.items()}
    assert options(*(word for name, text in words.items() for word in (f"--{name}", text))) == GRPOConfig(**listed)
    run = tmp_path / "run"
    made = GRPOConfig(**TEXTS, output_dir=str(run))
    directory.prepare(made, "grpo")
    assert options("--resume", str(run)) == dataclasses.replace(made, resume=str(run))
    recipe = tmp_path / "own.yaml"
    recipe.write_text("answer_pattern: '#### (.*)'\nwhiten_advantages: on\nlearning_rate: 1e-5\nengine_check: off\n")
    own = options("--recipe", str(recipe))
    assert (own.answer_pattern, own.whiten_advantages, own.learning_rate) == ("#### (.*)", "on", 1e-5)
    assert own.engine_check == "off" and options("--run_name", "null").run_name is None


def test_a_string_that_ends_completions_may_hold_commas() -> None:
    assert options("--stop", "so, the answer").stop_strings == ("so, the answer",)
    assert options("--stop", "").stop_strings == (), "a recipe's is taken back"


def test_what_depends_on_other_options_sees_them_under_any_name() -> None:
    asked = ("--total_episodes", "10240", "--rollout_batch_size", "64", "--rloo_k", "4")
    assert options(*asked).max_steps == 40
    assert options("--bf16", "true", "--use_peft", "false").dtype == "auto", "all weights learn"


def test_names_of_the_trainer_from_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    config = options("--bf16", "true", "--logging_steps", "5", "--num_train_epochs", "2", "--fp16", "false")
    assert (config.dtype, config.num_train_epochs) == ("bfloat16", 2)
    assert "logging_steps changes nothing here: every step is logged" in capsys.readouterr().out
    assert options("--bf16", "false").dtype == "float32"
    assert options("--bf16", "true", "--lora", "none").dtype == "auto", "whose master weights are float32"
    assert GRPOConfig(bf16=True, logging_steps=1, fp16=False).dtype == "bfloat16"  # type: ignore[call-arg]
    with pytest.raises(UsageError, match=r"fp16 has no counterpart here: .* use bf16"):
        options("--fp16", "true")


def test_options_of_trl_that_belong_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert options("--use_peft", "true", "--lora_target_modules", "q_proj,v_proj").lora == "q_proj,v_proj"
    assert options("--torch_dtype", "bfloat16", "--bf16", "true").dtype == "bfloat16"
    assert options("--vllm_mode", "colocate", "--importance_sampling_level", "token").policy_loss == "clipped"
    assert "vllm_mode" not in capsys.readouterr().out
    for words, advice in (
        (("--loss_type", "cispo"), "loss_type=cispo is policy_loss=cispo here"),
        (("--importance_sampling_level", "sequence"), "policy_loss gspo"),
        (("--max_length", "512"), "max_prompt_length and max_completion_length"),
        (("--reward_funcs", "org/judge"), "a classifier is model:org/judge"),
    ):
        with pytest.raises(UsageError, match=advice):
            find_rewards(options(*words).rewards)
    with pytest.raises(UsageError, match="loss_type is norm in other algorithms"):
        DPOConfig(loss_type="sigmoid")  # type: ignore[call-arg]


def test_options_that_earlier_runs_had(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "config.yaml"
    kept.write_text("prompt_column: prompt\ncolumns: {answer: final}\ntop_p: 1.0\ntop_k: 0\n")
    assert options("--recipe", str(kept)).columns == {"answer": "final"}
    assert capsys.readouterr().out == "", "nothing was asked for"
    kept.write_text("prompt_column: text\ncolumns: {answer: final}\n")
    assert options("--recipe", str(kept)).columns == {"answer": "final", "prompt": "text"}
    assert options("--recipe", str(kept), "--prompt_column", "q").columns == {"answer": "final", "prompt": "q"}
    with pytest.raises(UsageError, match="both are given; keep columns"):
        GRPOConfig(prompt_column="a", columns={"prompt": "b"})  # type: ignore[call-arg]
    with pytest.raises(UsageError, match=r"top_p has no counterpart here: .* use temperature"):
        GRPOConfig(top_p=0.9)  # type: ignore[call-arg]


def test_every_alias_leads_to_an_option() -> None:
    names = CriticConfig().to_dict()
    assert not [a for a, b in ALIASES.items() if isinstance(b, Became) and b.name not in names]
    assert not set(ALIASES) & set(names)


def printed(capsys: pytest.CaptureFixture[str], command: list[str]) -> str:
    """The text that a command prints before it stops."""
    try:
        code = nanorlhf(command)
    except SystemExit as stopped:
        code = stopped.code
    assert not code
    return capsys.readouterr().out


def listed(text: str) -> set[str]:
    """The options that a help text explains."""
    return set(re.findall(r"^  --(\w+)", text, re.MULTILINE))


STOPS = {"recipe", "print_config", "plan", "version", "help"}
KEYS = {"grpo": {"advantage", "scale_rewards"}, "ppo": {"critic_learning_rate", "lam"}, "rloo": {"policy_loss"}}
KEYS |= {"reinforce": {"baseline"}, "dpo": {"beta"}, "online_dpo": {"beta"}}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_help_lists_what_is_set_first_and_all_of_it_if_asked(
    algorithm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text, full = (printed(capsys, [algorithm, "--help", *more]) for more in ([], ["all"]))
    every = config_class(algorithm)().to_dict().keys()
    assert listed(full) == every | STOPS
    short = listed(text) - STOPS
    assert short <= every and 15 <= len(short) <= 25 and KEYS.get(algorithm, set()) <= short
    assert {"model_name_or_path", "dataset_name", "learning_rate", "max_steps", "output_dir", "seed"} <= short
    assert f"`nanorlhf {algorithm} --help all` lists all {len(every)} options." in " ".join(text.split())
    headings = re.findall(r"^(\w+):$", text, re.MULTILINE)
    assert headings == ["start", "model", "data", "rollout", "reward", "training", "run"]


def test_help_says_what_an_option_takes_and_what_it_is_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, ["grpo", "-h", "all"])
    lines = " ".join(text.split())
    for line in (
        "--recipe NAME Options from a recipe: calculator, ",
        "--learning_rate FLOAT Peak learning rate. (default: 1e-05)",
        "--engine auto|vllm|hf Who writes completions;",
        "--reward_weights FLOAT,... A weight for each reward",
        "--gpu_memory_gib FLOAT|auto Memory of the GPU",
        "--streaming [true|false] Read rows",
        "--columns {NAME: VALUE} More names",
        "'train[:500]' is a part of it. (default: train)",
    ):
        assert line in lines, line
    assert "SUPPRESS" not in text and max(map(len, text.splitlines())) <= 110


def test_an_option_that_is_set_first_stays_one_in_every_algorithm() -> None:
    """A class that defines an option anew, for another default, marks it again."""
    lost = []
    for algorithm in ALGORITHMS:
        own = config_class(algorithm)
        for base in own.__mro__[1:-1]:
            first = {f.name for f in dataclasses.fields(base) if f.metadata["first"]}
            lost += [
                f"{algorithm} {f.name}" for f in dataclasses.fields(own) if f.name in first and not f.metadata["first"]
            ]
    assert lost == []


@pytest.mark.parametrize("command", [["--version"], ["grpo", "--version"], ["evaluate", "--version"]])
def test_version(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said = printed(capsys, command)
    assert re.match(r"nanorlhf \d+\.\d+\.\d+ \(", said) and said.count("\n") == 1
    assert f"torch {version('torch')}, " in said and f"transformers {version('transformers')}" in said


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    said = printed(capsys, ["--help"])
    assert said == printed(capsys, []) and "--help all" in said and "--version" in said
    model = printed(capsys, ["evaluate", "--help"])
    assert model.startswith("usage: nanorlhf evaluate MODEL [--recipe NAME]")
    assert {"samples", "greedy", "output"} <= listed(model) and "reward_workers" not in listed(model)


def test_missing_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "1+1=", "answr": "2"}) + "\n")
    argv = [
        "--recipe",
        "tiny",
        "--dataset_name",
        str(rows),
        "--dataset_test_split",
        "null",
        "--output_dir",
        str(tmp_path / "r"),
    ]
    assert main(argv) == 2
    assert "needs the column 'answer'" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_a_run_is_never_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["--recipe", "tiny", "--output_dir", str(tmp_path)]) == 2
    assert main(["--recipe", "tiny", "--output_dir", str(tmp_path), "--overwrite_output_dir"]) == 2
    assert "no run of ours" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").exists()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({}))
    assert main(["--recipe", "tiny", "--output_dir", str(tmp_path)]) == 2
    assert "--overwrite_output_dir" in capsys.readouterr().err
