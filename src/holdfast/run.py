"""From a recipe to a run folder: the whole story on one page.

load -> streams -> read the base -> wrap -> train -> read the tuned -> gate -> report
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from holdfast import model as models
from holdfast.artifact import RunFolder, full_disk_named, write_text
from holdfast.choice import METRIC, Choice
from holdfast.data.example import EncodeReport, Role
from holdfast.data.mixer import FILE as MIXER
from holdfast.errors import RequestError
from holdfast.gate.looks import look
from holdfast.gate.verdict import GateResult, decide, halted
from holdfast.levers import wrapped
from holdfast.levers.forgetting import CHECKS, DOCUMENTS, unwatched
from holdfast.lineage import locate
from holdfast.measure import Measure, lesson_documents
from holdfast.meters import Reading
from holdfast.meters.canary import in_turn
from holdfast.meters.motion import Walk
from holdfast.meters.probes import allow_code, load_items, require_both_halves
from holdfast.meters.ranks import read_ranks
from holdfast.meters.recovery import recovery_examples
from holdfast.overshoot import settle
from holdfast.plan import settled, skeleton
from holdfast.prepare import Prepared, canary_documents, identity, load, prepare, warn
from holdfast.recipe import Recipe
from holdfast.report.frontier import Mark, of_run, told
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


Watch = Callable[[Sequence[Reading], Sequence[Reading], float], None]
"""Handed the base's readings, the model's of the selection split, and the share of the steps that
is done, while training and when it is over. It may end the run by raising."""


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
    recipe = settled(recipe.with_mixer())
    started = time.perf_counter()
    items = load_items(recipe.probes)
    allow_code(items, recipe.train.run_generated_code)
    if recipe.train.measure_probes:
        require_both_halves(items)
    _refuse_early(recipe)
    folder = RunFolder.open(Path(recipe.out)) if resume else RunFolder.create(Path(recipe.out))
    with nullcontext() if resume else folder.given_up_if_refused():
        tokenizer, base = load(recipe, console)
        resolved = _resolved(recipe, tokenizer, base)
        if resume:
            _check_same(folder, resolved)
        else:
            folder.write_recipe(resolved)  # from here on it can be resumed
        _keep_merged(recipe, folder, tokenizer, base)
        prepared = prepare(recipe, tokenizer, base, folder.data, console)
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
        if names := unwatched(before, recipe.levers.forgetting.budget):
            line = f"levers.forgetting.budget: {', '.join(names)}: not read while training, so left"
            line += " to the gate; train.measure_probes: true reads the probes' selection half"
            warn([line], prepared.setup, console)
        routed = measure.routed(base)
        trainer = _trainer(prepared, folder, measure, before, console, watch)
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
    frontier = of_run(folder.records(), kept)
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


def _refuse_early(recipe: Recipe) -> None:
    """Wrap a model without weights, so that a wrong setting is refused before anything is read."""
    try:
        bare = skeleton(recipe)
    except RequestError:
        return  # `load` says in its own words what is wrong with it
    with suppress(NotImplementedError):  # a method that must look at the weights
        _wrap(recipe, bare)


def _wrap(recipe: Recipe, model: PreTrainedModel) -> PreTrainedModel:
    with warnings.catch_warnings():
        # peft 0.21 reads a property that transformers 5 has renamed, and says how it takes GPT-2
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        return wrapped(recipe.levers.active(), model)


def _trainer(
    prepared: Prepared,
    folder: RunFolder,
    measure: Measure,
    before: Sequence[Reading],
    console: Console,
    watch: Watch | None = None,
) -> HoldfastTrainer:
    """The levers' wrap and prepare, then the transformers Trainer around them."""
    import torch
    from transformers import (
        EarlyStoppingCallback,
        PrinterCallback,
        TrainingArguments,
        set_seed,
    )

    from holdfast.meters.drift import Start
    from holdfast.progress import RichProgress
    from holdfast.reference.cache import Cached
    from holdfast.trainer import HoldfastTrainer

    recipe, setup, steps = prepared.recipe, prepared.setup, prepared.steps
    levers = recipe.levers.active()
    set_seed(recipe.seed)  # the adapter's first weights are a random choice too
    setup.model = _wrap(recipe, setup.model)
    models.head(setup.model)  # refuses an adapter on it before a step is taken
    for lever in levers:
        lever.prepare(setup)
    if isinstance(setup.reference, Cached):  # refuse now what would be refused at some later step
        setup.reference.require(prepared.rows_of(recipe.levers.kl_anchor.kl_roles()))
    arguments: dict[str, Any] = {}
    for lever in levers:
        arguments |= lever.arguments(setup.model.config)
    budget, on_gpu = recipe.levers.budget, torch.cuda.is_available()
    choice = _choice(prepared, before) if recipe.train.keep == "best" else None
    save_every = recipe.train.save_every or max(20, steps // 10)
    if choice is not None:
        arguments |= {
            "eval_strategy": "steps",
            "eval_steps": save_every,
            "load_best_model_at_end": True,
            "metric_for_best_model": METRIC,
            "greater_is_better": True,
            "restore_callback_states_from_checkpoint": bool(recipe.train.patience),
        }
    budgeted = bool(recipe.levers.forgetting.budget)
    every = recipe.train.measure_every or max(1, steps // (CHECKS if budgeted else 5))

    def glance(step: int) -> list[Reading]:
        part = in_turn(measure.canary, step // every, DOCUMENTS) if budgeted else measure.canary
        lesson = budgeted or choice is not None or watch is not None
        found = replace(measure, canary=part).glance(setup.model, step, lesson=lesson)
        if watch is not None and step < steps:
            watch(before, found, step / steps)
        return found

    args = TrainingArguments(
        output_dir=str(folder.checkpoints),
        max_steps=steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=prepared.accumulation,
        learning_rate=budget.peak(setup.model.config, not recipe.levers.adapter.off),
        bf16=on_gpu,
        use_cpu=not on_gpu,
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=3 if choice is not None else 2,  # the last two, and the best
        logging_steps=max(1, steps // 200),
        report_to=recipe.train.report_to or "none",
        dataloader_pin_memory=on_gpu,
        disable_tqdm=True,
        seed=recipe.seed,
        **arguments,
    )
    if recipe.train.activation_checkpointing:
        # needed under an adapter: the embedding's output takes no gradient of its own
        setup.model.enable_input_require_grads()
        setup.model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer = HoldfastTrainer(
        setup.model,
        args,
        prepared.mixture,
        levers,
        start=Start(setup.model),
        reference=setup.reference,
        divergence=recipe.levers.kl_anchor.divergence,
        meters=[glance],
        every=every,
        choice=choice,
        record=folder.append,
        before=before,
        callbacks=[RichProgress(console)],
    )
    if recipe.train.patience and choice is not None:
        trainer.add_callback(EarlyStoppingCallback(recipe.train.patience))
    trainer.remove_callback(PrinterCallback)
    return trainer


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


def _choice(prepared: Prepared, before: Sequence[Reading]) -> Choice | None:
    """The rule by which a checkpoint is chosen; a note where there is nothing to choose by."""
    choice = Choice.of(before, prepared.recipe.gate)
    why = choice.missing()
    if prepared.recipe.levers.forgetting.budget:
        why = "a forgetting budget draws it back to what is within"
    if why and prepared.recipe.train.patience:
        raise RequestError(f"train.patience: nothing can be chosen: {why}; set it to 0")
    if why:
        prepared.setup.notes["train.keep"] = f"the last step is kept: {why}"
    return None if why else choice


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
        and key not in ("out", "resolved.steps")
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
