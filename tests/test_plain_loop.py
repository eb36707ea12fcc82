"""Three loops, one result: holdfast, the bare loop in `examples/`, and `trl.SFTTrainer`."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader
from trl import SFTConfig, SFTTrainer

from holdfast.data.example import Role
from holdfast.data.mixture import Mixture
from holdfast.levers.adapter import Adapter
from holdfast.levers.budget import Budget
from holdfast.levers.kl_anchor import KlAnchor
from holdfast.levers.replay import Replay
from holdfast.meters import Reading
from levers.tiny_run import ALPHABET, llama, tiny_run, tokenizer, weights

STEPS = 6
PEAK, WARMUP_SHARE, WARMUP_STEPS, CLIP = 1e-2, 0.2, 2, 0.3
Row = tuple[list[int], list[bool]]


@pytest.fixture(scope="module")
def plain_loop() -> ModuleType:
    file = Path(__file__).parents[1] / "examples" / "plain_loop.py"
    spec = importlib.util.spec_from_file_location("plain_loop", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def old_text(tmp_path: Path) -> Path:
    draw = random.Random(7)
    texts = ["".join(draw.choices(ALPHABET, k=draw.randint(5, 18))) for _ in range(20)]
    return write_rows(tmp_path / "old.jsonl", [{"text": text} for text in texts])


def write_rows(file: Path, rows: list[dict[str, str]]) -> Path:
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def rows_of(mixture: Mixture, step: int, role: Role) -> list[Row]:
    """What the mixture gives a step, as the bare loop takes it."""
    streams = [(mixture.streams[index], row) for index, row in mixture.rows_at(step)]
    fetched = [stream.fetch(row) for stream, row in streams if stream.role is role]
    return [(list(ids), list(learned)) for ids, learned in fetched]


def by_step(readings: Iterable[Reading]) -> list[dict[str, float]]:
    """The scalars of each step, in order."""
    steps: dict[int, dict[str, float]] = {}
    for reading in readings:
        steps.setdefault(reading.step, {})[f"{reading.meter}/{reading.name}"] = reading.value
    return [steps[step] for step in sorted(steps)]


def logged(trainer: Any) -> list[dict[str, float]]:
    """What transformers logged of each step."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_same_weights(ours: Any, theirs: Any) -> None:
    """Equal to a thousandth of what one step moves a weight by (Adam: the peak rate)."""
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=PEAK / 1000)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("loss", ["kl", "ntp"])
def test_five_levers_equal_the_bare_loop(
    plain_loop: ModuleType, old_text: Path, tmp_path: Path, loss: str, micro_batches: int
) -> None:
    readings: list[Reading] = []
    trainer = tiny_run(
        [
            Adapter(r=4),
            Budget(warmup=WARMUP_SHARE, clip=CLIP),
            KlAnchor(weight=3.0, self_generated={"rows": 12, "max_new_tokens": 15}),
            Replay(sources=[str(old_text)], fraction=0.2, loss=loss),
        ],
        tmp_path,
        steps=STEPS,
        batch_tokens=192,
        micro_batches=micro_batches,
        record=readings.extend,
        arguments={"learning_rate": PEAK},
    )
    model, mixture = copy.deepcopy(trainer.model), trainer.train_dataset
    trainer.train()

    steps = []
    for step in range(STEPS):
        lesson, replay, anchor = (
            rows_of(mixture, step, role) for role in (Role.TASK, Role.REPLAY, Role.ANCHOR)
        )
        # the textbook (1 - r) L_lesson + r L_replay, divided by 1 - r
        ntp = (0.2 / 0.8, plain_loop.pad(replay)) if replay else None
        steps.append((plain_loop.pad(lesson), plain_loop.pad(anchor), ntp))
    assert (steps[0][2] is None) == (loss == "kl")
    theirs = list(plain_loop.train(model, steps, 3.0, PEAK, WARMUP_STEPS, CLIP))

    assert any(facts["grad_norm"] > CLIP for facts in theirs)
    assert theirs[-1]["kl"] > 1e-3
    names = {
        "task": "loss/task",
        "kl": "loss/kl_anchor/anchor",
        "replay": "loss/replay",
        "grad_norm": "grad_norm/total",
        "learning_rate": "learning_rate/total",
        "moved": "drift/total",
    }
    for ours, facts, total in zip(by_step(readings), theirs, logged(trainer), strict=True):
        assert total["loss"] == pytest.approx(facts["loss"], rel=1e-5)
        for plain in names.keys() & facts.keys():
            assert ours[names[plain]] == pytest.approx(facts[plain], rel=1e-4, abs=1e-7), plain
    assert_same_weights(trainer.model, model)


def test_the_bare_loop_adapts_what_the_adapter_lever_adapts(plain_loop: ModuleType) -> None:
    ours, theirs = Adapter(r=4).wrap(llama()), plain_loop.add_lora(llama(), 4)
    assert trainable(ours) == trainable(theirs)
    assert scales(ours) == scales(theirs) == {2.0}


def trainable(model: Any) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in model.named_parameters() if p.requires_grad}


def scales(model: Any) -> set[float]:
    return {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")}


def test_the_bare_loop_refuses_a_step_that_is_not_finite(plain_loop: ModuleType) -> None:
    model = plain_loop.add_lora(llama(), 4)
    rows = plain_loop.pad([([1, 2, 3], [False, True, True])])
    before = weights(model)
    (facts,) = plain_loop.train(model, [(rows, rows, (math.inf, rows))], 0.0, PEAK, 0, CLIP)
    assert facts["refused"] == 1
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("rises", "verdict"),
    [([0.0, 0.1, 0.2], "PASS"), ([0.9, 1.0, 1.1], "FAIL"), ([0.0, 0.5, 1.0], "INCONCLUSIVE")],
)
def test_the_bare_gate(plain_loop: ModuleType, rises: list[float], verdict: str) -> None:
    """By hand: mean rises 0.1, 1, 0.5; standard errors 0.058, 0.058, 0.289; times 1.645."""
    said = plain_loop.gate(torch.zeros(3), torch.tensor(rises), margin=0.5)
    assert said.startswith(f"{verdict}: ")


def test_the_bare_loop_runs_from_the_command_line(
    plain_loop: ModuleType,
    old_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    llama().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"box {letter}", "completion": f" holds {letter}"} for letter in "abcdef"]
    lesson = write_rows(tmp_path / "lesson.jsonl", rows)
    given = [str(tmp_path / "base"), str(lesson), "--replay", str(old_text)]
    sizes = ["--steps", "3", "--rows", "4", "--r", "2", "--length", "12"]
    out = ["--out", str(tmp_path / "adapter")]
    monkeypatch.setattr(sys, "argv", ["plain_loop.py", *given, *sizes, *out])
    plain_loop.main()
    *steps, verdict = capsys.readouterr().out.splitlines()
    assert [line[:9] for line in steps] == ["step    1", "step    2", "step    3"]
    assert verdict.split(":")[0] in ("PASS", "FAIL", "INCONCLUSIVE")
    tuned = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    assert any(w.any() for name, w in weights(tuned).items() if "lora_B" in name)


class InOrder(SFTTrainer):
    """trl, made to read the rows it is told to: `batches` holds the row numbers of each."""

    batches: list[list[int]]

    def get_train_dataloader(self) -> Any:
        loader = DataLoader(
            self.train_dataset, batch_sampler=self.batches, collate_fn=self.data_collator
        )
        return self.accelerator.prepare(loader)


@pytest.mark.parametrize("method", ["none", "lora"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_without_levers_it_is_trl(tmp_path: Path, method: str, micro_batches: int) -> None:
    readings: list[Reading] = []
    settings = {"learning_rate": PEAK, "lr_scheduler_type": "linear", "max_grad_norm": 0.0}
    trainer = tiny_run(
        [Adapter(method=method, r=4)],
        tmp_path,
        steps=STEPS,
        batch_tokens=128,
        micro_batches=micro_batches,
        record=readings.extend,
        arguments=settings,
    )
    model, mixture = copy.deepcopy(trainer.model), trainer.train_dataset
    trainer.train()

    rows = [rows_of(mixture, step, Role.TASK) for step in range(STEPS)]
    assert len({len(ids) for step in rows for ids, _ in step}) > 6
    numbers = iter(range(sum(map(len, rows))))
    in_order = [[next(numbers) for _ in step] for step in rows]
    theirs = InOrder(
        model,
        SFTConfig(
            str(tmp_path / "trl"),
            **settings,
            warmup_steps=0.05,
            max_steps=STEPS,
            gradient_accumulation_steps=micro_batches,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([record(row) for step in rows for row in step]),
        processing_class=tokenizer(),
    )
    # dealt out otherwise than our micro-batches are, for that must make no difference
    theirs.batches = [step[m::micro_batches] for step in in_order for m in range(micro_batches)]
    theirs.train()

    for ours, log in zip(by_step(readings), logged(theirs), strict=True):
        assert ours["loss/task"] == pytest.approx(log["loss"], rel=1e-5)
        assert ours["grad_norm/total"] == pytest.approx(log["grad_norm"], rel=1e-4)
        assert ours["learning_rate/total"] == pytest.approx(log["learning_rate"], rel=1e-9)
    assert_same_weights(trainer.model, model)


def record(row: Row) -> dict[str, list[int]]:
    ids, learned = row
    labels = [token if ok else -100 for token, ok in zip(ids, learned, strict=True)]
    return {"input_ids": ids, "labels": labels}
