"""Results on disk: found again for the same model and items, and for nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny
from holdfast.meters.probes import Item, Results, read, read_probes
from holdfast.meters.probes.results import Outcome, default_folder

TOKENIZER = tiny.letters(tiny.CHAT)
ITEMS = [
    Item(id="1", probe="choice", kind="choice", prompt="a", choices=["b", "cd"], answer=0),
    Item(id="1", probe="nll", kind="nll", prompt="a", target="bcd"),
    Item(id="1", probe="exact", kind="exact", prompt="a", target="b", max_new_tokens=3),
]


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Probes that were read off a model."""
    seen: list[str] = []
    real = read._read

    def spy(model: Any, tokenizer: Any, items: list[Item], tokens: Any) -> Outcome:
        seen.append(items[0].probe)
        return real(model, tokenizer, items, tokens)

    monkeypatch.setattr(read, "_read", spy)
    return seen


def measured(model: Any, folder: Path, items: list[Item] = ITEMS, tokenizer: Any = None) -> Any:
    tokenizer = tokenizer or TOKENIZER
    readings = read_probes(model, tokenizer, items, 0, results=Results(model, tokenizer, folder))
    return [(r.name, r.items, r.answers, r.stderr, r.n, r.unit) for r in readings]


def test_other_end_tokens_are_other_answers(tmp_path: Path) -> None:
    """generation_config.json decides where an answer ends, too."""
    model = tiny.tiny("Llama")
    Results(model, TOKENIZER, tmp_path).store(ITEMS, Outcome([1.0] * 3, None))
    assert Results(model, TOKENIZER, tmp_path).find(ITEMS) is not None
    model.generation_config.eos_token_id = [tiny.EOS, tiny.BOT]
    assert Results(model, TOKENIZER, tmp_path).find(ITEMS) is None


def test_a_folder_that_cannot_be_written_loses_no_result(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    results = Results(tiny.tiny("Llama"), tiny.letters(), tmp_path / "file" / "below")
    results.store(ITEMS, Outcome([1.0] * len(ITEMS), None))
    assert results.find(ITEMS) is None


def test_a_base_is_scored_once(tmp_path: Path, spied: list[str]) -> None:
    model = tiny.tiny("Llama")
    first = measured(model, tmp_path)
    assert sorted(spied) == ["choice", "exact", "nll"]
    assert str(measured(tiny.tiny("Llama"), tmp_path)) == str(first)
    assert len(spied) == 3
    assert len(list(tmp_path.iterdir())) == 3


def test_another_model_item_or_tokenizer_is_scored_anew(tmp_path: Path, spied: list[str]) -> None:
    model = tiny.tiny("Llama")
    measured(model, tmp_path)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-3
    measured(model, tmp_path)
    assert len(spied) == 6
    model.config.rope_parameters["rope_theta"] = 5000.0
    measured(model, tmp_path)
    assert len(spied) == 9
    measured(model, tmp_path, tokenizer=tiny.letters())
    assert len(spied) == 12
    measured(model, tmp_path, [ITEMS[0], ITEMS[1].model_copy(update={"target": "bce"}), ITEMS[2]])
    assert spied[12:] == ["nll"]


def test_an_adapter_that_is_off_is_another_model(tmp_path: Path, spied: list[str]) -> None:
    model = get_peft_model(tiny.tiny("Llama"), LoraConfig(target_modules="all-linear", r=2))
    tiny.moved(model, 0.3)
    tuned = measured(model, tmp_path)
    with model.disable_adapter():
        base = measured(model, tmp_path)
        assert str(base) == str(measured(model, tmp_path))
    assert str(tuned) != str(base)
    assert len(spied) == 6
    assert str(measured(model, tmp_path)) == str(tuned)


@pytest.mark.parametrize("damage", ["torn", "changed", "empty", "other", "short"])
def test_a_damaged_result_is_read_again(tmp_path: Path, spied: list[str], damage: str) -> None:
    model = tiny.tiny("Llama")
    first = measured(model, tmp_path, ITEMS[:1])
    (file,) = tmp_path.iterdir()
    whole = file.read_text()
    record = json.loads(whole)
    if damage == "changed":
        record["outcome"]["values"] = [1.0 - record["outcome"]["values"][0]]
    if damage == "short":
        record["outcome"]["values"] = []
    texts = {"torn": whole[:20], "empty": "", "other": "[1]"}
    file.write_text(texts.get(damage) or json.dumps(record) * (damage != "empty"))
    assert str(measured(model, tmp_path, ITEMS[:1])) == str(first)
    assert len(spied) == 2
    assert file.read_text() == whole


def test_where_results_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HOLDFAST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "holdfast" / "probes"
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "other"))
    assert Results(tiny.tiny("Llama"), TOKENIZER).folder == tmp_path / "other" / "probes"
