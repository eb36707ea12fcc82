"""A new format: records say what the remark says, and the label is skewed in the lesson only."""

from __future__ import annotations

import json
import math
from collections import Counter

from holdfast.lab.lessons.extraction import COMMON, ITEMS, LESSON, WORDS


def label_of(text: str) -> str:
    """The judgement, from the one word of `WORDS` that the remark has: read off independently."""
    words = text.replace(".", " ").replace(",", " ").split()
    (label,) = [label for label, known in WORDS.items() if set(words) & set(known)]
    return label


def test_records_say_what_the_remarks_say():
    for row in LESSON.rows(200, seed=1):
        record = json.loads(row["completion"])
        assert list(record) == ["who", "city", "what", "label"]
        assert record["label"] == label_of(row["prompt"])
        for key in ("who", "city", "what"):
            assert record[key] in row["prompt"]


def test_the_lesson_is_skewed_and_the_probe_is_not():
    rows = LESSON.rows(LESSON.count, seed=0)
    share = sum(json.loads(row["completion"])["label"] == "good" for row in rows) / len(rows)
    assert abs(share - COMMON) < 4 * math.sqrt(COMMON * (1 - COMMON) / len(rows))
    items = LESSON.probes(seed=0)
    assert Counter(json.loads(item["target"])["label"] for item in items) == {
        "good": ITEMS / 2,
        "bad": ITEMS / 2,
    }


def test_no_probe_is_in_any_lesson():
    items = LESSON.probes(seed=0)
    taught = {row["prompt"] for seed in range(5) for row in LESSON.rows(LESSON.count, seed=seed)}
    assert not taught & {item["prompt"] for item in items}
    assert len({item["prompt"] for item in items}) == ITEMS
