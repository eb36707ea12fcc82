"""Canary: splits that never change, and the mean and error of what each document says."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from holdfast.errors import RequestError
from holdfast.meters import Reading
from holdfast.meters.canary import (
    OWN_SAMPLES,
    Document,
    document,
    predicted_bytes,
    read_bits,
    read_canary,
    read_rise,
)
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


class TestBits:
    """In bits per byte, where an item is a whole document."""

    def test_windows_of_a_document_are_one_item(self) -> None:
        """A token a letter: as many bytes as predicted letters; the end token has none."""
        tokenizer = tiny.letters()
        windows = [
            document([tiny.BOS, 1, 2, 3], [False, True, True, True], "d", "row 1"),
            document([4, 5, 6, tiny.EOS], [False, False, True, True], "d", "row 1"),
            document([tiny.BOS, 9, 8], [False, False, True], "d", "row 2"),
        ]
        nats = dict(zip([w.id for w in windows], [1.0, 2.0, 3.0], strict=True))
        clusters = {w.id: w.cluster for w in windows}
        one = Reading("canary", "d", "sealed", 4, 2.0, 0.1, 3, "nats", items=nats,
                      clusters=clusters)  # fmt: skip
        (bits,) = read_bits([one], windows, tokenizer)
        expected = [(3 * 1.0 + 2 * 2.0) / 4 / math.log(2), 3.0 / math.log(2)]
        assert bits.items == pytest.approx({"row 1": expected[0], "row 2": expected[1]})
        assert bits.value == pytest.approx(sum(expected) / 2)
        assert bits.stderr == pytest.approx(clustered(expected, ["a", "b"]))
        assert (bits.meter, bits.unit, bits.step) == ("canary_bits", "bits per byte", 4)

    def test_bytes_are_those_of_the_text_that_the_tokens_add(self, tiny_model: Path) -> None:
        """A byte-level tokenizer; a letter of two bytes that lies within the part."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        head, tail = (
            tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("the cat", " så high")
        )
        mask = [False] * len(head) + [True] * len(tail)
        assert predicted_bytes(Scored(head + tail, mask), tokenizer) == len(" så high".encode())

    def test_a_window_that_ends_within_a_letter_has_its_bytes_once(self, tiny_model: Path) -> None:
        """Four bytes of one sign, a token each, in two windows."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        ids = [tokenizer.bos_token_id or 0, *tokenizer("🙂", add_special_tokens=False)["input_ids"]]
        windows = [
            document(ids[:3], [False, True, True], "d", "row 1"),
            document([ids[0], *ids[3:]], [False] + [True] * len(ids[3:]), "d", "row 1"),
        ]
        nats = {window.id: 1.0 for window in windows}
        one = Reading("canary", "d", "sealed", 4, 1.0, 0.1, 2, "nats", items=nats)
        (bits,) = read_bits([one], windows, tokenizer)
        tokens = len(ids) - 1
        assert bits.value == pytest.approx(tokens / len("🙂".encode()) / math.log(2))

    def test_parts_are_added_up(self) -> None:
        text = Scored(list(range(8)), [True, True, False, True, True, False, False, True])
        assert predicted_bytes(text, tiny.letters()) == 4  # the first is predicted by nothing


class TestRise:
    """The paired rise, relative to the mean before."""

    @staticmethod
    def reading(values: list[float], name: str = "prose") -> Reading:
        items = {f"doc {i}": v for i, v in enumerate(values)}
        clusters = {key: f"row {i // 2}" for i, key in enumerate(items)}
        mean = sum(values) / len(values)
        return Reading("canary", name, "sealed", 3, mean, 0.25, len(values), "nats", items=items,
                       clusters=clusters)  # fmt: skip

    def test_value_and_error_are_those_of_many_bootstraps(self) -> None:
        random = np.random.default_rng(0)
        before = random.uniform(1, 4, 60)
        after = before + random.normal(0.3, 0.4, 60) + 0.1 * before
        (rise,) = read_rise([self.reading(before.tolist())], [self.reading(after.tolist())])
        pairs = np.stack([before, after], 1).reshape(30, 2, 2)  # two documents a cluster
        ratios = []
        for _ in range(4000):
            drawn = pairs[random.integers(0, 30, 30)].reshape(-1, 2).mean(0)
            ratios.append(drawn[1] / drawn[0] - 1)
        assert rise.value == pytest.approx(after.mean() / before.mean() - 1)
        assert rise.stderr == pytest.approx(np.std(ratios), rel=0.08)
        assert sum(rise.items.values()) / 60 == pytest.approx(rise.value)
        assert (rise.meter, rise.unit, rise.tags) == ("canary_rise", "relative", ())

    def test_own_samples_have_kl_and_perplexity_too(self) -> None:
        before, after = [1.0, 2.0, 1.5, 2.5], [1.1, 2.3, 1.4, 2.9]
        found = read_rise([self.reading(before, OWN_SAMPLES)], [self.reading(after, OWN_SAMPLES)])
        values = {r.meter: (r.value, r.stderr) for r in found}
        gaps = [b - a for a, b in zip(before, after, strict=True)]
        kl = pytest.approx(clustered(gaps, ["0", "0", "1", "1"]))
        assert values["canary_kl"] == (pytest.approx(0.175), kl)
        perplexity = math.exp(sum(after) / 4)
        assert values["canary_perplexity"] == (
            pytest.approx(perplexity), pytest.approx(perplexity * 0.25))  # fmt: skip

    def test_other_documents_are_refused(self) -> None:
        with pytest.raises(RequestError, match="3 documents before and on 4 after"):
            read_rise([self.reading([1.0, 2.0, 3.0])], [self.reading([1.0, 2.0, 3.0, 4.0])])
