"""The domains of the lab's corpus, one module each."""

from __future__ import annotations

from holdfast.lab.domain import Domain
from holdfast.lab.generators import (
    arithmetic,
    capitals,
    functions,
    numbers,
    records,
    stories,
    verbs,
)

DOMAINS: dict[str, Domain] = {
    module.DOMAIN.name: module.DOMAIN
    for module in (arithmetic, capitals, verbs, functions, stories, records, numbers)
}
"""Every domain by its name; their shares add up to one."""

__all__ = ["DOMAINS"]
