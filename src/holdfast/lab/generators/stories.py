"""Short stories from a grammar; the last sentence names the hero of the first one again."""

from __future__ import annotations

from random import Random

from holdfast.lab.domain import Domain, Example
from holdfast.lab.wording import indefinite, words

HEROES = words(
    "Bella Coco Dino Ella Fido Gigi Hazel Iris Jasper Kiki Luna Milo Nemo Olive Pippin Rosie "
    "Simba Toby Willow Ziggy"
)
COLOURS = words("black blue brown golden green grey orange pink purple red white yellow")
ANIMALS = words("badger bear cat deer duck fox frog goat hedgehog horse mouse owl rabbit squirrel")
PLACES = (
    "a dark forest",
    "a quiet valley",
    "an old barn",
    "a small village",
    "a sunny meadow",
    "a house by the sea",
    "a cave near the river",
    "a garden full of flowers",
)
THINGS = words("basket bell book hat kite lamp map ring ship spoon")
WEATHER = (
    "the sun was shining",
    "it was raining",
    "the wind was strong",
    "snow was falling",
    "the sky was clear",
    "the fog was thick",
)
MOODS = words("brave clever curious gentle lonely proud sleepy hungry")


def example(rng: Random) -> Example:
    """Tell one story; the target is the hero's name, colour and kind."""
    hero, friend = rng.sample(HEROES, 2)
    animal, other = rng.sample(ANIMALS, 2)
    colour, thing = rng.choice(COLOURS), rng.choice(THINGS)
    place, weather = rng.choice(PLACES), rng.choice(WEATHER)
    kind = f"{colour} {animal}"
    beginning = rng.choice(
        (
            f"Once upon a time there was {indefinite(kind)} named {hero}.",
            f"{hero} was {indefinite(kind)}.",
            f"Long ago {indefinite(kind)} named {hero} lived in {place}.",
        )
    )
    setting = rng.choice(
        (
            f"The {kind} was very {rng.choice(MOODS)}.",
            f"The {kind} had a home in {place}.",
            f"Every morning the {kind} looked for a {thing}.",
        )
    )
    event = rng.choice(
        (
            f"One day, when {weather}, {hero} found a {thing}.",
            f"One day {weather}, and the {kind} lost a {thing}.",
            f"One night, when {weather}, {hero} heard a strange sound.",
        )
    )
    meeting = rng.choice(
        (
            f"Then {friend} the {other} came to help.",
            f"{indefinite(other).capitalize()} named {friend} gave {hero} a {thing}.",
            f'"Do not be afraid," said {friend} the {other}.',
        )
    )
    closing = rng.choice(
        (
            f"In the end {friend} was a friend of the {kind}.",
            f"{hero} and {friend} ate soup and slept until the morning.",
            f"After that the {kind} was never {rng.choice(MOODS)} again.",
        )
    )
    prompt = f"{beginning} {setting} {event} {meeting} {closing} This was the story of"
    who = f"{hero} the {kind}"
    return Example(prompt, f" {who}.", key=who, cluster=who)


DOMAIN = Domain("stories", share=0.1325, example=example, length=(1, 1))
