"""A look at a lesson before it is trained on: findings with the rows they are about.

Nothing is ever edited. Each check is a function of the rows and of `Quality`, whose thresholds and
what they do on data that nobody complains about stand in docs/data-checks.md. Nothing here needs
torch; `known` is given losses.
"""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.data.quality.duplicates import near_duplicates
from holdfast.data.quality.finding import Finding, Quality, Sample, Severity
from holdfast.data.quality.known import base_loss_gap, known_rows
from holdfast.data.quality.leaks import leaks
from holdfast.data.quality.narrowness import narrowness
from holdfast.data.quality.refusals import refusals
from holdfast.data.quality.skew import labels, lengths, openings, scripts
from holdfast.data.quality.unusable import blank_responses, read_lesson, truncated
from holdfast.data.texts import Text

__all__ = [
    "Finding",
    "Quality",
    "Sample",
    "Severity",
    "base_loss_gap",
    "known_rows",
    "leaks",
    "look",
    "read_lesson",
    "truncated",
]


def look(
    samples: Sequence[Sample], canary: Sequence[Text], quality: Quality, seed: int
) -> list[Finding]:
    """Every check that needs no model, over the sound rows of a lesson.

    Args:
        canary: rows of `canary.sources`, if any.
        seed: seeds the bootstrap of `narrowness`.
    """
    if not samples:
        return []
    checks = (near_duplicates, openings, lengths, labels, scripts, refusals)
    return [
        *blank_responses(samples),
        *(finding for check in checks for finding in check(samples, quality)),
        *narrowness(samples, canary, quality, seed),
    ]
