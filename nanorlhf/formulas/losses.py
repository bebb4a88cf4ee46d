"""Log-probabilities to per-token losses: pure formulas, all `(N,)`; log_ratio = logp - old_logp."""

from __future__ import annotations

import torch
from torch import Tensor

Clip = tuple[float, float]


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, clip: Clip, dual: float | None = None) -> Tensor:
    """PPO, arXiv:1707.06347: max(-A rho, -A clip(rho, 1 - low, 1 + high)); if A < 0 at most -A dual."""
    ratio = log_ratio.exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip[0], 1 + clip[1]))
    if dual is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -advantages * dual), loss)


def clipped(log_ratio: Tensor, advantages: Tensor, clip: Clip) -> Tensor:
    """Which tokens the clip keeps from pushing further, as 0 and 1."""
    ratio = log_ratio.exp()
    return (((ratio < 1 - clip[0]) & (advantages < 0)) | ((ratio > 1 + clip[1]) & (advantages > 0))).float()


def by_sequence(values: Tensor, sample: Tensor, mean: bool) -> Tensor:
    """The sum (RLOO, arXiv:2402.14740) or mean (GSPO, arXiv:2507.18071) over a token's own sample, at every token."""
    _, place, counts = sample.unique(return_inverse=True, return_counts=True)
    total = torch.zeros(len(counts), dtype=values.dtype, device=values.device).index_add(0, place, values)
    return (total / counts if mean else total)[place]


def cispo(logprobs: Tensor, log_ratio: Tensor, advantages: Tensor, clip: Clip) -> Tensor:
    """CISPO, arXiv:2506.13585: -stop_grad(clip(rho)) A logp; no token loses its gradient."""
    weight = log_ratio.detach().exp().clamp(1 - clip[0], 1 + clip[1])
    return -weight * advantages * logprobs


def sapo(log_ratio: Tensor, advantages: Tensor, tau_pos: float, tau_neg: float) -> Tensor:
    """SAPO, arXiv:2511.20347: -(4 / tau) sigmoid(tau (rho - 1)) A, a gate that closes softly."""
    tau = torch.where(advantages > 0, tau_pos, tau_neg)
    return -(4 / tau) * torch.sigmoid(tau * (log_ratio.exp() - 1)) * advantages


def importance(gap: Tensor, sample: Tensor, form: str, cap: float) -> tuple[Tensor, Tensor]:
    """Weights min(p_trainer / p_engine, cap) and where they were cut; gap = logp_trainer - logp_engine."""
    if form != "token":
        gap = by_sequence(gap, sample, mean=form == "geometric")
    weight = gap.exp()
    return weight.clamp(max=cap), (weight > cap).float()


def clipped_value(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """PPO's value loss: .5 max((V - R)^2, (clip(V, V_old +- c) - R)^2)."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)


def dpo(margin: Tensor, beta: float) -> Tensor:
    """DPO, arXiv:2305.18290: -log sigmoid(beta margin), margin = (logp_w - ref_w) - (logp_l - ref_l)."""
    return -torch.nn.functional.logsigmoid(beta * margin)


def preference(gap: Tensor, sign: Tensor, group: Tensor, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    """(N,) each pair's DPO loss at every token of both its samples, and figures of the pairs, (P,).

    gap = logp - ref_logp; sign is 1 on the chosen sample and -1 on the rejected one, `group` their prompt's number: an
    answer without a token has the probability 1 at any rate, and is still one of its pair.
    """
    pairs, pair = group.unique(return_inverse=True)
    zeros = torch.zeros(len(pairs), dtype=gap.dtype, device=gap.device)
    chosen = zeros.index_add(0, pair, gap * (sign > 0))
    rejected = zeros.index_add(0, pair, gap * (sign < 0))
    tokens = dpo(chosen - rejected, beta)[pair]
    stats = {"rewards/chosen": beta * chosen, "rewards/rejected": beta * rejected, "margin": beta * (chosen - rejected)}
    stats["accuracy"] = 0.5 + 0.5 * (chosen - rejected).sign()  # a tie is half right
    return tokens, {name: values.detach() for name, values in stats.items()}
