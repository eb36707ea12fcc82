"""The step: one forward over lesson and anchor rows, terms from the levers, one loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from holdfast import model as models
from holdfast import objective
from holdfast.data.example import Role
from holdfast.divergence import Divergence
from holdfast.levers import Lever, Memory, StepState, Term, TokenLosses, combined, shared_sum
from holdfast.reference import Reference

Terms = Callable[[TokenLosses], Mapping[str, Term]]
"""What the loss is made of, given the token losses."""


def token_losses(
    model: Any,
    batch: Mapping[str, Tensor],
    kl_roles: frozenset[Role],
    reference: Reference | None,
    divergence: Divergence | None = None,
    kl_B: Tensor | None = None,
    levers: Sequence[Lever] = (),
    terms: Terms | None = None,
) -> TokenLosses:
    """One forward pass, then per-token losses only where somebody needs them.

    `batch` is a `MicroBatch`: input_ids, position_ids, targets, roles, each (B, W). Where `kl_B` is
    given, the other rows have no KL, and rows without any loss are not passed through the model.
    Of `levers` one may compute the hidden states in another way. `terms` of the loss, if given, are
    asked beforehand what each token's losses will weigh.
    """
    if kl_B is not None:
        batch, kl_B = _needed(batch, kl_roles, kl_B)
    roles_BW = batch["roles"]
    nll_BW = (roles_BW == Role.TASK) | (roles_BW == Role.REPLAY)
    kl_BW = torch.zeros_like(nll_BW)
    if reference is not None:
        for role in kl_roles:
            kl_BW |= roles_BW == role
    if kl_B is not None:
        kl_BW &= kl_B.unsqueeze(1)
    base = None
    if reference is not None and bool(kl_BW.any()):
        # first, so that what it needs in passing does not come on top of the activations kept
        base = reference.view(batch["input_ids"], batch["position_ids"], kl_BW)
    others = (lever.hidden(model, batch) for lever in levers)
    hidden_BWH = next((hidden for hidden in others if hidden is not None), None)
    if hidden_BWH is None:
        hidden_BWH = models.hidden_states(model, batch["input_ids"], batch["position_ids"])
    nll_roles_N, kl_roles_M = roles_BW[nll_BW], roles_BW[kl_BW]
    top = max((lever.entropy_over() for lever in levers), default=0)
    entropy = objective.TopEntropy(top) if top else None
    nll_weight_N = kl_weight_M = None
    if terms is not None and torch.is_grad_enabled():
        nll_weight_N, kl_weight_M = expected_weights(
            nll_roles_N, kl_roles_M, batch, terms, entropy=entropy is not None
        )
    nll_N, kl_M = objective.token_losses(
        hidden_BWH.flatten(0, 1),
        models.head(model),
        batch["targets"].flatten(),
        nll_N=nll_BW.flatten(),
        kl_N=kl_BW.flatten(),
        base=base,
        divergence=divergence or Divergence(),
        nll_weight=nll_weight_N,
        kl_weight=kl_weight_M,
        entropy=entropy,
    )
    entropy_N = None if entropy is None else entropy.nll_N
    return TokenLosses(nll_N, nll_roles_N, kl_M, kl_roles_M, batch, entropy_N)


def expected_weights(
    nll_roles_N: Tensor,
    kl_roles_M: Tensor,
    batch: Mapping[str, Tensor],
    terms: Terms,
    *,
    entropy: bool,
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """What each loss will weigh in the loss of the step, but for a common factor.

    The terms are asked on made-up losses (and entropies), all 0 and then all 1: what weighs the
    same in both is taken not to hang on the values. Nothing is expected (None) where it does.
    """
    found = []
    for value in (0.0, 1.0):
        nll_N, kl_M = (
            torch.full(roles.shape, value, device=roles.device, requires_grad=True)
            for roles in (nll_roles_N, kl_roles_M)
        )
        entropy_N = nll_N.detach() if entropy else None
        out = TokenLosses(nll_N, nll_roles_N, kl_M, kl_roles_M, batch, entropy_N)
        found.append(torch.autograd.grad(total_loss(out, terms(out)), (nll_N, kl_M)))
    (nll_weight_N, kl_weight_M), again = found
    same = torch.equal(nll_weight_N, again[0]) and torch.equal(kl_weight_M, again[1])
    return (nll_weight_N, kl_weight_M) if same else (None, None)


def kl_rows(levers: Sequence[Lever], input_ids_BW: Tensor, state: StepState) -> Tensor | None:
    """Rows (B,) of a micro-batch on which some lever takes its KL; None: all of them."""
    asked = [lever.kl_rows(input_ids_BW, state) for lever in levers if lever.kl_roles()]
    some = [rows_B for rows_B in asked if rows_B is not None]
    return torch.stack(some).any(0) if some and len(some) == len(asked) else None


def _needed(
    batch: Mapping[str, Tensor], kl_roles: frozenset[Role], kl_B: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """The rows of a micro-batch that have a loss, and their `kl_B`; never none of them."""
    roles_BW = batch["roles"]
    some_B = ((roles_BW == Role.TASK) | (roles_BW == Role.REPLAY)).any(1)
    for role in kl_roles:
        some_B = some_B | (kl_B & (roles_BW == role).any(1))
    some_B[0] |= ~some_B.any()  # the step needs a graph
    names = ("input_ids", "position_ids", "targets", "roles")
    return {name: batch[name][some_B] for name in names}, kl_B[some_B]


def loss_terms(
    out: TokenLosses, state: StepState, levers: Sequence[Lever], memory: Mapping[str, Memory]
) -> dict[str, Term]:
    """The lesson's own term (mean NLL of its response tokens, weighed) and those of every lever.

    The levers' are multiplied by what `strengths` says.
    """
    terms: dict[str, Term] = {}
    if state.totals[Role.TASK]:
        weighed = out.nll
        for lever in levers:
            weight_N = lever.token_weights(out, state, memory[lever.key])
            weighed = weighed if weight_N is None else weighed * weight_N
        sum_nll = shared_sum(weighed, out.nll_roles == Role.TASK)
        terms["task"] = Term(sum_nll, state.totals[Role.TASK], 1.0)
    factor = combined(levers, memory).weight
    for lever in levers:
        found = lever.terms(out, state, memory[lever.key])
        terms |= {name: replace(term, weight=term.weight * factor) for name, term in found.items()}
    return terms


def total_loss(out: TokenLosses, terms: Mapping[str, Term]) -> Tensor:
    """Sum over terms of weight * sum / count; attached to the graph even without a term."""
    loss = out.nll.sum() * 0.0 + out.kl.sum() * 0.0
    for term in terms.values():
        loss = loss + term.weight * (term.sum / term.count)
    return loss
