"""What a run needs before its first step: model, tokenizer, streams, mixture, canary."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from holdfast import model as models
from holdfast.data.chat import encode_all, fingerprint
from holdfast.data.contamination import refuse_contaminated
from holdfast.data.example import EncodeReport, Role
from holdfast.data.mixer import mixer_of
from holdfast.data.mixture import Mixture, steps_for_epochs
from holdfast.data.packing import keeps_documents_apart
from holdfast.data.rows import iter_rows
from holdfast.data.stream import Stream
from holdfast.data.texts import row_texts
from holdfast.dual import SHARE_LEAST
from holdfast.errors import RequestError
from holdfast.levers import Setup
from holdfast.lineage import locate
from holdfast.measure import LONGEST, context_length, sampled_documents, text_documents
from holdfast.meters.canary import Document, document
from holdfast.meters.secret import secret_texts
from holdfast.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STEPS_AIMED_AT = 600
"""Steps that the automatic `train.epochs` and `train.batch_tokens` make of a run."""
BATCH_LEAST, BATCH_MOST = 512, 16384
EPOCHS_LEAST, EPOCHS_MOST = 3.0, 12.0
HELDOUT_LEAST, HELDOUT_MOST = 8, 200


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

    def rows_of(self, roles: Collection[Role]) -> Iterator[list[int]]:
        """Token ids of every document of these roles that the whole run may read, each once."""
        mixtures = [self.mixture]
        if self.recipe.levers.forgetting.budget:  # it may give the other streams more
            mixtures.append(copy(self.mixture))
            mixtures[1].schedule = [(0, SHARE_LEAST)]
        read = {
            document
            for mixture in mixtures
            for step in range(self.steps)
            for document in mixture.rows_at(step)
            if self.streams[document[0]].role in roles
        }
        for stream, row in sorted(read):
            yield list(self.streams[stream].fetch(row)[0])


def load(recipe: Recipe, console: Console) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and base, on the device that trains."""
    import torch

    models.check_folder(recipe.model)
    tokenizer = models.load_tokenizer(recipe.model)
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    with console.status("loading the base"):
        base = models.load_model(
            recipe.model,
            adapter=not recipe.levers.adapter.off,
            tokenizer=tokenizer,
            four_bit_on=device if recipe.levers.adapter.four_bit else None,
        )
        return tokenizer, base if recipe.levers.adapter.four_bit else base.to(device)


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
    practised = row_texts([*sources, *recipe.levers.replay.sources_read()])
    with console.status("looking for the canary and the probes in the rows"):
        refuse_contaminated(practised, secret_texts(recipe.canary, recipe.probes))
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
    share = 1.0 - recipe.levers.other_share
    epochs = recipe.train.epochs or auto_epochs(tokens / share)
    batch_tokens = recipe.train.batch_tokens or auto_batch_tokens(tokens / share * epochs)
    steps = recipe.train.steps or steps_for_epochs(tokens, share, batch_tokens, epochs)
    setup.lesson_tokens = math.ceil(share * steps * batch_tokens)
    extra: list[Stream] = []
    for lever in recipe.levers.active():
        with console.status(f"preparing {lever.key}"):
            extra += lever.streams(setup)
    _tell_of_replay(recipe, setup, extra, console)
    parts = [part for lever in recipe.levers.active() for part in lever.lesson(lesson, share)]
    streams = [*(parts or [Stream.of("task", Role.TASK, share, lesson)]), *extra]
    setup.lesson = [stream for stream in streams if stream.role is Role.TASK]
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
        order=recipe.train.order,
        packed=base.device.type == "meta" or keeps_documents_apart(base),
    )
    if not mixture.packed:  # what pads a row takes memory, too
        needed = mixture.padded_parts(recipe.train.micro_batch_tokens)
        accumulation = max(accumulation, math.ceil(needed / world))
        mixture.micro_batches = accumulation * world
    return Prepared(
        recipe,
        tokenizer,
        setup,
        streams,
        mixture,
        steps,
        accumulation,
        [
            document(row["input_ids"], row["loss_mask"], row["domain"] if parts else "heldout")
            for row in map(rows.__getitem__, held)
        ],
        report,
    )


def _tell_of_replay(
    recipe: Recipe, setup: Setup, streams: Sequence[Stream], console: Console
) -> None:
    """Say what came with the stage: mix, lessons that are held, canary; and what did not."""
    replay = recipe.levers.replay
    stage = locate(recipe.model.path, recipe.model.revision)
    if "mixer" in setup.notes:
        came = " (it came with the model)" * (str(mixer_of(stage)) == replay.mixer)
        line = f"replaying the mix of {setup.notes['mixer']}{came}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if replay.earlier.share:
        paths = ", ".join(source.path for source in replay.earlier.sources)
        line = f"holding what was taught before: {paths} ({replay.earlier.share:.0%} of the tokens)"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    sources = recipe.canary.sources
    if [one.model_dump(mode="json") for one in sources] == stage.canary():
        line = f"canary: that of the stage before: {', '.join(one.path for one in sources)}"
        if sources:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        lost = (
            f"canary.sources: '{one['path']}', by which the stage before was read, is gone and is "
            "not read now; put it back, or name another"
            for one in stage.canary(there=False)
        )
        warn(lost, setup, console)
    domains = {
        row.domain or Path(source.path).stem
        for source in recipe.canary.sources
        for row in iter_rows(source)
    }
    names = [stream.name for stream in streams]
    warn(replay.warnings(stage, domains, names), setup, console)


def warn(lines: Iterable[str], setup: Setup, console: Console) -> None:
    """Say each on the console and in the report."""
    for line in lines:
        setup.notes.setdefault("warnings", []).append(line)
        console.print(
            f"warning: {line}", style="yellow", highlight=False, markup=False, soft_wrap=True
        )


def identity(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, base: PreTrainedModel
) -> dict[str, str | int]:
    """What a run starts from; it may only be continued from the same."""
    max_length = resolve_max_length(recipe, base.config, tokenizer)
    replay = recipe.levers.replay
    files = {
        "data": recipe.data.sources,
        "replay": replay.sources_read(),
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
        **replay.identity(),
    }


def resolve_max_length(recipe: Recipe, config: Any, tokenizer: Any) -> int:
    """`data.max_length`, or the model's context up to 2048. Raises beyond the context."""
    context = context_length(config, tokenizer)
    asked = recipe.data.max_length
    if asked is not None and asked > context:
        raise RequestError(
            f"data.max_length: {asked} is beyond the model's context of {context} tokens; "
            f"a value that works: {context}"
        )
    return asked or min(context, LONGEST)


def auto_epochs(tokens: float) -> float:
    """3 passes over `tokens` (all streams), more where they are too few, 12 at most."""
    needed = STEPS_AIMED_AT * BATCH_LEAST / max(1.0, tokens)
    return min(EPOCHS_MOST, max(EPOCHS_LEAST, needed))


def auto_batch_tokens(tokens: float) -> int:
    """A power of two that makes about 600 steps of `tokens` (all streams), 512 to 16384."""
    exponent: int = round(math.log2(max(1.0, tokens / STEPS_AIMED_AT)))
    return int(min(BATCH_MOST, max(BATCH_LEAST, 2**exponent)))


def split_heldout(rows: Any, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Documents to train on, and to hold out: none that is also trained on under another number.

    Whole rows of the source are held out, for what a long text or a conversation was made into is
    no held-out text of the rest; single documents where the rows are too few or too long for that.
    No document is held out of a lesson too small to spare any (fewer than 4 times the least).
    """
    n = len(rows["input_ids"])
    if fraction == 0 or n < 4 * HELDOUT_LEAST:
        return list(range(n)), []
    count = min(HELDOUT_MOST, max(HELDOUT_LEAST, round(fraction * n)))
    contents = [_digest(ids) for ids in rows["input_ids"]]
    held: list[int] = []
    for row_of in (np.unique(rows["source_row"][:], return_inverse=True)[1], np.arange(n)):
        sizes = np.bincount(row_of)
        if len(sizes) < 4 * HELDOUT_LEAST:
            continue
        members = np.split(np.argsort(row_of, kind="stable"), np.cumsum(sizes)[:-1])
        random = np.random.default_rng(np.random.SeedSequence([seed, 0x4E1D]))
        for row in random.permutation(len(members)):
            if len(held) + len(members[row]) <= count:
                held += members[row].tolist()
        if held:
            break
    secret = {contents[i] for i in held}
    apart = {row_of[i] for i in held}
    kept = [i for i in range(n) if contents[i] not in secret and row_of[i] not in apart]
    if not kept:
        raise RequestError("data: all rows of the lesson are the same; give more than one")
    distinct = {contents[i]: i for i in sorted(held, reverse=True)}
    return kept, sorted(distinct.values())


def _digest(ids: Sequence[int]) -> bytes:
    return hashlib.blake2b(np.asarray(ids, np.int32).tobytes(), digest_size=16).digest()


def canary_documents(prepared: Prepared, console: Console) -> list[Document]:
    """Held-out text by domain: the user's files, or fresh samples of the base."""
    recipe, setup = prepared.recipe, prepared.setup
    if recipe.canary.sources:
        return text_documents(recipe.canary, setup.tokenizer, setup.max_length)
    with console.status("sampling the canary from the base"):
        sampled = sampled_documents(
            setup.model,
            setup.tokenizer,
            rows=recipe.canary.max_documents,
            max_length=setup.max_length,
            seed=recipe.seed,
            keep=setup.folder / "canary.json",
            notes=setup.notes,
        )
    trained = {
        tuple(stream.fetch(i)[0])
        for stream in prepared.streams
        if stream.role is Role.ANCHOR
        for i in range(len(stream.lengths))
    }
    return [one for one in sampled if tuple(one.text.input_ids) not in trained]
