"""From hidden states to per-token losses in one pass, never holding the full logits.

Shape suffixes: N positions of a micro-batch, P of them that need a loss, C of one chunk (b of a
block of it), M that need the divergence, H hidden size, V vocabulary, E entries that a sparse base
lists.

For one position with hidden state h, logits l = head(h), q = softmax(l) and the base's p:

    nll = -log q[target]          d nll / d l = q - onehot(target)
    kl  = D(p, q)                 d kl  / d l: see `divergence.py` and `sparse.py`

A chunk's logits are computed once and live while the chunk is worked on; so are the gradients,
wherever forward knows enough to form them:

- It is told what each loss will weigh, up to a common factor (`nll_weight`, `kl_weight`). The
  gradient of the weighted sum is formed, with respect to the hidden states and, where it is
  trained, the head: one product for each, whichever losses a position has. Backward multiplies by
  the factor. Where the weights turn out to be others, or in a second backward pass, it forms the
  gradient anew from logits computed again.
- It is told nothing and the head is frozen. Each loss depends on its own h alone, so an (H,) vector
  is kept for each loss that a position has, and backward is one elementwise product.
- It is told nothing and the head is trained. Backward computes the logits again.

In the second case a sparse base shares one product between the losses: with u = sum_j q~_j W_j
over the tail, and g as in `sparse.py`,

    d nll / d h = q_T u + sum_i (q_i - [i = target]) W_i
    d kl  / d h = g_T u + sum_i g_i W_i
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from holdfast.chunks import Base as Base
from holdfast.chunks import DenseBase as DenseBase
from holdfast.chunks import Pass, Upstream
from holdfast.chunks import TopEntropy as TopEntropy
from holdfast.divergence import Divergence
from holdfast.head import Head as Head
from holdfast.head import wide
from holdfast.sparse import SparseBase as SparseBase


@torch.compiler.disable  # type: ignore[untyped-decorator]
def token_losses(
    hidden_NH: Tensor,
    head: Head,
    targets_N: Tensor,
    *,
    nll_N: Tensor,
    kl_N: Tensor,
    base: Base | None,
    divergence: Divergence,
    nll_weight: Tensor | None = None,
    kl_weight: Tensor | None = None,
    entropy: TopEntropy | None = None,
) -> tuple[Tensor, Tensor]:
    """NLL at the positions nll_N and divergence from the base at kl_N, in nats.

    Both are differentiable in `hidden_NH` and, where it is trained, the head; never in the base.
    The two masks may overlap; a position in neither costs nothing.

    Args:
        hidden_NH: last hidden states.
        head: the model's output head.
        targets_N: the token that follows each position.
        nll_N: mask of the positions that need the NLL.
        kl_N: mask of those that need the divergence.
        base: what the base says at kl_N.
        divergence: how the two are compared.
        nll_weight: (nll_N.sum(),) what is expected to be d loss / d nll, but for a factor that it
            shares with `kl_weight`. Saves products; whether it comes true changes no result.
        kl_weight: (kl_N.sum(),) the same for the divergence; both or none.
        entropy: is given its answer, from the same logits.

    Returns:
        (nll_N.sum(),) and (kl_N.sum(),) in the order of the positions; fp32 (float64 where the head
        is).

    Raises:
        ValueError: there are KL positions but no base, a sparse base does not list a target, or
            there is not one weight for each loss.
    """
    order_P = torch.cat(
        [mask_N.nonzero().squeeze(1) for mask_N in (nll_N & ~kl_N, nll_N & kl_N, kl_N & ~nll_N)]
    )
    nlls, kls, device = int(nll_N.sum()), int(kl_N.sum()), hidden_NH.device.type
    if kls and base is None:
        raise ValueError("kl_N asks for the divergence at some positions, but base is None")
    own = head
    head = head.local(device)
    if isinstance(base, DenseBase):
        # a base that is the model itself with its adapter off has the same head: gathered once
        same = base.head.weight_VH is own.weight_VH and base.head.bias_V is own.bias_V
        side = replace(base.head, weight_VH=head.weight_VH, bias_V=head.bias_V) if same else None
        base = replace(base, head=(side or base.head.local(device)).detach())
    nll_order, kl_order = order_P[:nlls], order_P[len(order_P) - kls :]
    nll_rows, kl_rows = (nll_N.cumsum(0) - 1)[nll_order], (kl_N.cumsum(0) - 1)[kl_order]
    needs_grad = torch.is_grad_enabled() and (hidden_NH.requires_grad or head.trained)
    upstream = None
    if nll_weight is not None or kl_weight is not None:
        given = [None if weight is None else len(weight) for weight in (nll_weight, kl_weight)]
        if nll_weight is None or kl_weight is None or given != [nlls, kls]:
            raise ValueError(f"{nlls} NLLs and {kls} KLs, but {given} weights: give one for each")
        upstream = Upstream(nll_weight[nll_rows], kl_weight[kl_rows])
    if entropy is not None:
        entropy.nll_N = head.weight_VH.new_empty(nlls, dtype=wide(head.weight_VH.dtype))
    work = Pass(
        head=head.detach(),
        targets_P=targets_N[order_P],
        nlls=nlls,
        kls=kls,
        base=base,
        base_rows=kl_rows,
        divergence=divergence,
        expected=upstream.normalised(wide(head.weight_VH.dtype))
        if upstream is not None and needs_grad
        else None,
        apart=needs_grad and upstream is None and not head.trained,
        entropy=entropy,
    )
    with torch.autocast(device, enabled=False):
        nll_P, kl_P = _Losses.apply(  # type: ignore[no-untyped-call]
            hidden_NH[order_P], head.weight_VH, head.bias_V, work
        )
    if entropy is not None and entropy.nll_N is not None:
        entropy.nll_N = entropy.nll_N[nll_order.argsort()]
    return nll_P[nll_order.argsort()], kl_P[kl_order.argsort()]


def token_nll(hidden_NH: Tensor, head: Head, targets_N: Tensor) -> Tensor:
    """Negative log-likelihood of each target token, in nats: (N,) fp32."""
    every = torch.ones_like(targets_N, dtype=torch.bool)
    nll_N: Tensor = token_losses(
        hidden_NH, head, targets_N, nll_N=every, kl_N=~every, base=None, divergence=Divergence()
    )[0]
    return nll_N


class _Losses(torch.autograd.Function):
    """(nll, kl) of a pass; see the top for what is kept of it for backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden_PH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, work: Pass
    ) -> tuple[Tensor, Tensor]:
        # backward, where it computes the logits again, has nothing more to tell
        ctx.work, ctx.formed = replace(work, entropy=None), None
        if work.apart:
            values, *grads = work.values_and_grads(hidden_PH)
            ctx.save_for_backward(*grads)
            return values.nll, values.kl
        if work.expected is None:
            values = work.values(hidden_PH)
        else:
            values, ctx.formed = work.values_and_sum_grad(
                hidden_PH, work.expected, ctx.needs_input_grad
            )
        ctx.save_for_backward(hidden_PH, weight_VH, bias_V)
        return values.nll, values.kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        work, up = ctx.work, Upstream(*upstream)
        if work.apart:
            nll_grad, kl_grad = ctx.saved_tensors
            grad_PH = nll_grad.new_zeros((len(work.targets_P), nll_grad.shape[1]))
            grad_PH[: work.nlls] = nll_grad * up.nll.unsqueeze(1)
            grad_PH[len(grad_PH) - work.kls :] += kl_grad * up.kl.unsqueeze(1)
            return grad_PH, None, None, None
        hidden_PH, *_ = ctx.saved_tensors
        # taken, not copied: it may become .grad itself
        grads, ctx.formed = ctx.formed, None
        factor = None if grads is None else work.expected.factor_to(up)
        if factor is None:
            grads = None  # its memory is free for what takes its place
            _, grads = work.values_and_sum_grad(hidden_PH, up, ctx.needs_input_grad)
        else:
            grads = [None if grad is None else grad.mul_(factor) for grad in grads]
        return *grads, None
