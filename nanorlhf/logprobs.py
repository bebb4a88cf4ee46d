"""Log-probabilities and entropies of chosen tokens, walking the LM head in chunks: no (N, V) logits, ever."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CHUNK_ELEMENTS = 1 << 24  # logits held at a time, rows x V: 64 MiB


@dataclass(frozen=True, slots=True)
class Head:
    """How a model turns hidden states into logits: cap(scale * (hidden @ weight.T + bias))."""

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
    """The LM head of a causal language model, with the scaling and capping its config asks for."""
    base = plain(model)
    layer, config = base.get_output_embeddings(), base.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0  # Falcon-H1 too
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite divides
    return Head(layer.weight, getattr(layer, "bias", None), scale, getattr(config, "final_logit_softcapping", None))


def backbone_hidden(model: nn.Module, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Last hidden states (T, H) of one packed row (T,); the LM head does not run."""
    lengths = cu_seqlens.diff().tolist()  # once a row: every layer asking the GPU would be a wait per layer
    output = plain(model).base_model(
        input_ids=input_ids[None],
        position_ids=position_ids[None],
        use_cache=False,
        segments=(cu_seqlens, lengths),  # travels to our attention function, and through gradient checkpointing
    )
    return output.last_hidden_state[0]


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
    device, dtype = hidden.device.type, head.weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    rows = chunk or max(1, CHUNK_ELEMENTS // head.weight.shape[0])
    ahead = torch.is_grad_enabled() and hidden.requires_grad and not head.trainable
    how = _How(head.scale, head.softcap, temperature, rows, dtype, entropy_grad, ahead)
    return _TokenLogprobs.apply(hidden, head.weight, head.bias, targets, how)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class _How:
    """Everything about one call but its tensors, and the arithmetic of a chunk."""

    scale: float
    softcap: float | None
    temperature: float
    rows: int
    dtype: torch.dtype  # of what is multiplied; all else is float32 (float64 for a float64 model)
    entropy_grad: bool
    ahead: bool  # a frozen head: a row's gradient is known but for a factor, so it is taken while the logits are there

    def chunks(self, n: int) -> Iterator[slice]:
        return (slice(start, start + self.rows) for start in range(0, n, self.rows))

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """`a @ b` of `dtype` operands in float32; on CUDA it is not rounded to 16 bits on the way."""
        a, b = a.to(self.dtype), b.to(self.dtype)
        if a.is_cuda and self.dtype.itemsize == 2:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.mm(a, b).to(torch.promote_types(self.dtype, torch.float32))

    def distribution(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probabilities and probabilities (n, V), and the cap's slope (n, V) where there is a cap."""
        logits, slope = self.matmul(hidden, weight.t()), None
        if bias is not None:
            logits += bias
        logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_()
            slope = logits.square().neg_().add_(1)
            logits *= self.softcap
        logits /= self.temperature
        logp = logits.log_softmax(-1)
        return logp, torch.exp(logp, out=logits), slope

    def score(self, logp: Tensor, p: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The targets' log-probabilities (n,) and the entropies (n,)."""
        return logp.gather(1, targets[:, None])[:, 0], -torch.linalg.vecdot(logp, p)

    def logits_grad(
        self, logp: Tensor, p: Tensor, slope: Tensor | None, targets: Tensor, by_logp: Tensor, by_entropy: Tensor | None
    ) -> Tensor:
        """d(by_logp * logprob + by_entropy * entropy) / d(hidden @ weight.T + bias), (n, V); may overwrite `p` and `logp`."""
        if by_entropy is None:
            grad = p * -by_logp[:, None] if self.entropy_grad else p.mul_(-by_logp[:, None])
        return grad
