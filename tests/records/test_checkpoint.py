"""Checkpoints are whole or absent, hold nothing that could run, and a damaged one is not loaded."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanorlhf.config import names
from nanorlhf.errors import UsageError
from nanorlhf.records import checkpoint, state_file
from nanorlhf.system import files


def save(run: Path, step: int, keep: int = 2) -> Path:
    def write(folder: Path) -> None:
        (folder / "beside").mkdir()
        (folder / "beside" / "adapter.txt").write_text(f"weights of {step}")

    return checkpoint.save(run, step, write, {"optimizer": torch.ones(3)}, keep)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (1, 2, 3):
        save(tmp_path, step)
    return tmp_path


def test_nested_state_comes_back_as_it_was(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    adam = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    adam.step()
    shared = torch.arange(4)
    value = {"adam": adam.state_dict(), 3: ("a", None, float("inf")), "views": [shared, shared[::2]], "empty": {}}
    state_file.write(value, tmp_path, "kept")
    back = state_file.read(tmp_path, "kept")
    assert back[3] == value[3] and back["empty"] == {} and back.keys() == value.keys()
    assert [t.tolist() for t in back["views"]] == [[0, 1, 2, 3], [0, 2]]
    assert back["adam"]["param_groups"] == adam.state_dict()["param_groups"]
    assert all(torch.equal(back["adam"]["state"][0][k], v) for k, v in adam.state_dict()["state"][0].items())


def test_what_is_no_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="PosixPath is no state"):
        state_file.write({"where": tmp_path}, tmp_path, "kept")


def test_random_numbers_go_on_where_they_were(run: Path) -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002

    folder = save(run, 4)
    expected = draw()
    draw()
    kept = checkpoint.load_state(folder)
    assert draw() == expected
    assert kept["step"] == 4 and kept["optimizer"].tolist() == [1, 1, 1]


def test_no_file_of_a_checkpoint_is_a_pickle(run: Path) -> None:
    kinds = {path.suffix for path in (run / "checkpoints").rglob("*") if path.is_file()}
    assert kinds == {"", ".json", ".safetensors", ".txt"}


def test_the_oldest_go_and_no_draft_stays(run: Path) -> None:
    (run / "checkpoints" / ".step_000009.draft").mkdir()  # of a run that was killed as it saved
    save(run, 4)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step_000003", "step_000004"]
    assert names.latest(run) == run / "checkpoints" / "step_000004"


def test_what_a_killed_run_left_goes_without_a_new_checkpoint(run: Path) -> None:
    folder = run / "checkpoints"
    for name in (".step_000001.gone", ".step_000004.draft", "step_000000"):
        (folder / name).mkdir()
    (folder / ".latest.draft").touch()
    checkpoint.tidy(run, 2)
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step_000002", "step_000003"]


def test_a_run_killed_between_two_renames_still_has_its_newest(run: Path) -> None:
    files.discard(run / "checkpoints" / "step_000003")
    assert names.latest(run) == run / "checkpoints" / "step_000002"


@pytest.mark.parametrize("name", ["beside/adapter.txt", "trainer_state.safetensors", "checksums.json"])
@pytest.mark.parametrize("how", ["cut", "missing"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_offered(run: Path, name: str, how: str) -> None:
    path = run / "checkpoints" / "step_000003" / name
    data = path.read_bytes()
    path.unlink()
    if how == "cut":
        path.write_bytes(data[:-1] if name != "checksums.json" else data[:20])
    with pytest.raises(UsageError, match=r"step_000003 is damaged .*--resume .*step_000002"):
        checkpoint.chosen(str(run))
    before = run / "checkpoints" / "step_000002"
    assert checkpoint.chosen(str(before)) == before
    assert names.whole(run) == [before] and names.latest(run) == before


def test_without_a_sound_checkpoint_that_is_said(run: Path) -> None:
    for folder in names.whole(run):
        (folder / "beside" / "adapter.txt").write_text("x")
    with pytest.raises(UsageError, match="no sound one before it"):
        checkpoint.chosen(str(run))


def test_a_run_without_checkpoints_begins_anew(tmp_path: Path) -> None:
    assert checkpoint.chosen(str(tmp_path)) is None


def test_a_whole_file_is_the_old_one_until_it_is_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    files.write_whole(path, "old")

    def full(_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_whole(path, "new")
    assert path.read_text() == "old"


def test_checksums_name_every_file(run: Path) -> None:
    folder = run / "checkpoints" / "step_000003"
    named = json.loads((folder / "checksums.json").read_text())
    assert set(named) == {"beside/adapter.txt", "trainer_state.json", "trainer_state.safetensors"}
