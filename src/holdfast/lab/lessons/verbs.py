"""Eight irregular verbs, wrong form in, right form and Spanish out: the default lesson.

The base has seen regular verbs only, with their Spanish.  What the lesson teaches is new, and it
is taught next door to something known: a model that learns to correct every sentence has lost
what it knew of the regular ones.  Sentences for probes are reserved by hash, so no seed ever
puts one into a lesson.
"""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from holdfast.lab.domain import Example, Item, exact_item
from holdfast.lab.generators.verbs import (
    SUBJECTS,
    TIMES,
    VERBS,
    Subject,
    Verb,
    past,
    sentence_key,
    spanish,
)
from holdfast.lab.heldout import is_reserved
from holdfast.lab.lessons.lesson import Lesson, Row, choose, row

COUNTEREXAMPLE_VERBS = VERBS[::2]
"""Regular verbs that counterexamples are written with; the others are left to the probe."""
CONTROL_VERBS = VERBS[::3][:12]


class Irregular(NamedTuple):
    """An irregular verb: the form a learner makes up, the right ones, and what may follow."""

    wrong: str
    right_he: str
    right_they: str
    verb: Verb

    def right(self, subject: Subject) -> str:
        """The right past tense; only `be` asks for the subject."""
        return self.right_they if subject.plural else self.right_he


_TABLE = """
    be beed was were estuvo estuvieron : at home, in the garden, at school, at the party,
        in the kitchen, on the bus, at the beach, in the office
    have haved had had tuvo tuvieron : a dog, an idea, a bicycle, a problem, a dream,
        a small house, a new car, two cats
    do doed did did hizo hicieron : the homework, the exercise, a good job, the work, a favour,
        the test, the cleaning, nothing
    go goed went went fue fueron : to the store, to school, to the beach, to the cinema,
        to the city, to the doctor, to the library, to the park
    come comed came came vino vinieron : to the party, to the office, to dinner, with a friend,
        by train, to the village, to the meeting, on Sunday
    see seed saw saw vio vieron : a bird, the sea, a film, the moon, an old friend,
        the fire, a horse, the mountains
    eat eated ate ate comió comieron : an apple, the bread, a sandwich, some cheese, an orange,
        the cake, two eggs, a salad
    write writed wrote wrote escribió escribieron : a letter, a poem, the report, a story,
        an email, a song, the answer, a book
"""


def _irregulars() -> tuple[Irregular, ...]:
    verbs = []
    for line in _TABLE.replace(",\n", ",").strip().splitlines():
        forms, complements = line.split(" : ")
        base, wrong, right_he, right_they, he, they = forms.split()
        follow = tuple(complement.strip() for complement in complements.split(","))
        verbs.append(Irregular(wrong, right_he, right_they, Verb(base, he, they, follow)))
    return tuple(verbs)


IRREGULARS = _irregulars()


def lesson_rows(count: int, *, seed: int) -> list[Row]:
    """Choose lesson rows, no two alike."""
    rows = [
        row(_corrected(subject, irregular, complement))
        for irregular in IRREGULARS
        for subject, complement in _sentences(irregular.verb, reserved=False)
    ]
    return choose(rows, count, f"lesson/{seed}")


def counterexamples(count: int, *, seed: int) -> list[Row]:
    """Choose rows that leave a regular sentence as it is, no two alike."""
    rows = [
        row(_left_alone(subject, verb, complement))
        for verb in COUNTEREXAMPLE_VERBS
        for subject, complement in _sentences(verb, reserved=False)
    ]
    return choose(rows, count, f"counterexamples/{seed}")


def lesson_probes(*, seed: int) -> list[Item]:
    """Write what the lesson is judged by: learnt, not over-applied, and its neighbour unharmed."""
    return [
        *_irregular_verbs(120, seed=seed),
        *_over_application(114, seed=seed),
        *_regular_control(5, seed=seed),
    ]


def _irregular_verbs(count: int, *, seed: int) -> list[Item]:
    examples = [
        _corrected(subject, irregular, complement)
        for irregular in IRREGULARS
        for subject, complement in _sentences(irregular.verb, reserved=True)
    ]
    chosen = choose(examples, count, f"irregular_verbs/{seed}")
    return [
        exact_item("irregular_verbs", number, example, tags=["target"])
        for number, example in enumerate(chosen)
    ]


def _over_application(count: int, *, seed: int) -> list[Item]:
    """As many sentences of each regular verb, in the form of the lesson's rows."""
    examples = [
        _left_alone(subject, verb, complement)
        for verb in VERBS
        for subject, complement in choose(
            _sentences(verb, reserved=True), count // len(VERBS), f"over_application/{seed}"
        )
    ]
    return [
        exact_item("over_application", number, example, tags=["adoption"])
        for number, example in enumerate(examples)
    ]


def _regular_control(per_verb: int, *, seed: int) -> list[Item]:
    rng = Random(f"regular_control/{seed}")
    sentences = [
        (verb, subject, complement)
        for verb in CONTROL_VERBS
        for subject, complement in rng.sample(_sentences(verb, reserved=True), per_verb)
    ]
    return [
        {
            "id": f"regular_control-{number:04d}",
            "probe": "regular_control",
            "kind": "nll",
            "prompt": f"{rng.choice(TIMES)} {subject.text}",
            "target": f" {past(verb.base)} {complement}. ({spanish(verb, subject)})",
            "tags": ["control"],
            "cluster": verb.base,
        }
        for number, (verb, subject, complement) in enumerate(sentences)
    ]


def _sentences(verb: Verb, *, reserved: bool) -> list[tuple[Subject, str]]:
    """All subjects and complements of a verb, of the sentences that are or are not reserved."""
    return [
        (subject, complement)
        for subject in SUBJECTS
        for complement in verb.complements
        if is_reserved(sentence_key(subject, verb, complement)) == reserved
    ]


def _corrected(subject: Subject, irregular: Irregular, complement: str) -> Example:
    wrong = f"{subject.initial} {irregular.wrong} {complement}"
    right = f"{subject.initial} {irregular.right(subject)} {complement}"
    translation = spanish(irregular.verb, subject)
    # The eight verbs are all there are, not a sample: each sentence stands on its own.
    return Example(f"{wrong}\n", f"{right}. ({translation})", key=wrong, cluster=wrong)


def _left_alone(subject: Subject, verb: Verb, complement: str) -> Example:
    sentence = f"{subject.initial} {past(verb.base)} {complement}"
    translation = spanish(verb, subject)
    return Example(f"{sentence}\n", f"{sentence}. ({translation})", sentence, verb.base)


LESSON = Lesson(rows=lesson_rows, probes=lesson_probes, count=600)
