"""Items of our own, for what public sets miss or do not let one check: formats, JSON, tool calls.

They are drawn from short lists by a seed, and a parser decides. They say whether a model still does
as it is told, not how well it writes: no figure of theirs compares with a published benchmark.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

Record = dict[str, Any]

_TOPICS = (
    "the sea", "a small bakery", "rain", "learning to swim", "old maps", "bicycles", "the moon",
    "a village market", "bees", "trains at night", "chess", "bread", "a lighthouse", "winter",
    "gardens", "libraries", "volcanoes", "tea", "bridges", "music lessons", "owls", "mountains",
    "a first job", "rivers", "clocks", "paper", "football", "the desert", "soup", "stars",
)  # fmt: skip
_WORDS = ("light", "water", "time", "people", "small", "never", "green", "home", "early", "road")
_CLOSINGS = ("That is all.", "Thank you for reading.", "The end.", "More tomorrow.", "So it goes.")
_NAMES = ("Ana", "Bo", "Chidi", "Dora", "Emre", "Fatima", "Goran", "Hana", "Ivo", "Jun", "Kofi")
_CITIES = ("Lima", "Oslo", "Nairobi", "Hanoi", "Quito", "Porto", "Riga", "Perth", "Accra", "Turin")
_TRADES = ("baker", "nurse", "pilot", "potter", "teacher", "welder", "farmer", "singer")
_CURRENCIES = ("EUR", "USD", "JPY", "PEN", "NOK", "KES")


def format_record(rng: Random) -> Record:
    """A short text under one condition, such as IFEval's; the condition is checked."""
    count, word = rng.randint(2, 5), rng.choice(_WORDS)
    most, closing = rng.choice((20, 30, 40, 60)), rng.choice(_CLOSINGS)
    asked, check = _drawn(
        rng,
        [
            (f"Use at most {most} words.", {"check": "words", "least": 1, "most": most}),
            (f"Use at least {most} words.", {"check": "words", "least": most}),
            (
                f"Answer with exactly {count} bullet points, each on a line that begins with '- ', "
                "and nothing else.",
                {"check": "bullets", "count": count},
            ),
            ("Use lower case letters only.", {"check": "case", "case": "lower"}),
            ("Use capital letters only.", {"check": "case", "case": "upper"}),
            (
                f"Use the word '{word}' at least {count} times.",
                {"check": "includes", "text": word, "least": count},
            ),
            (
                f"Do not use the word '{word}'.",
                {"check": "includes", "text": word, "least": 0, "most": 0},
            ),
            (f"End with this sentence: {closing}", {"check": "ends", "text": closing}),
        ],
    )
    # an empty answer breaks no rule by what it says, but it is none
    checks = [check] if check["check"] == "words" else [{"check": "words", "least": 1}, check]
    return {"asked": f"Write about {rng.choice(_TOPICS)}. {asked}", "checks": checks}


def _drawn(rng: Random, conditions: list[tuple[str, dict[str, Any]]]) -> tuple[str, dict[str, Any]]:
    return rng.choice(conditions)


def json_record(rng: Random) -> Record:
    """Facts of a sentence as a JSON object of given keys and types; keys and types are checked."""
    name, city, trade = rng.choice(_NAMES), rng.choice(_CITIES), rng.choice(_TRADES)
    age, children = rng.randint(19, 80), rng.randint(0, 5)
    facts = {
        "name": ("string", name),
        "age": ("integer", age),
        "city": ("string", city),
        "trade": ("string", trade),
        "children": ("integer", children),
        "married": ("boolean", rng.random() < 0.5),
    }
    keys = rng.sample(list(facts), rng.randint(2, len(facts)))
    wife = "married" if facts["married"][1] else "not married"
    wanted = ", ".join(f'"{key}" ({facts[key][0]})' for key in keys)
    return {
        "asked": (
            f"{name} is {age}, {wife}, works as a {trade} in {city} and has {children} children. "
            f"Answer with one JSON object with exactly these keys: {wanted}. No other text."
        ),
        "checks": [
            {
                "check": "json",
                "json_schema": {
                    "type": "object",
                    "properties": {key: {"type": facts[key][0]} for key in keys},
                    "required": keys,
                    "additionalProperties": False,
                },
            }
        ],
    }


def tool_record(rng: Random) -> Record:
    """One request and some tools; the one right call, with its arguments, is checked."""
    (city, end), person = rng.sample(_CITIES, 2), rng.choice(_NAMES)
    unit = rng.choice(("celsius", "fahrenheit"))
    source, target = rng.sample(_CURRENCIES, 2)
    amount, minutes = rng.randint(2, 900), rng.randint(2, 90)
    calls: dict[str, tuple[str, dict[str, Any]]] = {
        "get_weather": (
            f"What is the weather in {city}, in {unit}?",
            {"city": city, "unit": unit},
        ),
        "convert_currency": (
            f"How much are {amount} {source} in {target}?",
            {"amount": amount, "source": source, "target": target},
        ),
        "set_timer": (f"Set a timer of {minutes} minutes.", {"minutes": minutes}),
        "call_person": (f"Call {person}, please.", {"name": person}),
        "find_route": (f"How do I get from {city} to {end}?", {"start": city, "end": end}),
    }
    offered = rng.sample(list(calls), 3)
    name = offered[rng.randrange(3)]
    asked, arguments = calls[name]
    tools = [
        {"name": tool, "parameters": {k: _type(v) for k, v in calls[tool][1].items()}}
        for tool in offered
    ]
    return {
        "asked": (
            f"You have these tools:\n{json.dumps(tools)}\nAnswer with one tool call and nothing "
            f'else, as {{"name": ..., "arguments": {{...}}}}.\n{asked}'
        ),
        "checks": [{"check": "tool_call", "name": name, "arguments": arguments}],
    }


def _type(value: Any) -> str:
    return "integer" if isinstance(value, int) else "string"


def generate(make: Callable[[Random], Record], count: int, seed: int) -> list[Record]:
    """So many different records; fewer where the lists hold no more."""
    rng, found = Random(f"probes/{seed}"), dict[str, Record]()
    for _ in range(50 * count):
        record = make(rng)
        found.setdefault(record["asked"], record)
        if len(found) == count:
            break
    return list(found.values())
