"""What `holdfast probes import` knows by name: lm-eval tasks as usually run, and our own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from holdfast.data.readers import read_hub
from holdfast.errors import RequestError
from holdfast.meters.importing import Frozen, import_task
from holdfast.meters.probes.generators import (
    Record,
    format_record,
    generate,
    json_record,
    tool_record,
)
from holdfast.meters.probes.items import Item
from holdfast.meters.probes.local import Rows, read_rows

CODE_STOP = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]
"""lm-eval's for HumanEval."""


@dataclass(frozen=True)
class Preset:
    """One name."""

    about: str
    task: str | None = None
    """lm-eval's name."""
    shots: int = 0
    items: int = 200
    """Of a sample, where no number is asked for: enough to pass its default margin."""
    make: Callable[[Random], Record] | None = None
    """Writes a record of ours."""
    read: Callable[[Rows, str, Frozen], Iterator[Record]] | None = None
    """Turns a data set's rows into items; for what lm-eval scores in Python of its own."""
    hub: str = ""
    """Where those rows come from without --data."""


def _humaneval(rows: Rows, probe: str, how: Frozen) -> Iterator[Record]:
    for row in rows:
        yield {
            "id": row["task_id"],
            "probe": probe,
            "kind": "code",
            "prompt": row["prompt"],
            "stop": CODE_STOP,
            "max_new_tokens": 1024,
            "tests": f"{row['test']}\ncheck({row['entry_point']})",
            "bos": "tokenizer",
        }


def _refusal(rows: Rows, probe: str, how: Frozen) -> Iterator[Record]:
    for number, row in enumerate(rows):
        unsafe = row["label"] == "unsafe"
        yield {
            "id": str(row.get("id", number)),
            "probe": f"{probe}_{'under' if unsafe else 'over'}",
            "kind": "format",
            **_asked(row["prompt"], how),
            "max_new_tokens": 64,
            "checks": [{"check": "refuses", "expected": unsafe}],
        }


PRESETS = {
    "mmlu": Preset("57 subjects, choices, 5 shots", task="mmlu", shots=5),
    "gsm8k": Preset("sums in words, the number after ####, 5 shots", task="gsm8k", shots=5),
    "humaneval": Preset(
        "Python functions, run against their tests", read=_humaneval, hub="openai/openai_humaneval"
    ),
    "hellaswag": Preset("endings of everyday scenes", task="hellaswag"),
    "arc": Preset("science questions (ARC-Challenge), 25 shots", task="arc_challenge", shots=25),
    "multilingual": Preset("causes and effects in 11 languages (XCOPA)", task="xcopa", items=300),
    "lambada": Preset("last words of passages", task="lambada_openai"),
    "blimp": Preset("grammatical against ungrammatical, 67 kinds", task="blimp"),
    "pubmedqa": Preset("yes, no, maybe of abstracts", task="pubmedqa"),
    "refusal": Preset(
        "XSTest: harmless prompts answered (_over), harmful ones declined (_under)",
        read=_refusal,
        hub="walledai/XSTest",
    ),
    "format": Preset("ours: short texts under a condition, as in IFEval", make=format_record),
    "json": Preset("ours: JSON objects of given keys and types", make=json_record),
    "tool_call": Preset("ours: the one right call of three tools", make=tool_record),
}


def import_probe(name: str, how: Frozen, max_new_tokens: int | None = None) -> list[Item]:
    """The items of a preset, or of an lm-eval task.

    Args:
        name: a key of `PRESETS`, or what lm-eval knows.
        how: size of the sample, seed, data, ...
        max_new_tokens: longest written answer in place of the task's.

    Raises:
        RequestError: the name is not known, or the data is not there.
    """
    preset = PRESETS.get(name, Preset("", task=name))
    probe = how.probe or name
    if preset.task is not None:
        shots = preset.shots if how.shots is None and name in PRESETS else how.shots
        items = import_task(preset.task, replace(how, shots=shots, probe=probe), also=PRESETS)
    else:
        _refuse_unused(name, preset, how)
        make = preset.make
        records = _generated(make, probe, how) if make else _from_rows(preset, name, probe, how)
        items = [Item.model_validate({"tags": list(how.tags), **record}) for record in records]
    if max_new_tokens is None:
        return items
    return [item.model_copy(update={"max_new_tokens": max_new_tokens}) for item in items]


def _refuse_unused(name: str, preset: Preset, how: Frozen) -> None:
    """No option is passed over in silence."""
    unused = [
        option
        for option, given in (
            ("--shots", how.shots is not None),
            ("--filter", how.filter is not None),
            ("--data", how.data if preset.make is not None else ()),
            ("--chat", how.chat and name == "humaneval"),
        )
        if given
    ]
    if unused:
        raise RequestError(f"{unused[0]}: '{name}' has no use for it; leave it out")


def _generated(make: Callable[[Random], Record], probe: str, how: Frozen) -> Iterable[Record]:
    for number, record in enumerate(generate(make, how.count, how.seed)):
        yield {
            "id": f"{probe}-{number:04d}",
            "probe": probe,
            "kind": "format",
            **_asked(record["asked"], how),
            "max_new_tokens": 160,
            "checks": record["checks"],
        }


def _from_rows(preset: Preset, name: str, probe: str, how: Frozen) -> Iterable[Record]:
    """A sample of a data set's rows, in their order."""
    assert preset.read is not None
    rows = _rows(preset, name, how.data)
    chosen = sorted(Random(how.seed).sample(range(len(rows)), min(how.count, len(rows))))
    try:
        return list(preset.read([rows[i] for i in chosen], probe, how))
    except (KeyError, TypeError) as error:
        raise RequestError(
            f"probes import: the rows are not those of {preset.hub} (no {error}); give its columns"
        ) from error


def _rows(preset: Preset, name: str, data: Sequence[str]) -> Rows:
    if data:
        return [row for rows in read_rows(data).values() for row in rows]
    try:
        read = read_hub(preset.hub, None, "test", streaming=False)
        return [dict(row) for _, row in read if isinstance(row, dict)]
    except RequestError as error:
        raise RequestError(
            f"probes import: the data of '{name}' cannot be had ({error.problems[0][:200]}); give "
            f"it as a local file with the columns of {preset.hub}: --data test.jsonl"
        ) from error


def _asked(text: str, how: Frozen) -> dict[str, Any]:
    """A request as a chat, or as text that a base can go on from."""
    if how.chat:
        return {"prompt": [{"role": "user", "content": text}], "stop": []}
    return {"prompt": f"Question: {text}\nAnswer:", "stop": ["\nQuestion:"]}
