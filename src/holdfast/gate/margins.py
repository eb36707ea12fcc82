"""The recipe's `gate` section: how much the user is willing to forget."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from holdfast.section import Section

_MARGIN = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(pt|%)\s*")
_SEPARATORS = "/:_"
"""Where a name is cut to find its family: `gsm8k_cot` and `mmlu/law` fall under `gsm8k`, `mmlu`."""


@dataclass(frozen=True)
class Margin:
    """An accepted fall: `2pt` of accuracy, or a `1%` relative rise of a loss."""

    amount: float
    unit: Literal["pt", "%"]

    @classmethod
    def parse(cls, text: object) -> Margin:
        """Read `2pt` or `1%`; anything else is refused with a value that works."""
        match = _MARGIN.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            bare = str(text).strip()
            if re.fullmatch(r"\d+(\.\d*)?|\.\d+", bare):
                raise ValueError(
                    f"{bare} has no unit; write {bare}pt (percentage points of accuracy) "
                    f"or {bare}% (relative rise of a loss)"
                )
            if bare.startswith("-") and (positive := bare.lstrip("- ")):
                raise ValueError(
                    f"{bare} has the wrong sign: a margin is how much may be lost, as a positive "
                    f"number; write {positive}"
                )
            raise ValueError(
                f"{text!r} is not a margin; allowed: a positive number with a unit, "
                "e.g. 2pt (percentage points of accuracy) or 1% (relative rise of a loss)"
            )
        amount, unit = float(match[1]), match[2]
        if not 0 < amount <= 100:
            raise ValueError(
                f"{match[1]}{unit} is outside (0, 100]; a margin of 0 passes only models that "
                f"improved: write a small one, e.g. 0.5{unit}"
            )
        return cls(amount, "pt" if unit == "pt" else "%")

    def absolute(self, base: float) -> float:
        """The margin in the reading's own unit, `base` being the base model's mean."""
        return self.amount / 100 * (1.0 if self.unit == "pt" else base)

    def __str__(self) -> str:
        return f"{Decimal(f'{self.amount:.12g}').normalize():f}{self.unit}"


DEFAULT_MARGINS = {
    "mmlu": "2pt",
    "humaneval": "3pt",
    "gsm8k": "3pt",
    "multilingual": "1pt",
    "rare": "2pt",
    "canary": "1%",
    "control": "5%",
    "accuracy": "2pt",
    "nats": "5%",
    "bits per byte": "5%",
}
"""What holds where the recipe says nothing. The last three stand for any reading of that unit."""

UNIT_OF = {"accuracy": "pt", "nats": "%", "bits per byte": "%"}
"""Which margins a reading of a unit takes: points for accuracies, percent for losses."""


def _canonical(text: Any) -> str:
    return str(Margin.parse(text))


MarginText = Annotated[
    str,
    BeforeValidator(_canonical),
    WithJsonSchema(
        {"type": "string", "pattern": r"^\d+(\.\d+)?(pt|%)$", "examples": ["2pt", "1%"]}
    ),
]


class Gate(Section):
    """The release gate: non-inferiority on a sealed split, per capability."""

    enabled: bool = True
    """Compare tuned with base on the sealed split, and give a verdict. false: no verdict."""

    alpha: float = Field(default=0.05, gt=0, lt=0.5)
    """Chance that a capability which lost its full margin still passes. In (0, 0.5)."""

    margins: dict[str, MarginText] = Field(default_factory=dict)
    """Accepted fall by probe or canary domain, e.g. `{gsm8k: 3pt, canary: 1%}`: `pt` percentage
    points of accuracy, `%` relative rise of a loss. A name also covers its family (`mmlu` covers
    `mmlu_law`); `canary`, `rare`, `control`, `adoption` cover all of a kind; `accuracy`, `nats`
    the rest. Unset: mmlu 2pt, humaneval 3pt, gsm8k 3pt, multilingual 1pt, rare 2pt, canary 1%,
    control 5%, any other accuracy 2pt, any other loss 5%."""

    target: Literal["rise", "report"] = "rise"
    """rise: a PASS also needs every target probe to have risen. report: targets are shown only."""

    adoption: Literal["report", "guard"] = "report"
    """The over-application probe: right answers where the lesson does not apply. guard: it is a
    guardrail with its margin (2pt unless `margins` names it). report: it is shown only."""

    def margin_for(
        self, meter: str, name: str, unit: str, tags: tuple[str, ...] = ()
    ) -> tuple[Margin, str] | None:
        """The margin of a reading and the key that set it: the recipe's keys first, then defaults.

        Keys whose unit does not fit the reading are passed over, so that a probe and a canary
        domain may share a name. (A key of the recipe that fits nothing fails the gate.) None: no
        margin exists for this unit.
        """
        keys = list(candidate_keys(meter, name, unit, tags))
        for table in (self.margins, DEFAULT_MARGINS):
            for key in keys:
                if key in table and (margin := Margin.parse(table[key])).unit == UNIT_OF.get(unit):
                    return margin, key
        return None


def in_short(text: str) -> dict[str, str]:
    """What a margin alone stands for: `1%` is the canary's, `2pt` that of any accuracy."""
    return {"accuracy" if text.strip().endswith("pt") else "canary": text}


def candidate_keys(meter: str, name: str, unit: str, tags: tuple[str, ...] = ()) -> Iterator[str]:
    """Keys under which a reading's margin may stand, the most particular first."""
    yield f"{meter}/{name}"
    yield name
    for end in range(len(name) - 1, 0, -1):
        if name[end] in _SEPARATORS:
            yield name[:end]
    yield from (tag for tag in ("adoption", "rare", "control", "canary") if tag in tags)
    yield meter
    yield unit


def lower_is_better(unit: str) -> bool:
    """Losses should fall; accuracies should rise."""
    return unit in ("nats", "bits per byte")
