"""The search space of a sweep, from words: `key=low:high`, `key=low:high:log` or `key=[a, b, c]`.

Whole numbers on both ends make a whole-numbered range; anything else a real one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import yaml

from holdfast.errors import RequestError

EXAMPLE = "levers.kl_anchor.weight=2:50:log"


@dataclass(frozen=True)
class Axis:
    """One setting that is searched over."""

    key: str
    values: tuple[Any, ...] = ()
    """What may be chosen; empty: the range."""
    low: float = math.nan
    high: float = math.nan
    log: bool = False
    whole: bool = False

    def ends(self) -> tuple[Any, ...]:
        """Values that must be valid for the search to be: all of a list, both ends of a range."""
        return self.values or (self.low, self.high)

    def word(self, value: Any) -> str:
        """The setting as `key=value`."""
        return f"{self.key}={yaml.safe_dump(value, default_flow_style=True, width=10**9)}".replace(
            "\n...", ""
        ).strip()

    def suggested(self, trial: Any) -> Any:
        """What an optuna trial takes. A list is chosen from by number: its entries may be lists."""
        if self.values:
            return self.values[trial.suggest_categorical(self.key, list(range(len(self.values))))]
        if self.whole:
            return trial.suggest_int(self.key, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(self.key, self.low, self.high, log=self.log)


def parse_axes(words: Iterable[str]) -> tuple[Axis, ...]:
    """Read the words of a search space.

    Raises:
        RequestError: every word that is none, a line each.
    """
    axes: list[Axis] = []
    problems: list[str] = []
    for word in words:
        try:
            axis = _axis(word)
            if axis.key in {one.key for one in axes}:
                raise RequestError(f"--over '{word}': {axis.key} is given twice; leave one out")
            axes.append(axis)
        except RequestError as error:
            problems += error.problems
    if not axes and not problems:
        problems.append(f"--over: nothing to search over; give it once or more, such as {EXAMPLE}")
    if problems:
        raise RequestError(*problems)
    return tuple(axes)


def _axis(word: str) -> Axis:
    key, equals, text = word.partition("=")
    key, text = key.strip(), text.strip()
    if not key or not equals or not text:
        raise RequestError(f"--over '{word}': give key=low:high, such as {EXAMPLE}")
    if text.startswith("["):
        return Axis(key, values=_listed(word, text))
    parts = text.split(":")
    if len(parts) not in (2, 3) or (len(parts) == 3 and parts[2] != "log"):
        raise RequestError(
            f"--over '{word}': a range is low:high or low:high:log, a list [a, b]; give one, such "
            f"as {EXAMPLE}"
        )
    log = len(parts) == 3
    try:
        low, high = float(parts[0]), float(parts[1])
    except ValueError:
        raise RequestError(
            f"--over '{word}': the ends of a range are numbers, such as {EXAMPLE}; words go in a "
            "list: [a, b]"
        ) from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise RequestError(f"--over '{word}': low must be below high, such as {EXAMPLE}")
    if log and low <= 0:
        raise RequestError(f"--over '{word}': a log range begins above 0, such as {EXAMPLE}")
    whole = all(part.strip().lstrip("+-").isdigit() for part in parts[:2])
    return Axis(key, low=low, high=high, log=log, whole=whole)


def _listed(word: str, text: str) -> tuple[Any, ...]:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        values = None
    if not isinstance(values, list) or not values:
        raise RequestError(f"--over '{word}': not a list; give one such as [0.25, 0.5]")
    return tuple(values)
