"""The model card: metadata the Hub reads, and a body that names cannot break."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard

from holdfast.report.card import write_card
from holdfast.report.data import ReportData


@pytest.fixture
def card(run, tmp_path):
    return ModelCard(write_card(tmp_path, run, "org/base-3b").read_text(encoding="utf-8"))


def test_the_hub_reads_base_library_tags_and_results(card, run):
    assert card.data.base_model == "org/base-3b"
    assert card.data.library_name == "peft"
    assert card.data.tags == ["holdfast"]
    results = {result.dataset_name: result for result in card.data.eval_results}
    assert set(results) == {row.name for row in run.verdict.rows}
    gsm8k = next(row for row in run.verdict.rows if row.name == "gsm8k")
    assert results["gsm8k"].metric_value == pytest.approx(gsm8k.after, abs=1e-6)
    assert results["gsm8k"].metric_args["before"] == pytest.approx(gsm8k.before, abs=1e-6)


def test_the_holdfast_block_carries_the_verdict(card):
    block = card.data.to_dict()["holdfast"]
    assert block["verdict"] == "FAIL"
    assert {c["name"]: c["verdict"] for c in block["capabilities"]}["gsm8k"] == "FAIL"
    assert {c["name"]: c["margin"] for c in block["capabilities"]}["web"] == "1%"


def test_the_body_tells_verdict_training_and_loading(card, run):
    assert run.verdict.markdown() in card.text
    assert 'PeftModel.from_pretrained(base, "adapter")' in card.text
    assert "1 h 28 min" in card.text
    (block,) = re.findall(r"```yaml\n(.*?)```", card.text, flags=re.DOTALL)
    assert yaml.safe_load(block) == run.recipe


def test_the_snippet_is_python(card):
    (block,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    compile(block, "card", "exec")


def test_it_is_the_same_on_any_day(run, tmp_path):
    one = write_card(tmp_path, run, "org/base-3b").read_bytes()
    assert write_card(tmp_path, run, "org/base-3b").read_bytes() == one
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_whole_models_load_without_peft(run, tmp_path):
    (tmp_path / "model").mkdir()
    text = write_card(tmp_path, run, "org/base-3b").read_text(encoding="utf-8")
    assert ModelCard(text).data.library_name == "transformers"
    assert "PeftModel" not in text


def test_a_local_base_does_not_tell_where_it_lay(run, tmp_path):
    base = tmp_path / "secret" / "tiny-base"
    text = write_card(tmp_path, run, str(base)).read_text(encoding="utf-8")
    assert "secret" not in text
    assert "tiny-base" in text
    assert ModelCard(text).data.base_model is None


def test_hostile_names_break_neither_metadata_nor_page(run, tmp_path):
    name = '---\n```\n<script>alert(1)</script> | "x": [y'
    rows = tuple(replace(row, name=name) for row in run.verdict.rows)
    data = ReportData(
        title=name,
        verdict=replace(run.verdict, rows=rows, reason=name),
        recipe={"name": name},
        streams={name: 3},
        summary={name: name},
    )
    card = ModelCard(write_card(tmp_path, data, 'a"b').read_text(encoding="utf-8"))
    assert card.data.to_dict()["holdfast"]["capabilities"][0]["name"] == name
    (fence,) = set(re.findall(r"^(`+)yaml$", card.text, flags=re.MULTILINE))
    assert len(fence) == 4
    outside = re.sub(rf"{fence}yaml.*?\n{fence}\n", "", card.text, flags=re.DOTALL)
    assert "<script>" not in outside


def test_without_a_gate_it_promises_nothing(tmp_path):
    text = write_card(tmp_path, ReportData("t", None), "gpt2").read_text(encoding="utf-8")
    assert "nothing is promised" in text
    card = ModelCard(text)
    assert card.data.to_dict()["holdfast"] == {"verdict": None}
    assert json.dumps(card.data.to_dict())


def test_writing_a_card_needs_no_torch(tmp_path):
    code = (
        "import sys, pathlib; from holdfast.report.card import write_card, ReportData;"
        f"write_card(pathlib.Path({str(tmp_path)!r}), ReportData('t', None), 'gpt2');"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers"} & set(done.stdout.split())
