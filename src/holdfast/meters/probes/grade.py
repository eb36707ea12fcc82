"""Whether a written answer is right, as lm-eval's `regex` filter and `exact_match` have it.

Source: lm-eval 0.4, filters/extraction.py and api/metrics.py (exact_match), and the two filters of
its gsm8k task, which are `strict` and `flexible` here. Departure: `number` compares values, so that
1,000 and 1000.0 are the same number.
"""

from __future__ import annotations

import re
import string
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from holdfast.meters.probes.items import Compare, Extract, Item

STRICT = r"#### (\-?[0-9\.\,]+)"
FLEXIBLE = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
_NO_DIGITS = str.maketrans("", "", string.digits)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def is_right(item: Item, answer: str) -> bool:
    """Whether an answer to an exact, number or format item is right."""
    if item.kind == "format":
        return all(check.holds(answer) for check in item.checks)
    if item.kind == "number":
        found = as_number(extracted(answer, item.extract or "flexible"))
        return found is not None and found in map(as_number, item.targets)
    if item.extract is not None:
        answer = extracted(answer, item.extract)
    return reduced(answer, item.compare) in {reduced(t, item.compare) for t in item.targets}


def extracted(answer: str, extract: Extract | str) -> str:
    """The part of an answer that counts."""
    if isinstance(extract, str):
        pattern, select = (STRICT, 0) if extract == "strict" else (FLEXIBLE, -1)
        fallback = "[invalid]"
    else:
        pattern, select, fallback = extract.pattern, extract.select, extract.fallback
    matches = re.findall(pattern, answer)
    if not -len(matches) <= select < len(matches):
        return fallback
    match = matches[select]
    if isinstance(match, tuple):
        match = next(filter(None, match), fallback)
    return str(match).strip()


def reduced(text: str, compare: Compare) -> str:
    """A text without what does not count."""
    for pattern in compare.ignore:
        text = re.sub(pattern, "", text)
    if compare.ignore_case:
        text = text.lower()
    if compare.ignore_punctuation:
        text = text.translate(_NO_PUNCTUATION)
    if compare.ignore_numbers:
        text = text.translate(_NO_DIGITS)
    return text.strip() if compare.strip else text


def as_number(text: str) -> Decimal | None:
    """The number that a text is, after `####` where that stands; None where it is none."""
    text = text.rpartition("####")[2].strip().replace(",", "").replace("$", "").rstrip(".")
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None
