"""What is read of a model, wherever it is: in a run, around another trainer, of two checkpoints.

Before and after, all that the gate compares (`whole`); while training goes on, what is cheap and
may be looked at (`glance`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.data.chat import encode
from holdfast.data.rows import iter_rows
from holdfast.errors import RequestError
from holdfast.meters import Reading
from holdfast.meters.canary import (
    OWN_SAMPLES,
    Canary,
    Document,
    document,
    read_bits,
    read_canary,
    read_rise,
)
from holdfast.meters.drift import Start
from holdfast.meters.experts import read_expert_drift, read_experts
from holdfast.meters.kl import read_kl
from holdfast.meters.probes import Item, Results, read_probes
from holdfast.meters.routing import Routing, read_routing, routers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from holdfast.reference import Reference

LONGEST = 2048
"""Upper bound of a window, where nobody asks for another."""
WINDOWS = 4
"""Windows of `max_length` read from one canary document."""
SEED_OFFSET = 1_000_003
"""Canary text is sampled with another seed than anchor rows."""


@dataclass(frozen=True)
class Measure:
    """The texts and items that a model is read with."""

    tokenizer: PreTrainedTokenizerBase
    canary: Sequence[Document] = ()
    items: Sequence[Item] = ()
    heldout: Sequence[Document] = ()
    """Lesson rows that are not trained on."""
    run_generated_code: bool = False
    """Run what the model writes for code items, in a sandbox; without it they are refused."""

    def whole(
        self,
        model: Any,
        step: int,
        reference: Reference | None = None,
        *,
        cached: bool = False,
    ) -> list[Reading]:
        """Both halves of the canary, held-out lesson rows, every probe: all that is compared.

        Args:
            reference: the base; where it is given, KL to it on the canary and on the lesson.
            cached: look the probes' results up by weights and items, and keep them: for a model
                that will be read again, such as a base.
        """
        canary = [
            *read_canary(model, self.canary, "selection", step),
            *read_canary(model, self.canary, "sealed", step),
        ]
        found = [
            *canary,
            *read_canary(model, self.heldout, "sealed", step, meter="lesson"),
            *self._probes(model, step, cached),
            *read_bits(canary, self.canary, self.tokenizer),
        ]
        if reference is not None:
            found += read_kl(model, reference, self.canary, "sealed", step, on="old")
            found += read_kl(model, reference, self.heldout, "sealed", step, on="new")
        return found

    def routed(self, model: Any) -> Routing | None:
        """Where a mixture of experts sends the sealed canary; None for any other model."""
        return read_routing(model, self.canary, "sealed") if routers(model) else None

    def _probes(self, model: Any, step: int, cached: bool) -> list[Reading]:
        return read_probes(
            model,
            self.tokenizer,
            self.items,
            step,
            results=Results(model, self.tokenizer) if cached and self.items else None,
            run_generated_code=self.run_generated_code,
        )

    @staticmethod
    def rise(before: Iterable[Reading], after: Iterable[Reading]) -> list[Reading]:
        """How much each canary domain rose, from the same documents before and after."""
        first, last = ([r for r in found if r.meter == "canary"] for found in (before, after))
        return read_rise(first, last)

    def glance(
        self, model: Any, step: int, *, lesson: bool = False, probes: bool = False
    ) -> list[Reading]:
        """The selection half of the canary; of the lesson and the probes where asked for.

        Probe items are those of the gate, which no choice may rest on: such a reading is one of
        training's own (split `train`), and no gate reads it.
        """
        found = read_canary(model, self.canary, "selection", step)
        if lesson:
            found += read_canary(model, self.heldout, "selection", step, meter="lesson")
        if probes:
            found += [replace(one, split="train") for one in self._probes(model, step, False)]
        return found


def routing_changes(
    before: Routing | None, after: Routing | None, start: Start, step: int
) -> list[Reading]:
    """What became of a mixture's routing, and how far each expert moved; nothing of other models.

    Args:
        before: the base's routing of the same documents as `after`, the tuned model's.
        start: where the weights began.
    """
    if before is None or after is None:
        return []
    return [*read_experts(before, after, step), *read_expert_drift(start, step)]


def context_length(config: Any, tokenizer: Any) -> int:
    """Tokens that model and tokenizer take at most; 10**9 where neither says."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or 10**9
    return min(context, getattr(tokenizer, "model_max_length", None) or 10**9)


def text_documents(
    canary: Canary, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Document]:
    """The user's held-out rows by domain, each in at most `WINDOWS` windows; none twice.

    Raises:
        RequestError: a faulty row, or no row at all.
    """
    found: dict[tuple[str, str], Document] = {}
    rows: Counter[str] = Counter()
    for source in canary.sources:
        for row in iter_rows(source):
            domain = row.domain or Path(source.path).stem
            if rows[domain] >= canary.max_documents:
                continue
            already = len(found)
            for example in encode(row, tokenizer, max_length=max_length)[:WINDOWS]:
                one = document(example.input_ids, example.loss_mask, domain, row.where)
                found.setdefault((domain, one.id), one)
            rows[domain] += len(found) > already
    if not found:
        raise RequestError("canary.sources: no rows in them; give text rows, or leave it out")
    return list(found.values())


def shared_documents(
    canary: Canary, tokenizers: tuple[Any, Any], max_length: int
) -> tuple[list[Document], list[Document]]:
    """The same text in the tokens of either tokenizer, for bits per byte; chat rows are refused.

    A text that either would need more than `WINDOWS` windows for ends where both still have room.
    """
    found: tuple[list[Document], list[Document]] = [], []
    rows: Counter[str] = Counter()
    seen: set[tuple[str, str]] = set()
    for source in canary.sources:
        for row in iter_rows(source):
            domain = row.domain or Path(source.path).stem
            if row.format != "text":
                raise RequestError(
                    f"{row.where}: a chat row is worded otherwise by each model's template, so it "
                    'cannot be compared across tokenizers; give text rows: {"text": "..."}'
                )
            text = _fitting(row.content["text"], tokenizers, WINDOWS * (max_length - 2))
            if not text.strip() or rows[domain] >= canary.max_documents or (domain, text) in seen:
                continue
            seen.add((domain, text))
            rows[domain] += 1
            cut = replace(row, content={"text": text})
            for documents, tokenizer in zip(found, tokenizers, strict=True):
                for one in encode(cut, tokenizer, max_length=max_length):
                    documents.append(document(one.input_ids, one.loss_mask, domain, row.where))
    return found


def _fitting(text: str, tokenizers: tuple[Any, Any], most: int) -> str:
    """The longest beginning of at most `most` tokens under either, to within a character."""

    def fits(characters: int) -> bool:
        return all(
            len(tokenizer(text[:characters], add_special_tokens=False)["input_ids"]) <= most
            for tokenizer in tokenizers
        )

    if fits(len(text)):
        return text
    low, high = 0, len(text)  # fits(low), not fits(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return text[:low]


def sampled_documents(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: int,
    max_length: int,
    seed: int,
    keep: Path,
    notes: dict[str, Any] | None = None,
) -> list[Document]:
    """Text that the base writes itself, where the user has no canary; kept in the file `keep`."""
    from holdfast.data.self_generated import generate

    examples = generate(
        model,
        tokenizer,
        rows=rows,
        max_new_tokens=min(256, max_length - 1),
        temperature=1.0,
        seed=seed + SEED_OFFSET,
        keep=keep,
        notes=notes,
    )
    fresh = {tuple(e.input_ids): e for e in examples}
    return [document(e.input_ids, e.loss_mask, OWN_SAMPLES) for e in fresh.values()]


def require_finite(readings: Iterable[Reading], named: str) -> None:
    """Refuse readings of a model whose likelihoods are not numbers.

    Raises:
        RequestError: one line, which names the model and the first such reading.
    """
    for reading in readings:
        if not all(map(math.isfinite, (reading.value, *reading.items.values()))):
            raise RequestError(
                f"{named}: its logits are not finite (found reading {reading.meter} "
                f"'{reading.name}'), so nothing was read; give weights without NaN, or, where they "
                "overflow in half precision, --dtype float32"
            )
