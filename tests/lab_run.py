"""A short run on the lab's base whose wires a test may cross: the alarms are to tell."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast import run
from holdfast.lab import base_path
from holdfast.lab.corpus import documents
from holdfast.lab.lessons import LESSONS
from holdfast.recipe import load_recipe
from tiny import jsonl

DOMAINS = ("arithmetic", "stories")
"""Two that are not alike."""
STEPS, EVERY = 8, 2
WORDS = (
    f"train.steps={STEPS}",
    "train.batch_tokens=256",
    "data.max_length=128",
    "data.heldout=0",
    "gate.enabled=false",
    "train.measure_every=100",
    f"alarms.every={EVERY}",
    "alarms.block=10",
    "levers.kl_anchor.self_generated={rows: 16, max_new_tokens: 32}",
)


@dataclass(frozen=True)
class Seen:
    """What a run left behind."""

    folder: Path
    result: run.RunResult

    @property
    def alarms(self) -> dict[str, int]:
        """Each alarm with the step at which it was raised."""
        return {alarm["name"]: alarm["step"] for alarm in self.result.summary["alarms"]}

    @property
    def checks(self) -> list[dict[str, Any]]:
        lines = (self.folder / "alarms.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def texts(domain: str, split: Any, count: int, seed: int) -> list[dict[str, Any]]:
    """Documents of one of the lab's domains."""
    source = documents(domain, seed, split)
    return [{"text": next(source).text, "domain": domain} for _ in range(count)]


def write_inputs(folder: Path, seed: int = 0) -> dict[str, Path]:
    """The lab's lesson, and canary and replay of two domains."""
    lesson = LESSONS["verbs"].rows(120, seed=seed)
    canary = [row for name in DOMAINS for row in texts(name, "canary", 40, seed)]
    replay = [row for name in DOMAINS for row in texts(name, "train", 60, seed + 1_000_000)]
    return {
        "lesson": jsonl(folder / "lesson.jsonl", lesson),
        "canary": jsonl(folder / "canary.jsonl", canary),
        "replay": jsonl(folder / "replay.jsonl", replay),
    }


def lab_run(files: dict[str, Path], out: Path, *words: str, seed: int = 0) -> Seen:
    """A few steps of full fine-tuning with replayed rows, unless `words` say otherwise."""
    recipe = load_recipe(
        None,
        [*WORDS, f"levers.replay.sources=[{files['replay']}]", *words],
        model=str(base_path()),
        data=str(files["lesson"]),
        canary={"sources": [str(files["canary"])]},
        out=str(out),
        seed=seed,
    )
    return Seen(out, run.train(recipe))
