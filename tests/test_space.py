"""The words of a search space: what they mean, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from holdfast.errors import RequestError
from holdfast.recipe import load_recipe
from holdfast.space import Axis, parse_axes


@pytest.mark.parametrize(
    ("word", "axis"),
    [
        ("a.b=2:50:log", Axis("a.b", low=2, high=50, log=True, whole=True)),
        ("a=0.1:0.5", Axis("a", low=0.1, high=0.5)),
        ("a=1e-5:1e-3:log", Axis("a", low=1e-5, high=1e-3, log=True)),
        ("a=-1:1", Axis("a", low=-1, high=1, whole=True)),
        ("a=[lora, none, 3]", Axis("a", values=("lora", "none", 3))),
    ],
)
def test_ranges_and_lists(word: str, axis: Axis) -> None:
    assert parse_axes([word]) == (axis,)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("a", "give key=low:high"),
        ("=1:2", "give key=low:high"),
        ("a=3", "a range is low:high"),
        ("a=1:2:linear", "a range is low:high"),
        ("a=x:y", "the ends of a range are numbers"),
        ("a=2:1", "low must be below high"),
        ("a=nan:1", "low must be below high"),
        ("a=0:1:log", "a log range begins above 0"),
        ("a=[]", "not a list"),
        ("a=[1", "not a list"),
    ],
)
def test_what_is_no_range_says_how_to_give_one(word: str, said: str) -> None:
    with pytest.raises(RequestError, match=said) as refused:
        parse_axes([word, "b=[1", "c=1:2"])
    assert len(refused.value.problems) == 2, "all at once"


def test_nothing_to_search_and_a_key_given_twice_are_refused() -> None:
    with pytest.raises(RequestError, match="nothing to search over"):
        parse_axes([])
    with pytest.raises(RequestError, match="given twice"):
        parse_axes(["a=1:2", "a=[1]"])


@pytest.mark.parametrize(
    "value", [1e-5, 3, "none", [1, 2], {"a": 1}, "on", None, True, "1:2", -0.5]
)
def test_a_setting_is_written_so_that_the_recipe_reads_it_back(value: Any) -> None:
    """Through the recipe's own reading of words."""
    from holdfast.recipe import _read_word

    assert _read_word(Axis("a.b").word(value)) == ("a.b", value)


def test_a_word_reaches_the_recipe() -> None:
    word = Axis("levers.kl_anchor.weight").word(7.5)
    assert load_recipe(None, [word], model="m", data="d.jsonl").levers.kl_anchor.weight == 7.5
