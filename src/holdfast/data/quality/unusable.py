"""Unusable rows: what training would refuse, and what teaches nothing though it is sound."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from holdfast.data.quality.finding import Finding, Sample
from holdfast.data.rows import Row, Source, Unsound, read_rows
from holdfast.data.texts import prompt_and_response


def read_lesson(sources: Iterable[Source]) -> tuple[list[Row], list[Sample], list[Finding]]:
    """The sound rows of a lesson, what they say, and a finding for each row that is not sound."""
    rows: list[Row] = []
    findings: list[Finding] = []
    for source in sources:
        formats: dict[str, str] = {}
        for row in read_rows(source, need_response=True):
            if isinstance(row, Unsound):
                findings += [_unusable(row.where, problem) for problem in row.problems]
            else:
                rows.append(row)
                formats.setdefault(row.format, row.where)
        if len(formats) > 1:
            told = ", ".join(f"{name} (first at {where})" for name, where in formats.items())
            findings.append(_unusable(source.path, f"mixes formats: {told}; keep one in a source"))
    samples = [Sample(row.where, *prompt_and_response(row)) for row in rows]
    return rows, samples, findings


def blank_responses(samples: Sequence[Sample]) -> list[Finding]:
    """Responses of whitespace: they are learned, as saying nothing."""
    rows = tuple(sample.where for sample in samples if not sample.response.strip())
    if not rows:
        return []
    what = f"{len(rows)} responses are but whitespace"
    mend = "write the response, or delete the row: it teaches to say nothing"
    return [Finding("blank responses", "warning", what, mend, rows)]


def truncated(cut: Sequence[str], rows: int, max_length: int, threshold: float) -> list[Finding]:
    """Rows whose response loses its end; `cut` says where they stand, of so many rows."""
    if not cut:
        return []
    share = len(cut) / rows
    return [
        Finding(
            "truncated",
            "warning" if share >= threshold else "note",
            f"{len(cut)} of {rows} rows looked at lose the end of their response at {max_length} "
            "tokens",
            "raise data.max_length, or shorten or split the rows: the model would learn to stop "
            "nowhere",
            tuple(cut),
            {"share": share, "threshold": threshold, "max_length": max_length},
        )
    ]


def _unusable(where: str, problem: str) -> Finding:
    what, semicolon, mend = problem.rpartition("; ")
    if not semicolon:
        what, mend = problem, "mend the row, or delete it"
    return Finding("unusable", "error", what, mend, (where,))
