"""Products of matrices by oneDNN, where it is faster, against PyTorch's own."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from nanorlhf.policy import loading, products
from nanorlhf.policy.attention import NAME
from nanorlhf.policy.loading import speed_up
from nanorlhf.policy.logprobs import backbone_hidden
from nanorlhf.policy.products import Linear, missing, prefers_onednn, product, wide_product
from nanorlhf.segments import Segments
from tests.models import VOCABULARY, tiny

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Asks oneDNN, whatever the processor, and for small ones too; the rows of every call."""
    rows: list[int] = []
    monkeypatch.setattr(products, "SMALL", 1)
    monkeypatch.setattr(products, "ROWS", 10)
    for module in (products, loading):
        monkeypatch.setattr(module, "prefers_onednn", lambda: rows.append(0) or True)
    return rows


@needs_onednn
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_the_same(turned: bool, bias: bool, onednn: list[int]) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(50, 70), torch.randn(90, 70).t() if turned else torch.randn(70, 90)
    more = torch.randn(90) if bias else None
    exact = a.double() @ b.double() + (0 if more is None else more)
    found = product(a, b, more)
    assert onednn and found.is_contiguous() and (found - exact).norm() < 1e-6 * exact.norm()
    assert product(a.t().contiguous().t(), b, more).equal(found)


@needs_onednn
def test_other_numbers_of_rows_are_left_to_pytorch_too(onednn: list[int]) -> None:
    a, b = torch.randn(19, 7), torch.randn(7, 3)
    assert product(a, b).equal(a @ b) and not onednn
    assert product(a[:10], b).shape == (10, 3) and len(onednn) == 1


@needs_onednn
@pytest.mark.parametrize("families", [[(6, [3, 2])], [(0, [9, 1, 1])], [(4, [7])]])
def test_a_row_is_rounded_up_and_gives_the_same(families: list[tuple[int, list[int]]], onednn: list[int]) -> None:
    model, segments = tiny("mistral"), Segments.of(families, common=2)
    model.set_attn_implementation(NAME)
    ids = torch.arange(sum(segments.lengths)) % VOCABULARY
    with torch.no_grad():
        assert len(ids) % 10 and backbone_hidden(model, ids[:5], ids[:5], Segments.of([(5, [])])).shape[0] == 5
        rounded = backbone_hidden(model, ids, ids, segments)
        assert onednn
        speed_up(model)
        found = backbone_hidden(model, ids, ids, segments)
        products.ROWS = 1
        exact = backbone_hidden(model, ids, ids, segments)
    assert exact.shape == rounded.shape == found.shape == (len(ids), exact.shape[1])
    assert all((x - exact).norm() < 1e-5 * exact.norm() for x in (rounded, found))
    padded = segments.padded(3)
    assert padded.lengths == [*segments.lengths, 3] and padded.visible == [*segments.visible, 5]
    assert padded.seen is not None and padded.seen[-5:].tolist() == [0, 1, len(ids), len(ids) + 1, len(ids) + 2]
    assert padded.ends[-1] == len(ids) + 3 and padded.seen_ends[-1] == len(padded.seen)
    assert segments.padded(0) is segments


@needs_onednn
@pytest.mark.usefixtures("onednn")
def test_an_empty_row_and_an_empty_sum() -> None:
    assert product(torch.ones(0, 3), torch.ones(3, 2)).shape == (0, 2)
    assert missing(torch.ones(0)) == missing(torch.ones(10)) == missing(torch.ones(5)) == 0
    assert missing(torch.ones(11)) == 9
    assert product(torch.ones(2, 0), torch.ones(0, 3)).equal(torch.zeros(2, 3))


def test_other_numbers_are_left_to_pytorch(onednn: list[int]) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        a, b = torch.randn(5, 7, dtype=dtype), torch.randn(7, 3, dtype=dtype)
        assert product(a, b).equal(a @ b)
    assert not onednn
    assert wide_product(a, b).dtype == torch.float32


def test_few_multiplications_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "prefers_onednn", lambda: pytest.fail("asked"))
    assert product(torch.ones(8, 8), torch.ones(8, 8)).equal(torch.full((8, 8), 8.0))


@needs_onednn
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_gives_the_same_and_learns_the_same(learns: bool, bias: bool, onednn: list[int]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(40, 60, bias).requires_grad_(learns)
    fast = copy.deepcopy(layer)
    speed_up(fast)
    copied = copy.deepcopy(fast)  # as a reference is made
    x, results = torch.randn(2, 30, 40), []
    for each in (layer, fast, copied):
        mine = x.clone().requires_grad_()
        out = each(mine)
        out.square().sum().backward()
        results.append([out.detach(), mine.grad, *(p.grad for p in each.parameters() if learns)])
    assert onednn and len(results[0]) == 2 + learns * (1 + bias)
    for expected, *found in zip(*results, strict=True):
        assert all((ours - expected).norm() < 1e-6 * expected.norm() for ours in found)
    with torch.no_grad():
        copied.weight.zero_()
    assert fast(x).norm() > 0  # each has its own weights


@needs_onednn
@pytest.mark.usefixtures("onednn")
def test_a_linear_layers_gradients_are_its_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "product", lambda a, b, bias=None: a @ b if bias is None else a @ b + bias)
    shapes = ((4, 3), (5, 3), (5,))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(Linear.apply, inputs)


@needs_onednn
def test_under_autocast_a_linear_layer_is_pytorchs(onednn: list[int]) -> None:
    layer = nn.Linear(4, 4)
    speed_up(layer)
    onednn.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(2, 4)).dtype == torch.bfloat16
    assert not onednn


@pytest.mark.parametrize(
    ("vendor", "width", "expected"),
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False)],
)
def test_which_processors(
    vendor: str, width: str, expected: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    about = tmp_path / "cpuinfo"
    about.write_text(f"vendor_id : {vendor}\n")
    monkeypatch.setattr(products, "CPUINFO", about)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: width)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert prefers_onednn.__wrapped__() == expected
