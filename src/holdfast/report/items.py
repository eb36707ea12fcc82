"""The items that a model lost: base's answer and tuned answer side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from holdfast.gate.margins import lower_is_better
from holdfast.gate.render import show_value

if TYPE_CHECKING:
    from holdfast.meters import Reading
    from holdfast.meters.probes import Item

MOST = 10
LONGEST_SHOWN = 1_500
"""Characters of a prompt that are shown: its end, which asks the question."""


@dataclass(frozen=True)
class Changed:
    """One item before and after, in words."""

    probe: str
    id: str
    tags: str
    prompt: str
    right: str
    """The right answer."""
    before: str
    """Its value under the base: 100.0%, 1.204 nats."""
    after: str
    answer_before: str | None
    """What the base answered; None where an item has no answer (a likelihood)."""
    answer_after: str | None


def worst_changed(
    before: Iterable[Reading], after: Iterable[Reading], items: Iterable[Item], most: int = MOST
) -> list[Changed]:
    """The items that got worse, the worst of each probe in turn, at most `most`.

    In turn, since a fall of an accuracy and a rise of a loss have no common scale, and one broken
    probe should not hide another.
    """
    asked = {(item.probe, item.id): item for item in items}
    first = {r.name: r for r in before if r.meter == "probe" and r.split == "sealed"}
    by_probe = [
        _fallen(first[y.name], y)
        for y in after
        if y.meter == "probe" and y.split == "sealed" and y.name in first
    ]
    in_turn = [fallen for turn in zip_longest(*by_probe) for fallen in turn if fallen is not None]
    return [_words(x, y, asked[x.name, item]) for x, y, item in in_turn if (x.name, item) in asked][
        :most
    ]


def _fallen(x: Reading, y: Reading) -> list[tuple[Reading, Reading, str]]:
    """The items of one probe that got worse, worst first; ties in the order of the file."""
    sign = 1 if lower_is_better(x.unit) else -1
    worse = {i: sign * (y.items[i] - x.items[i]) for i in x.items if i in y.items}
    order = sorted((i for i in worse if worse[i] > 0), key=lambda i: -worse[i])
    return [(x, y, i) for i in order]


def _words(x: Reading, y: Reading, item: Item) -> Changed:
    return Changed(
        probe=x.name,
        id=item.id,
        tags=", ".join(x.tags),
        prompt=_prompt(item.prompt),
        right=_right(item),
        before=_value(x, item.id),
        after=_value(y, item.id),
        answer_before=x.answers.get(item.id),
        answer_after=y.answers.get(item.id),
    )


def _value(reading: Reading, item: str) -> str:
    shown = show_value(reading.items[item], float("nan"), reading.unit)
    return shown if reading.unit == "accuracy" else f"{shown} {reading.unit}"


def _prompt(prompt: str | Sequence[dict[str, Any]]) -> str:
    if not isinstance(prompt, str):
        prompt = "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in prompt)
    return prompt if len(prompt) <= LONGEST_SHOWN else f"… {prompt[-LONGEST_SHOWN:]}"


def _right(item: Item) -> str:
    """The right answer as written out; of a format item its checks, of a code item its tests."""
    if item.checks:
        return "\n".join(str(check.model_dump(exclude_defaults=True)) for check in item.checks)
    return " or ".join(item.targets) or item.tests or ""
