"""A run in a notebook: a bar that moves and the summary, with a reward that was defined in a cell."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

CELLS = [
    """from nanorlhf.grpo import GRPOConfig, GRPOTrainer

def short(completions, **columns):
    return [-len(completion[-1]["content"]) for completion in completions]""",
    """GRPOTrainer(
    model="nanorlhf:adder",
    reward_funcs=short,
    args=GRPOConfig(
        dataset_name="arithmetic", dataset_test_split="test", eval_prompts=8, prompts_per_step=4, num_generations=4,
        max_prompt_length=32, max_completion_length=16, max_steps=2, engine="hf", device="cpu", output_dir="run",
    ),
).train();""",
]


def outputs(cell: Any, kind: str, name: str = "") -> list[Any]:
    return [output for output in cell.outputs if output.output_type == kind and output.get("name", "") == name]


@pytest.mark.slow
def test_run_in_a_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in CELLS])
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    imported, trained = notebook.cells
    assert imported.outputs == [] and outputs(trained, "stream", "stderr") == []
    said = "".join(output.text for output in outputs(trained, "stream", "stdout"))
    for words in ("run directory run; device cpu, engine HFEngine", "held-out reward -", "2 steps in", "is in run"):
        assert words in said
    assert "step 1/2" not in said, "the bar stands for the lines of a log file"
    (bar,) = outputs(trained, "display_data")
    widgets = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"].state
    parts = widgets[bar.data["application/vnd.jupyter.widget-view+json"].model_id].state.children
    before, filled, after = (widgets[part.removeprefix("IPY_MODEL_")].state for part in parts)
    assert filled.value == filled.max == 2 and filled.bar_style == "success"
    assert before.value.replace("\u2007", " ").endswith(" tokens: 100%")
    assert "2/2" in after.value and "reward/mean=-" in after.value and "eval/reward=-" in after.value
