"""Replay sources as streams: which share of the tokens each domain gets."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from holdfast.data.example import Role
from holdfast.data.replay_rows import domain_streams
from holdfast.data.rows import Source
from holdfast.errors import RequestError

TOKENIZER = tiny.letters()
MARKS = 2
"""BOS and EOS of each row."""


def streams_of(folder: Path, sources: list[Source], fraction: float = 0.2, width: int = 64):
    return domain_streams(sources, TOKENIZER, width, fraction, Role.REPLAY, folder / "kept")


def source(folder: Path, name: str, lengths: list[int], **fields: object) -> Source:
    """A file of rows with so many letters each."""
    rows = [{"text": "a" * n} for n in lengths]
    return Source(path=str(tiny.jsonl(folder / f"{name}.jsonl", rows)), **fields)


def tokens(lengths: list[int]) -> int:
    return sum(n + MARKS for n in lengths)


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@given(lengths, lengths, st.floats(0.01, 0.99))
@settings(max_examples=15, deadline=None)
def test_without_proportions_a_domain_counts_by_its_tokens(
    tmp_path_factory: pytest.TempPathFactory, prose: list[int], code: list[int], fraction: float
) -> None:
    folder = tmp_path_factory.mktemp("by_tokens")
    sources = [source(folder, "prose", prose), source(folder, "x", code, domain="code")]
    streams, _ = streams_of(folder, sources, fraction)
    total = tokens(prose) + tokens(code)
    assert {stream.name: stream.share for stream in streams} == pytest.approx(
        {
            "replay/prose": fraction * tokens(prose) / total,
            "replay/code": fraction * tokens(code) / total,
        }
    )
    assert all(stream.role is Role.REPLAY for stream in streams)
    assert [sorted(s.lengths) for s in streams] == [
        sorted(n + MARKS for n in one) for one in (code, prose)
    ]


@given(st.floats(0.1, 10.0), st.floats(0.1, 10.0))
@settings(max_examples=10, deadline=None)
def test_a_proportion_is_a_share_whatever_the_file_holds(
    tmp_path_factory: pytest.TempPathFactory, a: float, b: float
) -> None:
    folder = tmp_path_factory.mktemp("by_proportion")
    sources = [
        source(folder, "a", [5], proportion=a),
        source(folder, "b", [30] * 6, proportion=b),
    ]
    streams, _ = streams_of(folder, sources, 0.5)
    assert [stream.share for stream in streams] == pytest.approx(
        [0.5 * a / (a + b), 0.5 * b / (a + b)]
    )


def test_rows_name_their_own_domain_and_sources_of_one_domain_are_one_stream(
    tmp_path: Path,
) -> None:
    """Of the mixed file 8 of 20 tokens are code, so half of its proportion of 2 times 0.4."""
    rows = [{"text": "a" * 6, "domain": "code"}, {"text": "b" * 10}]
    mixed = Source(path=str(tiny.jsonl(tmp_path / "mixed.jsonl", rows)), proportion=2.0)
    more = source(tmp_path, "more", [3, 3], domain="code", proportion=6.0)
    streams, report = streams_of(tmp_path, [mixed, more], 0.8)
    assert {s.name: (s.share, s.lengths.tolist()) for s in streams} == {
        "replay/code": (pytest.approx(0.8 * (2 * 0.4 + 6) / 8), [8, 5, 5]),
        "replay/mixed": (pytest.approx(0.8 * 2 * 0.6 / 8), [12]),
    }
    (code, _), letters = streams, list(tiny.LETTERS)
    ids, mask = code.fetch(0)
    assert list(ids) == [tiny.BOS, *[letters.index("a")] * 6, tiny.EOS]
    assert list(mask) == [False] + [True] * 7
    assert report[mixed.path]["rows"] == report[more.path]["rows"] == 2


def test_long_rows_are_split_to_the_width(tmp_path: Path) -> None:
    streams, report = streams_of(tmp_path, [source(tmp_path, "long", [100])], width=32)
    assert max(streams[0].lengths) <= 32
    (counts,) = report.values()
    assert counts["split"] == 1


def test_one_proportion_asks_for_all(tmp_path: Path) -> None:
    sources = [
        source(tmp_path, "a", [5], proportion=1.0),
        source(tmp_path, "b", [5]),
    ]
    with pytest.raises(RequestError, match=r"b\.jsonl' has no proportion but another source has"):
        streams_of(tmp_path, sources)


def test_a_source_without_text_is_named(tmp_path: Path) -> None:
    empty = Source(path=str(tiny.jsonl(tmp_path / "empty.jsonl", [{"text": " "}])))
    with pytest.raises(RequestError, match=r"empty\.jsonl' has no rows to replay"):
        streams_of(tmp_path, [source(tmp_path, "a", [5]), empty])
