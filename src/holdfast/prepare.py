"""What a run needs before its first step: model, tokenizer, streams, mixture, canary."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from holdfast import model as models
from holdfast.data.chat import encode, encode_all, fingerprint
from holdfast.data.example import EncodeReport, Role
from holdfast.data.mixture import Mixture, steps_for_epochs
from holdfast.data.packing import keeps_documents_apart
from holdfast.data.rows import Row, iter_rows
from holdfast.data.self_generated import generate
from holdfast.data.stream import Stream
from holdfast.errors import RequestError
from holdfast.levers import Setup
from holdfast.meters.canary import Document, document
from holdfast.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONGEST = 2048
"""Upper bound of the automatic `data.max_length`."""
STEPS_AIMED_AT = 200
"""Steps that the automatic `train.batch_tokens` makes of a run."""
HELDOUT_LEAST, HELDOUT_MOST = 8, 200
CANARY_SEED_OFFSET = 1_000_003
"""Canary text is sampled with another seed than anchor rows."""
WINDOWS = 4
"""Windows of `max_length` read from one canary document."""


@dataclass
class Prepared:
    """A run before its first step."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    setup: Setup
    streams: list[Stream]
    mixture: Mixture
    steps: int
    accumulation: int
    """Micro-batches of one step on one device."""
    heldout: list[Document]
    """Lesson rows that are not trained on."""
    lesson: EncodeReport

    def role_of(self, name: str) -> Role:
        """The role of the stream of this name."""
        return next(stream.role for stream in self.streams if stream.name == name)


def load(recipe: Recipe, console: Console) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and base, on the device that trains."""
    import torch

    models.check_folder(recipe.model)
    tokenizer = models.load_tokenizer(recipe.model)
    with console.status("loading the base"):
        base = models.load_model(
            recipe.model, adapter=not recipe.levers.adapter.off, tokenizer=tokenizer
        )
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
        return tokenizer, base.to(device)


def prepare(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    base: PreTrainedModel,
    folder: Path,
    console: Console,
) -> Prepared:
    """Tokenize, let each lever add its streams, and mix.

    Args:
        folder: where tokenized rows and generated text are kept (the run's `data/`).
    """
    max_length = resolve_max_length(recipe, base.config, tokenizer)
    sources = recipe.data.sources
    key = fingerprint(sources, tokenizer, max_length)
    with console.status("reading the lesson"):
        rows, report = encode_all(
            (row for source in sources for row in iter_rows(source)),
            tokenizer,
            max_length=max_length,
            cache_dir=folder,
            fingerprint=key,
        )
    if not report.response_tokens:
        raise RequestError(f"data: no row of {sources[0].path} has a response to learn")
    kept, held = split_heldout(rows, recipe.data.heldout, recipe.seed)
    lesson = rows.select(kept)
    setup = Setup(base, tokenizer, folder, recipe.seed, max_length)
    tokens = sum(map(len, lesson["input_ids"]))
    batch_tokens = recipe.train.batch_tokens or auto_batch_tokens(tokens * recipe.train.epochs)
    setup.lesson_tokens = (
        recipe.train.steps * batch_tokens  # an upper bound: the levers' streams take their share
        if recipe.train.steps
        else math.ceil(tokens * recipe.train.epochs)
    )
    extra: list[Stream] = []
    for lever in recipe.levers.active():
        with console.status(f"preparing {lever.key}"):
            extra += lever.streams(setup)
    share = 1.0 - sum(stream.share for stream in extra)
    streams = [Stream.of("task", Role.TASK, share, lesson), *extra]
    steps = recipe.train.steps or steps_for_epochs(
        streams[0].tokens, share, batch_tokens, recipe.train.epochs
    )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    accumulation = math.ceil(batch_tokens / (recipe.train.micro_batch_tokens * world))
    mixture = Mixture(
        streams,
        batch_tokens=batch_tokens,
        seed=recipe.seed,
        steps=steps,
        micro_batches=accumulation * world,
        width=max_length,
        pad_token_id=tokenizer.pad_token_id,
        packed=base.device.type == "meta" or keeps_documents_apart(base),
    )
    return Prepared(
        recipe,
        tokenizer,
        setup,
        streams,
        mixture,
        steps,
        accumulation,
        [
            document(row["input_ids"], row["loss_mask"], "heldout")
            for row in map(rows.__getitem__, held)
        ],
        report,
    )


def identity(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, base: PreTrainedModel
) -> dict[str, str | int]:
    """What a run starts from; it may only be continued from the same."""
    max_length = resolve_max_length(recipe, base.config, tokenizer)
    replay = recipe.levers.replay
    files = {
        "data": recipe.data.sources,
        "replay": [] if replay.off else replay.sources,
        "canary": recipe.canary.sources,
    }
    digests = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in recipe.probes]
    return {
        "max_length": max_length,
        "weights_sha256": models.hash_weights(base),
        **{
            f"{name}_fingerprint": fingerprint(sources, tokenizer, max_length)
            for name, sources in files.items()
        },
        "probes_sha256": " ".join(digests),
    }


def resolve_max_length(recipe: Recipe, config: Any, tokenizer: Any) -> int:
    """`data.max_length`, or the model's context up to 2048. Raises beyond the context."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or 10**9
    context = min(context, tokenizer.model_max_length or 10**9)
    asked = recipe.data.max_length
    if asked is not None and asked > context:
        raise RequestError(
            f"data.max_length: {asked} is beyond the model's context of {context} tokens; "
            f"a value that works: {context}"
        )
    return asked or min(context, LONGEST)


def auto_batch_tokens(tokens: float) -> int:
    """A power of two that makes about 200 steps of `tokens`, 1024 to 16384."""
    exponent: int = round(math.log2(max(1.0, tokens / STEPS_AIMED_AT)))
    return int(min(16384, max(1024, 2**exponent)))


def split_heldout(rows: Any, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Row numbers to train on, and to hold out: none that is also trained on under another number.

    No row is held out of a lesson too small to spare any (fewer than 4 times the least).
    """
    contents = [tuple(ids) for ids in rows["input_ids"]]
    count = min(HELDOUT_MOST, max(HELDOUT_LEAST, round(fraction * len(contents))))
    if fraction == 0 or len(contents) < 4 * HELDOUT_LEAST:
        return list(range(len(contents))), []
    random = np.random.default_rng(np.random.SeedSequence([seed, 0x4E1D]))
    held = sorted(random.permutation(len(contents))[:count].tolist())
    secret = {contents[i] for i in held}
    kept = [i for i, content in enumerate(contents) if content not in secret]
    if not kept:
        raise RequestError("data: all rows of the lesson are the same; give more than one")
    distinct = {contents[i]: i for i in reversed(held)}
    return kept, sorted(distinct.values())


def canary_documents(prepared: Prepared, console: Console) -> list[Document]:
    """Held-out text by domain: the user's files, or fresh samples of the base."""
    recipe, setup = prepared.recipe, prepared.setup
    limit = recipe.canary.max_documents
    if recipe.canary.sources:
        found: dict[tuple[str, str], Document] = {}
        rows: Counter[str] = Counter()
        for source in recipe.canary.sources:
            for row in iter_rows(source):
                domain = row.domain or Path(source.path).stem
                if rows[domain] < limit:
                    already = len(found)
                    for one in _windows(row, domain, prepared):
                        found.setdefault((domain, one.id), one)
                    rows[domain] += len(found) > already
        if not found:
            raise RequestError("canary.sources: no rows in them; give text rows, or leave it out")
        return list(found.values())
    with console.status("sampling the canary from the base"):
        examples = generate(
            setup.model,
            setup.tokenizer,
            rows=limit,
            max_new_tokens=min(256, setup.max_length - 1),
            temperature=1.0,
            seed=recipe.seed + CANARY_SEED_OFFSET,
            keep=setup.folder / "canary.json",
        )
    trained = {
        tuple(stream.fetch(i)[0])
        for stream in prepared.streams
        if stream.role is Role.ANCHOR
        for i in range(len(stream.lengths))
    }
    fresh = {tuple(e.input_ids): e for e in examples if tuple(e.input_ids) not in trained}
    return [document(e.input_ids, e.loss_mask, "base samples") for e in fresh.values()]


def _windows(row: Row, domain: str, prepared: Prepared) -> list[Document]:
    examples = encode(row, prepared.tokenizer, max_length=prepared.setup.max_length)
    return [document(e.input_ids, e.loss_mask, domain, row.where) for e in examples[:WINDOWS]]
