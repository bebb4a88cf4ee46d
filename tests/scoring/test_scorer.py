"""Samples to rewards: what functions are given, what they may return, and what becomes of those that fail."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nanorlhf.config.training import TrainConfig
from nanorlhf.errors import RewardError, UsageError
from nanorlhf.scoring.reward import find_rewards
from nanorlhf.scoring.scorer import Scorer
from nanorlhf.system.user_code import from_file
from nanorlhf.types import Prompt, Sample
from tests.samples import snippet
from tests.waiting import eventually

Make = Callable[..., Scorer]


def samples(*texts: str, conversational: bool = False) -> list[Sample]:
    prompt: Any = [{"role": "user", "content": "1+1="}] if conversational else "1+1="
    return [
        Sample(Prompt(i, [1], prompt, {"answer": "2", "level": i}), [5, 6], [0.0, 0.0], True, t)
        for i, t in enumerate(texts)
    ]


@pytest.fixture
def make() -> Iterator[Make]:
    """Scorers that are closed in the end: `make(specs, weights, option=...)`, in two workers unless told otherwise."""
    made: list[Scorer] = []

    def build(specs: Any, weights: Any = None, **options: Any) -> Scorer:
        given: dict[str, Any] = {"reward_workers": 2} | options
        config = TrainConfig(**given)
        made.append(Scorer(find_rewards(specs, weights, config.reward_options), config))
        return made[-1]

    yield build
    for scorer in made:
        scorer.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_functions_get_columns_and_only_what_they_ask_for(make: Make, workers: int) -> None:
    def picky(level: list[int]) -> list[float]:
        return [float(n) for n in level]

    def greedy(prompts: list[str], completions: list[Any], **columns: Any) -> list[float]:
        assert set(columns) == {"answer", "level", "completion_ids", "trainer_state", "log_metric", "log_extra"}
        assert completions[0] == [{"role": "assistant", "content": "a"}] or len(completions) == 1
        return [10.0] * len(prompts)

    async def later(completion_ids: list[list[int]]) -> list[float]:
        await asyncio.sleep(0)
        return [100.0 * len(ids) for ids in completion_ids]

    batch = samples("a", "b", conversational=True)
    make([picky, greedy, later], [1.0, 2.0, 0.5], reward_workers=workers).score(batch)
    assert [s.reward for s in batch] == [0 + 20 + 100, 1 + 20 + 100]
    assert batch[1].rewards == {"picky": 1, "greedy": 10, "later": 200}


@pytest.mark.parametrize("workers", [0, 2])
def test_functions_see_the_state_and_may_log(make: Make, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    def growing(completions: list[str], trainer_state: Any, log_metric: Any, log_extra: Any) -> list[float]:
        log_metric("length", len(completions[0]))
        log_extra("upper", [c.upper() for c in completions])
        return [trainer_state.global_step / trainer_state.max_steps] * len(completions)

    scorer, batch = make(growing, reward_workers=workers, max_steps=4), samples("ab", "abcd")
    scorer.at(3)
    scorer.score(batch)
    metrics = scorer.report()
    assert [s.reward for s in batch] == [0.75, 0.75]
    assert [s.extras for s in batch] == [{"upper": "AB"}, {"upper": "ABCD"}]
    assert metrics["reward/growing/length"] == (2 if workers == 0 else 3)  # one call, or the mean of two
    assert (metrics["reward/growing/failed"], caplog.messages) == (0, [])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_column_that_the_first_sample_lacks_reaches_the_others(make: Make, workers: int) -> None:
    """As rows of a stream may lack one."""

    def hinted(completions: list[str], hint: list[str | None] | None = None) -> list[float]:
        return [float(bool(h)) for h in hint or [None] * len(completions)]

    batch = samples("a", "b", "c")
    batch[1].prompt.columns["hint"] = "the second"
    make(hinted, reward_workers=workers).score(batch)
    assert [s.reward for s in batch] == [0, 1, 0]


def test_none_leaves_the_term_out_and_is_never_zero(make: Make) -> None:
    def half(level: list[int]) -> list[float | None]:
        return [None if n else 1.0 for n in level]

    def never(answer: list[str]) -> list[None]:
        return [None for _ in answer]

    batch, scorer = samples("a", "b"), make([half, never])
    scorer.score(batch)
    assert [s.reward for s in batch] == [1.0, None]
    metrics = scorer.report()
    assert (metrics["reward/half/unscored"], metrics["reward/never/unscored"]) == (1, 2)


def test_a_reward_without_weight_is_only_looked_at(make: Make) -> None:
    def half(level: list[int]) -> list[float | None]:
        return [None if n == 1 else 1.0 for n in level]

    def looks(level: list[int]) -> list[float]:
        return [1 / (n - 2) for n in level]

    batch, scorer = samples("a", "b", "c", "d"), make([half, looks], [1.0, 0.0])
    scorer.score(batch)
    assert [s.reward for s in batch] == [1.0, None, 1.0, 1.0]
    assert [s.rewards["looks"] for s in batch] == [-0.5, -1.0, None, 1.0]
    metrics = scorer.report()
    assert (metrics["reward/looks/failed"], metrics["reward/looks/unscored"]) == (1, 0)


def leaves(text: str) -> float:
    raise SystemExit(text)


FAULTS: dict[str, tuple[Callable[[str], Any], str]] = {
    "hangs": (lambda text: time.sleep(1000), "took more than 1 s"),
    "hangs in C": (lambda text: "a" * 40 if not __import__("re").match(r"(a+)+$", "a" * 40 + "b") else 0, "took more"),
    "dies": (lambda text: os._exit(3), r"ended its process \(exit code 3\)"),
    "is killed": (lambda text: os.kill(os.getpid(), 9), r"ended its process \(SIGKILL\)"),
    "eats memory": (lambda text: bytearray(60 << 30), "raised MemoryError"),
    "exits": (leaves, "raised SystemExit: bad"),
    "raises": (float, "raised ValueError"),
    "says nan": (lambda text: float("nan"), "returned nan"),
    "says a word": (lambda text: "a word", "returned 'a word'"),
    "says a number as text": (lambda text: "1.0", "returned '1.0'"),
    "says too much": (lambda text: [1.0], r"returned \[1.0\]"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_whatever_a_reward_does_costs_that_completion(make: Make, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    fails, words = FAULTS[kind]

    def reward(completions: list[str]) -> list[Any]:
        return [fails(c) if c == "bad" else 1.0 for c in completions]

    batch, scorer = samples("bad", *["good"] * 5), make([reward, "exact_answer"], reward_timeout=1)
    scorer.score(batch)
    assert [s.reward for s in batch] == [None, 1, 1, 1, 1, 1], "unscored, though the other reward could score it"
    metrics = scorer.report()
    assert metrics["reward/reward/failed"] == 1
    assert len(caplog.messages) == 1 and "failed on 1 of 6 completions" in caplog.messages[0]
    with pytest.raises(RewardError, match=rf"(?s)reward 'reward' failed on 2 of 6.*{words}.*completion: 'bad'"):
        scorer.score(samples("bad", "good", "good", "bad", "good", "good"))


@pytest.mark.parametrize("together", [False, True])
def test_a_run_ends_once_the_limit_cannot_be_kept(make: Make, tmp_path: Path, together: bool) -> None:
    def fails(completions: list[str]) -> list[float]:
        for text in completions:
            (tmp_path / text).touch()
        time.sleep(0.3)
        raise ValueError

    def slow(completions: list[str]) -> list[float]:
        time.sleep(60)
        return [1.0 for _ in completions]

    judges, options = ([slow, fails], {"reward_together": "slow, fails"}) if together else ([fails], {})
    scorer = make(judges, reward_workers=2 if together else 1, reward_failure_limit=0.25, **options)
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"'fails' failed on \d of 8 completions: it raised ValueError"):
        scorer.score(samples(*"abcdefgh"))
    scorer.close()
    assert together or len(list(tmp_path.iterdir())) <= 4, "three failures are too many, and one more had begun"
    assert time.monotonic() - start < 50


def test_the_limit_counts_the_completions_before(make: Make) -> None:
    def reward(completions: list[str]) -> list[float]:
        return [1.0 if c == "good" else float(c) for c in completions]

    scorer = make(reward, reward_failure_limit=0.25)
    scorer.score(samples("bad", *["good"] * 3))
    scorer.score(samples("bad", *["good"] * 3))
    with pytest.raises(RewardError, match="failed on 4 of 12 completions"):
        scorer.score(samples("bad", "bad", *["good"] * 2))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", ["plain", "later", "each", "Object"])
def test_a_failure_is_shown_where_it_happened(make: Make, tmp_path: Path, name: str, workers: int) -> None:
    file = tmp_path / "mine.py"
    file.write_text(RAISING)
    line = next(at for at, text in enumerate(RAISING.splitlines(), 1) if text.endswith(f"# {name}"))
    judge = from_file(f"{file}:{name}")
    with pytest.raises(RewardError, match=rf"it raised ValueError: [^\n]* \({re.escape(str(file))}:{line}\)\n"):
        make(judge() if name == "Object" else judge, reward_workers=workers).score(samples("a", "b"))


RAISING = """
import asyncio

def plain(completions):
    return [float(text) for text in completions]  # plain

async def later(completions):
    await asyncio.sleep(0)
    return [float(text) for text in completions]  # later

async def one(text):
    return float(text)  # each

async def each(completions):
    return await asyncio.gather(*map(one, completions), return_exceptions=True)

class Object:
    def __call__(self, completions):
        return [self.parsed(text) for text in completions]

    def parsed(self, text):
        return float(text)  # Object
"""


def test_wrong_count(make: Make) -> None:
    with pytest.raises(RewardError, match="returned 2 scores for 1 completions"):
        make(lambda completions: [1.0, 2.0]).score(samples("a", "b"))
    with pytest.raises(RewardError, match="returned 1 scores for 2 completions"):
        make(lambda completions: [1.0], reward_workers=0).score(samples("a", "b"))


ONE_AT_A_TIME = """
import asyncio

one = asyncio.Semaphore(1)


async def judged(text):
    async with one:
        await asyncio.sleep(0.001)
        if text == "exits":
            raise SystemExit(text)
        return float(len(text))


async def judge(completions):
    return await asyncio.gather(*map(judged, completions))
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_what_an_async_reward_keeps_between_calls_goes_on_working(make: Make, tmp_path: Path, workers: int) -> None:
    """Locks and connections belong to the event loop of their first use; and a notebook's runs already."""
    (tmp_path / "mine.py").write_text(ONE_AT_A_TIME)
    scorer = make(f"{tmp_path}/mine.py:judge", reward_workers=workers, reward_failure_limit=1.0)

    async def in_a_notebook() -> list[float | None]:
        found = []
        for texts in (("a", "bb"), ("exits",), ("ccc", "dddd", "e")):
            scorer.score(batch := samples(*texts))
            found += [s.reward for s in batch]
        return found

    assert asyncio.run(in_a_notebook()) == [1, 2, None, 3, 4, 1]


def test_no_column_replaces_an_option_of_a_reward_that_comes_with_it(make: Make) -> None:
    batch = samples("four", "a word more")
    for s in batch:
        s.prompt.columns.update({"target": 24, "min": 3})
    make("length", reward_options={"length": {"max": 400}}).score(batch)
    assert [s.reward for s in batch] == [0, 0]


def test_no_process_is_left_behind(make: Make, tmp_path: Path) -> None:
    def mother(completions: list[str]) -> list[float]:
        import subprocess

        child = subprocess.Popen(["sleep", "1000"])
        (tmp_path / completions[0]).write_text(f"{os.getpid()} {child.pid}")
        if completions[0] == "b":
            time.sleep(1000)
        return [1.0]

    scorer = make(mother, reward_workers=1, reward_timeout=1, reward_failure_limit=1)
    scorer.score(samples("a", "b"))
    scorer.close()
    expect_gone([int(pid) for name in "ab" for pid in (tmp_path / name).read_text().split()])


def expect_gone(pids: list[int]) -> None:
    """Every process has ended, or ends soon, even on a busy machine."""
    assert eventually(lambda: not any(map(alive, pids)), 30)


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits for its parent to notice does not."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_work_is_shared_and_begins_before_the_last_completion_is_there(make: Make, tmp_path: Path) -> None:
    def slow(completions: list[str]) -> list[float]:
        time.sleep(0.1)
        for text in completions:
            (tmp_path / text).touch()
        return [float(os.getpid()) for _ in completions]

    scorer, batch = make(slow, reward_workers=4), samples(*"abcdefgh")
    scorer.unproven.clear()
    scorer.score(samples(*"abcd"))  # the workers have started
    for sample in batch:
        scorer.begin(sample)
    assert eventually(lambda: all((tmp_path / s.text).exists() for s in batch), 30), "while the engine still writes"
    scorer.finish(batch)
    assert len({s.reward for s in batch}) == 4


def test_a_reward_that_compares_completions_is_found_out(make: Make) -> None:
    def rank(completions: list[str]) -> list[float]:
        return [sorted(completions, key=len).index(c) / len(completions) for c in completions]

    with pytest.raises(UsageError, match=r"'rank' gives the same completion 0 .* and .*--reward_together rank"):
        make(rank).score(samples("a", "ccc", "bb"))
    batch = samples("a", "ccc", "bb")
    make(rank, reward_together="rank").score(batch)
    assert [s.reward for s in batch] == pytest.approx([0, 2 / 3, 1 / 3])


def test_a_program_that_is_random_is_no_reward_that_is(make: Make) -> None:
    batch = [
        Sample(Prompt(i, [1], "?", {"tests": ["assert f(1) == 1"]}), [5], [0.0], True, f"```python\n{RANDOM}\n```")
        for i in range(6)
    ]
    make("code", reward_failure_limit=1.0).score(batch)
    assert {s.reward for s in batch} <= {0.0, 1.0}


RANDOM = "import random\ndef f(x): return random.randint(0, 1)"


def test_what_cannot_travel_runs_in_the_trainer(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    import threading

    lock = threading.Lock()

    def guarded(completions: list[str]) -> list[float]:
        with lock:
            return [float(os.getpid())] * len(completions)

    scorer, batch = make(guarded), samples("a")
    scorer.score(batch)
    assert batch[0].reward == os.getpid()
    assert "runs in the trainer" in caplog.text


def test_a_worker_that_cannot_import_says_so(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_here.py").write_text("def f(completions):\n    return [1.0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    import only_here  # type: ignore[import-not-found]

    (tmp_path / "only_here.py").unlink()
    with pytest.raises(RewardError, match="could not start: ModuleNotFoundError"):
        make(only_here.f).score(samples("a"))


def test_the_reward_on_the_page_of_rewards_scores_as_it_says(make: Make, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(snippet("mine.py"))
    texts = ["it is 84", "12 * 7 = 80", "no idea", "84"]
    batch = [
        Sample(Prompt(0, [1], "?", {"target": t}), [5], [0.0], True, x)
        for x, t in zip(texts, [84, 84, 84, None], strict=True)
    ]
    make(f"{tmp_path}/mine.py:near").score(batch)
    assert [s.reward for s in batch] == [1, 0.2, 0, None]


def test_a_trainer_that_is_killed_takes_its_workers_along() -> None:
    code = (
        "import sys, time\n"
        "from nanorlhf.config.training import TrainConfig\n"
        "from nanorlhf.scoring.reward import find_rewards\n"
        "from nanorlhf.scoring.scorer import Scorer\n"
        "def hangs(completions):\n    time.sleep(1000)\n"
        "scorer = Scorer(find_rewards(hangs), TrainConfig(reward_workers=2))\n"
        "scorer.submit(scorer.rewards[0], {'completions': ['a']}, 1)\n"
        "time.sleep(1)\n"
        "print(*[worker.process.pid for worker in scorer.pool.workers], flush=True)\n"
        "time.sleep(1000)\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    pids = [int(pid) for pid in trainer.stdout.readline().split()]
    assert len(pids) == 2 and all(map(alive, pids))
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    expect_gone(pids)
