"""Gradient, walk and Fisher on problems whose answers are known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from holdfast.data.example import Example
from holdfast.displacement import moved
from holdfast.fisher import fisher
from holdfast.meters import Reading
from holdfast.meters.canary import document
from holdfast.meters.drift import Displacement, Start
from holdfast.meters.kl import read_kl
from holdfast.meters.motion import Walk, read_fisher, read_gradient
from holdfast.reference.frozen import Frozen


def test_share_of_the_gradient_near_zero() -> None:
    """Root mean square 1: entries of 0.9 times the threshold count, of 1.1 times it do not."""
    model: Any = nn.Module()
    model.a, model.b = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    model.idle, model.frozen = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(9))
    model.frozen.requires_grad_(False)
    model.a.grad = torch.tensor([0.0009, -0.0011, math.sqrt(5), -math.sqrt(5)])
    model.b.grad = torch.zeros(4)
    found = {r.name: (r.value, r.n) for r in read_gradient(model, 3)}
    assert found == {"a": (0.25, 4), "b": (1.0, 4), "idle": (1.0, 2), "total": (0.7, 10)}
    assert {r.name: r.value for r in read_gradient(model, 3, near_zero=0.5)}["a"] == 0.5
    assert read_gradient(nn.ReLU(), 0) == []


def test_plain_descent_in_a_straight_line_walks_what_it_moves() -> None:
    model = nn.Linear(3, 1, bias=False)
    start, walk = Start(model), Walk()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    direction = torch.tensor([[1.0, -2.0, 2.0]])
    for _ in range(8):
        model.weight.grad = 0.5 * direction
        walk.add(0.1, 1.5)
        optimizer.step()
    found = {r.name: r.value for r in walk.read(start.displacement(), 8)}
    assert found == pytest.approx(
        {"walked": 1.2, "displacement": 1.2, "displacement / walked": 1.0}, rel=1e-5
    )


def test_a_walk_told_of_every_other_step_is_as_long() -> None:
    walk = Walk()
    for rate in (0.1, 0.3):
        walk.add(rate, 2.0)
    walk.add(math.nan, 1.0)
    found = {r.name: r.value for r in walk.read(Displacement({"w": 1.6}, {"w": 1.0}), 8)}
    assert found == pytest.approx(
        {"walked": 8 * 0.4, "displacement": 1.6, "displacement / walked": 0.5}
    )
    assert Walk().read(Displacement({}, {}), 0) == []


def test_a_walk_is_read_off_a_runs_own_readings() -> None:
    values = {("learning_rate", 1): 0.1, ("grad_norm", 1): 2.0, ("learning_rate", 3): 0.3,
              ("grad_norm", 3): 8.0, ("grad_norm", 5): 1.0, ("loss", 1): 9.0}  # fmt: skip
    readings = [
        Reading(meter, "total", "train", step, value, None, 1)
        for (meter, step), value in values.items()
    ]
    assert Walk.of(readings) == Walk(2, pytest.approx(0.1 * 2 + 0.3 * 8))  # type: ignore[arg-type]
    assert Walk.of(readings, clip=4.0).lengths == pytest.approx(0.1 * 2 + 0.3 * 4)
    refused = Walk.of(readings, refused={3})
    assert (refused.logged, refused.lengths) == (2, pytest.approx(0.1 * 2))


def test_fisher_predicts_the_kl_of_a_small_move() -> None:
    """Of one number, so that it has no other to be correlated with, and 400 rows.

    F's own sampling error is then about sqrt(2 / 400) = 7 %; the KL is measured on the same rows,
    every position alike.
    """
    model: Any = tiny.tiny("Llama").requires_grad_(False)
    random = torch.Generator().manual_seed(2)
    rows = torch.randint(0, tiny.VOCABULARY, (400, 9), generator=random).tolist()
    mask = [False] + [True] * 8
    weight = model.model.norm.weight.requires_grad_(True)
    began, base = moved(model, "test"), Frozen.copy_of(model)
    importance = fisher(model, [Example(r, mask) for r in rows], {"w": weight}, seed=3)
    at = 0
    with torch.no_grad():
        weight[at] += 0.02
    documents = [document(r, mask, "old") for r in rows]
    kl = [
        r for s in ("selection", "sealed") for r in read_kl(model, base, documents, s, 5, on="old")
    ]
    measured = sum(r.value * r.n for r in kl) / sum(r.n for r in kl)
    name = next(iter(began))
    predicted, *ratios = read_fisher(began, {name: importance["w"]}, kl, 5)
    assert predicted.value == pytest.approx(0.5 * float(importance["w"][at]) * 0.02**2, rel=1e-3)
    assert predicted.value == pytest.approx(measured, rel=0.25)
    for ratio, reading in zip(ratios, kl, strict=True):
        assert ratio.value == pytest.approx(predicted.value / reading.value)
        assert ratio.stderr == pytest.approx(ratio.value * reading.stderr / reading.value)


def test_a_rise_that_is_no_rise_has_no_ratio() -> None:
    accuracy = Reading("probe", "p", "sealed", 1, 0.5, 0.1, 9, "accuracy")
    nothing = Reading("kl", "old/d", "sealed", 1, 0.0, 0.0, 9, "nats")
    assert [r.name for r in read_fisher({}, {}, [accuracy, nothing], 1)] == ["predicted"]
