"""The corpus is what it says it is: seeded, split for good, and of known proportions."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from holdfast.lab import base_path, corpus
from holdfast.lab.corpus import documents, size
from holdfast.lab.generators import DOMAINS
from holdfast.lab.heldout import is_canary


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32), name=st.sampled_from(list(DOMAINS)))
def test_training_text_and_canaries_are_disjoint(seed: int, name: str):
    train = [d.text for d in itertools.islice(documents(name, seed, "train"), 40)]
    canary = [d.text for d in itertools.islice(documents(name, seed, "canary"), 2)]
    assert not any(map(is_canary, train))
    assert all(map(is_canary, canary))


def test_a_seed_gives_one_corpus_and_another_seed_another():
    first, again, other = (list(itertools.islice(corpus(seed, "train"), 60)) for seed in (5, 5, 6))
    assert first == again
    assert not {d.text for d in first} & {d.text for d in other}


@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 2**32), count=st.integers(300, 700))
def test_proportions_hold_for_every_beginning(seed: int, count: int):
    sizes: Counter[str] = Counter()
    for document in itertools.islice(corpus(seed, "train"), count):
        sizes[document.domain] += size(document.text)
    for name, domain in DOMAINS.items():
        assert sizes[name] / sizes.total() == pytest.approx(domain.share, abs=0.01)


def test_proportions_hold_in_tokens():
    tokenizer = AutoTokenizer.from_pretrained(base_path())
    tokens: Counter[str] = Counter()
    for document in itertools.islice(corpus(0, "train"), 3000):
        tokens[document.domain] += 2 + len(tokenizer(document.text)["input_ids"])
    for name, domain in DOMAINS.items():
        assert tokens[name] / tokens.total() == pytest.approx(domain.share, abs=0.005)
    assert tokens["hungarian"] / tokens.total() < 0.01


def test_documents_hardly_repeat():
    for name in DOMAINS:
        texts = [d.text for d in itertools.islice(documents(name, 0, "train"), 500)]
        assert len(set(texts)) == len(texts)
