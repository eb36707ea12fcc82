"""Rows that are also in what is measured: found, and nothing else."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.data.contamination import (
    BOILERPLATE,
    NAMED,
    N,
    Overlap,
    overlaps,
    refuse_contaminated,
)
from holdfast.data.rows import Source
from holdfast.data.texts import Text, row_texts
from holdfast.errors import RequestError
from holdfast.meters.canary import Canary
from holdfast.meters.secret import secret_texts

SHARED = Path(__file__).parents[3] / "shared" / "data"


def numbered(start: int, count: int) -> str:
    """So many words that come nowhere else."""
    return " ".join(f"w{i}" for i in range(start, start + count))


def texts(*contents: str, name: str = "row") -> list[Text]:
    return [Text(f"{name} {i}", content) for i, content in enumerate(contents)]


def contaminated(row: str, secret: str) -> bool:
    return any(o.contaminated for o in overlaps([Text("row", row)], [Text("secret", secret)]))


LONG = numbered(0, 40)


@pytest.mark.parametrize(
    ("row", "secret", "expected"),
    [
        (LONG, LONG.upper().replace(" ", ",  "), True),
        (f"{numbered(100, 500)} {LONG} {numbered(700, 500)}", LONG, True),
        (numbered(10, 13), LONG, True),
        (numbered(10, 12), LONG, False),
        (f"{numbered(0, 32)} {numbered(100, 9)}", LONG, True),
        (f"{numbered(0, 31)} {numbered(100, 9)}", LONG, False),
        (f"{numbered(0, 23)} x y z", f"{numbered(0, 23)} u v w", True),
        (f"{numbered(0, 22)} x y z", f"{numbered(0, 22)} u v w", False),
        ("2 + 2 =  4", "2 + 2 = 4.", True),
        ("2 * 2 = 4", "2 + 2 = 4", False),
        ("I know that 2 + 2 = 4", "2 + 2 = 4", False),
        ("", "", False),
    ],
    ids=[
        "same words",
        "secret inside",
        "row inside",
        "row too short",
        "0.8 of it",
        "just below",
        "26 words",
        "25 words",
        "short, whole",
        "short, other sign",
        "short, only a part",
        "empty",
    ],
)
def test_what_contaminates(row: str, secret: str, expected: bool) -> None:
    assert contaminated(row, secret) is expected


def test_scripts_without_spaces_are_compared_by_character() -> None:
    secret = "\u6625\u7720\u4e0d\u89c9\u6653\u5904\u5904\u95fb\u557c\u9e1f\u591c\u6765\u98ce\u96e8"
    assert contaminated(f"\u8bd7\u662f{secret}\u3002", secret)
    assert not contaminated(secret[: N - 1], secret)


def test_a_passage_of_many_rows_counts_only_where_it_is_the_whole_secret() -> None:
    template = numbered(0, 30)
    secrets = texts(f"{template} {numbered(1000, 5)}", template)
    rows = texts(*(f"{template} {numbered(2000 + 10 * i, 3)}" for i in range(BOILERPLATE + 1)))
    assert overlaps(rows, secrets[:1]) == []
    few = overlaps(rows[:BOILERPLATE], secrets[:1])
    assert [o.share for o in few] == [30 / 33] * BOILERPLATE
    assert all(o.secret == "row 1" for o in overlaps(rows, secrets))


def test_a_row_given_often_is_one_row() -> None:
    row = f"{numbered(0, 38)} other end"
    found = overlaps(texts(*[row] * (BOILERPLATE + 5)), texts(LONG))
    assert [o.share for o in found] == [38 / 40] * (BOILERPLATE + 5)


def changed(text: str, at: int, word: str) -> str:
    """The text with another word at one place."""
    parts = text.split()
    return " ".join([*parts[:at], word, *parts[at + 1 :]])


ITEM = numbered(0, 60)
COPIES = {
    "one change": lambda i: changed(ITEM, 30, "x"),
    "one place": lambda i: changed(ITEM, 30, f"x{i}"),
    "any place": lambda i: changed(ITEM, i * 7 % 60, f"x{i}"),
    "near the end": lambda i: changed(ITEM, 54, "x"),
    "three places": lambda i: changed(changed(changed(ITEM, 15, "x"), 30 + i % 3, "y"), 45, "z"),
    "one word less": lambda i: ITEM.replace("w25 ", ""),
}


@pytest.mark.parametrize("copies", [BOILERPLATE + 1, 3 * BOILERPLATE])
@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_many_changed_copies_of_a_secret_are_no_template(
    copy: Callable[[int], str], copies: int
) -> None:
    wrapped = [
        f"{numbered(1000 + 20 * i, 10)} {copy(i)} {numbered(1010 + 20 * i, 10)}"
        for i in range(copies)
    ]
    found = overlaps(texts(*wrapped), texts(numbered(9000, 60), ITEM))
    assert [(o.secret, o.contaminated) for o in found] == [("row 1", True)] * copies


def question(number: int, length: int = 8) -> str:
    return numbered(10_000 + 10 * number, length)


@pytest.mark.parametrize("items", [1, 2, 200])
@pytest.mark.parametrize("length", [2, 8])
def test_rows_of_a_template_are_no_copies(items: int, length: int) -> None:
    template = numbered(0, 40)
    secrets = texts(*(f"{template} {question(i, length)}" for i in range(items)))
    rows = texts(*(f"{template} {question(500 + i, length)}" for i in range(300)))
    assert overlaps(rows, secrets) == []
    leaked = [*rows, Text("leaked", secrets[0].text)]
    assert [o.row for o in overlaps(leaked, secrets)] == ["leaked"]


def test_of_items_on_one_passage_the_question_tells_the_copies() -> None:
    passage = numbered(0, 60)
    secrets = texts(*(f"{passage} {question(i)}" for i in range(4)))
    changes = [changed(passage, 4 * i, f"x{i}") for i in range(BOILERPLATE + 1)]
    copies = texts(
        *(f"{text} {question(0)} {numbered(900 + i, 5)}" for i, text in enumerate(changes))
    )
    others = texts(*(f"{text} {question(50 + i)}" for i, text in enumerate(changes)))
    assert {o.row: o.secret for o in overlaps([*copies, *others], secrets) if o.contaminated} == {
        copy.where: "row 0" for copy in copies
    }


def test_what_is_kept_of_a_row_is_small() -> None:
    """8 bytes a word; the words themselves would be ten times as much."""
    prompt, count, size = numbered(0, 20), 400, 500
    rows = (Text(f"row {i}", f"{prompt} {numbered(100 + size * i, size)}") for i in range(count))
    secrets = texts(f"{prompt} {question(0)}", f"{prompt} {question(1)}")
    tracemalloc.start()
    try:
        assert overlaps(rows, secrets) == []
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * 8 * count * size


def test_a_refusal_names_rows_and_how_to_mend_them() -> None:
    secrets = texts(LONG, "yes", name="probe 'p', item")
    rows = texts("no", "yes", *[LONG] * (NAMED + 1))
    refuse_contaminated(rows[:1], secrets)
    refuse_contaminated(rows, [])
    with pytest.raises(RequestError) as caught:
        refuse_contaminated(rows, secrets)
    first, *_, last = caught.value.problems
    assert first == (
        "row 1: is also in probe 'p', item 1 (100% in common: 'yes'); delete the row, or take the "
        "other out of what is measured"
    )
    assert len(caught.value.problems) == NAMED + 1
    assert last.startswith("and 2 more rows")
    with pytest.raises(RequestError) as caught:
        refuse_contaminated(rows[1:2], secrets)
    assert caught.value.problems == (first,)


def expected_shares(rows: list[list[str]], secrets: list[list[str]]) -> list[float]:
    """The rule of the module's docstring, run by run, with nothing indexed; 0: nothing shared."""

    def runs(text: list[str]) -> list[str]:
        return [" ".join(text[i : i + N]) for i in range(len(text) - N + 1)]

    def inside(one: list[str], other: list[str]) -> bool:
        return f" {' '.join(one)} " in f" {' '.join(other)} "

    def enough(had: list[bool]) -> bool:
        return sum(had) >= 0.8 * len(had) if len(had) >= 2 * N else all(had)

    different = {tuple(row) for row in rows}
    carriers = Counter(run for row in different for run in set(runs(list(row))))
    holders = Counter(run for secret in {tuple(s) for s in secrets} for run in set(runs([*secret])))

    def owned(secret: list[str]) -> list[bool]:
        shared = {i + k for i, r in enumerate(runs(secret)) if holders[r] > 1 for k in range(N)}
        return [i not in shared for i in range(len(secret))]

    def in_line(row: list[str], secret: list[str]) -> list[str] | None:
        """What the row has in the place of each word of a secret, if it has enough of them."""
        lines: dict[int, list[str]] = {}
        for i, run in enumerate(runs(row)):
            for j, other in enumerate(runs(secret)):
                if run == other and holders[run] == 1:
                    places = range(i - j, i - j + len(secret))
                    lines[i - j] = [row[p] if 0 <= p < len(row) else "" for p in places]
        if not lines or min(len(row), len(secret)) < 2 * N:
            return None
        main = max(
            (lines[shift] for shift in sorted(lines)),
            key=lambda line: sum(map(str.__eq__, line, secret)),
        )
        best = [
            w if any(ln[i] == w for ln in lines.values()) else main[i] for i, w in enumerate(secret)
        ]
        had = [a == b for a, b in zip(best, secret, strict=True)]
        own = [h for h, o in zip(had, owned(secret), strict=True) if o]
        return best if enough(had) and enough(own) else None

    def copied(row: list[str], secret: list[str]) -> float:
        others = [line for other in different if (line := in_line([*other], secret))]
        mine = in_line(row, secret)
        if mine is None or len(others) <= BOILERPLATE:
            return 0.0
        common = [
            max(count for word, count in [*Counter(words).items(), ("-", 0)] if word)
            for words in zip(*others, strict=True)
        ]
        lacking = [i for i, word in enumerate(secret) if mine[i] != word]
        filled = sum(2 * common[i] < len(others) for i in lacking)
        return 1 - len(lacking) / len(secret) if filled <= all(owned(secret)) else 0.0

    shares = []
    for row in rows:
        found = [(0.0, 0)]
        for secret in secrets:
            size = min(len(row), len(secret))
            if size < N:
                found.append((float(row == secret and bool(row)), size))
                continue
            short, other = (secret, row) if len(secret) < len(row) else (row, secret)
            common = {r for r in set(runs(short)) & set(runs(other)) if carriers[r] <= BOILERPLATE}
            marked = {i + k for i, r in enumerate(runs(short)) if r in common for k in range(N)}
            whole = inside(secret, row) or inside(row, secret)
            found.append((1.0 if whole else len(marked) / len(short), size))
        share, size = max(found)
        clear = share == 1 or (share >= 0.8 and size >= 2 * N)
        changed_copies = [] if clear else [copied(row, secret) for secret in secrets]
        shares.append(max(changed_copies, default=0.0) or share)
    return shares


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_it_finds_what_the_rule_says(data: st.DataObject) -> None:
    word = st.integers(0, 60).map(lambda i: f"w{i}")
    text = st.sampled_from([1, 2 * N]).flatmap(lambda n: st.lists(word, min_size=n, max_size=40))
    secrets = data.draw(st.lists(text, min_size=1, max_size=4))

    def cut_from_one() -> list[str]:
        secret = data.draw(st.sampled_from(secrets))
        start = data.draw(st.integers(0, len(secret)))
        return secret[start : data.draw(st.integers(start, len(secret)))]

    rows = [
        data.draw(st.lists(word, max_size=6))
        + cut_from_one()
        + data.draw(st.lists(word, max_size=3))
        + cut_from_one()
        for _ in range(data.draw(st.integers(1, 5)))
    ]
    rows += rows[:1] + [[*rows[0], f"only{i}"] for i in range(data.draw(st.sampled_from([0, 12])))]
    long = [secret for secret in secrets if len(secret) >= 2 * N]
    copied = data.draw(st.booleans())
    if copied and long:
        for i in range(BOILERPLATE + data.draw(st.integers(0, 2))):
            copy = [*data.draw(st.sampled_from(long[:2])), f"end{i}"]
            for _ in range(data.draw(st.integers(0, 2))):
                at = data.draw(st.integers(0, len(copy) - 1))
                copy[at] = data.draw(st.sampled_from(["new", f"new{i}", copy[at]]))
            rows.append(copy)
    found: dict[str, Overlap] = {
        o.row: o
        for o in overlaps(
            texts(*(" ".join(r) for r in rows)), texts(*(" ".join(s) for s in secrets))
        )
    }
    for i, share in enumerate(expected_shares(rows, secrets)):
        assert (found[f"row {i}"].share if f"row {i}" in found else 0.0) == pytest.approx(share)


@pytest.mark.parametrize("seed", [0, 11])
def test_the_labs_own_files_are_clean(seed: int, tmp_path: Path) -> None:
    from holdfast.lab import write_files

    paths = {k: str(p) for k, p in write_files(tmp_path, seed=seed, counterexamples=200).items()}
    secrets = secret_texts(Canary(sources=[Source(path=paths["canary"])]), [paths["probes"]])
    rows = list(row_texts([Source(path=paths["lesson"]), Source(path=paths["replay"])]))
    assert len(rows) == 1200
    refuse_contaminated(rows, secrets)
    planted = [*rows[:5], secrets[0], *rows[5:10], secrets[-1]]  # a canary row, a probe item
    with pytest.raises(RequestError) as caught:
        refuse_contaminated(planted, secrets)
    assert len(caught.value.problems) == 2


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real data beside the checkout")
@pytest.mark.parametrize(("kind", "copies"), [("python", 0), ("docs", 0), ("stories_en", 4)])
def test_real_text(kind: str, copies: int) -> None:
    """A search written apart, over plain tuples of 13 words, found as many of 0.9 or more."""
    rows = row_texts([Source(path=str(SHARED / f"text/{kind}_train.jsonl"))])
    secrets = row_texts([Source(path=str(SHARED / f"text/{kind}_heldout.jsonl"))])
    found = overlaps(rows, list(secrets))
    assert sum(o.contaminated for o in found) == copies
    assert any(not o.contaminated for o in found)
