"""The texts that must stay unseen for a reading to mean anything: canary rows and probe items."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from holdfast.data.rows import Row, iter_rows
from holdfast.data.texts import Text, prompt_and_response, text_of
from holdfast.meters.canary import Canary
from holdfast.meters.probes import Item, load_items


def secret_texts(canary: Canary, probes: Sequence[str]) -> list[Text]:
    """Every canary row that is read, and every probe item with its right answer."""
    items = (_of_item(item) for item in load_items(probes))
    return [*map(text_of, canary_rows(canary)), *items]


def canary_rows(canary: Canary) -> Iterator[Row]:
    """The first `max_documents` rows of each domain; none where the base writes the canary.

    At least all that is read as held out: there, too, a row given twice counts once, and one with
    nothing to predict not at all. (What only the tokenizer shows, that two rows are read alike or
    that one is cut before its response, is not seen here.)
    """
    rows: Counter[str] = Counter()
    seen: set[tuple[str, str]] = set()
    for source in canary.sources:
        for row in iter_rows(source):
            domain = row.domain or Path(source.path).stem
            said = domain, text_of(row).text
            learned = prompt_and_response(row)[1]
            if rows[domain] < canary.max_documents and learned.strip() and said not in seen:
                rows[domain] += 1
                seen.add(said)
                yield row


def _of_item(item: Item) -> Text:
    prompt = item.prompts[item.answer or 0] if item.prompts else item.prompt
    if not isinstance(prompt, str):
        prompt = "\n".join(str(message.get("content") or "") for message in prompt)
    return Text(f"probe '{item.probe}', item '{item.id}'", " ".join([prompt, *item.targets]))
