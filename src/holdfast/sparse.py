"""A base of which only some tokens of each position are kept, and the rest as one bucket.

Shape suffixes: M positions that need the divergence, C of one chunk, H hidden size, V vocabulary,
E entries, B buckets of the vocabulary.

With g the divergence's gradient over the buckets (`divergence.py`), T the tail and q~ = softmax(l)
within it,

    d D / d l_i = g_i             i listed
    d D / d l_j = g_T q~_j        j in the tail

q~ is a softmax of its own, so a tail that has next to nothing keeps its logarithm and its gradient.

Tokens s that were drawn from the tail, with weights w_s, add without bias what the bucket leaves
out of the forward KL (chain rule; T is its mass under p, p~ = p / T). This, too, is 0 at zero
drift:

    T KL(p~ || q~) = T sum_s w_s (p~_s (log p~_s - log q~_s) - p~_s + q~_s)
    d / d l_j      = T (w_j (q~_j - p~_j) [j drawn] - q~_j sum_s w_s (q~_s - p~_s))
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.divergence import ABSENT, Divergence
from holdfast.head import Head


@dataclass(frozen=True)
class SparseBase:
    """A cached base: at KL position m the entries offsets[m]:offsets[m + 1] are listed tokens.

    The position's next token is always listed. All of it belongs to one temperature, the
    divergence's.
    """

    offsets: Tensor
    """(M + 1,) int64."""
    ids: Tensor
    """(E,) int64 token ids, each at most once at a position."""
    logp: Tensor
    """(E,) fp32 log-probabilities."""
    log_tail: Tensor
    """(M,) fp32: log of the mass that is not listed; -inf where nothing is left."""
    weights: Tensor | None = None
    """(E,) fp32: 0 for a listed token; 1 / (probability of drawing it) for one that was drawn from
    the tail, which is still part of the tail. None: nothing was drawn."""


@dataclass(frozen=True)
class Listed:
    """The entries of a sparse base at C rows, row by row."""

    offset_C: Tensor
    row_E: Tensor
    column_E: Tensor
    id_E: Tensor
    logp_E: Tensor
    hit_E: Tensor  # whether it is the row's target
    log_tail_C: Tensor
    weight_E: Tensor | None  # 0 where listed; None: nothing was drawn

    @classmethod
    def of(cls, base: SparseBase, at: Tensor, targets_C: Tensor) -> Listed:
        """The entries at the positions `at` of the base.

        Raises:
            ValueError: a target is not listed.
        """
        start_C = base.offsets[at]
        count_C = base.offsets[at + 1] - start_C
        row_E = torch.arange(len(at), device=at.device).repeat_interleave(count_C)
        offset_C = count_C.cumsum(0) - count_C
        column_E = torch.arange(len(row_E), device=at.device) - offset_C[row_E]
        entry_E = start_C[row_E] + column_E
        id_E = base.ids[entry_E]
        hit_E = id_E == targets_C[row_E]
        if int(hit_E.sum()) != len(at):
            raise ValueError("a sparse base must list the target of each of its positions, once")
        logp_E, log_tail_C = base.logp[entry_E], base.log_tail[at]
        weight_E = None if base.weights is None else base.weights[entry_E]
        return cls(offset_C, row_E, column_E, id_E, logp_E, hit_E, log_tail_C, weight_E)

    def split(self, logits_CV: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Log q of the buckets (C, B), the tail last, and of the entries (E,).

        What is left in the place of the logits is q~, with the entries set to 0. So many `rows` at
        a time are passed over.
        """
        at, drawn_E = (self.row_E, self.id_E), self.drawn
        logit_E, lowest = logits_CV[at], torch.finfo(logits_CV.dtype).min
        logits_CV[at] = torch.where(drawn_E, logit_E, lowest)
        top_C, most_C = (logits_CV.new_empty(len(logits_CV)) for _ in range(2))
        for i in range(0, len(logits_CV), rows):
            share_bV = logits_CV[i : i + rows]
            torch.amax(share_bV, 1, out=top_C[i : i + rows])
            torch.softmax(share_bV, 1, out=share_bV)
            torch.amax(share_bV, 1, out=most_C[i : i + rows])
        tail_C = top_C - most_C.log()
        logits_CV[at] = 0
        logit_CB = logit_E.new_full((len(tail_C), int(self.column_E.max()) + 2), -torch.inf)
        logit_CB[self.row_E, self.column_E] = logit_E.masked_fill(drawn_E, -torch.inf)
        logit_CB[:, -1] = tail_C.masked_fill(top_C == lowest, -torch.inf)
        logq_CB = logit_CB.log_softmax(1)
        within_E = logit_E - tail_C[self.row_E] + logq_CB[self.row_E, -1]
        return logq_CB, torch.where(drawn_E, within_E, logq_CB[self.row_E, self.column_E])

    def compare(
        self, logq_CB: Tensor, logq_E: Tensor, divergence: Divergence
    ) -> tuple[Tensor, Tensor, Tensor]:
        """D (C,), its gradient at the entries (E,), and at a token of the tail over q~ (C,)."""
        drawn_E, row_E, log_mass_C = self.drawn, self.row_E, logq_CB[:, -1].clone()
        logp_CB = torch.full_like(logq_CB, -torch.inf)
        logp_CB[row_E, self.column_E] = self.logp_E.to(logq_E.dtype).masked_fill(
            drawn_E, -torch.inf
        )
        logp_CB[:, -1] = self.log_tail_C.to(logq_E.dtype)
        for log_CB in (logp_CB, logq_CB):
            log_CB.masked_fill_(log_CB.isneginf(), ABSENT)
        target_C = self.column_E[self.hit_E]
        value_C, grad_CB = divergence.value_and_grad(logp_CB, logq_CB, target_C)
        tail_grad_C, grad_E = grad_CB[:, -1], grad_CB[row_E, self.column_E]
        if self.weight_E is not None:
            logq_E = logq_E - log_mass_C[row_E]  # within the tail
            slope_E = torch.zeros_like(logq_E)
            if divergence.kind == "forward":  # others are no sum of the buckets' and the tail's
                more_C, more_E = self.within_tail(logq_E, divergence)
                slope_E = more_E / divergence.temperature
                value_C = value_C + more_C
                tail_grad_C = tail_grad_C.index_add(0, row_E, slope_E, alpha=-1)
            inside_E = logq_E.exp() * tail_grad_C[row_E] + slope_E
            grad_E = torch.where(drawn_E, inside_E, grad_E)
        return value_C, grad_E, tail_grad_C

    def within_tail(self, logq_E: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
        """T KL(p~ || q~) (C,) and T w (q~ - p~) (E,), by log q~ of the drawn; see the top."""
        assert self.weight_E is not None
        drawn_E, log_tail_C = self.drawn, self.log_tail_C.to(logq_E.dtype)
        mass_C = log_tail_C.exp()
        if divergence.mask_target:  # both sides lost the target, and were renormalised
            left_C = -torch.expm1(self.logp_E[self.hit_E].to(logq_E.dtype))
            mass_C = mass_C / left_C.clamp_min(mass_C)
        row_E = self.row_E[drawn_E]
        logp_E = self.logp_E[drawn_E].to(logq_E.dtype) - log_tail_C[row_E]
        gap_E = logp_E - logq_E[drawn_E]
        scaled_E = mass_C[row_E] * self.weight_E[drawn_E].to(logq_E.dtype) * logp_E.exp()
        change_E = scaled_E * torch.expm1(-gap_E)
        value_C = torch.zeros_like(mass_C).index_add(0, row_E, scaled_E * gap_E + change_E)
        return value_C, torch.zeros_like(logq_E).masked_scatter(drawn_E, change_E)

    @property
    def drawn(self) -> Tensor:
        """(E,): whether an entry was drawn from the tail."""
        return torch.zeros_like(self.hit_E) if self.weight_E is None else self.weight_E > 0

    def embed(self, head: Head, weights_E: Tensor, rows: int | None = None) -> Tensor:
        """sum_i weight_i W_i over the entries of each of the first rows: (C, H)."""
        dtype = head.weight_VH.dtype
        offset_C = self.offset_C[:rows]
        stop = len(self.row_E)
        if rows is not None and rows < len(self.offset_C):
            stop = int(self.offset_C[rows])
        summed_CH: Tensor = torch.nn.functional.embedding_bag(
            self.id_E[:stop],
            head.weight_VH,
            offset_C,
            mode="sum",
            per_sample_weights=weights_E[:stop].to(dtype),
        )
        return summed_CH.to(weights_E.dtype).mul_(head.scale)


@dataclass(frozen=True)
class SparseChunk:
    """Rows that are compared with a sparse base, over one softmax for both losses.

    The gradients of the losses are with respect to the head's product.
    """

    nll: Tensor  # of the first rows
    kl: Tensor
    share_CV: Tensor  # q~ by the soft cap's slope, 0 at the entries; in the chunk's buffer
    listed: Listed
    nll_E: Tensor  # gradients at the entries
    kl_E: Tensor
    nll_tail_C: Tensor  # gradients at a token of the tail, over q~
    kl_tail_C: Tensor

    @classmethod
    def of(
        cls,
        logits_CV: Tensor,
        head: Head,
        listed: Listed,
        nlls: int,
        divergence: Divergence,
        rows: int,
    ) -> SparseChunk:
        """The rows with these logits, which are overwritten; the first `nlls` have an NLL.

        So many `rows` at a time are passed over.
        """
        slope_CV = head.slope(logits_CV)
        logq_CB, logq_E = listed.split(logits_CV, rows)
        nll, nll_tail_C = -logq_E[listed.hit_E][:nlls], logq_CB[:, -1].exp()
        nll_E = logq_E.exp() - listed.hit_E.to(logq_E.dtype)
        kl, kl_E, kl_tail_C = listed.compare(logq_CB, logq_E, divergence)
        if slope_CV is not None:
            logits_CV.mul_(slope_CV)
            slope_E = slope_CV[listed.row_E, listed.id_E]
            nll_E, kl_E = nll_E * slope_E, kl_E * slope_E
        return cls(nll, kl, logits_CV, listed, nll_E, kl_E, nll_tail_C, kl_tail_C)

    def hidden_grads(self, head: Head) -> tuple[Tensor, Tensor]:
        """Of both losses, by one product with the head; see `objective.py`."""
        n, tail_CH = len(self.nll), head.pullback(self.share_CV)
        nll_CH = self.listed.embed(head, self.nll_E, n)
        kl_CH = self.listed.embed(head, self.kl_E)
        nll_CH.addcmul_(tail_CH[:n], self.nll_tail_C[:n].unsqueeze(1))
        return nll_CH, kl_CH.addcmul_(tail_CH, self.kl_tail_C.unsqueeze(1))

    def sum_grad(self, up_nll: Tensor, up_kl: Tensor) -> Tensor:
        """Of sum(up_nll * nll) + sum(up_kl * kl), in the buffer."""
        row_E, none = self.listed.row_E, up_nll.new_zeros(len(up_kl) - len(up_nll))
        nll_C = torch.cat([up_nll, none])
        tail_C = nll_C * self.nll_tail_C + up_kl * self.kl_tail_C
        grad_CV = self.share_CV.mul_(tail_C.unsqueeze(1))
        grad_CV[row_E, self.listed.id_E] = self.nll_E * nll_C[row_E] + self.kl_E * up_kl[row_E]
        return grad_CV
