"""The same meters and the same gate around any other `transformers` or `trl` trainer.

    guard = Guard(canary="old_text.jsonl", probes=["probes.jsonl"], every=200, out="runs/dpo")
    trainer.add_callback(guard)
    trainer.train()
    print(guard.verdict.reason)

It reads before the first step, while training, and at the end, and writes the run folder that
`holdfast train` writes, but for recipe and weights, which are the trainer's. Training does not know
of it: weights, gradients, modes of modules and random numbers are as they would be without.
"""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field, ValidationError, model_validator
from rich.console import Console
from transformers import TrainerCallback

from holdfast import model as models
from holdfast.alarms.rules import Alarms
from holdfast.alarms.wiring import Wires
from holdfast.artifact import RunFolder
from holdfast.choice import METRIC, Choice, gain, noted, score
from holdfast.data.readers import local_path
from holdfast.data.rows import Source, check_rows
from holdfast.errors import RequestError
from holdfast.explain import explain
from holdfast.gate.verdict import Gate, GateResult, decide, halted
from holdfast.measure import (
    LONGEST,
    Measure,
    context_length,
    sampled_documents,
    taught_documents,
    text_documents,
)
from holdfast.meters import Reading
from holdfast.meters.canary import Canary
from holdfast.meters.drift import Start
from holdfast.meters.motion import Walk, read_gradient
from holdfast.meters.probes import allow_code, load_items, require_both_halves
from holdfast.meters.ranks import read_ranks
from holdfast.meters.recovery import recovery_examples
from holdfast.meters.routing import Routing
from holdfast.patrol import Patrol
from holdfast.reference import Reference
from holdfast.reference.adapter_off import AdapterOff
from holdfast.report.frontier import of_checkpoints, told
from holdfast.report.items import worst_changed
from holdfast.report.page import ReportData, write_report
from holdfast.section import Section
from holdfast.trackers import Trackers

LOGGED = {"loss": "loss", "grad_norm": "grad_norm", "learning_rate": "learning_rate"}
"""What a trainer logs under which name, and the meter it is kept as."""


class Settings(Section):
    """What a guard reads, and how often."""

    canary: Canary = Canary()
    """Held-out text that must stay as likely as before; empty: samples of the model."""
    probes: list[str] = Field(default_factory=list)
    """JSONL files of probe items."""
    lesson: list[Source] = Field(default_factory=list)
    """Rows of what is taught, best of all rows that are not trained on: for the lesson's loss, KL
    on new rows, over-application of its form, label collapse, its experts. Empty: none of these."""
    every: int = Field(default=200, ge=1)
    """Steps between readings while training."""
    out: str = "runs/guard"
    """The run folder; it must not exist yet, or be empty, unless training is resumed."""
    gate: Gate = Gate()
    """How much may be forgotten."""
    alarms: Alarms = Alarms()
    """What is watched while training goes on. `none` turns it off."""
    measure_probes: bool = False
    """Read the probes while training, too, on their selection half; the gate then judges the other
    half alone. false: only before and after, and the gate has all items."""
    run_generated_code: bool = False
    """Run what the model writes for code items, in a sandbox; without it they are refused."""
    max_length: int | None = Field(default=None, ge=16)
    """Longest window of the canary in tokens; empty: the model's context, at most 2048."""
    seed: int = Field(default=0, ge=0)
    """Seed of the canary, where the model writes it."""

    @model_validator(mode="after")
    def _watched(self) -> Self:
        if self.alarms.watches_accuracy and not (self.probes and self.measure_probes):
            raise ValueError(
                "alarms.fall: probes are watched only where their selection half is read while "
                "training; give probes and measure_probes=True, or leave fall out"
            )
        return self


class Guard(TrainerCallback):
    """Measures what any trainer's run forgets, and gives a verdict at its end.

    Args:
        canary: a file or files with held-out text, or a `Canary`.
        probes: a file or files of items.
        lesson: a file or files with rows of what is taught.
        tokenizer: where it is not the trainer's `processing_class`.
        settings: the rest of `Settings`.

    Raises:
        RequestError: a setting or a file that cannot be used, all at once; when training begins,
            a model that cannot be read, or a run folder that is not free.
    """

    def __init__(
        self,
        *,
        canary: str | Sequence[str] | Canary | Mapping[str, Any] = (),
        probes: str | Sequence[str] = (),
        lesson: str | Sequence[str] = (),
        tokenizer: Any = None,
        **settings: Any,
    ) -> None:
        if not isinstance(canary, Canary | Mapping):
            canary = {"sources": _listed(canary)}
        files = {"probes": _listed(probes), "lesson": _listed(lesson)}
        given = {"canary": canary, **files, **settings}
        try:
            self.settings = Settings.model_validate(given)
        except ValidationError as error:
            raise RequestError(*explain(error, Settings, where="Guard")) from error
        self.items = load_items(self.settings.probes)
        allow_code(self.items, self.settings.run_generated_code)
        if self.settings.measure_probes:
            require_both_halves(self.items)
        for source in self.settings.canary.sources:
            if local_path(source.path) is not None:
                check_rows(source, need_response=False)
        for source in self.settings.lesson:
            if local_path(source.path) is not None:
                check_rows(source, need_response=True)
        self.verdict: GateResult | None = None
        """Set when training has ended, where the gate is not turned off."""
        self.folder = Path(self.settings.out)
        self._tokenizer = tokenizer
        self._watch: _Watch | None = None
        self._trackers: Trackers | None = None

    def attach(self, trainer: Any) -> Guard:
        """Add it to a trainer, and hand every reading to what that reports to (`report_to`).

        `trainer.add_callback(guard)` alone does the first; no callback knows the others.
        """
        self._trackers = Trackers(trainer)
        trainer.add_callback(self)
        return self

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Read the model as it is now, or take up the readings of the run that is resumed."""
        tokenizer = self._tokenizer or kwargs.get("processing_class")
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
        if tokenizer is None:
            raise RequestError("Guard: the trainer has no tokenizer; give Guard(tokenizer=...)")
        _require_whole(model)
        with _undisturbed(model):
            self._watch = _Watch.begin(self, model, tokenizer, state)
        if self._watch.patrol is not None:
            self._watch.patrol.on_train_begin(args, state, control)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Look at the gradient of a step that is read."""
        step = state.global_step + 1
        if self._watch is not None and step % self.settings.every == 0:
            self._watch.keep(read_gradient(model, step))

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Read while training; the last step is read when training has ended."""
        step = state.global_step
        if self._watch is not None and step % self.settings.every == 0 and step < state.max_steps:
            with _undisturbed(model):
                self._watch.glance(model, step)
        if self._watch is not None and self._watch.patrol is not None:
            with _undisturbed(model):
                optimizer = kwargs.get("optimizer")
                self._watch.patrol.on_step_end(args, state, control, model, optimizer)

    def on_evaluate(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        metrics: Any = None,
        **kwargs: Any,
    ) -> None:
        """Where `metric_for_best_model` is "holdfast", give the trainer that metric."""
        if self._watch is not None and _chooses(args):
            with _undisturbed(model):
                metrics[f"eval_{METRIC}"] = self._watch.score(model, state.global_step, metrics)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep the losses that the trainer logs."""
        known = {LOGGED[name]: value for name, value in (logs or {}).items() if name in LOGGED}
        if self._watch is not None and known:
            self._watch.append(
                Reading(meter, "total", "train", state.global_step, float(value), None, 1)
                for meter, value in known.items()
            )

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Read what training came to, judge it, and write the report."""
        if self._watch is not None:
            with _undisturbed(model):
                best = state.best_global_step if args.load_best_model_at_end else None
                kept = best if _chooses(args) and best else state.global_step
                self.verdict = self._watch.end(model, state.global_step, kept, args.max_grad_norm)
            if self._watch.trackers is not None:
                self._watch.trackers.close()
            self._watch = None


class _Watch:
    """One training run as it is watched. Every process reads; the first one writes."""

    def __init__(
        self, guard: Guard, measure: Measure, folder: RunFolder | None, summary: dict[str, Any]
    ) -> None:
        self.settings, self.items = guard.settings, guard.items
        self.measure, self.folder, self.summary = measure, folder, summary
        self.before: list[Reading] = []
        self.start: Start | None = None
        self.reference: Reference | None = None
        self.routed: Routing | None = None
        self.looked_at: tuple[int, list[Reading]] = (0, [])
        self.patrol: Patrol | None = None
        self.trackers = guard._trackers
        self.started, self.reading = time.perf_counter(), 0.0

    @classmethod
    def begin(cls, guard: Guard, model: Any, tokenizer: Any, state: Any) -> _Watch:
        path = Path(guard.settings.out)
        models.check_head(model)
        if state.global_step:
            folder = RunFolder(path)
            before = _before_of(folder, state.global_step)
            watch = cls._of(guard, model, tokenizer, folder, {"resumed_at": state.global_step})
            watch.before = before
            if state.is_world_process_zero:
                folder.rewind_readings(state.global_step)
            else:
                watch.folder = None
            watch.post(folder.alarm_lines(state.global_step))
            return watch
        with ExitStack() as stack:
            folder_or_none = None
            if state.is_world_process_zero:
                folder_or_none = RunFolder.create(path)
                stack.enter_context(folder_or_none.given_up_if_refused())
            watch = cls._of(guard, model, tokenizer, folder_or_none, {})
            watch.routed = watch.measure.routed(model)
            watch.before = watch.timed(lambda: watch.measure.whole(model, 0))
            if watch.folder is not None:
                watch.folder.merge(watch.before)
                watch.folder.save_before(watch.before)
            watch.hand(watch.before)
            watch.post()
        return watch

    @classmethod
    def _of(
        cls,
        guard: Guard,
        model: Any,
        tokenizer: Any,
        folder: RunFolder | None,
        summary: dict[str, Any],
    ) -> _Watch:
        """With what is read, and where the weights are now."""
        settings = guard.settings
        context = context_length(models.causal_lm(model).config, tokenizer)
        if (settings.max_length or 0) > context:
            raise RequestError(
                f"Guard: max_length: {settings.max_length} is beyond the model's context of "
                f"{context} tokens; a value that works: {context}"
            )
        max_length = settings.max_length or min(context, LONGEST)
        if settings.canary.sources:
            canary = text_documents(settings.canary, tokenizer, max_length)
        else:
            with _scratch() as scratch:
                canary = sampled_documents(
                    model,
                    tokenizer,
                    rows=settings.canary.max_documents,
                    max_length=max_length,
                    seed=settings.seed,
                    keep=(folder.data if folder else Path(scratch)) / "canary.json",
                    notes=summary,
                )
        lesson = taught_documents(settings.lesson, tokenizer, max_length)
        measure = Measure(
            tokenizer,
            canary,
            guard.items,
            heldout=lesson,
            rows=lesson,
            choosing=settings.measure_probes,
            run_generated_code=settings.run_generated_code,
            practice=recovery_examples(guard.items, tokenizer, models.causal_lm(model).config),
            notes=summary,
        )
        watch = cls(guard, measure, folder, summary)
        try:
            watch.reference = AdapterOff(model)
        except ValueError as error:  # the base cannot be had by switching something off
            summary["kl"] = f"not read: {error}"
        watch.start = Start(model) if folder is not None else None
        return watch

    def timed(self, read: Any) -> list[Reading]:
        started = time.perf_counter()
        found: list[Reading] = read()
        self.reading += time.perf_counter() - started
        return found

    def post(self, lines: Sequence[Mapping[str, Any]] = ()) -> None:
        """Set the alarms, where they are asked for, from the lines of a run that is resumed on."""
        settings = self.settings
        if settings.alarms.enabled:
            self.patrol = Patrol(
                settings.alarms,
                settings.gate,
                self.before,
                self.measure,
                self.folder,
                wires=self.wires,
                record=self.keep,
                console=Console(),
                seed=settings.seed,
                lines=lines,
            )

    def wires(self, step: int, optimizer: Any) -> Wires:
        """What can be told of another trainer's run: whether it moves the weights at all."""
        assert self.start is not None
        rates = [group["lr"] for group in getattr(optimizer, "param_groups", ())]
        # those of the next step; that of the first may be zero
        rate = max(rates, default=0.0) if step > 2 else 0.0
        return Wires(step, self.start.displacement().norm, rate=float(rate))

    def append(self, readings: Iterable[Reading]) -> None:
        if self.folder is not None:
            self.folder.append(readings)

    def hand(self, readings: Sequence[Reading]) -> None:
        if self.trackers is not None:
            self.trackers.hand(readings)

    def keep(self, readings: Sequence[Reading]) -> None:
        self.append(readings)
        self.hand(readings)

    def glance(self, model: Any, step: int) -> list[Reading]:
        """What may be looked at; read once a step."""
        if self.looked_at[0] == step:
            return self.looked_at[1]
        found = self.timed(lambda: self.measure.glance(model, step))
        if self.start is not None:
            total = self.start.displacement().relative
            found.append(Reading("drift", "total", "train", step, total, None, 1, "relative"))
        self.keep(found)
        self.looked_at = (step, found)
        return found

    def score(self, model: Any, step: int, metrics: Mapping[str, float]) -> float:
        """How good the weights are, by the rule of `choice.py`, and keep what it rests on.

        Without a target probe the trainer's own `eval_loss` is the target: the gain is then the
        likelihood of a token, exp(-loss).
        """
        choice = Choice.of(self.before, self.settings.gate)
        why, loss = choice.missing(), metrics.get("eval_loss")
        if "guardrail" in why or (why and loss is None):
            raise RequestError(
                f"Guard: metric_for_best_model: '{METRIC}': {why}, and no eval_loss; give "
                "probes tagged target with measure_probes=True, or an eval_dataset"
            )
        point = choice.point(step, self.glance(model, step))
        found = gain(point) if not why or loss is None else math.exp(-loss)
        self.keep(noted(point, found))
        return score(found, point.worst)

    def end(self, model: Any, last: int, step: int, clip: float | None) -> GateResult | None:
        """Read and judge the weights of a step, when training has ended with its `last`.

        Args:
            clip: the norm that gradients were clipped to.
        """
        after = self.timed(lambda: self.measure.whole(model, step, self.reference))
        gate = self.settings.gate
        verdict = decide(self.before, after, gate) if gate.enabled else None
        stopped_by = self.patrol.stopped_by if self.patrol else {}
        if verdict and stopped_by:
            verdict = halted(verdict, stopped_by)
        if self.folder is None or self.start is None:
            return verdict
        displacement = self.start.displacement()
        ranks = read_ranks(self.start, step) if hasattr(model, "peft_config") else []
        once, warned = self.measure.afterwards(
            model, self.start, self.before, after, self.routed, step
        )
        if warned:
            self.summary["warnings"] = warned
        records = (Reading(**one) for one in self.folder.records() if one["step"] <= step)
        walked = Walk.of(records, clip).read(displacement, step)
        found = [*after, *once, *displacement.readings(step), *ranks, *walked]
        self.folder.merge(found)
        self.hand(found)
        self.folder.write_items(self.before, after)
        seconds = time.perf_counter() - self.started
        frontier = of_checkpoints(self.folder.records(), step)
        summary = {
            "steps": last,
            **({"kept": told(frontier)} if frontier else {}),
            "relative_displacement": displacement.relative,
            "stopped": "; ".join(stopped_by.values()) or None,
            **(self.patrol.summary() if self.patrol else {}),
            "seconds": round(seconds, 1),
            "seconds_reading": round(self.reading, 1),
            **self.summary,
        }
        self.folder.write_verdict(summary, verdict.as_dict() if verdict else {})
        data = ReportData(
            title=self.folder.path.name,
            verdict=verdict,
            readings=self.folder.records(),
            recipe=self.settings.model_dump(mode="json"),
            environment={
                "model": models.causal_lm(model).name_or_path,
                "versions": {name: version(name) for name in ("holdfast", "torch", "transformers")},
            },
            summary=summary,
            worst=worst_changed(self.before, after, self.items),
            frontier=frontier,
        )
        write_report(self.folder.path, data)
        return verdict


def _chooses(args: Any) -> bool:
    """Whether the trainer is to keep its best checkpoint by our score."""
    return args.metric_for_best_model in (METRIC, f"eval_{METRIC}")


def _before_of(folder: RunFolder, step: int) -> list[Reading]:
    """What was read before the run that is resumed."""
    found = folder.load_before()
    if found is None:
        raise RequestError(
            f"Guard: training is resumed at step {step}, but '{folder.path}' has no reading of "
            "the model before it; give out= of the guard that watched its beginning"
        )
    return found


def _require_whole(model: Any) -> None:
    """Refuse weights of which each device holds a part only: no meter can read those."""
    for name, parameter in model.named_parameters():
        sharded = type(parameter.data).__name__ == "DTensor" or hasattr(parameter, "ds_id")
        if sharded or type(parameter).__name__ == "FlatParameter":
            raise RequestError(
                f"Guard: the weights are sharded over devices ({name}), and cannot be read while "
                "they are; compare the saved checkpoints: holdfast compare BASE TUNED"
            )


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Within, anything may be read; afterwards random numbers and modules' modes are as before."""
    modes = [(module, module.training) for module in model.modules()]
    python, legacy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count()))
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        for module, training in modes:
            module.training = training


def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="holdfast-")


def _listed(value: str | Sequence[str]) -> list[str]:
    return [str(value)] if isinstance(value, str | Path) else [str(one) for one in value]
