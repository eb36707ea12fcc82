"""The format of a probe file: one JSON object a line (docs/probes.md)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator

from holdfast.data.readers import Malformed, read_file
from holdfast.errors import RequestError
from holdfast.explain import explain
from holdfast.files import write_text
from holdfast.meters import HALVES, Split, half_of
from holdfast.meters.probes.checks import Check
from holdfast.section import Section

Kind = Literal["choice", "cloze", "nll", "exact", "number", "format", "code"]
Tag = Literal["guardrail", "target", "rare", "adoption", "control", "recovery"]
TAGS = ("guardrail", "target", "rare", "adoption", "control", "recovery")
GENERATED: tuple[Kind, ...] = ("exact", "number", "format", "code")
"""Kinds whose answer is written by the model."""
SHOWN = 20
"""Faulty lines that are named at once."""


class Extract(Section):
    """Which part of an answer counts, as lm-eval's `regex` filter finds it."""

    pattern: str
    """A regular expression; its first group that matched, or all of it."""
    select: int = 0
    """Which match: 0 the first, -1 the last."""
    fallback: str = "[invalid]"
    """What stands for an answer without a match."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        return _regex(pattern)


class Compare(Section):
    """What is taken off answer and target before they are compared, as lm-eval's `exact_match`."""

    strip: bool = True
    """White space around them."""
    ignore: list[str] = Field(default_factory=list)
    """Regular expressions."""
    ignore_case: bool = False
    """Letter case."""
    ignore_punctuation: bool = False
    """ASCII punctuation."""
    ignore_numbers: bool = False
    """Digits."""

    @field_validator("ignore")
    @classmethod
    def _compile(cls, patterns: list[str]) -> list[str]:
        return [_regex(pattern) for pattern in patterns]


class Item(Section):
    """One question with its answer."""

    id: str
    """Unique in its probe."""
    probe: str
    """The capability it belongs to."""
    kind: Kind
    """choice: the most likely of some continuations. cloze: each token of the target is the
    likeliest. nll: nats a token of the target. exact, number, format, code: what the model writes
    is compared, read as a number, checked, run."""
    prompt: str | list[dict[str, Any]]
    """Text, or chat messages."""
    target: str | list[str] | None = None
    """The right continuation (cloze, nll) or answer (exact, number); of a list, each is right."""
    choices: list[str] | None = None
    """Continuations to choose from (choice)."""
    prompts: list[str] | None = None
    """A prompt for each choice, where they differ, in place of `prompt` (choice)."""
    answer: int | None = None
    """The right choice: its index, or in a file the choice itself."""
    delimiter: str = ""
    """Stands before each choice and does not count in its length (choice)."""
    norm: Literal["tokens", "none", "characters", "bytes"] = "tokens"
    """What a choice's log-likelihood is divided by: lm-eval's acc is none, its acc_norm characters,
    its acc_bytes bytes."""
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default=["\n"])
    """Strings that end a written answer."""
    max_new_tokens: int = Field(default=32, ge=1)
    """Longest written answer in tokens."""
    extract: Extract | Literal["strict", "flexible"] | None = None
    """Which part of the answer counts (exact, number). strict: what follows `####`; flexible: the
    last number, which `number` takes where nothing is said."""
    compare: Compare = Compare()
    """How answer and target are compared (exact)."""
    checks: list[Check] = Field(default_factory=list)
    """What must hold of the answer (format)."""
    tests: str | None = None
    """Python that runs after prompt and answer, and raises where they are wrong (code)."""
    bos: Literal["always", "tokenizer"] = "always"
    """Whether a prompt begins with BOS, where there is one, or as the tokenizer has it, which is
    what lm-eval does."""
    tags: list[Tag] = Field(default=["guardrail"])
    """What the gate does with it. recovery: an example to practise on, never read as a probe."""
    cluster: str | None = None
    """Items of one cluster are not independent; empty: each on its own."""
    _where: str = PrivateAttr("")

    @property
    def where(self) -> str:
        """The file and line it stands on, or its name."""
        return self._where or f"probes: item '{self.id}' of '{self.probe}'"

    @property
    def split(self) -> Split:
        """The half it falls to where probes are used for choosing: a function of its cluster."""
        return half_of(self.cluster or f"{self.probe}/{self.id}")

    @property
    def unit(self) -> str:
        """What a reading of it is in."""
        return "nats" if self.kind == "nll" else "accuracy"

    @property
    def targets(self) -> list[str]:
        """Every right continuation or answer that is written out; none for format and code."""
        if self.choices is not None:
            return [self.choices[self.answer or 0]]
        return [self.target] if isinstance(self.target, str) else list(self.target or ())

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        """An answer given as the choice itself becomes its index."""
        if not isinstance(data, dict) or not isinstance(data.get("answer"), str):
            return data
        choices = data.get("choices")
        if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
            return data
        answer = data["answer"]
        same = [i for i, choice in enumerate(choices) if choice.strip() == answer.strip()]
        if len(same) != 1:
            raise ValueError(
                f"answer: {answer!r} is {'not' if not same else 'more than once'} among the "
                f"choices {', '.join(map(repr, choices))}; give the index of the right one"
            )
        return {**data, "answer": same[0]}

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.kind == "choice":
            self._choice()
        elif self.choices is not None or self.prompts is not None:
            raise ValueError(f"choices: a {self.kind} item has none; kind choice has them")
        if self.kind in ("cloze", "nll") and isinstance(self.target, list):
            raise ValueError(f"target: a {self.kind} item has one; give a string")
        if self.kind in ("cloze", "nll", "exact", "number") and not any(
            target.strip() for target in self.targets
        ):
            raise ValueError(f'target: a {self.kind} item needs one, such as "target": " 4"')
        if self.kind == "number":
            from holdfast.meters.probes.grade import as_number

            strange = next((t for t in self.targets if as_number(t) is None), None)
            if strange is not None:
                raise ValueError(f"target: {strange!r} is no number; give one such as 18")
        if self.kind == "format" and not self.checks:
            raise ValueError('checks: a format item needs one, such as [{"check": "json"}]')
        if self.kind == "code" and not (self.tests or "").strip():
            raise ValueError("tests: a code item needs some, such as assert add(1, 2) == 3")
        return self

    def _choice(self) -> None:
        if not self.choices or len(self.choices) < 2:
            raise ValueError("choices: a choice item needs at least two")
        if self.answer is None or not 0 <= self.answer < len(self.choices):
            raise ValueError(
                f"answer: {self.answer} is not an index into {len(self.choices)} choices; "
                "0 names the first"
            )
        if self.prompts is not None and len(self.prompts) != len(self.choices):
            raise ValueError(
                f"prompts: {len(self.prompts)} for {len(self.choices)} choices; give one for each"
            )
        if any(not self.delimiter + choice for choice in self.choices):
            raise ValueError("choices: one is empty; give each some text")
        if self.norm in ("characters", "bytes") and "" in self.choices:
            raise ValueError(f"choices: one is empty, and norm {self.norm} divides by its length")


def load_items(paths: Sequence[str]) -> list[Item]:
    """Read probe files. Raises RequestError with every faulty line.

    Items of a probe that ask the same under two ids are one cluster, unless they have one each:
    they are not independent, and never on both sides of the split.
    """
    items: list[Item] = []
    seen: dict[tuple[str, str], str] = {}
    kinds: dict[str, str] = {}
    tags: dict[str, list[Tag]] = {}
    twins: dict[tuple[str, str], int] = {}
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
            except ImportError:
                problems.append(
                    f"{where}: a json check needs jsonschema; install it: pip install "
                    "'holdfast[eval]'"
                )
                continue
            item._where = where
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
            if "recovery" not in item.tags and {*item.tags} != {
                *(first := tags.setdefault(item.probe, item.tags))
            }:
                problems.append(
                    f"{where}: probe '{item.probe}' holds items tagged {', '.join(first)}, and a "
                    "probe is judged as one: give this one the same tags, or name its probe "
                    f"otherwise, such as {'_'.join([item.probe, *item.tags])}"
                )
            seen[key] = where
            place = twins.setdefault((item.probe, content(item)), len(items))
            items.append(item)
            if place < len(items) - 1:
                _join(items, place)
    if paths and not items and not problems:
        problems.append(f"probes: no items in {', '.join(paths)}; write one object a line")
    if problems:
        raise RequestError(*problems[:SHOWN])
    return items


def _join(items: list[Item], first: int) -> None:
    """Put the last item and one before it into one cluster, which falls to the half of that one."""
    one, last = items[first], items[-1]
    if last.cluster is None:
        cluster = one.cluster or f"{one.probe}/{one.id}"
        items[first] = one.model_copy(update={"cluster": cluster})
        items[-1] = last.model_copy(update={"cluster": cluster})


def content(item: Item) -> str:
    """A hash of what an item asks and takes for right: not of its name, tags or cluster."""
    asked = item.model_dump(mode="json", exclude={"id", "probe", "tags", "cluster"})
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def require_both_halves(items: Iterable[Item]) -> None:
    """Refuse a probe of which a half would be empty: nobody would watch it, or nobody judge it.

    Raises:
        RequestError: a line for each such probe.
    """
    found: dict[str, set[str]] = {}
    for item in items:
        if "recovery" not in item.tags:
            found.setdefault(item.probe, set()).add(item.split)
    if problems := [
        f"probes: '{probe}' has no item in the {half} split, to which about half of the items go "
        "by their cluster; give more items, such as 200, in several clusters"
        for probe, halves in sorted(found.items())
        for half in HALVES
        if half not in halves
    ]:
        raise RequestError(*problems[:SHOWN])


def write_items(path: Path, items: Iterable[Item]) -> Path:
    """One line an item, without what is as it would be anyway; whole or not there."""
    records = (item.model_dump(mode="json", exclude_defaults=True) for item in items)
    return write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


def _regex(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"it is no regular expression ({error})") from None
    return pattern
