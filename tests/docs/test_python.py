"""Every Python block of the documentation runs, as it stands there but for its size."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nanorlhf.__main__ import ALGORITHMS
from nanorlhf.config.aliases import ALIASES, Gone
from nanorlhf.config.option import defaults
from nanorlhf.data import sources
from nanorlhf.environments import protocol
from nanorlhf.environments.tools import tool_environment
from nanorlhf.grpo import GRPOConfig
from nanorlhf.trainer import Trainer
from tests.docs.pages import DOCS, ROOT, blocks
from tests.samples import snippet

SMALL = {"engine": "hf", "device": "cpu", "max_steps": 1, "prompts_per_step": 2, "num_generations": 2}
SMALL |= {"max_prompt_length": 200, "max_completion_length": 8, "eval_prompts": 2, "reward_workers": 0}
ROWS = [{"prompt": [{"role": "user", "content": f"{n}+{n}="}], "answer": str(2 * n), "target": 2 * n} for n in range(8)]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Trainer]:
    """Every trainer is made small, with the shipped model in place of a larger one; gives those that were made."""
    made: list[Trainer] = []
    plain_init = Trainer.__init__

    def init(self: Trainer, **given: Any) -> None:
        args = dataclasses.replace(given["args"], **SMALL, output_dir=str(tmp_path / f"run{len(made)}"))
        plain_init(self, **given | {"args": args, "model": "nanorlhf:adder"})
        made.append(self)

    monkeypatch.setattr(Trainer, "__init__", init)
    monkeypatch.chdir(tmp_path)
    return made


def python_blocks(page: Path) -> list[str]:
    return [block.text for block in blocks(page) if block.language == "python"]


@pytest.mark.parametrize("page", [page for page in DOCS if python_blocks(page)], ids=lambda page: page.stem)
def test_blocks_run(page: Path, small: list[Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as somebody would paste them, with a `model` and a `dataset` at hand."""
    monkeypatch.setitem(sys.modules, "trl", stand_in_for_trl())
    names: dict[str, Any] = {"model": "nanorlhf:adder", "dataset": ROWS, "__name__": "__main__"}
    text = "\n".join(python_blocks(page))
    for block in python_blocks(page):
        exec(compile(block, page.name, "exec", dont_inherit=True), names)  # noqa: S102  that is the point
    assert len(small) == text.count("Trainer(\n") + text.count("Trainer(model"), "every trainer there is was made"
    assert all(trainer.done == 1 for trainer in small)


def test_a_tool_as_it_is_shown_can_be_described_and_called() -> None:
    names: dict[str, Any] = {}
    exec(snippet("tools.py"), names)  # noqa: S102
    environment, (schema,) = tool_environment([names["add"]])
    call = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'
    assert schema["function"]["name"] == "add" and environment().step(call) == ("5", 0.0, False)


def test_a_reward_of_verls_form_as_it_is_shown_scores() -> None:
    names: dict[str, Any] = {}
    exec(snippet("from_verl.py"), names)  # noqa: S102
    assert names["reward"](["it is 4", "5"], ground_truth=["4", "4"], data_source=["x", "x"]) == [1.0, 0.0]


def stand_in_for_trl() -> ModuleType:
    """TRL's names with our trainer behind them: what has no counterpart is left away, as the page says."""
    from nanorlhf.grpo import GRPOTrainer

    def config(**options: Any) -> GRPOConfig:
        known = defaults(GRPOConfig)
        assert not options.keys() - ALIASES.keys() - known.keys(), "a name that nobody knows here"
        return GRPOConfig(**{name: v for name, v in options.items() if not isinstance(ALIASES.get(name), Gone)})

    module = ModuleType("trl")
    module.GRPOConfig, module.GRPOTrainer = config, GRPOTrainer  # type: ignore[attr-defined]
    return module


def test_the_names_before_are_trls_and_after_comes_the_same() -> None:
    from trl.trainer.grpo_config import GRPOConfig as Theirs

    fields = {field.name for field in dataclasses.fields(Theirs)}
    before, after = (arguments(ROOT / "docs" / "moving.md", name) for name in ("before.py", "after.py"))
    assert before.keys() <= fields
    batch = before.pop("per_device_train_batch_size") * before.pop("gradient_accumulation_steps")
    assert after.pop("prompts_per_step") * before["num_generations"] == batch
    assert before == after


def arguments(page: Path, name: str) -> dict[str, Any]:
    """The arguments of the config that a block makes."""
    (text,) = (block.text for block in blocks(page) if block.name == name)
    said: dict[str, Any] = {}
    call = text[text.index("args = GRPOConfig(") : text.index("\ntrainer")]
    exec(call, {"GRPOConfig": lambda **options: said.update(options)})  # noqa: S102
    return said


def test_every_alias_is_on_the_page_of_names() -> None:
    text = (ROOT / "docs" / "moving.md").read_text()
    assert [name for name in ALIASES if f"`{name}`" not in text] == []


def test_the_pages_name_all_that_is_built_in() -> None:
    texts = {page.stem: page.read_text() for page in DOCS}
    assert [name for name in sources.BUILT_IN if f"`{name}`" not in texts["data"]] == []
    assert [name for name in protocol.BUILT_IN if f"`{name}`" not in texts["environments"]] == []
    assert [name for name in ALGORITHMS if f"(../{name}/)" not in texts["algorithms"]] == []


def test_the_options_are_those_of_the_code() -> None:
    from docs.making import options

    assert options.PAGE.read_text() == options.page(), "python -m docs.making.options writes it"
