"""One cell: train one arm at one rate on one lesson and seed, then read it as every other arm.

Whatever trained it, the tuned checkpoint is read by `holdfast.compare`, beside the same base, on
the same probes and canary. A cell runs in a process of its own: its seconds are CPU seconds, its
peak memory is its own.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from arms import ARMS, Arm

from holdfast.compare import Texts, compare
from holdfast.demo import LENGTH
from holdfast.lab import base_path, write_files
from holdfast.levers.budget import Budget
from holdfast.meters import Reading
from holdfast.meters.canary import Canary
from holdfast.recipe import load_recipe
from holdfast.run import train

LEFT_OUT = ("functions", "hungarian")
"""Domains that no replay pool has."""
SEQUENCE = ("verbs", "extraction")
"""The lessons of the two-stage sequence `verbs+extraction`."""


def run(cell: dict[str, Any]) -> dict[str, Any]:
    """Train and read: what the cell's line holds besides its name.

    Args:
        cell: arm, lesson (two joined by `+` are taught one after the other), seed, rate, steps.
    """
    arm, seed = ARMS[cell["arm"]], cell["seed"]
    stages = cell["lesson"].split("+")
    with TemporaryDirectory() as scratch:
        base, seconds, learned = str(base_path()), 0.0, None
        for stage, lesson in enumerate(stages):
            files = _files(Path(scratch) / lesson, lesson, seed)
            started = time.process_time()
            tuned = _train(arm, base, files, Path(scratch) / f"run{stage}", cell)
            seconds += time.process_time() - started
            if stage + 1 < len(stages):
                learned = _read(base, tuned, [files], seed)["target"][lesson]
            base = tuned
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        every = [_files(Path(scratch) / lesson, lesson, seed) for lesson in stages]
        found = _read(str(base_path()), tuned, every, seed)
    first = {} if learned is None else {"after_first_stage": learned}
    return (
        found
        | first
        | {"left_out": LEFT_OUT, "seconds": round(seconds, 1), "peak_mib": round(peak)}
    )


def _files(folder: Path, lesson: str, seed: int) -> dict[str, Path]:
    """The lab's files of a lesson, and `replay` without the domains that are left out."""
    files = write_files(folder, lesson=lesson, seed=seed)
    lines = files["replay"].read_text(encoding="utf-8").splitlines(keepends=True)
    kept = folder / "replay_kept.jsonl"
    kept.write_text(
        "".join(line for line in lines if json.loads(line)["domain"] not in LEFT_OUT),
        encoding="utf-8",
    )
    return files | {"all": files["replay"], "replay": kept, "lesson_name": Path(lesson)}


def _rate(arm: Arm, times: float) -> float:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base_path())
    return Budget().peak(config, arm.adapted) * arm.times * times


def _train(arm: Arm, base: str, files: dict[str, Path], out: Path, cell: dict[str, Any]) -> str:
    """The tuned checkpoint's folder."""
    rate = _rate(arm, cell["rate"])
    if arm.peer is not None:
        from peers import PEERS

        return PEERS[arm.peer](base, files["lesson"], out, rate, cell["steps"], cell["seed"])
    words = [word.format(**files) for word in arm.words]
    words += LENGTH
    words += [f"levers.budget.learning_rate={rate}", f"train.steps={cell['steps']}"]
    words += [f"train.batch_tokens={arm.batch_tokens}", "gate.enabled=false", "data.heldout=0"]
    recipe = load_recipe(
        None,
        words,
        model=base,
        data=str(files["lesson"]),
        canary={"sources": [str(files["canary"])], "max_documents": 8},
        out=str(out),
        seed=cell["seed"],
    )
    train(recipe)
    if arm.soup is None:
        return str(out)
    return _averaged(base, out / "model", out / "average", arm.soup)


def _averaged(base: str, tuned: Path, out: Path, weight: float) -> str:
    """Base and tuned weights, interpolated (Wortsman et al. 2022, arXiv 2109.01903)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    start = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    model = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.lerp_(start[name], 1 - weight)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(tuned).save_pretrained(out)
    return str(out)


def _read(base: str, tuned: str, files: list[dict[str, Path]], seed: int) -> dict[str, Any]:
    """Every probe and canary before and after, item by item."""
    probes = [str(files[0]["probes"])]
    with TemporaryDirectory() as scratch:
        for more in files[1:]:  # the base's own probes are in each file: only the lesson's are new
            lines = more["probes"].read_text(encoding="utf-8").splitlines(keepends=True)
            own = [line for line in lines if "target" in json.loads(line)["tags"]]
            probes.append(str(Path(scratch) / f"{more['lesson_name']}.jsonl"))
            Path(probes[-1]).write_text("".join(own), encoding="utf-8")
        canary = Canary.model_validate({"sources": [str(files[0]["canary"])]})
        found = compare(base, tuned, Texts(canary, probes), seed=seed)
    before = {_key(r): r for r in found.before}
    pairs: dict[str, dict[str, Any]] = {"probe": {}, "canary": {}}
    for after in found.after:
        then = before.get(_key(after))
        if after.meter in pairs and then is not None:
            rows = pairs[after.meter].setdefault(
                after.name, {"kind": _kind(after), "before": [], "after": []}
            )
            for item in sorted(after.items):  # a canary has two halves: one after the other
                rows["before"].append(_short(then.items[item]))
                rows["after"].append(_short(after.items[item]))
    kl = {r.name: r.value for r in found.after if r.meter == "kl"}
    targets = {
        _lesson_of(name): sum(rows["after"]) / len(rows["after"])
        for name, rows in pairs["probe"].items()
        if rows["kind"] == "target"
    }
    drift = found.summary.get("relative_displacement")
    return {"target": targets, **pairs, "kl": kl, "displacement": drift}


def _kind(reading: Reading) -> str:
    """The kind of a probe; empty for a canary."""
    kinds = ("target", "adoption", "control", "rare", "guardrail")
    return next((kind for kind in kinds if kind in reading.tags), "")


def _short(value: float) -> float | int:
    """A right or wrong in one character, a loss in four digits."""
    return int(value) if value in (0.0, 1.0) else round(value, 4)


def _lesson_of(probe: str) -> str:
    return {"irregular_verbs": "verbs", "emblems": "facts"}.get(probe, probe)


def _key(reading: Reading) -> tuple[str, str, str]:
    return reading.meter, reading.name, reading.split


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    print(json.dumps(run(json.loads(sys.argv[1]))))
