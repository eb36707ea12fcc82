"""Balance: each tag its share of the lesson, in every step, and of the loss."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import LESSON, examples, tiny_run

from holdfast.data.example import Example, Role
from holdfast.data.mixture import Mixture
from holdfast.data.stream import Stream
from holdfast.errors import RequestError
from holdfast.levers.balance import Balance


def rows(tag: str, sizes: list[tuple[int, int]]) -> list[Example]:
    """Rows of so many prompt and response tokens."""
    return [Example([1] * (p + r), [False] * p + [True] * r, tag) for p, r in sizes]


def dataset(some: list[Example]) -> Dataset:
    return Dataset.from_dict(
        {name: [getattr(e, name) for e in some] for name in ("input_ids", "loss_mask", "domain")}
    )


def mixture(streams: list[Stream], batch_tokens: int, steps: int) -> Mixture:
    options = {"seed": 3, "micro_batches": 1, "width": 24, "pad_token_id": 0}
    return Mixture(streams, batch_tokens=batch_tokens, steps=steps, **options)


SIZES = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=6)


@given(SIZES, SIZES, st.floats(0.1, 10), st.floats(0.1, 1), st.booleans())
@settings(max_examples=25, deadline=None)
def test_a_tags_share_is_that_of_its_response_tokens(
    math: list[tuple[int, int]],
    code: list[tuple[int, int]],
    weight: float,
    share: float,
    on_disk: bool,
) -> None:
    """Counted token by token over whole epochs, and all tokens within a row in every step."""
    lesson = [*rows("math", math), *rows("code", code)]
    balance = Balance(shares={"math": weight, "code": 1})
    streams = list(balance.lesson(dataset(lesson) if on_disk else lesson, share))
    assert [stream.name for stream in streams] == ["task/code", "task/math"]
    assert sum(stream.share for stream in streams) == pytest.approx(share)
    response = {
        stream.name: sum(sum(stream.fetch(i)[1]) for i in range(len(stream.lengths)))
        for stream in streams
    }
    # over a long run a stream gives share / tokens of an epoch, and so of its response tokens
    learned = {s.name: s.share / s.tokens * response[s.name] for s in streams}
    assert learned["task/math"] / learned["task/code"] == pytest.approx(weight)
    mixed = mixture(streams, 40, steps=12)
    served = Counter[str]()
    for step in range(12):
        served.update(mixed.tokens_at(step))
        for stream in streams:
            target = stream.share * 40 * (step + 1)
            assert -0.5 <= served[stream.name] - target <= stream.lengths.max() + 0.5


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=20))
@settings(max_examples=25, deadline=None)
def test_no_row_is_lost_or_read_twice_in_an_epoch(tags: list[str]) -> None:
    """With shares as the rows have them, every tag comes to its end in the same step."""
    lesson = [Example([i, i, i, i], [False, True, True, True], t) for i, t in enumerate(tags)]
    streams = list(Balance(shares="tokens").lesson(lesson, 1.0))
    mixed = mixture(streams, 4 * len(tags), steps=3)
    for step in range(3):
        read = [mixed.streams[s].fetch(row)[0][0] for s, row in mixed.rows_at(step)]
        assert sorted(read) == list(range(len(tags)))


@pytest.mark.parametrize(
    ("shares", "expected"),
    # even: 40 tokens, 30 of them responses; odd: 20 tokens, 5 of them responses
    [
        ("tokens", {"even": 40 / 60, "odd": 20 / 60}),
        ("equal", {"even": (40 / 30) / (40 / 30 + 20 / 5), "odd": (20 / 5) / (40 / 30 + 20 / 5)}),
    ],
)
def test_shares_by_a_word(shares: Any, expected: dict[str, float]) -> None:
    lesson = [*rows("even", [(5, 15), (5, 15)]), *rows("odd", [(15, 5)])]
    streams = Balance(shares=shares).lesson(lesson, 0.5)
    assert {s.name.removeprefix("task/"): s.share / 0.5 for s in streams} == pytest.approx(expected)


def test_the_lessons_loss_counts_each_tag_by_its_share() -> None:
    """Response tokens by tag, counted in the batches that the model is given."""
    prompts = {"even": 3, "odd": 12}
    lesson = [
        Example(e.input_ids, [False] * n + [True] * (len(e.input_ids) - n), tag)
        for tag, n in prompts.items()
        for e in examples(60, seed=2, prompt=3)
        if len(e.input_ids) > 13
    ]
    streams = list(Balance(shares={"even": 1, "odd": 2}).lesson(lesson, 1.0))
    mixed = mixture(streams, 2000, steps=20)
    learned = Counter[str]()
    for step in range(20):
        for index, row in mixed.rows_at(step):
            learned[streams[index].name] += sum(streams[index].fetch(row)[1])
    total = sum(learned.values())
    # within a row of either at the end, a row being 1 % of an epoch and the run 20 epochs
    assert learned["task/odd"] / total == pytest.approx(2 / 3, rel=0.01)
    assert int((mixed[0]["roles"] == Role.TASK).sum()) == sum(
        sum(streams[index].fetch(row)[1]) for index, row in mixed.rows_at(0)
    )


def test_every_step_has_every_tag(tmp_path: Path) -> None:
    trainer = tiny_run([Balance(shares="equal")], tmp_path, steps=5)
    assert all(min(trainer.train_dataset.tokens_at(step).values()) > 0 for step in range(5))


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ({"even": 1}, "no share for odd; give each tag one, such as odd: 1.0"),
        ({"even": 1, "odd": 1, "evn": 1}, "no row of the lesson is 'evn'; did you mean 'even'"),
    ],
)
def test_shares_that_do_not_match(shares: dict[str, float], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        Balance(shares=shares).lesson(LESSON, 1.0)


def test_rows_without_a_tag_are_refused() -> None:
    with pytest.raises(RequestError, match=r"2 rows of the lesson have no tag; give each"):
        Balance(shares="equal").lesson([*LESSON, *[Example([1, 2], [False, True])] * 2], 1.0)


def test_off() -> None:
    assert Balance().off
    assert Balance().lesson(LESSON, 1.0) == ()


def test_a_run_reads_the_held_out_lesson_by_tag(
    here: Path, quick: list[str], holdfast: Callable[..., Any]
) -> None:
    sums = [{"prompt": f"{n} + {n} =", "completion": f" {2 * n}"} for n in range(40)]
    names = [{"prompt": f"{n} - {n} =", "completion": " 0", "domain": "minus"} for n in range(40)]
    for name, some in (("sums", sums), ("names", names)):
        (here / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    sources = "data.sources=[{path: sums.jsonl, domain: plus}, names.jsonl]"
    words = ["model=tiny", sources, "out=run", *quick, "data.heldout=0.25"]
    result = holdfast("train", *words, "levers.balance.shares={plus: 1, minus: 3}")
    assert result.code == 0, result.err
    lines = (here / "run" / "readings.jsonl").read_text().splitlines()
    lessons = {(r["name"], r["step"]) for r in map(json.loads, lines) if r["meter"] == "lesson"}
    # before, on the way (the choice of a checkpoint looks at it), and at the end
    assert lessons == {(tag, step) for tag in ("plus", "minus") for step in (0, 1, 2)}
    assert "task/minus" in (here / "run" / "report.html").read_text()
    typo = holdfast("validate", *words[:2], "levers.balance.shares=equl")
    assert typo.code == 2
    assert "levers.balance.shares" in typo.err
