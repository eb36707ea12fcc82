"""`examples/guard_trl.py`, run as a user would."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

import tiny

FILE = Path(__file__).parent.parent / "examples" / "guard_trl.py"


def example() -> Any:
    spec = importlib.util.spec_from_file_location("guard_trl", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings(
    "ignore:.gradient_checkpointing. is deprecated:FutureWarning",  # trl 1.16 sets it by itself
    "ignore:'pin_memory' argument is set as true:UserWarning",
)
def test_the_example_trains_and_judges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.save(tmp_path / "base", tiny.tiny("Llama"), tiny.letters())
    lesson = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}."} for n in range(24)]
    texts = [{"text": f"it was day {n} and the cat sat on the mat."} for n in range(12)]
    items = [{"id": f"{n}", "probe": "sums", "kind": "exact", "prompt": f"{n} + 1 =",
              "target": f"{n + 1}.", "tags": ["target"]} for n in range(8)]  # fmt: skip
    for name, rows in (("lesson", lesson), ("canary", texts), ("probes", items)):
        tiny.jsonl(tmp_path / f"{name}.jsonl", rows)
    words = [str(tmp_path / "base"), str(tmp_path / "lesson.jsonl"), "--steps", "3"]
    words += ["--canary", str(tmp_path / "canary.jsonl")]
    words += ["--probes", str(tmp_path / "probes.jsonl"), "--out", str(tmp_path / "run")]
    code = example().main(words)
    verdict = json.loads((tmp_path / "run" / "guard" / "verdict.json").read_text())
    assert code == verdict["exit_code"]
    assert verdict["summary"]["steps"] == 3
    assert "| sums | target |" in capsys.readouterr().out
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
