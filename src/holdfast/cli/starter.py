"""The recipe that `holdfast init` writes: generated from the schema, so that it cannot drift."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from holdfast.recipe import Recipe

HEAD = """\
## A holdfast recipe: what to teach, and how much may be forgotten.
## `model` and `data` are all that must be given. Everything else stands here with its default,
## commented out: to change a setting, uncomment it and the names of the sections around it.
## Check it with `holdfast validate`, run it with `holdfast train`.
"""
LIVE = {"model.path": "Qwen/Qwen3-0.6B", "data.sources": ["lessons.jsonl"]}
"""The settings that must be given, with values to replace."""
WIDTH = 96


def starter() -> str:
    """The recipe as text; uncommenting every line leaves a valid recipe of the same meaning.

    But for one thing: an adapter whose section is given is asked for, on a small model, too.
    """
    return HEAD + "\n".join(_section(Recipe, Recipe.model_construct(), "")) + "\n"


def _section(section: type[BaseModel], defaults: BaseModel, above: str) -> Iterator[str]:
    """The fields of a section: each one's doc, then `key: default`."""
    for key, field in section.model_fields.items():
        path = above + key
        indent = "  " * above.count(".")
        mark = "" if any(f"{live}.".startswith(f"{path}.") for live in LIVE) else "# "
        if not above:
            yield ""
        yield from _doc(field, mark + indent)
        inner = _inner(field)
        if inner is None:
            yield f"{mark}{indent}{key}: {_shown(LIVE.get(path, getattr(defaults, key, None)))}"
        else:
            yield f"{mark}{indent}{key}:"
            yield from _section(inner, getattr(defaults, key, inner.model_construct()), f"{path}.")


def _inner(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds, if it holds one."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _doc(field: FieldInfo, indent: str) -> list[str]:
    first_paragraph = (field.description or "").split("\n\n")[0]
    prefix = f"{indent}## "
    return textwrap.wrap(first_paragraph, WIDTH, initial_indent=prefix, subsequent_indent=prefix)


def _shown(value: Any) -> str:
    """A value as YAML on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("...\n").strip()
