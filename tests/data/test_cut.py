"""Documents that are too long."""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.data.cut import cut, split

BOS = 0


@pytest.mark.parametrize(
    ("prompt", "response", "kept", "lost_prompt", "lost_response"),
    [
        # (prompt tokens, response tokens) -> tokens kept of 8; BOS is the prompt's first.
        (3, 5, [0, 1, 2, 10, 11, 12, 13, 14], False, False),
        (3, 9, [0, 1, 2, 10, 11, 12, 13, 14], False, True),
        (7, 9, [0, 4, 5, 6, 10, 11, 12, 13], True, True),
        (8, 9, [0, 5, 6, 7, 10, 11, 12, 13], True, True),
        (8, 2, [0, 3, 4, 5, 6, 7, 10, 11], True, False),
        (20, 4, [0, 17, 18, 19, 10, 11, 12, 13], True, False),
    ],
)
def test_cut(
    prompt: int, response: int, kept: list[int], lost_prompt: bool, lost_response: bool
) -> None:
    ids = [*range(prompt), *range(10, 10 + response)]
    mask = [False] * prompt + [True] * response
    result = cut(ids, mask, 8, BOS)
    assert result.input_ids == kept
    assert (result.prompt, result.response) == (lost_prompt, lost_response)
    first = kept.index(10)
    assert result.loss_mask == [False] * first + [True] * (8 - first)


def test_without_bos_the_prompt_keeps_its_end() -> None:
    assert cut([5, 6, 7, 8, 9], [False] * 4 + [True], 3, None).input_ids == [7, 8, 9]


@given(st.integers(1, 30), st.integers(1, 30), st.integers(2, 20))
def test_what_is_cut_still_teaches(prompt: int, response: int, max_length: int) -> None:
    ids = list(range(prompt + response))
    result = cut(ids, [False] * prompt + [True] * response, max_length, BOS)
    assert len(result.input_ids) == len(result.loss_mask) == min(max_length, len(ids))
    assert sum(result.loss_mask) >= min(response, max_length // 2)
    assert result.input_ids[0] == BOS


@given(st.lists(st.integers(), min_size=1), st.integers(1, 12))
def test_split_loses_nothing_and_is_even(ids: list[int], width: int) -> None:
    pieces = split(ids, width)
    assert list(chain(*pieces)) == ids
    sizes = [len(piece) for piece in pieces]
    assert max(sizes) <= width
    assert max(sizes) - min(sizes) <= 1
