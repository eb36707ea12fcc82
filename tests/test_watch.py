"""`holdfast watch`: what a run folder shows, while the run goes on and afterwards."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast.artifact import RunFolder
from holdfast.cli import watch
from holdfast.cli.watch import look
from holdfast.meters import Reading

Cli = Callable[..., Any]


@pytest.fixture
def going(tmp_path: Path) -> RunFolder:
    """A run that has begun and has told of an alarm."""
    folder = RunFolder.create(tmp_path / "run")
    folder.write_recipe({"resolved": {"steps": 40}})
    folder.append(
        [
            Reading("canary", "web", "selection", 0, 2.0, 0.01, 90, "nats"),
            Reading("loss", "task", "train", 9, 1.25, None, 1),
            Reading("canary", "web", "selection", 10, 2.5, 0.02, 90, "nats"),
            Reading("fall", "canary/web", "selection", 10, 0.5, float("nan"), 20, "nats"),
        ]
    )
    alarm = {"name": "canary/web", "text": "canary/web has risen"}
    folder.append_alarms({"step": 10, "alarms": [alarm], "notes": [], "checks": 1, "evidence": {}})
    return folder


def test_a_run_that_goes_on(going: RunFolder, holdfast: Cli) -> None:
    outcome = holdfast("watch", str(going.path), "--json")
    assert outcome.code == 0
    shown = json.loads(outcome.out)
    assert (shown["step"], shown["steps"], shown["finished"], shown["verdict"]) == (
        *(10, 40, False),
        None,
    )
    assert shown["losses"] == {"loss/task": 1.25}
    (canary, fall) = shown["readings"]
    assert (canary["before"], canary["value"], canary["stderr"], canary["n"]) == (
        2.0,
        2.5,
        0.02,
        90,
    )
    assert fall["stderr"] is None, "JSON knows no NaN"
    assert shown["alarms"] == [{"step": 10, "name": "canary/web", "text": "canary/web has risen"}]


def test_the_view_holds_progress_losses_readings_and_alarms(
    going: RunFolder, holdfast: Cli
) -> None:
    outcome = holdfast("watch", str(going.path), "--once")
    assert outcome.code == 0
    for part in ("step 10 of 40", "training", "loss/task 1.25", "canary web", "2.5", "0.02"):
        assert part in outcome.out
    assert "alarm at step 10: canary/web has risen" in outcome.out


def test_it_ends_with_the_run(going: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a terminal it is shown until the verdict is there: here after the second look."""
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            going.write_verdict({"steps": 40}, {"verdict": "PASS"})

    monkeypatch.setattr(watch.time, "sleep", sleep)
    monkeypatch.setattr("rich.console.Console.is_terminal", property(lambda self: True))
    watch.watch(going.path, once=False, as_json=False)
    assert slept == [watch.SECONDS] * 2


def test_a_finished_run_and_one_that_was_taken_up_again(finished_run: Path, tmp_path: Path) -> None:
    folder = RunFolder(shutil.copytree(finished_run, tmp_path / "run"))
    view = look(folder.path)
    assert (view.step, view.steps, view.finished) == (2, 2, True)
    folder.append([Reading("loss", "task", "train", 3, 1.0, None, 1)])
    later = time.time_ns() + 10**9
    os.utime(folder.readings, ns=(later, later))
    assert not look(folder.path).finished


def test_a_guard_has_no_recipe(going: RunFolder) -> None:
    going.recipe.unlink()
    assert (look(going.path).steps, look(going.path).step) == (None, 10)


@pytest.mark.parametrize("words", [("--once",), ("--json",), ()])
def test_no_run_folder(tmp_path: Path, holdfast: Cli, words: tuple[str, ...]) -> None:
    outcome = holdfast("watch", str(tmp_path / "nowhere"), *words)
    assert outcome.code == 2
    said = json.loads(outcome.out)["error"] if "--json" in words else outcome.err.splitlines()
    (line,) = said
    assert "is no run folder" in line
