"""What is read of a model, wherever it is: in a run, around another trainer, of two checkpoints.

Before and after, all that the gate compares (`whole`); while training goes on, what is cheap and
may be looked at (`glance`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from holdfast import model as models
from holdfast.data.chat import encode
from holdfast.data.rows import Row, Source, iter_rows
from holdfast.errors import RequestError
from holdfast.meters import HALVES, Reading, Split
from holdfast.meters.adoption import Form, read_adoption
from holdfast.meters.canary import (
    OWN_SAMPLES,
    Canary,
    Document,
    document,
    read_bits,
    read_canary,
    read_rise,
)
from holdfast.meters.collapse import labels_of, read_collapse
from holdfast.meters.drift import Start
from holdfast.meters.experts import (
    expert_drift,
    read_busiest,
    read_expert_drift,
    read_experts,
    unseen_experts,
)
from holdfast.meters.kl import read_kl
from holdfast.meters.likelihood import Question
from holdfast.meters.probes import Item, Results, read_probes
from holdfast.meters.probes.encode import encode_items
from holdfast.meters.recovery import fallen, read_recovery
from holdfast.meters.routing import Routing, read_routing, routers
from holdfast.meters.scoring import Scored

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from holdfast.data.example import Example
    from holdfast.data.stream import Stream
    from holdfast.reference import Reference

_SAID = ("text", "messages", "prompt", "completion")
"""Keys of a row that hold what it says."""
LONGEST = 2048
"""Upper bound of a window, where nobody asks for another."""
WINDOWS = 4
"""Windows of `max_length` read from one canary document."""
LESSON_ROWS = 1000
"""Rows of the lesson that its form and its labels are read off."""
ROUTED_ROWS = 200
"""Of these, rows whose experts are looked at."""
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
    choosing: bool = False
    """Whether something is chosen by the probes: then their selection half may be looked at, and
    the gate has their sealed half; without it, it has all items."""
    run_generated_code: bool = False
    """Run what the model writes for code items, in a sandbox; without it they are refused."""
    rows: Sequence[Document] = ()
    """Lesson rows that are trained on, a sample: form, labels and experts are read off them."""
    practice: Sequence[Example] = ()
    """The items tagged `recovery`, as rows to learn (`recovery_examples`)."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Facts for the report: what could not be read, and why."""

    @cached_property
    def form(self) -> Form | None:
        """What the lesson's responses look like, where items tagged `adoption` ask for it."""
        if not self.rows or not any("adoption" in item.tags for item in self.items):
            return None
        found = None
        with self._noted("over_application"):
            found = Form.of([_response(row.text, self.tokenizer) for row in self.rows])
        return found

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
            *read_canary(model, self.heldout, "selection", step, meter="lesson"),
            *read_canary(model, self.heldout, "sealed", step, meter="lesson"),
            *self._probes(model, step, cached=cached),
            *read_bits(canary, self.canary, self.tokenizer),
        ]
        if reference is not None:
            found += read_kl(model, reference, self.canary, "sealed", step, on="old")
            found += read_kl(model, reference, self.heldout, "sealed", step, on="new")
        return found

    def routed(self, model: Any) -> Routing | None:
        """Where a mixture of experts sends the sealed canary; None for any other model."""
        return read_routing(model, self.canary, "sealed") if routers(model) else None

    def _probes(
        self, model: Any, step: int, *, halves: Sequence[Split] = HALVES, cached: bool = False
    ) -> list[Reading]:
        """Every probe by halves, or whole where nothing is chosen by them; and over-application."""
        found = [
            reading
            for half in (halves if self.choosing else (None,))
            for reading in read_probes(
                model,
                self.tokenizer,
                self.items,
                step,
                split=half,
                results=Results(model, self.tokenizer) if cached and self.items else None,
                run_generated_code=self.run_generated_code,
            )
        ]
        return [*found, *(read_adoption(found, self.items, self.form) if self.form else ())]

    def afterwards(
        self,
        model: Any,
        start: Start,
        before: Sequence[Reading],
        after: Sequence[Reading],
        routed: Routing | None,
        step: int,
    ) -> tuple[list[Reading], list[str]]:
        """What is read once, when training is over, beside `whole`; and what to warn of.

        Args:
            start: where the weights began.
            before: the base's readings, and `after`, the tuned model's.
            routed: the base's routing; None for a model without experts.
        """
        experts: list[Reading] = []
        warnings: list[str] = []
        with self._noted("experts"):
            experts, warnings = self.experts(model, start, routed, step)
        collapse = self.collapsed(model, step)
        recovery = self.recovered(model, before, after, step)
        return [*self.rise(before, after), *experts, *collapse, *recovery], warnings

    def recovered(
        self, model: Any, before: Iterable[Reading], after: Iterable[Reading], step: int
    ) -> list[Reading]:
        """Whether the items of a probe that fell are back after practice, which a copy takes.

        Nothing where no probe fell as a whole, or there is no item to practise on.
        """
        then, now = ([r for r in found if r.split == "sealed"] for found in (before, after))
        was = {r.name: r.value for r in then if r.meter == "probe"}
        fell = {r.name for r in now if r.meter == "probe" and r.value < was.get(r.name, r.value)}
        lost = fallen(then, now)
        asked = [i for i in self.items if i.probe in fell and i.id in lost.get(i.probe, ())]
        if not asked or not self.practice:
            return []

        def score(of: Any) -> list[Reading]:
            run_code = self.run_generated_code
            return read_probes(of, self.tokenizer, asked, step, run_generated_code=run_code)

        found = []
        with self._noted("recovery"):
            found = read_recovery(model, self.practice, score)
        return found

    def collapsed(self, model: Any, step: int) -> list[Reading]:
        """Label collapse on held-out rows; nothing of a lesson that does not classify."""
        labels = labels_of(row.text for row in (*self.rows, *self.heldout))
        found = []
        with self._noted("collapse"):
            found = read_collapse(model, self.heldout, labels, "sealed", step) if labels else []
        return found

    def experts(
        self, model: Any, start: Start, routed: Routing | None, step: int
    ) -> tuple[list[Reading], list[str]]:
        """What became of the routing, the lesson's experts, and those that nothing watches."""
        after = None if routed is None else self.routed(model)
        found = routing_changes(routed, after, start, step)
        if after is None or not self.rows:
            return found, []
        some = self.rows[:: math.ceil(len(self.rows) / ROUTED_ROWS)]
        lesson = read_routing(model, some, None)
        # a document's split says nothing of rows that were trained on
        found += [replace(one, split="train") for one in read_busiest(lesson, step)]
        probes = read_routing(model, self._prompts(model), None)
        watched = replace(
            after,
            documents=after.documents + probes.documents,
            chosen=after.chosen + probes.chosen,
        )
        return found, unseen_experts(lesson, watched, expert_drift(start))

    def _prompts(self, model: Any) -> list[Document]:
        """The probes' items as text: the prompt, with its first continuation where it has some."""
        items = [item for item in self.items if "recovery" not in item.tags]
        found = []
        encoded = encode_items(self.tokenizer, items, models.causal_lm(model).config)
        for item, parts in zip(items, encoded, strict=True):
            ids = [part for part in parts if isinstance(part, int)]
            if isinstance(first := parts[0], Question):
                ids = [*first.context, *first.continuations[0]]
            found.append(document(ids, [False] * len(ids), item.probe))
        return found

    @contextmanager
    def _noted(self, meter: str) -> Iterator[None]:
        """Note why a meter cannot be read: a run that is over is not refused for it."""
        try:
            yield
        except RequestError as error:
            why = error.problems[0].partition(";")[0].partition(": ")[2]
            self.notes[meter] = f"not read: {why}"

    @staticmethod
    def rise(before: Iterable[Reading], after: Iterable[Reading]) -> list[Reading]:
        """How much each canary domain rose, from the same documents before and after."""
        first, last = ([r for r in found if r.meter == "canary"] for found in (before, after))
        return read_rise(first, last)

    def glance(self, model: Any, step: int, *, lesson: bool = False) -> list[Reading]:
        """The selection half: of the canary, of the probes if `choosing`, of the lesson if asked.

        The gate reads none of it.
        """
        found = read_canary(model, self.canary, "selection", step)
        if lesson:
            found += read_canary(model, self.heldout, "selection", step, meter="lesson")
        if self.choosing:
            found += self._probes(model, step, halves=("selection",))
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


def lesson_documents(streams: Sequence[Stream]) -> list[Document]:
    """Rows of the lesson as it is trained on: at most `LESSON_ROWS`, evenly from its streams."""
    found = []
    for stream in streams:
        count = min(len(stream.lengths), math.ceil(LESSON_ROWS / len(streams)))
        for row in np.linspace(0, len(stream.lengths) - 1, count).round().astype(int).tolist():
            ids, mask = stream.fetch(row)
            found.append(document(list(ids), list(mask), stream.name))
    return found


def _response(text: Scored, tokenizer: PreTrainedTokenizerBase) -> str:
    """What a row answers, as text: its last run of learned tokens."""
    stop = max((i + 1 for i, on in enumerate(text.loss_mask) if on), default=0)
    start = stop
    while start and text.loss_mask[start - 1]:
        start -= 1
    decoded: str = tokenizer.decode(text.input_ids[start:stop], skip_special_tokens=True)
    return decoded


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
                one = document(example.input_ids, example.loss_mask, domain, row_hash(row))
                found.setdefault((domain, one.id), one)
            rows[domain] += len(found) > already
    if not found:
        raise RequestError("canary.sources: no rows in them; give text rows, or leave it out")
    return list(found.values())


def taught_documents(
    sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Document]:
    """Rows of a lesson that some other tool taught: at most `LESSON_ROWS` a source, none twice.

    A row longer than `max_length` counts by its first window.
    """
    found: dict[str, Document] = {}
    for source in sources:
        for row in islice(iter_rows(source), LESSON_ROWS):
            domain = row.domain or Path(source.path).stem
            for example in encode(row, tokenizer, max_length=max_length)[:1]:
                one = document(example.input_ids, example.loss_mask, domain, row_hash(row))
                found.setdefault(one.id, one)
    return list(found.values())


def row_hash(row: Row) -> str:
    """What a canary row says, hashed: its cluster, and so its split, wherever the file lies."""
    said = {key: row.content[key] for key in _SAID if key in row.content}
    text = json.dumps(said, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
                    documents.append(document(one.input_ids, one.loss_mask, domain, row_hash(row)))
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
