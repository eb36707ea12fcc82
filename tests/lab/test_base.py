"""The embedded base is small, whole, and as good as the lab needs it."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from holdfast.lab import base_path
from holdfast.lab.corpus import documents
from holdfast.lab.files import probe_items
from holdfast.lab.generators import DOMAINS
from holdfast.lab.measure import measure

RECORD = json.loads((base_path() / "base.json").read_text(encoding="utf-8"))


def test_the_folder_is_whole_and_small():
    files = {path.name: path.stat().st_size for path in base_path().iterdir()}
    assert set(files) == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "base.json",
    }  # fmt: skip
    assert sum(files.values()) <= 8 * 2**20


@pytest.mark.parametrize("name", DOMAINS)
def test_the_base_knows_what_it_was_taught(name: str):
    figure = RECORD["probes"][name]
    rare = "rare" in DOMAINS[name].tags
    assert figure["n"] >= (90 if rare else 200)
    assert figure["value"] >= (0.7 if rare else 0.9)


def test_the_base_does_not_know_the_lesson():
    assert RECORD["probes"]["irregular_verbs"]["value"] < 0.05


def test_the_record_is_of_these_weights():
    """A small part of the record measured again; a whole one is made by `pretrain`."""
    items = [item for item in probe_items(0) if item["id"] <= f"{item['probe']}-0009"]
    texts = [next(documents(name, 0, "canary")) for name in DOMAINS]
    figures = measure(base_path(), items, texts)
    for name in DOMAINS:
        assert figures["probes"][name]["value"] >= 0.5
        recorded = RECORD["validation_nats"][name]["value"]
        assert figures["validation_nats"][name]["value"] == pytest.approx(recorded, rel=0.4)


def test_weights_are_half_precision():
    model = AutoModelForCausalLM.from_pretrained(base_path())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert model.num_parameters() == RECORD["parameters"]
