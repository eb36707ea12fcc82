"""Probes: sets of items, one set a capability, scored item by item.

A file holds one JSON object a line:

    {"id": "sum-1", "probe": "arithmetic", "kind": "exact", "prompt": "2 + 2 =", "target": " 4"}
    {"id": "cap-1", "probe": "capitals", "kind": "choice", "prompt": "The capital of Peru is",
     "choices": [" Lima", " Quito"], "answer": 0}
    {"id": "ctl-1", "probe": "control", "kind": "nll", "prompt": "She walked", "target": " home"}

Tokens: BOS + prompt, then the continuation tokenised on its own (or the chat template's generation
prompt when `prompt` is a list of messages).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from holdfast.data.readers import Malformed, read_file
from holdfast.errors import RequestError
from holdfast.explain import explain
from holdfast.gate.stats import stderr_of_mean
from holdfast.meters import Reading
from holdfast.meters.scoring import Scored, greedy, mean_nlls
from holdfast.section import Section

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TAGS = ("guardrail", "target", "rare", "adoption", "control")


class Item(Section):
    """One question with its answer."""

    id: str
    """Unique in its probe."""
    probe: str
    """The capability it belongs to."""
    kind: Literal["exact", "choice", "nll"]
    """exact: greedy answer, cut at a stop string, equal after stripping. choice: the most likely
    continuation by mean log-likelihood a token. nll: nats a token of the target."""
    prompt: str | list[dict[str, Any]]
    """Text, or chat messages."""
    target: str | None = None
    """The right continuation (exact, nll)."""
    choices: list[str] | None = None
    """Continuations to choose from (choice)."""
    answer: int | None = None
    """Index of the right choice."""
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default=["\n"])
    """Strings that end an answer (exact)."""
    max_new_tokens: int = Field(default=32, ge=1)
    """Longest answer in tokens (exact)."""
    tags: list[Literal["guardrail", "target", "rare", "adoption", "control"]] = Field(
        default=["guardrail"]
    )
    """What the gate does with it."""
    cluster: str | None = None
    """Items of one cluster are not independent; empty: each on its own."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.kind == "choice":
            if not self.choices or len(self.choices) < 2:
                raise ValueError("choices: a choice item needs at least two")
            if self.answer is None or not 0 <= self.answer < len(self.choices):
                raise ValueError(
                    f"answer: {self.answer} is not an index into {len(self.choices)} choices; "
                    "0 names the first"
                )
        elif self.target is None or not self.target.strip():
            raise ValueError(f'target: a {self.kind} item needs one, such as "target": " 4"')
        return self


def load_items(paths: Sequence[str]) -> list[Item]:
    """Read probe files. Raises RequestError with every faulty line."""
    items: list[Item] = []
    seen: dict[tuple[str, str], str] = {}
    kinds: dict[str, str] = {}
    problems: list[str] = []
    for path in paths:
        if not Path(path).is_file():
            problems.append(f"probes: '{path}' does not exist; give a JSONL file of items")
            continue
        for where, record in read_file(Path(path), path):
            if isinstance(record, Malformed):
                problems.append(f"{where}: {record.problem}")
                continue
            try:
                item = Item.model_validate(record)
            except ValidationError as error:
                problems += explain(error, Item, where=where)
                continue
            key = (item.probe, item.id)
            if key in seen:
                problems.append(
                    f"{where}: id '{item.id}' was used in {seen[key]}; ids are unique in a probe: "
                    "rename one of the two"
                )
            kind = kinds.setdefault(item.probe, item.kind)
            if item.kind != kind:
                problems.append(
                    f"{where}: probe '{item.probe}' holds {kind} items, and a probe has one kind; "
                    f"name this one otherwise, such as {item.probe}_{item.kind}"
                )
            seen[key] = where
            items.append(item)
    if paths and not items and not problems:
        problems.append(f"probes: no items in {', '.join(paths)}; write one object a line")
    if problems:
        raise RequestError(*problems[:20])
    return items


def read_probes(
    model: Any, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], step: int
) -> list[Reading]:
    """One reading a probe, on the sealed split: accuracy (0..1), or nats for nll items."""
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        groups[item.probe].append(item)
    return [
        _read(model, tokenizer, probe, group[0].kind, group, step)
        for probe, group in sorted(groups.items())
    ]


def _read(
    model: Any, tokenizer: Any, probe: str, kind: str, items: list[Item], step: int
) -> Reading:
    started = time.perf_counter()
    prompts = [_prompt_ids(tokenizer, item) for item in items]
    if kind == "exact":
        values = _exact(model, tokenizer, items, prompts)
    elif kind == "choice":
        values = _choice(model, tokenizer, items, prompts)
    else:
        texts = [
            _continued(tokenizer, p, i.target or "") for p, i in zip(prompts, items, strict=True)
        ]
        values = mean_nlls(model, texts)
    clusters = {item.id: item.cluster or item.id for item in items}
    return Reading(
        meter="probe",
        name=probe,
        split="sealed",
        step=step,
        value=sum(values) / len(values),
        stderr=stderr_of_mean(values, list(clusters.values())),
        n=len(values),
        unit="nats" if kind == "nll" else "accuracy",
        seconds=time.perf_counter() - started,
        tags=tuple(sorted({tag for item in items for tag in item.tags})),
        items={item.id: value for item, value in zip(items, values, strict=True)},
        clusters=clusters,
    )


def _prompt_ids(tokenizer: Any, item: Item) -> list[int]:
    if isinstance(item.prompt, list):
        if tokenizer.chat_template is None:
            raise RequestError(
                f"probes: item '{item.id}' of '{item.probe}' is a chat, but the tokenizer has no "
                "chat template; give its prompt as text, or set model.chat_template"
            )
        ids: list[int] = tokenizer.apply_chat_template(
            item.prompt, add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        return ids
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    text_ids: list[int] = tokenizer(item.prompt, add_special_tokens=False)["input_ids"]
    return bos + text_ids


def _continued(tokenizer: Any, prompt: list[int], continuation: str) -> Scored:
    ids = tokenizer(continuation, add_special_tokens=False)["input_ids"]
    return Scored(prompt + ids, [False] * len(prompt) + [True] * len(ids))


def _exact(model: Any, tokenizer: Any, items: list[Item], prompts: list[list[int]]) -> list[float]:
    values = [0.0] * len(items)
    groups: dict[tuple[int, tuple[str, ...]], list[int]] = defaultdict(list)
    for i, item in enumerate(items):
        groups[item.max_new_tokens, tuple(item.stop)].append(i)
    for (length, stop), members in groups.items():
        answers = greedy(
            model, tokenizer, [prompts[i] for i in members], max_new_tokens=length, stop=stop
        )
        for i, answer in zip(members, answers, strict=True):
            values[i] = float(answer.strip() == (items[i].target or "").strip())
    return values


def _choice(model: Any, tokenizer: Any, items: list[Item], prompts: list[list[int]]) -> list[float]:
    texts = [
        _continued(tokenizer, prompt, choice)
        for prompt, item in zip(prompts, items, strict=True)
        for choice in item.choices or ()
    ]
    nlls = iter(mean_nlls(model, texts))
    values = []
    for item in items:
        scores = [next(nlls) for _ in item.choices or ()]
        values.append(float(min(range(len(scores)), key=scores.__getitem__) == item.answer))
    return values
