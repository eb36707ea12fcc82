"""Right and wrong answers: against lm-eval's filter and metric, and by hand for what is ours."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from holdfast.meters.probes.checks import Check
from holdfast.meters.probes.generators import format_record, generate, json_record, tool_record
from holdfast.meters.probes.grade import FLEXIBLE, STRICT, as_number, extracted, is_right, reduced
from holdfast.meters.probes.items import Compare, Extract, Item

answers = st.text(st.sampled_from("ab #-$0123456789.,\nTheansweris"), max_size=40)


@given(answers, st.sampled_from([("strict", STRICT, 0), ("flexible", FLEXIBLE, -1)]))
@settings(max_examples=80, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_extraction_is_lm_evals_regex_filter(answer: str, how: tuple[str, str, int]) -> None:
    extraction = pytest.importorskip("lm_eval.filters.extraction")
    name, pattern, select = how
    ((expected,),) = extraction.RegexFilter(pattern, select).apply([[answer]], [{}])
    assert extracted(answer, name) == expected
    assert extracted(answer, Extract(pattern=pattern, select=select)) == expected


@given(answers, answers, st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_comparison_is_lm_evals_exact_match(
    a: str, b: str, case: bool, punctuation: bool, numbers: bool
) -> None:
    metrics = pytest.importorskip("lm_eval.api.metrics")
    ignore = [",", "\\$", "(?s).*#### ", "\\.$"]
    flags = {"ignore_case": case, "ignore_punctuation": punctuation, "ignore_numbers": numbers}
    for answer in (a, b, b.upper(), f"{b}."):
        expected = metrics.exact_match_hf_evaluate([answer], [b], regexes_to_ignore=ignore, **flags)
        compare = Compare(strip=False, ignore=ignore, **flags)
        same = reduced(answer, compare) == reduced(b, compare)
        assert same == bool(expected["exact_match"])


def number(target: str, **more: Any) -> Item:
    return Item.model_validate(
        {"id": "1", "probe": "p", "kind": "number", "prompt": "?", "target": target} | more
    )


@pytest.mark.parametrize(
    ("answer", "extract", "right"),
    [
        ("so 12 + 6 = 18", None, True),
        ("it is 1,018.00", None, False),
        ("That makes $18.00.", None, True),
        ("18 of 20", None, False),
        ("18 of 20", "flexible", False),
        ("6 * 3\n#### 18", "strict", True),
        ("6 * 3\n#### 18 and 20", "strict", True),
        ("the answer is 18", "strict", False),
        ("#### -18", "strict", False),
        ("none", None, False),
        ("", None, False),
    ],
)
def test_a_number_is_a_value(answer: str, extract: str | None, right: bool) -> None:
    assert is_right(number("9 + 9 = 18\n#### 18", extract=extract), answer) is right
    assert is_right(number("18.0", extract=extract), answer) is right


def test_numbers() -> None:
    assert as_number("1,000") == as_number("$1000.00.") == 1000
    assert [as_number(text) for text in ("", "x", "nan", "inf", "1.2.3")] == [None] * 5


def test_any_of_several_targets_is_right() -> None:
    item = Item(id="1", probe="p", kind="exact", prompt="?", target=["Lima", "lima city"])
    assert [is_right(item, text) for text in (" Lima\n", "lima city", "lima")] == [
        True,
        True,
        False,
    ]


# ---- checks

CALL = '{"name": "f", "arguments": {"a": 1}}'
AGE = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (
            {"check": "json"},
            ['{"a": 1}', "```json\n[1]\n```", "3"],
            ["", "{a: 1}", "[1] ok", "NaN"],
        ),
        (
            {"check": "json", "json_schema": AGE},
            ['{"age": 3}'],
            ['{"age": "3"}', "{}", "[" * 9999],
        ),
        (
            {"check": "tool_call", "name": "f", "arguments": {"a": 1}},
            [CALL, f"<tool_call>\n{CALL}\n</tool_call>"],
            [f"I call {CALL}", CALL.replace("1", "2"), f"<tool_call>{CALL}</tool_call>" * 2, "[]"],
        ),
        ({"check": "words", "least": 2, "most": 3}, ["a b", "a b c\n"], ["a", "a b c d"]),
        ({"check": "bullets", "count": 2}, ["- a\n- b", "1. a\n2) b"], ["- a", "a\nb", "-a\n-b"]),
        ({"check": "case", "case": "lower"}, ["a, b 1"], ["A b", "1"]),
        ({"check": "case", "case": "upper"}, ["A, B"], ["A b"]),
        ({"check": "includes", "text": "sea", "least": 2}, ["Sea, sea"], ["the sea"]),
        ({"check": "includes", "text": "sea", "least": 0, "most": 0}, ["sky"], ["the Sea"]),
        ({"check": "ends", "text": "The end."}, ["So. The end. \n"], ["The end. So"]),
        (
            {"check": "refuses", "expected": True},
            ["I'm sorry, but I can't help with that.", " Lo siento, no puedo ayudar con eso."],
            ["Use kill -9.", ""],
        ),
        (
            {"check": "refuses", "expected": False},
            ["Use kill -9."],
            ["I cannot help with that.", " "],
        ),
    ],
)
def test_checks(check: dict[str, Any], right: list[str], wrong: list[str]) -> None:
    one: Any = TypeAdapter(Check).validate_python(check)
    assert [one.holds(answer) for answer in right] == [True] * len(right)
    assert [one.holds(answer) for answer in wrong] == [False] * len(wrong)


def test_every_check_of_an_item_must_hold() -> None:
    checks = [{"check": "words", "most": 2}, {"check": "case", "case": "lower"}]
    item = Item.model_validate(
        {"id": "1", "probe": "p", "kind": "format", "prompt": "?", "checks": checks}
    )
    assert [is_right(item, text) for text in ("a b", "a B", "a b c")] == [True, False, False]


# ---- generators


@pytest.mark.parametrize("make", [format_record, json_record, tool_record])
def test_generated_items_are_sound_different_and_repeatable(make: Any) -> None:
    records = generate(make, 60, 0)
    assert len({record["asked"] for record in records}) == 60
    assert generate(make, 60, 0) == records != generate(make, 60, 1)
    for record in records:
        checks: list[Any] = TypeAdapter(list[Check]).validate_python(record["checks"])
        assert not all(check.holds("") for check in checks)


def test_a_parser_that_knows_the_request_answers_the_generated_calls() -> None:
    """The arguments are read off the request's words, not off the check."""
    rng = Random(3)
    asked = 0
    for record in (tool_record(rng) for _ in range(200)):
        request = record["asked"].rpartition("\n")[2]
        words = request.rstrip(".?").split()
        if request.startswith("Set a timer"):
            call = {"name": "set_timer", "arguments": {"minutes": int(words[4])}}
        elif request.startswith("How much"):
            amount, source, target = int(words[3]), words[4], words[6]
            values = {"amount": amount, "source": source, "target": target}
            call = {"name": "convert_currency", "arguments": values}
        else:
            continue
        (check,) = TypeAdapter(list[Check]).validate_python(record["checks"])
        assert check.holds(json.dumps(call))
        assert f'"name": "{call["name"]}"' in record["asked"]
        asked += 1
    assert asked > 40
