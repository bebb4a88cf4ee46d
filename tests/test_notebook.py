"""The notebook runs from top to bottom: a reward from a cell, a bar that moves, samples and a model that answers."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "first_run.ipynb"


def outputs(cell: Any, kind: str, name: str = "") -> list[Any]:
    return [output for output in cell.outputs if output.output_type == kind and output.get("name", "") == name]


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    monkeypatch.setenv("NANORLHF_STEPS", "2")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "it is kept without what a machine printed"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    imported, scored, trained, curve, samples, exported = [c for c in notebook.cells if c.cell_type == "code"]
    assert imported.outputs == [] and outputs(trained, "stream", "stderr") == []
    assert outputs(scored, "execute_result")[0].data["text/plain"] == "[1.0, 0.25, 0.0]"
    said = "".join(output.text for output in outputs(trained, "stream", "stdout"))
    for words in (
        "run directory runs/first; device ",
        ", engine HFEngine",
        "held-out reward ",
        "2 steps in",
        "is in runs",
    ):
        assert words in said, words
    assert "step 1/2" not in said, "the bar stands for the lines of a log file"
    (bar,) = outputs(trained, "display_data")
    widgets = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"].state
    parts = widgets[bar.data["application/vnd.jupyter.widget-view+json"].model_id].state.children
    before, filled, after = (widgets[part.removeprefix("IPY_MODEL_")].state for part in parts)
    assert filled.value == filled.max == 2 and filled.bar_style == "success"
    assert before.value.replace("\u2007", " ").endswith(" tokens: 100%")
    assert "2/2" in after.value and "reward/mean=" in after.value and "eval/reward=" in after.value
    assert "image/png" in outputs(curve, "execute_result")[0].data
    shown = outputs(samples, "stream", "stdout")[0].text.splitlines()
    assert shown[0] == "step 1" and shown[9] == "step 2" and len(shown) == 18
    assert all(re.fullmatch(r"  \d\d\+\d\d= .* reward [01]\.\d\d, [+-]\d\.\d\d", line) for line in shown[1:9]), shown
    assert re.search(r"\d", outputs(exported, "execute_result")[0].data["text/plain"])
    assert (tmp_path / "merged" / "first" / "README.md").is_file()
