"""The arithmetic of one pass: chunk by chunk, logits to losses and their gradients.

Shape suffixes as in `objective.py`: P positions of a pass, C of one chunk, b of a block of it,
H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from holdfast.divergence import Divergence
from holdfast.head import Head, add_product, wide
from holdfast.sparse import Listed, SparseBase, SparseChunk

CHUNK_BYTES = 256 * 2**20
"""Upper size of one chunk's fp32 logits on an accelerator: some hundred rows at least, so that
products with the head are bound by arithmetic and launches do not count."""
CPU_CHUNK_BYTES = 64 * 2**20
"""The same on a CPU, whose products are at full speed from about 128 rows."""
CPU_CHUNK_ROWS = 512
"""On a CPU a chunk is no longer, all its buffers together: more rows are no faster, and no longer
lie in a cache."""
BLOCK_BYTES = 32 * 2**20
"""Rows of a chunk that are worked on at a time, elementwise: what they need beside the chunk's own
buffers is little, and launches do not count."""
CPU_BLOCK_BYTES = 2**20
"""The same on a CPU, whose second-level cache they stay in; the divergence is twice as fast."""


def chunk_rows(device: str, tokens: int, buffers: int = 1) -> int:
    """Rows of a chunk on a device of this type, whose logits are over so many tokens."""
    if device == "cpu":
        return max(1, min(CPU_CHUNK_ROWS // buffers, CPU_CHUNK_BYTES // (4 * tokens)))
    return max(1, CHUNK_BYTES // (4 * tokens))


def block_rows(device: str, tokens: int) -> int:
    """Rows of a block of it."""
    return max(1, (CPU_BLOCK_BYTES if device == "cpu" else BLOCK_BYTES) // (4 * tokens))


@dataclass(frozen=True)
class DenseBase:
    """A live base: its last hidden states (M, H) at the KL positions, and its head."""

    hidden_MH: Tensor
    head: Head


Base = DenseBase | SparseBase


class Rows(NamedTuple):
    """Where some rows lie: among a pass's positions, its NLL values and its KL values."""

    all: slice
    nll: slice
    kl: slice

    @property
    def nlls(self) -> int:
        """How many have an NLL: the first ones. Either none or all have a KL."""
        return int(self.nll.stop - self.nll.start)

    @property
    def kls(self) -> int:
        """How many have a KL."""
        return int(self.kl.stop - self.kl.start)


class Upstream(NamedTuple):
    """What each loss weighs: the gradient of something with respect to it."""

    nll: Tensor
    kl: Tensor

    def of(self, rows: Rows) -> Upstream:
        """That of the losses of these rows."""
        return Upstream(self.nll[rows.nll], self.kl[rows.kl])

    def normalised(self, dtype: torch.dtype) -> Upstream:
        """The largest is 1, so that fp16 holds what they weigh, as it does without weights."""
        both = torch.cat(self).detach().to(dtype)
        if len(both):
            both /= both.abs().amax().clamp_min(torch.finfo(dtype).tiny)
        return Upstream(both[: len(self.nll)], both[len(self.nll) :])

    def factor_to(self, actual: Upstream) -> Tensor | None:
        """The s with actual = s * self but for rounding; None where there is none."""
        mine, other = torch.cat(self), torch.cat(actual)
        if not len(mine):
            return mine.new_ones(())
        at = mine.abs().argmax()
        scaled = mine * (other[at] / mine[at])
        near = (other - scaled).abs() <= 8 * torch.finfo(mine.dtype).eps * scaled.abs()
        return other[at] / mine[at] if bool(near.all()) else None


@dataclass
class TopEntropy:
    """Asks for the entropy (nats) of softmax over the largest logits at the NLL positions."""

    top: int
    """How many logits; all of a smaller vocabulary."""
    nll_N: Tensor | None = None
    """The answer, one for each NLL; without gradient."""

    def look(self, logits_CV: Tensor, rows: Rows) -> None:
        """Take those of a chunk's rows, in the order of the pass."""
        assert self.nll_N is not None
        largest_nk = logits_CV[: rows.nlls].topk(min(self.top, logits_CV.shape[1]), dim=1).values
        self.nll_N[rows.nll] = torch.special.entr(largest_nk.softmax(1)).sum(1)


class Values(NamedTuple):
    """Of a pass or of some rows of it."""

    nll: Tensor
    kl: Tensor


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""With respect to hidden states, head and bias; None where it is not needed."""


@dataclass(frozen=True)
class Pass:
    """One pass over P positions: first those with NLL alone, then both, then KL alone."""

    head: Head
    targets_P: Tensor
    nlls: int
    kls: int
    base: Base | None
    base_rows: Tensor
    """(kls,): where the base keeps each position."""
    divergence: Divergence
    expected: Upstream | None
    """Form the gradient of the losses so weighed in forward."""
    apart: bool
    """Form the gradients with respect to the hidden states in forward, one for each loss."""
    entropy: TopEntropy | None = None

    def rows(self, start: int, stop: int) -> Rows:
        """Rows of positions start:stop, which are NLL alone or KL throughout."""
        alone = len(self.targets_P) - self.kls
        nll = slice(min(start, self.nlls), min(stop, self.nlls))
        return Rows(slice(start, stop), nll, slice(max(start - alone, 0), max(stop - alone, 0)))

    def chunks(self) -> Iterator[tuple[Rows, list[Tensor]]]:
        """Rows of each chunk and (rows, V) buffers for it: two where there is a KL, else one.

        One is enough for a sparse base whose divergence has the NLL's softmax. KL positions have
        chunks of their own: the logits of both sides come from products of the same shape (and the
        same alignment, see `logit_chunk`), so that equal ones are equal to the last bit.
        """
        weight_VH, positions = self.head.weight_VH, len(self.targets_P)
        count = 2 if self.kls and self.one_softmax is None else 1
        rows_at_most = chunk_rows(weight_VH.device.type, weight_VH.shape[0], count)
        size = max(1, min(positions, rows_at_most))
        buffers = [
            weight_VH.new_empty((size, weight_VH.shape[0]), dtype=wide(weight_VH.dtype))
            for _ in range(count)
        ]
        for first, last in ((0, positions - self.kls), (positions - self.kls, positions)):
            for i in range(first, last, size):
                rows = self.rows(i, min(i + size, last))
                yield rows, [buffer[: rows.all.stop - i] for buffer in buffers]

    @property
    def one_softmax(self) -> SparseBase | None:
        """The base, where it is sparse and compared with the softmax that the NLL needs too."""
        sparse = isinstance(self.base, SparseBase) and self.divergence.temperature == 1
        return self.base if sparse else None  # type: ignore[return-value]

    def empty_values(self) -> Values:
        """Of all positions."""
        dtype = wide(self.head.weight_VH.dtype)
        return Values(
            *(self.head.weight_VH.new_empty(n, dtype=dtype) for n in (self.nlls, self.kls))
        )

    def values(self, hidden_PH: Tensor) -> Values:
        """The losses alone."""
        found = self.empty_values()
        for rows, buffers in self.chunks():
            hidden_CH = hidden_PH[rows.all]
            if rows.kls and self.one_softmax is not None:
                part = self.sparse_chunk(hidden_CH, rows, buffers[0], self.one_softmax)[0]
            else:
                part, *_ = self.logit_chunk(hidden_CH, rows, buffers, grad=False)
            found.nll[rows.nll], found.kl[rows.kl] = part
        return found

    def values_and_grads(self, hidden_PH: Tensor) -> tuple[Values, Tensor, Tensor]:
        """The losses, and of each its gradient with respect to the hidden states."""
        found = self.empty_values()
        nll_PH, kl_PH = (hidden_PH.new_empty(len(of), hidden_PH.shape[1]) for of in found)
        for rows, buffers in self.chunks():
            hidden_CH = hidden_PH[rows.all]
            if rows.kls and self.one_softmax is not None:
                part, chunk = self.sparse_chunk(hidden_CH, rows, buffers[0], self.one_softmax)
                nll_PH[rows.nll], kl_PH[rows.kl] = chunk.hidden_grads(self.head)
            else:
                part, nll_CV, kl_CV = self.logit_chunk(hidden_CH, rows, buffers, grad=True)
                nll_PH[rows.nll] = self.head.pullback(nll_CV)
                if kl_CV is not None:
                    kl_PH[rows.kl] = self.head.pullback(kl_CV)
            found.nll[rows.nll], found.kl[rows.kl] = part
        return found, nll_PH, kl_PH

    def values_and_sum_grad(
        self, hidden_PH: Tensor, up: Upstream, needed: Sequence[bool]
    ) -> tuple[Values, Gradients]:
        """The losses, and the gradient of sum(up.nll * nll) + sum(up.kl * kl)."""
        head, found = self.head, self.empty_values()
        weight_VH, bias_V = head.weight_VH, head.bias_V
        grad_PH = torch.empty_like(hidden_PH) if needed[0] else None
        dtype = wide(weight_VH.dtype)
        grad_VH = torch.zeros_like(weight_VH, dtype=dtype) if needed[1] else None
        grad_V = torch.zeros_like(bias_V, dtype=dtype) if bias_V is not None and needed[2] else None
        for rows, buffers in self.chunks():
            hidden_CH = hidden_PH[rows.all]
            if rows.kls and self.one_softmax is not None:
                part, chunk = self.sparse_chunk(hidden_CH, rows, buffers[0], self.one_softmax)
                grad_CV = chunk.sum_grad(*up.of(rows))
            else:
                part, grad_CV, _ = self.logit_chunk(
                    hidden_CH, rows, buffers, grad=True, up=up.of(rows)
                )
            found.nll[rows.nll], found.kl[rows.kl] = part
            if grad_PH is not None:
                grad_PH[rows.all] = head.pullback(grad_CV)
            if grad_VH is not None:
                narrow_VC = grad_CV.T.to(weight_VH.dtype)
                add_product(grad_VH, narrow_VC, hidden_CH.to(weight_VH.dtype), head.scale)
            if grad_V is not None:
                grad_V.add_(grad_CV.sum(0), alpha=head.scale)
        return found, (
            grad_PH,
            None if grad_VH is None else grad_VH.to(weight_VH.dtype),
            None if grad_V is None else grad_V.to(weight_VH.dtype),
        )

    def sparse_chunk(
        self, hidden_CH: Tensor, rows: Rows, buffer: Tensor, base: SparseBase
    ) -> tuple[Values, SparseChunk]:
        """The rows' losses over one softmax, and what their gradients are made of."""
        logits_CV = self.head(hidden_CH, buffer)
        if self.entropy is not None:
            self.entropy.look(logits_CV, rows)
        listed = Listed.of(base, self.base_rows[rows.kl], self.targets_P[rows.all])
        step = block_rows(logits_CV.device.type, logits_CV.shape[1])
        chunk = SparseChunk.of(logits_CV, self.head, listed, rows.nlls, self.divergence, step)
        return Values(chunk.nll, chunk.kl), chunk

    def logit_chunk(
        self,
        hidden_CH: Tensor,
        rows: Rows,
        buffers: list[Tensor],
        *,
        grad: bool,
        up: Upstream | None = None,
    ) -> tuple[Values, Tensor, Tensor | None]:
        """The rows' losses, and the gradients of both with respect to h W^T + b, over the scale.

        The gradients lie in the buffers, that of the KL over the tokens that the base knows; with
        `up` that of the weighted sum lies in the first, over all rows.
        """
        if isinstance(self.base, DenseBase) and rows.kls:
            # as the base's rows do, these begin where an allocation does: MKL sums unaligned rows
            # in another order
            hidden_CH = hidden_CH.clone()
        logits_CV = self.head(hidden_CH, buffers[0])
        if self.entropy is not None:
            self.entropy.look(logits_CV, rows)
        at, kl_CV = self.base_rows[rows.kl], None
        if isinstance(self.base, DenseBase) and rows.kls:
            tokens = min(logits_CV.shape[1], self.base.head.weight_VH.shape[0])
            space = buffers[1].flatten()[: rows.kls * tokens].view(rows.kls, tokens)
            kl_CV = self.base.head.first(tokens)(self.base.hidden_MH[at], space)
        elif rows.kls:
            kl_CV = buffers[1]
        nlls, kls = [], []
        positions = rows.all.stop - rows.all.start
        step = block_rows(logits_CV.device.type, logits_CV.shape[1])
        for i in range(0, positions, step):
            part = slice(i, i + step)
            n = max(0, min(rows.nlls - i, step))
            logits_bV, targets_b = logits_CV[part], self.targets_P[rows.all][part]
            slope_bV = self.head.slope(logits_bV) if grad else None
            kl_grad_bV = None
            shared = n > 0 and self._shares_softmax
            if shared:
                torch.log_softmax(logits_bV, 1, out=logits_bV)
            if kl_CV is not None:
                kl, kl_grad_bV = self._divergence(
                    logits_bV, kl_CV[part], at[part], targets_b, normalised=shared
                )
                kls.append(kl)
            nlls.append(_nll(logits_bV[:n], targets_b[:n], grad=grad, normalised=shared))
            if up is not None:
                logits_bV[:n] *= up.nll[part].unsqueeze(1)
                if kl_grad_bV is not None:
                    logits_bV[n:] = 0
                    logits_bV[:, : kl_grad_bV.shape[1]].addcmul_(
                        kl_grad_bV, up.kl[part].unsqueeze(1)
                    )
            elif kl_CV is not None and kl_grad_bV is not None:
                if slope_bV is not None:
                    kl_grad_bV *= slope_bV[:, : kl_CV.shape[1]]
                kl_CV[part] = kl_grad_bV
            if slope_bV is not None:
                logits_bV *= slope_bV
        values = Values(torch.cat(nlls), torch.cat(kls) if kls else logits_CV.new_empty(0))
        return values, logits_CV if up is not None else logits_CV[: rows.nlls], kl_CV

    @property
    def _shares_softmax(self) -> bool:
        """Whether a dense base is compared with the softmax that the NLL needs too."""
        return (
            isinstance(self.base, DenseBase)
            and self.divergence.temperature == 1
            and len(self.base.head.weight_VH) >= len(self.head.weight_VH)
        )

    def _divergence(
        self,
        logits_CV: Tensor,
        base_CV: Tensor,
        at: Tensor,
        targets_C: Tensor,
        *,
        normalised: bool,
    ) -> tuple[Tensor, Tensor]:
        """D and its gradient over the base's tokens; a dense base's logits are overwritten."""
        temperature = self.divergence.temperature
        logits_CV = logits_CV[:, : base_CV.shape[1]]
        if isinstance(self.base, SparseBase):
            share_CV, listed = logits_CV / temperature, Listed.of(self.base, at, targets_C)
            kl, grad_E, tail_grad_C = listed.compare(
                *listed.split(share_CV, len(share_CV)), self.divergence
            )
            grad_CV = share_CV.mul_(tail_grad_C.unsqueeze(1))
            grad_CV[listed.row_E, listed.id_E] = grad_E
            return kl, grad_CV
        if normalised:
            logq_CV = logits_CV.clone()
        else:
            logq_CV = (logits_CV if temperature == 1 else logits_CV / temperature).log_softmax(1)
        if temperature != 1:
            base_CV /= temperature
        logp_CV = torch.log_softmax(base_CV, 1, out=base_CV)
        return self.divergence.value_and_grad(logp_CV, logq_CV, targets_C)


def _nll(logits_CV: Tensor, targets_C: Tensor, *, grad: bool, normalised: bool) -> Tensor:
    """NLL (C,); where asked for, its gradient takes the place of the logits."""
    target_C1 = targets_C.unsqueeze(1)
    logq_CV = logits_CV if normalised else torch.log_softmax(logits_CV, 1, out=logits_CV)
    nll_C = -logq_CV.gather(1, target_C1).squeeze(1)
    if grad:
        q_CV = logq_CV.exp_()
        q_CV.scatter_add_(1, target_C1, q_CV.new_full(target_C1.shape, -1))
    return nll_C
