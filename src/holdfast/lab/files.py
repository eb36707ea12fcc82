"""The lab's files: a lesson, probes, canary text and replay text, as JSON lines."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

from holdfast.files import write_text
from holdfast.lab.corpus import Document, corpus, documents
from holdfast.lab.domain import Item
from holdfast.lab.generators import DOMAINS
from holdfast.lab.lessons import LESSONS
from holdfast.lab.lessons.verbs import counterexamples as counterexample_rows

PROBE_ITEMS = 200
ARITHMETIC_ITEMS = 400
"""One wrong digit is a wrong answer: the most fragile probe, so more items to decide on it."""
CANARIES = 40
REPLAY_DOCUMENTS = 400
_FRESH = 1_000_000
"""What is added to a seed for replay, so that its documents are not the base's own."""


def write_files(
    folder: Path,
    *,
    lesson: str = "verbs",
    seed: int = 0,
    counterexamples: int = 0,
    documents_a_domain: int = CANARIES,
) -> dict[str, Path]:
    """Write `lesson`, `probes`, `canary` and `replay` into a folder; say where each one is.

    The folder is made if there is none.  Each file appears whole or not at all.

    Args:
        folder: where to.
        lesson: a name in `LESSONS`.
        seed: of everything that is drawn.
        counterexamples: rows of the verbs' lesson that it does not apply to.
        documents_a_domain: of the canary; half of them are on its sealed split.
    """
    taught = LESSONS[lesson].rows(LESSONS[lesson].count, seed=seed)
    taught += counterexample_rows(counterexamples, seed=seed)
    Random(f"order/{seed}").shuffle(taught)
    contents: dict[str, Iterable[dict[str, Any]]] = {
        "lesson": taught,
        "probes": probe_items(seed, lesson),
        "canary": (document._asdict() for document in canaries(seed, documents_a_domain)),
        "replay": (document._asdict() for document in replay(seed)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.jsonl" for name in contents}
    for name, lines in contents.items():
        rows = (json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text(paths[name], "".join(rows))
    return paths


def probe_items(seed: int, lesson: str = "verbs") -> list[Item]:
    """Write all probes: those of the corpus's domains, then the lesson's own."""
    items = [
        item
        for name, domain in DOMAINS.items()
        for item in domain.probes(
            Random(f"probes/{name}/{seed}"),
            ARITHMETIC_ITEMS if name == "arithmetic" else PROBE_ITEMS,
        )
    ]
    return items + LESSONS[lesson].probes(seed=seed)


def canaries(seed: int, count: int = CANARIES) -> list[Document]:
    """Write documents of every domain that no training text contains."""
    return [
        document
        for name in DOMAINS
        for document in itertools.islice(documents(name, seed, "canary"), count)
    ]


def replay(seed: int) -> list[Document]:
    """Write new documents that are like the base's training text, in the same proportions."""
    return list(itertools.islice(corpus(seed + _FRESH, "train"), REPLAY_DOCUMENTS))
