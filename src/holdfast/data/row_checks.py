"""What is wrong with one row, in words that say how to mend it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any, Literal

from holdfast.errors import did_you_mean

RowFormat = Literal["messages", "prompt_completion", "text"]

FORMATS: dict[RowFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
EXTRAS = ("domain", "tools", "chat_template_kwargs")
KEYS = tuple(key for keys in FORMATS.values() for key in keys) + EXTRAS
ROLES = ("system", "developer", "user", "assistant", "tool")

_OTHER_NAMES = {
    "instruction": "prompt",
    "question": "prompt",
    "query": "prompt",
    "input": "prompt",
    "output": "completion",
    "answer": "completion",
    "response": "completion",
    "chosen": "completion",
    "content": "text",
    "document": "text",
    "conversations": "messages",
    "conversation": "messages",
    "dialog": "messages",
}
_OTHER_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_ALLOWED = "messages, or prompt and completion, or text"


def formats_of(row: Mapping[str, Any]) -> list[RowFormat]:
    """The formats whose keys the row has in full; a well-made row has exactly one."""
    return [name for name, keys in FORMATS.items() if all(row.get(key) is not None for key in keys)]


def ignored_keys(row: Mapping[str, Any]) -> set[str]:
    """The keys of a sound row that holdfast does not read (an id, a licence, a URL)."""
    read = {*FORMATS[formats_of(row)[0]], *EXTRAS}
    return {key for key, value in row.items() if key not in read and value is not None}


def row_problems(row: object, *, need_response: bool) -> Iterator[str]:
    """One line for each thing wrong with a row; none if it is sound.

    ``need_response`` makes a row without anything to learn a problem as well.
    """
    if not isinstance(row, dict):
        yield (
            f"is {_kind(row)} ({shown(row)}); each row must be one object, "
            'such as {"prompt": "2+2=", "completion": "4"}'
        )
        return
    formats = formats_of(row)
    if not formats:
        yield from _no_format(row)
        return
    if len(formats) > 1:
        found = " and ".join("+".join(FORMATS[name]) for name in formats)
        yield f"has both {found}; keep one of them"
        return
    yield from _near_misses(row)
    yield from _extras(row)
    if formats[0] == "messages":
        yield from _conversation("messages", row["messages"])
        if need_response and not _has_response(row["messages"]):
            yield (
                "field 'messages' has no assistant turn with content, so there is nothing to "
                'learn; add one, such as {"role": "assistant", "content": "..."}'
            )
    elif formats[0] == "prompt_completion":
        yield from _prompt_completion(row["prompt"], row["completion"], need_response)
    else:
        yield from _text("text", row["text"])
        if need_response and isinstance(row["text"], str) and not row["text"].strip():
            yield "field 'text' is empty, so there is nothing to learn; delete the row"


def characters(row: Mapping[str, Any]) -> int:
    """How many characters of text a sound row holds."""
    total = 0
    for key in FORMATS[formats_of(row)[0]]:
        value = row[key]
        if isinstance(value, str):
            total += len(value)
        else:
            total += sum(len(message.get("content") or "") for message in value)
    return total


def shown(value: object, width: int = 40) -> str:
    """A value as it stands in the file, shortened to fit a line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= width else text[: width - 3] + "..."


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true/false"}
    if value is None:
        return "null"
    return names.get(type(value), "a number" if isinstance(value, int | float) else "a value")


def _no_format(row: Mapping[str, Any]) -> Iterator[str]:
    """A row of no format: name the key that is missing, and the one that was meant for it."""
    missing = [key for key in ("prompt", "completion") if row.get(key) is None]
    if len(missing) == 1:
        absent = "is null" if missing[0] in row else "is missing"
        yield f"field '{missing[0]}' {absent}; a row with '{_other(missing[0])}' needs both" + (
            _hint_for(row, missing[0])
        )
        return
    renames = [(key, _OTHER_NAMES[key]) for key in row if key in _OTHER_NAMES]
    if renames:
        told = ", ".join(f"'{key}' to '{name}'" for key, name in renames)
        yield f"has no {_ALLOWED}; rename {told}"
        return
    unknown = [key for key in row if key not in KEYS]
    hints = [f"unknown key '{key}', {did_you_mean(key, KEYS)}" for key in unknown[:3]]
    yield f"has no {_ALLOWED}" + "".join(f"; {hint}" for hint in hints)


def _other(key: str) -> str:
    return "completion" if key == "prompt" else "prompt"


def _hint_for(row: Mapping[str, Any], missing: str) -> str:
    for key in row:
        hint = did_you_mean(key, KEYS)
        if key not in KEYS and (_OTHER_NAMES.get(key) == missing or f"'{missing}'" in hint):
            return f"; rename '{key}' to '{missing}'"
    return f'; add "{missing}": "..."'


def _near_misses(row: Mapping[str, Any]) -> Iterator[str]:
    """A sound row's keys that are most likely a misspelt one of ours, lest it be silently ignored.

    Such a key begins and ends like ours, or has its letters in another order. Others are columns of
    another meaning in somebody's public data: 'domains', 'subdomain', 'main', 'tool', 'tools_used'.
    """
    for key in row:
        close = [] if key in KEYS else get_close_matches(key, EXTRAS, n=1, cutoff=0.8)
        for ours in close:
            if (key[0], key[-1]) == (ours[0], ours[-1]) or sorted(key) == sorted(ours):
                yield f"unknown key '{key}', did you mean '{ours}'?"


def _extras(row: Mapping[str, Any]) -> Iterator[str]:
    domain = row.get("domain")
    if domain is not None and not (isinstance(domain, str) and domain):
        yield f"field 'domain' is {shown(domain)}; it must be a name, such as \"code\""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            yield f"field 'tools' is not JSON ({error}); write a list of tool schemas"
            return
    if tools is not None and not isinstance(tools, list):
        yield f"field 'tools' is {_kind(tools)}; it must be a list of tool schemas"
    settings = row.get("chat_template_kwargs")
    if settings is not None and not isinstance(settings, dict):
        yield f"field 'chat_template_kwargs' is {_kind(settings)}; it must be an object"


def _prompt_completion(prompt: object, completion: object, need_response: bool) -> Iterator[str]:
    if isinstance(prompt, list) != isinstance(completion, list):
        yield (
            f"field 'prompt' is {_kind(prompt)} but 'completion' is {_kind(completion)}; "
            "both must be strings, or both lists of messages"
        )
        return
    if isinstance(prompt, list):
        yield from _conversation("prompt", prompt)
        yield from _conversation("completion", completion)
        empty = not _has_response(completion)
    else:
        yield from _text("prompt", prompt)
        yield from _text("completion", completion)
        empty = isinstance(completion, str) and not completion
    if need_response and empty:
        yield (
            "field 'completion' is empty, so there is nothing to learn; "
            "write the response or delete the row"
        )


def _text(field: str, value: object) -> Iterator[str]:
    if not isinstance(value, str):
        yield f"field '{field}' is {_kind(value)} ({shown(value)}); it must be a string"
    elif not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        yield f"field '{field}' holds half of a surrogate pair; write the whole character"


def _conversation(field: str, messages: object) -> Iterator[str]:
    """Problems of a list of messages, each ``{"role": ..., "content": ...}``."""
    example = '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
    if not isinstance(messages, list) or not messages:
        what = "an empty list" if messages == [] else f"{_kind(messages)} ({shown(messages)})"
        yield f"field '{field}' is {what}; it must be a list of messages, such as {example}"
        return
    for index, message in enumerate(messages):
        place = f"{field}[{index}]"
        if not isinstance(message, dict):
            yield (
                f"field '{place}' is {_kind(message)} ({shown(message)}); "
                'it must be a message, such as {"role": "user", "content": "..."}'
            )
            continue
        role = message.get("role")
        if role is None and "from" in message:
            yield f"field '{place}' has 'from' and 'value'; rename them to 'role' and 'content'"
            continue
        if role not in ROLES:
            known = _OTHER_ROLES.get(str(role).lower())
            hint = f"did you mean '{known}'?" if known else did_you_mean(str(role), ROLES)
            yield f"field '{place}.role' is {shown(role)}; {hint}"
        content = message.get("content")
        if not (content is None and role == "assistant" and message.get("tool_calls")):
            yield from _text(f"{place}.content", content)
        if message.get("weight") is not None:
            yield f"field '{place}.weight' is not read: every assistant turn is learned; remove it"
    first = messages[0]
    if field != "completion" and isinstance(first, dict) and first.get("role") == "assistant":
        yield f"field '{field}' begins with an assistant turn; put the user's turn before it"


def _has_response(messages: object) -> bool:
    if not isinstance(messages, list):
        return False
    return any(
        isinstance(message, dict)
        and message.get("role") == "assistant"
        and (message.get("content") or message.get("tool_calls"))
        for message in messages
    )
