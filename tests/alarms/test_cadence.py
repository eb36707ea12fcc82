"""How often: within the share of the time, once chosen always the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.alarms import cadence
from holdfast.alarms.cadence import FIRST, Cadence, steps_between

SECONDS = st.floats(1e-4, 1e4)


@given(check=SECONDS, step=SECONDS, share=st.floats(0.01, 0.5))
def test_checks_keep_within_their_share(check: float, step: float, share: float) -> None:
    every = steps_between(check, step, share)
    assert check / (check + every * step) <= share * (1 + 1e-9)
    if every > 1:  # and not rarer than the grid asks for: its steps are at most 2 apart
        assert 2 * check / (2 * check + every * step) > share * (1 - 1e-9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which the test tells."""
    now = [0.0]
    monkeypatch.setattr(cadence.time, "perf_counter", lambda: now[0])
    return now


def run(found: Cadence, clock: list[float], steps: range, step: float, check: float) -> list[int]:
    """The steps that are checked, where a step and a check take so long."""
    checked = []
    found.resume_clock()
    for number in steps:
        clock[0] += 60.0 if number <= 2 else step  # the first ones are slow
        found.step_done()
        if found.due(number):
            found.choose(check)
            checked.append(number)
        found.resume_clock()
    return checked


def test_it_is_chosen_at_the_first_check(clock: list[float], tmp_path: Path) -> None:
    kept = tmp_path / "cadence.json"
    found = Cadence(None, 0.05, kept)
    assert run(found, clock, range(1, 101), 0.1, 0.1) == [FIRST, 20, 40, 60, 80, 100]
    assert found.every == 20  # 0.1 * 0.95 / (0.05 * 0.1) = 19


def test_a_resumed_run_keeps_it(clock: list[float], tmp_path: Path) -> None:
    kept = tmp_path / "cadence.json"
    run(Cadence(None, 0.05, kept), clock, range(1, 31), 0.1, 0.1)
    for start in (1, 6, 11, 35):
        again = Cadence(None, 0.05, kept)
        checked = run(again, clock, range(start, 101), 5.0, 0.1)  # a slower machine
        whole = [FIRST, 20, 40, 60, 80, 100]
        assert checked == [step for step in whole if step >= start]


def test_pinned_it_is_what_was_said(clock: list[float], tmp_path: Path) -> None:
    found = Cadence(7, 0.05, tmp_path / "cadence.json")
    assert run(found, clock, range(1, 30), 1.0, 1000.0) == [7, 14, 21, 28]
    assert not (tmp_path / "cadence.json").exists()
