"""Checkpoints that some other tool made: one read, or two compared and judged.

Where the two have different tokenizers, the canary is compared in bits per byte of the same text,
likelihood items are refused, and the verdict is never PASS.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from holdfast import model as models
from holdfast.checkpoint import Checkpoint, Dtype, load_checkpoint
from holdfast.errors import RequestError
from holdfast.gate.looks import look
from holdfast.gate.verdict import Gate, GateResult
from holdfast.measure import (
    Measure,
    require_finite,
    text_documents,
)
from holdfast.meters import Reading
from holdfast.meters.recovery import recovery_examples
from holdfast.meters.routing import Routing
from holdfast.pair import (
    QUIET,
    TUNED_STEP,
    Pair,
    Texts,
    asked,
    decided,
    in_bits,
    load_pair,
    readers,
    require_free,
    title,
    versions,
    written,
)
from holdfast.report.frontier import of_two
from holdfast.report.items import worst_changed
from holdfast.report.page import ReportData, write_report


@dataclass(frozen=True)
class Evaluation:
    """One model as it was read."""

    readings: list[Reading]
    summary: dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """Two models, read with the same texts and items."""

    verdict: GateResult
    before: list[Reading]
    after: list[Reading]
    """Of the tuned model, and what only two models have: rise, KL, displacement."""
    summary: dict[str, Any] = field(default_factory=dict)


def evaluate(
    path: str,
    texts: Texts,
    *,
    out: Path | None = None,
    tokenizer: str | None = None,
    dtype: Dtype = "auto",
    console: Console = QUIET,
) -> Evaluation:
    """Read one model: canary and probes, with their errors.

    Args:
        path: a model folder, a hub id, a run folder or an adapter.
        texts: what to read it with.
        out: a new folder for the readings and a report.
        tokenizer: where the model's folder has none.
        dtype: of the weights in memory; see `Model.dtype`.

    Raises:
        RequestError: the model or a file cannot be used; nothing is written then.
    """
    started = time.perf_counter()
    if not (texts.canary.sources or texts.probes or texts.lesson):
        raise RequestError("nothing to read the model with; give --canary FILE or --probes FILE")
    require_free(out)
    items = texts.items()
    with console.status(f"loading {path}"):
        loaded = load_checkpoint("MODEL", path, tokenizer, dtype)
    documents = (
        text_documents(texts.canary, loaded.tokenizer, loaded.context)
        if texts.canary.sources
        else []
    )
    with console.status(f"reading {path}"):
        measure = texts.measure(loaded.tokenizer, documents, items, loaded.context)
        readings = measure.whole(loaded.model, 0, cached=True)
        require_finite(readings, f"MODEL '{path}'")
        readings += measure.collapsed(loaded.model, 0)
    summary = {"seconds": round(time.perf_counter() - started, 1), **measure.notes}
    if out is not None:
        about = "One model was read: there is nothing to compare it with."
        data = ReportData(
            title=title(path),
            verdict=None,
            readings=[reading.as_record() for reading in readings],
            recipe=asked(texts, model=path),
            environment={
                "model.weights_sha256": models.hash_weights(loaded.model),
                "versions": versions(),
            },
            summary=summary,
            about=about,
        )
        with written(out) as folder:
            folder.append(readings)
            write_report(folder.path, data)
    return Evaluation(readings, summary)


def compare(
    base: str,
    tuned: str,
    texts: Texts,
    *,
    gate: Gate | None = None,
    out: Path | None = None,
    tokenizer: str | None = None,
    dtype: Dtype = "auto",
    ranks: bool = False,
    fisher: bool = False,
    seed: int = 0,
    console: Console = QUIET,
) -> Comparison:
    """Read a base and what was made of it, and judge the difference as after a run.

    Args:
        base: a model folder, a hub id, a run folder or an adapter; and so is `tuned`.
        texts: what to read both with.
        gate: margins; the defaults where None.
        out: a new folder for readings, items, verdict and report.
        tokenizer: of both, where their folders have none.
        dtype: of the weights in memory; see `Model.dtype`.
        ranks: also find in how many directions each matrix was changed (slow for large ones).
        fisher: also say what the base's Fisher information on the sealed canary predicts of the KL
            that is measured there: a backward pass, and memory for one more copy of the weights.
        seed: of the canary, where the base writes it.

    Raises:
        RequestError: one of the two or a file cannot be used, they are the same weights, or an
            adapter was made for another base; nothing is written then.
    """
    started = time.perf_counter()
    require_free(out)
    items = texts.items()
    pair = load_pair(base, tuned, tokenizer, dtype, console)
    first, last = pair.base, pair.tuned
    summary: dict[str, Any] = {}
    practice = recovery_examples(items, last.tokenizer, last.model.config)
    (base_reader, other), alike = readers(pair, texts, items, seed, summary, console)
    base_reader = replace(base_reader, notes=summary)
    tuned_reader = replace(other, practice=practice, notes=summary)
    with console.status(f"reading {base}"):
        before = base_reader.whole(first.model, 0, cached=True)
        routed = base_reader.routed(first.model) if alike else None
    with console.status(f"reading {tuned}"):
        drift = _drift(first, last, ranks, summary, routed, tuned_reader)
        reference = _reference(first, last) if alike else None
        after = tuned_reader.whole(last.model, TUNED_STEP, reference, cached=True)
        recovery = tuned_reader.recovered(last.model, before, after, TUNED_STEP)
    if fisher and not (alike and drift):
        summary["fisher"] = "not read: the two are not of one architecture and one tokenizer"
    if not alike:
        before, after = in_bits(before), in_bits(after)
    require_finite(before, f"BASE '{base}'")
    require_finite(after, f"TUNED '{tuned}'")
    verdict = decided(before, after, gate or Gate(), alike)
    worst = worst_changed(before, after, items)
    collapse = tuned_reader.collapsed(last.model, TUNED_STEP)
    predicted = _predicted(pair, tuned_reader, after) if fisher and alike and drift else []
    more = [*Measure.rise(before, after), *drift, *predicted, *collapse, *recovery]
    summary["looks"] = look(base, tuned, items, before).sentence(verdict.alpha)
    summary["seconds"] = round(time.perf_counter() - started, 1)
    result = Comparison(verdict, before, [*after, *more], summary)
    if out is not None:
        data = ReportData(
            title=f"{title(base)} → {title(tuned)}",
            verdict=verdict,
            readings=[reading.as_record() for reading in (*before, *result.after)],
            recipe=asked(texts, base=base, tuned=tuned),
            environment=pair.environment(),
            summary=summary,
            worst=worst,
            frontier=of_two(verdict),
        )
        with written(out) as folder:
            folder.append([*before, *result.after])
            folder.write_items(before, after)
            folder.write_verdict(summary, verdict.as_dict())
            write_report(folder.path, data)
    return result


def _reference(first: Checkpoint, last: Checkpoint) -> Any:
    """The base as KL is taken to it; it has been read by now."""
    from holdfast.reference.frozen import Frozen

    return Frozen(first.model, last.model.device)


def _drift(
    first: Checkpoint,
    last: Checkpoint,
    ranks: bool,
    summary: dict[str, Any],
    routed: Routing | None,
    reader: Measure,
) -> list[Reading]:
    """How far the weights are apart; a note where the two are not of one architecture."""
    from holdfast.meters.drift import Start
    from holdfast.meters.ranks import read_ranks

    try:
        start = Start.of_tuned(last.model, first.model)
    except RequestError as error:
        summary["drift"] = f"not read: {error}"
        return []
    displacement = start.displacement()
    summary["relative_displacement"] = displacement.relative
    found = displacement.readings(TUNED_STEP)
    experts, warned = reader.experts(last.model, start, routed, TUNED_STEP)
    if warned:
        summary["warnings"] = warned
    return [*found, *experts, *(read_ranks(start, TUNED_STEP) if ranks else ())]


def _predicted(pair: Pair, reader: Measure, after: Sequence[Reading]) -> list[Reading]:
    """What the base's Fisher on the sealed canary says of the way to the tuned weights."""
    from holdfast.data.example import Example
    from holdfast.displacement import Whole
    from holdfast.fisher import fisher
    from holdfast.meters.motion import read_fisher

    rows = [
        Example(one.text.input_ids, one.text.loss_mask, one.domain)
        for one in reader.canary
        if one.split == "sealed"
    ]
    tuned = dict(pair.tuned.model.named_parameters())
    weights = {
        name: weight
        for name, weight in pair.base.model.named_parameters()
        if name in tuned and tuned[name].shape == weight.shape
    }
    moved = {name: Whole(tuned[name], start=weight) for name, weight in weights.items()}
    measured = [r for r in after if r.meter == "kl" and r.name.startswith("old/")]
    return read_fisher(moved, fisher(pair.base.model, rows, weights), measured, TUNED_STEP)
