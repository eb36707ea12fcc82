"""Pretraining works, can be repeated bit for bit, and leaves all or nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from holdfast.lab.files import probe_items
from holdfast.lab.generators import DOMAINS
from holdfast.lab.pretrain import Shape, pretrain

TINY = Shape(vocabulary=1000, hidden=16, layers=1, heads=2, key_value_heads=1, intermediate=16)


def make(out: Path, *, seed: int = 0) -> Path:
    items = [item for item in probe_items(0) if item["id"].endswith("-0000")]
    said: list[str] = []
    pretrain(
        out, steps=3, batch_tokens=512, seed=seed, progress=said.append, shape=TINY, items=items
    )
    assert said[-1].startswith("step 3/3")
    return out


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("pretrain") / "base")


def test_a_seed_is_its_weights(base: Path, tmp_path: Path):
    weights = (base / "model.safetensors").read_bytes()
    again, other = make(tmp_path / "again"), make(tmp_path / "other", seed=1)
    assert (again / "model.safetensors").read_bytes() == weights
    assert (again / "base.json").read_bytes() == (base / "base.json").read_bytes()
    assert (other / "model.safetensors").read_bytes() != weights


def test_the_folder_is_a_half_precision_model_with_its_record(base: Path):
    model = AutoModelForCausalLM.from_pretrained(base)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    record = json.loads((base / "base.json").read_text(encoding="utf-8"))
    assert record["parameters"] == model.num_parameters()
    assert (record["seed"], record["steps"], record["batch_tokens"]) == (0, 3, 512)
    assert 0 < record["tokens"] <= 3 * 512
    assert sum(record["proportions"].values()) == pytest.approx(1, abs=0.001)
    assert set(record["validation_nats"]) == set(DOMAINS)
    assert set(DOMAINS) < set(record["probes"])


def test_a_batch_is_at_least_a_row(tmp_path: Path):
    with pytest.raises(ValueError, match="at least a row"):
        pretrain(tmp_path / "base", steps=1, batch_tokens=255, shape=TINY, items=[])


def test_a_base_is_never_overwritten(base: Path):
    before = (base / "model.safetensors").stat()
    with pytest.raises(FileExistsError, match="never overwritten"):
        make(base)
    assert (base / "model.safetensors").stat() == before
    assert [path.name for path in base.parent.iterdir()] == [base.name]
