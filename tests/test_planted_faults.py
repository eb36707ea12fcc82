"""Wires crossed on purpose: each is told within a few steps, and a sound run is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from holdfast import model as models
from holdfast.data.example import Example
from holdfast.levers.adapter import Adapter
from holdfast.levers.kl_anchor import KlAnchor
from holdfast.objective import DenseBase
from holdfast.reference import hidden_at
from lab_run import DOMAINS, EVERY, lab_run, texts, write_inputs
from tiny import jsonl


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_inputs(tmp_path_factory.mktemp("lab"))


@pytest.mark.parametrize(
    ("seed", "words"), [(0, ()), (1, ("levers.adapter.method=lora",))], ids=["full", "lora"]
)
def test_a_sound_run_raises_none(
    files: dict[str, Path], tmp_path: Path, words: tuple[str, ...], seed: int
) -> None:
    seen = lab_run(files, tmp_path / "run", *words, seed=seed)
    assert seen.alarms == {}
    assert seen.result.summary["checks"] == 3
    read = [line["evidence"]["canary/stories"]["items"] for line in seen.checks]
    assert read[0] > 0, "and it did look"


def test_replay_of_the_wrong_domain(files: dict[str, Path], tmp_path: Path) -> None:
    one, other = DOMAINS
    rows = [row | {"domain": other} for row in texts(one, "train", 60, 7)]
    crossed = files | {"replay": jsonl(tmp_path / "replay.jsonl", rows)}
    more = ("train.batch_tokens=512", "levers.replay.fraction=0.3")  # some rows of it in each step
    seen = lab_run(crossed, tmp_path / "run", *more)
    # of fewer than 8 rows nothing is said
    assert seen.alarms == {"wiring/replay_strays": 3 * EVERY}


def test_an_adapter_of_rank_zero(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrap = Adapter.wrap

    def without_effect(self: Adapter, model: Any) -> Any:
        wrapped = wrap(self, model)
        for module in wrapped.modules():
            if isinstance(scaling := getattr(module, "scaling", None), dict):
                scaling.update(dict.fromkeys(scaling, 0.0))  # peft itself refuses r = 0
        return wrapped

    monkeypatch.setattr(Adapter, "wrap", without_effect)
    seen = lab_run(files, tmp_path / "run", "levers.adapter.method=lora")
    assert seen.alarms == {"wiring/nothing_moves": EVERY}


def test_a_base_reference_that_points_at_the_tuned_model(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tuned:
        reads_rows = True

        def __init__(self, model: Any) -> None:
            self.model = model

        def view(self, ids: Any, positions: Any, kl: Any) -> DenseBase:
            return DenseBase(hidden_at(self.model, ids, positions, kl), models.head(self.model))

    monkeypatch.setattr(KlAnchor, "_remembered", lambda self, setup: (Tuned(setup.model), ""))
    seen = lab_run(files, tmp_path / "run")
    assert seen.alarms.keys() == {"wiring/base_is_tuned"}


def test_a_hundredfold_learning_rate(files: dict[str, Path], tmp_path: Path) -> None:
    sound = 2e-4
    seen = lab_run(files, tmp_path / "run", f"levers.budget.learning_rate={100 * sound}")
    assert seen.alarms.keys() >= {f"canary/{domain}" for domain in DOMAINS}


def test_labels_that_are_not_masked(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = Example.__init__

    def unmasked(self: Example, input_ids: list[int], loss_mask: list[bool], *more: Any) -> None:
        init(self, input_ids, [False] + [True] * (len(input_ids) - 1), *more)

    monkeypatch.setattr(Example, "__init__", unmasked)
    seen = lab_run(files, tmp_path / "run")
    assert seen.alarms == {"wiring/prompts_trained": EVERY}
