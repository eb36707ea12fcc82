"""`holdfast probes`: import, check, show; presets read the local files' own formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from holdfast.meters.importing import Frozen
from holdfast.meters.probes.presets import PRESETS, import_probe

SHARED = Path(__file__).parents[2] / "shared" / "data" / "benchmarks"
CODE = {
    "task_id": "HumanEval/0",
    "prompt": "def one():\n",
    "entry_point": "one",
    "canonical_solution": "    return 1\n",
    "test": "def check(candidate):\n    assert candidate() == 1\n",
}
XSTEST = [
    {"id": str(i), "prompt": f"How {i}?", "label": "unsafe" if i % 3 else "safe"} for i in range(9)
]


@pytest.mark.parametrize("name", ["format", "json", "tool_call"])
def test_presets_of_our_own_are_written_checked_and_shown(
    here: Path, holdfast: Callable[..., Any], name: str
) -> None:
    given = ["--n", "12", "--seed", "4", "--out", "items.jsonl", "--tag", "rare", "--probe", "mine"]
    done = holdfast("probes", "import", name, *given, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["probes"] == {"mine": {"kind": "format", "items": 12, "tags": ["rare"]}}
    first = (here / "items.jsonl").read_bytes()
    (here / "items.jsonl").unlink()
    assert holdfast("probes", "import", name, *given).code == 0
    assert (here / "items.jsonl").read_bytes() == first
    assert "mine: 12 format items (rare)" in holdfast("probes", "check", "items.jsonl").out
    shown = holdfast("probes", "show", "items.jsonl", "--n", "3").out
    assert shown.count("--- mine mine-") == 3
    assert shown.count("Question: ") >= 3
    listed = json.loads(holdfast("probes", "show", "items.jsonl", "--n", "3", "--json").out)
    assert [item["id"] for item in listed["items"]] == ["mine-0000", "mine-0001", "mine-0002"]


def test_code_is_frozen_with_its_tests(tmp_path: Path) -> None:
    file = tiny.jsonl(tmp_path / "code.jsonl", [CODE])
    (item,) = import_probe("humaneval", Frozen(data=(str(file),)), 99)
    assert (item.kind, item.prompt, item.max_new_tokens) == ("code", CODE["prompt"], 99)
    space: dict[str, Any] = {}
    exec(f"{CODE['prompt']}{CODE['canonical_solution']}\n{item.tests}", space)
    with pytest.raises(AssertionError):
        exec(f"{CODE['prompt']}    return 2\n{item.tests}", {})


def test_refusals_are_right_for_harmful_prompts_only(tmp_path: Path) -> None:
    file = tiny.jsonl(tmp_path / "xstest.jsonl", XSTEST)
    items = import_probe("refusal", Frozen(data=(str(file),), chat=True))
    assert {item.probe for item in items} == {"refusal_over", "refusal_under"}
    for item in items:
        (check,) = item.checks
        harmful = XSTEST[int(item.id)]["label"] == "unsafe"
        assert item.probe.endswith("under") is harmful
        assert check.holds("I cannot help with that.") is harmful
        assert item.prompt == [{"role": "user", "content": f"How {item.id}?"}]


PROBLEMS = [
    (["json", "--shots", "2"], "--shots: 'json' has no use for it"),
    (["json", "--data", "lesson.jsonl"], "--data: 'json' has no use for it"),
    (["humaneval", "--data", "lesson.jsonl"], "the rows are not those of openai/openai_humaneval"),
    (["humaneval", "--data", "none.jsonl"], "no such file"),
    (["humaneval"], "data of 'humaneval' cannot be had"),
    (["json", "--tag", "rar"], "--tag: 'rar' is none; did you mean 'rare'?"),
    (["json", "--out", "lesson.jsonl"], "'lesson.jsonl' exists already"),
    (["json", "--out", "no/x.jsonl"], "folder 'no' does not exist"),
]


@pytest.mark.parametrize(("words", "said"), PROBLEMS)
def test_a_wrong_request_is_named_and_nothing_is_written(
    here: Path, holdfast: Callable[..., Any], words: list[str], said: str
) -> None:
    before = sorted(here.iterdir())
    out = [] if "--out" in words else ["--out", "items.jsonl"]
    done = holdfast("probes", "import", *words, *out)
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") == 1
    assert sorted(here.iterdir()) == before


def test_check_names_what_a_model_cannot_take(here: Path, holdfast: Callable[..., Any]) -> None:
    row = {"id": "1", "probe": "p", "kind": "nll", "prompt": "a", "target": "b"}
    tiny.jsonl(here / "items.jsonl", [row, row | {"id": "2", "prompt": "abc " * 200}])
    assert holdfast("probes", "check", "items.jsonl").code == 0
    done = holdfast("probes", "check", "items.jsonl", "--model", "tiny")
    assert done.code == 2
    assert "items.jsonl line 2: " in done.err
    assert "do not fit the model's context of 128" in done.err


FILES = {
    "mmlu": ("test=mmlu_test_1000", "dev=mmlu_dev"),
    "gsm8k": ("gsm8k_test_400",),
    "humaneval": ("humaneval",),
    "lambada": ("lambada_1000",),
    "pubmedqa": ("pubmedqa",),
    "refusal": ("xstest",),
}


@pytest.mark.filterwarnings("ignore")
def test_presets_read_the_real_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With lm-eval's own definitions of these tasks alone: to read them all takes a while."""
    tasks = pytest.importorskip("lm_eval.tasks")
    if not SHARED.is_dir():
        pytest.skip("the shared sets are not here")
    root = Path(tasks.__file__).parent
    folders = [root / name for name in ("mmlu/default", "gsm8k", "lambada", "pubmedqa")]
    manager = tasks.TaskManager(include_defaults=False, include_path=folders)
    monkeypatch.setattr("holdfast.meters.importing._manager", lambda: manager)
    for name, files in FILES.items():
        data = []
        for word in files:
            split, equals, stem = word.rpartition("=")
            data.append(f"{split}{equals}{SHARED / stem}.jsonl")
        items = import_probe(name, Frozen(count=10, data=tuple(data)))
        assert len(items) == 10
        if PRESETS[name].shots:
            text = str(items[0].prompt)
            assert text.count("Answer:") == PRESETS[name].shots + 1
