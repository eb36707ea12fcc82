"""The run folder: what is in it, and how it is written so that nothing is ever half there.

recipe.yaml      as resolved, with hashes of model, tokenizer, template and data
mixer.yaml       where one is replayed: the frozen mix; a copy lies beside the artifact
earlier_probes.jsonl  where a stage goes on: what those before it were judged by
data/            tokenized rows and generated text
readings.jsonl   one line a reading: step, meter, name, split, value, stderr, n
alarms.jsonl     one line a check while training: what is held against each guardrail, alarms
items.jsonl      one line an item: its value before and after, and what was answered
checkpoints/     adapters or weights, with optimizer state for resume
base/            where an adapter was trained on a stage merged in memory: what it fits
adapter/|model/  the artifact: plain PEFT or safetensors
verdict.json     the gate's result
report.html      one self-contained page
README.md        model card
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from holdfast.errors import RequestError
from holdfast.files import full_disk_named, write_text
from holdfast.lineage import EARLIER_PROBES, at_home
from holdfast.meters import Reading

__all__ = ["RunFolder", "full_disk_named", "write_text"]

WEIGHTS = "*.safetensors"


class RunFolder:
    """One run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.readings = path / "readings.jsonl"
        self.alarms = path / "alarms.jsonl"
        self.earlier_probes = path / EARLIER_PROBES
        self.before = path / "data" / "before.json"
        self.checkpoints = path / "checkpoints"
        self.data = path / "data"

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        """A new folder. Raises RequestError when there is something in it already."""
        if path.is_file():
            raise RequestError(f"out: '{path}' is a file; give a folder that does not exist yet")
        if path.is_dir() and any(path.iterdir()):
            resumable = (path / "recipe.yaml").is_file()
            hint = "--resume to continue it, or " if resumable else ""
            raise RequestError(f"out: '{path}' is not empty; give {hint}another folder")
        with full_disk_named(path):
            (path / "data").mkdir(parents=True, exist_ok=True)
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """A folder that a run was started in. Raises RequestError when it is not one."""
        if not (path / "recipe.yaml").is_file():
            raise RequestError(
                f"'{path}' is not a run folder (no recipe.yaml in it); give the folder named by "
                "--out when the run was started"
            )
        return cls(path)

    def write_recipe(self, resolved: dict[str, Any]) -> None:
        """Write the resolved recipe with its hashes."""
        write_text(self.recipe, yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))

    def read_recipe(self) -> dict[str, Any]:
        """The resolved recipe. Raises RequestError when no run has written it."""
        try:
            recipe = yaml.safe_load(self.recipe.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            recipe = None
        if not isinstance(recipe, dict) or "resolved" not in recipe:
            raise RequestError(
                f"'{self.recipe}' was not written by a run; give the folder named by --out when "
                "the run was started"
            )
        return at_home(recipe, self.path)

    def append(self, readings: Iterable[Reading]) -> None:
        """Add lines to readings.jsonl; on disk when this returns."""
        _append(self.readings, [r.as_record() for r in readings])

    def append_alarms(self, line: dict[str, Any]) -> None:
        """Add what a check came to; on disk when this returns."""
        _append(self.alarms, [line])

    def records(self) -> list[dict[str, Any]]:
        """All lines of readings.jsonl; a torn last line (power loss) is left out."""
        return _lines(self.readings)

    def alarm_lines(self, step: int | None = None) -> list[dict[str, Any]]:
        """The lines of alarms.jsonl, up to `step` where one is given."""
        return [one for one in _lines(self.alarms) if step is None or one["step"] <= step]

    def rewind_readings(self, step: int) -> None:
        """Drop readings and alarms after `step`, so that a resumed run writes each exactly once."""
        kept = [json.dumps(record) + "\n" for record in self.records() if record["step"] <= step]
        write_text(self.readings, "".join(kept))
        if self.alarms.is_file():
            write_text(self.alarms, "".join(json.dumps(x) + "\n" for x in self.alarm_lines(step)))

    def merge(self, readings: Iterable[Reading]) -> None:
        """Write readings in place of any earlier ones of the same step, meter, name and split."""
        new = {_key(r.as_record()): r.as_record() for r in readings}
        kept = [record for record in self.records() if _key(record) not in new]
        write_text(self.readings, "".join(json.dumps(r) + "\n" for r in [*kept, *new.values()]))

    @contextmanager
    def given_up_if_refused(self) -> Iterator[None]:
        """Take away all that the block wrote, where it ends refused or before it can be resumed."""
        try:
            yield
        except BaseException as error:
            if self.recipe.is_file() and not isinstance(error, RequestError):
                raise
            for part in (self.data, self.checkpoints, self.path / "base"):
                shutil.rmtree(part, ignore_errors=True)
            for file in (self.recipe, self.readings, self.alarms, self.earlier_probes):
                file.unlink(missing_ok=True)
            with suppress(OSError):  # something else lies in it
                self.path.rmdir()
            raise

    def write_items(self, before: Iterable[Reading], after: Iterable[Reading]) -> None:
        """Write `items.jsonl`: each item of each reading, before and after, side by side."""
        first = {(r.meter, r.name, r.split): r for r in before}
        pairs = [(first[key], r) for r in after if (key := (r.meter, r.name, r.split)) in first]
        lines = [
            {
                "meter": x.meter,
                "name": x.name,
                "split": x.split,
                "id": item,
                "cluster": x.clusters.get(item, item),
                "unit": x.unit,
                "before": x.items[item],
                "after": y.items[item],
                **({"answer_before": x.answers.get(item)} if x.answers else {}),
                **({"answer_after": y.answers.get(item)} if y.answers else {}),
            }
            for x, y in pairs
            for item in x.items
            if item in y.items
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text(self.path / "items.jsonl", text)

    def hashes(self) -> dict[str, str]:
        """File -> sha256 of what a verdict rests on: readings, items, the artifact's weights."""
        files = [self.readings, self.path / "items.jsonl"]
        files += [f for name in ("adapter", "model") for f in (self.path / name).glob(WEIGHTS)]
        found = {}
        for file in sorted(file for file in files if file.is_file()):
            with file.open("rb") as stream:
                sha = hashlib.file_digest(stream, "sha256").hexdigest()
            found[file.relative_to(self.path).as_posix()] = sha
        return found

    def write_verdict(self, summary: dict[str, Any], verdict: dict[str, Any]) -> None:
        """Write `verdict.json`, with the hashes of what it rests on; no verdict if no gate ran."""
        text = json.dumps({"summary": summary, **verdict, "sha256": self.hashes()}, indent=2)
        write_text(self.path / "verdict.json", text + "\n")

    def save_before(self, readings: Sequence[Reading]) -> None:
        """Keep the base's readings with their single items, so that resuming reads them again."""
        write_text(self.before, json.dumps([asdict(r) for r in readings]))

    def load_before(self) -> list[Reading] | None:
        """The base's readings, or None when they were not taken yet."""
        if not self.before.is_file():
            return None
        records = json.loads(self.before.read_text(encoding="utf-8"))
        return [Reading(**record | {"tags": tuple(record["tags"])}) for record in records]

    @contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """A temporary folder that takes the place of `name` when the block ends well."""
        target, temporary = self.path / name, self.path / f".{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            with full_disk_named(target):
                temporary.mkdir(parents=True)
                yield temporary
                if target.exists():
                    shutil.rmtree(target)
                os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _append(path: Path, records: Iterable[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in records)
    with full_disk_named(path), path.open("a", encoding="utf-8") as file:
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines; none where there is no such file."""
    records: list[dict[str, Any]] = []
    if not path.is_file():
        return records
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[field] for field in ("step", "meter", "name", "split"))
