"""A prepared run's trainer: the levers' wrap and prepare, and what is read while it trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from rich.console import Console

from holdfast import model as models
from holdfast.artifact import RunFolder
from holdfast.choice import METRIC, Choice
from holdfast.errors import RequestError
from holdfast.levers import wrapped
from holdfast.levers.forgetting import CHECKS, DOCUMENTS
from holdfast.measure import Measure
from holdfast.meters import Reading
from holdfast.meters.canary import in_turn
from holdfast.prepare import Prepared
from holdfast.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from holdfast.trainer import HoldfastTrainer

Watch = Callable[[Sequence[Reading], Sequence[Reading], float], None]
"""Handed the base's readings, the model's of the selection split, and the share of the steps that
is done, while training and when it is over. It may end the run by raising."""


def wrap(recipe: Recipe, model: PreTrainedModel) -> PreTrainedModel:
    """The model as the levers restrict it."""
    with warnings.catch_warnings():
        # peft 0.21 reads a property that transformers 5 has renamed, and says how it takes GPT-2
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        return wrapped(recipe.levers.active(), model)


def assemble(
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
    setup.model = wrap(recipe, setup.model)
    models.head(setup.model)  # refuses an adapter on it before a step is taken
    read_after = (*measure.canary, *measure.heldout)
    sealed = [document.text.input_ids for document in read_after if document.split == "sealed"]
    setup.texts = lambda roles: chain(prepared.rows_of(roles), sealed)
    for lever in levers:
        lever.prepare(setup)
    reads_rows = setup.reference is not None and setup.reference.reads_rows
    prepared.mixture.anchors_apart = reads_rows or recipe.levers.kl_anchor.share < 1
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
    args._n_gpu = 1  # else the Trainer spreads a step over every accelerator it sees
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
    anchor = recipe.levers.kl_anchor
    if anchor.kl_roles():
        weight = anchor.strength(steps, trainer.base_loss)
        setup.notes["anchor weight"] = f"{weight:.3g} a nat of KL, beside the lesson's mean loss"
    if recipe.train.patience and choice is not None:
        trainer.add_callback(EarlyStoppingCallback(recipe.train.patience))
    trainer.remove_callback(PrinterCallback)
    return trainer


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
