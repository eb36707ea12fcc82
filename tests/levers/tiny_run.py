"""A run small enough for a test: 64 tokens, two layers; levers wired as `holdfast.run` does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
    set_seed,
)

from holdfast.data.example import Example, Role
from holdfast.data.mixture import Mixture
from holdfast.data.stream import Stream
from holdfast.levers import Lever, Memory, Setup, StepState, Term, TokenLosses, wrapped
from holdfast.levers import levers as known
from holdfast.levers.adapter import Adapter
from holdfast.levers.budget import Budget
from holdfast.levers.kl_anchor import KlAnchor
from holdfast.measure import sampled_documents
from holdfast.meters import Reading
from holdfast.meters.canary import read_canary
from holdfast.meters.drift import Start
from holdfast.trainer import HoldfastTrainer

ALPHABET = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,?!:0123"
PLAIN = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "max_grad_norm": 0.0,
    "weight_decay": 0.0,
}
"""TrainingArguments of a run without levers: a schedule, no clipping, no decay."""


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a letter; 64 with BOS and EOS."""
    backend = Tokenizer(BPE(vocab={c: i for i, c in enumerate(ALPHABET)}, merges=[]))
    backend.add_special_tokens(["<s>", "</s>"])
    letters = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    letters.pad_token = letters.eos_token
    return letters


def llama(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    """A Llama whose random weights are large enough for its distribution not to be flat."""
    set_seed(seed)
    config = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": 62,
        "eos_token_id": 63,
        "pad_token_id": 63,
    }
    return LlamaForCausalLM(LlamaConfig(**config | settings))


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """A model that can be run in float64 throughout (Llama's norms fall back to float32)."""
    set_seed(seed)
    config = GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=62,
        eos_token_id=63,
    )
    return GPT2LMHeadModel(config)


def shake(model: torch.nn.Module) -> None:
    """Move the trained weights away from their start, so that no term of the loss is zero."""
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=random)


def examples(count: int, seed: int, prompt: int = 3) -> list[Example]:
    """Rows of 6 to 20 tokens, of which the first `prompt` are not learned."""
    random = np.random.default_rng(seed)
    lengths = random.integers(6, 21, size=count)
    return [
        Example(
            random.integers(0, 62, n).tolist(),
            [False] * prompt + [True] * (int(n) - prompt),
            "even" if row % 2 == 0 else "odd",
        )
        for row, n in enumerate(lengths)
    ]


LESSON = examples(24, seed=1)


def tiny_run(
    levers: Sequence[Lever],
    folder: Path,
    *,
    model: Any = None,
    steps: int = 3,
    micro_batches: int = 1,
    batch_tokens: int = 96,
    seed: int = 0,
    streams: Sequence[Stream] = (),
    arguments: Mapping[str, Any] | None = None,
    known: bool = False,
    **options: Any,
) -> HoldfastTrainer:
    """A trainer over the lesson, `streams`, and what the levers add; `options` go to it as given.

    `known`: the levers may know all rows beforehand, as in a run of a recipe. Rows that levers
    generate are kept in `folder`, and checkpoints under `folder/checkpoints`.
    """
    setup = Setup(model or llama(), tokenizer(), folder / "data", seed, max_length=24)
    setup.lesson_tokens = steps * batch_tokens
    extra = [*streams, *(stream for lever in levers for stream in lever.streams(setup))]
    share = 1 - sum(stream.share for stream in extra)
    parts = [part for lever in levers for part in lever.lesson(LESSON, share)]
    mixture = Mixture(
        [*(parts or [Stream.of("task", Role.TASK, share, LESSON)]), *extra],
        batch_tokens=batch_tokens,
        seed=seed,
        steps=steps,
        micro_batches=micro_batches,
        width=24,
        pad_token_id=63,
    )
    setup.lesson = [stream for stream in mixture.streams if stream.role is Role.TASK]
    settings: dict[str, Any] = {
        "learning_rate": 1e-2,
        "max_steps": steps,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": micro_batches,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        **PLAIN,
    }
    if any(lever.key == "forgetting" for lever in levers) and "meters" not in options:
        options |= watched(setup)
    set_seed(seed)
    setup.model = wrapped(levers, setup.model)
    if known:
        setup.texts = lambda roles: (
            list(stream.fetch(row)[0])
            for stream in mixture.streams
            if stream.role in roles
            for row in range(len(stream.lengths))
        )
    for lever in levers:
        lever.prepare(setup)
    for lever in levers:
        settings |= lever.arguments(setup.model.config)
    return HoldfastTrainer(
        setup.model,
        TrainingArguments(str(folder / "checkpoints"), **settings | dict(arguments or {})),
        mixture,
        levers,
        start=Start(setup.model),
        reference=setup.reference,
        **options,
    )


def watched(setup: Setup) -> dict[str, Any]:
    """Options of a run that reads, after each step, how likely what the base wrote still is."""
    keep = setup.folder / "canary.json"
    kept = sampled_documents(
        setup.model, setup.tokenizer, rows=16, max_length=24, seed=setup.seed, keep=keep
    )

    def read(step: int) -> list[Reading]:
        found = read_canary(setup.model, kept, "selection", step)
        return [replace(one, seconds=0.0) for one in found]

    return {"every": 1, "before": read(0), "meters": [read]}


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every weight by its name in the bare model, so that wrapped and bare compare."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value.detach().clone()
        for name, value in model.state_dict().items()
    }


class Jolt(Lever):
    """Multiplies the lesson's loss in some steps, as a broken batch would."""

    factor: float = Field(allow_inf_nan=True)
    steps: tuple[int, ...]

    def terms(self, out: TokenLosses, state: StepState, memory: Memory) -> dict[str, Term]:
        hit = state.step in self.steps
        return {"jolt": Term(out.nll.sum(), state.totals[Role.TASK], self.factor if hit else 0.0)}


def parallel_run(folder: Path, accumulation: int, more: Sequence[str] = ()) -> dict[str, Any]:
    """What came out of a run whose steps are dealt into four, over all processes there are.

    `more` are levers in JSON: {"key": settings}.
    """
    chosen = [known()[key](**given) for one in more for key, given in json.loads(one).items()]
    readings: list[Reading] = []
    trainer = tiny_run(
        [
            Adapter(r=2),
            Budget(clip=0.3, warmup=0.0),
            KlAnchor(weight=3.0, self_generated={"rows": 8, "max_new_tokens": 12}),
            *chosen,
        ],
        folder,
        micro_batches=4,
        arguments={"gradient_accumulation_steps": accumulation, "learning_rate": 1e-2},
        record=readings.extend,
    )
    trainer.train()
    return {
        "processes": trainer.accelerator.num_processes,
        "weights": weights(trainer.model),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "readings": {(r.step, r.meter, r.name): r.value for r in readings},
    }
