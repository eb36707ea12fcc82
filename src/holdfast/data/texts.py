"""What a row says, as plain text and as words: what comparisons of texts agree upon."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.data.rows import Row, Source, iter_rows

SPACELESS = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x3400, 0x9FFF),  # Han
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
"""Code points of scripts that put no space between words: each character is a word of its own."""


_ENDS = " .,;:!?\u00a1\u00bf\u2026\u3001\u3002\"'`*_()[]{}"
"""What may stand around a text without changing it, after NFKC."""


@dataclass(frozen=True)
class Text:
    """A text, and where it stands."""

    where: str
    text: str


def prompt_and_response(row: Row) -> tuple[str, str]:
    """What a sound row gives, and what it has the model learn (of raw text: all of it)."""
    content = row.content
    if row.format == "text":
        return "", content["text"]
    if row.format == "messages":
        given, learned = [], content["messages"]
    else:
        given, learned = content["prompt"], content["completion"]
        if isinstance(learned, str):
            return given, learned
    prompt = [*given, *(m for m in learned if m["role"] != "assistant")]
    return _spoken(prompt), _spoken(m for m in learned if m["role"] == "assistant")


def text_of(row: Row) -> Text:
    """A sound row as one text: its prompt, then its response."""
    return Text(row.where, " ".join(prompt_and_response(row)))


def row_texts(sources: Iterable[Source]) -> Iterator[Text]:
    """Each row of the sources as one text."""
    for source in sources:
        yield from map(text_of, iter_rows(source))


def folded(text: str) -> str:
    """The text in NFKC and case folded, whitespace collapsed, without punctuation at its ends."""
    words = unicodedata.normalize("NFKC", text).casefold().split()
    return " ".join(words).strip(_ENDS)


def words(text: str) -> list[str]:
    """NFKC, case folded, cut at whitespace, punctuation and symbols; see `SPACELESS`."""
    return unicodedata.normalize("NFKC", text).casefold().translate(_CUT).split()


def excerpt(parts: Sequence[str], most: int = 14) -> str:
    """The first words of some, for a message."""
    return " ".join(parts[:most]) + (" ..." if len(parts) > most else "")


class _Cut(dict[int, str]):
    """What a character becomes so that `str.split` finds the words; filled as they are met."""

    def __missing__(self, point: int) -> str:
        letter = chr(point)
        if unicodedata.category(letter)[0] in "PZSC":
            self[point] = " "
        elif any(low <= point <= high for low, high in SPACELESS):
            self[point] = f" {letter} "
        else:
            self[point] = letter
        return self[point]


_CUT = _Cut()


def _spoken(messages: Iterable[dict[str, Any]]) -> str:
    """What the messages say; a turn that only calls tools says its calls."""
    return "\n".join(
        m.get("content") or json.dumps(m.get("tool_calls") or "", ensure_ascii=False)
        for m in messages
    )
