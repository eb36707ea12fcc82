"""Crossed wires, each by itself: what is told, and what is left alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from holdfast.alarms.wiring import Wires, faults
from holdfast.lab import base_path
from holdfast.lab.corpus import documents
from holdfast.lab.generators import DOMAINS

SOUND = Wires(20, 0.3, relative=0.01, rate=1e-4, kl=3e-3, trained=0.31, expected=0.3, prompted=True)


def names(wires: Wires) -> list[str]:
    return [alarm.name.removeprefix("wiring/") for alarm in faults(wires)]


@pytest.mark.parametrize(
    "wires",
    [
        SOUND,
        Wires(1, 0.0),  # the first step of a warm-up has a rate of zero
        replace(SOUND, kl=1e-9, relative=1e-5),  # it has hardly moved yet
        replace(SOUND, kl=None),
        replace(SOUND, trained=1.0, expected=1.0, prompted=False),  # plain text
    ],
)
def test_sound_wires(wires: Wires) -> None:
    assert names(wires) == []


@pytest.mark.parametrize(
    ("wires", "name", "told"),
    [
        (replace(SOUND, moved=0.0, relative=0.0), "nothing_moves", "adapter's rank"),
        (replace(SOUND, kl=0.0), "base_is_tuned", "not its base"),
        (replace(SOUND, trained=1.0, expected=1.0), "prompts_trained", "chat template"),
        (replace(SOUND, trained=0.8), "prompts_trained", "30 %"),
        (replace(SOUND, trained=0.0), "prompts_trained", "30 %"),
    ],
)
def test_crossed_wires(wires: Wires, name: str, told: str) -> None:
    (alarm,) = faults(wires)
    assert alarm.name == f"wiring/{name}"
    assert told in alarm.text


@pytest.fixture(scope="module")
def canary() -> dict[str, Sequence[Sequence[int]]]:
    return {domain: lab_texts(domain, "canary", 0) for domain in DOMAINS}


@pytest.fixture(scope="module")
def replay() -> dict[str, Sequence[Sequence[int]]]:
    return {domain: lab_texts(domain, "train", 1_000_000) for domain in DOMAINS}


def lab_texts(domain: str, split: str, seed: int) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(base_path())
    source = documents(domain, seed, "canary" if split == "canary" else "train")
    return [tokenizer(document.text)["input_ids"] for document in itertools.islice(source, 12)]


def test_replay_of_the_right_domains(canary, replay) -> None:
    assert names(replace(SOUND, canary=canary, served=replay)) == []
    for domain in DOMAINS:
        one = {domain: canary[domain]}
        assert names(replace(SOUND, canary=one, served={domain: replay[domain]})) == []


@pytest.mark.parametrize(("called", "is_really"), list(itertools.permutations(DOMAINS, 2)))
def test_replay_of_each_wrong_domain(canary, replay, called: str, is_really: str) -> None:
    (alarm,) = faults(replace(SOUND, canary=canary, served={called: replay[is_really]}))
    assert alarm.name == "wiring/replay_strays"
    assert f"'{called}'" in alarm.text


def test_replay_that_is_like_no_canary(canary, replay) -> None:
    alone = {"stories": canary["stories"]}
    served = {"stories": replay["functions"]}
    (alarm,) = faults(replace(SOUND, canary=alone, served=served))
    assert "unlike its canary" in alarm.text


def test_of_few_rows_or_another_domain_nothing_is_said(canary, replay) -> None:
    few = {"stories": replay["functions"][:7]}
    assert names(replace(SOUND, canary=canary, served=few)) == []
    assert names(replace(SOUND, canary=canary, served={"chat": replay["functions"]})) == []
