"""Seconds a step: holdfast with LoRA and KL on 25 % anchor tokens, against trl without KL.

Both train the same MLP LoRA on the same number of tokens a step (rows of equal length, so neither
side pads), in turns within one process, so that whatever else the machine does falls on both.

    python benchmarks/step_time.py --model PATH      # default: the lab's base
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from holdfast.data.example import Example, Role
from holdfast.data.mixture import Mixture
from holdfast.data.stream import Stream
from holdfast.lab import base_path
from holdfast.levers import Setup
from holdfast.levers.adapter import Adapter
from holdfast.levers.kl_anchor import KlAnchor
from holdfast.meters.drift import Start
from holdfast.model import Model, load_model, load_tokenizer
from holdfast.trainer import HoldfastTrainer

WARM_UP = 3


class Clock(TrainerCallback):
    """Wall time of each optimizer step after the warm-up."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > WARM_UP:
            self.steps.append(time.perf_counter() - self.started)


def rows(count: int, length: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Random token ids; the time of a step does not depend on what they say."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, vocabulary, (count, length), generator=generator).tolist()


def time_holdfast(model: Any, rows_a_step: int, length: int, steps: int, folder: Path) -> Clock:
    """Our trainer: three quarters lesson rows, one quarter anchor rows."""
    settings = Model(path=model)
    tokenizer = load_tokenizer(settings)
    lm = Adapter().wrap(load_model(settings, adapter=True, tokenizer=tokenizer))
    anchor = KlAnchor()
    setup = Setup(lm, tokenizer, folder, 0, length)
    anchor.prepare(setup)
    object.__setattr__(anchor, "key", "kl_anchor")
    vocabulary = lm.config.vocab_size
    streams = [
        Stream.of(
            name,
            role,
            share,
            [Example(r, [False] + [True] * (length - 1)) for r in rows(256, length, vocabulary, 1)],
        )
        for name, role, share in (("task", Role.TASK, 0.75), ("anchor", Role.ANCHOR, 0.25))
    ]
    mixture = Mixture(
        streams,
        batch_tokens=rows_a_step * length,
        seed=0,
        steps=steps,
        micro_batches=1,
        width=length,
        pad_token_id=tokenizer.pad_token_id,
    )
    clock = Clock()
    trainer = HoldfastTrainer(
        lm,
        TrainingArguments(**arguments(folder, steps), per_device_train_batch_size=1),
        mixture,
        [anchor],
        start=Start(lm),
        reference=setup.reference,
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock


def time_trl(model: Any, rows_a_step: int, length: int, steps: int, folder: Path) -> Clock:
    """Trl's SFTTrainer with the same adapter and no KL."""
    settings = Model(path=model)
    tokenizer = load_tokenizer(settings)
    lm = Adapter().wrap(load_model(settings, adapter=True, tokenizer=tokenizer))
    ids = rows(rows_a_step * steps, length, lm.config.vocab_size, 1)
    clock = Clock()
    trainer = SFTTrainer(
        lm,
        SFTConfig(
            **arguments(folder, steps), per_device_train_batch_size=rows_a_step, max_length=length
        ),
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock


def arguments(folder: Path, steps: int) -> dict[str, Any]:
    """What both trainers are told."""
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "learning_rate": 1e-4,
        "save_strategy": "no",
        "logging_steps": steps,
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
    }


def main(
    model: Annotated[str | None, typer.Option(help="Folder or hub id; empty: the lab")] = None,
    rows_a_step: int = 16,
    length: int = 256,
    steps: int = 13,
    rounds: int = 5,
    threads: int = 2,
) -> None:
    """Alternate the two trainers and print the ratio of their median step times."""
    torch.set_num_threads(threads)
    path = model or str(base_path())
    ours: list[float] = []
    theirs: list[float] = []
    with TemporaryDirectory() as scratch:
        for _ in range(rounds):
            theirs += time_trl(path, rows_a_step, length, steps, Path(scratch)).steps
            ours += time_holdfast(path, rows_a_step, length, steps, Path(scratch)).steps
    print(
        f"model {Path(path).name}, {rows_a_step} rows x {length} tokens a step, {threads} threads"
    )
    for name, times in (("trl SFTTrainer, LoRA", theirs), ("holdfast, LoRA + 25 % KL", ours)):
        print(
            f"{name:26} median {statistics.median(times):.3f} s  min {min(times):.3f}  "
            f"max {max(times):.3f}  ({len(times)} steps)"
        )
    print(f"ratio of medians {statistics.median(ours) / statistics.median(theirs):.2f}   aim 1.25")


if __name__ == "__main__":
    typer.run(main)
