"""Alarms in a whole run: kept, shown, told of, and, where asked for, its end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from holdfast import run as holdfast_run

Cli = Callable[..., Any]
PROSE = [{"text": f"it was day {n} and the cat sat {'on ' * (n % 3)}the mat."} for n in range(60)]
STEPS = 12


@pytest.fixture
def run(here: Path, quick: list[str], holdfast: Cli) -> Callable[..., tuple[Any, Path]]:
    """Train for some steps at a rate that breaks the canary at once; `words` over it."""
    canary = tiny.jsonl(here / "prose.jsonl", PROSE)

    def train(*words: str) -> tuple[Any, Path]:
        outcome = holdfast(
            *("train", "--model", "tiny", "--data", "lesson.jsonl", "--out", "run", *quick),
            *(f"train.steps={STEPS}", "canary.max_documents=60", f"canary.sources=[{canary}]"),
            *("levers.adapter=none", "levers.budget.learning_rate=1.0"),
            *("alarms.every=2", "alarms.block=10", *words),
        )
        return outcome, here / "run"

    return train


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "alarms.jsonl").read_text().splitlines()]


def test_an_alarm_is_noted_and_the_run_goes_on(run: Cli) -> None:
    outcome, folder = run()
    assert outcome.code == 0, outcome.err
    (first,) = [line for line in lines(folder) if line["alarms"]]
    assert [alarm["name"] for alarm in first["alarms"]] == ["canary/prose"]
    assert f"alarm at step {first['step']}: canary/prose has risen" in outcome.out
    records = [json.loads(one) for one in (folder / "readings.jsonl").read_text().splitlines()]
    (marked,) = [r for r in records if r["meter"] == "alarm"]
    assert (marked["step"], marked["name"]) == (first["step"], "canary/prose")
    falls = [r for r in records if r["meter"] == "fall"]
    assert [r["step"] for r in falls] == [line["step"] for line in lines(folder)][: len(falls)]
    assert all(r["stderr"] is not None and r["n"] >= 10 for r in falls)
    summary = json.loads((folder / "verdict.json").read_text())["summary"]
    assert (summary["steps"], summary["stopped"]) == (STEPS, None)
    assert [alarm["step"] for alarm in summary["alarms"]] == [first["step"]]
    assert "canary/prose has risen" in (folder / "report.html").read_text()


def test_it_may_end_the_run_which_then_fails(run: Cli) -> None:
    outcome, folder = run("alarms.stop=true", "gate.enabled=true")
    assert outcome.code == 3
    verdict = json.loads((folder / "verdict.json").read_text())
    stop = verdict["summary"]["steps"]
    assert stop < STEPS
    assert verdict["verdict"] == "FAIL"
    assert "canary/prose has risen" in verdict["reason"]
    assert "canary/prose has risen" in verdict["summary"]["stopped"]
    assert (folder / "checkpoints" / f"checkpoint-{stop}" / "complete.json").is_file()
    assert (folder / "model" / "model.safetensors").is_file()


def test_a_run_that_an_alarm_ended_is_not_trained_on_when_it_is_taken_up(
    run: Cli, holdfast: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when training was over and nothing was read yet."""

    class Killed(BaseException): ...

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(holdfast_run, "_save_artifact", killed)
        with pytest.raises(Killed):
            run("alarms.stop=true", "gate.enabled=true")
    outcome = holdfast("train", "--out", "run", "--resume")
    assert outcome.code == 3, outcome.err
    verdict = json.loads(Path("run/verdict.json").read_text())
    ended = [line["step"] for line in lines(Path("run")) if line["alarms"]]
    assert [verdict["summary"]["steps"]] == ended
    assert "canary/prose has risen" in verdict["reason"]
    assert "canary/prose has risen" in verdict["summary"]["stopped"]


def test_without_a_gate_the_exit_code_says_so(run: Cli) -> None:
    outcome, _ = run("alarms.stop=true")
    assert outcome.code == 3


def test_a_command_is_told_and_one_that_fails_is_noted(run: Cli, here: Path) -> None:
    code = (
        'import pathlib, sys; pathlib.Path("told.json").write_text(sys.stdin.read()); sys.exit(7)'
    )
    outcome, folder = run(f"alarms.command={sys.executable} -c '{code}'")
    assert outcome.code == 0
    told = json.loads((here / "told.json").read_text())
    assert told["run"] == "run"
    assert told["alarms"][0]["name"] == "canary/prose"
    (first,) = [line for line in lines(folder) if line["alarms"]]
    assert first["notes"] == ["alarms.command: ended with exit code 7"]
    assert "warning: alarms.command: ended with exit code 7" in outcome.out


def test_turned_off_nothing_is_checked(run: Cli) -> None:
    outcome, folder = run("alarms.enabled=false", "alarms.stop=true")
    assert outcome.code == 0
    assert not (folder / "alarms.jsonl").exists()
