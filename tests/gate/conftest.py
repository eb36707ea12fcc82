"""A base, what was made of it, and sealed items and texts to judge it by."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import tiny

PROSE = [{"text": f"it was day {n} and the cat sat {'on ' * (n % 3)}the mat."} for n in range(40)]
SUMS = [
    {"id": f"{n}", "probe": "sums", "kind": "nll", "prompt": f"{n} + 1 =", "target": f" {n + 1}."}
    for n in range(40)
]
WORDS = [
    {"id": f"{n}", "probe": "words", "kind": "choice", "prompt": f"{n} is", "choices": ["a", "b"],
     "answer": n % 2} for n in range(200)
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, and `near`, `between` and `far` from it; `nan`; `other` has another tokenizer."""
    folder = tmp_path_factory.mktemp("gate")
    tokenizer = tiny.letters()
    tiny.save(folder / "base", tiny.tiny("Llama"), tokenizer)
    for name, spread in (("near", 0.0005), ("between", 0.05), ("far", 0.5)):
        model = tiny.tiny("Llama")
        tiny.moved(model, spread=spread)
        tiny.save(folder / name, model, tokenizer)
    tiny.save(folder / "nan", tiny.tiny("Llama"), tokenizer)
    (file,) = (folder / "nan").glob("*.safetensors")
    weights = load_file(file)
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, file, metadata={"format": "pt"})
    tiny.save(folder / "other", tiny.tiny("GPT2", seed=3), tokenizer)
    state = tokenizer.backend_tokenizer.to_str().replace('"a":2', '"a":3').replace('"b":3', '"b":2')
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(state)
    tokenizer.save_pretrained(folder / "other")
    for name, rows in (("prose", PROSE), ("sums", SUMS), ("words", WORDS)):
        tiny.jsonl(folder / f"{name}.jsonl", rows)
    return folder
