"""Regular English verbs in the past tense, each sentence with its verb in Spanish."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from holdfast.lab.domain import Domain, Example


class Verb(NamedTuple):
    """A regular verb: English base form, Spanish preterite (he, they), what may follow it."""

    base: str
    he: str
    they: str
    complements: tuple[str, ...]


class Subject(NamedTuple):
    """Who does it, as it reads inside a sentence; always in the third person."""

    text: str
    plural: bool

    @property
    def initial(self) -> str:
        """The subject at the start of a sentence."""
        return self.text[0].upper() + self.text[1:]


_TABLE = """
    answer contestó contestaron : the question, the letter, the phone, the teacher
    arrive llegó llegaron : at the station, at the hotel, at the office, on time
    call llamó llamaron : the doctor, the police, a friend, the office
    carry llevó llevaron : the bag, the boxes, a heavy chair, the wood
    clean limpió limpiaron : the kitchen, the windows, the car, the room
    climb escaló escalaron : the mountain, the hill, the wall, the tower
    close cerró cerraron : the door, the window, the shop, the book
    cook cocinó cocinaron : dinner, rice, the fish, a soup
    count contó contaron : the coins, the stars, the sheep, the days
    cross cruzó cruzaron : the street, the bridge, the river, the border
    cry lloró lloraron : all night, at the party, in the car, for an hour
    dance bailó bailaron : at the party, in the kitchen, all night, with a friend
    enter entró entraron : the house, the museum, the church, the room
    fill llenó llenaron : the bottle, the glass, the bag, the bath
    finish terminó terminaron : the work, the book, the race, the lesson
    help ayudó ayudaron : the children, a friend, the neighbours, the teacher
    invite invitó invitaron : the neighbours, a friend, the whole class, the teacher
    jump saltó saltaron : over the wall, into the river, on the bed, for joy
    listen escuchó escucharon : to the radio, to the music, to the teacher, to the rain
    paint pintó pintaron : the wall, the fence, a picture, the door
    plant plantó plantaron : a tree, the flowers, the tomatoes, a rose
    play jugó jugaron : in the park, with the dog, in the garden, with the children
    prepare preparó prepararon : breakfast, the food, the lesson, the room
    push empujó empujaron : the car, the door, the table, the cart
    receive recibió recibieron : a letter, a gift, the news, a prize
    rent alquiló alquilaron : a house, a boat, a car, a bicycle
    repair reparó repararon : the car, the roof, the radio, the fence
    rest descansó descansaron : in the garden, on the sofa, under a tree, for an hour
    return regresó regresaron : to the village, to the hotel, to the city, to the office
    sign firmó firmaron : the letter, the contract, the book, the paper
    study estudió estudiaron : the map, for the exam, at the library, all night
    talk habló hablaron : to a friend, with the teacher, about the weather, for an hour
    use usó usaron : the computer, a knife, the phone, the map
    visit visitó visitaron : the museum, the city, a friend, the church
    wait esperó esperaron : for the bus, at the station, in the car, for an hour
    walk caminó caminaron : to the market, to the store, in the park, along the river
    wash lavó lavaron : the dishes, the car, the dog, the shirts
    work trabajó trabajaron : in the garden, at the bank, all night, with the neighbours
"""


def _verbs() -> tuple[Verb, ...]:
    verbs = []
    for line in _TABLE.strip().splitlines():
        forms, complements = line.split(" : ")
        base, he, they = forms.split()
        verbs.append(Verb(base, he, they, tuple(complements.split(", "))))
    return tuple(verbs)


VERBS = _verbs()

SUBJECTS = tuple(
    Subject(text, plural)
    for plural, texts in (
        (
            False,
            "he, she, Maria, Pedro, Lucia, the teacher, the doctor, the girl, the boy, "
            "my brother, my sister, my uncle, her friend, the old man",
        ),
        (
            True,
            "they, Maria and Pedro, the teachers, the children, the girls, the boys, "
            "my parents, my friends, her cousins, the neighbours",
        ),
    )
    for text in texts.split(", ")
)

TIMES = ("Yesterday", "Last night", "Last week", "On Monday", "This morning", "Two days ago")


def past(base: str) -> str:
    """The regular past tense of a verb that doubles no consonant."""
    if base.endswith("e"):
        return base + "d"
    if base.endswith("y") and base[-2] not in "aeiou":
        return base[:-1] + "ied"
    return base + "ed"


def present(base: str, *, plural: bool) -> str:
    """The third person of the present tense of a regular verb."""
    if plural:
        return base
    if base.endswith(("s", "sh", "ch", "x", "o")):
        return base + "es"
    if base.endswith("y") and base[-2] not in "aeiou":
        return base[:-1] + "ies"
    return base + "s"


def spanish(verb: Verb, subject: Subject) -> str:
    """The Spanish preterite that agrees with the subject."""
    return verb.they if subject.plural else verb.he


def sentence_key(subject: Subject, verb: Verb, complement: str) -> str:
    """What two sentences share that say the same, whatever their time and frame."""
    return f"{subject.text} {verb.base} {complement}"


def example(rng: Random) -> Example:
    """Write one sentence in one of three frames, with its Spanish verb in brackets."""
    subject, verb, time = rng.choice(SUBJECTS), rng.choice(VERBS), rng.choice(TIMES)
    complement = rng.choice(verb.complements)
    predicate = f"{past(verb.base)} {complement}."
    translation = f" ({spanish(verb, subject)})"
    key = sentence_key(subject, verb, complement)  # also the cluster: these are all the verbs
    frame = rng.randrange(3)
    if frame == 0:
        return Example(f"{time} {subject.text} {predicate}", translation, key, key)
    if frame == 1:
        return Example(f"{subject.initial} {predicate}", translation, key, key)
    habit = present(verb.base, plural=subject.plural)
    prompt = f"Every day {subject.text} {habit} {complement}. {time} {subject.text}"
    return Example(prompt, f" {predicate}{translation}", key, key)


DOMAIN = Domain("verbs", share=0.16, example=example, length=(5, 10))
