"""Canary: splits that never change, and the mean and error of what each document says."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from holdfast.meters.canary import Document, document, read_canary
from holdfast.meters.scoring import Scored, mean_nlls

MODEL = tiny.tiny("Llama")


@given(st.text(min_size=1), st.text(), st.lists(st.integers(0, 9)), st.lists(st.integers(0, 9)))
def test_the_split_is_that_of_the_cluster_alone(
    cluster: str, domain: str, one: list[int], other: list[int]
) -> None:
    splits = {
        Document("x", domain, Scored(one, []), cluster).split,
        document(other, [], "elsewhere", cluster).split,
    }
    assert len(splits) == 1


def test_about_half_is_sealed() -> None:
    """Four standard deviations of a fair coin thrown 2,000 times are 89."""
    sealed = sum(document([i], [True], "d").split == "sealed" for i in range(2000))
    assert abs(sealed - 1000) < 89


def test_a_document_is_known_by_its_tokens() -> None:
    one, same, other = (document(ids, [False, True], "d") for ids in ([1, 2], [1, 2], [1, 3]))
    assert one == same
    assert one.id != other.id
    assert one.cluster == one.id
    assert document([1, 2], [False, True], "e", "row 3") == Document(
        one.id, "e", one.text, "row 3"
    )  # fmt: skip


def made(domain: str, count: int) -> list[Document]:
    """Documents of 4 to 9 tokens, two from each source."""
    return [
        document(
            [tiny.BOS, *((7 * i + j * j + len(domain)) % 40 for j in range(3 + i % 6))],
            [False, *(j != 1 for j in range(3 + i % 6))],
            domain,
            f"{domain} row {i // 2}",
        )
        for i in range(count)
    ]


def clustered(values: list[float], clusters: list[str]) -> float:
    """sqrt(G / (G - 1) * sum over clusters of (sum of deviations)^2) / n."""
    mean, sums = sum(values) / len(values), defaultdict(float)
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] += value - mean
    groups = len(sums)
    squares = sum(s * s for s in sums.values())
    return math.sqrt(groups / (groups - 1) * squares) / len(values)


@pytest.mark.parametrize("split", ["selection", "sealed"])
def test_a_reading_a_domain_over_its_own_split(split: str) -> None:
    documents = [*made("prose", 40), *made("code", 24)]
    readings = read_canary(MODEL, documents, split, 5)
    assert [r.name for r in readings] == ["code", "prose"]
    for reading in readings:
        chosen = [d for d in documents if (d.domain, d.split) == (reading.name, split)]
        values = [mean_nlls(MODEL, [d.text])[0] for d in chosen]
        assert reading.n == len(chosen) >= 8
        assert reading.value == pytest.approx(sum(values) / len(values), rel=1e-5)
        assert reading.stderr == pytest.approx(
            clustered(values, [d.cluster for d in chosen]), rel=1e-4
        )
        assert reading.items == pytest.approx(
            dict(zip((d.id for d in chosen), values, strict=True)), rel=1e-5
        )
        assert reading.clusters == {d.id: d.cluster for d in chosen}
        assert (reading.meter, reading.split, reading.step) == ("canary", split, 5)
        assert (reading.unit, reading.tags) == ("nats", ("canary",))


def test_held_out_lesson_rows_are_the_target() -> None:
    documents = [d for d in made("heldout", 12) if d.split == "sealed"]
    (reading,) = read_canary(MODEL, documents, "sealed", 0, meter="lesson")
    assert (reading.meter, reading.tags) == ("lesson", ("target",))
    assert read_canary(MODEL, documents, "selection", 0) == []
