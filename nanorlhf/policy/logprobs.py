"""Log-probabilities and entropies of chosen tokens, walking the LM head in chunks: no (N, V) logits, ever."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from nanorlhf.policy.products import ROWS, missing, wide_product
from nanorlhf.segments import Segments
from nanorlhf.system import gpu_memory

CHUNK = 1 << 24  # logits worked on at a time, rows x V, if memory is short: 64 MiB
CPU_CHUNK = 1 << 22  # there 16 MiB measured fastest
CUDA_CHUNK = 1 << 28  # at most: 1 GiB is some 1,800 rows of a large vocabulary, and reading the head costs little then
HELD = 16  # bytes that each of these logits takes while it is worked on: a few float32, and 16-bit copies


@dataclass(frozen=True, slots=True)
class Head:
    """The map from a model's hidden states to logits: cap(scale * (hidden @ weight.T + bias))."""

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None  # cap(x) = softcap * tanh(x / softcap)

    @property
    def trainable(self) -> bool:
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)


def plain(model: nn.Module) -> Any:
    """The transformers model itself, whether or not PEFT wraps it."""
    unwrap = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def head_of(model: nn.Module) -> Head:
    """The LM head (or a classifier's), with the scaling and capping its config asks for."""
    base = plain(model)
    layer, config = base.get_output_embeddings() or base.score, base.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0  # Falcon-H1 too
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite divides
    return Head(layer.weight, getattr(layer, "bias", None), scale, getattr(config, "final_logit_softcapping", None))


def backbone_hidden(model: nn.Module, input_ids: Tensor, position_ids: Tensor, segments: Segments) -> Tensor:
    """Last hidden states (T, H) of one packed row (T,); the LM head does not run."""
    more = missing(input_ids)
    output = plain(model).base_model(
        input_ids=pad(input_ids, (0, more))[None],
        position_ids=pad(position_ids, (0, more))[None],
        use_cache=False,
        segments=segments.padded(more),  # travel to our attention function, and through gradient checkpointing
    )
    return output.last_hidden_state[0, : len(input_ids)]


def token_logprobs(
    hidden: Tensor,  # (N, H)
    head: Head,
    targets: Tensor,  # (N,)
    temperature: float,
    *,
    entropy_grad: bool = False,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Each target's log-probability (N,), and the entropy (N,) of the distribution it was drawn from.

    Entropy comes detached unless `entropy_grad`; `chunk` is how many rows are worked on at a time.
    """
    device, dtype, vocabulary = hidden.device.type, head.weight.dtype, head.weight.shape[0]
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    rows = chunk or max(1, chunk_size(hidden.device) // vocabulary // ROWS) * ROWS
    ahead = torch.is_grad_enabled() and hidden.requires_grad and not head.trainable
    how = _How(head.scale, head.softcap, temperature, rows, dtype, entropy_grad, ahead)
    return _TokenLogprobs.apply(hidden, head.weight, head.bias, targets, how)  # type: ignore[return-value]


def chunk_size(device: torch.device) -> int:
    """The number of logits to work on at a time: on CUDA a quarter of the memory that is left, within reason."""
    if device.type != "cuda":
        return CPU_CHUNK if device.type == "cpu" else CHUNK
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # the allocator's own
    left = gpu_memory.left(device) + unused
    return min(max(CHUNK, left // 4 // HELD), CUDA_CHUNK)


@dataclass(frozen=True, slots=True)
class _How:
    """Everything about one call but its tensors, and the arithmetic of one chunk of n rows."""

    scale: float
    softcap: float | None
    temperature: float
    rows: int
    dtype: torch.dtype  # of what is multiplied; the rest is float32 (float64 for a float64 model)
    entropy_grad: bool
    ahead: bool  # a frozen head: a row's gradient is known but for a factor, so take it while the logits are there

    def chunks(self, n: int) -> list[slice]:
        return [slice(start, start + self.rows) for start in range(0, n, self.rows)]

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """`a @ b` of `dtype` operands, in float32."""
        return wide_product(a.to(self.dtype), b.to(self.dtype))

    def distribution(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor | None]]:
        """Log-probabilities and entropies (n,); probabilities p, p log p and the cap's slope (n, V)."""
        logits, cap_slope = self.matmul(hidden, weight.t()), None
        if bias is not None:
            logits += bias
        if self.softcap is not None:
            logits.mul_(self.scale / self.softcap).tanh_()
            cap_slope = logits.square().neg_().add_(1)
            logits *= self.softcap / self.temperature
        elif self.scale != self.temperature:
            logits *= self.scale / self.temperature
        logp = logits.log_softmax(-1)
        p = torch.exp(logp, out=logits)  # in place of the logits: two chunks are held, no more
        chosen = logp.gather(1, targets[:, None])[:, 0]
        plogp = logp.mul_(p)
        return chosen, -plogp.sum(-1), (p, plogp, cap_slope)

    def slopes(
        self, targets: Tensor, entropy: Tensor, p: Tensor, plogp: Tensor, cap_slope: Tensor | None
    ) -> list[Tensor]:
        """Derivatives (n, V) of log-probabilities, and of entropies if asked, by the head's output; in place."""
        slopes = [plogp.addcmul_(p, entropy[:, None]).neg_()] if self.entropy_grad else []
        slopes.insert(0, p.neg_().scatter_add_(1, targets[:, None], torch.ones_like(p[:, :1])))
        if cap_slope is not None:
            for slope in slopes:
                slope.mul_(cap_slope)
        return slopes


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, how: _How
    ) -> tuple[Tensor, Tensor]:
        """Keeps, with a frozen head, each row's gradients (N, H); else what backward walks through again."""
        logprobs = hidden.new_empty(len(targets), dtype=torch.promote_types(how.dtype, torch.float32))
        entropies = torch.empty_like(logprobs)
        kept = [torch.empty_like(hidden) for _ in range(how.ahead * (1 + how.entropy_grad))]
        matrix = weight.to(how.dtype)  # once, not per chunk
        for rows in how.chunks(len(targets)):
            logprobs[rows], entropies[rows], parts = how.distribution(hidden[rows], matrix, bias, targets[rows])
            slopes = how.slopes(targets[rows], entropies[rows], *parts) if how.ahead else []
            for gradient, product in zip(kept, [how.matmul(s, matrix) for s in slopes], strict=True):
                gradient[rows] = product
            del parts, slopes  # before the next chunk is made
        ctx.how = how
        ctx.save_for_backward(*(kept if how.ahead else (hidden, weight, bias, targets)))
        if not how.entropy_grad:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the hidden states, and of the head if it learns."""
        how = ctx.how
        factors = [g[:, None] * (how.scale / how.temperature) for g in grads[: 1 + how.entropy_grad]]  # (N, 1) each
        if how.ahead:
            kept = ctx.saved_tensors
            total = factors[0] * kept[0]
            if how.entropy_grad:
                total += factors[1] * kept[1]
            return total.to(kept[0].dtype), None, None, None, None
        hidden, weight, bias, targets = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        matrix = weight.to(how.dtype)
        for rows in how.chunks(len(targets)):
            _, entropies, parts = how.distribution(hidden[rows], matrix, bias, targets[rows])
            slopes = how.slopes(targets[rows], entropies, *parts)
            slope = slopes[0].mul_(factors[0][rows])
            if how.entropy_grad:
                slope.addcmul_(slopes[1], factors[1][rows])
            grad_hidden[rows] = how.matmul(slope, matrix)
            if how.dtype == weight.dtype == slope.dtype:
                grad_weight.addmm_(slope.t(), hidden[rows])  # no second (V, H)
            else:
                grad_weight += how.matmul(slope.t(), hidden[rows])
            if grad_bias is not None:
                grad_bias += slope.sum(0)
            del parts, slopes, slope
        return grad_hidden, grad_weight, grad_bias, None, None
