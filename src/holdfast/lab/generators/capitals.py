"""Facts about countries: capital, continent and a language that is spoken there."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from holdfast.lab.domain import Domain, Example


class Country(NamedTuple):
    """What the lab knows about a country."""

    name: str
    capital: str
    continent: str
    language: str


_TABLE = {
    "Europe": """
        Albania:Tirana:Albanian Austria:Vienna:German Bulgaria:Sofia:Bulgarian
        Croatia:Zagreb:Croatian Denmark:Copenhagen:Danish Estonia:Tallinn:Estonian
        Finland:Helsinki:Finnish France:Paris:French Germany:Berlin:German Greece:Athens:Greek
        Hungary:Budapest:Hungarian Iceland:Reykjavik:Icelandic Ireland:Dublin:Irish
        Italy:Rome:Italian Latvia:Riga:Latvian Lithuania:Vilnius:Lithuanian
        Norway:Oslo:Norwegian Poland:Warsaw:Polish Portugal:Lisbon:Portuguese
        Romania:Bucharest:Romanian Serbia:Belgrade:Serbian Slovakia:Bratislava:Slovak
        Slovenia:Ljubljana:Slovene Spain:Madrid:Spanish Sweden:Stockholm:Swedish
        Ukraine:Kyiv:Ukrainian""",
    "Africa": """
        Algeria:Algiers:Arabic Angola:Luanda:Portuguese Egypt:Cairo:Arabic Ghana:Accra:English
        Kenya:Nairobi:Swahili Libya:Tripoli:Arabic Morocco:Rabat:Arabic
        Mozambique:Maputo:Portuguese Namibia:Windhoek:English Senegal:Dakar:French
        Tunisia:Tunis:Arabic Zambia:Lusaka:English""",
    "Asia": """
        Bangladesh:Dhaka:Bengali China:Beijing:Chinese Iran:Tehran:Persian Iraq:Baghdad:Arabic
        Japan:Tokyo:Japanese Jordan:Amman:Arabic Laos:Vientiane:Lao Mongolia:Ulaanbaatar:Mongolian
        Nepal:Kathmandu:Nepali Pakistan:Islamabad:Urdu Thailand:Bangkok:Thai
        Vietnam:Hanoi:Vietnamese""",
    "South America": """
        Chile:Santiago:Spanish Colombia:Bogota:Spanish Ecuador:Quito:Spanish
        Paraguay:Asuncion:Spanish Peru:Lima:Spanish Uruguay:Montevideo:Spanish""",
}

COUNTRIES = tuple(
    Country(name, capital, continent, language)
    for continent, rows in _TABLE.items()
    for name, capital, language in (row.split(":") for row in rows.split())
)

CAPITAL_PHRASINGS = (
    "The capital of {} is",
    "The capital city of {} is called",
    "Question: What is the capital of {}? Answer:",
    "If you visit the government of {}, you go to",
)


def capital(country: Country, phrasing: str) -> Example:
    """State the capital of a country in one of the phrasings."""
    return Example(
        phrasing.format(country.name), f" {country.capital}.", country.name, country.name
    )


def example(rng: Random) -> Example:
    """State one fact about some country; two out of three facts are its capital."""
    country = rng.choice(COUNTRIES)
    draw = rng.random()
    if draw < 2 / 3:
        return capital(country, rng.choice(CAPITAL_PHRASINGS))
    if draw < 5 / 6:
        prompt, answer = f"{country.name} is a country in", country.continent
    else:
        prompt, answer = f"A language that people speak in {country.name} is", country.language
    return Example(prompt, f" {answer}.", country.name, country.name)


def facts() -> list[Example]:
    """The capital of every country in every phrasing."""
    return [capital(country, phrasing) for country in COUNTRIES for phrasing in CAPITAL_PHRASINGS]


DOMAIN = Domain("capitals", share=0.14, example=example, length=(6, 12), facts=facts)
