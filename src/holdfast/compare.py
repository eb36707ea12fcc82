"""Checkpoints that some other tool made: one read, or two compared and judged.

Where the two have different tokenizers, the canary is compared in bits per byte of the same text,
likelihood items are refused, and the verdict is never PASS.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from holdfast import model as models
from holdfast.artifact import RunFolder
from holdfast.checkpoint import Checkpoint, Dtype, load_checkpoint, require_made_for
from holdfast.data.rows import check_rows
from holdfast.errors import RequestError
from holdfast.files import full_disk_named
from holdfast.gate.verdict import Gate, GateResult, Verdict, decide
from holdfast.measure import (
    Measure,
    require_finite,
    routing_changes,
    sampled_documents,
    shared_documents,
    text_documents,
)
from holdfast.meters import Reading
from holdfast.meters.canary import Canary, Document
from holdfast.meters.probes import Item, load_items
from holdfast.meters.probes.items import GENERATED
from holdfast.meters.recovery import recovery_examples
from holdfast.meters.routing import Routing
from holdfast.report.items import worst_changed
from holdfast.report.page import ReportData, write_report

QUIET = Console(quiet=True)
TUNED_STEP = 1
"""Readings of a tuned model whose steps nobody counted here; the base's are at 0."""
DIFFERENT = (
    "the tokenizers of the two differ: losses are compared in bits per byte, and no such "
    "comparison is a PASS"
)


@dataclass(frozen=True)
class Texts:
    """What a checkpoint is read with."""

    canary: Canary = field(default_factory=Canary)
    """Without sources: in a comparison, samples of the base."""
    probes: Sequence[str] = ()
    """JSONL files of items."""
    run_generated_code: bool = False
    """Run what the models write for code items, in a sandbox; without it they are refused."""

    def items(self) -> list[Item]:
        """The items, after every file was looked at. Raises RequestError with all problems."""
        problems: list[str] = []
        for source in self.canary.sources:
            try:
                check_rows(source, need_response=False)
            except RequestError as error:
                problems += error.problems
        try:
            found = load_items(self.probes)
        except RequestError as error:
            problems += error.problems
        if problems:
            raise RequestError(*problems)
        return found

    def measure(self, tokenizer: Any, canary: list[Document], items: list[Item]) -> Measure:
        """What reads a model with them."""
        return Measure(tokenizer, canary, items, run_generated_code=self.run_generated_code)


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
    if not texts.canary.sources and not texts.probes:
        raise RequestError("nothing to read the model with; give --canary FILE or --probes FILE")
    _require_free(out)
    items = texts.items()
    with console.status(f"loading {path}"):
        loaded = load_checkpoint("MODEL", path, tokenizer, dtype)
    documents = (
        text_documents(texts.canary, loaded.tokenizer, loaded.context)
        if texts.canary.sources
        else []
    )
    with console.status(f"reading {path}"):
        measure = texts.measure(loaded.tokenizer, documents, items)
        readings = measure.whole(loaded.model, 0, cached=True)
    require_finite(readings, f"MODEL '{path}'")
    summary = {"seconds": round(time.perf_counter() - started, 1)}
    if out is not None:
        about = "One model was read: there is nothing to compare it with."
        data = ReportData(
            title=_title(path),
            verdict=None,
            readings=[reading.as_record() for reading in readings],
            recipe=_asked(texts, model=path),
            environment=_environment(model=loaded),
            summary=summary,
            about=about,
        )
        with _written(out) as folder:
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
        seed: of the canary, where the base writes it.

    Raises:
        RequestError: one of the two or a file cannot be used, they are the same weights, or an
            adapter was made for another base; nothing is written then.
    """
    started = time.perf_counter()
    _require_free(out)
    items = texts.items()
    with console.status(f"loading {base}"):
        first = load_checkpoint("BASE", base, tokenizer, dtype)
    with console.status(f"loading {tuned}"):
        require_made_for(first, tuned, dtype)
        last = load_checkpoint("TUNED", tuned, tokenizer, dtype)
    if (sha := models.hash_weights(first.model)) == models.hash_weights(last.model):
        raise RequestError(
            f"BASE '{base}' and TUNED '{tuned}' are the same weights (sha256 {sha[:12]}), so there "
            "is nothing to compare; give the model as it was before, and as it is after"
        )
    summary: dict[str, Any] = {}
    environment = _environment(base=first, tuned=last)
    practice = recovery_examples(items, last.tokenizer, last.model.config)
    readers, alike = _readers(first, last, texts, items, seed, summary, console)
    tuned_reader = replace(readers[1], practice=practice, notes=summary)
    with console.status(f"reading {base}"):
        before = readers[0].whole(first.model, 0, cached=True)
        routed = readers[0].routed(first.model) if alike else None
    with console.status(f"reading {tuned}"):
        drift = _drift(first, last, ranks, summary, routed, tuned_reader)
        reference = _reference(first, last) if alike else None
        after = tuned_reader.whole(last.model, TUNED_STEP, reference, cached=True)
        recovery = tuned_reader.recovered(last.model, before, after, TUNED_STEP)
    if not alike:
        summary["tokenizers"] = DIFFERENT
        before, after = _in_bits(before), _in_bits(after)
    require_finite(before, f"BASE '{base}'")
    require_finite(after, f"TUNED '{tuned}'")
    verdict = _judged(before, after, gate or Gate(), alike)
    worst = worst_changed(before, after, items)
    more = [*Measure.rise(before, after), *drift, *recovery]
    summary["seconds"] = round(time.perf_counter() - started, 1)
    result = Comparison(verdict, before, [*after, *more], summary)
    if out is not None:
        data = ReportData(
            title=f"{_title(base)} → {_title(tuned)}",
            verdict=verdict,
            readings=[reading.as_record() for reading in (*before, *result.after)],
            recipe=_asked(texts, base=base, tuned=tuned),
            environment=environment,
            summary=summary,
            worst=worst,
        )
        with _written(out) as folder:
            folder.append([*before, *result.after])
            folder.write_items(before, after)
            folder.write_verdict(summary, verdict.as_dict())
            write_report(folder.path, data)
    return result


def _readers(
    first: Checkpoint,
    last: Checkpoint,
    texts: Texts,
    items: list[Item],
    seed: int,
    summary: dict[str, Any],
    console: Console,
) -> tuple[tuple[Measure, Measure], bool]:
    """What reads the base, what reads the tuned model, and whether both see the same tokens."""
    longest = min(first.context, last.context)
    one, other = first.tokenizer, last.tokenizer
    if texts.canary.sources:
        documents = text_documents(texts.canary, one, longest)
        theirs = text_documents(texts.canary, other, longest)
        alike = _ids(documents) == _ids(theirs)
    else:
        with console.status("sampling the canary from the base"), TemporaryDirectory() as scratch:
            documents = sampled_documents(
                first.model,
                one,
                rows=texts.canary.max_documents,
                max_length=longest,
                seed=seed,
                keep=Path(scratch) / "canary.json",
                notes=summary,
            )
        alike = one.get_vocab() == other.get_vocab()
    if alike and all(_ids_of(one, item) == _ids_of(other, item) for item in items):
        return (texts.measure(one, documents, items), texts.measure(other, documents, items)), True
    refused = sorted({item.probe for item in items if item.kind not in GENERATED})
    if refused:
        raise RequestError(
            f"probes: {', '.join(refused)}: scored by likelihood, which cannot be compared where "
            "the tokenizers of BASE and TUNED differ; leave their files out, or give items of kind "
            "exact"
        )
    if not texts.canary.sources:
        raise RequestError(
            "the tokenizers of BASE and TUNED differ, so the base's own samples cannot be read by "
            "both; give text that both can read: --canary FILE"
        )
    mine, yours = shared_documents(texts.canary, (one, other), longest)
    return (texts.measure(one, mine, items), texts.measure(other, yours, items)), False


def _ids(documents: Iterable[Document]) -> list[list[int]]:
    return [document.text.input_ids for document in documents]


def _ids_of(tokenizer: Any, item: Item) -> list[list[int]]:
    """The tokens of each text of an item; of a chat without its template, which is the model's."""
    chat = [] if isinstance(item.prompt, str) else [str(t.get("content")) for t in item.prompt]
    prompt = [item.prompt] if isinstance(item.prompt, str) else chat
    words = [*prompt, *(item.prompts or ()), *(item.choices or ()), *item.targets]
    found: list[list[int]] = tokenizer(words, add_special_tokens=False)["input_ids"]
    return found


def _in_bits(readings: Iterable[Reading]) -> list[Reading]:
    """The canary in bits per byte in place of nats a token; probes as they are."""
    return [
        replace(reading, meter="canary", tags=("canary",))
        if reading.meter == "canary_bits"
        else reading
        for reading in readings
        if reading.meter != "canary"
    ]


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
    if routed is not None:
        found += routing_changes(routed, reader.routed(last.model), start, TUNED_STEP)
    return [*found, *(read_ranks(start, TUNED_STEP) if ranks else ())]


def _judged(
    before: Sequence[Reading], after: Sequence[Reading], gate: Gate, alike: bool
) -> GateResult:
    """The gate's result; across tokenizers a PASS is INCONCLUSIVE."""
    result = decide(before, after, gate)
    if alike or result.verdict is not Verdict.PASS:
        return result
    unsure = Verdict.INCONCLUSIVE
    return replace(result, verdict=unsure, reason=f"{unsure}: {DIFFERENT}.")


def _require_free(out: Path | None) -> None:
    """Refuse a folder that is in use before anything is computed; it is not made here."""
    if out is None:
        return
    if files := [parent for parent in out.parents if parent.is_file()]:
        raise RequestError(f"--out: '{out}' cannot be made: '{files[0]}' is a file; give a folder")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        RunFolder.create(out)  # says what is wrong


@contextmanager
def _written(out: Path) -> Iterator[RunFolder]:
    """A new folder that is there once all is in it."""
    _require_free(out)  # something may have been put there while we read
    out = out.absolute()
    with full_disk_named(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with RunFolder(out.parent).replacing(out.name) as temporary:
        yield RunFolder(temporary)


def _asked(texts: Texts, **names: str) -> dict[str, Any]:
    canary = texts.canary.model_dump(mode="json")
    return {**names, "canary": canary, "probes": list(texts.probes)}


def _environment(**loaded: Checkpoint) -> dict[str, Any]:
    return {
        **{f"{who}.weights_sha256": models.hash_weights(one.model) for who, one in loaded.items()},
        "versions": {name: version(name) for name in ("holdfast", "torch", "transformers")},
    }


def _title(path: str) -> str:
    """A folder by its last part, a hub id whole."""
    folder = Path(path).expanduser()
    return folder.resolve().name if folder.exists() else path
