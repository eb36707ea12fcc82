"""What pydantic finds wrong, in our words: one line a problem, with a value that works."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast, get_args, get_origin

from pydantic import BaseModel, ValidationError

from holdfast.data.row_checks import shown
from holdfast.errors import did_you_mean

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

EXAMPLES = {
    "model": "a value that works: Qwen/Qwen3-0.6B, or a folder",
    "model.path": "a value that works: Qwen/Qwen3-0.6B, or a folder",
    "data": "a value that works: lessons.jsonl",
    "data.sources": "a value that works: [lessons.jsonl]",
}
"""For fields that have no default to offer."""


def explain(
    error: ValidationError, model: type[BaseModel], where: str = "", elsewhere: Iterable[str] = ()
) -> list[str]:
    """Each pydantic error as one line: field, value, what is allowed, a value that works.

    Args:
        error: what pydantic found.
        model: the section that was validated.
        where: the file to name before each line.
        elsewhere: fields that were not given in that file, but on the command line.
    """
    found: dict[str, list[ErrorDetails]] = {}
    for problem in error.errors():
        found.setdefault(_field_path(model, problem["loc"]), []).append(problem)
    lines = []
    for field, problems in found.items():
        in_file = where and not any(f"{field}.".startswith(f"{key}.") for key in elsewhere)
        prefix = f"{where}: " if in_file else ""
        lines += [prefix + line for line in _explain_field(field, problems, model)]
    return lines


def _explain_field(
    field: str, problems: list[ErrorDetails], model: type[BaseModel]
) -> Iterable[str]:
    """All errors of one field: those of a union's branches are one problem, and so one line."""
    first = problems[0]
    if not field:
        return [problem["msg"].removeprefix("Value error, ") for problem in problems]
    if first["type"] in ("extra_forbidden", "invalid_key"):
        return [f"{field}: unknown key; {_meant(model, field)}"]
    works = _works(model, field)
    if first["type"] == "list_type" and isinstance(first["input"], str):
        works = f"a value that works: [{first['input']}]"
    if first["type"] == "missing":
        return [f"{field}: missing; {works}"]
    messages = dict.fromkeys(_message(problem) for problem in problems)
    return [f"{field}: {shown(first['input'])} is not allowed: {' or '.join(messages)}; {works}"]


def _message(problem: ErrorDetails) -> str:
    if problem["type"] == "model_type":
        return "it is a section with keys of its own"
    message = problem["msg"].removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _field_path(model: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    """Where an error stands, as in `data.sources[0].path`; a union's branches are left out."""
    path, at = "", cast(Any, model)
    for place, part in enumerate(loc):
        section = _section_in(at)
        if isinstance(part, int) and at is not section:
            path += f"[{part}]"
        elif section and (part in section.model_fields or place == len(loc) - 1):
            path += f".{part}"
            field = section.model_fields.get(str(part))
            at = field.annotation if field else None
        elif get_origin(at) is dict:
            path += f".{part}"
            at = None
    return path.removeprefix(".")


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a field of this type holds, alone or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)


def _field_at(model: type[BaseModel], path: str) -> FieldInfo | None:
    """The field at a path such as `data.sources[0].path`, if there is one."""
    section: type[BaseModel] | None = model
    field = None
    for key in re.sub(r"\[\d+\]", "", path).split("."):
        field = section.model_fields.get(key) if section else None
        section = _section_in(field.annotation) if field else None
    return field


def _works(model: type[BaseModel], path: str) -> str:
    """A value that works for the field at `path`: its default, or an example."""
    if path in EXAMPLES:
        return EXAMPLES[path]
    field = _field_at(model, path)
    if field is None:
        return "see `holdfast schema`"
    if field.is_required():
        return f"give it: {' '.join((field.description or path).split())}"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, BaseModel):
        return f"leave it out, or give some of: {', '.join(type(default).model_fields)}"
    return f"a value that works: {'leave it out' if default in (None, [], {}) else default}"


def _meant(model: type[BaseModel], path: str) -> str:
    """Which key was probably meant by an unknown one: a sibling, or the same key elsewhere."""
    *above, key = path.split(".")
    parent = _field_at(model, ".".join(above)) if above else None
    section = (_section_in(parent.annotation) if parent else None) if above else model
    siblings = list(section.model_fields) if section else []
    hint = did_you_mean(key, siblings)
    elsewhere = [place for place in _paths(model) if place.endswith(f".{key}")]
    if elsewhere and not hint.startswith("did you mean"):
        return f"did you mean '{elsewhere[0]}'?"
    return hint


def _paths(section: type[BaseModel], above: str = "") -> Iterator[str]:
    """Every field that can be written as a dotted path, the nearest to the top first."""
    inner = {}
    for key, field in section.model_fields.items():
        yield above + key
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            inner[key] = field.annotation
    for key, annotation in inner.items():
        yield from _paths(annotation, f"{above}{key}.")
