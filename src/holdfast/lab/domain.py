"""What a corpus domain is: examples with a known answer, strung together into documents.

Every domain is built from one kind of thing, the `Example`: a prompt and the one right
continuation.  Documents are several examples in a row; probes are examples that documents
never contain, or, where the domain is a list of facts and nothing could be inferred about a
missing one, the facts themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

from holdfast.lab.heldout import is_reserved

Item = dict[str, Any]
"""A probe item: one line of a probes file."""


class Example(NamedTuple):
    """A prompt with its only right continuation."""

    prompt: str
    target: str
    key: str
    """What is held out: two examples with one key are the same question."""
    cluster: str
    """What examples share when their answers stand or fall together."""


@dataclass(frozen=True)
class Domain:
    """One domain of the corpus: how it is written, how much of it there is, how it is probed."""

    name: str
    share: float
    """The part of the corpus's tokens that is of this domain."""
    example: Callable[[Random], Example]
    length: tuple[int, int]
    """The least and the greatest number of examples in a document."""
    separator: str = "\n"
    stop: str = "\n"
    tags: tuple[str, ...] = ("guardrail",)
    facts: Callable[[], Sequence[Example]] | None = None
    """All probe examples of a domain that is learnt by heart; None for one that generalises."""

    def document(self, rng: Random) -> str:
        """Write one document, without any reserved example in it."""
        count = rng.randint(*self.length)
        examples = (self._draw(rng, reserved=False) for _ in range(count))
        return self.separator.join(example.prompt + example.target for example in examples)

    def probes(self, rng: Random, count: int) -> list[Item]:
        """Write at most `count` probe items on as many different questions."""
        if self.facts is not None:
            facts = list(self.facts())
            chosen = rng.sample(facts, min(count, len(facts)))
        else:
            reserved: dict[str, Example] = {}
            while len(reserved) < count:
                example = self._draw(rng, reserved=True)
                reserved.setdefault(example.key, example)
            chosen = list(reserved.values())
        return [
            exact_item(self.name, number, example, stop=self.stop, tags=self.tags)
            for number, example in enumerate(chosen)
        ]

    def _draw(self, rng: Random, *, reserved: bool) -> Example:
        while True:
            example = self.example(rng)
            if self.facts is not None or is_reserved(example.key) == reserved:
                return example


def exact_item(
    probe: str, number: int, example: Example, *, stop: str = "\n", tags: Sequence[str]
) -> Item:
    """Make the probe item whose greedy continuation, up to `stop`, must be the target."""
    return {
        "id": f"{probe}-{number:04d}",
        "probe": probe,
        "kind": "exact",
        "prompt": example.prompt,
        "target": example.target,
        "stop": [stop],
        "tags": list(tags),
        "cluster": example.cluster,
    }
