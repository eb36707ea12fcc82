"""Rewind: the largest step from base to tuned that keeps every guardrail within its margin.

Points along a way (`between.py`) are read on the *selection* split: the selection half of the
canary, and the half of each probe's items that falls to it. First a coarse grid from the base to
the tuned model. If everything is within margin up to some point and nothing beyond it, and no
guardrail is shown to recover on the way, the last such point is found by bisection. Otherwise the
way is not monotone, bisection may land anywhere, and the largest point of the grid below the first
violation is taken, which is said. What is taken was always read itself.

The sealed half is read once, of what was chosen, for the verdict.

Source: PEFT-Arena (arXiv 2605.28819), final checkpoints overshoot; merging does not reliably
mitigate (arXiv 2510.17776), so the point is measured for each run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from holdfast.artifact import RunFolder
from holdfast.between import (
    Checkpoints,
    Line,
    Tensors,
    Way,
    adapter_on,
    parts,
    saved_while_training,
    why_not_scaled,
)
from holdfast.checkpoint import Checkpoint, Dtype
from holdfast.errors import RequestError
from holdfast.files import write_text
from holdfast.gate.looks import look
from holdfast.gate.verdict import Gate, GateResult, Verdict, decide
from holdfast.measure import require_finite
from holdfast.meters import Reading
from holdfast.meters.probes import require_both_halves
from holdfast.pair import QUIET, Pair, Texts, asked, load_pair, of_run, require_free, title, written
from holdfast.points import Point, Rule, as_sealed, furthest, guardrails, judged, recovered
from holdfast.report.frontier import Mark, of_checkpoints
from holdfast.report.page import ReportData, write_report

PathName = Literal["auto", "adapter", "weights", "blocks", "checkpoints"]
PATHS: tuple[PathName, ...] = ("auto", "adapter", "weights", "blocks", "checkpoints")


@dataclass(frozen=True)
class Rewound:
    """What a rewind came to."""

    points: tuple[Point, ...]
    """All that were read, from the base to the tuned model."""
    chosen: Point
    notes: tuple[str, ...]
    """What to know of the way, such as that it is not monotone."""
    verdict: GateResult | None
    """On the sealed split, of what was chosen; None where that is the base."""
    artifact: Path | None
    """The folder of the adapter or model that was written."""
    summary: dict[str, Any]

    def marks(self) -> list[Mark]:
        """The frontier, as it is drawn and listed."""
        tuned = self.points[-1]
        share = {p.position: p.position / (tuned.position or 1) for p in self.points}
        return [
            Mark(
                name=p.name,
                way=share[p.position],
                target=p.target_kept(tuned),
                worst=p.worst,
                culprit=p.culprit,
                kept=p.kept,
                chosen=p is self.chosen,
            )
            for p in self.points
        ]


def rewind(
    base: str,
    tuned: str,
    texts: Texts | None = None,
    *,
    path: PathName = "auto",
    rule: Rule = "estimate",
    gate: Gate | None = None,
    out: Path | None = None,
    tokenizer: str | None = None,
    dtype: Dtype = "auto",
    seed: int = 0,
    console: Console = QUIET,
) -> Rewound:
    """Find the largest step from `base` to `tuned` that keeps every guardrail, and write it.

    Args:
        base: a model folder, a hub id, a run folder or an adapter; and so is `tuned`.
        texts: what to read with; None: what the run `tuned` was read with.
        path: which way back (`between.py`). auto: adapter where `tuned` is a LoRA adapter on
            `base`, else weights.
        rule: estimate: the estimated fall is within the margin. shown: at level alpha it is shown
            to be, as the gate asks for.
        gate: margins; None: those of the run `tuned`, or the defaults.
        out: a new folder for the artifact, the frontier and a report.
        tokenizer: of both, where their folders have none.
        dtype: of the weights in memory; see `Model.dtype`. A whole model is written in it.
        seed: of the canary, where the base writes it.

    Raises:
        RequestError: one of the two or a file cannot be used, they are the same weights, no way of
            this kind leads from one to the other, or the items are too few; nothing is written.
    """
    started = time.perf_counter()
    require_free(out)
    theirs = None if texts and gate else of_run(tuned)
    texts = texts or (theirs[0] if theirs else Texts())
    gate = gate or (theirs[1] if theirs else Gate())
    items = texts.items()
    require_both_halves(items)
    folders = saved_while_training(tuned) if path == "checkpoints" else []
    pair = load_pair(base, tuned, tokenizer, dtype, console)
    _require_one_vocabulary(pair)
    first, last = pair.base, pair.tuned
    notes: list[str] = []
    summary: dict[str, Any] = {}
    documents = pair.texts_or_samples(texts, seed, summary, console)
    reader = texts.measure(first.tokenizer, documents, items, pair.longest)
    measure = replace(reader, choosing=True)
    with console.status(f"reading {base}"):
        before = measure.glance(first.model, 0)
    require_finite(before, f"BASE '{base}'")
    _require_decidable(before, gate, rule)

    def read(way: Way, position: int) -> Point:
        name = way.name(position)
        with console.status(f"reading {name}"):
            after = measure.glance(way.model(position), position)
        return judged(position, name, before, after, gate, rule)

    way = _way(first, last, path, folders, dtype, read, notes, console)
    points = {0: judged(0, way.name(0), before, before, gate, rule)}

    def at(position: int) -> Point:
        if position not in points:
            points[position] = read(way, position)
            _say(console, points[position])
        return points[position]

    position, straight = furthest(
        way.last, way.every, lambda p: at(p).kept, lambda: _comes_back(points, gate.alpha, notes)
    )
    if not straight and position < way.last:
        notes.append(
            "the way is not monotone, so nothing was refined: taken is the largest point of the "
            "grid below the first violation"
        )
    chosen = points[position]
    in_order = tuple(points[p] for p in sorted(points))
    verdict = None
    sealed: list[Reading] = []
    if position:
        with console.status("reading what was chosen, on the sealed split"):
            sealed = [*measure.whole(first.model, 0), *measure.whole(way.model(position), 1)]
        verdict = decide([r for r in sealed if not r.step], [r for r in sealed if r.step], gate)
    summary |= {
        "path": _called(way),
        "chosen": chosen.name,
        "target kept": chosen.target_kept(in_order[-1]),
        "rule": rule,
        "notes": notes,
        "seconds": round(time.perf_counter() - started, 1),
    }
    result = Rewound(in_order, chosen, tuple(notes), verdict, None, summary)
    if out is None:
        return result
    with written(out) as folder:
        kind = way.write(position, folder.path) if position else None
        if verdict and kind:
            looks = look(base, str(folder.path / kind), items, sealed)
            summary["looks"] = looks.sentence(gate.alpha)
        folder.append(sealed)
        folder.write_verdict(summary, verdict.as_dict() if verdict else {})
        frontier = [mark.as_record() for mark in result.marks()]
        write_text(folder.path / "frontier.json", json.dumps(frontier, indent=2) + "\n")
        data = ReportData(
            title=f"{title(base)} → {title(tuned)}, rewound",
            verdict=verdict,
            readings=[reading.as_record() for reading in sealed],
            recipe=asked(texts, base=base, tuned=tuned, path=path, rule=rule),
            environment=pair.environment(),
            summary=summary,
            about="No step from base to tuned keeps every guardrail: what is left is the base.",
            frontier=result.marks(),
            beside=_checkpoints(tuned),
        )
        write_report(folder.path, data)
    return replace(result, artifact=out / kind if kind else None)


def _checkpoints(tuned: str) -> list[Mark]:
    """What the run that made `tuned` has judged of its checkpoints; none where no run made it."""
    return of_checkpoints(RunFolder(Path(tuned).expanduser()).records(), None)


def _require_one_vocabulary(pair: Pair) -> None:
    if not pair.same_vocabulary():
        raise RequestError(
            "the tokenizers of BASE and TUNED differ, so nothing between the two has one; give a "
            "TUNED with the base's tokenizer, or --tokenizer FOLDER for both"
        )


def _require_decidable(before: Sequence[Reading], gate: Gate, rule: Rule) -> None:
    """Hold the base against itself: what is not kept then never will be."""
    itself = guardrails(decide(as_sealed(before), as_sealed(before), gate))
    if not itself:
        raise RequestError(
            "no guardrail to keep was found on the selection split; give held-out text: "
            "--canary FILE, or items: --probes FILE"
        )
    if failed := [row for row in itself if row.verdict is Verdict.FAIL]:
        raise RequestError(*(f"{row.name}: {row.reason}" for row in failed))
    if rule == "shown" and (few := [row for row in itself if row.verdict is not Verdict.PASS]):
        raise RequestError(
            f"--rule shown: {', '.join(row.name for row in few)}: of so few items "
            f"({few[0].n} of {few[0].name} in the selection split) not even the base itself could "
            f"be shown to keep a margin of {few[0].margin_text}; give more items, or --rule "
            "estimate"
        )


def _way(
    first: Checkpoint,
    last: Checkpoint,
    path: PathName,
    folders: list[Path],
    dtype: Dtype,
    read: Callable[[Way, int], Point],
    notes: list[str],
    console: Console,
) -> Way:
    """The way that was asked for. Raises RequestError where there is none of the kind."""
    if path == "checkpoints":
        return Checkpoints(first, last, folders, dtype)
    adapter = adapter_on(first, last.stage)
    why = why_not_scaled(adapter, first.model) if adapter else "TUNED is no adapter on BASE"
    if path == "adapter" and why:
        raise RequestError(f"--path adapter: {why}; give --path weights")
    if adapter and why and path != "weights":
        notes.append(f"{why}, so a whole model is written")
    line = Line(Tensors.of(first, last), last, None if why or path == "weights" else adapter)
    if path != "blocks":
        return line
    alone: list[tuple[float, int, str]] = []
    for block, without in parts(line):
        point = read(without, without.last - 1)
        console.print(f"{block} at the base: worst fall {point.worst:.2f} margins")
        alone.append((point.worst, len(alone), block))
    # a block whose return alone helps most takes the tuned weights last
    return line.ordered([block for _, _, block in sorted(alone, reverse=True)])


def _called(way: Way) -> str:
    if isinstance(way, Line):
        return "blocks" if way.order else "weights" if way.adapter is None else "adapter"
    return "checkpoints"


def _comes_back(points: dict[int, Point], alpha: float, notes: list[str]) -> bool:
    names = recovered([points[position] for position in sorted(points)], alpha)
    notes += [f"{name} falls and recovers along the way" for name in names]
    return bool(names)


def _say(console: Console, point: Point) -> None:
    word = "kept" if point.kept else "not kept"
    worst = f"{point.culprit} at {point.worst:.2f} of its margin"
    console.print(f"{point.name}: {word}, {worst}", highlight=False, markup=False)
