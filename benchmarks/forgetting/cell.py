"""One cell: train one arm at one rate on one lesson and seed, then read it as every other arm.

Whatever trained it, the tuned checkpoint is read by `holdfast.compare`, beside the same base, on
the same probes and canary.
"""

from __future__ import annotations

import json
import resource
import statistics
import time
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from arms import ARMS, SCAN, STAGES, VALIDATION, Arm

from holdfast.checkpoint import load_checkpoint
from holdfast.compare import Texts, compare, evaluate
from holdfast.data.chat import encode_all
from holdfast.data.rows import Source, iter_rows
from holdfast.demo import DOCUMENTS, LENGTH
from holdfast.lab import base_path, write_files
from holdfast.lab.files import CANARIES
from holdfast.levers.budget import Budget
from holdfast.meters import Reading
from holdfast.meters.canary import Canary
from holdfast.meters.kl import mean_kls
from holdfast.meters.probes import Item
from holdfast.meters.probes.read import read_probes
from holdfast.meters.recovery import read_recovery, recovery_examples
from holdfast.meters.scoring import Scored
from holdfast.recipe import load_recipe
from holdfast.reference.frozen import Frozen
from holdfast.run import train

LEFT_OUT = ("functions", "hungarian")
"""Domains that no replay pool has."""
PRACTISED = ("arithmetic", "capitals", "records", "stories", "verbs")
UNWATCHED = [
    "gate.enabled=false",
    "data.heldout=0",
    "alarms=none",
    "train.save_every=100000",
]
NEVER = ["train.measure_every=100000"]
"""Every arm is measured once, at its end, and by `_read`; one alone looks while it trains."""
Cell = dict[str, Any]


def learn(cell: Cell) -> list[Cell]:
    """Train and read: what the cell's line holds besides its name.

    Args:
        cell: arm, lesson (two joined by `+` are taught one after the other), seed, rate, steps;
            base: a folder, where it is not the lab's own.
    """
    arm, seed = (ARMS | SCAN | STAGES)[cell["arm"]], cell["seed"]
    stages = cell["lesson"].split("+")
    with TemporaryDirectory() as scratch:
        files = [_files(Path(scratch) / lesson, lesson, seed, arm.watched) for lesson in stages]
        origin, first = origin_of(cell), {}
        base = origin
        started = time.perf_counter()
        for stage, given in enumerate(files):
            given |= {"first": files[0]["lesson"]} if stage else {}
            base = _train(arm, base, given, Path(scratch) / f"run{stage}", cell, stage)
            if len(stages) > 1 and not arm.staged:
                base = _merged(base, Path(scratch) / f"stage{stage}")
            if stage + 1 < len(stages):
                first = {"after_first_stage": _learned(base, given)}
        seconds = time.perf_counter() - started
        found = _read(origin, base, files, seed)
        if seed != VALIDATION:
            items = Texts(Canary(), [str(files[0]["probes"])]).items()
            practised = peak_rate(Arm(), 0.1, origin)
            found |= _probed(files[-1]["lesson"], origin, base, items, practised)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    about = {"left_out": LEFT_OUT, "seconds": round(seconds, 1), "device": device}
    return [found | first | about]


def cost_of(cell: Cell) -> list[Cell]:
    """Seconds of CPU and peak memory of a training alone; the process must be its own.

    A training of three steps goes before, so that what is imported on the way is not
    counted; peak memory is the process's.
    """
    with TemporaryDirectory() as scratch:
        arm, base = ARMS[cell["arm"]], origin_of(cell)
        files = _files(Path(scratch) / "files", cell["lesson"], cell["seed"], arm.watched)
        _train(arm, base, files, Path(scratch) / "first", cell | {"steps": 3})
        started = time.process_time()
        _train(arm, base, files, Path(scratch) / "run", cell)
        seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return [{"seconds": round(seconds, 1), "peak_mib": peak >> 10}]


def _files(folder: Path, lesson: str, seed: int, watched: bool = False) -> dict[str, Path]:
    """The lab's files of a lesson, and `replay` without the domains that are left out.

    `few` is a canary for runs that need not watch one, of all domains; `watched` one for those that
    do: of other texts than the one by which they are judged.
    """
    files = write_files(folder, lesson=lesson, seed=seed)
    lines = files["replay"].read_text(encoding="utf-8").splitlines(keepends=True)
    kept, few = folder / "replay_kept.jsonl", folder / "few.jsonl"
    kept.write_text(
        "".join(line for line in lines if json.loads(line)["domain"] not in LEFT_OUT),
        encoding="utf-8",
    )
    canary = files["canary"].read_text(encoding="utf-8").splitlines(keepends=True)
    few.write_text("".join(canary[:: len(canary) // 8][:8]), encoding="utf-8")
    found = files | {"all": files["replay"], "replay": kept, "few": few, "name": Path(lesson)}
    if watched:
        more, count = folder / "more", CANARIES + DOCUMENTS
        texts = write_files(more, lesson=lesson, seed=seed, documents_a_domain=count)["canary"]
        lines = texts.read_text(encoding="utf-8").splitlines(keepends=True)
        texts.write_text("".join(line for line in lines if line not in canary), encoding="utf-8")
        found["watched"] = texts
    return found


def origin_of(cell: Cell) -> str:
    """The base that a cell's training starts from."""
    return str(cell.get("base") or base_path())


def peak_rate(arm: Arm, times: float, base: str | Path) -> float:
    """So many times the automatic learning rate for a model as large, as the arm scales it."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base)
    return Budget().peak(config, arm.adapted) * arm.times * times


def _train(
    arm: Arm, base: str, files: dict[str, Path], out: Path, cell: Cell, stage: int = 0
) -> str:
    """The tuned checkpoint's folder."""
    rate, steps = peak_rate(arm, cell["rate"], origin_of(cell)), cell["steps"]
    if arm.peer is not None:
        from peers import PEERS

        return PEERS[arm.peer](base, files["lesson"], out, rate, steps, cell["seed"])
    words = [*LENGTH, *UNWATCHED, *([] if arm.watched else NEVER)]
    words += [f"train.batch_tokens={arm.batch_tokens(stage)}"]
    words += [f"levers.budget.learning_rate={rate}", f"train.steps={steps}"]
    if stage and arm.earlier and not arm.staged:
        words += [f"levers.replay.earlier.fraction={arm.earlier}", "levers.replay.loss=ntp"]
        words += [f"levers.replay.earlier.sources=[{files['first']}]"]
    words += [word.format(**files) for word in arm.words]
    recipe = load_recipe(
        None,
        words,
        model=base,
        data=str(files["lesson"]),
        canary={"sources": [str(files["watched" if arm.watched else "few"])]},
        out=str(out),
        seed=cell["seed"],
    )
    train(recipe)
    if arm.soup is None:
        return str(out)
    return _averaged(base, out / "model", out / "average", arm.soup)


def _merged(tuned: str, out: Path) -> str:
    """A stage as a plain model, for the next one to start from, whatever trained it."""
    stage = load_checkpoint("TUNED", tuned, None, "float32")
    stage.model.save_pretrained(out)
    stage.tokenizer.save_pretrained(out)
    return str(out)


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
        # the base's own probes are in each file: of a second one only the lesson's are new
        probes += [str(_own_probe(more, Path(scratch))) for more in files[1:]]
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


def _own_probe(files: dict[str, Path], scratch: Path) -> Path:
    """A lesson's probe without the base's."""
    lines = files["probes"].read_text(encoding="utf-8").splitlines(keepends=True)
    out = scratch / f"{files['name']}.jsonl"
    out.write_text("".join(line for line in lines if "target" in json.loads(line)["tags"]))
    return out


def _learned(tuned: str, files: dict[str, Path]) -> float:
    """Accuracy on a lesson's probe, of all its items."""
    with TemporaryDirectory() as scratch:
        texts = Texts(Canary(), [str(_own_probe(files, Path(scratch)))])
        found = evaluate(tuned, texts, dtype="float32").readings
    items = [
        right for reading in found if _kind(reading) == "target" for right in reading.items.values()
    ]
    return sum(items) / len(items)


def _probed(lesson: Path, base: str, tuned: str, items: list[Item], rate: float) -> Cell:
    """KL(base || tuned) on the lesson's own responses; the old probes after ten old examples.

    KL: nats a token, 64 rows. The examples are two of each of the five commonest probes; they are
    practised on a copy for five steps (`holdfast.meters.recovery`), at a tenth of full
    fine-tuning's rate, and not asked afterwards.
    """
    first, last = (load_checkpoint(name, path, None, "float32") for name, path in
                   (("BASE", base), ("TUNED", tuned)))  # fmt: skip
    with TemporaryDirectory() as scratch:
        rows, _ = encode_all(
            islice(iter_rows(Source(path=str(lesson))), 64),
            last.tokenizer,
            max_length=256,
            cache_dir=Path(scratch),
            fingerprint="lesson",
        )
        texts = [Scored(row["input_ids"], row["loss_mask"]) for row in rows]
    kl = statistics.mean(mean_kls(last.model, Frozen(first.model, last.model.device), texts))
    old = [item for item in items if {"guardrail", "rare"} & set(item.tags)]
    practised = [
        item.model_copy(update={"tags": [*item.tags, "recovery"]})
        for probe in PRACTISED
        for item in [item for item in old if item.probe == probe][:2]
    ]
    asked = [item for item in old if item.id not in {one.id for one in practised}]
    found = read_recovery(
        last.model,
        recovery_examples(practised, last.tokenizer, last.model.config),
        lambda model: read_probes(model, last.tokenizer, asked, 0),
        learning_rate=rate,
    )
    back = {r.name.removesuffix("/after"): r.value for r in found if r.name.endswith("/after")}
    return {"kl_new": kl, "recovered": back}


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
