"""Ranks of changes whose singular values are known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from holdfast.meters.drift import Start
from holdfast.meters.ranks import effective_rank, read_ranks, singular_values, stable_rank


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_singular_values_are_torchs(out: int, into: int, seed: int) -> None:
    stack = torch.randn(2, out, into, generator=torch.Generator().manual_seed(seed))
    expected = torch.linalg.svdvals(stack.double())
    torch.testing.assert_close(singular_values(stack), expected, rtol=1e-6, atol=1e-6)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_ranks_lie_between_one_and_the_rank_whatever_the_scale(values: list[float]) -> None:
    spectrum = torch.tensor([values], dtype=torch.float64)
    for rank in (effective_rank, stable_rank):
        assert 1 - 1e-9 <= float(rank(spectrum)) <= len(values) + 1e-9
        assert float(rank(spectrum)) == pytest.approx(float(rank(7 * spectrum)))


def test_of_equal_values_both_are_their_number() -> None:
    for rank in (effective_rank, stable_rank):
        assert rank(torch.tensor([[2.0, 2.0, 2.0, 0.0]])).tolist() == pytest.approx([3.0])


def test_of_unequal_ones_by_hand() -> None:
    """3 and 1: entropy of 3/4 and 1/4 is 0.5623; 10 / 9."""
    values = torch.tensor([[3.0, 1.0]])
    assert effective_rank(values).tolist() == pytest.approx([1.7548], rel=1e-4)
    assert stable_rank(values).tolist() == pytest.approx([10 / 9])


def test_a_reading_for_each_matrix_that_moved() -> None:
    """A change of rank 2 with equal singular values; what did not move has no rank."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    start = Start(model)
    with torch.no_grad():
        model[0].weight[0, 0] += 0.5
        model[0].weight[1, 1] -= 0.5
        model[0].bias += 1.0
    readings = read_ranks(start, 6)
    assert {(r.meter, r.name) for r in readings} == {
        ("effective_rank", "0.weight"), ("stable_rank", "0.weight")}  # fmt: skip
    for reading in readings:
        assert reading.value == pytest.approx(2.0, rel=1e-4)
        assert (reading.step, reading.stderr, reading.unit) == (6, None, "rank")


def test_of_experts_the_mean_over_those_that_moved() -> None:
    stack = nn.Parameter(torch.zeros(3, 4, 4))
    model = nn.Module()
    model.experts = stack
    start = Start(model)
    with torch.no_grad():
        stack[0] += torch.eye(4)  # rank 4
        stack[2] += 1.0  # rank 1
    readings = {r.meter: (r.value, r.n) for r in read_ranks(start, 0)}
    assert readings["stable_rank"] == (pytest.approx(2.5), 2)
    assert readings["effective_rank"] == (pytest.approx(2.5, rel=1e-4), 2)
