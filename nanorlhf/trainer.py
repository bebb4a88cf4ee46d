"""Makes a run of what was asked for: checks before anything is loaded, parts put together, steps until the end."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from nanorlhf import assembly, preflight
from nanorlhf.algorithm import Algorithm, OnPolicy
from nanorlhf.config import names
from nanorlhf.config.training import CriticConfig, OnPolicyConfig, TrainConfig
from nanorlhf.data.prompts import AnswerPicker
from nanorlhf.data.templates import use_template
from nanorlhf.engine_check import EngineCheck
from nanorlhf.engines.base import refresh
from nanorlhf.environments.protocol import stops
from nanorlhf.evaluation import evaluate, held_out_loss
from nanorlhf.learning import critic_init
from nanorlhf.learning.critic import Critic
from nanorlhf.loop import Loop
from nanorlhf.memory import rehearsal
from nanorlhf.memory.needs import cached_tokens
from nanorlhf.memory.plan import Plan
from nanorlhf.memory.residency import Offloadable, Residency, ServedWeights
from nanorlhf.policy import serialization
from nanorlhf.policy.loading import coverage
from nanorlhf.policy.policy import Policy
from nanorlhf.records import checkpoint, directory
from nanorlhf.records.console import ProgressBar, summary
from nanorlhf.records.journal import Journal
from nanorlhf.rollouts.demonstrations import Demonstrations
from nanorlhf.rollouts.on_policy import OnPolicySource
from nanorlhf.rollouts.sampler import Sampler
from nanorlhf.scoring.scorer import Scorer
from nanorlhf.system import files, garbage, signals
from nanorlhf.system.device import pick_device
from nanorlhf.system.distributed import LostError, join
from nanorlhf.system.random_state import random_state
from nanorlhf.system.terminal import log
from nanorlhf.types import Rollout


@dataclasses.dataclass(frozen=True, slots=True)
class State:
    """The state of training, in the words of the Trainer from transformers."""

    global_step: int
    max_steps: int
    log_history: list[dict[str, Any]]  # the metrics of every step, as train() returns them


class Trainer:
    """One run of one algorithm; every argument may come from `args` by name instead."""

    algorithm_class: ClassVar[type[Algorithm]]
    config_class: ClassVar[type[TrainConfig]]
    check: EngineCheck | None = None
    sampler: Sampler  # if anything is written
    reader: ClassVar[AnswerPicker | None] = None  # of a dataset row's answers, if these are learned from
    policy_class: ClassVar[type[Policy]] = Policy
    source_class: ClassVar[type[Demonstrations]] = Demonstrations  # makes samples of such answers

    @signals.listening()
    def __init__(
        self,
        model: Any = None,
        reward_funcs: Any = None,
        args: TrainConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        tools: Any = None,
    ) -> None:
        args = preflight.of_kind(args, self.config_class)
        if isinstance(model, str):
            args, model = dataclasses.replace(args, model_name_or_path=model), None
        entry = preflight.check(
            args, model, reward_funcs, train_dataset, eval_dataset, self.reader, self.algorithm_class, tools
        )
        self.world = join(pick_device(args.device))
        self.plan = assembly.plan_memory(entry, peft_config)
        self.config = args = entry.config
        self.residency = Residency(self.plan, pick_device(args.device))
        self.entry, self.scorer = entry, Scorer(entry.rewards, args, self.residency)
        self.tokenizer = processing_class or assembly.load_tokenizer(args, model)
        use_template(self.tokenizer, args)
        if isinstance(args, CriticConfig):
            assembly.check_critic(args, self.tokenizer)
        self.prompts, self.held_out = assembly.read_prompts(entry, self.tokenizer, self.reader)
        signals.heed()
        self.run = self.world.first_only(lambda: directory.prepare(args, entry.algorithm.name))
        transformers.set_seed(args.seed)
        transformers.utils.logging.disable_progress_bar()
        self.load_models(model, peft_config)
        self.done = 0
        self.ending: str | None = None  # why it ends before its last step
        if args.resume:
            with self.residency.phase("update"):  # optimizers load what they had to where the weights are
                self.restore()
        self.version_done, self.random = self.policy.version, random_state()
        kept = entry.source == "policy" and isinstance(args, OnPolicyConfig) and args.keep_rollouts
        self.journal = Journal(self.run, args, self.algorithm.name, self.done, kept)
        if entry.generates:
            self.serve()

    def load_models(self, model: Any, peft_config: Any) -> None:
        """Loads policy, critic and engine, in an order in which each finds room, and makes the loop over them."""
        args, entry = self.config, self.entry
        self.policy = self.policy_class(args, model, peft_config)
        self.world.sync(self.policy.trainable.values())
        self.policy.verify()
        self.algorithm = assembly.make_algorithm(entry, self.policy)
        self.sampling = assembly.how_to_sample(args, self.policy, self.tokenizer, stops(entry.environment))
        self.critic = Critic(args, self.policy) if isinstance(args, CriticConfig) else None
        assembly.register(self.residency, self.policy, self.critic, entry.rewards)
        if entry.generates:
            with self.residency.phase("generate"):  # there is room for it now
                self.start_engine()
        parts = self.tokenizer, self.algorithm, self.prompts, self.held_out, self.scorer, self.sampling
        sampler = self.sampler if entry.generates else None
        self.source = assembly.make_source(entry, *parts, sampler, self.source_class)
        scorer = None if entry.source == "dataset" else self.scorer
        engine = self.engine if entry.source == "policy" else None
        self.loop = Loop(args, self.algorithm, self.policy, self.source, scorer, engine, self.critic, self.residency)
        self.residency.add("optimizer", Offloadable(self.loop.moments))

    @classmethod
    def plan_of(cls, config: TrainConfig) -> Plan:
        """The memory plan of a configuration, on any machine and without loading anything."""
        return preflight.plan_command(config, cls.algorithm_class, cls.reader is not None)

    def start_engine(self) -> None:
        """Starts the engine, and who writes with it."""
        signals.heed()
        args, ends = self.config, self.sampling.stop_token_ids
        models, tokens = (self.policy, self.tokenizer), cached_tokens(args, self.algorithm)
        self.engine = assembly.start_engine(args, *models, self.sampling, self.run, self.plan, tokens)
        who = self.tokenizer, self.scorer, ends, self.entry.environment, self.residency
        self.sampler = assembly.make_sampler(args, self.engine, *who)
        self.residency.add("engine", ServedWeights(self.engine, self.policy))
        if args.engine_check == "on":
            first = self.prompts.batch(0, 1)[0]
            self.check = EngineCheck(self.policy, self.engine, self.residency, first, self.sampling, args.seed)

    def serve(self) -> None:
        """The engine awake and up to date."""
        with self.residency.phase("generate"):
            refresh(self.engine, self.policy)

    def train(self) -> list[dict[str, Any]]:
        """Trains to the last step and returns each step's metrics; Ctrl-C ends it after the step, with a checkpoint."""
        try:
            for _ in self.steps():
                pass
        except LostError as error:
            raise LostError(f"{error}; go on with --resume {self.run}") from error
        finally:
            self.close()
        log.info(summary(self.journal.history.drawn, self.run))
        if self.prompts.dropped > self.dropped:
            log.info(f"in all, {self.prompts.maker.why()}")
        if self.ending:
            log.info(f"stopped after step {self.done}, {self.ending}; go on with --resume {self.run}")
        return directory.read_lines(self.run / "metrics.jsonl")

    def close(self) -> None:
        """Ends the processes of rewards, and the engine."""
        self.scorer.close()
        if self.entry.generates:
            self.engine.close()

    def steps(self) -> Generator[dict[str, Any], None, None]:
        """Trains step by step; stop whenever you like, what is done is saved."""
        with files.room(self.run), directory.released(self.run), garbage.settled():
            yield from self.all_steps()

    def all_steps(self) -> Generator[dict[str, Any], None, None]:
        """The steps, from the first to the last."""
        self.journal.open(self.done)
        self.introduce()
        progress = ProgressBar(self.config.max_steps, self.done)
        try:
            with signals.handled(self.end_early, unless=LostError):
                if rehearsal.is_needed(self.config, self.policy.device):
                    self.rehearse()
                if self.check and not self.over():
                    self.check.before_training()
                if self.done == 0:
                    self.journal.record({"step": 0} | self.initialise_critic(progress) | self.evaluate())
                while not self.ends():
                    yield self.one_step(progress)
        finally:
            progress.close()
            self.journal.close()
            whole = self.policy.version == self.version_done  # not cut off in the middle of an update or of its records
            if whole and checkpoint.step_of(names.latest(self.run)) < self.done:
                self.save()

    def one_step(self, progress: ProgressBar) -> dict[str, Any]:
        """A step, with its evaluation, log and checkpoint."""
        step = self.loop.step(self.done + 1, progress.writing)
        if self.check:
            self.check.after_step()
        step.metrics = self.world.broadcast(step.metrics)  # each has its own clock
        self.done += 1
        last = self.over(step.metrics["time/step"])
        try:
            if last or (self.config.eval_steps and self.done % self.config.eval_steps == 0):
                step.metrics |= self.evaluate()
        finally:
            self.journal.write(step)
            self.version_done, self.random = self.policy.version, random_state()
        found = self.journal.ailments()
        self.ending = self.ending or next((f"for {r.kind}" for r in found if r.kind in self.config.stop_on), None)
        for r in found:
            log.warning(f"{r.words} (try {r.advice})")
        self.journal.report_skipped(step)
        self.journal.refuse_the_hopeless()
        progress.step(step.metrics)
        if last or (self.config.save_steps and self.done % self.config.save_steps == 0):
            self.save()
        return step.metrics

    def over(self, seconds: float = 0.0) -> bool:
        """Whether steps or minutes are used up, `seconds` being those of a step that is not yet in the history."""
        return self.config.over(self.done, self.journal.history.seconds + seconds)

    def ends(self) -> bool:
        """Whether that was the last step, for all processes."""
        self.ending = next((why for why in self.world.gather(self.ending) if why), None)
        return self.over() or self.ending is not None

    def initialise_critic(self, progress: ProgressBar) -> dict[str, Any]:
        """Teaches a critic before the first update, if there is one; its metrics."""
        source, algorithm, config = self.loop.source, self.algorithm, self.config
        if not (isinstance(config, CriticConfig) and config.value_init_prompts and isinstance(source, OnPolicySource)):
            return {}
        assert isinstance(algorithm, OnPolicy) and self.critic is not None

        def episodes() -> tuple[Rollout, torch.Tensor]:
            rollout = source.beforehand(config.value_init_prompts, progress.writing)
            self.scorer.report("value initialisation: ")
            return rollout, algorithm.counted(rollout)

        return critic_init.initialise(self.critic, self.loop.passes, self.run, episodes, self.residency.phase("update"))

    def rehearse(self) -> None:
        """Tries out the longest rows, and lowers the token budget until they fit."""
        with self.residency.phase("update"):
            rehearsal.rehearse(self.loop.learners, self.loop.passes, self.config, self.algorithm.together)

    def evaluate(self) -> dict[str, Any]:
        """Held-out rewards, and how held-out answers fare, if there is a held-out set."""
        if not self.held_out:
            return {}
        start, source, metrics = time.perf_counter(), self.loop.source, {}
        if isinstance(source, Demonstrations) and source.held_out:
            with self.residency.phase("measure"):
                metrics |= self.held_out_loss(source.held_out)
        if self.entry.generates:
            self.serve()
            self.scorer.at(self.done)
            metrics |= evaluate(self.sampler, self.held_out, self.config.seed)[0]
            self.scorer.report("evaluation: ")
        return self.world.broadcast(metrics | {"time/eval": time.perf_counter() - start})

    def held_out_loss(self, rollout: Rollout) -> dict[str, Any]:
        """The loss on held-out answers, which are measured the first time."""
        loop, everything = self.loop, torch.ones(len(rollout.samples), dtype=torch.bool)
        if not rollout.columns:
            loop.measure(rollout, everything)
        weights = loop.weigh(rollout, self.algorithm.credit(rollout), everything, everything)
        return held_out_loss(loop.learner, loop.passes, rollout, weights)

    def introduce(self) -> None:
        """Tells what is about to happen, in a few lines, the first prompt as the model sees it among them."""
        config, first = self.config, self.prompts.batch(0, 1)[0]
        engine = self.engine.name if self.entry.generates else "none needed"
        log.info(f"run directory {self.run}; device {self.policy.device}, engine {engine}")
        log.info(coverage(self.policy.model))
        if self.loop.passes.one_per_row:
            log.info("this model has recurrent layers: a row for each sample, and its prompt in each")
        if self.plan:
            log.info(self.plan.table())
        log.info(f"{self.prompts.summary()}, {len(self.held_out)} held out")
        self.dropped = self.prompts.dropped  # others may turn up when their turn comes
        prompts = config.prompts_per_step
        flying = config.prompts_in_flight if isinstance(config, OnPolicyConfig) else prompts
        more = f", {flying} in flight" if flying > prompts else ""
        log.info(f"{self.algorithm.answers * prompts} completions a step from {prompts} prompts{more}")
        ends = [*self.tokenizer.convert_ids_to_tokens(list(self.sampling.stop_token_ids)), *self.sampling.stop]
        log.info(f"completions end with {' or '.join(ends)}, or after {config.max_completion_length} tokens")
        log.info(f"the first prompt as the model sees it: {self.tokenizer.decode(first.ids)!r}")

    def end_early(self, signal: str) -> None:
        """Lets the step finish at the first signal; the second ends at once."""
        if self.ending:
            raise KeyboardInterrupt(f"go on with --resume {self.run}")
        self.ending = f"by {signal}"
        log.info(f"{signal}: stopping after this step; once more ends it at once")

    def save(self) -> None:
        """A checkpoint, and the learning curve so far."""
        if not self.world.first:
            return
        self.journal.settle()
        state = self.loop.state_dict(self.done) | {"random": self.random}  # a step that breaks off draws numbers, too
        checkpoint.save(self.run, self.done, self.write, state, self.config.save_total_limit)
        self.journal.draw()

    def save_model(self, output_dir: str | Path) -> None:
        """The adapter (or the whole model) as it is now, and the tokenizer, wherever you like."""
        if self.world.first:
            self.write(Path(output_dir))

    def write(self, folder: Path) -> None:
        serialization.save(self.policy, folder)
        self.tokenizer.save_pretrained(folder)

    @property
    def model(self) -> Any:
        """The model that learns, PEFT's if there is an adapter."""
        return self.policy.model

    @property
    def state(self) -> State:
        """The state of training."""
        return State(self.done, self.config.max_steps, directory.read_lines(self.run / "metrics.jsonl"))

    def restore(self) -> None:
        """Goes back to where the run's last checkpoint left it."""
        resume, keep = str(self.config.resume), self.config.save_total_limit
        folder = self.world.first_only(lambda: checkpoint.chosen(resume))
        if folder is None:
            return
        self.world.first_only(lambda: checkpoint.tidy(self.run, keep))
        serialization.restore(self.policy, folder)
        state = checkpoint.load_state(folder)
        self.loop.load_state_dict(state)
        self.done = state["step"]
        if self.done >= self.config.max_steps:
            log.info(f"all {self.done} steps are done; say a larger max_steps to go on")
