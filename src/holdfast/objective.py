"""From hidden states to per-token losses, chunk by chunk, never holding the full logits.

Shape suffixes: N tokens, C tokens of one chunk, H hidden size, V vocabulary.

For one position with hidden state h, logits l = head(h), q = softmax(l) and the base's p:

    nll = -log q[target]                              d nll / d l = q - onehot(target)
    kl  = sum_v p_v (log p_v - log q_v) - p_v + q_v   d kl  / d l = q - p

kl is the forward KL(base || tuned). p and q both sum to 1, so its last two parts add nothing; with
them each term of the sum is at least 0, and value and gradient are exactly 0 at zero drift.

Both depend on their own h alone, so where the head is frozen (adapters) the gradient with respect
to h is formed in the same pass and kept as one (N, H) tensor: each chunk's logits live only while
the chunk is worked on, and backward is one elementwise product. Where the head is trained, the
chunk is recomputed in backward (`torch.utils.checkpoint`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 256 * 2**20
"""Upper size of one chunk's fp32 logits."""


@dataclass(frozen=True)
class Head:
    """The output head as a function: l = cap * tanh(scale * (h W^T + b) / cap).

    `scale` and `cap` are the ecosystem's logit multiplier (Cohere, Granite) and final logit
    soft-capping (Gemma 2); 1 and None for most models.
    """

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def __call__(self, hidden_CH: Tensor) -> Tensor:
        """Logits (C, V) in fp32."""
        logits_CV = torch.nn.functional.linear(hidden_CH, self.weight_VH, self.bias_V).float()
        if self.scale != 1.0:
            logits_CV = logits_CV * self.scale
        if self.cap is not None:
            logits_CV = self.cap * torch.tanh(logits_CV / self.cap)
        return logits_CV

    def pullback(self, grad_CV: Tensor, logits_CV: Tensor) -> Tensor:
        """(d l / d h)^T grad, shape (C, H): the chain rule through cap, scale and W."""
        if self.cap is not None:
            grad_CV = grad_CV * (1 - (logits_CV / self.cap) ** 2)
        return (grad_CV.to(self.weight_VH.dtype) @ self.weight_VH) * self.scale

    @property
    def trained(self) -> bool:
        """Whether the head's own weights take a gradient."""
        return self.weight_VH.requires_grad or (
            self.bias_V is not None and self.bias_V.requires_grad
        )


def token_nll(hidden_NH: Tensor, head: Head, targets_N: Tensor) -> Tensor:
    """Negative log-likelihood of each target token, in nats: (N,) fp32, differentiable."""

    def value(hidden_CH: Tensor, rows: slice) -> Tensor:
        return torch.nn.functional.cross_entropy(head(hidden_CH), targets_N[rows], reduction="none")

    def value_and_grad(hidden_CH: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        logits_CV = head(hidden_CH)
        logq_CV = logits_CV.log_softmax(-1)
        target_C1 = targets_N[rows].unsqueeze(1)
        nll_C = -logq_CV.gather(1, target_C1).squeeze(1)
        grad_CV = logq_CV.exp_()
        grad_CV.scatter_add_(1, target_C1, torch.full_like(target_C1, -1, dtype=grad_CV.dtype))
        return nll_C, head.pullback(grad_CV, logits_CV)

    return _per_token(hidden_NH, head, value, value_and_grad)


def token_kl(hidden_NH: Tensor, head: Head, base_hidden_NH: Tensor, base_head: Head) -> Tensor:
    """KL(base || tuned) over the full vocabulary at each position, in nats: (N,) fp32.

    Differentiable in `hidden_NH` (and the head); never in the base's side.
    """

    def base_logp(rows: slice) -> Tensor:
        with torch.no_grad():
            return base_head(base_hidden_NH[rows]).log_softmax(-1)

    def value(hidden_CH: Tensor, rows: slice) -> Tensor:
        logp_CV, logq_CV = base_logp(rows), head(hidden_CH).log_softmax(-1)
        p_CV = logp_CV.exp()
        return (p_CV * (logp_CV - logq_CV) + (logq_CV.exp() - p_CV)).sum(-1)

    def value_and_grad(hidden_CH: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        logits_CV = head(hidden_CH)
        logp_CV, logq_CV = base_logp(rows), logits_CV.log_softmax(-1)
        p_CV = logp_CV.exp()
        grad_CV = logq_CV.exp() - p_CV
        kl_C = logp_CV.sub_(logq_CV).mul_(p_CV).add_(grad_CV).sum(-1)
        return kl_C, head.pullback(grad_CV, logits_CV)

    return _per_token(hidden_NH, head, value, value_and_grad)


ValueFn = Callable[[Tensor, slice], Tensor]
ValueAndGradFn = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


def _per_token(hidden_NH: Tensor, head: Head, value: ValueFn, both: ValueAndGradFn) -> Tensor:
    chunk = max(1, CHUNK_BYTES // (4 * head.weight_VH.shape[0]))
    chunks = [slice(i, i + chunk) for i in range(0, hidden_NH.shape[0], chunk)]
    if not chunks:
        return hidden_NH.float().sum(-1)  # (0,), still attached to the graph
    if not torch.is_grad_enabled() or not (hidden_NH.requires_grad or head.trained):
        return torch.cat([value(hidden_NH[rows], rows) for rows in chunks])
    if head.trained:
        parts = [checkpoint(value, hidden_NH[rows], rows, use_reentrant=False) for rows in chunks]
        return torch.cat(parts)
    result: Tensor = _FrozenHead.apply(hidden_NH, both, chunks)  # type: ignore[no-untyped-call]
    return result


class _FrozenHead(torch.autograd.Function):
    """Per-token values whose gradient with respect to the hidden states is formed in forward."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, both: ValueAndGradFn, chunks: list[slice]) -> Tensor:
        values, grad_NH = [], torch.empty_like(hidden_NH)
        for rows in chunks:
            value_C, grad_CH = both(hidden_NH[rows], rows)
            grad_NH[rows] = grad_CH.to(grad_NH.dtype)
            values.append(value_C)
        ctx.save_for_backward(grad_NH)
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (grad_NH,) = ctx.saved_tensors
        return grad_NH * upstream[0].unsqueeze(1).to(grad_NH.dtype), None, None
