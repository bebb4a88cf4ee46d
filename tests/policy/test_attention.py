"""Packed rows against each model's own eager attention, its own logits, one sample at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from nanorlhf.policy import attention, self_check
from nanorlhf.policy.attention import UnsupportedModelError, one_per_row
from nanorlhf.policy.logprobs import head_of, token_logprobs
from nanorlhf.policy.self_check import row, verify
from tests.models import HYBRID, SERVED, VOCABULARY, WINDOW, Exactly, tiny

LENGTHS = (40, 13, 1, 27)


def samples(seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (n,), generator=draw) for n in LENGTHS]


def whole(batch: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Samples that share nothing."""
    return [(s[:0], s) for s in batch]


def scored(hidden: Tensor, model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Log-probabilities (T,) of every next token in the row."""
    return token_logprobs(hidden, head_of(model), torch.cat(batch).roll(-1), 1.0)[0]


def own(model: PreTrainedModel, batch: list[Tensor]) -> Tensor:
    """The same from the model's own eager attention and logits, sample by sample."""
    model.set_attn_implementation("eager")
    logits = torch.cat([model(s[None], use_cache=False).logits[0] for s in batch])
    model.set_attn_implementation(attention.NAME)
    return logits.log_softmax(-1).gather(1, torch.cat(batch).roll(-1)[:, None])[:, 0]


@pytest.mark.parametrize("architecture", [*SERVED, *HYBRID])
def test_a_packed_row_gives_each_sample_its_own_logprobs(architecture: str) -> None:
    model, batch = tiny(architecture), samples()
    expected = own(model, batch)
    assert expected.std() > 0.3  # there is something to get wrong
    torch.testing.assert_close(scored(row(model, *whole(batch)), model, batch), expected, rtol=0, atol=1e-4)
    assert one_per_row(model) == (architecture in HYBRID)
    verify(model)


def family(prompt: int, *answers: int) -> list[Tensor]:
    """A prompt, and answers to it."""
    draw = torch.Generator().manual_seed(prompt)
    return [torch.randint(VOCABULARY, (n,), generator=draw) for n in (prompt, *answers)]


FAMILIES = [family(14, 9, 1, 30), family(40, 7), family(1, 5, 0, 3)]  # windows end in prompts, answers and between
COMMON = 11  # tokens that may come before all their prompts
BEGUN = [[torch.cat([*family(COMMON), prompt]), *answers] for prompt, *answers in FAMILIES]


def alone(model: PreTrainedModel, families: list[list[Tensor]], common: int) -> Tensor:
    """(T, H) of the families' rows from the model's own eager attention, an answer at a time."""
    model.set_attn_implementation("eager")
    states = []
    for number, (prompt, *answers) in enumerate(families):
        runs = [model.base_model(torch.cat([prompt, a])[None], use_cache=False).last_hidden_state[0] for a in answers]
        states += [run[len(prompt) if i else common * (number > 0) :] for i, run in enumerate(runs)]
    model.set_attn_implementation(attention.NAME)
    return torch.cat(states)


@pytest.mark.parametrize(("families", "common"), [(FAMILIES, 0), (BEGUN, COMMON)], ids=["apart", "begun alike"])
@pytest.mark.parametrize("at_once", [1024, 0])
@pytest.mark.parametrize("architecture", [*SERVED, *HYBRID])
def test_answers_that_share_a_prompt_are_as_if_each_had_its_own(
    architecture: str, at_once: int, families: list[list[Tensor]], common: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "AT_ONCE", at_once)
    model = tiny(architecture).double()
    model.set_attn_implementation(attention.NAME)
    model.set_experts_implementation("eager")  # the other has no kernel for float64
    slopes: list[dict[str, Tensor]] = []
    for run in (lambda model: alone(model, families, common), lambda model: row(model, *families, common=common)):
        draw = torch.Generator().manual_seed(0)
        with Exactly():
            states = run(model)
            (states * torch.randn(states.shape, generator=draw, dtype=states.dtype)).sum().backward()
            torch.testing.assert_close(states, alone(model, families, common), rtol=0, atol=1e-10)
        slopes.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert slopes[0].keys() == slopes[1].keys()
    for name, slope in slopes[0].items():
        torch.testing.assert_close(slopes[1][name], slope, rtol=1e-10, atol=1e-10 * max(1.0, float(slope.abs().max())))


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2", "gpt_oss"])
def test_gradients_are_those_of_eager_under_gradient_checkpointing(architecture: str) -> None:
    model, batch = tiny(architecture).train(), samples()
    draw = torch.randn(sum(LENGTHS), generator=torch.Generator().manual_seed(1))
    (own(model, batch) @ draw).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    (scored(row(model, *whole(batch)), model, batch) @ draw).backward()
    assert expected
    for name, parameter in model.named_parameters():
        if name in expected:
            scale = expected[name].abs().max().item()
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=2e-5 * max(scale, 1.0))


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2"])
def test_nothing_leaks_between_samples(architecture: str) -> None:
    model, batch = tiny(architecture), samples()
    model.set_attn_implementation(attention.NAME)
    with torch.no_grad():
        before = row(model, *whole(batch))
        batch[1] = (batch[1] + 1) % VOCABULARY
        after = row(model, *whole(batch))
    start, end = LENGTHS[0], LENGTHS[0] + LENGTHS[1]
    torch.testing.assert_close(after[:start], before[:start], rtol=0, atol=0)
    torch.testing.assert_close(after[end:], before[end:], rtol=0, atol=0)
    assert not torch.equal(after[start:end], before[start:end])


def test_a_leak_between_siblings_is_found_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(lengths: tuple[int, ...], _: int | None, device: torch.device) -> Tensor:
        """Answers that see those before them."""
        return attention.visible(sum(lengths), sum(lengths), None, device)

    monkeypatch.setattr(attention, "seen_by", leaking)
    with pytest.raises(UnsupportedModelError, match="a sample changes with another one in its row"):
        verify(tiny("qwen3"))


def test_a_lora_model_is_verified_and_left_as_it_was() -> None:
    base = tiny("qwen2")
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()  # type: ignore[arg-type]
    verify(model)
    assert base.config._attn_implementation == attention.NAME  # noqa: SLF001  # there is no public reader
    assert base.config.sliding_window == WINDOW
    assert model.training


def test_windows_wider_than_the_probe_are_verified_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("mistral", sliding_window=128)
    verify(model)
    assert model.config.sliding_window == 128
    plain = attention.visible
    monkeypatch.setattr(attention, "visible", lambda queries, keys, _window, device: plain(queries, keys, None, device))
    with pytest.raises(UnsupportedModelError, match="mistral: packed attention differs"):
        verify(model)


def test_a_head_that_does_something_unknown_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("qwen3")
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    monkeypatch.setattr(head, "forward", lambda x: nn.functional.linear(x, head.weight) * 0.7)
    with pytest.raises(UnsupportedModelError, match="qwen3: its LM head"):
        verify(model)


def test_a_hybrid_is_refused_where_samples_share_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "one_per_row", lambda _: False)
    with pytest.raises(UnsupportedModelError, match="lfm2: a sample changes with another one in its row"):
        verify(tiny("lfm2"))


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("bloom", "bloom: its attention cannot be replaced"),
        ("stablelm", "StableLmAttention does not pass on to attention where the samples of a row end"),
        ("llama4_text", "llama4_text: no backbone"),
    ],
)
def test_architectures_that_are_not_served_are_refused_with_the_reason(architecture: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        verify(tiny(architecture))


@pytest.mark.parametrize("architecture", ["hy_v4", "deepseek_v32"])
def test_attention_that_chooses_its_tokens_is_refused(architecture: str) -> None:
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    index = {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 16, "num_key_value_heads": 4}
    with pytest.raises(UnsupportedModelError, match=f"{architecture}: its layers read the attention mask themselves"):
        verify(tiny(architecture, **latent, **experts, **index))


def test_rotations_that_depend_on_the_longest_sample_have_a_row_to_themselves() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    assert one_per_row(tiny("llama", rope_parameters=rope))


def windowed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor,
    key_ends: Tensor,
    longest: int,
    longest_keys: int,
    **options: Any,
) -> Tensor:
    """Does what the CUDA kernel promises: the last query is at the last key, a window (l, r) reaches l tokens back."""
    (left, right), groups = options["window_size"], query.shape[1] // key.shape[1]
    assert ends.dtype == key_ends.dtype == torch.int32 and right == 0
    assert longest == ends.diff().max() and longest_keys == key_ends.diff().max()
    assert groups == 1 or options["enable_gqa"]
    out = torch.empty_like(query)
    for start, end, first, last in zip(
        *(x for e in (ends.tolist(), key_ends.tolist()) for x in (e, e[1:])), strict=False
    ):
        q = query[start:end].transpose(0, 1)
        k, v = (x[first:last].transpose(0, 1).repeat_interleave(groups, 0) for x in (key, value))
        back = torch.arange(last - first)[-(end - start) :, None] - torch.arange(last - first)
        seen = (back >= 0) & ((back <= left) | (left < 0))
        weights = (q @ k.mT * options["scale"]).masked_fill(~seen, -torch.inf).softmax(-1)
        out[start:end] = (weights @ v).transpose(0, 1)
    return out


@pytest.mark.parametrize(("capability", "fits"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_cards_without_flash_attention_go_segment_by_segment(
    capability: tuple[int, int], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnCuda:
        is_cuda, dtype, shape, device = True, torch.bfloat16, (1, 2, 3, 64), torch.device("cuda", 63)

    attention.has_flash.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert attention.fits_kernel(OnCuda, OnCuda) == fits  # type: ignore[arg-type]
    attention.has_flash.cache_clear()


@pytest.mark.parametrize("gqa", [{"enable_gqa": True}, {}], ids=["shared-heads", "torch-2.11"])
@pytest.mark.parametrize("architecture", ["mistral", "qwen2"])
def test_the_kernel_is_called_as_it_documents(
    architecture: str, gqa: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "GQA", gqa)
    monkeypatch.setattr(attention, "fits_kernel", lambda *_: True)
    monkeypatch.setattr(attention, "varlen_attn", windowed)
    model, batch = tiny(architecture), samples()
    expected = own(model, batch)
    torch.testing.assert_close(scored(row(model, *whole(batch)), model, batch), expected, rtol=0, atol=1e-4)
    for families, common in ((FAMILIES, 0), (BEGUN, COMMON)):
        hidden = row(model, *families, common=common)
        torch.testing.assert_close(hidden, alone(model, families, common), rtol=0, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("architecture", ["mistral", "qwen3", "gemma2"])
def test_cuda_agrees_with_eager(architecture: str) -> None:
    device = torch.device("cuda")
    model, batch = tiny(architecture).to(device), [s.to(device) for s in samples()]  # type: ignore[arg-type]  # transformers wraps `to`
    expected = own(model, batch)
    verify(model)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        verify(model)
        assert (scored(row(model, *whole(batch)), model, batch) - expected).abs().mean() < 0.1
