"""What the base makes of the lesson before training: rows it knows, and how foreign the rest is.

Takes losses, mean nats a response token; who has a model computes them (`cli.check`).

A mean loss of L nats is a probability of exp(-L) a token, in the geometric mean: at 0.1 nats the
base gives each next token 0.90, and the gradient of a token's loss with respect to its logits,
softmax minus one-hot, is at most sqrt(2) (1 - p) long: there is little left to learn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from holdfast.data.quality.finding import Finding, Quality, graded


def known_rows(where: Sequence[str], losses: Sequence[float], quality: Quality) -> list[Finding]:
    """Rows whose response the base would write as it stands."""
    rows = [place for place, loss in zip(where, losses, strict=True) if loss < quality.known_nll]
    share = len(rows) / len(losses) if losses else 0.0
    return graded(
        "known",
        share,
        quality.known,
        f"the base already knows {len(rows)} of {len(losses)} responses looked at (mean loss below "
        f"{quality.known_nll:g} nats a token)",
        "leave them out, or keep them as rows that must not change: they teach little",
        rows,
    )


def base_loss_gap(
    lesson: Sequence[float], canary: Sequence[float], quality: Quality
) -> list[Finding]:
    """How much less likely the lesson's responses are to the base than text of its own kind."""
    if min(len(lesson), len(canary)) < 2:
        what = "not looked at: canary.sources has too few rows"
        return [Finding("base loss", "note", what, "name held-out text under canary.sources")]
    here, here_error = _mean(lesson)
    there, there_error = _mean(canary)
    gap, error = here - there, math.hypot(here_error, there_error)
    return [
        Finding(
            "base loss",
            "warning" if gap >= quality.base_loss_gap else "note",
            f"the base's loss is {here:.2f} ± {here_error:.2f} nats a token on the lesson's "
            f"responses, {there:.2f} ± {there_error:.2f} on the canary: {gap:+.2f} ± {error:.2f}",
            "foreign data moves the weights far: keep levers.kl_anchor on, and read the canary",
            figures={"lesson": here, "canary": there, "gap": gap, "stderr": error},
        )
    ]


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error."""
    mean = math.fsum(values) / len(values)
    square = math.fsum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(square / (len(values) - 1) / len(values))
