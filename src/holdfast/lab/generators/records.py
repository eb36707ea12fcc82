"""A sentence about a person, then the same facts as a JSON record."""

from __future__ import annotations

import json
from random import Random

from holdfast.lab.domain import Domain, Example
from holdfast.lab.wording import indefinite, words

NAMES = words(
    "Anna Bruno Clara Daniel Elena Felix Greta Hugo Irene Jonas Karen Leo Marta Nina Oscar Paula "
    "Ruben Sara Tomas Vera"
)
CITIES = words(
    "Bristol Chicago Denver Dresden Florence Geneva Hamburg Kyoto Lyon Milan Naples Osaka Porto "
    "Seville Toronto Turin"
)
JOBS = words(
    "baker dentist driver engineer farmer gardener lawyer musician nurse painter pilot singer"
)


def example(rng: Random) -> Example:
    """Write one sentence in one of several orders, and its record with the fields in one order."""
    name, age, city, job = (
        rng.choice(NAMES),
        rng.randint(18, 89),
        rng.choice(CITIES),
        rng.choice(JOBS),
    )
    sentence, record = rng.choice(
        (
            (
                f"{name} is {age} years old and lives in {city}.",
                {"name": name, "age": age, "city": city},
            ),
            (
                f"In {city} lives {name}, who is {age} years old.",
                {"name": name, "age": age, "city": city},
            ),
            (
                f"{name} works as {indefinite(job)} in {city}.",
                {"name": name, "job": job, "city": city},
            ),
            (
                f"Our {job} is called {name} and is {age} years old.",
                {"name": name, "age": age, "job": job},
            ),
        )
    )
    values = "/".join(str(value) for value in record.values())
    return Example(f"{sentence}\n", json.dumps(record), key=values, cluster=values)


DOMAIN = Domain("records", share=0.14, example=example, length=(2, 4))
