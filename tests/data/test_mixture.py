"""The mixture: pure in (seed, step), exact in tokens, and nothing lost on the way to the model."""

from __future__ import annotations

from collections import Counter
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, SequentialSampler

from holdfast.data.example import Example, Role
from holdfast.data.mixture import Mixture, Stream, steps_for_epochs

ROLES = [Role.TASK, Role.REPLAY, Role.ANCHOR]


def examples(lengths: list[int], mark: int) -> list[Example]:
    """Documents whose every token tells stream and row, so that they are known in a batch."""
    return [
        Example([mark * 10_000 + row * 10 + 1] * n, [False] + [True] * (n - 1))
        for row, n in enumerate(lengths)
    ]


def mixture(lengths: list[list[int]], shares: list[float], **options: Any) -> Mixture:
    streams = [
        Stream.of(f"s{i}", ROLES[i % 3], share, examples(some, i + 1))
        for i, (some, share) in enumerate(zip(lengths, shares, strict=True))
    ]
    settings = {"batch_tokens": 64, "seed": 5, "steps": 12, "micro_batches": 3, "width": 16}
    return Mixture(streams, pad_token_id=0, **{**settings, **options})


LENGTHS = st.lists(st.lists(st.integers(1, 16), min_size=1, max_size=9), min_size=1, max_size=3)
WEIGHTS = st.lists(st.floats(0.05, 1), min_size=3, max_size=3)


@given(LENGTHS, WEIGHTS, st.integers(0, 2**31), st.permutations(range(8)))
def test_a_step_does_not_depend_on_what_was_asked_before(
    lengths: list[list[int]], weights: list[float], seed: int, order: list[int]
) -> None:
    shares = [w / sum(weights) for w in weights[: len(lengths)]]
    asked = mixture(lengths, shares, seed=seed)
    in_some_order = {step: asked.rows_at(step) for step in order}
    for step in range(8):
        assert mixture(lengths, shares, seed=seed).rows_at(step) == in_some_order[step]


@given(LENGTHS, WEIGHTS, st.integers(1, 200))
def test_tokens_never_drift_by_more_than_a_row(
    lengths: list[list[int]], weights: list[float], batch_tokens: int
) -> None:
    shares = [w / sum(weights) for w in weights[: len(lengths)]]
    mixed = mixture(lengths, shares, batch_tokens=batch_tokens)
    served = Counter[str]()
    for step in range(20):
        tokens = Counter[str]()
        for stream, row in mixed.rows_at(step):
            tokens[f"s{stream}"] += lengths[stream][row]
        assert mixed.tokens_at(step) == {name: tokens[name] for name in mixed.tokens_at(step)}
        served += tokens
        for i, share in enumerate(shares):
            target = share * batch_tokens * (step + 1)
            assert -0.5 <= served[f"s{i}"] - target <= max(lengths[i]) + 0.5
    budget = mixed.token_budget(20)
    assert {name: spent["tokens"] for name, spent in budget.items()} == {
        f"s{i}": served[f"s{i}"] for i in range(len(lengths))
    }


@given(st.lists(st.integers(1, 16), min_size=1, max_size=12), st.integers(1, 100))
def test_every_row_once_an_epoch(lengths: list[int], batch_tokens: int) -> None:
    mixed = mixture([lengths], [1.0], batch_tokens=batch_tokens)
    n = len(lengths)
    line: list[int] = []
    step = 0
    while len(line) < 3 * n:
        line += [row for _, row in mixed.rows_at(step)]
        step += 1
    epochs = [line[e * n : (e + 1) * n] for e in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    budget = mixed.token_budget(step)["s0"]
    assert budget["rows"] == len(line)
    assert budget["epochs"] == pytest.approx(budget["tokens"] / sum(lengths))


def test_epochs_and_seeds_and_names_have_orders_of_their_own() -> None:
    rows = [1] * 50
    mixed = mixture([rows, rows], [0.5, 0.5], batch_tokens=100)
    orders = [[row for s, row in mixed.rows_at(step) if s == i] for i in (0, 1) for step in (0, 1)]
    orders.append([row for _, row in mixture([rows], [1.0], batch_tokens=50, seed=6).rows_at(0)])
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 5


@given(LENGTHS.filter(lambda some: len(some) > 1), st.floats(0.05, 0.95), st.floats(0.05, 0.95))
def test_a_share_does_not_reorder_another_stream(
    lengths: list[list[int]], one: float, other: float
) -> None:
    rest = [0.3] * (len(lengths) - 1)
    before, after = (mixture(lengths, [share, *rest]) for share in (one, other))
    for step in range(6):
        kept = [[d for d in mixed.rows_at(step) if d[0] > 0] for mixed in (before, after)]
        assert kept[0] == kept[1]


@settings(deadline=None, max_examples=40)
@given(LENGTHS, WEIGHTS, st.integers(1, 5), st.booleans(), st.booleans())
def test_nothing_is_lost_between_the_rows_and_the_tensors(
    lengths: list[list[int]], weights: list[float], micro_batches: int, packed: bool, apart: bool
) -> None:
    shares = [w / sum(weights) for w in weights[: len(lengths)]]
    mixed = mixture(lengths, shares, micro_batches=micro_batches, packed=packed)
    mixed.anchors_apart = apart
    for step in range(3):
        found = Counter[tuple[int, int]]()
        for m in range(micro_batches):
            found += _documents_in(mixed[step * micro_batches + m], lengths, packed, apart)
        assert found == Counter(mixed.rows_at(step))


def _documents_in(
    batch: Any, lengths: list[list[int]], packed: bool, apart: bool
) -> Counter[tuple[int, int]]:
    """Read the documents back from a micro-batch, checking positions, targets and roles."""
    found = Counter[tuple[int, int]]()
    for ids, positions, targets, roles in zip(*(t.tolist() for t in batch.values()), strict=True):
        at = 0
        seen = set()
        while at < len(ids) and ids[at] != 0:
            stream, row = ids[at] // 10_000 - 1, ids[at] % 10_000 // 10
            n = lengths[stream][row]
            assert ids[at : at + n] == [ids[at]] * n
            assert positions[at : at + n] == list(range(n))
            assert targets[at : at + n] == [ids[at]] * (n - 1) + [-100]
            assert roles[at : at + n] == [int(ROLES[stream % 3])] * (n - 1) + [0]
            found[stream, row] += 1
            seen.add(ROLES[stream % 3])
            at += n
        assert not apart or Role.ANCHOR not in seen or len(seen) == 1
        assert packed or sum(position == 0 for position in positions[:at]) <= 1
        assert set(roles[at:]) <= {0}
        assert set(targets[at:]) <= {-100}
    return found


@pytest.mark.parametrize(("apart", "shape"), [(True, (2, 8)), (False, (1, 8))])
def test_anchors_share_rows_where_no_base_reads_theirs(apart: bool, shape: tuple[int, int]) -> None:
    mixed = mixture([[4], [4], [4]], [0.5, 0.0, 0.5], batch_tokens=8, micro_batches=1)
    mixed.anchors_apart = apart
    assert mixed[0]["input_ids"].shape == shape


@given(LENGTHS, WEIGHTS, st.integers(1, 4))
def test_tokens_are_dealt_evenly(
    lengths: list[list[int]], weights: list[float], micro_batches: int
) -> None:
    """The greedy deal: the fullest part exceeds the emptiest by no more than one row."""
    shares = [w / sum(weights) for w in weights[: len(lengths)]]
    mixed = mixture(lengths, shares, micro_batches=micro_batches)
    loads = [int((mixed[m]["input_ids"] != 0).sum()) for m in range(micro_batches)]
    assert max(loads) - min(loads) <= mixed.width


def test_a_micro_batch_that_gets_nothing_is_padding() -> None:
    mixed = mixture([[16]], [1.0], batch_tokens=16, micro_batches=2)
    assert int((mixed[0]["input_ids"] != 0).sum()) == 16
    assert mixed[1]["input_ids"].tolist() == [[0] * 8]
    assert int(mixed[1]["roles"].sum()) == 0


def test_the_trainers_order_is_the_mixtures_order() -> None:
    """A data loader as transformers' Trainer builds it, with and without worker processes."""
    mixed = mixture([[3, 9, 4], [8, 2]], [0.75, 0.25])
    assert len(mixed) == 12 * 3
    for workers in (0, 2):
        loader = DataLoader(
            mixed,  # type: ignore[arg-type]
            batch_size=1,
            sampler=SequentialSampler(mixed),
            collate_fn=itemgetter(0),
            num_workers=workers,
        )
        for i, batch in enumerate(loader):
            assert all(torch.equal(batch[name], mixed[i][name]) for name in batch)
        assert i == len(mixed) - 1


def test_the_end_is_the_end() -> None:
    mixed = mixture([[3]], [1.0], steps=2)
    assert len(list(mixed)) == len(mixed) == 6
    for index in (6, -1):
        with pytest.raises(IndexError):
            mixed[index]


def test_a_dataset_on_disk_serves_the_same(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = examples([4, 2, 7], 1)
    columns = {
        "input_ids": [row.input_ids for row in rows],
        "loss_mask": [row.loss_mask for row in rows],
    }
    for dataset in (
        Dataset.from_dict(columns),
        Dataset.from_dict({name: values[::-1] for name, values in columns.items()}).select(
            [2, 1, 0]
        ),
    ):
        stored = Stream.of("s", Role.TASK, 1.0, dataset)
        memory = Stream.of("s", Role.TASK, 1.0, rows)
        assert stored.lengths.tolist() == memory.lengths.tolist() == [4, 2, 7]
        assert [stored.fetch(i) for i in range(3)] == [memory.fetch(i) for i in range(3)]


def test_a_stream_of_no_share_serves_nothing() -> None:
    mixed = mixture([[3, 4], [5]], [1.0, 0.0])
    assert {stream for step in range(5) for stream, _ in mixed.rows_at(step)} == {0}
    assert mixed.token_budget(5)["s1"] == {"tokens": 0, "rows": 0, "epochs": 0.0}


def test_a_million_rows_take_no_time() -> None:
    """Far steps cost as little as near ones: nothing walks over the rows."""
    stream = Stream("big", Role.TASK, 1.0, np.full(1_000_000, 16), lambda row: ([1] * 16, []))
    mixed = Mixture(
        [stream], batch_tokens=4096, seed=0, steps=10**9, micro_batches=1, width=16, pad_token_id=0
    )
    assert len(mixed.rows_at(999_999_999)) == 4096 // 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 8}, "stream s0: a row of 9 tokens, but width is 8"),
        ({"batch_tokens": 0}, "must be at least 1"),
    ],
)
def test_what_cannot_be_mixed(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixture([[9]], [1.0], **change)


@pytest.mark.parametrize(("share", "lengths"), [(1.5, [1]), (-0.1, [1]), (0.5, [])])
def test_what_is_no_stream(share: float, lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="stream s0"):
        mixture([lengths], [share])


def test_names_seed_the_order_so_they_differ() -> None:
    stream = Stream.of("s", Role.TASK, 0.5, examples([3], 1))
    with pytest.raises(ValueError, match="one name each"):
        Mixture(
            [stream, stream],
            batch_tokens=8,
            seed=0,
            steps=1,
            micro_batches=1,
            width=8,
            pad_token_id=0,
        )


@given(
    st.lists(st.integers(1, 16), min_size=1, max_size=9),
    st.sampled_from([0.25, 0.5, 1.0]),
    st.integers(8, 64),
    st.integers(1, 3),
)
def test_steps_for_epochs_is_the_fewest_that_serves_every_row(
    lengths: list[int], share: float, batch_tokens: int, epochs: int
) -> None:
    steps = steps_for_epochs(sum(lengths), share, batch_tokens, epochs)
    mixed = mixture([lengths], [share], batch_tokens=batch_tokens)
    assert mixed.token_budget(steps)["s0"]["rows"] >= epochs * len(lengths)
    asked = share * batch_tokens * (steps - 1)
    assert steps == 1 or asked < epochs * sum(lengths)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.floats(0.3, 1.5)), max_size=3),
    st.integers(0, 2**31),
)
def test_a_lesson_given_another_share_gets_it_and_the_rest_fills_the_step(
    changes: list[tuple[int, float]], seed: int
) -> None:
    """Shares are those of tokens, summed step by step; what came before a change stays."""
    lengths, shares = [[3, 5, 4], [2, 6], [4, 1, 7]], [0.5, 0.2, 0.3]
    plain = mixture(lengths, shares, seed=seed)
    mixed = mixture(lengths, shares, seed=seed)
    at = 0
    for later, factor in changes:
        before = [mixed.rows_at(step) for step in range(at + later)]
        at += later
        mixed.reshare(at, factor)
        assert mixed.lesson_share == factor
        assert [mixed.rows_at(step) for step in range(at)] == before
    for steps in (1, at + 1, at + 20):
        factors = [
            next((f for start, f in reversed(mixed.schedule) if start <= step), 1.0)
            for step in range(steps)
        ]
        asked = {
            "s0": 64 * sum(0.5 * f for f in factors),
            "s1": 64 * sum(0.2 * (1 - 0.5 * f) / 0.5 for f in factors),
            "s2": 64 * sum(0.3 * (1 - 0.5 * f) / 0.5 for f in factors),
        }
        for name, budget in mixed.token_budget(steps).items():
            assert abs(budget["tokens"] - asked[name]) <= 8
    if not changes:
        assert mixed.rows_at(7) == plain.rows_at(7)


def test_without_another_stream_the_lesson_keeps_its_share() -> None:
    mixed = mixture([[3, 5, 4]], [1.0])
    before = [mixed.rows_at(step) for step in range(9)]
    mixed.reshare(2, 0.5)
    assert [mixed.rows_at(step) for step in range(9)] == before


def test_what_is_past_is_not_shared_anew() -> None:
    mixed = mixture([[3, 5, 4], [2, 6]], [0.5, 0.5])
    mixed.reshare(4, 0.5)
    with pytest.raises(ValueError, match="step 4 is not after 4"):
        mixed.reshare(4, 0.7)
