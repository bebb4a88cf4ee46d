"""The vLLM engine: what it samples, what it says of it, how it is refreshed, and what it leaves as it was."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from nanorlhf import engines
from nanorlhf.config.training import TrainConfig
from nanorlhf.engines import vllm
from nanorlhf.engines.base import Completion, Request, Sampling
from nanorlhf.engines.kv_cache import cpu_cache_bytes
from nanorlhf.engines.launch import check_engine
from nanorlhf.engines.vllm import VLLMEngine, check_version, renames, room_for
from nanorlhf.errors import UsageError
from nanorlhf.policy.merging import block
from nanorlhf.types import WeightSync

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

ADDER = str(Path(engines.__file__).parents[1] / "models" / "adder")
TOKENIZER = AutoTokenizer.from_pretrained(ADDER)
END = TOKENIZER.eos_token_id
STOP = "7"
WARM = Sampling(temperature=0.7, max_new_tokens=24, stop_token_ids=(END,))
HOT = Sampling(temperature=2.0, max_new_tokens=24, stop_token_ids=(END,))  # whatever the weights, no two the same
ENDLESS = Sampling(temperature=0.7, max_new_tokens=24, stop_token_ids=())
Serve = Callable[..., VLLMEngine]


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    """The engine of one kind; asking for another kind ends it, for a process holds one at a time."""
    now: dict[tuple[str, str], VLLMEngine] = {}

    def get(sync: WeightSync, dtype: str = "float32") -> VLLMEngine:
        if (sync, dtype) not in now:
            for key in list(now):
                now.pop(key).close()
            stopping = Sampling(0.7, 24, (END,), stop=(STOP,))
            now[sync, dtype] = VLLMEngine(ADDER, stopping, sync=sync, dtype=dtype, max_model_len=200, lora_rank=12)
        return now[sync, dtype]

    yield get
    for engine in now.values():
        engine.close()


class Policy:
    """A model with an adapter, as an engine sees it."""

    def __init__(self, dtype: torch.dtype = torch.float32, **lora: Any) -> None:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(ADDER, dtype=dtype)
        self.model = PeftModel(base, LoraConfig(**lora))  # adapters are float32, whatever the base is
        self.version = 0

    def adapter(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return self.model.peft_config["default"].to_dict(), get_peft_model_state_dict(self.model)

    @torch.no_grad()
    def merged(self, everything: bool = True) -> Iterator[tuple[str, Tensor]]:
        for name, p in self.model.get_base_model().named_parameters():  # type: ignore[operator]
            if not everything and not block(name).endswith(("self_attn", "mlp")):
                continue
            layer, _, weight = name.partition(".base_layer.")
            delta: Any = 0
            if weight == "weight":
                delta = self.model.get_base_model().get_submodule(layer).get_delta_weight("default").to(p.dtype)  # type: ignore[operator]
            if "lora_" not in name:
                yield name.replace(".base_layer.", "."), p.detach() + delta

    saved = merged  # a checkpoint has the same names

    def serving_copy(self, sync: WeightSync) -> nn.Module:
        return copy.deepcopy(self.model) if sync == "lora" else copy.deepcopy(self.model).merge_and_unload()  # type: ignore[operator]

    def perturb(self, seed: int, size: float = 0.02) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in self.model.parameters():
            if p.requires_grad:
                p.data += size * torch.randn(p.shape, generator=generator)
        self.version += 1


@pytest.fixture(scope="module", params=["lora", "merged"])
def sync(request: pytest.FixtureRequest) -> WeightSync:
    """Both ways to refresh; pytest runs all tests of one before the other's."""
    return request.param


@pytest.fixture(scope="module")
def policy() -> Policy:
    """Its adapter touches part of each of vLLM's fused layers, with a scale of its own."""
    return Policy(r=12, lora_alpha=9, use_rslora=True, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])


def requests(count: int = 12, greedy: bool = False) -> list[Request]:
    """Prompts longer than one block of the cache, so that it can be stale; each comes twice."""
    texts = ["".join(f"{n * i}+{n}=" for n in range(60)) for i in range(1, count + 1)]
    return [Request(i, TOKENIZER.encode(texts[i // 2])[:150], greedy) for i in range(count)]


def by_model(policy: Policy, asked: Sequence[Request], done: Sequence[Completion], temperature: float) -> list[Tensor]:
    """The log-probabilities that transformers gives to the same tokens, computed in float32."""
    model: Any = policy.serving_copy("lora").float()
    prompts, said = {r.id: r.prompt_ids for r in asked}, []
    for c in done:
        with torch.no_grad():
            logits = model(torch.tensor([prompts[c.id] + c.token_ids])).logits[0] / temperature
        rows = torch.log_softmax(logits[len(prompts[c.id]) - 1 : -1], -1)
        said.append(rows.gather(-1, torch.tensor(c.token_ids)[:, None])[:, 0])
    return said


def gap(policy: Policy, asked: Sequence[Request], done: Sequence[Completion], temperature: float) -> float:
    said = torch.cat(by_model(policy, asked, done, temperature))
    return (said - torch.tensor([x for c in done for x in c.logprobs])).abs().max().item()


def write(engine: VLLMEngine, asked: Sequence[Request], seed: int, sampling: Sampling = WARM) -> list[Completion]:
    return sorted(engine.generate(asked, seed, sampling), key=lambda c: c.id)


def test_logprobs_follow_the_policy_through_updates(serve: Serve, policy: Policy, sync: WeightSync) -> None:
    engine = serve(sync)
    for step in range(3):
        policy.perturb(step)
        engine.update(policy)
        assert engine.version == policy.version
        assert gap(policy, requests(), write(engine, requests(), seed=step), WARM.temperature) < 1e-4
    policy.perturb(3)
    assert gap(policy, requests(), write(engine, requests(), seed=3), WARM.temperature) > 1e-2  # the test can tell


def test_a_cache_that_is_kept_would_serve_old_weights(
    serve: Serve, policy: Policy, sync: WeightSync, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = serve(sync)
    engine.update(policy)
    write(engine, requests(), seed=0)
    policy.perturb(4)
    with monkeypatch.context() as planted:
        planted.setattr(engine.engine, "reset_prefix_cache", lambda: True)
        engine.update(policy)
    assert gap(policy, requests(), write(engine, requests(), seed=0), WARM.temperature) > 1e-2
    engine.update(policy)
    assert gap(policy, requests(), write(engine, requests(), seed=0), WARM.temperature) < 1e-4


def test_a_prompt_is_computed_once_for_all_that_begin_with_it(
    serve: Serve, policy: Policy, sync: WeightSync, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, cached = serve(sync), dict[int, int]()
    engine.update(policy)
    plain = vllm.completion

    def counted(output: Any) -> Completion:
        cached[int(output.request_id)] = output.num_cached_tokens
        return plain(output)

    monkeypatch.setattr(vllm, "completion", counted)
    first, second = (requests(i + 1)[i].prompt_ids[:70] for i in (0, 2))  # two blocks of 32, and six
    group = [Request(i, first) for i in range(4)] + [Request(4, first, greedy=True)]
    others = [Request(5 + i, second) for i in range(3)]  # as an evaluation asks for several answers
    done = write(engine, group + others, seed=1)
    assert cached == {0: 0, 5: 0} | dict.fromkeys([1, 2, 3, 4, 6, 7], 64)
    cached.clear()
    turn = first + done[0].token_ids + second[:20]  # the next turn of an episode
    write(engine, [Request(9, turn)], seed=2)
    assert cached[9] == (70 + len(done[0].token_ids) - 1) // 32 * 32
    engine.forget()
    write(engine, [Request(0, first)], seed=1)
    assert cached[0] == 0


def test_updates_never_touch_the_policy(serve: Serve, policy: Policy, sync: WeightSync) -> None:
    engine = serve(sync)
    policy.perturb(5)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    for _ in range(20):
        engine.update(policy)
    for name, p in policy.model.named_parameters():
        assert torch.equal(p, before[name]), name


def test_an_adapter_that_cannot_be_served_is_refused(
    serve: Serve, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tensors = policy.adapter()
    unknown = {name.replace("up_proj", "wide_proj"): t for name, t in tensors.items()}
    engine = serve("lora")
    with monkeypatch.context() as planted:
        planted.setattr(policy, "adapter", lambda: (config, unknown))
        with pytest.raises(UsageError, match=r"layers\.0\.mlp\.wide_proj"):
            engine.update(policy)
    engine.update(policy)


def test_seeds(serve: Serve) -> None:
    engine = serve("lora")
    first, again, other = (write(engine, requests(), seed, HOT) for seed in (1, 1, 2))
    assert first == again
    assert [c.token_ids for c in first] != [c.token_ids for c in other]
    assert len({tuple(c.token_ids) for c in first}) > 6  # the same prompt under another id is another sample
    alone = write(engine, requests()[5:6], 1, HOT)
    assert alone[0].token_ids == first[5].token_ids  # whoever else is in the batch


def test_end_tokens_are_written_and_only_the_named_ones_end(serve: Serve) -> None:
    engine = serve("lora")
    ended, endless = (write(engine, requests(60), 0, sampling) for sampling in (WARM, ENDLESS))
    assert {c.stopped for c in ended} == {True, False}
    for short, long in zip(ended, endless, strict=True):
        assert len(long.token_ids) == len(long.logprobs) == 24 and not long.stopped
        stops = [i for i, token in enumerate(long.token_ids) if token == END]
        kept = stops[0] + 1 if stops else 24
        assert short.stopped == bool(stops)
        assert short.token_ids == long.token_ids[:kept]
        assert short.logprobs == pytest.approx(long.logprobs[:kept], abs=1e-5)


def test_stop_strings_end_at_the_token_that_completes_them(serve: Serve) -> None:
    engine = serve("lora")
    endless = write(engine, requests(30), 0, ENDLESS)
    stopped = write(engine, requests(30), 0, Sampling(0.7, 24, (), stop=(STOP,)))
    assert {c.stopped for c in stopped} == {True, False}
    for short, long in zip(stopped, endless, strict=True):
        texts = [STOP in TOKENIZER.decode(long.token_ids[: n + 1]) for n in range(24)]
        kept = texts.index(True) + 1 if short.stopped else 24
        assert short.stopped == any(texts)
        assert short.token_ids == long.token_ids[:kept] and len(short.logprobs) == kept


def test_greedy_and_sampled_share_a_batch(serve: Serve, policy: Policy) -> None:
    engine = serve("lora")
    engine.update(policy)
    greedy = [Request(100 + r.id, r.prompt_ids, greedy=True) for r in requests(6)]
    done = write(engine, requests(6) + greedy, seed=0)
    assert gap(policy, requests(6), done[:6], WARM.temperature) < 1e-4
    assert gap(policy, greedy, done[6:], 1.0) < 1e-4
    assert [c.token_ids for c in write(engine, greedy, seed=9)] == [c.token_ids for c in done[6:]]
    assert [c.token_ids for c in write(engine, requests(6), 0)] != [c.token_ids for c in done[6:]]


def test_a_caller_who_leaves_early_leaves_nothing_behind(serve: Serve, policy: Policy) -> None:
    engine = serve("lora")
    listening = engine.generate(requests(60), seed=0, sampling=WARM)
    next(listening)
    with pytest.raises(AssertionError, match="still going on"):
        next(engine.generate(requests(1), seed=0))
    with pytest.raises(AssertionError, match="not free"):
        engine.update(policy)
    listening.close()  # type: ignore[attr-defined]
    assert engine.engine.get_num_unfinished_requests() == 0
    engine.update(policy)
    assert gap(policy, requests(), write(engine, requests(), seed=0), WARM.temperature) < 1e-4


def test_16_bit_engine_follows_a_change_of_the_adapter(serve: Serve) -> None:
    policy = Policy(torch.bfloat16, r=12, target_modules="all-linear")
    policy.perturb(0, size=0.03)  # well above what 16 bits round away: a smaller one is lost in the trainer too
    engine = serve("lora", "bfloat16")
    asked, theirs, ours = requests(192)[::2], [], []
    engine.update(policy)
    before = write(engine, asked, 0, ENDLESS)
    said = by_model(policy, asked, before, ENDLESS.temperature)
    policy.perturb(2, size=0.02)
    engine.update(policy)
    after = write(engine, asked, 0, ENDLESS)
    for old, new, x, y in zip(before, after, said, by_model(policy, asked, before, ENDLESS.temperature), strict=True):
        same = next((i for i, (a, b) in enumerate(zip(old.token_ids, new.token_ids, strict=True)) if a != b), 24)
        theirs.append((torch.tensor(new.logprobs) - torch.tensor(old.logprobs))[:same])
        ours.append((y - x)[:same])
    x, y = torch.cat(ours), torch.cat(theirs)
    assert len(x) > 1000
    assert 0.9 < ((x * y).sum() / (x * x).sum()).item() < 1.1


QUIET = """
import gc, os, random, sys, warnings
import numpy as np, torch, transformers
from tests.engines.test_vllm import ADDER, Policy, Request, Sampling, VLLMEngine

def state():
    numbers = hash(random.getstate()), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    threads = torch.get_num_threads(), torch.set_num_threads, torch.get_float32_matmul_precision()
    variables = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    return numbers, threads, variables, warnings.filters[:], sys.excepthook, gc.get_freeze_count()

transformers.utils.logging.disable_progress_bar()
policy = Policy(r=8, target_modules="all-linear")
torch.set_num_threads(2)
before = state()
assert "vllm" not in sys.modules
for sync in ("lora", "merged"):
    engine = VLLMEngine(ADDER, Sampling(1.0, 8, ()), sync=sync, max_model_len=64, lora_rank=8)
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ
    assert gc.get_freeze_count() == before[-1]
    for _ in range(2):
        engine.update(policy)
        assert len(list(engine.generate([Request(i, [1, 2, 3], i == 0) for i in range(4)], seed=0))) == 4
        engine.sleep()
        engine.wake()
    listening = engine.generate([Request(i, [1, 2, 3]) for i in range(4)], seed=0)
    next(listening)
    engine.close()
    engine.close()
    for name, old, new in zip(("numbers", "threads", "variables", "filters", "hook", "frozen"), before, state()):
        assert old == new, (name, old, new)
"""


def test_nothing_is_printed_and_the_process_is_left_as_it_was() -> None:
    root = Path(ADDER).parents[2]
    done = subprocess.run([sys.executable, "-c", QUIET], cwd=root, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_versions_are_checked_before_vllm_is_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    about = AutoConfig.from_pretrained(ADDER)
    check_engine(TrainConfig(engine="vllm"), about)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.25.1")
    with pytest.raises(UsageError, match=r"vllm 0\.25\.1 is installed, and >=0\.26,<0\.34 is supported"):
        check_version()
    for version in ("0.26.0", "0.33.1", "0.34.0rc1"):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, version=version: version)
        check_engine(TrainConfig(engine="vllm"), about)
        assert f"vllm {version} was not tried with this version of nanorlhf (tried: " in capsys.readouterr().out


@dataclass
class OldMapper:
    """A mapper of names as vLLM has it up to 0.28, of which only a later one is installed here."""

    stacked: dict[str, str]
    prefixes: dict[str, str]

    def get_unstacked_mapper(self) -> OldMapper:
        return replace(self, stacked={})


def test_adapters_keep_the_names_of_layers_that_vllm_stacks() -> None:
    from vllm.model_executor.models.utils import WeightsMapper

    stacked: dict[Any, Any] = {".q_proj": (".qkv_proj", "q")}
    new = WeightsMapper(orig_to_new_prefix={"model.": "language_model."}, orig_to_new_stacked=stacked)
    assert renames(new).apply_list(["model.q_proj"]) == ["language_model.q_proj"]
    old = OldMapper({".q_proj": ".qkv_proj"}, {"model.": "language_model."})
    assert renames(old) == OldMapper({}, old.prefixes)
    assert renames(None) is None


def test_sizes() -> None:
    assert [room_for(rank) for rank in (1, 2, 12, 16, 33)] == [1, 8, 16, 16, 64]
    for rank in (0, 513):
        with pytest.raises(UsageError, match=f"lora_rank={rank}"):
            room_for(rank)
    token = 2 * 3 * 2 * 32 * 4  # keys and values, layers, heads, size of each, bytes
    assert cpu_cache_bytes(ADDER, 9_000, 200, "float32", False) == 9_024 * token
    assert cpu_cache_bytes(ADDER, 9_000, 200, "bfloat16", False) == 9_024 * token // 2
    assert cpu_cache_bytes(ADDER, 1, 200, "float32", False) == 2 * 224 * token
    assert cpu_cache_bytes(ADDER, 10**7, 10_000, "float32", False) == 2**30


def test_when_there_is_enough_the_others_come_as_far_as_they_are_and_go_on_later(
    serve: Serve, policy: Policy, sync: WeightSync
) -> None:
    engine = serve(sync)
    engine.update(policy)
    asked, done = [replace(r, max_tokens=2 if r.id < 3 else 24) for r in requests()], list[Completion]()
    engine.pace.clear()
    for completion in engine.generate(asked, 0, ENDLESS, enough=lambda: sum(c.ended for c in done) >= 3):
        done.append(completion)
    cut = [c for c in done if not c.ended]
    assert sorted(c.id for c in done) == list(range(12)) and [c.id for c in done if c.ended] == [0, 1, 2]
    assert all(len(c.token_ids) == len(c.logprobs) == vllm.STEPS and not c.stopped for c in cut)
    assert gap(policy, asked, done, ENDLESS.temperature) < 1e-4
    assert engine.pace.sequences[0] == 12 and sum(engine.pace.sequences) == sum(len(c.token_ids) for c in done)
    assert engine.engine.get_num_unfinished_requests() == 0
    policy.perturb(6)
    engine.update(policy)
    rest = [Request(c.id, asked[c.id].prompt_ids + c.token_ids, max_tokens=24 - len(c.token_ids)) for c in cut]
    others = write(engine, rest, seed=1, sampling=ENDLESS)
    assert gap(policy, rest, others, ENDLESS.temperature) < 1e-4
    assert others == write(engine, rest, seed=1, sampling=ENDLESS)
    assert all(len(c.token_ids) == 24 - vllm.STEPS for c in others)
    nothing = list(engine.generate(asked, 0, ENDLESS, enough=lambda: True))
    assert nothing == [Completion(r.id, [], [], False, ended=False) for r in asked]


def test_a_stop_string_may_lie_across_the_place_where_an_answer_was_cut(serve: Serve, policy: Policy) -> None:
    engine = serve("merged")
    engine.update(policy)
    asked = requests(1)[0]
    (plain,) = write(engine, [replace(asked, greedy=True)], 0, replace(WARM, stop_token_ids=()))
    text = TOKENIZER.decode(plain.token_ids)
    first, cut = plain.token_ids[:4], TOKENIZER.decode(plain.token_ids[:4])
    stop = text[len(cut) - 2 : len(cut) + 2]  # half of it is there already
    stopping = replace(WARM, stop_token_ids=(), stop=(stop,))
    rest = Request(0, asked.prompt_ids + first, greedy=True, max_tokens=20)
    (across,) = write(engine, [replace(rest, begun=first)], 0, stopping)
    assert across.stopped and TOKENIZER.decode(first + across.token_ids).endswith(stop)
    assert len(across.token_ids) <= 2
    (without,) = write(engine, [rest], 0, stopping)
    assert len(without.token_ids) > len(across.token_ids)
