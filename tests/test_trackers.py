"""Every reading reaches a tracker, through transformers' callbacks, and the tracker ends last."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback
from transformers.integrations import integration_utils

import tiny
from holdfast.meters import Reading
from holdfast.trackers import logs_of
from test_guard import PROBES, PROSE, guard_of, sft

Cli = Callable[..., Any]


class StandIn(TrainerCallback):
    """A tracker: what it was told of each step, and when it ended."""

    def __init__(self) -> None:
        self.told: list[tuple[int, dict[str, Any]]] = []
        SEEN.append(self)
        self.ended = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        assert not self.ended
        self.told.append((state.global_step, dict(logs)))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended = True

    def values(self) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for _, logs in self.told:
            for name, value in logs.items():
                found.setdefault(name, []).append(value)
        return found


SEEN: list[StandIn] = []


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    SEEN.clear()
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "standin", StandIn)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "readings.jsonl").read_text().splitlines()]


def require_all(tracker: StandIn, folder: Path, besides: tuple[str, ...] = ()) -> None:
    """Each line of the run folder was told, with its error."""
    told = tracker.values()
    lines = [r for r in records(folder) if r["meter"] not in besides]
    assert len(lines) > 20
    for r in lines:
        parts = (r["meter"], r["name"], *(() if r["split"] == "train" else (r["split"],)))
        key = "/".join(parts)
        assert any(v == r["value"] or v != v for v in told[key]), key
        if r["stderr"] is not None and math.isfinite(r["stderr"]):
            assert r["stderr"] in told[f"{key}/stderr"], key


def test_a_run_reports_all_it_reads(here: Path, quick: list[str], holdfast: Cli) -> None:
    canary = tiny.jsonl(here / "prose.jsonl", PROSE)
    outcome = holdfast(
        *("train", "--model", "tiny", "--data", "lesson.jsonl", "--out", "run", *quick),
        *("train.steps=4", f"canary.sources=[{canary}]", "train.report_to=[standin]"),
        *("alarms.every=2", "train.measure_every=2"),
    )
    assert outcome.code == 0, outcome.err
    tracker = SEEN[0]
    require_all(tracker, here / "run")
    assert tracker.ended
    steps = [step for step, logs in tracker.told if "canary/prose/selection" in logs]
    assert (steps[0], steps[-1]) == (0, 4)
    assert {"fall/canary/prose/selection", "evidence/canary/prose/selection"} <= {*tracker.values()}
    assert len(tracker.values()["loss"]) == 4, "the trainer's own log is not disturbed"


def test_a_guard_that_is_attached_reports_all_it_reads(tmp_path: Path) -> None:
    tiny.jsonl(tmp_path / "prose.jsonl", PROSE)
    tiny.jsonl(tmp_path / "probes.jsonl", PROBES)
    guard = guard_of(tmp_path, tmp_path / "run")
    trainer = sft(tmp_path / "hf", None, lora=True, report_to=["standin"])
    guard.attach(trainer)
    trainer.train()
    tracker = SEEN[0]
    require_all(tracker, tmp_path / "run", besides=("loss", "grad_norm", "learning_rate"))
    assert tracker.ended


def test_names_that_a_tracker_takes() -> None:
    odd = Reading("canary", "a b/c:d(é)", "sealed", 3, 1.5, float("nan"), 4)
    assert logs_of([odd]) == {"canary/a b/c_d_é_/sealed": 1.5}
