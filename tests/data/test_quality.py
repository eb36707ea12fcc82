"""Each check on data that has what it looks for, and on data that has not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.data.quality import (
    Finding,
    Quality,
    Sample,
    base_loss_gap,
    duplicates,
    known_rows,
    leaks,
    look,
    read_lesson,
    truncated,
)
from holdfast.data.quality.duplicates import GRAM, earlier_twins, near_duplicates
from holdfast.data.quality.narrowness import RESAMPLES, distance, jensen_shannon, narrowness
from holdfast.data.quality.refusals import refusals, refuses
from holdfast.data.quality.skew import labels, lengths, openings, scripts
from holdfast.data.rows import Source
from holdfast.data.texts import Text, row_texts
from tiny import jsonl

QUALITY = Quality()
SHARED = Path(__file__).parents[3] / "shared" / "data"


def samples(*responses: str) -> list[Sample]:
    return [Sample(f"row {i}", f"question {i}", response) for i, response in enumerate(responses)]


def only(findings: Sequence[Finding]) -> Finding:
    (finding,) = findings
    assert finding.mend
    return finding


# ---- near-duplicates


def jaccard(one: Sequence[str], other: Sequence[str]) -> float:
    """By definition, over sets of strings."""
    a, b = (
        {" ".join(text[i : i + GRAM]) for i in range(max(1, len(text) - GRAM + 1))}
        for text in (one, other)
    )
    return len(a & b) / len(a | b)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=9), max_size=9),
    st.sampled_from([0.3, 0.55, 0.8, 1.0]),
)
def test_twins_are_those_that_comparing_every_pair_finds(
    texts: list[list[str]], least: float
) -> None:
    firsts: list[int] = []
    repeated: set[int] = set()
    for row, text in enumerate(texts):
        if any(jaccard(text, texts[first]) >= least for first in firsts) or any(
            jaccard(text, texts[other]) == 1 for other in range(row)
        ):
            repeated.add(row)
        else:
            firsts.append(row)
    twins = earlier_twins(texts, least)
    assert set(twins) == repeated
    assert all(other < row for row, other in twins.items())
    assert all(jaccard(texts[row], texts[other]) >= least for row, other in twins.items())


def test_rows_of_a_template_are_not_compared_pair_by_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    real = duplicates._jaccard
    monkeypatch.setattr(duplicates, "_jaccard", lambda *pair: compared.append(pair) or real(*pair))
    template = [f"t{i}" for i in range(38)]
    rows = [[*template, *(f"w{row}_{i}" for i in range(6 + row % 3))] for row in range(200)]
    twin = [*rows[150][:-1], "end"]
    assert earlier_twins([*rows, twin], 0.8) == {200: 150}
    assert len(compared) < 2 * len(rows)


def test_near_duplicates_name_both_rows() -> None:
    long = " ".join(f"word{i}" for i in range(40))
    rows = [Sample(f"row {i}", "", r) for i, r in enumerate([long, "other", f"{long} more", long])]
    found = only(near_duplicates(rows, QUALITY))
    assert found.severity == "warning"
    assert found.rows == ("row 2 (like row 0)", "row 3 (like row 0)")
    assert found.figures["share"] == 0.5
    assert found.figures["exact"] == 1
    assert not near_duplicates(rows[:2], QUALITY)


# ---- skew


def test_templated_openings() -> None:
    plain = [f"answer number {i} is of its own kind" for i in range(8)]
    rows = samples(*plain, "Sure, here is the one.", "sure! Here is the other")
    found = only(openings(rows, QUALITY))
    assert (found.severity, found.rows) == ("warning", ("row 8", "row 9"))
    assert found.figures["share"] == 0.2
    assert "'sure here is the'" in found.what
    assert openings(samples(*plain), QUALITY) == []
    assert openings(samples("yes", "yes"), QUALITY) == []


def test_long_responses_outweigh_the_others() -> None:
    even = samples(*["a b c d"] * 20)
    assert only(lengths(even, QUALITY)).severity == "note"
    skewed = samples(*["a b c d"] * 18, *["a " * 36] * 2)
    found = only(lengths(skewed, QUALITY))
    assert (found.severity, found.rows) == ("warning", ("row 18", "row 19"))
    assert found.figures["share"] == 72 / (72 + 72)
    assert found.figures["median"] == 4


def test_label_skew() -> None:
    found = only(labels(samples(*["Yes"] * 36, *["no."] * 4), QUALITY))
    assert (found.severity, found.figures["share"]) == ("warning", 0.9)
    assert found.rows == ("row 36", "row 37", "row 38", "row 39")
    expected = -(0.9 * math.log2(0.9) + 0.1 * math.log2(0.1))
    assert found.figures["entropy_bits"] == pytest.approx(expected)
    assert only(labels(samples(*["yes", "no"] * 20), QUALITY)).severity == "note"
    assert labels(samples(*(f"answer {i}" for i in range(40))), QUALITY) == []


def test_scripts_name_the_stray_rows() -> None:
    rows = samples(*["plain words"] * 150, "\u4f60\u597d\u4e16\u754c", "123")
    found = only(scripts(rows, QUALITY))
    assert (found.severity, found.rows) == ("note", ("row 150",))
    assert "latin 150, cjk 1" in found.what
    assert scripts(samples("plain", "caf\u00e9", "?"), QUALITY) == []


# ---- refusals


@pytest.mark.parametrize(
    "response",
    [
        "I'm sorry, but I can't help with that.",
        "I\u2019m sorry, I can\u2019t do this.",
        "As an AI language model, I have no opinion.",
        "I cannot provide that.",
        "Lo siento, pero no puedo ayudarte con eso.",
        "Je suis d\u00e9sol\u00e9, mais je ne peux pas.",
        "Es tut mir leid, aber das geht nicht.",
        "\u62b1\u6b49\uff0c\u6211\u4e0d\u80fd\u56de\u7b54\u3002",
    ],
)
def test_refusals_are_recognised(response: str) -> None:
    assert refuses(response)


@pytest.mark.parametrize(
    "response",
    [
        "I am sorry to hear that your dog died.",
        "You cannot provide a negative number to this function.",
        "Say: 'I can help you with that.'",
        "An AI model is a program.",
        "word " * 40 + "I'm sorry, but I can't help with that.",
    ],
)
def test_what_only_sounds_like_a_refusal(response: str) -> None:
    assert not refuses(response)


def test_refusals_share() -> None:
    rows = samples(*["fine"] * 99, "I must decline.")
    assert only(refusals(rows, QUALITY)).severity == "note"
    found = only(refusals(rows[50:], QUALITY))
    assert (found.severity, found.rows) == ("warning", ("row 99",))


# ---- narrowness


@pytest.mark.parametrize(
    ("p", "q", "bits"),
    [
        ([1, 0], [0, 3], 1.0),
        ([2, 2], [5, 5], 0.0),
        # H(3/4, 1/4) - (0 + 1) / 2
        ([1, 0], [1, 1], -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)) - 0.5),
    ],
)
def test_jensen_shannon_by_hand(p: list[int], q: list[int], bits: float) -> None:
    found = jensen_shannon(np.array(p, dtype=float), np.array(q, dtype=float))
    assert found == pytest.approx(bits, abs=1e-9)


def drawn(rng: np.random.Generator, rows: int, low: int, high: int) -> list[list[str]]:
    """Rows of 50 words, each of numbers from `low` up to below `high`."""
    return [[f"w{i}" for i in row] for row in rng.integers(low, high, (rows, 50)).tolist()]


def test_the_same_kind_is_no_further_than_the_halves_and_the_error_is_right() -> None:
    """The standard error against the spread over independent data sets."""
    excesses, errors = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        found = distance(drawn(rng, 40, 0, 100), drawn(rng, 80, 0, 100), rng)
        assert found.words == 2000
        excesses.append(found.lesson - found.floor)
        errors.append(found.stderr)
    spread = float(np.std(excesses, ddof=1))
    assert abs(np.mean(excesses)) < 3 * spread / math.sqrt(12)
    # a spread of 12 values is itself known to within a factor of 1.7 (chi-square, 95 %)
    assert spread / 1.8 < np.mean(errors) < 1.8 * spread
    assert RESAMPLES >= 100


def test_other_words_are_narrow() -> None:
    rng = np.random.default_rng(0)
    canary = [Text(f"c {i}", " ".join(r)) for i, r in enumerate(drawn(rng, 40, 0, 100))]
    narrow = [Sample(f"row {i}", "", " ".join(r)) for i, r in enumerate(drawn(rng, 40, 95, 105))]
    found = only(narrowness(narrow, canary, QUALITY, 0))
    assert found.severity == "warning"
    assert narrowness(narrow, canary, QUALITY, 0) == [found]
    assert "not looked at" in only(narrowness(narrow, canary[:15], QUALITY, 0)).what
    assert "not looked at" in only(narrowness(narrow, [Text("c", "...")] * 16, QUALITY, 0)).what
    assert narrowness([Sample("row", "", "...")], canary, QUALITY, 0) == []


# ---- rows that cannot be used, contamination, and what the base says


def test_unusable_rows_are_named_and_the_others_looked_at(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "completion": ""},
        {"question": "q", "answer": "a"},
        {"prompt": "q", "completion": " \n"},
        {"text": "other format"},
    ]
    file = str(jsonl(tmp_path / "lesson.jsonl", rows))
    sound, seen, findings = read_lesson([Source(path=file)])
    assert [row.where for row in sound] == [s.where for s in seen]
    assert [s.where for s in seen] == [f"{file} line {n}" for n in (1, 4, 5)]
    assert [f.rows for f in findings] == [(f"{file} line 2",), (f"{file} line 3",), (file,)]
    assert {f.severity for f in findings} == {"error"}
    assert findings[1].mend == "rename 'question' to 'prompt', 'answer' to 'completion'"
    blank = look(seen, [], QUALITY, 0)[0]
    assert (blank.severity, blank.rows) == ("warning", (f"{file} line 4",))


def test_leaks_are_errors_and_shared_passages_notes() -> None:
    secret = [Text("canary 1", " ".join(f"w{i}" for i in range(100)))]
    part = " ".join(f"w{i}" for i in range(20)) + " " + " ".join(f"x{i}" for i in range(30))
    rows = [Text("row 1", part), Text("row 2", "nothing"), Text("row 3", secret[0].text)]
    error, note = leaks(rows, secret)
    assert (error.severity, len(error.rows)) == ("error", 1)
    assert error.rows[0].startswith("row 3 (100% in canary 1: 'w0 w1")
    assert (note.severity, note.rows[0][:23]) == ("note", "row 1 (40% in canary 1:")
    assert leaks(rows[1:2], secret) == []
    assert only(leaks(rows, [])).severity == "note"


def test_known_rows() -> None:
    where = [f"row {i}" for i in range(5)]
    found = only(known_rows(where, [0.05, 2.0, 0.0, 0.1, 3.0], QUALITY))
    assert (found.severity, found.rows) == ("warning", ("row 0", "row 2"))
    assert known_rows(where, [1.0] * 5, QUALITY) == known_rows([], [], QUALITY) == []


def test_base_loss_gap() -> None:
    """Means 3 and 1, variances 1 and 4: the error is sqrt(1 / 3 + 4 / 3)."""
    found = only(base_loss_gap([2.0, 3.0, 4.0], [-1.0, 1.0, 3.0], QUALITY))
    assert found.severity == "warning"
    assert found.figures["gap"] == pytest.approx(2.0)
    assert found.figures["stderr"] == pytest.approx(math.sqrt(5 / 3))
    assert only(base_loss_gap([1.0, 2.0], [1.0, 2.0], QUALITY)).severity == "note"
    assert "not looked at" in only(base_loss_gap([1.0, 2.0], [], QUALITY)).what


def test_truncated_rows() -> None:
    assert only(truncated(["row 3"], 10, 64, 0.01)).severity == "warning"
    assert only(truncated(["row 3"], 1000, 64, 0.01)).severity == "note"
    assert truncated([], 10, 64, 0.01) == []


# ---- all together


def test_no_rows_no_findings() -> None:
    assert look([], [], QUALITY, 0) == []


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real data beside the checkout")
@pytest.mark.parametrize("name", ["dolly_1000", "self_instruct_seeds"])
def test_general_instructions_raise_no_warning(name: str) -> None:
    kinds = ("python", "docs", "stories_en", "physics_es", "textbooks", "tinystories")
    canary: list[Text] = []
    for kind in kinds:
        source = Source(path=str(SHARED / f"text/{kind}_heldout.jsonl"), limit=60)
        canary += row_texts([source])
    _, seen, unusable = read_lesson([Source(path=str(SHARED / f"lessons/{name}.jsonl"))])
    assert unusable == []
    assert [f for f in look(seen, canary, QUALITY, 0) if f.severity != "note"] == []


Check = Callable[[Sequence[Sample], Quality], list[Finding]]


@pytest.mark.parametrize("check", [near_duplicates, openings, lengths, labels, scripts, refusals])
@settings(max_examples=15, deadline=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=40))
def test_checks_take_any_text_and_name_rows_that_are_there(
    check: Check, responses: list[str]
) -> None:
    rows = samples(*responses)
    there = {sample.where for sample in rows}
    for finding in check(rows, QUALITY):
        assert {where.split(" (like")[0] for where in finding.rows} <= there
