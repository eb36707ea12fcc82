"""Probes: sets of items, one set a capability, scored item by item.

items.py       the format: one JSON object a line (docs/probes.md)
encode.py      an item as token ids
grade.py       whether a written answer is right
checks.py      what a parser can tell of an answer: JSON, a tool call, a format, a refusal
read.py        a model's readings on some items
results.py     results on disk, so that a base is scored once
earlier.py     what the stages before were read by
generators.py  items of our own: formats, JSON, tool calls
presets.py     what `holdfast probes import NAME` knows by name
"""

from holdfast.meters.probes.earlier import earlier_items
from holdfast.meters.probes.items import (
    TAGS,
    Item,
    load_items,
    require_both_halves,
    write_items,
)
from holdfast.meters.probes.read import allow_code, read_probes
from holdfast.meters.probes.results import Results

__all__ = [
    "TAGS",
    "Item",
    "Results",
    "allow_code",
    "earlier_items",
    "load_items",
    "read_probes",
    "require_both_halves",
    "write_items",
]
