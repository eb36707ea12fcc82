"""Herding: every row once, and every few rows like all of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.data import herding
from holdfast.data.example import Example, Role
from holdfast.data.herding import directions, herded
from holdfast.data.stream import Line, Stream

ROWS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=8), min_size=1, max_size=30)


def kinds(count: int, seed: int = 0) -> list[list[int]]:
    """Rows of three kinds, each with words of its own, in random order and of random lengths."""
    random = np.random.default_rng(seed)
    return [
        (10 * random.integers(3) + random.integers(0, 10, random.integers(5, 15))).tolist()
        for _ in range(count)
    ]


def spread(rows: list[list[int]], order: np.ndarray, at_once: int = 6) -> float:
    """How far the kinds' shares of the tokens, six rows after six, are from those of all rows."""
    shares = []
    for first in range(0, len(order) - at_once + 1, at_once):
        tokens = np.concatenate([rows[i] for i in order[first : first + at_once]])
        shares.append(np.bincount(tokens // 10, minlength=3) / len(tokens))
    return float(np.square(np.array(shares) - np.mean(shares, 0)).sum(1).mean())


@given(ROWS, st.integers(1, 9), st.integers(0, 5))
def test_each_row_comes_once_and_none_is_far_before_its_turn(
    rows: list[list[int]], waiting: int, seed: int
) -> None:
    """Among the first t are only rows that are among the first t + waiting - 1 of the line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(herding, "WAITING", waiting)
        order = herded(directions(len(rows), rows.__getitem__), np.random.default_rng(seed))
    assert sorted(order.tolist()) == list(range(len(rows)))
    turn = np.argsort(np.random.default_rng(seed).permutation(len(rows)))
    assert all(turn[row] < place + waiting for place, row in enumerate(order))


def test_many_rows_are_looked_at_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Directions of a sample that has all there is to differ in are those of all rows."""
    rows = [[0, 1], [2, 3, 3], [4], [0, 5]] * 30
    whole = directions(len(rows), rows.__getitem__)
    monkeypatch.setattr(herding, "SAMPLE", 50)
    parts = directions(len(rows), rows.__getitem__)
    np.testing.assert_allclose(parts @ parts.T, whole @ whole.T, atol=1e-6)


@given(ROWS)
def test_what_all_rows_have_in_common_is_no_direction(rows: list[list[int]]) -> None:
    v_nK = directions(len(rows), rows.__getitem__)
    assert v_nK.shape[0] == len(rows)
    assert v_nK.shape[1] <= herding.DIRECTIONS
    np.testing.assert_allclose(v_nK.sum(0), 0, atol=1e-6)


def test_directions_are_those_of_the_square_roots_of_the_shares() -> None:
    """The angles between rows, against those of all square roots less their mean."""
    rows = [[0, 0, 1], [1, 1, 0], [2, 3], [0, 1, 2, 3], [3, 3, 3, 2], *[[4, 5]] * 8]
    roots = np.array([np.sqrt(np.bincount(row, minlength=6) / len(row)) for row in rows])
    apart = roots - roots.mean(0)
    expected = apart / np.linalg.norm(apart, axis=1, keepdims=True)
    expected -= expected.mean(0)
    v_nK = directions(
        len(rows), rows.__getitem__
    )  # two tokens are one direction, so of six none is lost
    np.testing.assert_allclose(v_nK @ v_nK.T, expected @ expected.T, atol=1e-6)


@settings(max_examples=20)
@given(st.integers(0, 100))
def test_any_few_rows_are_like_all(seed: int) -> None:
    """A third at most of the spread that a random order has."""
    rows = kinds(120, seed)
    random = np.random.default_rng(seed)
    by_chance = np.mean([spread(rows, random.permutation(120)) for _ in range(20)])
    assert spread(rows, herded(directions(len(rows), rows.__getitem__), random)) < by_chance / 3


def test_each_next_row_is_the_one_that_balances_best() -> None:
    """Against a loop over all that are left."""
    v_nK = np.random.default_rng(1).normal(size=(12, 3))  # fewer than wait
    order = herded(v_nK, np.random.default_rng(2)).tolist()
    for place in range(1, 12):
        before = v_nK[order[:place]].sum(0)
        lengths = {i: np.linalg.norm(before + v_nK[i]) for i in order[place:]}
        assert min(lengths, key=lambda i: lengths[i]) == order[place]


def test_a_herded_stream_reads_each_epoch_in_another_order() -> None:
    rows = kinds(60)
    examples = [Example(row, [True] * len(row), "d") for row in rows]
    line = Line(Stream.of("own", Role.ANCHOR, 1.0, examples), 3, "herded")
    plain = Line(Stream.of("own", Role.ANCHOR, 1.0, examples), 3)
    epochs = [line.rows(60 * k, 60 * (k + 1)) for k in range(3)]
    assert all(sorted(epoch.tolist()) == list(range(60)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3
    again = Line(Stream.of("own", Role.ANCHOR, 1.0, examples), 3, "herded")
    assert np.array_equal(again.rows(130, 170), line.rows(130, 170))
    by_chance = np.mean([spread(rows, plain.rows(60 * k, 60 * (k + 1))) for k in range(20)])
    assert np.mean([spread(rows, epoch) for epoch in epochs]) < by_chance / 2
