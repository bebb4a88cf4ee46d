"""LoRA as one function against PEFT's own forward, and what is left to PEFT."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from nanorlhf.grpo import GRPOConfig
from nanorlhf.policy import lora
from nanorlhf.policy.loading import REFERENCE, speed_up
from nanorlhf.policy.policy import Policy
from tests.models import VOCABULARY, tiny

IDS = torch.arange(20)[None] * 7 % VOCABULARY


def pair(architecture: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    """The same adapted model twice: as PEFT runs it, and fused."""
    usual = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False}
    config = LoraConfig(**usual | options)
    torch.manual_seed(0)
    peft = get_peft_model(tiny(architecture).to(dtype), config).eval()  # type: ignore[arg-type]
    if dtype == torch.float64:
        peft.double()
    fused = copy.deepcopy(peft)
    speed_up(fused)
    return peft, fused


def gradients(model: Any, half: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and what it makes of the adapter."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        logits = model(IDS, use_cache=False).logits[0]
    loss = logits.float().log_softmax(-1).gather(1, IDS[0].roll(-1)[:, None]).sum()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every call that ran as one function."""
    seen: list[str] = []
    plain = lora.plain_adapter

    def noted(layer: Any, dtype: torch.dtype) -> str | None:
        name = plain(layer, dtype)
        seen.extend([name] if name else [])
        return name

    monkeypatch.setattr(lora, "plain_adapter", noted)
    return seen


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("qwen2", {}),
        ("llama", {}),  # with biases
        ("llama", {"use_rslora": True}),
        ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 11}}),
        ("phi3", {"target_modules": ["qkv_proj", "down_proj"]}),
    ],
)
def test_values_and_gradients_are_those_of_peft(architecture: str, options: dict[str, Any], runs: list[str]) -> None:
    peft, fused = pair(architecture, **options)
    expected, wanted = gradients(peft)
    assert not runs
    loss, found = gradients(fused)
    assert len(runs) == sum(type(m).__name__ == "Linear" and hasattr(m, "lora_A") for m in fused.modules()) > 3
    assert abs(loss - expected) < 1e-6 * abs(expected)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert (gradient - wanted[name]).norm() < 1e-5 * wanted[name].norm(), name


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"bias": True}])
def test_one_layer_is_peft_s_to_the_last_digits(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(48, 32, bias=options.pop("bias", False)))
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=False, **options)
    peft = get_peft_model(base, config)  # type: ignore[arg-type]
    fused = copy.deepcopy(peft)
    speed_up(fused)
    x, grad, results = torch.randn(40, 48), torch.randn(40, 32), []
    for model in (peft, fused):
        mine = x.clone().requires_grad_()
        out = model(mine)
        out.backward(grad)
        results.append([out.detach(), mine.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(results[0]) == 4
    for theirs, ours in zip(*results, strict=True):
        assert (ours - theirs).norm() < 1e-6 * theirs.norm()


def test_in_float64_they_are_the_same_numbers() -> None:
    (a, ours), (b, theirs) = (gradients(model) for model in pair(dtype=torch.float64))
    assert abs(a - b) < 1e-11 and all((ours[n] - theirs[n]).abs().max() < 1e-11 for n in ours)


def test_in_bfloat16_they_are_no_further_from_the_truth() -> None:
    exact, (peft, fused) = pair(dtype=torch.float64)[0], pair()
    for model in (peft, fused):
        for name, p in model.named_parameters():
            p.data = p.data if "lora_" in name else p.data.bfloat16()
    exact.load_state_dict({n: p.double() for n, p in peft.state_dict().items()})
    truth = gradients(exact)[1]
    off = {}
    for kind, model in (("peft", peft), ("fused", fused)):
        found = gradients(model, half=True)[1]
        assert all(g.dtype == torch.float32 for g in found.values())
        off[kind] = sum(float((g - truth[n]).norm() / truth[n].norm()) for n, g in found.items()) / len(found)
    assert 0 < off["fused"] < 1.2 * off["peft"] < 0.5


def policy(**options: Any) -> Policy:
    torch.manual_seed(0)
    made = Policy(GRPOConfig(lora_r=4, device="cpu", **options), tiny("llama"))
    made.add_adapter(REFERENCE)
    made.base.set_attn_implementation("eager")  # rows of one sample, told to nobody
    for name, p in made.model.named_parameters():
        if "lora_" in name:
            p.data += 0.1 * torch.randn(p.shape)
    return made


def logits(model: Any) -> Tensor:
    return model(IDS, use_cache=False).logits[0]


def test_switched_off_the_adapter_is_not_there(runs: list[str]) -> None:
    made, base = policy(), tiny("llama")
    base.set_attn_implementation("eager")
    assert isinstance(made.model, PeftModel)
    with torch.no_grad():
        assert not logits(made.model).allclose(logits(base), atol=1e-2)
        runs.clear()
        with made.model.disable_adapter():
            assert logits(made.model).equal(logits(base)) and not runs
        assert not logits(made.model).allclose(logits(base), atol=1e-2)


def test_each_adapter_is_itself_and_learns_alone(runs: list[str]) -> None:
    made = policy()
    own = logits(made.model)
    with made.using(REFERENCE):
        runs.clear()
        other = logits(made.model)
        assert set(runs) == {REFERENCE}
        other.sum().backward()
    learned = {n.split(".")[-2] for n, p in made.model.named_parameters() if p.grad is not None}
    assert learned == {REFERENCE} and not own.allclose(other, atol=1e-2)
    logits(made.model).sum().backward()
    assert {n.split(".")[-2] for n, p in made.model.named_parameters() if p.grad is not None} == {REFERENCE, "default"}


def test_two_adapters_at_once_are_left_to_peft(runs: list[str]) -> None:
    made = policy()
    with torch.no_grad():
        own = logits(made.model)
        made.model.base_model.set_adapter(["default", REFERENCE])  # type: ignore[union-attr, operator]
        runs.clear()
        assert not logits(made.model).allclose(own, atol=1e-2) and not runs


def test_a_copy_runs_with_its_own_weights() -> None:
    made = policy()
    served = made.serving_copy("lora")
    with torch.no_grad():
        before = logits(served)
        for p in made.trainable.values():
            p.zero_()
        assert logits(served).equal(before) and not logits(made.model).equal(before)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")
@pytest.mark.parametrize(
    ("architecture", "options", "fused"),
    [
        ("gpt2", {}, 0),  # Conv1D
        ("llama", {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}, 0),
        ("llama", {"use_dora": True}, 0),
        ("llama", {"bias": "lora_only"}, 2 * 3),  # two layers' MLPs have no bias to learn
    ],
)
def test_what_is_not_plain_is_left_to_peft(
    architecture: str, options: dict[str, Any], fused: int, runs: list[str]
) -> None:
    (a, ours), (b, theirs) = (gradients(model) for model in pair(architecture, **options))
    assert ours.keys() == theirs.keys() and len(runs) == fused
    for name, gradient in {"loss": a, **ours}.items():
        assert torch.allclose(
            gradient, {"loss": b, **theirs}[name], rtol=1e-5 if fused else 0, atol=1e-5 if fused else 0
        )


def test_dropout_is_left_to_peft_while_it_is_on(runs: list[str]) -> None:
    made = policy(lora_dropout=0.5)
    with torch.no_grad():
        assert logits(made.model).equal(logits(made.model)) and runs
        runs.clear()
        with made.training():
            assert not logits(made.model).equal(logits(made.model)) and not runs


def test_a_base_in_another_dtype_than_its_input_is_left_to_peft(runs: list[str]) -> None:
    peft, fused = pair()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert logits(fused).equal(logits(peft)) and not runs


def test_gradients_are_those_of_the_formula() -> None:
    draw = torch.Generator().manual_seed(0)
    x, w, c, a, b = (
        torch.randn(*n, generator=draw, dtype=torch.double) for n in ((3, 5), (4, 5), (4,), (2, 5), (4, 2))
    )
    x, a, b = (t.requires_grad_() for t in (x, a, b))
    for bias in (None, c):
        assert torch.autograd.gradcheck(lambda x, a, b, bias=bias: lora.Adapted.apply(x, w, bias, a, b, 1.5), (x, a, b))
        out = lora.Adapted.apply(x, w, bias, a, b, 1.5)
        assert torch.allclose(out, nn.functional.linear(x, w, bias) + 1.5 * (x @ a.T @ b.T), atol=1e-12)
