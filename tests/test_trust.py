"""The promises of SECURITY.md: what is read does not run, what is written does not deceive, secrets do not leak."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from safetensors.torch import load_file

from nanorlhf.config import names
from nanorlhf.config.names import shipped_model
from nanorlhf.data import sources
from nanorlhf.errors import UsageError
from nanorlhf.grpo import GRPOTrainer
from nanorlhf.grpo.__main__ import main
from nanorlhf.sandbox import run as sandbox
from nanorlhf.scoring.reward import find_rewards
from nanorlhf.scoring.workers import without_secrets
from tests.test_structure import ROOT
from tests.test_structure import sources as source_files
from tests.test_trainer import config, lines, take

EVIL = "\x1b[2J\x9b31m\u202e\r\nstep 9: all is well\x00\ud800"
SECRETS = {"HF_TOKEN": "planted-hub", "WANDB_API_KEY": "0" * 33 + "planted", "MY_SECRET_SAUCE": "planted-sauce"}
SECRETS |= {"DB_PASSWORD": "planted-door", "OPENAI_API_KEY": "planted-judge"}

READERS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch", "np", "numpy", "yaml"}
LOADS = {"load", "loads", "load_all", "full_load", "unsafe_load", "Unpickler", "open", "read_pickle"}
FROM_OURSELVES = {  # through a socket or a pipe between two processes of one run, never from a file
    ("nanorlhf/scoring/workers.py", "pickle.loads"),
    ("nanorlhf/sandbox/examiner.py", "pickle.Unpickler"),
    ("nanorlhf/sandbox/examiner.py", "marshal.loads"),
}


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that is there once something ran that should not have."""
    return tmp_path / "it ran"


def evil(marker: Path) -> bytes:
    """A pickle that runs something when it is read."""

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (marker,)

    return pickle.dumps(Evil())


def test_the_trap_itself(marker: Path) -> None:
    pickle.loads(evil(marker))  # noqa: S301  it is what this file is about
    assert marker.exists()


def test_no_file_is_read_in_a_way_that_could_run_it() -> None:
    found = set()
    for path in source_files():
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            library, _, name = called.partition(".")
            if library in READERS and name in LOADS:
                found.add((str(path.relative_to(ROOT)), called))
            if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
                assert isinstance(node.value, ast.Constant) and node.value.value == (node.arg == "weights_only")
    assert found == FROM_OURSELVES


@pytest.mark.parametrize("options", [{}, {"lora": "none", "learning_rate": 1e-4, "kl_coef": 0.05}])
def test_a_pickle_beside_a_checkpoint_is_not_opened(options: dict[str, Any], marker: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    take(GRPOTrainer(args=config(run, dataset_test_split=None, **options)), 1)
    folder = names.latest(run)
    assert folder is not None
    for name in ("pytorch_model.bin", "adapter_model.bin", "optimizer.pt", "training_args.bin", "trainer_state.pkl"):
        (folder / name).write_bytes(evil(marker))
    take(GRPOTrainer(args=config(run, dataset_test_split=None, **options, resume=str(run))), 1)
    assert not marker.exists()


def test_pickled_weights_cannot_run_code(marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model's, and an adapter's, if there is no other file."""
    take(GRPOTrainer(args=config(tmp_path / "run", dataset_test_split=None)), 1)
    adapter = names.latest(tmp_path / "run")
    assert adapter is not None and load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(evil(marker))
    model = tmp_path / "model"
    shutil.copytree(shipped_model("nanorlhf:adder"), model, ignore=shutil.ignore_patterns("*.safetensors"))
    (model / "pytorch_model.bin").write_bytes(evil(marker))
    for option, path in (("adapter_name_or_path", adapter), ("model_name_or_path", model)):
        capsys.readouterr()
        assert main(["--recipe", "tiny", f"--{option}", str(path), "--output_dir", str(tmp_path / option)]) == 2
        assert f"{option}='{path}' cannot be loaded: " in capsys.readouterr().err
        assert not marker.exists()


def test_a_dataset_cannot_run_code(marker: Path, tmp_path: Path) -> None:
    """A loading script, a pickle, and a parquet file whose type is a pickle."""
    script, pickled, typed = (tmp_path / name for name in ("script", "pickled", "typed"))
    for folder in (script, pickled, typed):
        folder.mkdir()
    (script / "script.py").write_text(f"import pathlib; pathlib.Path({str(marker)!r}).touch()")
    (pickled / "train.pkl").write_bytes(evil(marker))
    about = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": evil(marker)}
    schema = pyarrow.schema([pyarrow.field("prompt", pyarrow.string(), metadata=about)])
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["1+1="]}, schema), typed / "train.parquet")
    for folder in (script, pickled):
        with pytest.raises(UsageError, match="cannot be loaded"):
            sources.load(str(folder), None, "train")
    try:
        rows = list(sources.load(str(typed), None, "train"))
    except UsageError:
        rows = [{"prompt": "1+1="}]
    assert rows == [{"prompt": "1+1="}]
    assert not marker.exists()


def test_a_recipe_cannot_run_code(marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"run_name: !!python/object/apply:os.mkdir ['{marker}']\n")
    assert main(["--recipe", str(path)]) == 2
    assert "recipe.yaml cannot be read: " in capsys.readouterr().err
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(path.read_text())
    assert main(["--resume", str(run)]) == 2
    assert not marker.exists()


def with_code(folder: Path, marker: Path) -> Path:
    """A model that comes with code of its own."""
    about = json.loads((Path(shipped_model("nanorlhf:adder")) / "config.json").read_text())
    about |= {"model_type": "evil", "auto_map": {"AutoConfig": "configuration_evil.EvilConfig"}}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "configuration_evil.py").write_text(
        f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
        "from transformers import LlamaConfig\nclass EvilConfig(LlamaConfig):\n    model_type = 'evil'\n"
    )
    return folder


def test_a_models_code_runs_only_where_that_was_asked_for(
    marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    model = with_code(tmp_path / "evil", marker)
    argv = ["--recipe", "tiny", "--output_dir", str(tmp_path / "run")]
    assert main([*argv, "--model_name_or_path", str(model)]) == 2
    assert "trust_remote_code" in capsys.readouterr().err
    with pytest.raises(UsageError, match="a reward model's own code is never run"):
        find_rewards(f"model:{model}")
    assert not marker.exists()
    main([*argv, "--model_name_or_path", str(model), "--trust_remote_code", "--max_completion_length", "99999"])
    assert "the model takes" in capsys.readouterr().err
    assert marker.exists()


def test_nothing_written_moves_the_cursor(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Prompts, completions, faults, names of metrics and extras, on the terminal and in files."""

    def reward(completions: list[Any], log_metric: Any, log_extra: Any) -> list[Any]:
        log_metric(EVIL, 1.0)
        log_extra(EVIL, [EVIL] * len(completions))
        return [ValueError(EVIL), *[1.0 if len(c) % 2 else EVIL for c in completions[1:]]]

    rows = [{"prompt": f"{i}+1={EVIL[:-1]}"} for i in range(8)]
    options: dict[str, Any] = {"dataset_test_split": None, "max_steps": 1, "reward_failure_limit": 1}
    options |= {"reward_workers": 0, "max_prompt_length": 99, "run_name": EVIL[:-1]}
    GRPOTrainer(reward_funcs=reward, train_dataset=rows, args=config(tmp_path / "run", **options)).train()
    said = capfd.readouterr()
    printed = [line for line in (said.out + said.err).split("\n") if "█" not in line]
    assert [line for line in printed if not line.isprintable()] == []
    assert not any(line.startswith("step 9") for line in printed)
    assert "step 1: reward 'reward' failed on" in said.out
    for name in ("metrics.jsonl", "samples.jsonl", "config.yaml"):
        text = (tmp_path / "run" / name).read_bytes().decode()
        assert [line for line in text.split("\n") if not line.isprintable()] == [], name
    sample = lines(tmp_path / "run" / "samples.jsonl")[0]
    assert sample["extras"] == {EVIL: EVIL} and sample["prompt"] == rows[sample["index"]]["prompt"]


def test_an_error_is_one_line_whatever_it_quotes() -> None:
    assert str(UsageError(f"no {EVIL}")).isprintable()


def test_names_cannot_leave_their_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    mine = "from nanorlhf.algorithm import PolicyGradient\nclass Mine(PolicyGradient):\n    name = '../../elsewhere'\n"
    (home / "mine.py").write_text(mine)
    assert main(["--recipe", "tiny", "--algorithm", "mine.py:Mine"]) == 2
    assert "folders are named after its name" in capsys.readouterr().err
    monkeypatch.setenv("TRACKIO_DIR", str(home / "trackio"))
    options: dict[str, Any] = {"run_name": "../../elsewhere", "dataset_test_split": None, "max_steps": 1}
    options |= {"report_to": "tensorboard", "project": "../../elsewhere"}
    GRPOTrainer(args=config(home / "run", **options)).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]


def test_secrets_reach_neither_a_reward_nor_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    seen = tmp_path / "seen.json"

    def nosy(completions: list[Any]) -> list[float]:
        seen.write_text(json.dumps(dict(os.environ)))
        return [float(len(str(c))) for c in completions]

    options: dict[str, Any] = {"reward_workers": 1, "reward_secrets": ["OPENAI_API_KEY"], "max_steps": 1}
    options |= {"report_to": "tensorboard,wandb", "dataset_test_split": None}
    GRPOTrainer(reward_funcs=nosy, args=config(tmp_path / "run", **options)).train()
    found = json.loads(seen.read_text())
    assert {name: found.get(name) for name in SECRETS} == dict.fromkeys(SECRETS) | {"OPENAI_API_KEY": "planted-judge"}
    assert found["PATH"] == os.environ["PATH"]
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any("wandb" in str(path) for path in written)
    assert [str(path) for path in written if any(v.encode() in path.read_bytes() for v in SECRETS.values())] == []


def test_a_models_program_sees_no_variable_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    try:
        method = sandbox.find_method()
    except UsageError as error:
        pytest.skip(str(error))
    seen = sandbox.run("import os; print(dict(os.environ))", method=method)
    assert seen.stdout.startswith("{") and "planted" not in seen.stdout + seen.stderr


def test_which_names_are_secrets() -> None:
    kept = {"PATH", "TOKENIZERS_PARALLELISM", "KEYBOARD", "HOME", "PASSAGE", "HF_HOME"}
    gone = {"HF_TOKEN", "hf_token", "AWS_SECRET_ACCESS_KEY", "APIKEY", "API_KEYS", "DB_PASS", "PGPASSWORD", "TOKEN_X"}
    assert without_secrets(dict.fromkeys(kept | gone, "x")).keys() == kept
    assert without_secrets({"HF_TOKEN": "x", "A_KEY": "y"}, ["A_KEY"]) == {"A_KEY": "y"}


def test_every_promise_names_its_test() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    promised = text[text.index("## What is promised") : text.index("## What is not")]
    points = re.findall(r"^- .*?(?=^- |\Z)", promised, re.DOTALL | re.MULTILINE)
    named = [set(re.findall(r"`(test_\w+)`", point)) for point in points]
    assert points and all(named)
    assert set().union(*named) <= globals().keys()
    assert "(SECURITY.md)" in (ROOT / "README.md").read_text()
