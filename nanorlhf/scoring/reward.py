"""A reward: a function found by name, what it is given, and what may come of a call."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import math
import pkgutil
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from threading import Thread
from traceback import walk_tb
from typing import Any

from nanorlhf.errors import UsageError, error_line, nearest, plain, shown
from nanorlhf.system.user_code import from_file, is_file_spec

RewardFunction = Callable[..., Any]
ALWAYS = {"prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra"}  # beside the columns
EPISODES = {"environments", "environment_returns"}  # if there is an environment


@dataclass(frozen=True, slots=True)
class TrainerState:
    """The state of training, for rewards that change as it goes on."""

    global_step: int  # steps done so far
    max_steps: int


@dataclass(slots=True)
class Verdict:
    """The result of one call: for each completion a score, or None and, if that was a fault, the fault in words."""

    scores: list[float | None]
    faults: list[str | None]
    seconds: float = 0.0
    metrics: list[tuple[str, float]] = field(default_factory=list)  # what the function logged
    extras: dict[str, list[Any]] = field(default_factory=dict)  # columns it added to the samples

    @classmethod
    def of_fault(cls, fault: str, count: int, seconds: float = 0.0) -> Verdict:
        """The same fault for every completion of the call."""
        return cls([None] * count, [fault] * count, seconds)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Reward:
    """A reward function with its name and its weight in the sum."""

    name: str
    function: RewardFunction
    weight: float = 1.0
    file: str = ""  # where it was written, which functions forget on their way to a worker

    @property
    def parameters(self) -> list[inspect.Parameter]:
        return list(inspect.signature(self.function).parameters.values())

    @property
    def names(self) -> set[str]:
        return {p.name for p in self.parameters}

    @property
    def inner(self) -> RewardFunction:
        """The function without the options that are set."""
        return self.function.func if isinstance(self.function, partial) else self.function

    @property
    def bound(self) -> dict[str, Any]:
        """The options that are set."""
        return self.function.keywords if isinstance(self.function, partial) else {}

    @property
    def options(self) -> dict[str, Any]:
        """Its options, as they are set."""
        return defaults_of(self.inner) | self.bound

    @property
    def is_async(self) -> bool:
        return inspect.iscoroutinefunction(self.inner) or inspect.iscoroutinefunction(type(self.inner).__call__)

    @property
    def ships(self) -> bool:
        """Whether it comes with the package."""
        return (getattr(self.inner, "__module__", None) or "").startswith("nanorlhf.rewards.")

    @property
    def in_trainer(self) -> bool:
        """Whether it must run in the trainer's own process, for it uses the GPU."""
        return getattr(self.function, "in_trainer", False)

    @property
    def required(self) -> list[str]:
        """Arguments it cannot do without."""
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return [p.name for p in self.parameters if p.default is p.empty and p.kind in named]

    def missing(self, columns: Iterable[str]) -> list[str]:
        """Of these, what neither the trainer nor the dataset has."""
        return [name for name in self.required if name not in ALWAYS | EPISODES and name not in columns]

    def wanted(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Those arguments that the function takes; no column replaces an option."""
        parameters, bound = self.parameters, self.bound  # looked up once, for this is done for every completion
        takes_all, names = any(p.kind is p.VAR_KEYWORD for p in parameters), {p.name for p in parameters}
        return {k: v for k, v in arguments.items() if k not in bound and (takes_all or k in names)}


def judge(reward: Reward, arguments: Mapping[str, Any], count: int) -> Verdict:
    """Calls the function, plain or async, and looks at what it returns; whatever goes wrong is a fault."""
    start, logged, extras = time.perf_counter(), [], {}
    tools = {
        "log_metric": lambda name, value: logged.append((str(name), float(value))),
        "log_extra": lambda column, values: extras.__setitem__(str(column), as_json(list(values))),
    }
    try:
        returned = reward.function(**reward.wanted({**arguments, **tools}))
        values = list(finished(returned) if inspect.isawaitable(returned) else returned)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  SystemExit too must cost no more than this
        return Verdict.of_fault(raised(error, reward), count, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    if len(values) != count:
        return Verdict.of_fault(f"returned {len(values)} scores for {count} completions", count, seconds)
    checked = [check_score(value, reward) for value in values]
    return Verdict([score for score, _ in checked], [fault for _, fault in checked], seconds, logged, extras)


def finished(scores: Awaitable[Any]) -> Any:
    """The result of an async reward."""
    return asyncio.run_coroutine_threadsafe(awaited(scores), event_loop()).result()


async def awaited(scores: Awaitable[Any]) -> Any:
    """An awaitable as a coroutine, which does not end the loop that others need."""
    try:
        return await scores
    except (SystemExit, KeyboardInterrupt) as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


@cache
def event_loop() -> asyncio.AbstractEventLoop:
    """One loop for all calls of this process, for connections and locks belong to the loop that first used them."""
    loop = asyncio.new_event_loop()

    def run() -> None:
        while True:
            with suppress(SystemExit, KeyboardInterrupt):  # of a task, which has them too
                loop.run_forever()

    Thread(target=run, name="async rewards", daemon=True).start()
    return loop


def raised(error: BaseException, reward: Reward) -> str:
    """The exception, and where it came from: the last line of the reward's own file on the way to it."""
    own = file_of(reward.inner)
    way = [(frame.f_code.co_filename, line) for frame, line in walk_tb(error.__traceback__)]
    lines = [line for file, line in way if file in (own, reward.file)]
    return f"raised {error_line(error)}" + (f" ({plain(reward.file or own, keep='')}:{lines[-1]})" if lines else "")


def file_of(function: RewardFunction) -> str:
    """The file of a function's code, or of an object's that is called; nothing for one that has no code."""
    own = inspect.unwrap(function)
    code = getattr(own, "__code__", None) or getattr(type(own).__call__, "__code__", None)
    return code.co_filename if code else ""


def check_score(value: Any, reward: Reward) -> tuple[float | None, str | None]:
    """A finite number, or None for "could not be scored"; anything else is a fault."""
    if value is None:
        return None, None
    if isinstance(value, Exception):
        return None, raised(value, reward)
    try:
        number = float(value)
    except Exception:  # noqa: BLE001  whatever an object raises that is asked to be a number
        return None, f"returned {plain(shown(value), keep='')}, which is no number"
    if isinstance(value, str | bytes | bytearray) or not math.isfinite(number):
        return None, f"returned {plain(shown(value), keep='')}; a score is a finite number, or None where there is none"
    return number, None


def as_json(values: list[Any]) -> list[Any]:
    """The values as a file of samples will hold them."""
    return json.loads(json.dumps(values, default=str))


def find_rewards(
    specs: Any,
    weights: Sequence[float] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    unsafe_code: bool = False,
) -> list[Reward]:
    """Rewards from functions, names, `path/to/file.py:function`, or a list of these, with options by reward name."""
    specs = list(specs) if isinstance(specs, list | tuple) else [specs]
    if not specs:
        raise UsageError(
            f"no reward: name one in reward_funcs ({', '.join(known_rewards())}), or path/to/file.py:function"
        )
    if weights is not None and len(weights) != len(specs):
        raise UsageError(f"reward_weights={list(weights)}: there are {len(specs)} rewards, and each takes one weight")
    weights = [1.0] * len(specs) if weights is None else weights
    names, options = [name_of(spec) for spec in specs], options or {}
    if len(set(names)) < len(names):
        raise UsageError(f"reward_funcs={names}: each needs a name of its own, for the metrics")
    for name in options:
        if name not in names:
            raise UsageError(f"reward_options: {name!r} is none of this run's rewards; {nearest(name, names)}")
    found = [Reward(n, find(spec, options.get(n, {}), unsafe_code)) for n, spec in zip(names, specs, strict=True)]
    return [replace(r, weight=weight, file=file_of(r.inner)) for r, weight in zip(found, weights, strict=True)]


def name_of(spec: Any) -> str:
    """The name of a reward in the metrics."""
    if callable(spec):
        return getattr(spec, "__name__", type(spec).__name__)
    return spec.rpartition(":")[2] if is_file_spec(spec) else spec.partition(":")[0]


def find(spec: Any, options: Mapping[str, Any], unsafe_code: bool) -> RewardFunction:
    """A reward function, or a classifier, as it is, by the file that defines it, or by its name; with its options."""
    if hasattr(spec, "forward"):
        return importlib.import_module("nanorlhf.rewards.model").model(spec)
    if callable(spec) or is_file_spec(spec):
        found = from_file(spec) if isinstance(spec, str) else spec
        if not callable(found):
            raise UsageError(f"reward {spec!r} must name a function, which is given the completions")
        return with_options(found, options)
    name, _, argument = spec.partition(":")
    if name.endswith(".py"):
        raise UsageError(f"reward {spec!r}: say which function of the file, {name}:FUNCTION")
    if name not in known_rewards():
        hint = f"a classifier is model:{spec}" if "/" in spec else nearest(name, known_rewards())
        raise UsageError(f"unknown reward {spec!r}: {hint}")
    module = importlib.import_module(f"nanorlhf.rewards.{name}")
    function = getattr(module, name)
    makes = not inspect.signature(function).parameters.keys() & ALWAYS
    if makes != bool(argument):
        raise UsageError(f"reward {spec!r}: " + (f"say {name}:WHICH" if makes else f"{name} takes no :{argument}"))
    function = function(argument) if argument else function
    known = defaults_of(function)
    given = known | ({"unsafe_code": unsafe_code} if "unsafe_code" in known else {}) | dict(options)
    made = with_options(function, given)  # all of them: no column replaces one
    if hasattr(module, "check"):
        module.check(**given)
    return made


def with_options(function: RewardFunction, options: Mapping[str, Any]) -> RewardFunction:
    """The function with its options set: keyword-only parameters that have a default."""
    known = defaults_of(function)
    for option, value in options.items():
        if option not in known:
            raise UsageError(
                f"reward_options: {name_of(function)!r} has no option {option!r}; {nearest(option, known)}"
            )
        if isinstance(known[option], int | float | str) and type(value) not in same_kind(known[option]):
            raise UsageError(
                f"reward_options: {option}={value!r} of {name_of(function)!r} is of the wrong type: "
                f"it takes {type(known[option]).__name__}"
            )
    return partial(function, **options) if options else function


def same_kind(default: Any) -> tuple[type, ...]:
    """The types that an option with this default takes: numbers for a number, and true and false are none."""
    if isinstance(default, bool | str):
        return (type(default),)
    return (int, float)


def defaults_of(function: RewardFunction) -> dict[str, Any]:
    """A function's options: its keyword-only parameters that have a default."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}


def known_rewards() -> list[str]:
    """The rewards that come with the package: one file each, named after its function."""
    folder = importlib.import_module("nanorlhf.rewards").__path__
    return sorted(module.name for module in pkgutil.iter_modules(folder) if not module.name.startswith("_"))
