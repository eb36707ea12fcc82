"""What holds for every domain: documents and probes never share a question."""

from __future__ import annotations

from random import Random

import pytest

from holdfast.lab.generators import DOMAINS
from holdfast.lab.heldout import is_reserved

GENERALISING = [name for name, domain in DOMAINS.items() if domain.facts is None]


def test_shares_add_up_and_one_domain_is_rare():
    assert sum(domain.share for domain in DOMAINS.values()) == pytest.approx(1)
    assert [name for name, d in DOMAINS.items() if "rare" in d.tags] == ["hungarian"]
    assert DOMAINS["hungarian"].share < 0.01


@pytest.mark.parametrize("name", GENERALISING)
def test_no_document_answers_a_probe(name: str):
    domain = DOMAINS[name]
    text = "\n".join(domain.document(Random(seed)) for seed in range(400))
    for item in domain.probes(Random(0), 200):
        assert item["prompt"] + item["target"] not in text


@pytest.mark.parametrize("name", GENERALISING)
def test_probes_are_reserved_and_documents_are_not(name: str):
    domain = DOMAINS[name]
    rng = Random(1)
    drawn = [domain._draw(rng, reserved=False).key for _ in range(50)]
    assert not any(map(is_reserved, drawn))
    assert all(is_reserved(domain._draw(rng, reserved=True).key) for _ in range(50))


@pytest.mark.parametrize("name", DOMAINS)
def test_probe_items_are_well_formed(name: str):
    items = DOMAINS[name].probes(Random(0), 200)
    assert len(items) == (99 if name == "hungarian" else 200)
    assert len({item["id"] for item in items}) == len(items)
    assert len({item["prompt"] for item in items}) == len(items)
    for item in items:
        assert set(item) == {
            "id", "probe", "kind", "prompt", "target", "stop", "tags", "cluster"
        }  # fmt: skip
        assert item["probe"] == name
        assert item["kind"] == "exact"
        assert not item["prompt"].endswith(" ")
        assert item["target"].startswith(" ") or item["prompt"].endswith("\n")
        assert "\n" not in item["target"]


def test_probes_are_the_same_for_the_same_seed():
    for domain in DOMAINS.values():
        assert domain.probes(Random(3), 20) == domain.probes(Random(3), 20)
