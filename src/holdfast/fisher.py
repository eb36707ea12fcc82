"""Fisher information of weights on given rows, from the squared gradient of each row.

Shape suffixes: B rows of a batch, T their positions, C rows of a chunk, N positions scored,
O outputs and I inputs of a matrix, V vocabulary, H hidden size.

    F = sum_b (d/dW sum_t log q(y_bt | x_b))^2 / (scored positions of all rows)

elementwise, so that 1/2 d^T F d is, to second order, the KL divergence of moving by d, in nats a
token (Amari 1998; Kirkpatrick et al. 2017). Labels y are drawn from the model at each position
(`sampled`: the Fisher itself, unbiased) or are the row's own tokens (`empirical`; the two differ,
Kunstner et al. 2019).

One backward pass a batch gives the gradient of each row by itself: a layer's input a and the
gradient g at its output make G_b = g_b^T a_b (Goodfellow 2015), the rows never meet. All uses of
one weight (a module called again, a tied head) are added up before the square is taken. What is no
matrix product goes its own way: norms by `vmap` over the module, anything else (fused experts, a
router) by running that module alone again, row by row.

A factored Fisher keeps means over rows and over columns, F ~ r c^T / mean (Shazeer & Stern 2018).
Where a row of text is short its sums need no G_b: sum_i G_oi^2 = g_o^T (a a^T) g_o.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from holdfast import model as models
from holdfast.data.example import Example
from holdfast.files import full_disk_named
from holdfast.per_sequence import Collector, Flat, Outer, Total

BATCH_TOKENS = 2048
"""Padded tokens of one backward pass."""
LOGIT_BYTES = 256 * 2**20
"""Upper size of a batch's fp32 logits, one row at least."""

Labels = Literal["sampled", "empirical"]


@dataclass(frozen=True)
class Factored:
    """F of a matrix (..., O, I) as rows (..., O) times columns (..., I)."""

    rows: Tensor
    """Mean of F over the inputs."""
    columns: Tensor
    """Mean of F over the outputs, over the mean of all of F."""

    def dense(self) -> Tensor:
        """The matrix (..., O, I) that the factors stand for."""
        return self.rows.unsqueeze(-1) * self.columns.unsqueeze(-2)


Importance = Tensor | Factored


def fisher(
    model: Any,
    rows: Sequence[Example],
    weights: Mapping[str, Tensor],
    *,
    labels: Labels = "sampled",
    factored: bool = False,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
) -> dict[str, Importance]:
    """F of each weight, in nats a token; fp32 (float64 where the model is) on the weight's device.

    Args:
        model: as it stands; its modes and its gradients are left as they were.
        rows: each is read alone; positions that predict a token of its `loss_mask` are scored.
        weights: parameters of the model, trained or not, by any name.
        labels: whose log-likelihood is differentiated.
        factored: two vectors for each matrix; what has one dimension is kept whole.
        seed: of the sampled labels, which do not depend on how the rows are batched.
        batch_tokens: padded tokens of one backward pass, one row at least.

    Raises:
        RequestError: a weight is used in a way that keeps no rows apart.
        ValueError: no row has a position to score, or a weight is not the model's.
    """
    rows = [row for row in rows if any(row.loss_mask[1:])]
    positions = sum(sum(row.loss_mask[1:]) for row in rows)
    if not positions:
        raise ValueError("no row has a token to score")
    totals = {name: Total(weight, factored) for name, weight in weights.items()}
    by_weight = {id(weight): totals[name] for name, weight in weights.items()}
    draws = _uniform([sum(row.loss_mask[1:]) for row in rows], seed) if labels == "sampled" else ()
    vocabulary = models.head(model).weight_VH.shape[0]
    budget = min(batch_tokens, LOGIT_BYTES // (4 * vocabulary))
    training = model.training
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trained:
        parameter.requires_grad_(False)  # gradients of activations are all that is needed
    try:
        with Collector(models.causal_lm(model), by_weight) as collector:
            for batch in _batches([len(row.input_ids) for row in rows], budget):
                u_N = torch.cat([draws[i] for i in batch]) if draws else None
                _backward(model, [rows[i] for i in batch], u_N, collector)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        model.train(training)
    return {name: _finished(total, positions) for name, total in totals.items()}


def _finished(total: Total, positions: int) -> Importance:
    sums = [part / positions for part in total.sums]
    if len(sums) == 1:
        return sums[0]
    rows, columns = sums  # sums over the other dimension
    mean = rows.sum(-1, keepdim=True) / (rows.shape[-1] * columns.shape[-1])
    relative = columns / rows.shape[-1] / mean
    return Factored(rows / columns.shape[-1], torch.where(mean > 0, relative, 1.0))


def _backward(
    model: Any, rows: Sequence[Example], u_N: Tensor | None, collector: Collector
) -> None:
    """One forward and backward pass over rows padded on the right, which no position looks at."""
    head = models.head(model)
    device = head.weight_VH.device
    B, T = len(rows), max(len(row.input_ids) for row in rows)
    ids = torch.zeros(B, T, dtype=torch.long)
    mask = torch.zeros(B, T, dtype=torch.bool)
    for b, row in enumerate(rows):
        ids[b, : len(row.input_ids)] = torch.tensor(row.input_ids)
        mask[b, : len(row.input_ids)] = torch.tensor(row.loss_mask)
    ids, mask = ids.to(device), mask.to(device)
    scored_BT = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
    positions_BT = torch.arange(T, device=device).expand(B, T)
    with collector.batch_of(B, T), torch.enable_grad():
        hidden_BTH = models.hidden_states(model, ids, positions_BT)
    with torch.no_grad():
        logits_NV = head(hidden_BTH[scored_BT])
        slope_NV = head.slope(logits_NV)
        grad_NV = torch.softmax(logits_NV, 1, out=logits_NV)
        label_N1 = ids.roll(-1, 1)[scored_BT].unsqueeze(1) if u_N is None else _drawn(grad_NV, u_N)
        grad_NV.scatter_add_(1, label_N1, grad_NV.new_full(label_N1.shape, -1))
        if slope_NV is not None:
            grad_NV *= slope_NV
        weight_VH = head.weight_VH
        grad_BTH = torch.zeros_like(hidden_BTH)
        grad_BTH[scored_BT] = (
            (grad_NV.to(weight_VH.dtype) @ weight_VH).mul_(head.scale).to(grad_BTH.dtype)
        )
        weight_use, bias_use = map(collector.wants, (weight_VH, head.bias_V))
        if weight_use or bias_use:
            grad_BTV = grad_NV.new_zeros(B, T, grad_NV.shape[1])
            grad_BTV[scored_BT] = grad_NV.mul_(head.scale)
            if weight_use:
                hidden = hidden_BTH.detach().to(grad_NV.dtype)
                collector.add(weight_VH, Outer(grad_BTV, hidden), expected=True)
            if head.bias_V is not None and bias_use:
                collector.add(head.bias_V, Flat(grad_BTV.sum(1)), expected=True)
    torch.autograd.backward(hidden_BTH, grad_BTH)
    collector.end()


def _uniform(counts: Sequence[int], seed: int) -> Sequence[Tensor]:
    """A number in [0, 1) for each scored position of each row."""
    generator = torch.Generator().manual_seed(seed)
    return torch.split(torch.rand(sum(counts), generator=generator), list(counts))


def _drawn(probability_NV: Tensor, u_N: Tensor) -> Tensor:
    """Labels (N, 1) by inverting the distribution function at u."""
    cumulative_NV = probability_NV.cumsum(1)
    u_N1 = u_N.to(cumulative_NV).unsqueeze(1) * cumulative_NV[:, -1:]
    return torch.searchsorted(cumulative_NV, u_N1, right=True).clamp_(
        max=cumulative_NV.shape[1] - 1
    )


def _batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices by falling length, so that little is padded; rows x longest within the budget."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def kept(
    file: Path,
    settings: Mapping[str, Any],
    device: torch.device,
    make: Callable[[], dict[str, Importance]],
) -> dict[str, Importance]:
    """What `file` holds if it was made with the same settings; else make it and keep it there."""
    key = json.dumps(settings, sort_keys=True)
    try:
        with safe_open(file, framework="pt", device=str(device)) as opened:
            if (opened.metadata() or {}).get("settings") == key:
                return _named({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    except (FileNotFoundError, SafetensorError):
        pass  # not there yet, or not ours
    made = make()
    parts: dict[str, Tensor] = {}
    for name, value in made.items():
        if isinstance(value, Factored):
            parts |= {f"rows/{name}": value.rows, f"columns/{name}": value.columns}
        else:
            parts[f"diagonal/{name}"] = value
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with full_disk_named(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            contiguous = {name: part.cpu().contiguous() for name, part in parts.items()}
            save_file(contiguous, temporary, metadata={"settings": key})
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
    return made


def _named(parts: Mapping[str, Tensor]) -> dict[str, Importance]:
    found: dict[str, Importance] = {}
    for name, part in parts.items():
        kind, _, of = name.partition("/")
        if kind == "diagonal":
            found[of] = part
        elif kind == "rows":
            found[of] = Factored(part, parts[f"columns/{of}"])
    return found


def size(importances: Mapping[str, Importance]) -> int:
    """Bytes held."""
    tensors = [
        part
        for value in importances.values()
        for part in ((value.rows, value.columns) if isinstance(value, Factored) else (value,))
    ]
    return sum(map(partial(_bytes), tensors))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
