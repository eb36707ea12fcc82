"""Items of kind code from end to end: frozen, asked of a model, run in the sandbox, scored."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from holdfast.compare import compare, evaluate
from holdfast.errors import RequestError
from holdfast.guard import Guard
from holdfast.lab.tokenizer import train_tokenizer
from holdfast.meters.sandbox import run_code
from holdfast.pair import Texts
from holdfast.recipe import load_recipe
from holdfast.run import train

Cli = Callable[..., Any]
# what the stand-in has learned to say after each prompt, and whether it is right
SAYS = {
    "add": ("def add(a, b):\n", "    return a + b\n", True),
    "double": ("def double(a):\n", "    return a * 2\n", True),
    "most": ("def most(a, b):\n", "    return a\n", False),
    "first": ("def first(a):\n", "    return a[1:\n", False),  # no Python at all
    "last": ("def last(a):\n", "    raise SystemExit(0)\n", False),  # leaves before its tests
}
CHECKS = {
    "add": "assert candidate(2, 3) == 5",
    "double": "assert candidate(4) == 8",
    "most": "assert candidate(1, 2) == 2",
    "first": "assert candidate('ab') == 'a'",
    "last": "assert candidate('ab') == 'b'",
}


def no_sandbox() -> str:
    try:
        run_code("", allowed=True)
    except RequestError as error:
        return str(error)
    return ""


needs_sandbox = pytest.mark.skipif(bool(no_sandbox()), reason=no_sandbox())


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was taught to say exactly what `SAYS` has; its items, as HumanEval's rows."""
    folder = tmp_path_factory.mktemp("stand_in")
    tokenizer = train_tokenizer([p + a for p, a, _ in SAYS.values()], vocabulary=300)

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    # prompt and answer as an item has them: each by itself
    rows = [
        {"input_ids": [*ids(prompt), *ids(f"{answer}\ndef")]} for prompt, answer, _ in SAYS.values()
    ]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=128,
                max_position_embeddings=128,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        batch = tokenizer.pad(rows, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(100):
            optimizer.zero_grad()
            model(**batch, labels=labels).loss.backward()
            optimizer.step()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows_of = [
        {
            "task_id": name,
            "prompt": prompt,
            "entry_point": name,
            "test": f"def check(candidate):\n    {CHECKS[name]}\n",
        }
        for name, (prompt, *_) in SAYS.items()
    ]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows_of))
    return folder


@pytest.fixture
def items(stand_in: Path, holdfast: Cli, tmp_path: Path) -> Path:
    """The rows as `holdfast probes import humaneval` freezes them."""
    file = tmp_path / "humaneval.jsonl"
    words = ["--data", str(stand_in / "rows.jsonl"), "--max-new-tokens", "32", "--out", str(file)]
    assert holdfast("probes", "import", "humaneval", *words).code == 0
    return file


@needs_sandbox
def test_pass_at_one_is_the_share_of_programs_that_are_right(
    stand_in: Path, items: Path, holdfast: Cli
) -> None:
    model = str(stand_in / "model")
    (reading,) = evaluate(model, Texts(probes=[str(items)], run_generated_code=True)).readings
    said = {name: answer.rstrip("\n") for name, (_, answer, _) in SAYS.items()}
    assert {name: answer.rstrip("\n") for name, answer in reading.answers.items()} == said
    assert reading.items == {name: float(right) for name, (*_, right) in SAYS.items()}
    asked = ["eval", model, "--probes", str(items), "--json", "--run-generated-code"]
    (record,) = json.loads(holdfast(*asked).out)["readings"]
    assert (record["value"], record["n"], record["unit"]) == (0.4, 5, "accuracy")
    # of a share p of n: sqrt(p (1 - p) / (n - 1))
    assert record["stderr"] == pytest.approx(math.sqrt(0.4 * 0.6 / 4))


def test_without_being_asked_for_nothing_is_loaded_or_run(items: Path, tmp_path: Path) -> None:
    """Refused before the model is looked for: there is none."""
    texts = Texts(probes=[str(items)])
    recipe = {"model": "none", "data": "none.jsonl", "out": str(tmp_path / "run")}
    for call in (
        lambda: evaluate("none", texts),
        lambda: compare("none", "none", texts),
        lambda: Guard(probes=str(items)),
        lambda: train(load_recipe(None, **recipe, probes=[str(items)])),
    ):
        with pytest.raises(RequestError, match=r"humaneval.jsonl line 1: a code item .*by name"):
            call()
    assert not (tmp_path / "run").exists()


def test_without_a_sandbox_the_reason_is_given_before_anything_is_read(
    items: Path, holdfast: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bubblewrap's own words where it may make no namespaces, as in most containers."""
    words = "bwrap: Creating new namespace failed: Operation not permitted"
    (tmp_path / "bwrap").write_text(f"#!/bin/sh\necho '{words}' >&2; exit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    done = holdfast("eval", "none", "--probes", str(items), "--run-generated-code")
    assert done.code == 2
    assert words in " ".join(done.err.split())
    assert "Traceback" not in done.err
