"""Contamination as findings: the rows that training refuses, and those that only come close."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from holdfast.data import contamination
from holdfast.data.quality.finding import Finding
from holdfast.data.texts import Text


def leaks(rows: Iterable[Text], secrets: Sequence[Text]) -> list[Finding]:
    """An error for rows that are also in the canary or a probe; a note for shared passages."""
    if not secrets:
        what = "not looked at: the recipe names no probes and no canary.sources"
        return [Finding("contamination", "note", what, "name what must not be forgotten")]
    found = contamination.overlaps(rows, secrets)
    copies = [overlap for overlap in found if overlap.contaminated]
    close = [overlap for overlap in found if not overlap.contaminated]
    findings = []
    if copies:
        findings.append(
            Finding(
                "contamination",
                "error",
                f"{len(copies)} rows are also in the canary or a probe",
                "delete the rows, or take the others out of what is measured; training refuses",
                _told(copies),
            )
        )
    if close:
        findings.append(
            Finding(
                "shared passages",
                "note",
                f"{len(close)} rows share {contamination.N} words or more in a row with the canary "
                f"or a probe, at most {max(o.share for o in close):.0%} of the shorter text",
                "look at the ones that share most; stock phrases and quotations are harmless",
                _told(sorted(close, key=lambda overlap: -overlap.share)),
            )
        )
    return findings


def _told(found: Iterable[contamination.Overlap]) -> tuple[str, ...]:
    return tuple(f"{o.row} ({o.share:.0%} in {o.secret}: '{o.matched}')" for o in found)
