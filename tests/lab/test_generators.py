"""Everything the corpus states is true."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from holdfast.lab.generators import DOMAINS
from holdfast.lab.generators.capitals import COUNTRIES
from holdfast.lab.generators.numbers import hungarian
from holdfast.lab.generators.verbs import VERBS, past, present
from holdfast.lab.wording import words


def lines(name: str) -> list[str]:
    return [line for seed in range(60) for line in DOMAINS[name].document(Random(seed)).split("\n")]


def test_arithmetic_is_right():
    for line in lines("arithmetic"):
        match = re.fullmatch(r"(\d\d) ([+-]) (\d\d) = (\d+)", line)
        assert match, line
        first, sign, second, result = match.groups()
        expected = int(first) + int(second) if sign == "+" else int(first) - int(second)
        assert int(result) == expected >= 0


KNOWN_CAPITALS = {
    "Albania": "Tirana", "Angola": "Luanda", "Austria": "Vienna", "Bulgaria": "Sofia",
    "Chile": "Santiago", "China": "Beijing", "Denmark": "Copenhagen", "Ecuador": "Quito",
    "Egypt": "Cairo", "Finland": "Helsinki", "France": "Paris", "Ghana": "Accra",
    "Hungary": "Budapest", "Iran": "Tehran", "Japan": "Tokyo", "Kenya": "Nairobi",
    "Latvia": "Riga", "Mongolia": "Ulaanbaatar", "Norway": "Oslo", "Peru": "Lima",
    "Poland": "Warsaw", "Senegal": "Dakar", "Spain": "Madrid", "Vietnam": "Hanoi",
}  # fmt: skip


def test_capitals_are_right():
    capitals = {country.name: country.capital for country in COUNTRIES}
    assert KNOWN_CAPITALS.items() <= capitals.items()
    assert len(set(capitals.values())) == len(capitals) == len(COUNTRIES) >= 50


def test_no_fact_contradicts_another():
    answers: dict[str, str] = {}
    for line in lines("capitals"):
        prompt, answer = re.fullmatch(r"(.*(?: is| in| called|:| to)) (.+)\.", line).groups()
        assert answers.setdefault(prompt, answer) == answer


KNOWN_NUMBERS = {
    1: "egy", 2: "kettő", 3: "három", 4: "négy", 5: "öt", 6: "hat", 7: "hét", 8: "nyolc",
    9: "kilenc", 10: "tíz", 11: "tizenegy", 12: "tizenkettő", 19: "tizenkilenc", 20: "húsz",
    21: "huszonegy", 25: "huszonöt", 30: "harminc", 33: "harminchárom", 37: "harminchét",
    40: "negyven", 48: "negyvennyolc", 50: "ötven", 56: "ötvenhat", 60: "hatvan",
    64: "hatvannégy", 70: "hetven", 72: "hetvenkettő", 80: "nyolcvan", 89: "nyolcvankilenc",
    90: "kilencven", 99: "kilencvenkilenc",
}  # fmt: skip


def test_hungarian_numbers_are_right():
    assert {number: hungarian(number) for number in KNOWN_NUMBERS} == KNOWN_NUMBERS
    assert len({hungarian(number) for number in range(1, 100)}) == 99
    for line in lines("hungarian"):
        number, word = line.split(" = ")
        assert word == hungarian(int(number))
    for number in (0, 100):
        with pytest.raises(ValueError, match=str(number)):
            hungarian(number)


KNOWN_SPANISH = {
    "walk": "caminó caminaron", "talk": "habló hablaron", "work": "trabajó trabajaron",
    "play": "jugó jugaron", "dance": "bailó bailaron", "cook": "cocinó cocinaron",
    "clean": "limpió limpiaron", "wash": "lavó lavaron", "call": "llamó llamaron",
    "close": "cerró cerraron", "help": "ayudó ayudaron", "listen": "escuchó escucharon",
    "visit": "visitó visitaron", "rent": "alquiló alquilaron", "jump": "saltó saltaron",
    "paint": "pintó pintaron", "study": "estudió estudiaron", "cry": "lloró lloraron",
    "wait": "esperó esperaron", "arrive": "llegó llegaron", "enter": "entró entraron",
    "receive": "recibió recibieron", "cross": "cruzó cruzaron", "use": "usó usaron",
}  # fmt: skip


def test_spanish_is_right():
    table = {verb.base: f"{verb.he} {verb.they}" for verb in VERBS}
    assert KNOWN_SPANISH.items() <= table.items()
    for verb in VERBS:
        stem = verb.he.removesuffix("ió") if verb.they.endswith("ieron") else verb.he[:-1]
        ending = "ieron" if verb.they.endswith("ieron") else "aron"
        assert verb.he.endswith("ó")
        assert verb.they == stem + ending


def test_english_verbs_are_inflected_by_the_rules():
    assert [past(base) for base in ("walk", "cry", "play", "use")] == [
        "walked", "cried", "played", "used"
    ]  # fmt: skip
    singular = [present(base, plural=False) for base in ("walk", "cry", "play", "wash")]
    assert singular == ["walks", "cries", "plays", "washes"]
    assert present("wash", plural=True) == "wash"


def test_sentences_agree_with_their_translation():
    singular = {past(verb.base): verb.he for verb in VERBS}
    plural = {past(verb.base): verb.they for verb in VERBS}
    for line in lines("verbs"):
        sentence, translation = re.fullmatch(r"(.*)\. \((\w+)\)", line).groups()
        word = next(w for w in reversed(sentence.split()) if w in singular)
        subject = sentence[: sentence.rindex(f" {word} ")].lower()
        many = re.search(r"(they|and pedro|teachers|children|girls|boys|parents|friends|cousins|"
                         r"neighbours)$", subject)  # fmt: skip
        assert translation == (plural if many else singular)[word], line


LESSON_WORDS = words(
    "be is are was were been have has had do does did done go goes went gone come comes came "
    "see sees saw seen eat eats ate eaten write writes wrote written "
    "estuvo estuvieron tuvo tuvieron hizo hicieron fue fueron vino vinieron vio vieron "
    "comió comieron escribió escribieron"
)


def test_the_lesson_is_not_given_away():
    assert not set(LESSON_WORDS) & set(re.findall(r"\w+", " ".join(lines("verbs")).lower()))


MEANINGS: dict[str, Callable[..., Any]] = {
    r"(\w+) plus (\d+)": lambda a, c: a + c,
    r"(\w+) minus (\d+)": lambda a, c: a - c,
    r"(\w+) times (\d+)": lambda a, c: a * c,
    r"whether (\w+) is greater than (\d+)": lambda a, c: a > c,
    r"whether (\w+) is less than (\d+)": lambda a, c: a < c,
    r"whether (\w+) is a multiple of (\d+)": lambda a, c: divmod(a, c)[1] == 0,
    r"the larger of (\w+) and (\w+)": lambda a, c: sorted([a, c])[1],
    r"the smaller of (\w+) and (\w+)": lambda a, c: sorted([a, c])[0],
    r"the sum of (\w+) and (\w+)": lambda a, b: sum([a, b]),
    r"(\w+) minus ([a-z]+)": lambda a, b: a - b,
    r"the product of (\w+) and (\w+)": lambda a, b: a * b,
    r"whether (\w+) is equal to (\w+)": lambda a, b: a == b,
    r"the first (\d+) of (\w+)": lambda c, a: [x for i, x in enumerate(a) if i < c],
    r"(\w+) without the first (\d+)": lambda a, c: [x for i, x in enumerate(a) if i >= c],
    r"how many of (\w+) are greater than (\d+)": lambda a, c: len([x for x in a if x > c]),
    r"all of (\w+) plus (\d+)": lambda a, c: [c + x for x in a],
    r"all of (\w+) times (\d+)": lambda a, c: [c * x for x in a],
    r"whether (\w+) has more than (\d+) elements": lambda a, c: not len(a) <= c,
    r"(\w+) repeated (\d+) times": lambda a, c: "".join([a] * c),
    r"the first (\d+) letters of (\w+)": lambda c, a: "".join(list(a)[:c]),
    r"whether (\w+) has more than (\d+) letters": lambda a, c: not len(a) <= c,
    r"the first (\d+) letters of (\w+) in upper case": lambda c, a: "".join(list(a.upper())[:c]),
}
LISTS = {"items", "values", "numbers", "scores", "prices", "rows", "records", "points"}
TEXTS = {"text", "name", "word", "line", "title", "label", "message", "phrase"}


def argument(name: str, rng: Random) -> Any:
    if name in LISTS:
        return [rng.randint(0, 120) for _ in range(rng.randint(0, 120))]
    if name in TEXTS:
        return "".join(rng.choice("abcxyz") for _ in range(rng.randint(0, 120)))
    return rng.randint(0, 120)


@pytest.mark.parametrize("seed", range(40))
def test_functions_do_what_they_say(seed: int):
    rng = Random(seed)
    space: dict[str, Any] = {}
    exec(compile(DOMAINS["functions"].document(rng), "document", "exec"), space)
    functions = [thing for thing in space.values() if inspect.isfunction(thing)]
    assert functions
    for function in functions:
        says = function.__doc__.removeprefix("Return ").removesuffix(".")
        fits = (re.fullmatch(pattern, says) for pattern in MEANINGS)
        match, meaning = next((m, f) for m, f in zip(fits, MEANINGS.values(), strict=True) if m)
        for _ in range(5):
            given = {name: argument(name, rng) for name in inspect.signature(function).parameters}
            read = [given[word] if word in given else int(word) for word in match.groups()]
            assert function(**given) == meaning(*read), says


def test_records_say_what_the_sentence_says():
    text = lines("records")
    for sentence, line in zip(text[::2], text[1::2], strict=True):
        record = json.loads(line)
        assert len(record) == 3
        for value in record.values():
            assert re.search(rf"\b{value}\b", sentence)


def test_stories_end_with_their_hero():
    for seed in range(60):
        story = DOMAINS["stories"].document(Random(seed))
        hero, colour, animal = re.search(r"story of (\w+) the (\w+) (\w+)\.$", story).groups()
        first = story.split(".")[0]
        assert {hero, colour, animal} <= set(first.split())


@pytest.mark.parametrize("name", ["stories", "records"])
def test_articles_fit(name: str):
    text = " ".join(lines(name))
    assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", text)
