"""Memory plans: the arithmetic against numbers worked out by hand, and against real tensors of small models."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache, Qwen2Config

from nanorlhf.engines import vllm
from nanorlhf.engines.base import Sampling
from nanorlhf.engines.hf import HFEngine
from nanorlhf.engines.launch import build_engine, sync_way
from nanorlhf.errors import UsageError
from nanorlhf.grpo import GRPO, GRPOConfig
from nanorlhf.grpo.__main__ import main as grpo
from nanorlhf.learning.optimizer import Optimizer
from nanorlhf.learning.packing import GATHERED, size
from nanorlhf.memory.activation_sizes import skeleton, through_layers
from nanorlhf.memory.choice import make_plan
from nanorlhf.memory.needs import ModelSize, RewardModelSize, cached_tokens, learners, needs_of
from nanorlhf.memory.plan import BUS, MARGIN, SCATTERED, Needs, Phase, Resident
from nanorlhf.memory.workspace import Line, Workspace
from nanorlhf.policy import attention, recomputation
from nanorlhf.policy.logprobs import backbone_hidden, plain
from nanorlhf.policy.policy import Policy
from nanorlhf.ppo import PPO, PPOConfig
from nanorlhf.segments import Segments
from nanorlhf.sft import SFT, SFTConfig
from nanorlhf.system.device import CONTEXT, GIB
from tests.learning.test_shared_prompts import groups
from tests.models import tiny

LEARNING: frozenset[Phase] = frozenset({"measure", "update"})
LINEAR = ("q", "k", "v", "o", "gate", "up", "down")

QWEN_1_5B: dict[str, Any] = {
    "num_hidden_layers": 28, "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12,
    "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 32768,
}  # fmt: skip
QWEN_3B: dict[str, Any] = {
    "num_hidden_layers": 36, "hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16,
    "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 32768,
}  # fmt: skip
QWEN_7B: dict[str, Any] = {
    "num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False, "max_position_embeddings": 32768,
}  # fmt: skip


def sides(shape: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of a layer's linear parts, heads being 128 wide."""
    h, i, kv = shape["hidden_size"], shape["intermediate_size"], 128 * shape["num_key_value_heads"]
    return dict(zip(LINEAR, [(h, h), (h, kv), (h, kv), (h, h), (h, i), (h, i), (i, h)], strict=True))


def weights(shape: dict[str, Any]) -> int:
    """Parameters: linear parts, biases of q, k and v, two norms a layer; embeddings (once, if tied) and a last norm."""
    h, kv = shape["hidden_size"], 128 * shape["num_key_value_heads"]
    layer = sum(a * b for a, b in sides(shape).values()) + (h + 2 * kv) + 2 * h
    tables = 1 if shape["tie_word_embeddings"] else 2
    return shape["num_hidden_layers"] * layer + tables * shape["vocab_size"] * h + h


def lora(shape: dict[str, Any], r: int) -> int:
    return shape["num_hidden_layers"] * sum(r * (a + b) for a, b in sides(shape).values())


def kept(shape: dict[str, Any], r: int) -> int:
    """Bytes that a layer keeps of a token for backward, in bfloat16 under a float32 adapter.

    Four keys and values are gathered for each token, one of which is its own.
    """
    h, i, kv = shape["hidden_size"], shape["intermediate_size"], 128 * shape["num_key_value_heads"]
    norms = 2 * (4 * h + 4)  # their input in float32, and one over its length
    adapter = 2 * (3 * h + i) + 7 * 2 * r  # inputs (of q, k and v one, of gate and up one) and what A makes of them
    keys = kv if attention.GQA else h  # repeated for every head by torch 2.11
    heads = 2 * (h + GATHERED * (keys + keys) + h) + 4 * shape["num_attention_heads"]  # and log-sums in float32
    mlp = 2 * 2 * i  # gate and up
    return norms + adapter + heads + mlp


@functools.cache
def reasoner(length: int, large: bool = False) -> Needs:
    """GRPO with rank 64 and long answers."""
    config = GRPOConfig(max_completion_length=length, lora_r=64)
    return needs_of(config, Qwen2Config(**(QWEN_7B if large else QWEN_1_5B)), GRPO(config))


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Residents alone: no pass is traced, which takes seconds."""
    monkeypatch.setattr(ModelSize, "workspace", lambda *_, **__: NOTHING)


def rows_of(needs: Needs) -> dict[str, int]:
    return {r.name: r.bytes for r in needs.residents}


@pytest.mark.parametrize(
    ("shape", "count", "length", "cache"),
    [(QWEN_1_5B, 1_543_714_304, 8000, 28_672), (QWEN_7B, 7_615_616_512, 16000, 57_344)],
)
def test_qwen_by_hand(shape: dict[str, Any], count: int, length: int, cache: int) -> None:
    needs = reasoner(length, large=shape is QWEN_7B)
    assert weights(shape) == count
    adapter = 4 * lora(shape, 64)
    assert rows_of(needs) == {
        "policy": 2 * count,
        "adapter": adapter,
        "gradients": adapter,
        "optimizer": 2 * adapter,
        "engine": 2 * count + adapter // 2,
        "engine's graphs": GIB,
    }
    assert cache == 2 * 28 * shape["num_key_value_heads"] * 128 * 2
    assert needs.sequence == cache * (length + 512 + 16)  # and a block that vLLM keeps to itself
    # What is not in a layer: the output, the last norm's input but not the first's, rotations, token ids.
    outer = 2 * shape["hidden_size"] + 2 * 2 * 128 + 8
    assert needs.plain.kept.per_token == pytest.approx(28 * kept(shape, 64) + outer, rel=1e-5)
    assert needs.plain.kept.fixed == pytest.approx(adapter / 2, rel=0.01)  # autocast keeps the adapter in 16 bits too
    last = 4 * shape["hidden_size"] + 4
    assert needs.recomputed.kept.per_token == pytest.approx(28 * 2 * shape["hidden_size"] + outer + last, rel=1e-5)
    assert needs.parked.kept.per_token == pytest.approx(2 * 2 * shape["hidden_size"] + outer + last, rel=1e-5)
    assert needs.inputs(1000) == 1000 * 28 * 2 * shape["hidden_size"] and needs.parks_from == 0.05
    # Recomputing brings one layer back, and no more than twice what it keeps is there while it is passed backwards.
    layer = needs.recomputed.body.per_token - needs.recomputed.kept.per_token
    assert kept(shape, 64) < layer < 2 * kept(shape, 64)


def test_heads_that_share_keys_are_counted_as_the_card_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def per_token(dtype: Any, gqa: dict[str, bool]) -> float:
        monkeypatch.setattr(attention, "GQA", gqa)
        config = GRPOConfig(max_completion_length=1000, lora_r=64, dtype=dtype)
        return ModelSize.of(config, Qwen2Config(**QWEN_1_5B)).workspace((1512, [0]), grad=True).kept.per_token

    new, old = {"enable_gqa": True}, dict[str, bool]()  # torch 2.11's kernel has no such argument
    repeated = 2 * (12 - 2) * 128 * 2  # keys and values for ten more heads
    assert per_token("auto", old) - per_token("auto", new) == pytest.approx(28 * repeated, rel=1e-9)
    assert per_token("float32", new) == per_token("float32", old)  # no kernel takes these, and SDPA has them repeated


def test_a_reasoner_of_1_5b_fits_a_card_of_40_gib() -> None:
    plan = make_plan(reasoner(8000), 40 * GIB)
    # Kept activations of 8,512 tokens: 8,512 x 3.1 MB = 24.6 GiB, and a tenth: they fit if the engine leaves.
    assert plan.moved == {"engine"} and not plan.recompute
    assert 8512 <= plan.tokens < 16384
    # 40 - CUDA 1 - kept back 1.5 - graphs 1 - engine 3.01 - policy 2.88 - adapter .28 - moments .55 - sampling .72
    assert plan.sequences == int(29.06 * GIB / (28_672 * 8512)) == 127
    assert plan.seconds == pytest.approx(2 * rows_of(plan.needs)["engine"] / BUS)
    assert all(plan.total(phase) <= 40 * GIB for phase in ("generate", "score", "measure", "update"))


@pytest.mark.parametrize(("recipe", "shape", "card"), [("countdown", QWEN_3B, 40), ("gsm8k", QWEN_1_5B, 22)])
def test_shipped_recipes_have_rows_that_are_worth_a_card(recipe: str, shape: dict[str, Any], card: int) -> None:
    config = GRPOConfig(**yaml.safe_load(Path(f"grpo/recipes/{recipe}.yaml").read_text()))
    needs = needs_of(config, Qwen2Config(**shape), GRPO(config))
    # CUDA 1, kept back 1.5, graphs 1; policy, adapter, its gradients and moments; and a tenth is lost.
    room = (card - 3.5) * GIB - 2 * weights(shape) - 16 * lora(shape, 32)
    layer = kept(shape, 32)
    plan = make_plan(needs, card * GIB)
    assert plan.moved == {"engine"} and not plan.recompute and plan.sequences == 256
    assert plan.tokens == pytest.approx(room / 1.1 / (shape["num_hidden_layers"] * layer), rel=0.05)
    still = make_plan(needs, card * GIB, "never")
    room -= rows_of(needs)["engine"] + 256 * needs.sequence
    assert still.tokens == pytest.approx(room / 1.1 / (shape["num_hidden_layers"] * layer), rel=0.05)
    assert plan.words()[-1] == (
        f"if nothing moved, rows of {still.tokens:,} tokens would be too short to fill the card, so the engine moves"
    )


def test_seven_billion_at_16000_alternate_on_40_gib() -> None:
    needs = reasoner(16000, large=True)
    plan = make_plan(needs, 40 * GIB)
    assert plan.moved == {"engine", "optimizer", "policy"} and plan.tokens == 16512  # one of the longest
    # 40 - CUDA 1 - kept back 1.5 - graphs 1 - policy 14.19 - adapter, gradients and moments 2.4 = 19.9 GiB
    assert plan.recompute == 23
    taken = [needs.workspace("update", 16512, again, 40 * GIB) for again in (23, 22)]
    assert taken[0] <= 19.9 * GIB < taken[1]
    assert taken[1] - taken[0] == pytest.approx(1.1 * kept(QWEN_7B, 64) * 16512, rel=0.01)  # one layer more
    # 40 - CUDA 1 - kept back 1.5 - graphs 1 - engine 14.49 - prefill 1.09 = 20.9 GiB for sequences of .88 GiB
    assert plan.sequences == int(20.9 * GIB / (57_344 * 16512)) == 23
    policy, adapter, moments = (rows_of(needs)[name] for name in ("policy", "adapter", "optimizer"))
    # The frozen base is copied in, never out; the adapter, its moments and the engine both ways.
    copied = 2 * rows_of(needs)["engine"] + policy + 2 * adapter + 2 * moments
    assert plan.seconds == pytest.approx(copied / BUS)
    with pytest.raises(UsageError, match=r"GiB more than the card has; try: .*offload auto"):
        make_plan(needs, 36 * GIB, "never")


@pytest.mark.usefixtures("untraced")
def test_ppo_has_a_second_adapter_a_head_and_moments_of_both() -> None:
    config = PPOConfig(max_completion_length=1000, lora_r=32)
    rows = rows_of(
        needs_of(
            config,
            Qwen2Config(**QWEN_1_5B),
            PPO(config),
            judges=[RewardModelSize(2 * GIB, GIB), RewardModelSize(3 * GIB, 2 * GIB)],
        )
    )
    adapter, head = 4 * lora(QWEN_1_5B, 32), 4 * 1537
    assert rows["critic"] == rows["gradients"] == adapter + head  # one after the other has gradients
    assert rows["optimizer"] == 2 * (2 * adapter + head)
    assert rows["reward model"] == 5 * GIB and "reference" not in rows  # which is the adapter switched off


@pytest.mark.usefixtures("untraced")
def test_full_finetuning_holds_masters_gradients_moments_and_a_reference() -> None:
    config = GRPOConfig(max_completion_length=1000, lora="none", kl_coef=0.01)
    rows = rows_of(needs_of(config, Qwen2Config(**QWEN_1_5B), GRPO(config)))
    count = weights(QWEN_1_5B)
    assert rows["policy"] == rows["gradients"] == rows["reference"] == 4 * count
    assert rows["optimizer"] == 8 * count and rows["engine"] == 2 * count


FLAT = Workspace(Line(0, 1000), Line(0, 0), Line(0, 0))
NOTHING = Workspace(Line(0, 0), Line(0, 0), Line(0, 0))


def a_need(**changes: Any) -> Needs:
    """An engine of 4 GiB, a policy of 3, an optimizer of 2, gradients of 1; 1,000 tokens take 1 MB or none."""
    residents = (
        Resident("engine", 4 * GIB, frozenset({"generate"}), "engine", kept=True),
        Resident("policy", 3 * GIB, LEARNING, "policy"),
        Resident("gradients", GIB, frozenset({"update"}), passing=True),
        Resident("optimizer", 2 * GIB, frozenset({"update"}), "optimizer"),
    )
    needs = Needs(
        residents, 1000, FLAT, NOTHING, NOTHING, Line(0, 0), math.inf, NOTHING, sequence=GIB // 8, requests=128
    )
    return replace(needs, **changes)


def beside(gib: float) -> int:
    """A card that has so much beside what is kept back."""
    return round(gib * GIB) + MARGIN


def test_where_everything_fits_nothing_moves() -> None:
    # 1 CUDA + 4 + 3 + 2 + 1 gradients + a row = 11 GiB, and 64 sequences of 1/8 GiB are enough: 19.01
    plan = make_plan(a_need(), beside(20))
    assert not plan.moved and plan.seconds == 0 and plan.sequences == 71
    assert all(plan.on_card(p) == {"engine", "policy", "optimizer"} for p in ("generate", "score", "measure", "update"))


@pytest.mark.parametrize(
    ("card", "moved", "sequences"),
    [
        (18, {"engine"}, 64),  # 18 - 1 - 4 - 3 - 2 = 8 GiB while it generates
        (17, {"engine", "optimizer"}, 72),  # 17 - 1 - 4 - 3 = 9
        (13, {"engine", "optimizer", "policy"}, 64),  # 13 - 1 - 4 = 8
        (8, {"engine", "optimizer", "policy"}, 24),  # fewer than are wanted: 8 - 1 - 4 = 3
    ],
)
def test_only_so_much_moves_as_must(card: int, moved: set[str], sequences: int) -> None:
    plan = make_plan(a_need(), beside(card))
    assert plan.moved == moved and plan.sequences == sequences


def test_each_phase_has_whom_it_needs() -> None:
    plan = make_plan(a_need(), beside(8))
    assert plan.on_card("generate") == plan.on_card("score") == {"engine"}  # no reward needs the card
    assert plan.on_card("measure") == {"policy"} and plan.on_card("update") == {"policy", "optimizer"}
    # engine 4 in; policy 3 and optimizer 2, in and out: 14 GiB
    assert plan.seconds == pytest.approx(14 * GIB / BUS) and plan.main_memory == 9 * GIB
    sizes = a_need().residents
    rounded = tuple(replace(r, waiting=8 * GIB) if r.unit == "engine" else r for r in sizes)
    assert make_plan(a_need(residents=rounded), beside(8)).main_memory == 13 * GIB


def test_a_reward_model_comes_for_the_scoring_alone() -> None:
    judge = Resident("reward model", 5 * GIB, frozenset({"score"}), "reward model", kept=True)
    plan = make_plan(a_need(residents=(*a_need().residents, judge)), beside(8))
    assert [p for p in ("generate", "score", "measure", "update") if "reward model" in plan.on_card(p)] == ["score"]


def test_always_and_never() -> None:
    assert make_plan(a_need(), beside(80), "always").moved == {"engine", "optimizer", "policy"}
    assert not make_plan(a_need(), beside(13), "never").moved
    with pytest.raises(UsageError, match=r"the update phase needs 12\.6 GiB .*, 1\.1 GiB more .*offload auto"):
        make_plan(a_need(), beside(10), "never")
    with pytest.raises(UsageError, match=r"the update phase needs 8\.5 GiB .* 1,000 tokens, 2\.0 GiB more.*lora_r"):
        make_plan(a_need(advice=("lora_r below 8",)), beside(5), recompute=False)


def test_activations_are_recomputed_only_where_they_do_not_fit() -> None:
    heavy = Workspace(Line(0, GIB / 1000), Line(0, 0), Line(0, 0))  # 1 GiB for a row of 1,000
    assert not make_plan(a_need(plain=heavy), beside(8.2)).recompute  # 1 + 3 + 2 + 1 + 1.1
    assert make_plan(a_need(plain=heavy), beside(8)).recompute
    with pytest.raises(UsageError, match="gradient_checkpointing auto"):
        make_plan(a_need(plain=heavy), beside(8), recompute=False)


def test_layer_inputs_wait_in_main_memory_where_they_would_take_too_much() -> None:
    held, parked = (Workspace(Line(0, gib * GIB / 1000), Line(0, 0), Line(0, 0)) for gib in (3, 1))
    needs = a_need(recomputed=held, parked=parked, inputs=Line(0, 2 * GIB / 1000), parks_from=0.1)
    assert needs.learning(1000, 1, 20 * GIB) == GIB  # if the inputs are a tenth of the card
    assert needs.learning(999, 1, 20 * GIB) == held(999) and needs.learning(2000, 0, 20 * GIB) == FLAT(2000)
    # 1 + 3 + 2 + 1 and 1.1 for a row of 1,000, while one of 500 would have to hold what it keeps
    assert make_plan(needs, beside(8.2), recompute=True).tokens == 1090
    with pytest.raises(UsageError, match=r"2\.1 GiB more"):
        make_plan(replace(needs, parks_from=math.inf), beside(8.2), recompute=True)


def of_a_thousand(body: float, kept: float) -> Workspace:
    """GiB for a row of 1,000 tokens."""
    return Workspace(Line(0, body * GIB / 1000), Line(0, kept * GIB / 1000), Line(0, 0))


def test_some_layers_are_recomputed_and_the_others_keep_what_they_made() -> None:
    needs = a_need(
        plain=of_a_thousand(9, 8), recomputed=of_a_thousand(3, 2), parked=of_a_thousand(1, 0.5), layers=4,
        inputs=Line(0, 2 * GIB / 1000), parks_from=0.1,
    )  # fmt: skip
    # A layer keeps (8 - 2) / 4 GiB and its input of 1/2; backward takes one more than what is kept when it begins.
    taken = [needs.learning(1000, again, 20 * GIB) / GIB for again in range(5)]
    assert taken == [9, 7.5, 6, 4.5, 1]  # inputs of all four are 2 GiB, which leave; those of three stay
    assert needs.learning(1000, 3, 10 * GIB) == 3.5 * GIB  # 1.5 GiB of inputs leave a smaller card, but for two
    # With little kept it is the recomputed layers, at the end, that take most: 3 GiB less the inputs of two.
    small = replace(needs, plain=of_a_thousand(2.25, 2), parks_from=math.inf)
    assert small.learning(1000, 2, 20 * GIB) == 2.25 * GIB and small.learning(1000, 3, 20 * GIB) == 2.5 * GIB


@pytest.mark.parametrize("lora", ["all-linear", "none"])
def test_what_partly_recomputed_models_take_is_what_is_traced(lora: str) -> None:
    shape: dict[str, Any] = QWEN_1_5B | {
        "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 2, "num_key_value_heads": 2,
        "num_hidden_layers": 6, "vocab_size": 64,
    }  # fmt: skip
    about = Qwen2Config(**shape)
    config = GRPOConfig(max_completion_length=2000, lora=lora, activation_offload="off")
    needs = needs_of(config, about, GRPO(config))
    layers = {name: replace(getattr(needs, name), head=Line(0, 0)) for name in ("plain", "recomputed")}
    needs = replace(needs, **layers)
    for again in range(7):
        model = skeleton(config, about).eval()
        with FakeTensorMode():
            plain(model).set_attn_implementation(attention.NAME)
            recomputation.recompute(plain(model), "off", torch.device("cpu"), again)
            peak, _ = through_layers(model, Segments.of([(needs.longest - 3, [1, 1, 1])]), grad=True, half=True)
        assert needs.learning(needs.longest, again, 40 * GIB) == pytest.approx(peak, rel=0.02), again


@pytest.mark.parametrize(("heads", "least"), [(12, 0.6), (2, 0.4)])  # of the plan, which does not know them
def test_rows_whose_answers_gather_many_keys_stay_within_the_plan(heads: int, least: float) -> None:
    shape: dict[str, Any] = QWEN_1_5B | {"num_hidden_layers": 4, "vocab_size": 64, "num_key_value_heads": heads}
    about = Qwen2Config(**shape)
    config = GRPOConfig(max_completion_length=2000, gradient_checkpointing=False)
    needs = needs_of(config, about, GRPO(config))
    needs = replace(needs, plain=replace(needs.plain, head=Line(0, 0)))
    for prompt, answers in ((600, [20] * 40), (2000, [5] * 16), (300, [200] * 8)):
        tokens = size(groups((prompt, answers)), range(len(answers)))
        assert tokens > 1.1 * (prompt + sum(answers)) or answers[0] == 200  # what is gathered counts
        model = skeleton(config, about).eval()
        with FakeTensorMode():
            plain(model).set_attn_implementation(attention.NAME)
            peak, _ = through_layers(model, Segments.of([(prompt, answers)]), grad=True, half=True)
        assert least * needs.plain(tokens) < peak <= 1.01 * needs.plain(tokens), (prompt, peak)


def test_the_engine_moves_where_rows_would_be_short() -> None:
    heavy = Workspace(Line(0, 2**20), Line(0, 0), Line(0, 0))  # 1 MiB a token, and a tenth
    # 24 - 1 - 4 - 3 - 2 - 1 = 13 GiB for a row of 1,000 and 95 completions; 1,047 tokens then. Without the engine 17.
    plan = make_plan(a_need(plain=heavy), beside(24))
    assert plan.moved == {"engine"} and plan.tokens == int(17 * 1024 / 1.1) == 15825
    assert plan.words()[-1] == (
        "if nothing moved, rows of 1,047 tokens would be too short to fill the card, so the engine moves"
    )
    # What is not long even then is as long as it gets, and nobody moves for whom it would be no longer.
    short = make_plan(a_need(plain=heavy, sequence=GIB // 64, requests=64), beside(13.5))
    assert short.moved == {"engine"} and short.tokens == int(6.5 * 1024 / 1.1) == 6050
    learners = tuple(r for r in a_need().residents if r.unit != "engine")
    alone = make_plan(a_need(plain=heavy, residents=learners, sequence=0, requests=0), beside(9.5))
    assert not alone.moved and alone.tokens == int(2.5 * 1024 / 1.1) and not alone.reasons
    assert not make_plan(a_need(plain=heavy), beside(24), token_budget=1000).moved  # rows that somebody wants so
    assert not make_plan(a_need(plain=heavy), beside(24), "never").moved


def test_no_more_layers_are_recomputed_than_must_be() -> None:
    needs = a_need(
        plain=Workspace(Line(0, 2**21), Line(0, 2**21), Line(0, 0)), layers=4,
        recomputed=Workspace(Line(0, 2**16), Line(0, 2**16), Line(0, 0)),
    )  # fmt: skip
    # 8 - 1 - 3 - 2 - 1 = 1 GiB. A layer that keeps all has 1/2 MiB a token, less 1/64: two take 1.1 GiB for 1,000.
    said = make_plan(needs, beside(8), token_budget=1000)
    assert said.recompute == 3 and said.share == Fraction(3, 4)
    assert "1,000 tokens, with gradient checkpointing of 3 of 4 layers" in said.table()
    assert said.words()[-1] == "if no layer were recomputed, the update phase would lack 1.1 GiB, so 3 of 4 are"
    # Rows of 8,192 come first, and only four leave room for them.
    assert make_plan(needs, beside(8)).recompute == 4 and make_plan(needs, beside(8)).tokens == 14894
    assert make_plan(needs, beside(8), recompute=True, token_budget=1000).recompute == 4  # as somebody said
    longer = make_plan(replace(needs, longest=8000), beside(11.9))
    assert (longer.recompute, longer.tokens) == (3, int(4.9 * 1024 / 1.1 / (1 / 16 + 31 / 64)))


def test_micro_batches_take_what_is_left() -> None:
    heavy = Workspace(Line(0, GIB / 1000), Line(0, 0), Line(0, 0))
    room = 12 * GIB - CONTEXT - (3 + 2 + 1) * GIB
    plan = make_plan(a_need(plain=heavy), beside(12), recompute=False)
    assert plan.tokens == int(room / (1 + SCATTERED) / (GIB / 1000))
    assert plan.total("update") == pytest.approx(beside(12), rel=0.001)
    assert make_plan(a_need(plain=heavy), beside(12), recompute=False, token_budget=2000).tokens == 2000
    with pytest.raises(UsageError, match="token_budget auto"):
        make_plan(a_need(plain=heavy), beside(12), recompute=False, token_budget=9000)


@pytest.mark.usefixtures("untraced")
def test_the_real_bytes_of_a_small_models_weights_moments_and_cache() -> None:
    model = tiny("qwen3", num_hidden_layers=3)
    cache = DynamicCache()
    model(torch.zeros(1, 48 + 16, dtype=torch.long), past_key_values=cache, use_cache=True)  # vLLM keeps a block
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))  # type: ignore[union-attr]
    config = PPOConfig(device="cpu", dtype="float32", lora_r=4, max_prompt_length=10, max_completion_length=38)
    policy = Policy(config, model)
    body = ModelSize.of(config, model.config)
    assert body.base == sum(p.nbytes for p in policy.model.parameters() if not p.requires_grad)
    assert body.trained == sum(p.nbytes for p in policy.trainable.values())
    optimizer = Optimizer(config, policy.trainable.values(), 1e-3, policy.device)
    for p in policy.trainable.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    real = sum(t.nbytes for state in optimizer.adam.state.values() for name, t in state.items() if name != "step")
    planned = {r.name: r.bytes for r in learners(body, None, GRPO(GRPOConfig()))}
    assert planned["optimizer"] == pytest.approx(2 * body.trained + 2 * (body.trained + 4 * 33))  # PPO's critic too
    assert real == 2 * body.trained
    assert needs_of(config, model.config, PPO(config)).sequence == held


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize(
    "options",
    [
        {"lora": "none"},  # float32 masters, here as on CUDA
        {"lora": "none", "dtype": "bfloat16"},
        {"dtype": "bfloat16", "lora_r": 4},
        {"dtype": "float32", "lora_r": 4},
        {"dtype": "float32", "lora_r": 4, "weight_sync": "lora"},
    ],
)
def test_the_real_bytes_of_the_transformers_engines_copy_and_cache(options: dict[str, Any]) -> None:
    config = GRPOConfig(device="cpu", engine="hf", max_prompt_length=10, max_completion_length=38, **options)
    policy = Policy(config, tiny("qwen3", num_hidden_layers=3))
    if policy.has_adapter:
        policy.add_adapter("critic")  # which nobody is served
    copy = HFEngine(policy, None, Sampling(1.0, 8, (0,)), sync_way(config, policy)).model  # type: ignore[arg-type]
    needs = needs_of(config, policy.base.config, GRPO(config), engine="hf")
    assert rows_of(needs)["engine"] == sum(p.nbytes for p in copy.parameters())
    cache = DynamicCache()
    copy(torch.zeros(1, 48, dtype=torch.long), past_key_values=cache, use_cache=True)
    assert needs.sequence == sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))  # type: ignore[union-attr]


def test_the_transformers_engine_decodes_as_many_rows_as_are_planned() -> None:
    config = GRPOConfig(model_name_or_path="nanorlhf:adder", device="cpu", engine="hf")
    policy, sampling = Policy(config), Sampling(1.0, 8, (0,))
    plan = make_plan(a_need(), beside(8))
    assert plan.sequences == 24
    for given, rows in ((plan.engine_cache, 24), (None, 256)):
        engine: Any = build_engine(config, policy, None, sampling, Path(), given)  # type: ignore[arg-type]
        assert engine.batch == rows


def test_vllm_decodes_as_many_sequences_at_once_as_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    config = GRPOConfig(model_name_or_path="nanorlhf:adder", device="cpu", engine="vllm")
    asked: list[Any] = []
    monkeypatch.setattr(vllm, "VLLMEngine", lambda *args, **options: asked.append(options.get("max_num_seqs")))
    plan = make_plan(a_need(), beside(8))
    assert (plan.sequences, plan.needs.requests) == (24, 128)
    for given, part in ((plan.engine_cache, 1.0), (plan.engine_cache, 0.5), (None, 1.0)):
        build_engine(config, Policy(config), None, Sampling(1.0, 8, (0,)), Path(), given, part)  # type: ignore[arg-type]
    assert asked == [4 * 24, 4 * 12, None], "most are shorter than the longest"
    assert make_plan(a_need(), beside(40)).engine_cache.at_once == 128


def test_a_cpus_cache_holds_a_prompt_once_for_its_answers() -> None:
    config = GRPOConfig(prompts_per_step=8, num_generations=8, max_prompt_length=90, max_completion_length=9)
    assert cached_tokens(config, GRPO(config)) == 8 * 96 + 64 * (32 + 32)
    config = replace(config, dataset_test_split="test", eval_prompts=60)
    assert cached_tokens(config, GRPO(config)) == 60 * (96 + 32 + 32)
    held_out = SFTConfig(eval_prompts=60, max_prompt_length=90, max_completion_length=9)  # given in Python, not named
    assert cached_tokens(held_out, SFT(held_out)) == 60 * (96 + 32 + 32)


@pytest.mark.usefixtures("untraced")
def test_a_plan_knows_how_many_sequences_decode_at_once() -> None:
    about = tiny("qwen3", vocab_size=200_000).config

    def needed(**options: Any) -> Needs:
        config = GRPOConfig(device="cpu", num_generations=8, **options)
        return needs_of(config, about, GRPO(config))

    few, many = needed(prompts_per_step=4), needed(prompts_per_step=20)
    assert (few.requests, many.requests, needed(prompts_per_step=400).requests) == (32, 160, 256)
    assert needed(prompts_per_step=4, partial_rollouts=0.4).requests == 80, "ten prompts in flight"
    assert needed(prompts_per_step=4, dataset_test_split="test", eval_prompts=100).requests == 100
    assert (few.decoding, many.decoding) == (5 * 32 * 200_000 * 4, 5 * 160 * 200_000 * 4), "logits of as many"


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama", "phi3", "gemma2", "cohere"])
def test_what_a_pass_keeps_is_what_autograd_saves(architecture: str, recompute: bool) -> None:
    config = GRPOConfig(device="cpu", dtype="float32", lora_r=4, gradient_checkpointing=recompute)
    model = tiny(architecture, num_hidden_layers=4, layer_types=["full_attention"] * 4)
    about = model.config
    policy = Policy(config, model)
    policy.model.train()
    weights = {p.untyped_storage().data_ptr() for p in policy.tensors()}
    saved: dict[int, int] = {}
    alive = []  # so that no two share an address

    def note(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        alive.append(storage)
        return t

    length = 128  # a multiple of 64, so that no row is rounded up
    ids, segments = torch.arange(length) % 64, Segments.of([(length, [0])])
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = backbone_hidden(policy.model, ids, torch.arange(length), segments)
    out_bytes = 0 if out.untyped_storage().data_ptr() in saved else out.nbytes
    workspace = ModelSize.of(config, about).workspace((length, [0]), grad=True, recompute=recompute)
    assert workspace.kept(length) == pytest.approx(sum(saved.values()) + out_bytes, rel=0.1)


@pytest.mark.parametrize(("recipe", "shape"), [("r1_zero", QWEN_1_5B), ("qwen7b_16k", QWEN_7B)])
def test_the_tables_that_are_shown_are_those_that_are_printed(
    recipe: str,
    shape: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(attention, "GQA", {"enable_gqa": True})
    Qwen2Config(**shape).save_pretrained(tmp_path)
    line = ["--recipe", recipe, "--plan", "--gpu_memory_gib", "40", "--model_name_or_path", str(tmp_path)]
    assert grpo(line) == 0
    printed = capsys.readouterr().out.strip()
    assert f"```text\n{printed}\n```" in Path("docs/memory.md").read_text()
    assert indent(printed, "#   ") in Path(f"grpo/recipes/{recipe}.yaml").read_text()


def test_the_table_is_printed_for_any_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape: dict[str, Any] = QWEN_1_5B | {"num_hidden_layers": 3}
    Qwen2Config(**shape).save_pretrained(tmp_path)
    line = ["--model_name_or_path", str(tmp_path), "--max_completion_length", "8000", "--plan"]
    assert grpo([*line, "--gpu_memory_gib", "24"]) == 0
    shown = capsys.readouterr().out
    assert [word in shown for word in ("generate", "KV cache", "optimizer", "in all")] == [True] * 4
    assert "card: 24.00 GiB; nothing is moved" in shown and "micro-batches: 16,384 tokens" in shown
    assert grpo([*line, "--gpu_memory_gib", "3"]) == 2
    assert "more than the card has; try: shorten max_completion_length" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert grpo(line) == 2
        assert "say how large it is" in capsys.readouterr().err
