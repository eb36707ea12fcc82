"""What the report and the model card are written from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.gate.verdict import GateResult
    from holdfast.report.frontier import Mark
    from holdfast.report.items import Changed


@dataclass(frozen=True)
class ReportData:
    """One run, as plain values."""

    title: str
    verdict: GateResult | None
    """None: no gate ran."""
    readings: list[dict[str, Any]] = field(default_factory=list)
    """The lines of `readings.jsonl`. A meter read more than once is drawn over the steps."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """The resolved recipe."""
    streams: dict[str, Any] = field(default_factory=dict)
    """By stream: its tokens, or a mapping with `tokens` and whatever else is to be shown."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Versions, hardware, hashes; may be nested."""
    summary: dict[str, Any] = field(default_factory=dict)
    """`seconds` (wall time), `refused_steps` (numbers, or mappings with `step` and `reason`) and
    `alarms` (mappings with `step` and `text`) have a place of their own; the rest is listed."""
    worst: Sequence[Changed] = ()
    """Items that got worse, with both answers."""
    about: str = ""
    """What the page says instead of a verdict where no gate could run."""
    frontier: Sequence[Mark] = ()
    """Points between base and tuned that a rewind read."""
    beside: Sequence[Mark] = ()
    """The checkpoints that the tuned model's own run has judged, drawn beside a rewind's points."""

    def refused_steps(self) -> list[tuple[int, str]]:
        """Steps that were not taken, with why."""
        refused = self.summary.get("refused_steps") or []
        if not isinstance(refused, (list, tuple)):
            return []
        return [
            (int(one["step"]), str(one.get("reason", "")))
            if isinstance(one, Mapping)
            else (int(one), "")
            for one in refused
        ]

    def stream_rows(self) -> list[tuple[str, dict[str, Any]]]:
        """Each stream with its columns; a bare number is its tokens."""
        return [
            (name, dict(value) if isinstance(value, Mapping) else {"tokens": value})
            for name, value in self.streams.items()
        ]


def plain(value: Any) -> Any:
    """The value as YAML and JSON know it: mappings, lists, scalars; anything else as its text."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(one) for one in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    return str(value)


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as (dotted name, text) pairs."""
    pairs: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            pairs += flat(value, f"{name}.")
        elif isinstance(value, (list, tuple)):
            pairs.append((name, ", ".join(map(show, value)) or "none"))
        else:
            pairs.append((name, show(value)))
    return pairs


def show(value: Any) -> str:
    """One value for a reader: 12,345; 0.0123; yes."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return "—" if value is None else str(value)


def duration(seconds: float) -> str:
    """`3 h 12 min`, `4 min 5 s`, `12.3 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"
