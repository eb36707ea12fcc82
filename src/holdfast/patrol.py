"""The alarms of a run: when a check is due its blocks are read, judged, kept and told of.

A callback of any `transformers` trainer. It changes nothing of training but, where the recipe asks
for it, ends it: a checkpoint is saved, and the run is judged as it then stands.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console
from transformers import TrainerCallback

from holdfast.alarms import Alarm
from holdfast.alarms.actions import tell
from holdfast.alarms.cadence import Cadence, agreed
from holdfast.alarms.guardrails import guardrails
from holdfast.alarms.rules import Alarms
from holdfast.alarms.sentry import Sentry, read_wanted
from holdfast.alarms.wiring import Wires, faults
from holdfast.artifact import RunFolder
from holdfast.data.example import Role
from holdfast.data.rows import Row, iter_rows
from holdfast.gate.margins import Gate
from holdfast.measure import Measure
from holdfast.meters import Reading

if TYPE_CHECKING:
    from holdfast.prepare import Prepared
    from holdfast.trainer import HoldfastTrainer, Record

LAST_STEPS = 50
"""Steps whose rows are looked at for their labels and their kind."""
SOME_ROWS = 20
"""Rows of the lesson that are asked for a prompt."""
MOST_TEXTS = 200
"""Rows of one replayed domain that are looked at."""


class Patrol(TrainerCallback):
    """Checks while any trainer trains. Every process reads; the first one writes and tells.

    Args:
        rule: the recipe's section.
        gate: the margin of each loss.
        before: the base's readings, with single items.
        measure: the texts and items that `before` was read with.
        folder: where readings and alarms are kept; None on the other processes.
        wires: what the run can tell of itself after a step; given the step, model and optimizer.
        record: keeps readings.
        console: where alarms are shown.
        seed: of the order in which items are read.
        lines: of `alarms.jsonl`, up to where training is resumed.
    """

    def __init__(
        self,
        rule: Alarms,
        gate: Gate,
        before: Sequence[Reading],
        measure: Measure,
        folder: RunFolder | None,
        *,
        wires: Callable[[int, Any], Wires],
        record: Record,
        console: Console,
        seed: int = 0,
        lines: Sequence[Mapping[str, Any]] = (),
        stops: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.rule, self.measure, self.folder = rule, measure, folder
        self.wires, self.record, self.console = wires, record, console
        self.sentry = Sentry(guardrails(before, gate, rule, seed), rule)
        self.sentry.resume(lines)
        kept = folder.data / "cadence.json" if folder is not None else None
        self.cadence = Cadence(rule.every, rule.share, kept)
        self.raised: list[dict[str, Any]] = [
            {"step": line["step"], **alarm} for line in lines for alarm in line["alarms"]
        ]
        """Every alarm, with its step."""
        self.stopped_by: dict[str, str] = {}
        """The alarms that ended training: name -> text; also training that is taken up again."""
        if rule.stop:
            self.stopped_by = {alarm["name"]: alarm["text"] for alarm in self.raised}
        self.stops = stops
        self.seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock; on all processes the cadence is the first one's."""
        self.cadence.every = agreed(self.cadence.every)
        self.cadence.resume_clock()

    def on_step_end(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Check, where it is due; the last step is read in full when training has ended."""
        self.cadence.step_done()
        step = state.global_step
        if self.cadence.due(step) and step < state.max_steps:
            started = time.perf_counter()
            alarms = self._check(model, step, optimizer)
            self.seconds += time.perf_counter() - started
            if alarms and self.rule.stop:
                self.stopped_by = {alarm.name: alarm.text for alarm in alarms}
                self.stops("; ".join(self.stopped_by.values()))
                control.should_save = control.should_training_stop = True
        self.cadence.resume_clock()

    def summary(self) -> dict[str, Any]:
        """What the report says of the checks."""
        return {
            "checks": self.sentry.checks,
            "steps_between_checks": self.cadence.every,
            "seconds_checking": round(self.seconds, 2),
            "alarms": self.raised,
        }

    def _check(self, model: Any, step: int, optimizer: Any) -> list[Alarm]:
        started = time.perf_counter()
        found = read_wanted(self.measure, model, step, self.sentry.wanted())
        readings, alarms = self.sentry.check(found, step)
        told = []
        if self.folder is not None:  # of the other processes nobody asks
            found_out = faults(self.wires(step, optimizer))
            told = [alarm for alarm in found_out if alarm.name not in self.sentry.raised]
        alarms = agreed([*alarms, *told])
        self.sentry.raised.update(alarm.name for alarm in alarms)
        self.raised += [{"step": step, **alarm.as_dict()} for alarm in alarms]
        chosen = self.cadence.choose(time.perf_counter() - started)
        if self.folder is None:
            return alarms
        if chosen:
            self._say(chosen, "dim")
        notes = self._tell(step, alarms) if alarms else []
        marks = [Reading("alarm", a.name, "selection", step, 1.0, None, 1) for a in alarms]
        self.record([*readings, *marks])
        self.folder.append_alarms(
            {
                "step": step,
                "alarms": [alarm.as_dict() for alarm in alarms],
                "notes": notes,
                **self.sentry.as_dict(),
            }
        )
        return alarms

    def _tell(self, step: int, alarms: Sequence[Alarm]) -> list[str]:
        assert self.folder is not None
        for alarm in alarms:
            self._say(f"alarm at step {step}: {alarm.text}", "bold red")
        message = {
            "run": str(self.folder.path),
            "step": step,
            "alarms": [alarm.as_dict() for alarm in alarms],
            "stops": self.rule.stop,
        }
        notes = tell(self.rule, message)
        for note in notes:
            self._say(f"warning: {note}", "yellow")
        return notes

    def _say(self, line: str, style: str) -> None:
        self.console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


def patrol(
    prepared: Prepared,
    trainer: HoldfastTrainer,
    measure: Measure,
    before: Sequence[Reading],
    folder: RunFolder,
    console: Console,
    checkpoint: str | None,
) -> Patrol | None:
    """The alarms of a run of `holdfast train`; None where they are turned off.

    Args:
        checkpoint: where it is taken up; None: at its start.
    """
    recipe = prepared.recipe
    if not recipe.alarms.enabled:
        return None
    wires = _Run(prepared, trainer, measure, folder)
    found = Patrol(
        recipe.alarms,
        recipe.gate,
        before,
        measure,
        folder if trainer.is_world_process_zero() else None,
        wires=wires.at,
        record=trainer.record,
        console=console,
        seed=recipe.seed,
        lines=folder.alarm_lines(int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0),
        stops=partial(setattr, trainer, "stopped"),  # the checkpoint says so, too
    )
    trainer.add_callback(found)  # the last: by then the step's own readings are kept
    return found


class _Run:
    """What a run of ours can tell of itself. All of it lies in the folder or follows from it."""

    def __init__(
        self, prepared: Prepared, trainer: HoldfastTrainer, measure: Measure, folder: RunFolder
    ) -> None:
        self.mixture, self.trainer, self.folder = prepared.mixture, trainer, folder
        self.streams = prepared.streams
        counted = prepared.lesson
        predicted = counted.tokens - counted.examples
        self.expected = counted.response_tokens / predicted if predicted else None
        self.prompted = all(
            _has_prompt(row)
            for source in prepared.recipe.data.sources
            for row in itertools.islice(iter_rows(source), SOME_ROWS)
        )
        self.canary: dict[str, list[list[int]]] = {}
        for document in measure.canary:
            if document.split == "selection":
                self.canary.setdefault(document.domain, []).append(document.text.input_ids)

    def at(self, step: int, optimizer: Any) -> Wires:
        """After this step."""
        steps = range(max(0, step - LAST_STEPS), step)
        records = self.folder.records()
        rates = [r["value"] for r in records if r["meter"] == "learning_rate"]
        kls = [r for r in records if r["name"] == "kl_anchor/anchor"]
        # a step's divergence is that of the weights before it
        drifts = [
            r["value"]
            for r in records
            if kls and (r["meter"], r["name"]) == ("drift", "total") and r["step"] < kls[-1]["step"]
        ]
        return Wires(
            step,
            self.trainer.start.displacement().norm,
            relative=drifts[-1] if drifts else 0.0,
            rate=max(rates, default=0.0),
            kl=kls[-1]["value"] if kls else None,
            trained=self._trained(steps),
            expected=self.expected,
            prompted=self.prompted,
            served=self._served(steps),
            canary=self.canary,
        )

    def _trained(self, steps: range) -> float | None:
        """Share of the lesson's predictions that bear a loss, in the batches of these steps."""
        parts, trained, lesson = self.mixture.micro_batches, 0, 0
        for step in steps:
            for index in range(step * parts, (step + 1) * parts):
                trained += int((self.mixture[index]["roles"] == Role.TASK).sum())
            rows = ((self.streams[s], row) for s, row in self.mixture.rows_at(step))
            lesson += sum(int(s.lengths[row]) - 1 for s, row in rows if s.role is Role.TASK)
        return trained / lesson if lesson else None

    def _served(self, steps: range) -> dict[str, list[list[int]]]:
        """Rows replayed in these steps, by domain."""
        found: dict[str, list[list[int]]] = {}
        for step in steps:
            for index, row in self.mixture.rows_at(step):
                kind, _, domain = self.streams[index].name.partition("/")
                texts = found.setdefault(domain, []) if kind == "replay" else None
                if texts is not None and len(texts) < MOST_TEXTS:
                    texts.append(list(self.streams[index].fetch(row)[0]))
        return found


def _has_prompt(row: Row) -> bool:
    """Whether a row has something before its response that is not to be learned."""
    if row.format == "text":
        return False
    messages = row.content.get("messages") or []
    return bool(row.content.get("prompt")) or len(messages) > 1
