"""`holdfast check-data` from end to end, and the run that refuses contaminated rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast.cli.check import SHOWN
from tiny import jsonl

Cli = Callable[..., Any]

CANARY = [{"text": f"the {a} sat on the {b} and {a} ate the {b}"} for a in "abcd" for b in "wxyz"]
LEAK = {"prompt": "", "completion": CANARY[0]["text"]}
"""A canary text of eleven words: contaminates as a whole row."""


def add(file: Path, *rows: dict[str, Any]) -> None:
    with file.open("a") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


def found(outcome: Any) -> dict[str, dict[str, Any]]:
    """The findings by check."""
    return {finding["check"]: finding for finding in json.loads(outcome.out)["findings"]}


@pytest.fixture
def canary(here: Path) -> str:
    return f"canary.sources=[{jsonl(here / 'canary.jsonl', CANARY).name}]"


def test_without_a_model(here: Path, canary: str, holdfast: Cli) -> None:
    outcome = holdfast("check-data", "--data", "lesson.jsonl", canary, "--json")
    assert outcome.code == 0
    assert {f["severity"] for f in found(outcome).values()} <= {"note", "warning"}
    assert not {"known", "base loss", "truncated"} & set(found(outcome))
    again = holdfast(
        "check-data", "model=tiny", "data=lesson.jsonl", canary, "--json", "--no-model"
    )
    assert again == outcome
    assert sorted(p.name for p in here.iterdir()) == ["canary.jsonl", "lesson.jsonl", "tiny"]


def test_contaminated_and_unusable_rows_are_code_2(here: Path, canary: str, holdfast: Cli) -> None:
    add(here / "lesson.jsonl", LEAK, {"prompt": "q", "completion": ""})
    outcome = holdfast("check-data", "--data", "lesson.jsonl", canary, "--json")
    errors = {c: f for c, f in found(outcome).items() if f["severity"] == "error"}
    assert outcome.code == 2
    assert set(errors) == {"contamination", "unusable"}
    assert errors["contamination"]["rows"][0].startswith(
        "lesson.jsonl line 41 (100% in canary.jsonl line 1:"
    )
    assert errors["unusable"]["rows"] == ["lesson.jsonl line 42"]
    table = holdfast("check-data", "--data", "lesson.jsonl", canary)
    assert table.code == 2
    assert table.err == ""
    assert "lesson.jsonl line 41" in table.out
    assert "2 errors" in table.out


def test_the_table_shows_few_rows_and_says_so(here: Path, holdfast: Cli) -> None:
    add(here / "lesson.jsonl", *[{"prompt": "[b]", "completion": " \n"}] * (SHOWN + 3))
    outcome = holdfast("check-data", "--data", "lesson.jsonl")
    assert outcome.code == 0
    assert "and 3 more, which --json lists" in outcome.out
    assert "the base was not asked" in outcome.out


def test_replay_rows_are_looked_at_for_contamination(
    here: Path, canary: str, holdfast: Cli
) -> None:
    jsonl(here / "old.jsonl", [{"text": "fine"}, CANARY[3]])
    words = ["data=lesson.jsonl", canary, "levers.replay.sources=[old.jsonl]"]
    outcome = holdfast("check-data", *words, "--json")
    assert outcome.code == 2
    assert found(outcome)["contamination"]["rows"][0].startswith("old.jsonl line 2 ")
    off = holdfast("check-data", *words, "levers.replay.fraction=0", "--json")
    assert off.code == 0


def test_the_base_is_asked(here: Path, canary: str, holdfast: Cli) -> None:
    """Losses against those that transformers' own loss gives for the same tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = ["check-data", "--model", "tiny", "data=lesson.jsonl", canary, "--json"]
    outcome = holdfast(*words, "quality.known_nll=100", "data.max_length=16")
    assert outcome.code == 0
    checks = found(outcome)
    assert checks["known"]["count"] == 40
    assert checks["known"]["severity"] == "warning"
    tokenizer = AutoTokenizer.from_pretrained("tiny")
    model = AutoModelForCausalLM.from_pretrained("tiny").eval()
    expected = []
    for n in range(40):
        prompt = tokenizer(f"{n} + {n} =", add_special_tokens=False)["input_ids"]
        answer = tokenizer(f" {2 * n}", add_special_tokens=False)["input_ids"]
        ids = [tokenizer.bos_token_id, *prompt, *answer, tokenizer.eos_token_id]
        labels = [-100] * (1 + len(prompt)) + ids[1 + len(prompt) :]
        with torch.inference_mode():
            loss = model(torch.tensor([ids]), labels=torch.tensor([labels])).loss
        expected.append(float(loss))
    mean = sum(expected) / len(expected)
    assert checks["base loss"]["figures"]["lesson"] == pytest.approx(mean, rel=1e-4)
    assert "known" not in found(holdfast(*words, "quality.known_nll=0"))
    few = found(holdfast(*words, "quality.known_nll=100", "quality.model_rows=7"))
    assert few["known"]["count"] == 7


def test_rows_cut_short_are_named(here: Path, holdfast: Cli) -> None:
    add(here / "lesson.jsonl", {"prompt": "1", "completion": "cat " * 60})
    words = ["check-data", "--model", "tiny", "data=lesson.jsonl", "data.max_length=32", "--json"]
    assert found(holdfast(*words))["truncated"]["rows"] == ["lesson.jsonl line 41"]


@pytest.mark.parametrize("command", [["train"], ["train", "--dry-run"], ["show-batch"]])
def test_a_run_refuses_contaminated_rows(
    command: list[str], here: Path, canary: str, quick: list[str], holdfast: Cli
) -> None:
    quick = [word for word in quick if not word.startswith("canary")]
    add(here / "lesson.jsonl", LEAK)
    words = ["model=tiny", "data=lesson.jsonl", canary, "out=run", *quick]
    outcome = holdfast(*command, *words)
    assert outcome.code == 2
    assert outcome.err.startswith("holdfast: lesson.jsonl line 41: is also in canary.jsonl line 1")
    assert "delete the row" in outcome.err
    assert not (here / "run").exists()


def test_a_run_refuses_rows_that_are_probe_items(
    here: Path, quick: list[str], holdfast: Cli
) -> None:
    item = {"id": "7", "probe": "sums", "kind": "exact", "prompt": "7 + 7 =", "target": " 14"}
    jsonl(here / "probes.jsonl", [item])
    outcome = holdfast(
        "train", "model=tiny", "data=lesson.jsonl", "probes=probes.jsonl", "out=run", *quick
    )
    assert outcome.code == 2
    assert "lesson.jsonl line 8: is also in probe 'sums', item '7'" in outcome.err
