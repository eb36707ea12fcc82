"""What `holdfast check-data` does: read the lesson, run every check, print what was found."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.markup import escape

from holdfast.data.example import EncodeReport
from holdfast.data.quality import (
    Finding,
    base_loss_gap,
    known_rows,
    leaks,
    look,
    read_lesson,
    truncated,
)
from holdfast.data.rows import Row
from holdfast.data.texts import Text, row_texts, text_of
from holdfast.meters.secret import canary_rows, secret_texts
from holdfast.recipe import Recipe

if TYPE_CHECKING:
    from rich.console import Console

    from holdfast.meters.scoring import Scored

SHOWN = 5
"""Rows of a finding that the table shows; --json has them all."""
_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}
_ORDER = tuple(_STYLES)


@dataclass(frozen=True)
class Checked:
    """What was found in a lesson."""

    rows: int
    """Sound rows."""
    model: bool
    """Whether the base was asked, too."""
    findings: tuple[Finding, ...]
    """Errors first, then warnings, then notes."""

    @property
    def exit_code(self) -> int:
        """2 where training would be refused, or what it measures would mean nothing; else 0."""
        return 2 if any(finding.severity == "error" for finding in self.findings) else 0

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        findings = [
            {**asdict(f), "rows": list(f.rows), "count": len(f.rows)} for f in self.findings
        ]
        return {"rows": self.rows, "model": self.model, "findings": findings}

    def show(self, console: Console) -> None:
        """Print each finding with its first rows and what to do, then how many there are."""
        from rich.table import Table

        table = Table("check", "what was found, where, and what to do", show_lines=True)
        for finding in self.findings:
            rows = [f"- {row}" for row in finding.rows[:SHOWN]]
            if len(finding.rows) > SHOWN:
                rows.append(f"- and {len(finding.rows) - SHOWN} more, which --json lists")
            lines = [finding.what, *rows, f"To mend: {finding.mend}"]
            style = _STYLES[finding.severity]
            table.add_row(
                f"[{style}]{finding.severity}[/]\n{finding.check}", escape("\n".join(lines))
            )
        if self.findings:
            console.print(table)
        counts = Counter[str](finding.severity for finding in self.findings)
        told = ", ".join(f"{counts[name]} {name}{'s' * (counts[name] != 1)}" for name in _ORDER)
        without = "" if self.model else "; the base was not asked"
        console.print(f"{self.rows:,} rows: {told}{without}", highlight=False)


def check_data(recipe: Recipe, console: Console, *, with_model: bool) -> Checked:
    """Look at a recipe's lesson, and at its replay rows for contamination.

    Raises:
        RequestError: a file, the canary, a probe or the model cannot be read.
    """
    quality = recipe.quality
    with console.status("reading"):
        canary = [text_of(row) for row in canary_rows(recipe.canary)]
        secrets = secret_texts(recipe.canary, recipe.probes)
        rows, samples, findings = read_lesson(recipe.data.sources)
        lesson = [Text(sample.where, f"{sample.prompt} {sample.response}") for sample in samples]
        practised = [*lesson, *row_texts(recipe.levers.replay.sources_read())]
        findings += leaks(practised, secrets)
    with console.status("looking"):
        findings += look(samples, canary, quality, recipe.seed)
    if with_model and rows:
        findings += _asked(recipe, rows, console)
    findings.sort(key=lambda finding: _ORDER.index(finding.severity))
    return Checked(len(rows), with_model, tuple(findings))


def _asked(recipe: Recipe, rows: Sequence[Row], console: Console) -> list[Finding]:
    """The checks that need the base: rows cut short, rows known, loss against the canary's."""
    from holdfast.data.chat import encode
    from holdfast.meters.scoring import Scored, mean_nlls
    from holdfast.prepare import load, resolve_max_length

    tokenizer, base = load(recipe, console)
    quality = recipe.quality
    max_length = resolve_max_length(recipe, base.config, tokenizer)
    held = list(canary_rows(recipe.canary))
    cut: list[str] = []

    def scored(row: Row) -> list[Scored]:
        report = EncodeReport()
        found = encode(row, tokenizer, max_length=max_length, report=report)
        if report.cut_response:
            cut.append(row.where)
        return [Scored(example.input_ids, example.loss_mask) for example in found]

    def losses(chosen: Sequence[Row]) -> list[tuple[str, float]]:
        """Mean nats a token of each row that has something to learn."""
        texts = [(row.where, text) for row in chosen for text in scored(row)]
        totals: dict[str, float] = defaultdict(float)
        tokens: dict[str, int] = defaultdict(int)
        nlls = mean_nlls(base, [text for _, text in texts])
        for (where, text), nll in zip(texts, nlls, strict=True):
            totals[where] += nll * sum(text.loss_mask)
            tokens[where] += sum(text.loss_mask)
        return [(where, totals[where] / count) for where, count in tokens.items()]

    chosen = _drawn(rows, quality.model_rows, recipe.seed)
    with console.status("asking the base"):
        lesson = losses(chosen)
        findings = truncated(cut, len(chosen), max_length, quality.truncated)
        canary = losses(_drawn(held, quality.model_rows, recipe.seed))
    findings += known_rows([w for w, _ in lesson], [nll for _, nll in lesson], quality)
    return findings + base_loss_gap([n for _, n in lesson], [n for _, n in canary], quality)


def _drawn(rows: Sequence[Row], most: int, seed: int) -> list[Row]:
    """All rows, or so many of them, in their order."""
    if len(rows) <= most:
        return list(rows)
    random = np.random.default_rng(np.random.SeedSequence([seed, 0xDA7A]))
    return [rows[i] for i in sorted(random.choice(len(rows), most, replace=False).tolist())]
