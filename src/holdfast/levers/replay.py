"""Replay: rows of the base's kind beside the lesson, as an exact share of the tokens.

Source: Robins 1995; 1 % suffices where it is the base's own data (arXiv 2502.06042).
Equation: ntp adds weight * mean NLL of replay tokens; with the default weight r / (1 - r) the loss
is the textbook (1 - r) L_lesson + r L_replay, up to a constant factor.
Acts on: the mixture; the loss when `loss: ntp`.
Default loss: kl. Hard labels of a corpus that is not the base's own can be worse than no replay
(Llama-3.2-1B: 46.0 against 49.1 without, 52.7 for KL on the same text, arXiv 2605.26097).
Cost: `fraction` of the tokens of each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from holdfast.data.example import Role
from holdfast.data.rows import Source
from holdfast.levers import Lever, Memory, Setup, StepState, Term, TokenLosses, shared_sum

if TYPE_CHECKING:
    from holdfast.data.mixture import Stream


class Replay(Lever):
    """Old data to keep reading. Without `sources` the lever is off."""

    OFF: ClassVar = {"fraction": 0.0}

    sources: list[Source] = Field(default_factory=list)
    """Files, folders or hub ids, with `domain` and `proportion` where there are several."""
    fraction: float = Field(default=0.2, ge=0.0, lt=1.0)
    """Share of each step's tokens, exact to within one row over the whole run. 0 turns it off."""
    loss: Literal["kl", "ntp"] = "kl"
    """kl: the rows are anchor rows for `kl_anchor`. ntp: next-token loss, for the base's own
    pretraining data."""
    weight: float | None = Field(default=None, ge=0.0)
    """Weight of the ntp loss beside the lesson's; empty: fraction / (1 - fraction)."""

    @property
    def off(self) -> bool:
        """True when nothing is replayed."""
        return not self.sources or self.fraction == 0

    def streams(self, setup: Setup) -> Sequence[Stream]:
        """One stream a domain, each with its own exact share of the tokens."""
        if self.off:
            return ()
        from holdfast.data.replay_rows import domain_streams

        role = Role.ANCHOR if self.loss == "kl" else Role.REPLAY
        streams, report = domain_streams(
            self.sources, setup.tokenizer, setup.max_length, self.fraction, role, setup.folder
        )
        setup.notes["replay"] = report
        return streams

    def terms(self, out: TokenLosses, state: StepState, memory: Memory) -> dict[str, Term]:
        """Weight * sum NLL / (replay positions of the whole step)."""
        if self.off or self.loss == "kl" or not state.totals[Role.REPLAY]:
            return {}
        weight = self.fraction / (1 - self.fraction) if self.weight is None else self.weight
        sum_nll = shared_sum(out.nll, out.nll_roles == Role.REPLAY)
        return {"replay": Term(sum_nll, state.totals[Role.REPLAY], weight)}
