"""Divergences between the base's distribution p and the tuned model's q, with their gradient.

A divergence is a function of log p_b and log q_b over a partition of the vocabulary into buckets b:
each token is a bucket of its own, or (sparse bases) the listed tokens are and the rest is one more.
With d_b = dD / d log q_b, a token j of bucket b has

    dD / d l_j = (share of j within b under q) * g_b      g_b = d_b - q_b sum_c d_c

    forward   D = KL(p || q) = sum_b p_b (log p_b - log q_b) - p_b + q_b
              g_b = q_b - p_b
    reverse   D = KL(q || p) = sum_b q_b (log q_b - log p_b)
              g_b = q_b (log q_b - log p_b - D)
    js        D = beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q
              g_b = (1 - beta) q_b (log q_b - log m_b - KL(q || m))

p and q both sum to 1, so the last two parts of forward add nothing; with them each term of the sum
is at least 0, and value and gradient are exactly 0 at zero drift.

Shape suffixes: C positions, B buckets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from holdfast.section import Section

if TYPE_CHECKING:
    from torch import Tensor

ABSENT = -1e4
"""Stands for log 0 in a bucket that neither side has: exp of it is 0, and it has a difference."""


class Divergence(Section):
    """How far the tuned model's next-token distribution q is from the base's p."""

    kind: Literal["forward", "reverse", "js"] = "forward"
    """forward: KL(base || tuned), which covers all that the base would say. reverse: KL(tuned ||
    base). js: the generalised Jensen-Shannon divergence between the two."""
    js_coefficient: float = Field(default=0.5, gt=0.0, lt=1.0)
    """Weight of the base in the mixture of js (`beta` of trl's GKD): beta KL(p || m) + (1 - beta)
    KL(q || m) with m = beta p + (1 - beta) q. Small: like beta * forward; near 1: like reverse."""
    mask_target: bool = False
    """Take the row's next token out of both sides and renormalise both, so that the lesson's own
    token is free to move."""
    temperature: float = Field(default=1.0, gt=0.0)
    """Both sides' logits are divided by it. No factor temperature^2 is added (trl adds none)."""

    def value_and_grad(
        self, logp_CB: Tensor, logq_CB: Tensor, target_C: Tensor
    ) -> tuple[Tensor, Tensor]:
        """D (C,) in nats and g (C, B), its gradient with respect to the buckets' logits.

        Args:
            logp_CB: log-probabilities of the base at this temperature. Overwritten.
            logq_CB: those of the tuned model. Overwritten.
            target_C: the bucket of the next token.
        """
        import torch

        if self.mask_target:
            for log_CB in (logp_CB, logq_CB):
                log_CB.scatter_(1, target_C.unsqueeze(1), ABSENT)
                log_CB -= log_CB.logsumexp(1, keepdim=True)
        q_CB = logq_CB.exp()
        if self.kind == "forward":
            gap_CB = torch.sub(logp_CB, logq_CB, out=logq_CB)
            p_CB = logp_CB.exp_()
            gap_CB *= p_CB
            grad_CB = torch.sub(q_CB, p_CB, out=p_CB)
            value_C = gap_CB.add_(grad_CB).sum(1)
        elif self.kind == "reverse":
            gap_CB = logq_CB.sub_(logp_CB)
            value_C = (q_CB * gap_CB).sum(1)
            grad_CB = q_CB.mul_(gap_CB.sub_(value_C.unsqueeze(1)))
        else:
            beta = self.js_coefficient
            gap_CB = logp_CB - logq_CB
            # log m - log q = log(1 - beta + beta p/q), by whichever of p/q and q/p is at most 1
            share_CB = (gap_CB < 0).to(gap_CB.dtype).mul_(2 * beta - 1).add_(1 - beta)
            over_CB = gap_CB.abs().neg_().expm1_().mul_(share_CB).log1p_().add_(gap_CB.relu())
            tuned_C = -(q_CB * over_CB).sum(1)
            base_C = gap_CB.sub_(over_CB).mul_(logp_CB.exp_()).sum(1)
            value_C = beta * base_C + (1 - beta) * tuned_C
            grad_CB = q_CB.mul_(over_CB.add_(tuned_C.unsqueeze(1))).mul_(beta - 1)
        return value_C, grad_CB.div_(self.temperature) if self.temperature != 1 else grad_CB
