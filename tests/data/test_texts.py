"""Texts as words, and what rows say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.data.rows import Row, Source
from holdfast.data.texts import folded, prompt_and_response, row_texts, words
from tiny import jsonl


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat's  hat -- (red)!", ["the", "cat", "s", "hat", "red"]),
        ("\ufb01ne \uff21\u00b2", ["fine", "a2"]),  # NFKC: ligature, full width, superscript
        ("STRASSE stra\u00dfe", ["strasse", "strasse"]),
        ("\u6211\u662f cat\u4eba", ["\u6211", "\u662f", "cat", "\u4eba"]),
        ("\u0939\u093f\u0928\u094d\u0926\u0940", ["\u0939\u093f\u0928\u094d\u0926\u0940"]),
        ("", []),
    ],
    ids=["punctuation", "nfkc", "case", "no spaces", "marks stay", "empty"],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@settings(max_examples=50)
@given(st.text(), st.sampled_from(["  ", "\n", " - ", "... "]))
def test_words_do_not_see_case_and_what_stands_between(text: str, between: str) -> None:
    once = words(text)
    assert words(between.join(once).join([between, between])) == once
    assert words(" ".join(once)) == once


def test_a_short_text_keeps_the_punctuation_inside() -> None:
    assert folded(' "2 + 2 =\n 4." ') == folded("2 + 2 = 4") == "2 + 2 = 4"
    assert folded("2 + 2 = 4") != folded("2 * 2 = 4")


@pytest.mark.parametrize(
    ("content", "kind", "expected"),
    [
        ({"text": "a b"}, "text", ("", "a b")),
        ({"prompt": "q", "completion": "a"}, "prompt_completion", ("q", "a")),
        (
            {
                "prompt": [{"role": "user", "content": "q"}],
                "completion": [{"role": "assistant", "content": "a"}],
            },
            "prompt_completion",
            ("q", "a"),
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "tool_calls": [{"name": "f"}]},
                    {"role": "tool", "content": "t"},
                    {"role": "assistant", "content": "a"},
                ]
            },
            "messages",
            ("s\nq\nt", '[{"name": "f"}]\na'),
        ),
    ],
    ids=["text", "plain", "turns", "messages"],
)
def test_what_a_row_says(content: dict[str, Any], kind: Any, expected: tuple[str, str]) -> None:
    assert prompt_and_response(Row("here", content, kind)) == expected


def test_rows_as_texts_say_where_they_stand(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    found = list(row_texts([Source(path=str(file))]))
    assert [(t.where, t.text.strip()) for t in found] == [
        (f"{file} line 1", "one"),
        (f"{file} line 2", "two"),
    ]
