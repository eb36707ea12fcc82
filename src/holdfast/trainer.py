"""The step: one forward over lesson and anchor rows, terms from the levers, one loss.

It is `transformers.Trainer` with four things replaced: which rows (the mixture), what the loss is
(terms, normalised once over the whole optimizer step), who may refuse a step (levers), and when a
checkpoint counts (marked complete last). Everything else is the ecosystem's.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from holdfast import model as models
from holdfast.data.example import Role
from holdfast.data.mixture import Mixture
from holdfast.errors import HoldfastError
from holdfast.levers import (
    Lever,
    Memory,
    ProbeContext,
    StepContext,
    StepState,
    Term,
    TokenLosses,
    shared_sum,
)
from holdfast.meters import Reading
from holdfast.meters.drift import Start
from holdfast.objective import token_kl, token_nll
from holdfast.reference import Reference

MEMORY_FILE = "levers.json"
COMPLETE_FILE = "complete.json"

Meter = Callable[[int], Sequence[Reading]]
"""Called with the step; returns readings."""
Record = Callable[[Sequence[Reading]], None]
"""Keeps readings (the run folder's `readings.jsonl`)."""


def token_losses(
    model: Any,
    batch: Mapping[str, Tensor],
    kl_roles: frozenset[Role],
    reference: Reference | None,
) -> TokenLosses:
    """One forward pass, then per-token losses only where somebody needs them.

    `batch` is a `MicroBatch`: input_ids, position_ids, targets, roles, each (B, W).
    """
    roles_BW = batch["roles"]
    hidden_BWH = models.hidden_states(model, batch["input_ids"], batch["position_ids"])
    head = models.head(model)
    nll_BW = (roles_BW == Role.TASK) | (roles_BW == Role.REPLAY)
    nll_N = token_nll(hidden_BWH[nll_BW], head, batch["targets"][nll_BW])

    kl_BW = torch.zeros_like(nll_BW)
    for role in kl_roles:
        kl_BW |= roles_BW == role
    rows_B = kl_BW.any(dim=1)
    kl_M = hidden_BWH[kl_BW].float().sum(-1)  # (0,) where no position needs it
    if reference is not None and bool(rows_B.any()):
        base_bWH = reference.hidden_states(
            batch["input_ids"][rows_B], batch["position_ids"][rows_B]
        )
        base_MH = base_bWH[kl_BW[rows_B]]
        kl_M = token_kl(hidden_BWH[kl_BW], head, base_MH, reference.head())
    return TokenLosses(nll_N, roles_BW[nll_BW], kl_M, roles_BW[kl_BW])


def loss_terms(
    out: TokenLosses, state: StepState, levers: Sequence[Lever], memory: Mapping[str, Memory]
) -> dict[str, Term]:
    """The lesson's own term (mean NLL of its response tokens) and those of every lever."""
    terms: dict[str, Term] = {}
    if state.totals[Role.TASK]:
        sum_nll = shared_sum(out.nll, out.nll_roles == Role.TASK)
        terms["task"] = Term(sum_nll, state.totals[Role.TASK], 1.0)
    for lever in levers:
        terms |= lever.terms(out, state, memory[lever.key])
    return terms


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
        meters: called every `every` steps.
        record: keeps readings.
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
        meters: Sequence[Meter] = (),
        every: int = 0,
        record: Record = lambda _readings: None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.levers = tuple(levers)
        self.lever_memory: dict[str, Memory] = {lever.key: {} for lever in self.levers}
        self.reference = reference
        self.start = start
        self.meters, self.every, self.record = tuple(meters), every, record
        self.kl_roles = frozenset[Role]().union(*(lever.kl_roles() for lever in self.levers))
        self.refused: list[dict[str, Any]] = []  # step and reason of each
        self.stopped: str | None = None
        self._term_values: dict[str, list[Tensor]] = defaultdict(list)
        self._grad_norm = self._rate = 0.0
        args.remove_unused_columns = False  # roles and targets are no arguments of the model's
        super().__init__(
            model=model,
            args=args,
            train_dataset=mixture,
            data_collator=_only_item,
            callbacks=[*(callbacks or ()), _LeverCallback(self)],
        )
        # our loss is already normalised over the whole optimizer step
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = False
        # else the loss of one refused step would stay in the Trainer's running sum, and every
        # later loss it logs would be NaN; our own readings show the step as it was
        self.args.logging_nan_inf_filter = True

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

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
            self.state.global_step, totals, self.args.gradient_accumulation_steps * world
        )
        out = token_losses(model, inputs, self.kl_roles, self.reference)
        terms = loss_terms(out, state, self.levers, self.lever_memory)
        loss = out.nll.sum() * 0.0 + out.kl.sum() * 0.0
        for name, term in terms.items():
            part = term.sum / term.count
            loss = loss + term.weight * part
            self._term_values[name].append(part.detach())
        # DDP and FSDP average gradients over devices; the counts are already global
        loss = loss * world
        return (loss, out) if return_outputs else loss

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
            _write_json(
                folder / MEMORY_FILE, {"memory": self.lever_memory, "refused": self.refused}
            )
            _write_json(folder / COMPLETE_FILE, {"step": self.state.global_step})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            saved = json.loads((Path(checkpoint) / MEMORY_FILE).read_text(encoding="utf-8"))
            self.lever_memory = {lever.key: {} for lever in self.levers} | saved["memory"]
            self.refused = saved["refused"]

    def step_context(self) -> StepContext:
        """The step as the levers see it."""
        return StepContext(self.model, self.state.global_step, self._grad_norm, self.start)

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

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, ctx = self.trainer, self.trainer.step_context()
        trainer._rate = trainer._get_learning_rate()  # when the step is over it is the next one's
        for lever in trainer.levers:
            lever.before_step(ctx, trainer.lever_memory[lever.key])
        if ctx.refused:
            trainer.refused.append({"step": ctx.step, "reason": "; ".join(ctx.refused)})
            # optimizers skip tensors without a gradient: no moment, no decay, no move
            trainer.model.zero_grad(set_to_none=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, step = self.trainer, state.global_step
        ctx = trainer.step_context()
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
        if trainer.every and step % trainer.every == 0 and not last:
            readings += [reading for meter in trainer.meters for reading in meter(step)]
            probe = ProbeContext(step)
            for lever in trainer.levers:
                lever.after_probe(readings, probe, trainer.lever_memory[lever.key])
            if probe.stop:
                trainer.stopped = probe.stop
                control.should_training_stop = True
        if readings and state.is_world_process_zero:
            trainer.record(readings)


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end, or None."""
    steps = [
        (int(path.parent.name.rsplit("-", 1)[1]), path.parent)
        for path in folder.glob(f"checkpoint-*/{COMPLETE_FILE}")
    ]
    return max(steps)[1] if steps else None


def _only_item(items: list[Any]) -> Any:
    if len(items) != 1:
        raise HoldfastError("a micro-batch is one item of the mixture; per_device batch size is 1")
    return items[0]


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    os.replace(temporary, path)
