"""The examples of the documentation are run, as they stand there."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nanorlhf.grpo.__main__ import main
from nanorlhf.scripts import merge, report
from tests.docs.pages import ROOT, blocks, commands
from tests.samples import snippet

SMALL = ["--model_name_or_path", "nanorlhf:adder", "--engine", "hf", "--output_dir", "run", "--max_steps", "2"]
SMALL += ["--prompts_per_step", "2", "--num_generations", "4", "--max_prompt_length", "200"]


def metrics() -> list[dict[str, float]]:
    return [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]


def test_a_reward_and_a_dataset_in_ten_lines_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reward, recipe = snippet("mine.py"), snippet("riddles.yaml")
    assert max(len(text.strip().splitlines()) for text in (reward, recipe)) <= 11, "ten lines and the file's name"
    Path("mine.py").write_text(reward)
    Path("riddles.yaml").write_text(recipe)
    with Path("riddles.csv").open("w") as file:
        rows = csv.writer(file)
        rows.writerow(["question", "solution"])
        rows.writerows([f"What is {n} and {n}?", 2 * n] for n in range(30))
    assert main(["--recipe", "riddles.yaml", *SMALL, "--max_completion_length", "32"]) == 0
    first = json.loads(Path("run/samples.jsonl").read_text().splitlines()[0])
    assert first["prompt"][-1]["content"].endswith("?\nEnd with the answer in <answer> tags.")
    assert set(first["rewards"]) == {"exact_answer", "near"}
    rows_read = metrics()
    assert "eval/reward" in rows_read[0] and "reward/near" in rows_read[1]
    assert rows_read[1]["reward/near/failed"] == 0


def test_several_rewards_with_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (words,) = (words for words in calls("grpo", "rewards") if "numeric,think_format" in words)
    assert main([*words, *SMALL, "--eval_prompts", "4"]) == 0
    row = metrics()[1]
    assert row["reward/mean"] == pytest.approx(row["reward/numeric"] + 0.1 * row["reward/think_format"])


def test_an_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lock.py").write_text(snippet("lock.py"))
    words = ["--environment", "lock.py:Lock", "--dataset_test_split", "test", "--eval_prompts", "8", "--max_turns", "3"]
    assert main([*words, *SMALL, "--max_completion_length", "128"]) == 0
    assert metrics()[1]["reward/environment/failed"] == 0
    assert "are right" in Path("run/samples.jsonl").read_text()


def calls(command: str, page: str) -> list[list[str]]:
    """The words after every call of a command that a page of docs/ shows."""
    shell = (block for block in blocks(ROOT / "docs" / f"{page}.md") if block.is_shell and not block.needs)
    return [words[2:] for block in shell for words in commands(block) if words[:2] == ["nanorlhf", command]]


@pytest.mark.slow
def test_reports_and_a_merged_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "a", "b"):
        words = ["--recipe", "tiny", *SMALL, "--eval_prompts", "4", "--output_dir", f"runs/{name}"]
        assert main(words) == 0
    written = [words for words in calls("report", "runs") if "--serve" not in words]
    assert all(report.main(words) == 0 for words in written) and len(written) == 2
    pages = {path.name: path.read_text() for path in (Path("runs/mine/report.html"), Path("ab.html"))}
    assert [page.count('type="application/json" id="samples-') for page in pages.values()] == [1, 2]
    assert [merge.main(words) for words in calls("merge", "runs")] == [0]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
        path.name for path in Path("merged/mine").iterdir()
    }
    (words,) = [words for words in calls("report", "runs") if "--serve" in words]
    command = [sys.executable, "-m", "nanorlhf.scripts.report", *words, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None and "follows; Ctrl-C ends it" in server.stdout.readline()
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0
