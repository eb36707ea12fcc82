"""A whole run on each kind of model: from the recipe to an artifact that others can load."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import tiny
from holdfast import run
from holdfast.prepare import Prepared
from holdfast.recipe import load_recipe


class Case(NamedTuple):
    model: str
    tied: bool
    pad: bool
    chat: bool
    adapter: bool = True


CASES = [
    Case("Llama", tied=True, pad=True, chat=False),
    Case("Llama", tied=False, pad=False, chat=True, adapter=False),
    Case("GPT2", tied=True, pad=False, chat=False),
    Case("GPT2", tied=True, pad=True, chat=True, adapter=False),
    Case("GPTNeoX", tied=False, pad=True, chat=True),
    Case("Qwen3", tied=True, pad=False, chat=True),
    Case("Mixtral", tied=False, pad=True, chat=False),
    Case("Mixtral", tied=True, pad=False, chat=True),
    Case("Glm4Moe", tied=False, pad=True, chat=False),
    Case("OPT", tied=True, pad=True, chat=False),
]


class Done(NamedTuple):
    case: Case
    base: Path
    run: Path
    prepared: Prepared


@pytest.fixture(scope="module", params=CASES, ids=lambda c: "-".join(map(str, c)))
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Three steps with all levers, canary, probes, held-out rows and gate."""
    case: Case = request.param
    folder = tmp_path_factory.mktemp("architecture")
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = tiny.letters(
        tiny.CHAT if case.chat else None, **special | ({"pad_token": "<pad>"} if case.pad else {})
    )
    model = tiny.tiny(case.model, tie_word_embeddings=case.tied)
    base = tiny.save(folder / "base", model, tokenizer)
    # of several lengths: alike, each would have a row of its own that it fills
    lesson = [
        {"prompt": f"{n} + 1{' + 0' * (n % 4)} =", "completion": f" {n + 1}."} for n in range(40)
    ]
    probe = {"id": "1", "probe": "sums", "kind": "nll", "prompt": "90 + 1 =", "target": " 91"}
    recipe = load_recipe(
        model=str(base),
        data={"sources": [str(tiny.jsonl(folder / "lesson.jsonl", lesson))], "max_length": 32},
        out=str(folder / "run"),
        train={"steps": 3, "batch_tokens": 128, "micro_batch_tokens": 64, "save_every": 2},
        levers={
            "adapter": {"r": 4} if case.adapter else "none",
            "kl_anchor": {"self_generated": {"rows": 6, "max_new_tokens": 12}},
            "budget": {"learning_rate": 0.01},
        },
        canary={"max_documents": 8},
        probes=[str(tiny.jsonl(folder / "probes.jsonl", [probe]))],
    )
    kept: list[Prepared] = []
    save = run._save_artifact

    def note(prepared: Prepared, *args: Any) -> None:
        kept.append(prepared)
        save(prepared, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_save_artifact", note)
        result = run.train(recipe)
    return Done(case, base, result.folder, kept[0])


IDS = torch.arange(20).reshape(2, 10) * 3 % tiny.VOCABULARY


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.eval()(input_ids=IDS).logits
    return out


def loaded_base(done: Done) -> Any:
    return AutoModelForCausalLM.from_pretrained(done.base)


def test_the_artifact_loads_without_holdfast_and_is_the_trained_model(done: Done) -> None:
    """With plain peft on the plain base, or with plain transformers."""
    base = loaded_base(done)
    before = logits(base)
    if done.case.adapter:
        tuned = PeftModel.from_pretrained(base, done.run / "adapter")
    else:
        tuned = AutoModelForCausalLM.from_pretrained(done.run / "model")
    torch.testing.assert_close(
        logits(tuned), logits(done.prepared.setup.model), rtol=1e-5, atol=1e-5
    )
    assert (logits(tuned) - before).abs().max() > 0.01


def test_the_run_folder_holds_what_it_promises(done: Done) -> None:
    names = {path.name for path in done.run.iterdir()}
    artifact = "adapter" if done.case.adapter else "model"
    assert names == {
        "recipe.yaml", "data", "readings.jsonl", "items.jsonl", "checkpoints", artifact,
        "verdict.json", "report.html", "README.md",
    }  # fmt: skip
    verdict = json.loads((done.run / "verdict.json").read_text())
    assert verdict["verdict"] in {"PASS", "FAIL", "INCONCLUSIVE"}
    assert verdict["summary"]["steps"] == 3
    for name in ("report.html", "README.md"):
        assert (done.run / name).stat().st_size > 1000
    assert (done.run / artifact / "tokenizer.json").is_file()


def test_losses_are_finite_and_the_kl_begins_at_zero(done: Done) -> None:
    readings = [json.loads(line) for line in (done.run / "readings.jsonl").read_text().splitlines()]
    losses = {(r["name"], r["step"]): r["value"] for r in readings if r["meter"] == "loss"}
    assert losses.keys() == {(n, s) for n in ("task", "kl_anchor/anchor") for s in (1, 2, 3)}
    assert all(map(math.isfinite, losses.values()))
    assert abs(losses["kl_anchor/anchor", 1]) < 1e-6
    assert losses["kl_anchor/anchor", 3] > 1e-6
    names = {(r["meter"], r["name"]) for r in readings}
    assert {("canary", "base samples"), ("probe", "sums"), ("lesson", "heldout")} <= names


def test_only_an_adapter_beside_the_base_was_trained(done: Done) -> None:
    model, base = done.prepared.setup.model, loaded_base(done)
    if done.case.adapter:
        with model.disable_adapter():
            torch.testing.assert_close(logits(model), logits(base), rtol=0, atol=1e-6)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained
        assert all("lora_" in name for name in trained)
    else:
        assert all(p.requires_grad for p in model.parameters())
        config = json.loads((done.run / "model" / "config.json").read_text())
        assert config["tie_word_embeddings"] is done.case.tied
        assert (model.lm_head.weight is model.get_input_embeddings().weight) is done.case.tied


def test_documents_are_packed_where_the_model_keeps_them_apart(done: Done) -> None:
    mixture = done.prepared.mixture
    assert mixture.packed is (done.case.model != "OPT")
    steps = range(mixture.steps)
    most = max(len(row) for step in steps for part in mixture._deal(step) for row in part)
    assert (most > 1) is mixture.packed
    if not mixture.packed:  # padding counts as tokens of a forward pass
        parts = range(len(mixture))
        assert all(mixture[part]["input_ids"].numel() <= 64 for part in parts)
        assert done.prepared.accumulation == mixture.micro_batches > 2


def test_fused_experts_and_what_lies_beside_them_get_adapters_that_move(done: Done) -> None:
    beside = ["down_proj.weight", "gate_proj.weight", "up_proj.weight"]
    adapted = {
        "Mixtral": ["down_proj", "gate_up_proj"] * 2,
        # a dense block; experts and those that every token passes
        "Glm4Moe": ["down_proj", "gate_up_proj", *beside * 2],
    }.get(done.case.model)
    names = {n for n, _ in done.prepared.setup.model.named_parameters()}
    assert any("experts" in name for name in names) is (adapted is not None)
    if adapted is None:
        return
    config = json.loads((done.run / "adapter" / "adapter_config.json").read_text())
    last = [re.search(r"\w+(\.weight)?$", name) for name in config["target_parameters"]]
    assert sorted(found[0] for found in last if found) == sorted(adapted)
    readings = [json.loads(line) for line in (done.run / "readings.jsonl").read_text().splitlines()]
    drift = {r["name"]: r["value"] for r in readings if r["meter"] == "drift" and r["step"] == 3}
    layers = {name: value for name, value in drift.items() if "mlp" in name}
    assert len(layers) == len(adapted)
    assert all(0 < value < 1 for value in layers.values())
