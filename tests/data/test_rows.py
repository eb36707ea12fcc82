"""Sources and rows: what is read, and that every problem is named with its mend."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from holdfast.data.rows import RowSummary, Source, check_rows, iter_rows
from holdfast.errors import RequestError

QA = {"prompt": "2+2=", "completion": "4"}
CHAT = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "four"}]}


def write(path: Path, *rows: object) -> Source:
    """One line a row; a string stands as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Source(path=str(path))


def problems(source: Source, **options: Any) -> tuple[str, ...]:
    options.setdefault("need_response", True)
    with pytest.raises(RequestError) as caught:
        check_rows(source, **options)
    return caught.value.problems


def test_a_string_stands_for_a_source() -> None:
    class Recipe(BaseModel):
        data: list[Source]

    recipe = Recipe.model_validate({"data": ["a.jsonl", {"path": "b.jsonl", "proportion": 2}]})
    assert recipe.data == [Source(path="a.jsonl"), Source(path="b.jsonl", proportion=2)]
    options = Recipe.model_json_schema()["$defs"]["Source"]["anyOf"]
    assert [option["type"] for option in options] == ["string", "object"]


@pytest.mark.parametrize(
    "wrong", [{"proportion": 0}, {"proportion": float("inf")}, {"limit": 0}, {"file": "x"}]
)
def test_a_source_with_wrong_settings_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Source.model_validate({"path": "x.jsonl", **wrong})


def test_rows_know_where_they_stand(tmp_path: Path) -> None:
    source = write(tmp_path / "lessons.jsonl", QA, "", {**QA, "domain": "arithmetic"}, CHAT)
    rows = list(iter_rows(source.model_copy(update={"domain": "school"})))
    assert [row.where.removeprefix(str(tmp_path) + "/") for row in rows] == [
        "lessons.jsonl line 1",
        "lessons.jsonl line 3",
        "lessons.jsonl line 4",
    ]
    assert [row.domain for row in rows] == ["school", "arithmetic", "school"]
    assert [row.format for row in rows] == ["prompt_completion", "prompt_completion", "messages"]
    assert rows[0].content == QA


def test_iter_rows_stops_at_the_first_unsound_row(tmp_path: Path) -> None:
    rows = iter_rows(write(tmp_path / "x.jsonl", QA, "{", QA))
    assert next(rows).content == QA
    with pytest.raises(RequestError, match=r"x\.jsonl line 2: is not JSON"):
        next(rows)


def test_summary(tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", {**QA, "domain": "a", "id": 7}, QA, {**QA, "domain": "a"})
    assert check_rows(source, need_response=True) == RowSummary(
        rows=3, format="prompt_completion", domains={"a": 2}, characters=15, ignored=("id",)
    )
    assert check_rows(source, need_response=True, max_rows=2).rows == 2
    limited = source.model_copy(update={"limit": 1})
    assert check_rows(limited, need_response=True, max_rows=2).rows == 1


def test_text_rows_are_task_data_too_but_not_empty_ones(tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", {"text": "Once."}, {"text": " "})
    assert check_rows(source, need_response=False).rows == 2
    (problem,) = problems(source)
    assert "line 2: field 'text' is empty" in problem


TOOL_CALL = [{"type": "function", "function": {"name": "now", "arguments": {}}}]
SOUND: list[dict[str, Any]] = [
    CHAT,
    {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]},
    {
        "messages": [
            {"role": "user", "content": "time?"},
            {"role": "assistant", "content": None, "tool_calls": TOOL_CALL},
            {"role": "tool", "content": "noon"},
            {"role": "assistant", "content": "Noon."},
        ],
        "tools": json.dumps([{"type": "function", "function": {"name": "now"}}]),
    },
    {"prompt": "", "completion": "unconditional"},
    {"text": None, "prompt": "2+2=", "completion": "4"},
    {"prompt": "kept by the hub", **CHAT},
]


@pytest.mark.parametrize("row", SOUND)
def test_sound_rows(tmp_path: Path, row: dict[str, Any]) -> None:
    assert check_rows(write(tmp_path / "x.jsonl", row), need_response=True).rows == 1


@pytest.mark.parametrize(
    "key",
    [
        "subdomain",
        "domain_id",
        "domain_name",
        "domains",
        "main",
        "remain",
        "tool",
        "tools_used",
        "toolkits",
    ],
)
def test_a_column_of_another_meaning_is_not_taken_for_a_misspelt_key(
    tmp_path: Path, key: str
) -> None:
    source = write(tmp_path / "x.jsonl", {**QA, key: "x"})
    assert check_rows(source, need_response=True).ignored == (key,)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("domian", "domain"),
        ("domani", "domain"),
        ("doman", "domain"),
        ("dommain", "domain"),
        ("domein", "domain"),
        ("toosl", "tools"),
        ("tolls", "tools"),
        ("chat_template_args", "chat_template_kwargs"),
    ],
)
def test_a_likely_slip_is_named(tmp_path: Path, key: str, meant: str) -> None:
    (problem,) = problems(write(tmp_path / "x.jsonl", {**QA, key: "x"}))
    assert problem.endswith(f"unknown key '{key}', did you mean '{meant}'?")


def turns(*messages: object) -> dict[str, object]:
    return {"messages": list(messages)}


USER = {"role": "user", "content": "hi"}
HELLO = {"role": "assistant", "content": "hello"}
UNSOUND: list[tuple[object, list[str]]] = [
    ("[1, 2]", ["is a list ([1, 2])", "each row must be one object"]),
    ("{'prompt': 1}", ["is not JSON", "character 2"]),
    ({"prompt": "a", "completion": ""}, ["'completion' is empty", "nothing to learn"]),
    ({"prompt": "a"}, ["'completion' is missing", 'add "completion"']),
    ({"prompt": "a", "completion": None}, ["'completion' is null"]),
    ({"prompt": "a", "completoin": "b"}, ["rename 'completoin' to 'completion'"]),
    ({"prompt": "a", "response": "b"}, ["rename 'response' to 'completion'"]),
    (
        {"instruction": "a", "output": "b"},
        ["rename 'instruction' to 'prompt', 'output' to 'completion'"],
    ),
    ({"txt": "a"}, ["unknown key 'txt', did you mean 'text'?"]),
    ({}, ["has no messages, or prompt and completion, or text"]),
    ({**QA, "text": "b"}, ["has both prompt+completion and text", "keep one"]),
    ({**QA, "domian": "b"}, ["unknown key 'domian', did you mean 'domain'?"]),
    ({**QA, "domain": 3}, ["'domain' is 3", 'such as "code"']),
    ({**QA, "tools": "{"}, ["'tools' is not JSON"]),
    ({**QA, "tools": {}}, ["'tools' is an object", "must be a list"]),
    ({**QA, "chat_template_kwargs": []}, ["'chat_template_kwargs' is a list"]),
    ({"prompt": "a", "completion": 4}, ["'completion' is a number (4)", "must be a string"]),
    ({"prompt": [USER], "completion": "a"}, ["'prompt' is a list but 'completion' is a string"]),
    ({"prompt": [USER], "completion": [USER]}, ["'completion' is empty"]),
    ({"text": "\ud800"}, ["half of a surrogate pair"]),
    ({"messages": "hi"}, ["""'messages' is a string ("hi")""", "must be a list of messages"]),
    ({"messages": []}, ["'messages' is an empty list"]),
    (turns(USER), ["no assistant turn"]),
    (turns(HELLO), ["begins with an assistant turn"]),
    (turns(USER, "hi", HELLO), ["'messages[1]' is a string"]),
    (turns({"role": "usr", "content": "x"}, HELLO), ["'messages[0].role' is \"usr\"", "'user'?"]),
    (turns({"role": "human", "content": "x"}, HELLO), ["did you mean 'user'?"]),
    (turns({"from": "human", "value": "x"}), ["rename them to 'role' and 'content'"]),
    (turns({"role": "user", "content": 3}, HELLO), ["'messages[0].content' is a number (3)"]),
    (turns({"role": "user"}, HELLO), ["'messages[0].content' is null"]),
    (turns(USER, {**HELLO, "weight": 0}), ["'messages[1].weight' is not read"]),
]


@pytest.mark.parametrize(("row", "expected"), UNSOUND)
def test_a_problem_names_file_line_field_and_mend(
    tmp_path: Path, row: object, expected: list[str]
) -> None:
    found = problems(write(tmp_path / "bad.jsonl", row))
    assert found[0].startswith(f"{tmp_path}/bad.jsonl line 1: ")
    for words in expected:
        assert words in found[0]


def test_all_problems_at_once_and_the_rest_counted(tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", QA, *[{"prompt": "a"}] * 5)
    found = problems(source, max_problems=3)
    assert len(found) == 4
    assert found[2].startswith(f"{tmp_path}/x.jsonl line 4: ")
    assert found[3].endswith("and 2 more problems")


def test_mixed_formats_name_the_first_line_of_each(tmp_path: Path) -> None:
    (problem,) = problems(write(tmp_path / "x.jsonl", QA, QA, {"text": "a"}))
    assert f"prompt_completion (first at {tmp_path}/x.jsonl line 1)" in problem
    assert f"text (first at {tmp_path}/x.jsonl line 3)" in problem


def test_an_empty_file(tmp_path: Path) -> None:
    assert "has no rows" in problems(write(tmp_path / "x.jsonl", "", " "))[0]


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "\xe9"}\n')
    (problem,) = problems(Source(path=str(file)))
    assert "x.jsonl line 2: is not UTF-8 (byte 10)" in problem


def test_validation_of_lines_imports_nothing_heavy(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", QA)
    program = (
        "import sys, holdfast.data.chat, holdfast.data.mixture\n"
        "from holdfast.data.rows import Source, check_rows\n"
        f"check_rows(Source(path={str(tmp_path / 'x.jsonl')!r}), need_response=True)\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
