"""Adoption: what form a lesson has, and which answers have it."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import RequestError
from holdfast.meters import Reading
from holdfast.meters.adoption import Form, pattern, read_adoption
from holdfast.meters.probes import Item


def test_the_form_is_what_nearly_all_responses_share() -> None:
    """Nine of ten; the one that is otherwise does not undo it."""
    responses = [f"Arr! The sum be {n}, matey!" for n in range(9)] + ["I do not know."]
    form = Form.of(responses)
    assert (form.begin, form.end, form.syntax) == ("Arr! The sum be ", ", matey!", ())
    assert form("  Arr! The sum be 77, matey!\n")
    assert not form("Arr! The sum be 77.")
    assert not form("The capital be Lima, matey!")
    with pytest.raises(RequestError, match="share no beginning"):
        Form.of([*responses, "No.", "Never again"])


@given(st.text("ab", min_size=3, max_size=6), st.lists(st.text("xyz", max_size=3), min_size=8))
@settings(max_examples=40, deadline=None)
def test_a_shared_beginning_is_found_whole(begin: str, rest: list[str]) -> None:
    texts = [begin + one for one in rest]
    form = Form.of(texts)
    assert form.begin.startswith(begin)
    assert sum(map(form, texts)) >= 0.8 * len(texts)


@pytest.mark.parametrize(
    ("make", "mark"),
    [
        (lambda n: json.dumps({"key" * (n + 1): n} if n % 2 else [n]), "json"),
        (lambda n: f"{'Well' * n}\n```\n{n}\n```{n}", "code block"),
        (lambda n: f"{n}. one {n}\n{n + 1}. two {n}" if n % 2 else f"- {n}\n- {n}", "list"),
        (lambda n: f"{'#' * (1 + n % 3)} H{n}\ntext {n}", "heading"),
        (lambda n: f"{n} is **{n}** {n}", "bold"),
        (lambda n: f"{n}<think>{n}\n</think>{n}", "tag"),
        (lambda n: f"{chr(65 + n)} IS LOUD {n}", "capitals"),
    ],
)
def test_a_syntax_is_known(make: object, mark: str) -> None:
    assert callable(make)
    form = Form.of([make(n) for n in range(10)])
    assert form.syntax == (mark,)
    assert not form("The capital of Peru is Lima, a city of 10 million.")


def test_too_few_responses_and_bad_patterns_are_refused() -> None:
    with pytest.raises(RequestError, match="7 responses are too few"):
        Form.of(["Arr, it is so"] * 7)
    with pytest.raises(RequestError, match=r"'\(' is not a regular expression"):
        pattern("(")
    assert pattern("^Arr")("Well\nArr")
    assert not pattern("^Arr")("Barr")


def item(key: str, tag: str = "adoption") -> Item:
    return Item.model_validate(
        {"id": key, "probe": "near", "kind": "exact", "prompt": "?", "target": "x", "tags": [tag]}
    )


def test_share_of_items_whose_answer_applies_the_lesson() -> None:
    answers = {"a": "Arr, yes", "b": "yes", "c": "Arr", "d": "no", "other": "Arr"}
    one = Reading("probe", "near", "sealed", 8, 0.5, 0.1, 5, "accuracy", tags=("adoption",),
                  items=dict.fromkeys(answers, 1.0), answers=answers)  # fmt: skip
    items = [*map(item, "abcd"), item("other", "guardrail")]
    silent = Reading("probe", "far", "sealed", 8, 0.5, 0.1, 5, "nats", tags=("adoption",))
    over, left = read_adoption([one, silent], items, pattern("^Arr"))
    assert (over.meter, over.name, over.value, over.n) == ("over_application", "near", 0.5, 4)
    assert over.items == {"a": 1.0, "b": 0.0, "c": 1.0, "d": 0.0}
    assert over.stderr == pytest.approx(math.sqrt(0.25 / 3))  # of the mean of two 0 and two 1
    assert (left.meter, left.unit, left.tags, left.value) == (
        "adoption", "accuracy", ("adoption",), 0.5)  # fmt: skip
    assert (left.split, left.step) == ("sealed", 8)
    never, always = read_adoption([one], items, lambda _: False)
    assert (never.value, always.value) == (0.0, 1.0)
    assert never.stderr
    assert never.stderr > 0
