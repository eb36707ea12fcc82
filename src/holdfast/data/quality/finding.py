"""What a check says, what it looks at, and from when on it speaks up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field

from holdfast.section import Section

Severity = Literal["note", "warning", "error"]
"""note: good to know. warning: likely to cost what is learned or kept. error: training is refused,
or what is measured means nothing."""


class Quality(Section):
    """From when on `holdfast check-data` warns. Training reads none of this."""

    near_duplicate: float = Field(default=0.8, gt=0.0, le=1.0)
    """Jaccard similarity of two rows' word 5-grams that makes them near-duplicates."""
    duplicates: float = Field(default=0.1, ge=0.0, le=1.0)
    """Share of rows that repeat an earlier one, exactly or nearly."""
    openings: float = Field(default=0.2, ge=0.0, le=1.0)
    """Share of responses that begin with the same four words."""
    length_skew: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of all response words that the longest tenth of the rows holds."""
    label_majority: float = Field(default=0.8, ge=0.0, le=1.0)
    """Share of the commonest label, where the responses are labels."""
    refusals: float = Field(default=0.02, ge=0.0, le=1.0)
    """Share of responses that refuse."""
    narrowness: float = Field(default=0.2, ge=0.0, le=1.0)
    """Bits of Jensen-Shannon divergence between the lesson's words and the canary's, beyond that
    between two halves of the canary."""
    base_loss_gap: float = Field(default=1.0, ge=0.0)
    """Nats a token that the base's loss on the lesson's responses lies above that on the canary."""
    known_nll: float = Field(default=0.1, ge=0.0)
    """The base knows a response whose mean loss is below this, in nats a token."""
    known: float = Field(default=0.2, ge=0.0, le=1.0)
    """Share of rows that the base already knows."""
    truncated: float = Field(default=0.01, ge=0.0, le=1.0)
    """Share of rows whose response is cut at `data.max_length`."""
    model_rows: int = Field(default=1000, ge=1)
    """Rows that the base reads, drawn with the recipe's seed; all of them where there are fewer."""


@dataclass(frozen=True)
class Sample:
    """One sound row as the checks see it."""

    where: str
    prompt: str
    response: str


@dataclass(frozen=True)
class Finding:
    """One thing a check found."""

    check: str
    severity: Severity
    what: str
    mend: str
    """What to do about it."""
    rows: tuple[str, ...] = ()
    """Where the rows stand that it is about."""
    figures: dict[str, float] = field(default_factory=dict)


def graded(
    check: str,
    share: float,
    threshold: float,
    what: str,
    mend: str,
    rows: Sequence[str] = (),
    **figures: float,
) -> list[Finding]:
    """A warning where `share` reaches the threshold, a note below it, nothing at 0."""
    if not share:
        return []
    severity: Severity = "warning" if share >= threshold else "note"
    figures = {"share": share, "threshold": threshold, **figures}
    return [Finding(check, severity, what, mend, tuple(rows), figures)]
