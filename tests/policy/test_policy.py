"""The policy: adapter, reference, merged weights, and what is refused."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nanorlhf.config.names import shipped_model
from nanorlhf.config.training import TrainConfig
from nanorlhf.errors import UsageError
from nanorlhf.learning.packing import pack
from nanorlhf.policy.loading import check_model, coverage
from nanorlhf.policy.policy import Policy
from nanorlhf.policy.serialization import restore, save
from nanorlhf.types import MicroBatch
from tests.models import tiny
from tests.samples import rollout, sample


def make(**options: object) -> Policy:
    torch.manual_seed(0)
    return Policy(TrainConfig(model_name_or_path="nanorlhf:adder", device="cpu", **options))  # type: ignore[arg-type]


def disturb(policy: Policy, size: float = 0.02) -> None:
    for p in policy.trainable.values():
        p.data += size * torch.randn(p.shape)


def batch() -> MicroBatch:
    step = rollout([sample(3 + i, 5 + i, seed=i) for i in range(3)])
    keep = torch.ones(3, dtype=torch.bool)
    (row,) = pack(step, keep, torch.zeros(int(step.lengths.sum())), 1000)
    return row


@torch.no_grad()
def test_switching_the_adapter_off_gives_the_start() -> None:
    policy = make()
    start = policy.logprobs(batch())[0]
    policy.keep_reference()
    disturb(policy)
    with policy.reference() as model:
        torch.testing.assert_close(policy.logprobs(batch(), model)[0], start, atol=0, rtol=0)
    assert (policy.logprobs(batch())[0] - start).abs().max() > 0.01


@torch.no_grad()
def test_the_reference_of_a_trained_adapter_is_that_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = make()
    disturb(first)
    save(first, tmp_path)
    config = replace(first.config, max_prompt_length=8, max_completion_length=8)
    options = replace(config, adapter_name_or_path=str(tmp_path), lora_r=99)
    check_model(options, first.base)
    assert f"the adapter keeps its own lora_r {first.lora_rank}\n" in capsys.readouterr().out
    second = make(adapter_name_or_path=str(tmp_path))
    start = second.logprobs(batch())[0]
    torch.testing.assert_close(start, first.logprobs(batch())[0])
    second.keep_reference()
    names = list(second.trainable)
    disturb(second)
    with second.reference() as model:
        torch.testing.assert_close(second.logprobs(batch(), model)[0], start)
    assert list(second.trainable) == names  # the reference never learns
    assert (second.logprobs(batch())[0] - start).abs().max() > 0.01


@torch.no_grad()
def test_full_finetuning_keeps_a_frozen_copy() -> None:
    policy = make(lora="none")
    assert sum(p.numel() for p in policy.trainable.values()) == sum(p.numel() for p in policy.base.parameters())
    start = policy.logprobs(batch())[0]
    policy.keep_reference()
    disturb(policy)
    with policy.reference() as model:
        torch.testing.assert_close(policy.logprobs(batch(), model)[0], start)
    assert (policy.logprobs(batch())[0] - start).abs().max() > 0.01


@pytest.mark.parametrize("rslora", [False, True])
@torch.no_grad()
def test_merged_weights_are_out_of_place_and_right(rslora: bool) -> None:
    policy = make(use_rslora=rslora, lora_alpha=16, lora_r=8)
    base = {n: p.clone() for n, p in policy.base.named_parameters() if "lora_" not in n}
    disturb(policy, 0.1)
    plain = AutoModelForCausalLM.from_pretrained(shipped_model("nanorlhf:adder"), dtype=torch.float32)
    names = dict(plain.named_parameters())
    merged = [dict(policy.merged()) for _ in range(20)][-1]
    assert set(merged) == set(names)
    weight = "model.layers.1.self_attn.q_proj.weight"
    a, b = (p for n, p in policy.trainable.items() if "layers.1.self_attn.q_proj" in n)
    scale = 16 / 8**0.5 if rslora else 16 / 8
    torch.testing.assert_close(merged[weight], names[weight] + scale * b @ a)
    assert all(p.equal(base[n]) for n, p in policy.base.named_parameters() if n in base)


@torch.no_grad()
def test_weights_that_do_not_change_need_not_be_sent_again() -> None:
    policy = make(lora="q_proj,down_proj")
    before = {name: weight.clone() for name, weight in policy.merged()}
    disturb(policy, 0.1)
    after, changed = dict(policy.merged()), dict(policy.merged(everything=False))
    assert before.keys() == after.keys() and changed.keys() < after.keys()
    assert all(weight.equal(after[name]) for name, weight in changed.items())
    assert {name for name in before if not before[name].equal(after[name])} <= changed.keys()
    # Engines make one matrix of queries, keys and values: all of a block or nothing.
    assert "model.layers.0.self_attn.v_proj.weight" in changed and "model.layers.0.mlp.up_proj.weight" in changed
    assert not any("embed" in name or "norm" in name for name in changed)
    assert dict(make(lora="none").merged(everything=False)).keys() == before.keys()


def test_saved_adapters_load_as_they_are(tmp_path: Path) -> None:
    policy = make()
    disturb(policy)
    save(policy, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(shipped_model("nanorlhf:adder"), dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    for (_, mine), (_, theirs) in zip(
        sorted(policy.trainable.items()),
        sorted((n, p) for n, p in loaded.named_parameters() if "lora_" in n),
        strict=True,
    ):
        assert mine.equal(theirs)
    other = make()
    restore(other, tmp_path)
    assert all(a.equal(b) for a, b in zip(policy.trainable.values(), other.trainable.values(), strict=True))


def test_bfloat16_base_under_float32_adapters() -> None:
    policy = make(dtype="bfloat16")
    assert {p.dtype for p in policy.trainable.values()} == {torch.float32}
    assert policy.base.dtype == torch.bfloat16
    logprobs, entropy = policy.logprobs(batch())
    assert logprobs.dtype == entropy.dtype == torch.float32
    exact = make().logprobs(batch())[0]
    assert 0 < (logprobs - exact).abs().mean() < 0.1


@pytest.mark.parametrize("came", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lora", "said"), [("all-linear", "auto"), ("all-linear", "bfloat16"), ("none", "auto")])
def test_a_model_object_gets_the_dtype_that_files_are_read_in(lora: str, said: str, came: torch.dtype) -> None:
    folder, (one, other) = shipped_model("nanorlhf:adder"), (torch.float32, torch.bfloat16)
    given = AutoModelForCausalLM.from_pretrained(folder, dtype=came)
    rotations = [b.clone() for b in given.buffers()]
    config = TrainConfig(model_name_or_path="nanorlhf:adder", device="cpu", lora=lora, dtype=said)  # type: ignore[arg-type]
    policy = Policy(config, given)
    read = Policy(config)
    for (name, mine), (_, theirs) in zip(policy.model.named_parameters(), read.model.named_parameters(), strict=True):
        assert mine.dtype == theirs.dtype == (other if said == "bfloat16" and "lora_" not in name else one), name
        assert "lora_" in name or came == other or mine.equal(theirs), "and nothing was rounded on the way"
    assert policy.compute_dtype == read.compute_dtype
    assert all(a.equal(b) for a, b in zip(rotations, given.buffers(), strict=True))


@pytest.mark.parametrize("came", [torch.float32, torch.bfloat16])
def test_a_model_object_with_an_adapter_learns_in_float32(came: torch.dtype) -> None:
    """The base is that of files; an adapter of 16 bits would lose small updates."""
    model = AutoModelForCausalLM.from_pretrained(shipped_model("nanorlhf:adder"), dtype=came)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]), autocast_adapter_dtype=False)
    policy = Policy(TrainConfig(device="cpu", dtype="bfloat16"), adapted)  # type: ignore[arg-type]
    assert {p.dtype for p in policy.trainable.values()} == {torch.float32}
    assert {p.dtype for n, p in policy.base.named_parameters() if "lora_" not in n} == {torch.bfloat16}
    assert policy.base.lm_head.weight is policy.base.get_input_embeddings().weight, "tied weights stay tied"


def test_a_routers_auxiliary_loss_is_refused_and_not_ignored() -> None:
    few = {"num_local_experts": 4, "num_experts_per_tok": 2}
    for asked in (True, False):
        model = tiny("mixtral", output_router_logits=asked, **few)
        with pytest.raises(UsageError, match="set output_router_logits to false") if asked else nullcontext():
            check_model(TrainConfig(max_prompt_length=8, max_completion_length=8), model)
        with pytest.raises(UsageError, match="router's auxiliary loss") if asked else nullcontext():
            Policy(TrainConfig(device="cpu", lora="q_proj,v_proj"), model)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]), "modules_to_save"),
        (LoraConfig(target_modules=["embed_tokens"]), "embeddings"),
        (LoraConfig(target_modules=["q_proj"], use_dora=True), "DoRA"),
    ],
)
def test_adapters_that_cannot_be_served_are_refused(lora: LoraConfig, said: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(shipped_model("nanorlhf:adder"), dtype=torch.float32)
    lora.task_type = "CAUSAL_LM"
    with pytest.raises(UsageError, match=said):
        Policy(TrainConfig(device="cpu"), get_peft_model(model, copy.copy(lora)))


def test_coverage_in_words() -> None:
    assert "LoRA adapts 21 layers" in coverage(make().model)
    assert "LoRA adapts 3 layers" in coverage(make(lora="q_proj").model)
    assert "all" in coverage(make(lora="none").model)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3"])
def test_what_is_handed_over_has_the_names_of_the_checkpoint(architecture: str, tmp_path: Path) -> None:
    model = tiny(architecture, num_local_experts=4, num_experts_per_tok=2)
    model.save_pretrained(tmp_path)
    checkpoint = load_file(tmp_path / "model.safetensors")
    made = Policy(TrainConfig(device="cpu", lora="none"), model)
    loaded = Policy(TrainConfig(model_name_or_path=str(tmp_path), device="cpu", lora="none"))
    for policy in (made, loaded):
        saved = dict(policy.saved())
        assert saved.keys() == checkpoint.keys()
        assert all(saved[name].equal(tensor) for name, tensor in checkpoint.items())


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "granitemoe"])
def test_lora_leaves_experts_out_and_says_so(architecture: str) -> None:
    few = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    policy = Policy(TrainConfig(device="cpu", lora_r=4), tiny(architecture, **few))
    layers = {".".join(name.split(".")[-5:-3]) for name in policy.trainable}
    assert layers == {f"self_attn.{name}_proj" for name in "qkvo"}
    assert "; experts are left out; " in coverage(policy.model)
    assert any(".experts." in name for name, _ in policy.merged())


def test_lora_on_experts_is_refused() -> None:
    with pytest.raises(UsageError, match="LoRA on experts is not served"):
        Policy(
            TrainConfig(device="cpu"),
            tiny("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
            LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["experts.down_proj"]),
        )
    assert "experts" not in coverage(make().model)


def test_an_adapter_that_was_loaded_to_be_used_learns(tmp_path: Path) -> None:
    first = make(lora_r=4)
    disturb(first)
    save(first, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(shipped_model("nanorlhf:adder"))
    used = Policy(TrainConfig(device="cpu"), PeftModel.from_pretrained(base, tmp_path))
    assert used.trainable.keys() == first.trainable.keys()
    used.keep_reference()
    with torch.no_grad():
        own = used.logprobs(batch())[0]
        with used.reference() as model:
            assert used.logprobs(batch(), model)[0].equal(own), "the reference has the adapter"


def test_model_objects_that_cannot_learn_are_refused() -> None:
    base = AutoModelForCausalLM.from_pretrained(shipped_model("nanorlhf:adder"))
    with pytest.raises(UsageError, match="float16"):
        check_model(TrainConfig(), copy.deepcopy(base).half())
    with pytest.raises(UsageError, match="to be called 'default'"):
        Policy(TrainConfig(device="cpu"), get_peft_model(base, LoraConfig(target_modules=["q_proj"]), "mine"))


def test_no_hub_is_asked_for_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are sent at every step, and saved at some."""
    policy = make()
    assert isinstance(policy.model, PeftModel)
    policy.model.peft_config["default"].base_model_name_or_path = "org/model"
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *_, **__: pytest.fail("asked"))
    assert policy.adapter()[1].keys() == {name.replace(".default", "") for name in policy.trainable}
    save(policy, tmp_path)
