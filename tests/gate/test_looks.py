"""The ledger of looks at the sealed items."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from holdfast.gate.looks import Looks, count, weights_id

SEALED = {"probe/sums": ["a", "b"], "canary/wiki": ["c"]}


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20))
def test_it_counts_models_whatever_the_order(
    tmp_path_factory: pytest.TempPathFactory, models: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("looks")
    for n, model in enumerate(models):
        looks = count("base", f"{model}", SEALED, folder)
        assert set(looks.counts.values()) == {len(set(models[: n + 1]))}


def test_other_items_another_base_another_name_start_anew(tmp_path: Path) -> None:
    count("base", "one", SEALED, tmp_path)
    assert count("base", "two", {"probe/sums": ["b", "a"]}, tmp_path).most == 2  # as before
    assert count("base", "two", {"probe/sums": ["a", "B"]}, tmp_path).most == 1
    assert count("other", "two", SEALED, tmp_path).most == 1
    assert count("base", "two", {"probe/more": ["a", "b"]}, tmp_path).most == 1


def test_many_at_once_lose_none(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: count("base", str(n % 40), SEALED, tmp_path), range(200)))
    assert count("base", "0", SEALED, tmp_path).most == 40


def test_what_cannot_be_counted_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    looks = count("base", "one", SEALED, tmp_path / "file")
    assert looks.most == 0
    assert "not counted" in looks.sentence(0.05)
    assert "file" in looks.sentence(0.05)


def test_the_sentence_says_what_reuse_costs() -> None:
    assert "up to 15%, not 5%" in Looks({"probe/a": 3, "probe/b": 1}).sentence(0.05)
    assert "(probe/a)" in Looks({"probe/a": 3, "probe/b": 1}).sentence(0.05)
    assert "first" in Looks({"probe/a": 1}).sentence(0.05)


def test_the_same_weights_elsewhere_are_the_same(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("same", 0), ("two", 1)):
        tiny.save(tmp_path / name, tiny.tiny("Llama", seed=seed), tiny.letters())
    ids = {name: weights_id(str(tmp_path / name)) for name in ("one", "same", "two")}
    assert ids["one"] == ids["same"] != ids["two"]
    assert weights_id("someone/somewhere") == ""
