"""Which checkpoint is kept. Expected numbers are worked out by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.choice import Choice, gain, noted, score
from holdfast.gate.verdict import Gate, decide
from holdfast.meters import Reading
from holdfast.points import as_sealed
from holdfast.report.frontier import frontier, of_checkpoints, of_two, told


def read(meter: str, name: str, step: int, value: float, unit: str = "nats") -> Reading:
    """Eight items of one value; a lesson or a probe named `goal` is a target."""
    kind = "canary" if meter == "canary" else "guardrail"
    tags = ("target",) if meter == "lesson" or name == "goal" else (kind,)
    items = {f"{n}": value for n in range(8)}
    return Reading(meter, name, "selection", step, value, 0.0, 8, unit, tags=tags, items=items)


def at(step: int, canary: float, lesson: float, *more: Reading) -> list[Reading]:
    return [read("canary", "web", step, canary), read("lesson", "heldout", step, lesson), *more]


GATE = Gate(margins={"canary": "10%", "gsm8k": "3pt"})
CHOICE = Choice.of(at(0, 2.0, 4.0), GATE)


def test_a_checkpoint_is_scored_by_its_target_and_its_worst_guardrail() -> None:
    """Of 4 nats 1 was learned: 0.25. The canary rose by 0.1 of its margin of 0.2: half of it."""
    point = CHOICE.point(5, at(5, 2.1, 3.0))
    assert (gain(point), point.worst) == (pytest.approx(0.25), pytest.approx(0.5))
    assert score(gain(point), point.worst) == pytest.approx(0.25)
    beyond = CHOICE.point(6, at(6, 2.6, 0.0))
    assert score(gain(beyond), beyond.worst) == pytest.approx(-3.0)


def test_a_margin_of_what_is_not_read_while_training_is_passed_over() -> None:
    """`gsm8k` is of the gate, which reads it at the end."""
    assert CHOICE.gate.margins == {"canary": "10%"}
    assert CHOICE.missing() == ""


def test_target_probes_come_before_the_lessons_loss() -> None:
    goal = [read("probe", "goal", step, value, "accuracy") for step, value in ((0, 0.0), (5, 0.5))]
    choice = Choice.of(at(0, 2.0, 4.0, goal[0]), GATE)
    assert gain(choice.point(5, at(5, 2.0, 1.0, goal[1]))) == pytest.approx(0.5)


def test_nothing_can_be_chosen_without_target_or_guardrail() -> None:
    assert "no target" in Choice.of([read("canary", "web", 0, 2.0)], GATE).missing()
    assert "no guardrail" in Choice.of([read("lesson", "heldout", 0, 2.0)], GATE).missing()


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_not_a_number_is_never_the_best(broken: float) -> None:
    point = CHOICE.point(5, at(5, broken, 1.0))
    assert score(gain(point), point.worst) == -math.inf
    point = CHOICE.point(5, at(5, 2.0, broken))
    assert score(gain(point), point.worst) == -1


@given(st.floats(-1, 1), st.floats(-50, 1), st.floats(-1, 1), st.floats(1, 50, exclude_min=True))
def test_within_the_margins_comes_before_beyond(
    gain: float, within: float, other: float, beyond: float
) -> None:
    assert score(gain, within) >= -1 > score(other, beyond)


def test_the_frontier_of_a_run_is_drawn_from_its_readings() -> None:
    """Gains 0.25 and 0.5 of the base's 4 nats: the first has half of the last one's gain."""
    points = [CHOICE.point(5, at(5, 2.1, 3.0)), CHOICE.point(10, at(10, 2.4, 2.0))]
    records = [reading.as_record() for point in points for reading in noted(point, gain(point))]
    marks = of_checkpoints(records, kept=5)
    assert [(m.name, m.way, m.target, m.kept, m.chosen) for m in marks] == [
        ("base", 0.0, 0.0, True, False),
        ("step 5", 0.5, pytest.approx(0.5), True, True),
        ("step 10", 1.0, 1.0, False, False),
    ]
    assert told(marks) == (
        "step 5 of 10: the best target of the 1 of 2 checkpoints within every margin "
        "(worst: canary/web at +0.50 of its margin)"
    )
    assert "none of 1 checkpoints is within every margin" in told(
        of_checkpoints(records[2:], kept=10)
    )
    assert frontier(marks) is not None
    assert of_checkpoints([], kept=5) == []


def test_the_frontier_of_two_models_is_drawn_from_their_verdict() -> None:
    """The canary rose by 0.4 nats, its margin is 0.2; the lesson was learned."""
    gate = Gate(margins={"canary": "10%"})
    result = decide(as_sealed(at(0, 2.0, 4.0)), as_sealed(at(1, 2.4, 1.0)), gate)
    base, tuned = of_two(result)
    assert (base.target, base.worst) == (0.0, 0.0)
    assert (tuned.target, tuned.worst) == (1.0, pytest.approx(2.0))
    assert (tuned.culprit, tuned.kept) == ("canary/web", False)
    worse = decide(as_sealed(at(0, 2.0, 4.0)), as_sealed(at(1, 2.0, 5.0)), gate)
    assert [mark.target for mark in of_two(worse)] == [None, None]
    assert of_two(decide([], [], Gate())) == []
