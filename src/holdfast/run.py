"""From a recipe to a run folder: the whole story on one page.

load -> streams -> read the base -> wrap -> train -> read the tuned -> gate -> report
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from holdfast.artifact import RunFolder, full_disk_named, write_text
from holdfast.assemble import Watch, assemble, wrap
from holdfast.data.example import EncodeReport, Role
from holdfast.data.mixer import FILE as MIXER
from holdfast.errors import RequestError, did_you_mean
from holdfast.gate.beforehand import Capability, capabilities, undecidable
from holdfast.gate.looks import look
from holdfast.gate.verdict import GateResult, decide, halted, is_judged
from holdfast.levers import forgetting
from holdfast.lineage import locate
from holdfast.measure import Measure, lesson_documents
from holdfast.meters import Reading
from holdfast.meters.motion import Walk
from holdfast.meters.probes import (
    Item,
    allow_code,
    load_items,
    require_both_halves,
    write_items,
)
from holdfast.meters.ranks import read_ranks
from holdfast.meters.recovery import recovery_examples
from holdfast.overshoot import settle
from holdfast.plan import settled, skeleton
from holdfast.prepare import Prepared, canary_documents, identity, load, prepare, warn
from holdfast.recipe import Recipe
from holdfast.report.frontier import Mark, of_checkpoints, told
from holdfast.report.items import Changed, worst_changed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from holdfast.reference import Reference
    from holdfast.trainer import HoldfastTrainer


@dataclass(frozen=True)
class RunResult:
    """What a run came to."""

    folder: Path
    verdict: GateResult | None
    """None when the gate is turned off."""
    seconds: float
    summary: dict[str, Any]
    """Steps, refused steps, displacement, seconds."""
    stopped_by_alarm: bool = False
    """Then the verdict, where there is one, is FAIL."""

    @property
    def exit_code(self) -> int:
        """The verdict's; without a gate 0, or 3 where an alarm ended the run."""
        return self.verdict.exit_code if self.verdict else 3 if self.stopped_by_alarm else 0


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    console: Console | None = None,
    watch: Watch | None = None,
) -> RunResult:
    """Run a recipe from start to verdict, or continue it from its last complete checkpoint.

    Raises:
        RequestError: the recipe, its data, its model or the run folder cannot be used.
    """
    from holdfast.patrol import patrol
    from holdfast.trackers import Trackers

    console = console or Console(quiet=True)
    recipe = settled(recipe.with_stage())
    started = time.perf_counter()
    own, earlier, unasked = recipe.items()
    items = [*own, *earlier]
    allow_code(items, recipe.train.run_generated_code)
    if recipe.train.measure_probes:
        require_both_halves(items)
    _refuse_early(recipe)
    folder = RunFolder.open(Path(recipe.out)) if resume else RunFolder.create(Path(recipe.out))
    with nullcontext() if resume else folder.given_up_if_refused():
        if earlier:
            recipe = _with_earlier(recipe, earlier, folder, console)
            items = load_items(recipe.probes)
        tokenizer, base = load(recipe, console)
        resolved = _resolved(recipe, tokenizer, base)
        if resume:
            _check_same(folder, resolved)
        else:
            folder.write_recipe(resolved)  # from here on it can be resumed
        _keep_merged(recipe, folder, tokenizer, base)
        prepared = prepare(recipe, tokenizer, base, folder.data, console)
        warn(unasked, prepared.setup, console)
        canary = canary_documents(prepared, console)
        resolved["resolved"]["steps"] = prepared.steps
        folder.write_recipe(resolved)
        measure = Measure(
            tokenizer,
            canary,
            items,
            prepared.heldout,
            recipe.train.measure_probes,
            recipe.train.run_generated_code,
            lesson_documents(prepared.setup.lesson),
            recovery_examples(items, tokenizer, base.config),
            prepared.setup.notes,
        )
        before = folder.load_before()
        if before is None:
            with console.status("reading the base"):
                before = measure.whole(base, 0, cached=True)
            folder.merge(before)
            folder.save_before(before)
        budget = recipe.levers.forgetting.budget
        warn(forgetting.warnings(before, budget), prepared.setup, console)
        warn(_cannot_pass(recipe, before), prepared.setup, console)
        routed = measure.routed(base)
        trainer = assemble(prepared, folder, measure, before, console, watch)
    _keep_mixer(recipe, folder.path)
    checkpoint = _resume_point(folder)
    trackers = Trackers(trainer, before)
    trainer.record = trackers.after(folder.append)
    patrolled = patrol(prepared, trainer, measure, before, folder, console, checkpoint)
    with full_disk_named(folder.checkpoints):
        trainer.train(resume_from_checkpoint=checkpoint)
    step, kept = trainer.state.global_step, trainer.kept_step
    budgeted = _settled(trainer, measure, before, recipe)
    if watch is not None:
        watch(before, measure.glance(trainer.model, step, lesson=True), 1.0)
    _save_artifact(prepared, folder)
    with console.status("reading the tuned model"):
        after = measure.whole(trainer.model, kept, _live(prepared))
        once, warned = measure.afterwards(trainer.model, trainer.start, before, after, routed, kept)
    warn(warned, prepared.setup, console)
    displacement = trainer.start.displacement()
    ranks = [] if recipe.levers.adapter.off else read_ranks(trainer.start, kept)
    walk = _walk(trainer, folder, kept).read(displacement, kept)
    last = [*after, *once, *displacement.readings(kept), *ranks, *walk]
    folder.merge(last)
    trackers.hand(last)
    trackers.close()
    folder.write_items(before, after)
    verdict = decide(before, after, recipe.gate) if recipe.gate.enabled else None
    stopped_by = patrolled.stopped_by if patrolled else {}
    if verdict and stopped_by:
        verdict = halted(verdict, stopped_by)
    frontier = of_checkpoints(folder.records(), kept)
    summary = {
        "steps": step,
        "kept": told(frontier) if frontier else f"step {step}, the last",
        "refused_steps": trainer.refused,
        "relative_displacement": displacement.relative,
        "stopped": trainer.stopped or "; ".join(stopped_by.values()) or None,
        **(patrolled.summary() if patrolled else {}),
        **budgeted,
        "seconds": round(time.perf_counter() - started, 1),
    }
    if verdict is not None:
        looks = look(recipe.model.path, str(folder.path), items, before)
        summary["looks"] = looks.sentence(recipe.gate.alpha)
    worst = worst_changed(before, after, items)
    _write_results(folder, prepared, resolved, verdict, summary, worst, frontier)
    seconds = time.perf_counter() - started
    return RunResult(folder.path, verdict, seconds, summary, bool(stopped_by))


def _with_earlier(
    recipe: Recipe, earlier: Sequence[Item], folder: RunFolder, console: Console
) -> Recipe:
    """The same with the probes of the stages before, which are kept in the folder."""
    file = folder.earlier_probes
    if not file.exists():  # a run that is resumed asks what it asked
        write_items(file, earlier)
    margins = {
        one.name: recipe.gate.margin_for(one.meter, one.name, one.unit, one.tags)
        for one in capabilities(earlier, {})
    }
    probes = ", ".join(f"{name} {found[0]}" if found else name for name, found in margins.items())
    line = f"judging what was judged before: {probes} ({len(earlier)} items)"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    return recipe.model_copy(update={"probes": [*recipe.probes, str(file)]})


def _refuse_early(recipe: Recipe) -> None:
    """Refuse a wrong setting before anything is read: wrap a model without weights."""
    if (world := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise RequestError(
            f"a run is one process on one device, and {world} were started (WORLD_SIZE); start it "
            "without torchrun or accelerate, or train in several with holdfast.Guard around a "
            "trainer of your own"
        )
    _require_trackers(recipe.train.report_to)
    try:
        bare = skeleton(recipe)
    except RequestError:
        return  # `load` says in its own words what is wrong with it
    with suppress(NotImplementedError):  # a method that must look at the weights
        wrap(recipe, bare)


def _require_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that transformers does not know, or whose package is not there."""
    from transformers.integrations import integration_utils as known

    for name in names:
        if name in ("all", "none"):
            continue
        if name not in known.INTEGRATION_TO_CALLBACK:
            hint = did_you_mean(name, known.INTEGRATION_TO_CALLBACK)
            raise RequestError(f"train.report_to: '{name}' is no tracker of transformers; {hint}")
        if not getattr(known, f"is_{name}_available", lambda: True)():
            raise RequestError(
                f"train.report_to: '{name}' is not installed; pip install {name}, or leave it out"
            )


def _cannot_pass(recipe: Recipe, before: Sequence[Reading]) -> list[str]:
    """What the gate will not let pass however the run ends, for it has too few sealed items."""
    judged = [r for r in before if r.split == "sealed" and is_judged(r.meter, r.tags)]
    read = [Capability.of(reading) for reading in judged]
    return undecidable(recipe.gate, read) if recipe.gate.enabled else []


def _settled(
    trainer: HoldfastTrainer, measure: Measure, before: Sequence[Reading], recipe: Recipe
) -> dict[str, Any]:
    """Draw back what is over the budget, and tell what was done to keep it; empty without one."""
    lever = recipe.levers.forgetting
    if not lever.budget:
        return {}
    found = settle(
        trainer.start,
        lambda: measure.glance(trainer.model, trainer.state.global_step),
        before,
        lever.budget,
        recipe.gate.alpha,
    )
    memory = trainer.lever_memory[lever.key]
    return {"budget": {"end": str(found), "moves": memory.get("moves", [])}}


def _walk(trainer: HoldfastTrainer, folder: RunFolder, kept: int) -> Walk:
    """What the steps up to the one that is kept add up to, off the run's own readings."""
    readings = (Reading(**record) for record in folder.records() if record["step"] <= kept)
    # a refusal is noted by the steps that came before it
    refused = {one["step"] + 1 for one in trainer.refused}
    return Walk.of(readings, trainer.args.max_grad_norm, refused)


def _live(prepared: Prepared) -> Reference | None:
    """The base as it can be asked about any text; a stored one knows its own rows only."""
    from holdfast.reference.cache import Cached

    found = prepared.setup.reference
    return None if isinstance(found, Cached) else found


def _keep_merged(
    recipe: Recipe,
    folder: RunFolder,
    tokenizer: PreTrainedTokenizerBase,
    base: PreTrainedModel,
) -> None:
    """Keep a base that was merged in memory, where an adapter is trained on it.

    Else plain peft would load that adapter onto the original base, without the stages between.
    """
    if recipe.levers.adapter.off or not locate(recipe.model.path).adapters:
        return
    if not (folder.path / "base").is_dir():
        with folder.replacing("base") as target:
            base.save_pretrained(target, safe_serialization=True)
            tokenizer.save_pretrained(target)
    base.name_or_path = str(folder.path / "base")


def _resume_point(folder: RunFolder) -> str | None:
    """The checkpoint to continue from, with the readings taken back to it."""
    from holdfast.trainer import last_complete_checkpoint

    checkpoint = last_complete_checkpoint(folder.checkpoints)
    folder.rewind_readings(int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0)
    return str(checkpoint) if checkpoint else None


def _save_artifact(prepared: Prepared, folder: RunFolder) -> None:
    """The tuned part in the ecosystem's format, with the tokenizer it was trained with."""
    name = "model" if prepared.recipe.levers.adapter.off else "adapter"
    with folder.replacing(name) as target:
        prepared.recipe.levers.adapter.save(prepared.setup.model, target)
        prepared.tokenizer.save_pretrained(target)
        _keep_mixer(prepared.recipe, target)


def _keep_mixer(recipe: Recipe, target: Path) -> None:
    """Copy the mixer file, so that every later stage replays the same mix."""
    if recipe.levers.replay.mixer is not None:
        text = Path(recipe.levers.replay.mixer).expanduser().read_text(encoding="utf-8")
        write_text(target / MIXER, text)


def _resolved(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, base: PreTrainedModel
) -> dict[str, Any]:
    """The recipe as run, with everything a reproduction needs to compare."""
    from importlib.metadata import version

    packages = ("holdfast", "torch", "transformers", "peft", "accelerate", "datasets")
    return {
        **recipe.model_dump(mode="json"),
        "resolved": {
            "parameters": sum(p.numel() for p in base.parameters()),
            **(start := identity(recipe, tokenizer, base)),
            "lineage": [
                *locate(recipe.model.path, recipe.model.revision).parents(),
                {"path": recipe.model.path, "weights_sha256": start["weights_sha256"]},
            ],
            "versions": {package: version(package) for package in packages},
        },
    }


def _check_same(folder: RunFolder, now: dict[str, Any]) -> None:
    """A run continues only as it began: same settings, same weights, same data."""
    then = folder.read_recipe()
    before, after = _leaves(then), _leaves(now)
    changed = [
        key
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and key not in ("out", "resolved.steps", "train.report_to")
        and not key.startswith("resolved.versions.")
    ]
    if changed:
        raise RequestError(
            *(
                f"--resume: {key.removeprefix('resolved.')} was {before.get(key)} when "
                f"'{folder.path}' was started and is {after.get(key)} now; restore what it was, "
                "or start a new run with another --out"
                for key in changed
            )
        )


def _leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted names; a list is one value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        found |= _leaves(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def _write_results(
    folder: RunFolder,
    prepared: Prepared,
    resolved: dict[str, Any],
    verdict: GateResult | None,
    summary: dict[str, Any],
    worst: Sequence[Changed],
    frontier: Sequence[Mark],
) -> None:
    from holdfast.report.card import write_card
    from holdfast.report.page import ReportData, write_report

    folder.write_verdict(summary, verdict.as_dict() if verdict else {})
    environment = resolved["resolved"]
    data = ReportData(
        title=folder.path.name,
        verdict=verdict,
        readings=folder.records(),
        recipe={key: value for key, value in resolved.items() if key != "resolved"},
        streams={
            name: {**budget, "role": Role(prepared.role_of(name)).name.lower()}
            for name, budget in prepared.mixture.token_budget(prepared.steps).items()
        },
        environment=environment,
        summary={**summary, "rows": _counted(prepared.lesson), **prepared.setup.notes},
        worst=worst,
        frontier=frontier,
    )
    write_report(folder.path, data)
    write_card(folder.path, data, prepared.recipe.model.path)


def _counted(report: EncodeReport) -> dict[str, int]:
    """What became of the lesson's rows, without the counts that are zero."""
    return {name: count for name, count in report.as_dict().items() if count}
