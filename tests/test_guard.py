"""Guard: the meters around trl's and transformers' own trainers, which must not notice it."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import tiny
from holdfast import guard as guarding
from holdfast.errors import RequestError
from holdfast.guard import Guard, _undisturbed

STEPS = 6
PROSE = [{"text": f"it was day {n} and the cat sat {'on ' * (n % 3)}the mat."} for n in range(16)]
PROBES = [
    {"id": f"{n}", "probe": "sums", "kind": "nll", "prompt": f"{n} + 1 =", "target": f" {n + 1}."}
    for n in range(8)
] + [
    {
        "id": f"w{n}",
        "probe": "words",
        "kind": "exact",
        "prompt": f"a {n}",
        "target": "b",
        "stop": ["."],
    }
    for n in range(4)
]
ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}."} for n in range(24)]
PAIRS = [{"prompt": f"{n} + 1 =", "chosen": f" {n + 1}.", "rejected": " no."} for n in range(24)]
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.1)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny.jsonl(folder / "prose.jsonl", PROSE)
    tiny.jsonl(folder / "probes.jsonl", PROBES)
    return folder


@pytest.fixture(autouse=True)
def same_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def guard_of(inputs: Path, out: Path, **settings: Any) -> Guard:
    files = {"canary": str(inputs / "prose.jsonl"), "probes": str(inputs / "probes.jsonl")}
    return Guard(**{**files, "every": 2, "out": str(out), **settings})


def arguments(out: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(out),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "activation_checkpointing": False,
        **more,
    }


def sft(out: Path, guard: Guard | None, *, lora: bool, **more: Any) -> SFTTrainer:
    trainer = SFTTrainer(
        model=tiny.tiny("Llama", attention_dropout=0.1).train(),
        args=SFTConfig(**arguments(out, **more), max_length=32),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS[:4]) if "eval_strategy" in more else None,
        processing_class=tiny.letters(),
        peft_config=LORA if lora else None,
        callbacks=[guard] if guard else None,
    )
    return trainer


def dpo(out: Path, guard: Guard | None, *, lora: bool) -> DPOTrainer:
    return DPOTrainer(
        model=tiny.tiny("Llama", attention_dropout=0.1).train(),
        ref_model=None if lora else tiny.tiny("Llama"),
        args=DPOConfig(**arguments(out), max_length=32),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tiny.letters(),
        peft_config=LORA if lora else None,
        callbacks=[guard] if guard else None,
    )


def plain(out: Path, guard: Guard | None, *, lora: bool) -> Trainer:
    ids = [
        [tiny.BOS, *tiny.letters()(f"{n} + 1 = {n + 1}.")["input_ids"][:8]] for n in range(10, 34)
    ]
    return Trainer(
        model=tiny.tiny("GPT2", resid_pdrop=0.1).train(),
        args=TrainingArguments(**arguments(out, gradient_accumulation_steps=2)),
        train_dataset=Dataset.from_list([{"input_ids": row, "labels": row} for row in ids]),
        processing_class=tiny.letters(),
        callbacks=[guard] if guard else None,
    )


def history(trainer: Any) -> list[Any]:
    """What each step logged, but for how long it took."""
    slow = ("runtime", "per_second")
    return [
        {key: value for key, value in log.items() if not key.endswith(slow)}
        for log in trainer.state.log_history
    ]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "readings.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("make", "lora"),
    [(sft, False), (dpo, True), (plain, False)],
    ids=["sft", "dpo-lora", "transformers"],
)
def test_training_does_not_notice_it(make: Any, lora: bool, inputs: Path, tmp_path: Path) -> None:
    runs = []
    for name in ("bare", "guarded"):
        torch.manual_seed(1)
        guard = None
        if name == "guarded":
            guard = guard_of(inputs, tmp_path / "run", measure_probes=True)
        trainer = make(tmp_path / name, guard, lora=lora)
        trainer.train()
        runs.append((history(trainer), trainer.model.state_dict(), torch.rand(1)))
    (bare, guarded) = runs
    assert len(bare[0]) > STEPS
    assert guarded[0] == bare[0]
    assert guarded[1].keys() == bare[1].keys()
    assert all(torch.equal(guarded[1][key], bare[1][key]) for key in bare[1])
    assert torch.equal(guarded[2], bare[2])

    found = records(tmp_path / "run")
    steps = {r["step"] for r in found if r["meter"] == "canary" and r["split"] == "selection"}
    assert steps == {0, 2, 4, STEPS}
    assert {r["step"] for r in found if r["meter"] == "probe"} == {0, 2, 4, STEPS}
    drift = [r["value"] for r in found if (r["meter"], r["name"]) == ("drift", "total")]
    assert 0 < drift[0] < drift[-1]
    kl = [r for r in found if r["meter"] == "kl"]
    assert bool(kl) is lora  # else the base is not at hand
    assert all(r["value"] > 0 for r in kl)
    assert guard is not None
    assert guard.verdict is not None
    verdict = json.loads((tmp_path / "run" / "verdict.json").read_text())
    assert verdict["verdict"] == str(guard.verdict.verdict)
    assert {(row.meter, row.name) for row in guard.verdict.rows} == {
        ("canary", "prose"), ("probe", "sums"), ("probe", "words"),
    }  # fmt: skip
    assert "Capabilities, before and after" in (tmp_path / "run" / "report.html").read_text()
    pairs = [
        json.loads(line) for line in (tmp_path / "run" / "items.jsonl").read_text().splitlines()
    ]
    assert sum(pair["name"] == "sums" for pair in pairs) == 8
    (row,) = (row for row in guard.verdict.rows if row.name == "sums")
    assert row.n == sum((p["name"], p["split"]) == ("sums", "sealed") for p in pairs) < 8


def test_a_lesson_that_it_is_told_of_is_read_too(inputs: Path, tmp_path: Path) -> None:
    """All that a run of ours reads of its lesson, and of the path that the weights took."""
    rows = [{"prompt": f"is {n} odd?", "completion": f" well {'yes' if n % 2 else 'no'}."}
            for n in range(40)]  # fmt: skip
    asked = [
        {"id": f"{n}", "probe": "neighbours", "kind": "exact", "prompt": f"{n}", "target": "b",
         "stop": ["."], "max_new_tokens": 8, "tags": ["adoption"]} for n in range(4)
    ]  # fmt: skip
    guard = guard_of(
        inputs,
        tmp_path / "run",
        lesson=str(tiny.jsonl(tmp_path / "lesson.jsonl", rows)),
        probes=str(tiny.jsonl(tmp_path / "asked.jsonl", asked)),
    )
    sft(tmp_path / "out", guard, lora=True).train()
    found = records(tmp_path / "run")
    at = {step: {(r["meter"], r["name"]) for r in found if r["step"] == step}
          for step in range(STEPS + 1)}  # fmt: skip
    for step in (0, STEPS):
        assert {("lesson", "lesson"), ("over_application", "neighbours")} <= at[step]
    assert {("kl", "new/lesson"), ("collapse", "excess"), ("walk", "walked")} <= at[STEPS]
    assert [step for step in at if ("gradient_near_zero", "total") in at[step]] == [2, 4, 6]
    logged = {(r["meter"], r["step"]): r["value"] for r in found if r["name"] == "total"}
    walked = sum(
        logged["learning_rate", step] * min(1.0, logged["grad_norm", step])
        for step in range(1, STEPS + 1)
    )
    (walk,) = [r["value"] for r in found if (r["meter"], r["name"]) == ("walk", "walked")]
    assert walk == pytest.approx(walked)


def test_the_last_reading_is_that_of_the_trained_model(inputs: Path, tmp_path: Path) -> None:
    """The value is computed here once more, with transformers' own loss."""
    trainer = sft(tmp_path / "out", guard_of(inputs, tmp_path / "run"), lora=True)
    trainer.train()
    model, tokenizer = trainer.model.eval(), tiny.letters()
    losses = []
    for item in PROBES[:8]:
        prompt = [tiny.BOS, *tokenizer(item["prompt"], add_special_tokens=False)["input_ids"]]
        target = tokenizer(item["target"], add_special_tokens=False)["input_ids"]
        ids = torch.tensor([prompt + target])
        labels = torch.tensor([[-100] * len(prompt) + target])
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=labels).loss))
    (last,) = [
        r["value"] for r in records(tmp_path / "run")
        if (r["name"], r["step"], r["split"]) == ("sums", STEPS, "sealed")
    ]  # fmt: skip
    assert last == pytest.approx(sum(losses) / 8, rel=1e-5)


def test_a_resumed_run_goes_on_with_the_first_readings(inputs: Path, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    first = guard_of(inputs, tmp_path / "run")
    stopped = sft(tmp_path / "b", first, lora=True, **saving)
    stopped.add_callback(Stop(at=4))
    stopped.train()
    wanted = [r for r in records(tmp_path / "run") if r["step"] == 0]
    again = guard_of(inputs, tmp_path / "run")
    sft(tmp_path / "b", again, lora=True, **saving).train(resume_from_checkpoint=True)
    assert [r for r in records(tmp_path / "run") if r["step"] == 0] == wanted
    keys = [(r["step"], r["meter"], r["name"], r["split"]) for r in records(tmp_path / "run")]
    assert len(set(keys)) == len(keys)
    assert again.verdict is not None
    other = sft(tmp_path / "b", guard_of(inputs, tmp_path / "other"), lora=True, **saving)
    with pytest.raises(RequestError, match=r"resumed at step 3.*no reading of the model before"):
        other.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))


class Stop(Guard):
    """Ends training as a lost machine would: nothing of the other callbacks' end is run."""

    def __init__(self, at: int) -> None:
        self.at, self._watch = at, None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None: ...

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.at


def test_other_processes_read_and_write_nothing(inputs: Path, tmp_path: Path) -> None:
    """What the first process writes is written by it alone; the verdict is everyone's."""
    model = tiny.tiny("Llama")
    guard = guard_of(inputs, tmp_path / "run", canary={"max_documents": 8})
    state = SimpleNamespace(is_world_process_zero=False, global_step=0, max_steps=4)
    args = TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True)
    given = {"args": args, "state": state, "control": None, "model": model}
    guard.on_train_begin(**given, processing_class=tiny.letters())
    state.global_step = 2
    guard.on_log(**given, logs={"loss": 1.0})
    guard.on_step_end(**given)
    state.global_step = 4
    guard.on_train_end(**given)
    assert guard.verdict is not None
    assert not (tmp_path / "run").exists()


def test_random_numbers_and_modes_are_put_back() -> None:
    model = tiny.tiny("Llama").train()
    model.model.layers[0].eval()  # a module kept in eval mode stays there
    modes = [module.training for module in model.modules()]

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    wanted = draw()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    with _undisturbed(model):
        draw()
        model.eval()
    assert draw() == wanted
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ZeroDivisionError), _undisturbed(model):
        assert model.eval().training / 0
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"every": 0}, "Guard: every: 0"),
        ({"evry": 3}, "did you mean 'every'"),
        ({"probes": "nowhere.jsonl"}, "probes: 'nowhere.jsonl' does not exist"),
        ({"canary": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"gate": {"margins": {"sums": "2"}}}, "2 has no unit"),
    ],
)
def test_a_wrong_setting_is_one_line(
    settings: Any, said: str, inputs: Path, tmp_path: Path
) -> None:
    with pytest.raises(RequestError) as caught:
        guard_of(inputs, tmp_path / "run", **settings)
    assert len(caught.value.problems) == 1
    assert said in str(caught.value)


def test_what_it_cannot_read_is_refused_before_the_first_step(inputs: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "something").touch()
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=4)
    begin = {"args": None, "state": state, "control": None, "model": tiny.tiny("Llama")}
    with pytest.raises(RequestError, match="not empty"):
        guard_of(inputs, taken).on_train_begin(**begin, processing_class=tiny.letters())
    with pytest.raises(RequestError, match="no tokenizer; give Guard\\(tokenizer="):
        guard_of(inputs, tmp_path / "run").on_train_begin(**begin)
    long = tiny.jsonl(tmp_path / "long.jsonl", [{**PROBES[-1], "prompt": "a" * 99}])
    for settings, said in (
        ({"probes": str(long)}, "do not fit the model's context of 64"),
        ({"max_length": 65}, "max_length: 65 is beyond the model's context of 64"),
    ):
        guard = guard_of(inputs, tmp_path / "run", **settings)
        with pytest.raises(RequestError, match=said):
            guard.on_train_begin(**begin, processing_class=tiny.letters())
        assert not (tmp_path / "run").exists()
    parameter = next(begin["model"].parameters())
    parameter.ds_id = 0  # as DeepSpeed marks what it has taken apart
    with pytest.raises(RequestError, match="sharded over devices"):
        guard_of(inputs, tmp_path / "run").on_train_begin(**begin, processing_class=tiny.letters())
    assert not (tmp_path / "run").exists()


# ---- the best checkpoint, kept by transformers


@pytest.mark.parametrize("lora", [True, False])
def test_the_trainer_keeps_its_best_checkpoint_by_our_score(
    lora: bool, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The score of each of the three checkpoints is given; the first is the best."""
    found: list[tuple[float, float]] = []
    scores = iter([0.5, -2.0, 0.4])
    monkeypatch.setattr(guarding, "score", lambda *one: found.append(one) or next(scores))
    kept = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
            "load_best_model_at_end": True, "metric_for_best_model": "holdfast",
            "save_total_limit": 1}  # fmt: skip
    guard = guard_of(inputs, tmp_path / "run")
    trainer = sft(tmp_path / "out", guard, lora=lora, **kept)
    trainer.train()
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert [one for one, _ in found] == pytest.approx([math.exp(-loss) for loss in losses])
    assert trainer.state.best_global_step == 2
    assert trainer.state.best_metric == 0.5
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    saved = load_file(tmp_path / "out" / "checkpoint-2" / name)
    state = trainer.model.state_dict()
    for key, tensor in saved.items():
        own = key.replace(".weight", ".default.weight") if lora else key
        assert torch.equal(state[own], tensor)
    assert {r["step"] for r in records(tmp_path / "run") if r["meter"] == "kl"} <= {2}
    summary = json.loads((tmp_path / "run" / "verdict.json").read_text())["summary"]
    assert summary["steps"] == STEPS
    assert summary["kept"].startswith("step 2 of 6: ")


def test_a_score_without_a_target_is_refused(inputs: Path, tmp_path: Path) -> None:
    guard = guard_of(inputs, tmp_path / "run")
    trainer = sft(tmp_path / "out", guard, lora=True)
    guard.on_train_begin(trainer.args, trainer.state, trainer.control, trainer.model,
                         processing_class=tiny.letters())  # fmt: skip
    trainer.args.metric_for_best_model = "holdfast"
    with pytest.raises(RequestError, match=r"no target is read .* give probes tagged target"):
        guard.on_evaluate(trainer.args, trainer.state, trainer.control, trainer.model, {})


def test_an_alarm_may_end_another_trainers_run(inputs: Path, tmp_path: Path) -> None:
    alarms = {"every": 1, "block": 4, "stop": True}
    guard = guard_of(inputs, tmp_path / "run", alarms=alarms, every=100)
    trainer = plain(tmp_path / "hf", guard, lora=False)
    trainer.args.learning_rate = 10.0
    trainer.train()
    assert trainer.state.global_step < STEPS
    assert (tmp_path / "hf" / f"checkpoint-{trainer.state.global_step}").is_dir()
    assert guard.verdict is not None
    assert (str(guard.verdict.verdict), guard.verdict.exit_code) == ("FAIL", 3)
    assert "canary/prose" in guard.verdict.reason
    lines = (tmp_path / "run" / "alarms.jsonl").read_text().splitlines()
    assert [alarm["name"] for alarm in json.loads(lines[-1])["alarms"]] == ["canary/prose"]


def test_an_adapter_that_moves_nothing_is_told(inputs: Path, tmp_path: Path) -> None:
    guard = guard_of(inputs, tmp_path / "run", alarms={"every": 2}, every=100)
    trainer = sft(tmp_path / "hf", guard, lora=True)
    for module in trainer.model.modules():
        if isinstance(scaling := getattr(module, "scaling", None), dict):
            scaling.update(dict.fromkeys(scaling, 0.0))  # as a rank of zero would
    trainer.train()
    lines = (tmp_path / "run" / "alarms.jsonl").read_text().splitlines()
    raised = [(line["step"], a["name"]) for line in map(json.loads, lines) for a in line["alarms"]]
    assert raised == [(4, "wiring/nothing_moves")]


def test_a_fall_of_probes_that_nobody_reads_is_refused(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="measure_probes=True"):
        guard_of(inputs, tmp_path / "run", alarms={"fall": "2pt"}, measure_probes=False)
