"""Random configurations, recipes, rows, reward outputs and chat templates: what cannot work is said, and nothing else.

`python -m evidence.survival.fuzz --examples 10000` writes results/fuzz.json.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from evidence.results import RESULTS, where, write
from nanorlhf.__main__ import ALGORITHMS
from nanorlhf.config.aliases import ALIASES
from nanorlhf.config.names import shipped_model
from nanorlhf.config.option import defaults
from nanorlhf.config.training import TrainConfig
from nanorlhf.data.prompts import Prompts
from nanorlhf.data.sources import as_rows
from nanorlhf.data.templates import use_template
from nanorlhf.errors import RunError, UsageError
from nanorlhf.ppo import PPOConfig
from nanorlhf.records.tracking import sample_line
from nanorlhf.rollouts.demonstrations import demonstration, preference
from nanorlhf.scoring.reward import Reward, judge
from nanorlhf.scoring.scorer import Scorer
from nanorlhf.types import Prompt, Sample

RESULT = RESULTS / "fuzz.json"
LONGEST = 30.0  # seconds that an example may take
OPTIONS = sorted({*defaults(PPOConfig), "advantage", "scale_rewards", "baseline", "ema_beta", "beta"})
COLUMNS = ("prompt", "completion", "chosen", "rejected", "label", "messages", "conversations", "question", "answer")
COLUMNS += ("problem", "solution", "query", "response", "target", "nums", "reward_model", "ground_truth", "x")
ROLES = ("user", "assistant", "system", "tool", "human", "gpt", "")

letters = st.characters() | st.sampled_from(
    "ab \n{}[]\x1b\x00\u202e\ud800"
)  # half a character too, as JSON may hold it
texts = st.text(letters, max_size=12)
numbers = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 0.5, 2**31, 2**53, 1e308])
leaves = st.none() | st.booleans() | numbers | texts
nested = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=8
)
words = st.sampled_from(
    ["auto", "none", "null", "true", "group", "hf", "arithmetic", "test", "exact_answer", "plain", "[]", "{}", "[1,2]"]
)
values = words | texts | numbers.map(str) | nested.map(json.dumps)

messages = st.lists(
    st.fixed_dictionaries({}, optional={"role": st.sampled_from(ROLES), "content": texts | nested, "value": texts})
    | st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": texts})
    | st.fixed_dictionaries({"from": st.sampled_from(ROLES), "value": texts}),
    max_size=4,
)
dialogues = st.lists(st.sampled_from(["\n\nHuman: ", "\n\nAssistant: ", "Human:", "a", " ", "\n"]), max_size=6).map(
    "".join
)
turns = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": texts}), min_size=1, max_size=4
)
kinds = [texts, st.text("abc 0123{}#", min_size=1, max_size=9), turns, messages, dialogues, st.integers(-9, 9), nested]


def table(columns: Sequence[tuple[str, Any]]) -> st.SearchStrategy[list[dict[str, Any]]]:
    """Rows with these columns, each of one kind, and here and there none."""
    row = st.fixed_dictionaries({name: kind | st.none() for name, kind in columns})
    return st.lists(row, min_size=1, max_size=5)


forms = [("prompt",), ("prompt", "answer"), ("prompt", "completion"), ("prompt", "chosen", "rejected"), ("messages",)]
forms += [
    ("chosen", "rejected"),
    ("conversations",),
    ("question", "answer"),
    ("problem", "solution"),
    ("target", "nums"),
]
forms += [("query", "response"), ("prompt", "reward_model"), ("prompt", "completion", "label")]
names = st.sampled_from(forms) | st.lists(st.sampled_from(COLUMNS), min_size=1, max_size=4, unique=True)
columns = names.flatmap(lambda known: st.tuples(*(st.tuples(st.just(name), st.sampled_from(kinds)) for name in known)))
rows = columns.flatmap(table) | st.lists(st.dictionaries(texts, nested, max_size=3) | nested, max_size=3)
readings = st.fixed_dictionaries(
    {},
    optional={
        "columns": st.dictionaries(st.sampled_from(COLUMNS) | texts, st.sampled_from(COLUMNS) | texts, max_size=3),
        "answer_pattern": st.sampled_from(["gsm8k", "boxed", "last_number", "(.)", "(", "a"]) | texts,
        "prompt_template": st.sampled_from(["{prompt}!", "{question}", "{x}{{}}", "{"]) | texts,
        "system_prompt": texts,
        "prompt_format": st.sampled_from(["auto", "chat", "text"]),
        "few_shot": st.integers(0, 3),
    },
)

pieces = [
    "{{ messages }}", "{{ messages[0]['content'] }}", "{{ m.content }}", "{% for m in messages %}", "{% endfor %}",
    "{% if add_generation_prompt %}", "{% endif %}", "{{ bos_token }}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}",
    "{{ messages.__class__ }}", "{{ ''.__class__.__mro__ }}", "{% set x = 1 %}", "{{ x }}", "{#", "#}", "{%", "}}",
    "{{ m['role'] | upper }}", "{% generation %}", "{% endgeneration %}", "{{ eos_token }}", "User: ", "\n<think>\n",
]  # fmt: skip
templates = st.lists(st.sampled_from(pieces) | texts, max_size=8).map("".join)


class Odd:
    """An object that does not want to be a number, nor to be shown."""

    def __float__(self) -> float:
        raise OSError("no number")

    def __repr__(self) -> str:
        return "\x1b[31m\nodd"


outputs = st.one_of(
    nested,
    st.lists(leaves | st.builds(Odd) | st.builds(ValueError, texts) | st.binary(max_size=3), max_size=5),
    st.lists(st.floats(), min_size=2, max_size=2),
    st.integers(10**300, 10**400).map(lambda number: [number, number]),
    st.builds(Odd),
)


def hung(_: int, frame: FrameType | None) -> None:
    """An example that takes too long."""
    raise TimeoutError(f"still going on after {LONGEST:g} s at {frame}")


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Nothing hangs, and nothing is raised but what the user is told in a line."""
    before = signal.signal(signal.SIGALRM, hung)
    signal.setitimer(signal.ITIMER_REAL, LONGEST)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except (UsageError, RunError) as told:
        complaint = str(told)
    else:
        complaint = "none"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert complaint.strip(), "an empty complaint"


@cache
def tokenizer() -> Any:
    """The shipped model's."""
    return AutoTokenizer.from_pretrained(shipped_model("nanorlhf:adder"))


def command_line(algorithm: str, argv: list[str]) -> None:
    """Parses to a configuration that says itself again, or ends with one line."""
    main, said, written = import_module(f"nanorlhf.{algorithm}.__main__").main, io.StringIO(), io.StringIO()
    with watched(), contextlib.redirect_stderr(said):
        with contextlib.redirect_stdout(written):
            status = main([*argv, "--print_config"])
        if status:
            assert status == 2
            assert said.getvalue().startswith(f"nanorlhf {algorithm}: error: ")
            assert said.getvalue().count("\n") == 1
        else:
            config = yaml.safe_load(written.getvalue()[written.getvalue().index("model_name_or_path:") :])
            floats = [value for value in config.values() if isinstance(value, float)]
            assert all(map(math.isfinite, floats)), "a number that is none was taken"


@given(
    st.sampled_from(ALGORITHMS),
    st.lists(st.tuples(st.sampled_from([*OPTIONS, *ALIASES]) | texts, values), max_size=4),
)
def configurations(algorithm: str, options: list[tuple[str, str]]) -> None:
    """Options on the command line."""
    command_line(algorithm, [f"--{name}={value}" for name, value in options if name not in ("resume", "h", "help")])


@given(
    st.sampled_from(ALGORITHMS),
    st.dictionaries(st.sampled_from(OPTIONS) | texts, values | nested, max_size=4).map(
        lambda options: json.dumps(options).encode()
    )
    | nested.map(lambda value: json.dumps(value).encode())
    | st.binary(max_size=40)
    | texts.map(lambda text: text.encode(errors="surrogatepass")),
)
def recipes(algorithm: str, content: bytes) -> None:
    """YAML files of anything."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_bytes(content)
        command_line(algorithm, ["--recipe", str(path)])


@given(rows, st.just({}) | readings, st.sampled_from([None, demonstration, preference]))
def data(given_rows: list[dict[str, Any]], options: dict[str, Any], reader: Any) -> None:
    """Rows in every known form and in none become prompts that fit, or are refused."""
    with watched():
        config = TrainConfig(**options)
        prompts = Prompts(as_rows(given_rows), tokenizer(), config, reader)
        for prompt in prompts.batch(0, 4):
            assert 0 < len(prompt.ids) <= config.max_prompt_length
            assert prompt.index in prompts.usable
            json.dumps(prompt.columns, default=str)


def samples(count: int) -> list[Sample]:
    """As many, with nothing known of them yet."""
    return [Sample(Prompt(i, [1], "1+1=", {}), [2], [0.0], True, "2") for i in range(count)]


@given(outputs, st.dictionaries(texts, nested | st.sets(st.integers(), max_size=2), max_size=2), st.booleans())
def rewards(output: Any, extras: dict[str, Any], raises: bool) -> None:
    """A reward function's output is a finite score, none, or a fault that keeps its sample out of training."""

    def reward(completions: list[Any], log_extra: Any, log_metric: Any) -> Any:
        for name, value in extras.items():
            log_metric(name, len(completions))
            log_extra(name, value if isinstance(value, list | set) else [value])
        if raises:
            raise ValueError(output)
        return output

    verdict = judge(Reward("random", reward), {"completions": ["a", "b"]}, 2)
    assert len(verdict.scores) == len(verdict.faults) == 2
    for score, fault in zip(verdict.scores, verdict.faults, strict=True):
        assert score is None or (math.isfinite(score) and fault is None)
        assert fault is None or fault.isprintable()
    with watched():
        scorer = Scorer([Reward("random", reward)], TrainConfig(reward_workers=0))
        judged = samples(2)
        scorer.score(judged)
        for sample in judged:
            assert sample.reward is None if sample.fault else sample.reward is None or math.isfinite(sample.reward)
            assert json.loads(sample_line(1, sample, 0.0))["completion"] == "2"


@given(templates, messages | texts, st.booleans())
def chat_templates(template: str, prompt: Any, chosen: bool) -> None:
    """Whatever a template does, prompts come of it or a complaint."""
    fresh = AutoTokenizer.from_pretrained(shipped_model("nanorlhf:adder"))
    with tempfile.TemporaryDirectory() as folder, watched():
        path = Path(folder) / "chat.jinja"
        path.write_bytes(template.encode(errors="surrogatepass"))
        config = TrainConfig(chat_template=str(path) if chosen else None, prompt_format="chat")
        if not chosen:
            fresh.chat_template = template
        use_template(fresh, config)
        for made in Prompts(as_rows([{"prompt": prompt}]), fresh, config).batch(0, 1):
            assert 0 < len(made.ids) <= config.max_prompt_length


TARGETS: dict[str, Callable[[], None]] = {
    "configurations": configurations,
    "recipes": recipes,
    "data rows": data,
    "reward outputs": rewards,
    "chat templates": chat_templates,
}


def run(target: Callable[[], None], examples: int, seed: int | None = None) -> None:
    """So many examples of a target; raises what the first that fails raised."""
    import hypothesis

    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    chosen = settings(
        max_examples=examples,
        deadline=None,  # an alarm ends what hangs
        database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        derandomize=seed is None,
        suppress_health_check=slow,
    )
    prepared = chosen(target)
    (prepared if seed is None else hypothesis.seed(seed)(prepared))()


def main(argv: list[str] | None = None) -> int:
    """Every target in turn."""
    parser = argparse.ArgumentParser(prog="evidence.survival.fuzz", description=__doc__)
    parser.add_argument("--examples", type=int, default=10_000, help="examples of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TARGETS, help="one kind")
    args = parser.parse_args(argv)
    found: dict[str, Any] = {}
    for name, target in TARGETS.items():
        if args.only in (None, name):
            start = time.perf_counter()
            run(target, args.examples, args.seed)
            found[name] = {"examples": args.examples, "seconds": round(time.perf_counter() - start)}
            print(f"{name}: {args.examples:,} examples in {found[name]['seconds']} s, nothing found", flush=True)
    if args.only is None:
        write(RESULT, {"seed": args.seed, "kinds": found} | where())
    return 0


if __name__ == "__main__":
    sys.exit(main())
