"""What a parser can tell of an answer; an answer is right where every check of its item holds."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from holdfast.data.quality.refusals import refuses
from holdfast.section import Section

_FENCE = re.compile(r"\A```(?:json)?\s*\n(.*?)\n?```\s*\Z", re.DOTALL)
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_BULLET = re.compile(r"^\s*(?:[-*\u2022]|\d+[.)])\s+\S", re.MULTILINE)


class Json(Section):
    """The whole answer is JSON, alone or in one fence, and fits a schema."""

    check: Literal["json"]
    json_schema: dict[str, Any] = Field(default_factory=dict)
    """JSON Schema 2020-12; empty: any JSON."""

    @field_validator("json_schema")
    @classmethod
    def _sound(cls, schema: dict[str, Any]) -> dict[str, Any]:
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import SchemaError

        try:
            Draft202012Validator.check_schema(schema)
        except SchemaError as error:
            raise ValueError(f"it is no JSON Schema ({error.message})") from None
        return schema

    def holds(self, answer: str) -> bool:
        """Whether it does."""
        from jsonschema import Draft202012Validator

        try:
            value = parse_json(answer)
        except ValueError:
            return False
        return bool(Draft202012Validator(self.json_schema).is_valid(value))


class ToolCall(Section):
    """The answer is one call, `{"name": ..., "arguments": {...}}`, alone or in <tool_call> tags."""

    check: Literal["tool_call"]
    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    """All of them, with the values that are right."""

    def holds(self, answer: str) -> bool:
        """Whether it does."""
        tagged = _CALL.findall(answer)
        if len(tagged) > 1:
            return False
        try:
            call = parse_json(tagged[0] if tagged else answer)
        except ValueError:
            return False
        return bool(call == {"name": self.name, "arguments": self.arguments})


class Words(Section):
    """So many words, separated by white space."""

    check: Literal["words"]
    least: int = Field(default=0, ge=0)
    """0: no bound."""
    most: int = Field(default=10**9, ge=0)
    """10**9: no bound."""

    def holds(self, answer: str) -> bool:
        """Whether it does."""
        return self.least <= len(answer.split()) <= self.most


class Bullets(Section):
    """Exactly so many lines that begin with a bullet or a number."""

    check: Literal["bullets"]
    count: int = Field(ge=1)
    """Lines."""

    def holds(self, answer: str) -> bool:
        """Whether it does."""
        return len(_BULLET.findall(answer)) == self.count


class Letters(Section):
    """Some letters, and all of them in one case."""

    check: Literal["case"]
    case: Literal["lower", "upper"]
    """Which."""

    def holds(self, answer: str) -> bool:
        """Whether it does."""
        return answer.islower() if self.case == "lower" else answer.isupper()


class Includes(Section):
    """A text occurs so often, letter case aside."""

    check: Literal["includes"]
    text: str = Field(min_length=1)
    """What to look for."""
    least: int = Field(default=1, ge=0)
    """Times."""
    most: int = Field(default=10**9, ge=0)
    """Times; 0 forbids it."""

    def holds(self, answer: str) -> bool:
        """Whether it does."""
        return self.least <= answer.casefold().count(self.text.casefold()) <= self.most


class Ends(Section):
    """The answer ends with a text, but for white space."""

    check: Literal["ends"]
    text: str = Field(min_length=1)
    """What it must end with."""

    def holds(self, answer: str) -> bool:
        """Whether it does."""
        return answer.rstrip().endswith(self.text)


class Refuses(Section):
    """The answer declines, or does not, by the patterns that `holdfast check-data` knows."""

    check: Literal["refuses"]
    expected: bool
    """True: declining is right. False: there is an answer, and it does not decline."""

    def holds(self, answer: str) -> bool:
        """Whether it does."""
        return bool(answer.strip()) and refuses(answer.strip()) is self.expected


Check = Annotated[
    Json | ToolCall | Words | Bullets | Letters | Includes | Ends | Refuses,
    Field(discriminator="check"),
]


def parse_json(answer: str) -> Any:
    """What an answer says as JSON, a fence around it removed; ValueError where it is none."""
    text = answer.strip()
    fenced = _FENCE.match(text)
    try:
        return json.loads(fenced[1] if fenced else text, parse_constant=_no_json)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_json(constant: str) -> Any:
    """NaN and Infinity, which Python reads, are no JSON."""
    raise ValueError(constant)
