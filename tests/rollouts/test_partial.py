"""Partial rollouts: whole groups in every step, nothing older than is allowed, and a step that can be taken again."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from nanorlhf.config.names import shipped_model
from nanorlhf.data.prompts import Prompts
from nanorlhf.engines.base import Completion, Enough, Request, Sampling, never
from nanorlhf.errors import UsageError
from nanorlhf.grpo import GRPOConfig, GRPOTrainer
from nanorlhf.loop import Loop
from nanorlhf.ppo import PPOConfig, PPOTrainer
from nanorlhf.records import state_file
from nanorlhf.records.metrics import Averages, Clock, rollout_metrics
from nanorlhf.records.pace import Pace
from nanorlhf.records.rollout_files import file_of, read
from nanorlhf.remax import ReMax, ReMaxConfig, ReMaxTrainer
from nanorlhf.rollouts.partial import PartialRollouts
from nanorlhf.rollouts.sampler import Sampler
from nanorlhf.scoring.reward import Reward
from nanorlhf.scoring.scorer import Scorer
from nanorlhf.trainer import Trainer
from nanorlhf.types import Prompt, Rollout
from tests.samples import batches, expect_close, sample, whole
from tests.samples import rollout as made_of
from tests.test_loop import made_up
from tests.test_trainer import assert_same_outcome, config, lines, small, take

TOKENIZER = AutoTokenizer.from_pretrained(shipped_model("nanorlhf:adder"))
LIMIT = 60
Lengths = Callable[[int, int], int]  # of an answer, by its prompt's place and its own number


class Scripted:
    """Writes a token a step for every answer, up to a length of its own; a token says which weights wrote it."""

    def __init__(self, lengths: Lengths, rows: int) -> None:
        self.lengths, self.rows, self.version, self.pace = lengths, rows, 0, Pace()
        self.asked: list[Sequence[Request]] = []

    def forget(self) -> None:
        """Nothing is kept."""

    def generate(
        self, requests: Sequence[Request], seed: int, sampling: Sampling | None = None, enough: Enough = never
    ) -> Iterator[Completion]:
        self.asked.append(requests)
        alive, written = list(requests), 0
        while alive and not enough():
            written += 1
            for r in list(alive):
                if len(r.prompt_ids) - 1 + written == self.lengths(r.prompt_ids[0], r.id % self.rows):
                    alive.remove(r)
                    yield self.completion(r, written, stopped=True)
        for r in alive:
            yield self.completion(r, written, stopped=False)

    def completion(self, r: Request, written: int, stopped: bool) -> Completion:
        logprobs = [-float(self.version + 1)] * written
        return Completion(r.id, [10 + self.version % 40] * written, logprobs, stopped, ended=stopped)


class Endless:
    """Prompts of one token, their place."""

    def batch(self, step: int, size: int) -> list[Prompt]:
        return [Prompt(place, [place], "p", {}) for place in range(step * size, (step + 1) * size)]


def length(completion_ids: list[list[int]]) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def source(lengths: Lengths, config_class: Any = GRPOConfig, **options: Any) -> PartialRollouts:
    given = {"partial_rollouts": 0.5, "prompts_per_step": 4, "num_generations": 3, "reward_workers": 0} | options
    made = config_class(max_completion_length=LIMIT, **given)
    wanted = (ReMax if config_class is ReMaxConfig else GRPOTrainer.algorithm_class)(made).samples()  # type: ignore[attr-defined]
    engine = Scripted(lengths, wanted.each + wanted.greedy)
    sampler = Sampler(engine, TOKENIZER, Scorer([Reward("length", length, file=__file__)], made), LIMIT)  # type: ignore[arg-type]
    return PartialRollouts(made, wanted, sampler, Endless())  # type: ignore[arg-type]


def played(source: PartialRollouts, steps: int) -> list[Rollout]:
    """Steps, each under new weights."""
    rollouts = []
    for step in range(1, steps + 1):
        source.sampler.engine.version = step
        rollouts.append(source.rollout(step, Clock(), lambda tokens: None))
    return rollouts


def tailed(seed: int) -> Lengths:
    """Mostly short answers, and here and there a long one."""

    def draw(place: int, row: int) -> int:
        one = random.Random(f"{seed}/{place}/{row}")
        return LIMIT if one.random() < 0.1 else one.randint(1, LIMIT // 6)

    return draw


@pytest.mark.parametrize("seed", range(3))
def test_every_step_has_whole_groups_and_every_prompt_comes_once(seed: int) -> None:
    lengths = tailed(seed)
    made = source(lengths)
    steps = played(made, 12)
    seen: list[int] = []
    for rollout in steps:
        groups = [rollout.samples[i : i + 3] for i in range(0, 12, 3)]
        assert len(rollout.samples) == 12 and rollout.group.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
        for group in groups:
            (place,) = {s.prompt.index for s in group}
            seen.append(place)
            assert [len(s.completion_ids) for s in group] == [lengths(place, row) for row in range(3)]
            assert [s.reward for s in group] == [float(len(s.completion_ids)) for s in group]
            assert all(s.stopped for s in group)
    assert len(set(seen)) == len(seen) == 48
    waiting = {int(place) for place in made.after[12]["place"]}
    assert waiting.isdisjoint(seen) and set(seen) | waiting == set(range(52)), "none is lost"
    assert {s.prompt.index for s in steps[0].samples} != {0, 1, 2, 3}, "short ones come before long ones"


def test_each_token_knows_the_weights_that_wrote_it_and_what_they_said() -> None:
    carried = 0
    for number, rollout in enumerate(played(source(tailed(0)), 12), 1):
        for s in rollout.samples:
            assert s.versions == sorted(s.versions or [])
            assert s.completion_ids == [10 + v for v in s.versions or []]
            assert s.engine_logprobs == [-float(v + 1) for v in s.versions or []]
        flat = [v for s in rollout.samples for v in s.versions or []]
        assert rollout.columns["age"].tolist() == [number - v for v in flat]
        expect_close(rollout.columns["engine_logprobs"], [-float(v + 1) for v in flat])
        carried += any(v < number for v in flat)
    assert carried > 5


@pytest.mark.parametrize("age", [2, 3, 4])
def test_old_groups_are_finished_in_time_by_those_that_must_be(age: int) -> None:
    """Answers of the first prompts are long and all others end at once: those alone would ever be taken."""
    made = source(lambda place, row: LIMIT if place < 6 else 1, partial_rollouts=0.4, partial_max_age=age)
    assert made.config.prompts_in_flight == 10
    steps = played(made, 8)
    begun = {place: 1 if place < 10 else (place - 10) // 4 + 2 for place in range(60)}
    late = [max(n - begun[s.prompt.index] for s in rollout.samples) for n, rollout in enumerate(steps, 1)]
    assert max(late) == age
    long = [n for n, rollout in enumerate(steps, 1) if any(s.prompt.index < 6 for s in rollout.samples)]
    assert long == [age, age + 1], "six of them do not fit into one step, so the first four come a step earlier"


@pytest.mark.parametrize("age", [1, 2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_older_than_is_allowed(age: int, seed: int) -> None:
    for late in ("finish", "drop"):
        made = source(tailed(seed), partial_max_age=age, partial_too_old=late)
        for rollout in played(made, 15):
            assert rollout.columns["age"].max() <= age
            assert len(rollout.samples) == 12


def test_too_old_answers_are_dropped_with_their_group_and_others_begun_instead() -> None:
    made = source(lambda place, row: LIMIT if place == 1 and row == 2 else 4, partial_max_age=1, partial_too_old="drop")
    steps = played(made, 4)
    figures = [r.figures["partial/dropped"] for r in steps]
    assert figures == [0, 0, 3, 0]
    assert all(s.prompt.index != 1 for r in steps for s in r.samples)
    assert all(len(r.samples) == 12 for r in steps)


def test_what_a_step_says_of_itself() -> None:
    made = source(lambda place, row: 5 if place < 4 else 20)
    first, second = played(made, 2)
    assert first.figures == {"partial/carried": 12, "partial/carried_tokens": 12 * 5, "partial/dropped": 0}
    assert first.written == 24 * 5 and first.columns["age"].max() == 0
    assert second.written == 24 * 15, "the rest of twelve answers, and the beginnings of twelve others"
    metrics = rollout_metrics(second)
    assert metrics["age/old_fraction"] == pytest.approx(5 / 20)
    assert metrics["age/old_mean"] == metrics["age/max"] == 1
    assert (metrics["partial/carried"], metrics["partial/carried_tokens"]) == (12, 12 * 15)
    assert rollout_metrics(first)["age/old_mean"] is None


def test_ages_are_in_steps_however_many_updates_a_step_has() -> None:
    made = source(tailed(0), updates_per_step=2, epochs_per_step=3)
    made.sampler.engine.version = 18
    old = sample(2, 3)
    old.versions = [0, 12, 18]
    assert made.ages([old]).tolist() == [3, 1, 0]


def test_groups_that_were_done_but_not_taken_come_first_and_are_scored_once() -> None:
    made = source(lambda place, row: 3)  # all at once, and a step takes half of them
    first, second = played(made, 2)
    assert [s.prompt.index for s in first.samples[::3]] == [0, 1, 2, 3]
    assert [s.prompt.index for s in second.samples[::3]] == [4, 5, 6, 7]
    assert second.written == 0 and second.columns["age"].tolist() == [1] * 36, "enough was there"
    assert made.sampler.scorer.begun == {}


def facts(rollout: Rollout) -> list[Any]:
    """All that a rollout is."""
    samples = [
        (s.prompt.index, s.completion_ids, s.engine_logprobs, s.versions, s.text, s.reward) for s in rollout.samples
    ]
    return [samples, rollout.columns["age"].tolist(), rollout.figures]


def test_a_step_can_be_taken_again_and_goes_on_from_a_checkpoint_of_any_step(tmp_path: Path) -> None:
    steps = played(source(tailed(3)), 8)
    made = source(tailed(3))
    for number in range(1, 9):
        made.sampler.engine.version = number
        first = made.rollout(number, Clock(), lambda tokens: None)
        state_file.write(made.state_dict(number - 1), tmp_path, "broke off before its end")
        assert facts(made.rollout(number, Clock(), lambda tokens: None)) == facts(first), "asked for again"
        state_file.write(made.state_dict(number), tmp_path, "state")
        again = source(tailed(3))
        if number > 1:
            again.sampler.engine.version = number
            again.load_state_dict(state_file.read(tmp_path, "broke off before its end"))
            assert facts(again.rollout(number, Clock(), lambda tokens: None)) == facts(first)
        assert facts(first) == facts(steps[number - 1])
        made = source(tailed(3))
        made.load_state_dict(state_file.read(tmp_path, "state"))


def test_without_a_state_it_begins_where_whole_steps_would_be() -> None:
    made = source(lambda place, row: 3)
    made.load_state_dict({})
    assert [s.prompt.index for s in made.rollout(3, Clock(), lambda tokens: None).samples[::3]] == [8, 9, 10, 11]


def test_the_greedy_answer_belongs_to_its_group() -> None:
    made = source(lambda place, row: 30 if row == 3 and place == 0 else 4 + row, config_class=ReMaxConfig)
    steps = played(made, 6)
    greedy = {r.id % 4 == 3 for asked in made.sampler.engine.asked for r in asked if r.greedy}  # type: ignore[attr-defined]
    assert greedy == {True}
    number, at = next((n, r) for n, r in enumerate(steps) if any(s.prompt.index == 0 for s in r.samples))
    assert number > 0, "it waits for it"
    assert at.baselines is not None and len(at.baselines) == len(at.samples) == 12
    row = next(i for i, s in enumerate(at.samples) if s.prompt.index == 0)
    assert at.baselines[row] == 30 and [s.reward for s in at.samples[row : row + 3]] == [4, 5, 6]


def test_old_tokens_weigh_what_the_trainer_gives_them_over_what_was_said_and_do_not_count_as_mismatch() -> None:
    loop, _ = made_up(importance_correction="token", importance_cap=2.0)
    step = made_of([sample(4, 3, seed=i) for i in range(4)], group_size=4)
    everything = torch.ones(4, dtype=torch.bool)
    (attempt,) = loop.passes.attempts("measure", step, everything)
    own = loop.learner.measure("logprobs", attempt.rows(), 12)["logprobs"]
    gaps = torch.zeros(12)
    gaps[:3] = torch.tensor([0.5, 2.0, -1.0])  # trainer less engine: of the first three tokens, which are old
    gaps[5] = 1e-4
    step.columns["engine_logprobs"] = own - gaps
    step.columns["age"] = torch.tensor([2.0, 1.0, 1.0] + [0.0] * 9)
    credit, averages = loop.algorithm.credit(step), Averages()
    (row,) = batches(loop, step, credit, everything)
    loop.learner.backward(row, whole(step), averages)
    metrics = averages.metrics(())
    by_hand = (1.64872 + 2.0 + 0.36788) / 3
    assert metrics["importance/old_weight_mean"] == pytest.approx(by_hand, abs=1e-3)
    assert metrics["importance/weight_mean"] == pytest.approx((3 * by_hand + 9) / 12, abs=1e-3)
    assert metrics["importance/cut_fraction"] == pytest.approx(1 / 12)
    assert metrics["mismatch/max_abs"] == pytest.approx(1e-4, abs=2e-5)


SMALL: dict[str, Any] = {"partial_rollouts": 0.5, "temperature": 2.0, "max_completion_length": 24}


def test_the_first_update_has_ratios_of_exactly_1_for_fresh_and_old_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = GRPOTrainer(args=config(tmp_path / "run", dataset_test_split=None, **SMALL))
    assert trainer.config.importance_correction == "token", "on by default then"  # type: ignore[attr-defined]
    seen: list[tuple[float, float, bool]] = []
    plain = trainer.algorithm.loss

    def noting(logprobs: torch.Tensor, entropy: torch.Tensor, batch: Any) -> Any:
        ratio, age = (logprobs - batch.columns["old_logprobs"]).exp(), batch.columns["age"]
        seen.append((ratio.min().item(), ratio.max().item(), bool((age > 0).any() and (age == 0).any())))
        return plain(logprobs, entropy, batch)

    monkeypatch.setattr(trainer.algorithm, "loss", noting)
    take(trainer, 4)
    assert {(low, high) for low, high, _ in seen} == {(1.0, 1.0)} and any(mixed for *_, mixed in seen)
    rows = lines(tmp_path / "run" / "metrics.jsonl")[1:]
    assert all(row["mismatch/mean_abs"] is None or row["mismatch/mean_abs"] < 1e-4 for row in rows)
    old = [row for row in rows if row["age/old_fraction"]]
    assert old and any(row.get("importance/old_weight_mean", 1) != 1 for row in old)
    assert all(row["partial/carried"] > 0 and row["throughput/tail_fraction"] >= 0 for row in rows)


CASES: dict[str, tuple[type[Trainer], Any, dict[str, Any]]] = {
    "grpo": (GRPOTrainer, GRPOConfig, {"partial_too_old": "drop", "partial_max_age": 1, "updates_per_step": 2}),
    "ppo": (PPOTrainer, PPOConfig, {"value_init_prompts": 0, "num_generations": 1, "epochs_per_step": 2}),
    "remax": (ReMaxTrainer, ReMaxConfig, {"num_generations": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_stop_and_resume_equals_never_stopping(case: str, tmp_path: Path) -> None:
    trainer, options, more = CASES[case]

    def make(name: str, **others: Any) -> Trainer:
        return trainer(args=options(**small(tmp_path / name) | SMALL | more | others))

    take(make("whole"), 4)
    take(make("parts"), 2)
    take(make("parts", resume=str(tmp_path / "parts")), 2)
    assert_same_outcome(tmp_path / "whole", tmp_path / "parts")
    assert max(row.get("partial/carried", 0) for row in lines(tmp_path / "parts" / "metrics.jsonl")) > 0
    kept = read(file_of(tmp_path / "parts", 4)).samples
    assert all(len(s.versions or []) == len(s.completion_ids) for s in kept)
    assert len({version for s in kept for version in s.versions or []}) > 1, "and rollouts that are kept know them"


def test_a_run_that_breaks_off_after_a_rollout_takes_the_step_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(GRPOTrainer(args=config(tmp_path / "whole", **SMALL)), 4)
    trainer, measure, calls = GRPOTrainer(args=config(tmp_path / "parts", **SMALL)), Loop.measure, list[int]()

    def third(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt  # the rollout of the third step is there, and its update is not
        measure(*args)

    monkeypatch.setattr(Loop, "measure", third)
    with pytest.raises(KeyboardInterrupt):
        take(trainer, 4)
    monkeypatch.undo()
    take(GRPOTrainer(args=config(tmp_path / "parts", **SMALL, resume=str(tmp_path / "parts"))), 2)
    assert_same_outcome(tmp_path / "whole", tmp_path / "parts")


def test_it_may_be_turned_on_and_off_in_the_middle_of_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    take(GRPOTrainer(args=config(run)), 1)
    take(GRPOTrainer(args=config(run, **SMALL, resume=str(run))), 2)
    take(GRPOTrainer(args=config(run, resume=str(run), importance_correction="none")), 1)
    rows = lines(run / "metrics.jsonl")[1:]
    assert ["partial/carried" in row for row in rows] == [False, True, True, False]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"environment": "calculator", "reward_funcs": []}, "an episode of many turns is played to its end"),
        ({"dynamic_sampling": 1}, "dynamic_sampling looks at a whole step"),
        ({"partial_rollouts": 0.25, "partial_max_age": 2}, r"partial_max_age=2 .* 16 prompts in flight .* say 3 at"),
        ({"partial_rollouts": 1.0}, "partial_rollouts=1.0 cannot work: it must be above 0 and below 1"),
        ({"rollouts_from": "elsewhere"}, "the answers of rollouts_from are finished"),
    ],
)
def test_where_it_cannot_be_it_is_refused_before_a_model_loads(
    options: dict[str, Any], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "load_models", lambda *args: pytest.fail("a model is loaded"))
    with pytest.raises(UsageError, match=why):
        GRPOTrainer(args=config(tmp_path / "run", **{"partial_rollouts": 0.5} | options))


def test_it_is_refused_among_several_processes_and_with_a_loss_that_does_not_correct(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "from nanorlhf.algorithm import OnPolicy\n\nclass Plain(OnPolicy):\n    name = 'plain'\n"
        "    def credit(self, rollout): ...\n    def loss(self, logprobs, entropy, batch): ...\n"
    )
    with pytest.raises(UsageError, match="Plain is no PolicyGradient, whose loss corrects"):
        GRPOTrainer(args=config(tmp_path / "run", partial_rollouts=0.5, algorithm=f"{own}:Plain"))
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="unfinished answers stay in one process"):
        GRPOTrainer(args=config(tmp_path / "run", partial_rollouts=0.5))


def test_prompts_come_in_the_order_of_the_run() -> None:
    """One at a time they are those of whole steps: places, not steps, are what counts."""
    rows = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(10)]
    import datasets

    prompts = Prompts(datasets.Dataset.from_list(rows), TOKENIZER, GRPOConfig(reward_workers=0))
    assert [prompts.batch(place, 1)[0].index for place in range(4, 8)] == [p.index for p in prompts.batch(1, 4)]


def test_answers_in_flight_never_meet_another_prompt(caplog: pytest.LogCaptureFixture) -> None:
    """Rows may be other ones after a resume, and so may the number of answers and their limit."""
    made = source(lambda place, row: 40 if place == 2 and row == 1 else 4)
    played(made, 1)
    state = made.state_dict(1)

    class Moved(Endless):
        def batch(self, step: int, size: int) -> list[Prompt]:
            return [Prompt(p.index, [p.ids[0] + (p.index == 2)], "p", {}) for p in super().batch(step, size)]

    for change in ("prompts", "answers"):
        again = source(lambda place, row: 4, num_generations=3 if change == "prompts" else 2)
        again.load_state_dict(state)
        if change == "prompts":
            again.prompts = Moved()  # type: ignore[assignment]
        caplog.clear()
        again.sampler.engine.version = 2
        step = again.rollout(2, Clock(), lambda tokens: None)
        begun = [s for s in step.samples if s.completion_ids[0] == 11]
        assert not any(s.prompt.index == 2 for s in begun), "it is not what the first weights began"
        assert change == "prompts" or not begun
        assert "prompts in flight are other ones by now" in caplog.text
    shorter = source(lambda place, row: 4)
    shorter.sampler.limit = 4
    shorter.load_state_dict(state)
    shorter.sampler.engine.version = 2
    cut = [s for s in shorter.rollout(2, Clock(), lambda tokens: None).samples if s.prompt.index == 2]
    assert [len(s.completion_ids) for s in cut] == [4, 4, 4] and not cut[1].stopped
