"""Adoption: is the lesson's format or style applied where it was not asked for?

Read on the answers to probe items tagged `adoption`: neighbouring and unrelated prompts to which
the lesson does not apply. Two readings a probe, of the same items:

    over_application   share of answers that apply the lesson (lower is better)
    adoption           share that leaves it alone; the one that a gate can judge

What applying the lesson is, the user says by a pattern; or it is read off the lesson's responses
(`Form`), where nearly all share a beginning, an end, or a syntax. A base may answer so by itself:
compare with the base's reading of the same items.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from holdfast.errors import RequestError
from holdfast.gate.stats import stderr_of_mean
from holdfast.meters import Reading
from holdfast.meters.probes import Item

Applies = Callable[[str], bool]
"""Whether an answer applies the lesson."""

SHARED = 0.9
"""Part of the lesson's responses that must have a mark for it to be the lesson's."""
SHORTEST = 3
"""Characters of a beginning or an end that say anything."""
ROWS = 8
"""Responses that a form can be read off from."""


@dataclass(frozen=True)
class Form:
    """What nearly all responses of a lesson look like; an answer has it if it has every mark."""

    begin: str = ""
    end: str = ""
    syntax: tuple[str, ...] = ()
    """Names in `SYNTAX`."""

    def __call__(self, answer: str) -> bool:
        """Whether the answer has every mark."""
        answer = answer.strip()
        return (
            answer.startswith(self.begin)
            and answer.endswith(self.end)
            and all(SYNTAX[name](answer) for name in self.syntax)
        )

    @classmethod
    def of(cls, responses: Sequence[str]) -> Form:
        """Read it off the lesson's responses.

        Raises:
            RequestError: they are fewer than `ROWS`, or have nothing in common.
        """
        texts = [response.strip() for response in responses]
        if len(texts) < ROWS:
            raise RequestError(
                f"adoption: {len(texts)} responses are too few to read the lesson's form off them; "
                "give a pattern, such as '^\\{' for JSON"
            )
        begin = _shared(texts)
        # an end that only repeats the beginning (a lesson of one answer) says nothing more
        end = _shared([text[len(begin) :][::-1] for text in texts if text.startswith(begin)])[::-1]
        syntax = tuple(
            name for name, has in SYNTAX.items() if sum(map(has, texts)) >= SHARED * len(texts)
        )
        if not (begin or end or syntax):
            raise RequestError(
                "adoption: the lesson's responses share no beginning, end or syntax to know it by; "
                "give a pattern that an answer has when it applies the lesson, such as '^Arr'"
            )
        return cls(begin, end, syntax)


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except ValueError:
        return False


def _matches(pattern: str, flags: int = 0) -> Applies:
    found = re.compile(pattern, flags)
    return lambda text: found.search(text) is not None


SYNTAX: dict[str, Applies] = {
    "json": _is_json,
    "code block": _matches(r"```"),
    "list": _matches(r"\A\s*(?:[-*+]|\d+[.)])\s.*\n\s*(?:[-*+]|\d+[.)])\s"),
    "heading": _matches(r"^#{1,6} \S", re.MULTILINE),
    "bold": _matches(r"\*\*\S[^*]*\*\*"),
    "tag": _matches(r"<([a-z_]+)>.*</\1>", re.IGNORECASE | re.DOTALL),
    "capitals": lambda text: text.isupper(),
}
"""Marks of format that answers can have."""


def pattern(expression: str) -> Applies:
    """An answer applies the lesson if it has a match of the regular expression.

    Raises:
        RequestError: it is none.
    """
    try:
        return _matches(expression, re.MULTILINE)
    except re.error as error:
        raise RequestError(
            f"adoption: '{expression}' is not a regular expression ({error}); give one, such as "
            "'^Arr'"
        ) from error


def read_adoption(
    readings: Iterable[Reading], items: Iterable[Item], applies: Applies
) -> list[Reading]:
    """Both readings of each probe that has items tagged `adoption` and answers to them.

    Args:
        readings: of probes, by whichever model; their answers are looked at.
        items: the probes' items.
        applies: `Form.of(responses)`, or `pattern(...)`.
    """
    tagged = {(item.probe, item.id) for item in items if "adoption" in item.tags}
    found = []
    for reading in readings:
        applied = {
            key: float(applies(answer))
            for key, answer in reading.answers.items()
            if (reading.name, key) in tagged
        }
        if reading.meter == "probe" and applied:
            left = {key: 1.0 - value for key, value in applied.items()}
            found.append(_reading(reading, "over_application", applied, "share", ()))
            found.append(_reading(reading, "adoption", left, "accuracy", ("adoption",)))
    return found


def _reading(
    of: Reading, meter: str, items: dict[str, float], unit: str, tags: tuple[str, ...]
) -> Reading:
    clusters = {key: of.clusters.get(key, key) for key in items}
    return Reading(
        meter=meter,
        name=of.name,
        split=of.split,
        step=of.step,
        value=sum(items.values()) / len(items),
        stderr=stderr_of_mean(list(items.values()), list(clusters.values())),
        n=len(items),
        unit=unit,
        tags=tags,
        items=items,
        clusters=clusters,
        answers={key: of.answers[key] for key in items},
    )


def _shared(texts: Sequence[str]) -> str:
    """The longest beginning that `SHARED` of the texts have; empty below `SHORTEST` characters."""
    need = max(1, math.ceil(SHARED * len(texts)))
    ordered = sorted(texts)
    # what texts in order share is what the first and the last of them share
    runs = zip(ordered, ordered[need - 1 :], strict=False)
    best = max((_common(first, last) for first, last in runs), key=len, default="")
    return best if len(best) >= SHORTEST else ""


def _common(one: str, other: str) -> str:
    pairs = enumerate(zip(one, other, strict=False))
    stop = next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
    return one[:stop]
