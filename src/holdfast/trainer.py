"""`transformers.Trainer` whose loss is made of the levers' terms (`step.py`).

Four things are replaced: which rows (the mixture), what the loss is (terms, normalised once over
the whole optimizer step), who may refuse a step (levers), and when a checkpoint counts (marked
complete last). Everything else is the ecosystem's.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from holdfast.choice import METRIC, Choice, gain, noted, score
from holdfast.data.example import Role
from holdfast.data.mixture import Mixture
from holdfast.divergence import Divergence
from holdfast.errors import HoldfastError
from holdfast.levers import (
    Lever,
    Memory,
    ProbeContext,
    StepContext,
    StepState,
    Term,
    TokenLosses,
    combined,
)
from holdfast.meters import Reading
from holdfast.meters.canary import mean_loss
from holdfast.meters.drift import Start
from holdfast.meters.motion import read_gradient
from holdfast.reference import Reference
from holdfast.step import kl_rows, loss_terms, token_losses, total_loss

MEMORY_FILE = "levers.json"
COMPLETE_FILE = "complete.json"

Meter = Callable[[int], Sequence[Reading]]
"""Called with the step; returns readings."""
Record = Callable[[Sequence[Reading]], None]
"""Keeps readings (the run folder's `readings.jsonl`)."""


class HoldfastTrainer(Trainer):
    """`transformers.Trainer` whose step is built from levers.

    Args:
        model: the wrapped model (adapter added, trainable part restricted).
        args: TrainingArguments; `per_device_train_batch_size` is 1, since an item of the mixture
            is a whole micro-batch.
        mixture: which rows form which step.
        levers: the active levers.
        start: the weights training begins with.
        reference: the base's view, needed when a lever asks for KL.
        divergence: how far from the base is measured; forward KL unless given.
        meters: called every `every` steps, and at each checkpoint where one is to be chosen.
        choice: the rule by which transformers keeps the best checkpoint, and loads it at the end.
        record: keeps readings.
        before: the base's readings, for levers that look at what has changed.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        mixture: Mixture,
        levers: Sequence[Lever],
        *,
        start: Start,
        reference: Reference | None = None,
        divergence: Divergence | None = None,
        meters: Sequence[Meter] = (),
        every: int = 0,
        choice: Choice | None = None,
        record: Record = lambda _readings: None,
        before: Sequence[Reading] = (),
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.levers = tuple(levers)
        self.lever_memory: dict[str, Memory] = {lever.key: {} for lever in self.levers}
        self.reference, self.divergence = reference, divergence
        self.start = start
        self.meters, self.every, self.record = tuple(meters), every, record
        self._gradient: list[Reading] = []
        self.before, self.mixture = tuple(before), mixture
        self.base_loss = mean_loss(before)
        self.choice = choice
        self.kl_roles = frozenset[Role]().union(*(lever.kl_roles() for lever in self.levers))
        self.refused: list[dict[str, Any]] = []  # step and reason of each
        self.stopped: str | None = None
        self._looked_at: list[Reading] = []
        self._refused_now: list[str] = []
        self._term_values: dict[str, list[Tensor]] = defaultdict(list)
        self._grad_norm = self._rate = 0.0
        args.remove_unused_columns = False  # roles and targets are no arguments of the model's
        super().__init__(
            model=model,
            args=args,
            train_dataset=mixture,
            eval_dataset=None if choice is None else {},  # transformers wants one; see `evaluate`
            data_collator=_only_item,
            callbacks=[*(callbacks or ()), _LeverCallback(self)],
            optimizer_cls_and_kwargs=next(filter(None, (o.optimizer(args) for o in levers)), None),
        )
        # our loss is already normalised over the whole optimizer step
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = False
        # else the loss of one refused step would stay in the Trainer's running sum, and every
        # later loss it logs would be NaN; our own readings show the step as it was
        self.args.logging_nan_inf_filter = True

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def look(self, step: int) -> list[Reading]:
        """What every meter reads now."""
        self._looked_at = [reading for meter in self.meters for reading in meter(step)]
        return self._looked_at

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """Collect the micro-batches of one optimizer step and count its positions by role.

        The counts of the whole step, over all devices, travel with every micro-batch.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        totals = torch.zeros(len(Role), dtype=torch.long)
        for batch in batches:
            totals += torch.bincount(batch["roles"].flatten().cpu(), minlength=len(Role))
        if self.accelerator.num_processes > 1:
            totals = self.accelerator.reduce(totals.to(device), "sum").cpu()
        return [{**batch, "totals": totals} for batch in batches], None

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Sum over terms of weight * sum / count, the counts being those of the whole step."""
        totals = {role: int(inputs["totals"][role]) for role in Role}
        world = self.accelerator.num_processes
        state = StepState(
            self.state.global_step,
            totals,
            self.args.gradient_accumulation_steps * world,
            self.args.seed,
            self.state.max_steps,
            self.base_loss,
        )
        kl_B = kl_rows(self.levers, inputs["input_ids"], state)
        readers = [lever for lever in self.levers if lever.reads_losses]

        def asked(out: TokenLosses) -> dict[str, Term]:
            return loss_terms(out, state, readers, deepcopy(self.lever_memory))

        # accelerate's own is around the model's forward alone: the head would be in float32
        with self.accelerator.autocast():
            out = token_losses(
                model,
                inputs,
                self.kl_roles,
                self.reference,
                self.divergence,
                kl_B,
                self.levers,
                asked,
            )
        terms = loss_terms(out, state, self.levers, self.lever_memory)
        for name, term in terms.items():
            self._term_values[name].append((term.sum / term.count).detach())
        loss = total_loss(out, terms)
        # DDP and FSDP average gradients over devices; the counts are already global
        loss = loss * world
        return (loss, out) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The score of the weights as they are, by which transformers keeps the best checkpoint."""
        assert self.choice is not None
        step = self.state.global_step
        point = self.choice.point(step, self._looked_at)
        risen = gain(point)
        if self.is_world_process_zero():
            self.record(noted(point, risen))
        metrics = {f"eval_{METRIC}": score(risen, point.worst)}
        handler: Any = self.callback_handler
        self.control: Any = handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.control.should_training_stop and step < self.state.max_steps:
            self.stopped = self.stopped or "train.patience: no checkpoint was better for so long"
        return metrics

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Of tensors that are another's alias, and so were not saved, nothing is said."""
        tied: set[str] = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        load_result.missing_keys[:] = [key for key in load_result.missing_keys if key not in tied]
        super()._issue_warnings_after_load(load_result)

    @property
    def kept_step(self) -> int:
        """The step whose weights the model has when training is over."""
        best: str | None = self.state.best_model_checkpoint
        last: int = self.state.global_step
        return last if self.choice is None or best is None else int(best.rpartition("-")[2])

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated: the Trainer's formula counts every padded token as trained."""
        return 0

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._grad_norm = float(norm)
        return norm

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            left = {
                "memory": self.lever_memory,
                "refused": self.refused,
                "stopped": self.stopped,
                "schedule": self.mixture.schedule,
            }
            _write_json(folder / MEMORY_FILE, left)
            _write_json(folder / COMPLETE_FILE, {"step": self.state.global_step})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._restore(Path(checkpoint))

    def _restore(self, checkpoint: Path) -> None:
        saved = json.loads((checkpoint / MEMORY_FILE).read_text(encoding="utf-8"))
        self.lever_memory = {lever.key: {} for lever in self.levers} | saved["memory"]
        self.refused, self.stopped = saved["refused"], saved.get("stopped")
        self.mixture.schedule = [(step, share) for step, share in saved.get("schedule", ())]

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train, or, where training had ended early with this checkpoint, be as it then was."""
        if resume_from_checkpoint is None or not ended_early(Path(resume_from_checkpoint)):
            return super().train(resume_from_checkpoint, *args, **kwargs)
        checkpoint = Path(resume_from_checkpoint)
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        self._restore(checkpoint)
        self.find_best()
        self._load_from_checkpoint(self.state.best_model_checkpoint or str(checkpoint))

    def find_best(self) -> None:
        """Look for the best checkpoint where the run folder is now, relative paths and moves."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        self.state.best_model_checkpoint = str(folder) if folder.is_dir() else None

    def step_context(self) -> StepContext:
        """The step as the levers see it."""
        return StepContext(
            self.model, self.state.global_step, self._grad_norm, self.start, self._rate
        )

    def set_rate(self) -> float:
        """Multiply the step's learning rate; the scheduler sets the next one anew. Returns it."""
        factor = combined(self.levers, self.lever_memory).rate
        if factor != 1:
            rates = self.lr_scheduler.get_last_lr()
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        return factor * float(self._get_learning_rate())

    def rate_to_fall(self) -> float:
        """What the schedule's learning rate has still to fall, as part of its peak."""
        of_peak = self.lr_scheduler.lr_lambdas[0]
        return float(of_peak(self.state.global_step) - of_peak(self.state.max_steps))

    def share_tokens(self) -> None:
        """Give the lesson its share from the step after next: the next one's rows are under way."""
        share = combined(self.levers, self.lever_memory).share
        if share != self.mixture.lesson_share:
            self.mixture.reshare(self.state.global_step + 1, share)

    def take_terms(self) -> dict[str, float]:
        """Mean of each term over its devices for the step just done, and forget them."""
        values = {
            name: self.accelerator.reduce(torch.stack(parts).sum(), "sum").item()
            for name, parts in self._term_values.items()
        }
        self._term_values.clear()
        return values


class _LeverCallback(TrainerCallback):
    """Runs the levers' step hooks and the meters where the Trainer offers a place for them."""

    def __init__(self, trainer: HoldfastTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.find_best()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer._rate = trainer.set_rate()  # when the step is over it is the next one's
        ctx = trainer.step_context()
        for lever in trainer.levers:
            lever.before_step(ctx, trainer.lever_memory[lever.key])
        trainer._refused_now = ctx.refused
        if ctx.refused:
            trainer.refused.append({"step": ctx.step, "reason": "; ".join(ctx.refused)})
            # optimizers skip tensors without a gradient: no moment, no decay, no move
            trainer.model.zero_grad(set_to_none=True)
        step = state.global_step + 1
        read = trainer.every and step % trainer.every == 0 and not ctx.refused
        trainer._gradient = read_gradient(trainer.model, step) if read else []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, step = self.trainer, state.global_step
        ctx = trainer.step_context()
        ctx.refused = trainer._refused_now
        for lever in trainer.levers:
            lever.after_step(ctx, trainer.lever_memory[lever.key])
        terms = trainer.take_terms()
        readings: list[Reading] = []
        last = step == state.max_steps
        if step % args.logging_steps == 0 or step == 1 or last:
            scalars = {("loss", name): value for name, value in terms.items()}
            scalars["grad_norm", "total"] = trainer._grad_norm
            scalars["learning_rate", "total"] = trainer._rate
            scalars["refused_steps", "total"] = float(len(trainer.refused))
            scalars["drift", "total"] = trainer.start.displacement().relative
            readings += [
                Reading(meter, name, "train", step, value, None, 1)
                for (meter, name), value in scalars.items()
            ]
        due = bool(trainer.every) and step % trainer.every == 0 and not last
        seen = trainer.look(step) if due or control.should_evaluate else []
        if due:
            readings += trainer._gradient
            probe = ProbeContext(
                step,
                before=trainer.before,
                to_fall=trainer.rate_to_fall(),
                to_come=1 - step / state.max_steps,
                # a share of the steps may have no anchor, this one among them
                held=bool(trainer.kl_roles) or any(name != "task" for name in terms),
            )
            for lever in trainer.levers:
                lever.after_probe(seen, probe, trainer.lever_memory[lever.key])
            trainer.share_tokens()
            if probe.drawn_back != 1:
                trainer.start.scale(probe.drawn_back)
                if control.should_evaluate:  # a checkpoint is chosen by what it is
                    seen = trainer.look(step)
            readings += [
                Reading(m, n, "train", step, value, None, 1) for m, n, value in probe.noted
            ]
            if probe.stop:
                trainer.stopped = probe.stop
                control.should_training_stop = True
                # so that where it stopped is one of the checkpoints that are chosen from
                control.should_save = control.should_evaluate = trainer.choice is not None
        readings += seen
        if readings and state.is_world_process_zero:
            trainer.record(readings)


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end, or None."""
    steps = [
        (int(path.parent.name.rsplit("-", 1)[1]), path.parent)
        for path in folder.glob(f"checkpoint-*/{COMPLETE_FILE}")
    ]
    return max(steps)[1] if steps else None


def ended_early(checkpoint: Path) -> bool:
    """Whether training ended with this checkpoint, before its last step."""
    saved = json.loads((checkpoint / MEMORY_FILE).read_text(encoding="utf-8"))
    return saved.get("stopped") is not None


def _only_item(items: list[Any]) -> Any:
    if len(items) != 1:
        raise HoldfastError("a micro-batch is one item of the mixture; per_device batch size is 1")
    return items[0]


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    os.replace(temporary, path)
