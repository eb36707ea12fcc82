"""Token gate: what each token of the lesson counts, so that what would damage most counts least.

Source: arXiv 2601.02151 (EAFT), 2501.14315 (STM), 2502.02797 (FLOW), 2508.05629 (DFT).
Equation: the lesson's term is 1/T sum_t w_t NLL_t over its T tokens, w without gradient, with
    eaft  w_t = H_t / ln k, H_t the entropy of softmax over the k = 20 largest logits
    stm   w_t = [exp(base NLL_t) <= 2.5] / kept, kept the share of the lesson's tokens that are
    flow  sum_i w_i f_i, w_i = exp(-f_i(base) / tau) / sum_j exp(-f_j(base) / tau), f_i the mean NLL
          of row i, tau the median of f_j(base): w_t = w_i T / (tokens of row i)
    dft   w_t = q(target_t)
Acts on: the lesson's own term; not on replay or anchors. eaft and dft are divided by the number of
tokens, as their papers do. stm (a mean over what is kept) and flow (weights that sum to 1) are
divided by a sum of weights: that of the whole lesson, once, where the papers' code divides each
batch by its own. So a token counts the same in whatever batch it falls, and the learning rate means
what it does without a gate. The official EAFT code divides by 3.0, here it is ln 20 = 2.996.
Estimator: exact. stm and flow look at the base, which is the model as this stage begins.
Cost: eaft, the k largest logits of each lesson position; stm and flow, one pass over the lesson
before training, kept in the run folder; dft, nothing.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, PrivateAttr, model_validator

from holdfast.data.example import Role
from holdfast.errors import HoldfastError, RequestError
from holdfast.files import full_disk_named
from holdfast.levers import Lever, Memory, Setup, StepState, TokenLosses

if TYPE_CHECKING:
    import torch

TOP_K = 20
THRESHOLD = 2.5
OF_METHOD = {"top_k": "eaft", "threshold": "stm", "temperature": "flow"}
"""The method that each setting is for."""
FILE = "base_nll.safetensors"


class TokenGate(Lever):
    """Per-token weights on the lesson. Off unless asked for."""

    OFF: ClassVar = {"method": "none"}

    method: Literal["none", "eaft", "stm", "flow", "dft"] = "none"
    """none, or eaft (less where the model is sure of itself), stm (nothing where the base was too
    surprised), flow (more for rows that the base found easy), dft (less where the target is
    unlikely)."""
    top_k: int | None = Field(default=None, ge=2)
    """eaft: how many of the likeliest tokens the entropy is taken over; empty: 20."""
    threshold: float | None = Field(default=None, ge=1.0)
    """stm: a token of greater base perplexity is not learned; empty: 2.5."""
    temperature: float | None = Field(default=None, gt=0.0)
    """flow: nats a token by which a row's base loss must be higher for its weight to fall by a
    factor of e; empty: the median of the rows' base losses."""
    _rows: dict[bytes, torch.Tensor] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for name, method in OF_METHOD.items():
            if getattr(self, name) is not None and self.method != method:
                raise ValueError(
                    f"{name} is for method: {method}, not {self.method}; leave it out, or set "
                    f"method: {method}"
                )
        return self

    def prepare(self, setup: Setup) -> None:
        """Look at the lesson with the base, for stm and flow.

        Raises:
            RequestError: no token of the lesson would be learned.
        """
        if self.method not in ("stm", "flow"):
            return
        rows = [
            (list(ids), list(mask))
            for stream in setup.lesson
            for ids, mask in map(stream.fetch, range(len(stream.lengths)))
        ]
        nlls = _base_nlls(setup.model, rows, setup.folder / FILE)
        weights = self._kept(nlls, setup) if self.method == "stm" else self._eased(nlls, setup)
        self._rows.update(
            (_key(ids, mask), weight) for (ids, mask), weight in zip(rows, weights, strict=True)
        )

    def _kept(self, nlls: Sequence[torch.Tensor], setup: Setup) -> list[torch.Tensor]:
        """1 / kept for each token whose base perplexity is low enough, else 0."""
        import torch

        threshold = THRESHOLD if self.threshold is None else self.threshold
        every = torch.cat(list(nlls))
        kept = float((every <= math.log(threshold)).double().mean())
        if not kept:
            raise RequestError(
                f"levers.token_gate.threshold: no token of the lesson has a base perplexity of at "
                f"most {threshold:g}; a value that keeps half of them: "
                f"{math.ceil(10 * every.median().exp().item()) / 10:g}"
            )
        setup.notes["token_gate"] = {"tokens_kept": kept}
        return [(nll <= math.log(threshold)).double() / kept for nll in nlls]

    def _eased(self, nlls: Sequence[torch.Tensor], setup: Setup) -> list[torch.Tensor]:
        """FLOW's weight of its row, times the lesson's tokens / the row's, for each token."""
        import torch

        loss_R = torch.stack([nll.mean() for nll in nlls])
        temperature = self.temperature
        if temperature is None:
            temperature = max(float(loss_R.median()), torch.finfo(loss_R.dtype).tiny)
        weight_R = torch.softmax(-loss_R / temperature, 0)
        effective = float(1 / (weight_R.square().sum() * len(weight_R)))
        setup.notes["token_gate"] = {"temperature": temperature, "effective_rows": effective}
        tokens = sum(map(len, nlls))
        return [
            (weight * tokens / len(nll)).expand(len(nll))
            for weight, nll in zip(weight_R, nlls, strict=True)
        ]

    def entropy_over(self) -> int:
        """The k of eaft."""
        return (self.top_k or TOP_K) if self.method == "eaft" else 0

    def token_weights(
        self, out: TokenLosses, state: StepState, memory: Memory
    ) -> torch.Tensor | None:
        """Return w (N,); see the equations at the top."""
        if self.method == "none":
            return None
        if self.method == "dft":
            return out.nll.detach().neg().exp()
        if self.method == "eaft":
            assert out.entropy is not None
            return out.entropy / math.log(self.entropy_over())
        import torch

        parts = [torch.empty(0), *self._looked_up(out)]
        return torch.cat(parts).to(out.nll)

    def _looked_up(self, out: TokenLosses) -> Iterator[torch.Tensor]:
        """Weights of each document of the micro-batch, in the order of its NLLs."""
        import torch

        for ids, roles in _documents(out.batch):
            scored = (roles == Role.TASK) | (roles == Role.REPLAY)
            if not (roles == Role.TASK).any():
                yield torch.ones(int(scored.sum()))
                continue
            weight = self._rows.get(_key(ids, [False, *scored[:-1]]))
            if weight is None:
                raise HoldfastError(
                    "levers.token_gate: a row of the lesson was not there when training began"
                )
            yield weight


def _base_nlls(
    model: Any, rows: Sequence[tuple[list[int], list[bool]]], file: Path
) -> list[torch.Tensor]:
    """NLL (nats) of each learned token of each row: from `file`, if it is of these rows.

    The file is the run's own and so is the model, which is then not looked at.
    """
    import torch
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    from holdfast.meters.scoring import Scored, token_nlls

    keys = b"".join(_key(ids, mask) for ids, mask in rows)
    settings = hashlib.blake2b(keys, digest_size=16).hexdigest()
    counts = [sum(mask[1:]) for _, mask in rows]
    try:
        with safe_open(file, framework="pt") as opened:
            if (opened.metadata() or {}).get("rows") == settings:
                return list(torch.split(opened.get_tensor("nll"), counts))
    except (FileNotFoundError, SafetensorError):
        pass  # not there yet, or not ours
    found = torch.cat(token_nlls(model, [Scored(ids, mask) for ids, mask in rows])).clone()
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with full_disk_named(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file({"nll": found}, temporary, metadata={"rows": settings})
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
    return list(torch.split(found, counts))


def _documents(batch: Any) -> Iterator[tuple[Any, Any]]:
    """Token ids and roles of each document of a micro-batch that has a role, row by row."""
    ids_BW, positions_BW, roles_BW = (
        batch[name].cpu().numpy() for name in ("input_ids", "position_ids", "roles")
    )
    for ids, positions, roles in zip(ids_BW, positions_BW, roles_BW, strict=True):
        starts = np.flatnonzero(positions == 0)
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
            if roles[start:stop].any():
                yield ids[start:stop], roles[start:stop]


def _key(ids: Any, mask: Any) -> bytes:
    """What a document is known by: its token ids, and which of them are learned."""
    content = np.asarray(ids, "<i4").tobytes() + np.asarray(mask[1:], bool).tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()
