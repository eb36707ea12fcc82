"""The budget: the learning rate it chooses, the steps it refuses, the ball it keeps weights in."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import Jolt, llama, shake, tiny_run, weights
from transformers import LlamaConfig, TrainerCallback

from holdfast.data.example import Role
from holdfast.errors import HoldfastError, RequestError
from holdfast.levers import Memory, StepContext, StepState, TokenLosses
from holdfast.levers.adapter import Adapter
from holdfast.levers.budget import HISTORY, PATIENCE, WARMED_UP, Budget
from holdfast.levers.kl_anchor import KlAnchor
from holdfast.meters import Reading
from holdfast.meters.drift import Start
from holdfast.recipe import load_recipe


@pytest.mark.parametrize(
    ("hidden", "lora"),
    # 5e-4 (2000 / H)^0.781 by bc -l: e(0.781 * l(2000 / H))
    [(2000, 5e-4), (4096, 2.85641504e-4), (32, 1.2634332e-2)],
)
def test_automatic_learning_rate(hidden: int, lora: float) -> None:
    config = LlamaConfig(hidden_size=hidden, num_attention_heads=4)
    assert Budget().peak(config, adapter=True) == pytest.approx(lora, rel=1e-5)
    assert Budget().peak(config, adapter=False) == pytest.approx(lora / 10, rel=1e-5)
    assert Budget(learning_rate=3e-5).peak(config, adapter=True) == 3e-5


class Watch(TrainerCallback):
    """Weights and optimizer state before and after each step."""

    def __init__(self) -> None:
        self.before: list[Any] = []
        self.after: list[Any] = []

    def on_step_begin(self, *_: Any, model: Any, optimizer: Any, **kwargs: Any) -> None:
        self.before.append(self._seen(model, optimizer))

    def on_step_end(self, *_: Any, model: Any, optimizer: Any, **kwargs: Any) -> None:
        self.after.append(self._seen(model, optimizer))

    def _seen(self, model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
        moments = {
            f"{parameter}/{name}": value.clone()
            for parameter, state in optimizer.state_dict()["state"].items()
            for name, value in state.items()
        }
        return weights(model) | moments

    def moved(self, step: int) -> bool:
        before, after = self.before[step], self.after[step]
        return before.keys() != after.keys() or any(
            not torch.equal(before[name], after[name]) for name in before
        )


@pytest.mark.parametrize("method", ["lora", "none"])
@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("factor", [math.nan, math.inf, 1e4])
def test_a_refused_step_leaves_no_trace(
    tmp_path: Path, method: str, clip: float, factor: float
) -> None:
    """Neither in the weights nor in the optimizer's moments and step count."""
    bad, steps = WARMED_UP + 1, WARMED_UP + 3
    watch, readings = Watch(), list[Reading]()
    trainer = tiny_run(
        [Adapter(method=method, r=2), Budget(clip=clip, weight_decay=0.1), jolt(factor, bad)],
        tmp_path,
        steps=steps,
        callbacks=[watch],
        record=readings.extend,
    )
    trainer.train()
    # step 0 has learning rate 0 (warm-up), but its moments move
    assert [step for step in range(steps) if not watch.moved(step)] == [bad]
    assert len(trainer.refused) == trainer.lever_memory["budget"]["refused"] == 1
    counted = [r.value for r in readings if r.meter == "refused_steps"]
    assert counted == [0.0] * bad + [1.0] * (steps - bad)
    assert len(trainer.lever_memory["budget"]["grad_norms"]) == steps - 1


def jolt(factor: float, *steps: int) -> Jolt:
    return Jolt(factor=factor, steps=steps)


def test_without_the_spike_rule_a_spike_passes(tmp_path: Path) -> None:
    bad = WARMED_UP + 1
    trainer = tiny_run([Budget(spike=0.0), jolt(1e4, bad)], tmp_path, steps=bad + 1)
    trainer.train()
    assert trainer.refused == []


def test_broken_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    trainer = tiny_run([Budget(), jolt(math.nan, *range(40))], tmp_path, steps=40)
    before = weights(trainer.model)
    with pytest.raises(HoldfastError, match=r"25 steps in a row were refused \(non-finite grad"):
        trainer.train()
    assert trainer.state.global_step == PATIENCE - 1
    torch.testing.assert_close(weights(trainer.model), before, rtol=0, atol=0)


def refusals(budget: Budget, norms: list[float]) -> list[bool]:
    """Which of these gradient norms are refused."""
    memory: Memory = {}
    found = []
    for step, norm in enumerate(norms):
        ctx = StepContext(None, step, norm, None)
        budget.before_step(ctx, memory)
        found.append(bool(ctx.refused))
    return found


def test_patience_starts_anew_with_each_good_step() -> None:
    norms = ([math.inf] * (PATIENCE - 1) + [1.0]) * 3
    assert refusals(Budget(), norms) == [math.isinf(norm) for norm in norms]


def test_spikes_are_measured_by_the_median_of_the_last_accepted() -> None:
    warm = [1.0] * WARMED_UP
    assert refusals(Budget(), [*warm[1:], 99.0]) == [False] * WARMED_UP
    assert refusals(Budget(), [*warm, 10.0, 10.1, 11.0])[-3:] == [False, True, True]
    assert refusals(Budget(spike=20.0), [*warm, 19.0, 21.0])[-2:] == [False, True]
    # once the last 64 are all 5, the ones are forgotten
    assert not any(refusals(Budget(), [*warm, *[5.0] * HISTORY, 49.0]))


@pytest.mark.parametrize("method", ["lora", "none"])
def test_the_cap_holds_after_every_step(tmp_path: Path, method: str) -> None:
    cap, readings = 0.005, list[Reading]()
    trainer = tiny_run(
        [Adapter(method=method, r=2), Budget(cap=cap)], tmp_path, steps=6, record=readings.extend
    )
    trainer.train()
    moved = [r.value for r in readings if (r.meter, r.name) == ("drift", "total")]
    assert max(moved) <= cap * (1 + 1e-6)
    assert trainer.lever_memory["budget"]["capped"] >= 2


@pytest.mark.parametrize("method", ["lora", "none"])
def test_the_cap_pulls_back_along_a_straight_line(method: str) -> None:
    """Against the merged matrices: each keeps its direction, and all shrink by one factor."""
    base = llama()
    model = Adapter(method=method, r=2).wrap(copy.deepcopy(base))
    start = Start(model)
    shake(model)
    change = displacements(model, base)
    relative = norm(change) / norm({name: weights(base)[name] for name in change})
    memory: Memory = {}
    Budget(cap=relative / 4).after_step(StepContext(model, 1, 1.0, start), memory)
    torch.testing.assert_close(
        displacements(model, base), {n: d / 4 for n, d in change.items()}, rtol=1e-4, atol=1e-6
    )
    assert memory == {"capped": 1}
    Budget(cap=relative).after_step(StepContext(model, 2, 1.0, start), memory)
    assert memory == {"capped": 1}


def displacements(model: Any, base: Any) -> dict[str, torch.Tensor]:
    """What was added to each trained matrix, read off the merged model."""
    merged = copy.deepcopy(model)
    merged = merged.merge_and_unload() if hasattr(merged, "merge_and_unload") else merged
    ours, theirs = weights(merged), weights(base)
    return {n: ours[n] - theirs[n] for n in theirs if not torch.equal(ours[n], theirs[n])}


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return math.hypot(*(float(tensor.norm()) for tensor in tensors.values()))


def test_a_cap_without_a_size_to_relate_to_is_refused() -> None:
    """A trained bias that starts at zero."""
    layer = torch.nn.Linear(3, 2)
    torch.nn.init.zeros_(layer.bias)
    layer.weight.requires_grad_(False)
    start = Start(layer)
    with pytest.raises(RequestError, match=r"levers.budget.cap: what is trained starts at zero"):
        Budget(cap=0.1).after_step(StepContext(layer, 1, 1.0, start), {})


METHODS: list[dict[str, Any]] = [
    {"method": "none"},
    {"r": 2},
    {"r": 2, "config": {"init_lora_weights": False}},
    {"method": "dora", "r": 2},
    {"method": "oft", "config": {"oft_block_size": 4}},
    {"method": "osf"},
]
each_method = pytest.mark.parametrize("settings", METHODS, ids=str)


@each_method
def test_caps_hold_in_total_and_by_layer(settings: dict[str, Any]) -> None:
    """Whatever moved, against the merged matrices; nothing within both caps is touched."""
    base = llama()
    model = Adapter(**settings).wrap(copy.deepcopy(base))
    began = displacements(model, base)
    start = Start(model)
    shake(model)
    by_tensor, total = start.displacement().by_tensor, start.displacement().relative
    layer = sorted(by_tensor.values())[len(by_tensor) // 2]
    memory: Memory = {}
    Budget(cap_per_layer=layer).after_step(StepContext(model, 1, 1.0, start), memory)
    after = start.displacement().by_tensor
    assert max(after.values()) <= layer * (1 + 1e-5)
    within = [name for name, moved in by_tensor.items() if moved <= layer]
    assert within
    assert {n: after[n] for n in within} == {n: by_tensor[n] for n in within}
    Budget(cap=total / 3).after_step(StepContext(model, 2, 1.0, start), memory)
    assert memory == {"capped": 2}
    assert start.displacement().relative <= total / 3 * (1 + 1e-5)
    now, sizes = displacements(model, base), start.displacement().start
    change = {n: now[n] - began.get(n, torch.zeros(())) for n in now}
    found = norm(change) / math.hypot(*sizes.values())
    assert found == pytest.approx(start.displacement().relative, rel=2e-3)


@each_method
def test_the_caps_hold_in_a_run(tmp_path: Path, settings: dict[str, Any]) -> None:
    budget = Budget(cap=0.004, cap_per_layer=0.005)
    trainer = tiny_run([Adapter(**settings), budget], tmp_path, steps=5)
    trainer.train()
    found = trainer.start.displacement()
    assert found.relative <= 0.004 * (1 + 1e-4)
    assert max(found.by_tensor.values()) <= 0.005 * (1 + 1e-4)
    assert trainer.lever_memory["budget"]["capped"] >= 1


def anchored(folder: Path, **settings: Any) -> tuple[Any, list[Reading]]:
    """A run that flees from the base, with its readings."""
    readings: list[Reading] = []
    anchor = KlAnchor(weight=1e-6, self_generated={"rows": 8, "max_new_tokens": 12})
    trainer = tiny_run(
        [Adapter(method="none"), Budget(warmup=0.0, **settings), anchor],
        folder,
        steps=10,
        micro_batches=2,
        arguments={"learning_rate": 1e-2, "lr_scheduler_type": "constant"},
        record=readings.extend,
    )
    trainer.train()
    return trainer, readings


def test_a_ceiling_on_kl_draws_back(tmp_path: Path) -> None:
    free, without = anchored(tmp_path / "free")
    held, under = anchored(tmp_path / "held", kl_cap=0.05)
    kl, capped = ([r.value for r in found if "kl_anchor" in r.name] for found in (without, under))
    assert "kl_capped" not in free.lever_memory["budget"]
    assert kl[-1] > 0.2, "or there is nothing to hold"
    # each step starts no further than one step's move beyond the ceiling
    one_step = max(after - before for before, after in pairwise(kl))
    assert max(capped) <= 0.05 + one_step
    assert capped[-1] < kl[-1] / 2
    assert held.lever_memory["budget"]["kl_capped"] >= 2


def test_kl_is_the_mean_over_the_micro_batches_of_a_step() -> None:
    """By hand: (0.1 + 0.5 + 0.3) / 3 = 0.3, whose root ratio to 0.075 is 1 / 2."""
    budget, memory = Budget(kl_cap=0.075), {}
    task, anchor = int(Role.TASK), int(Role.ANCHOR)
    state = StepState(4, {}, 2)
    for values, roles in (([0.1, 9.0, 0.5], [anchor, task, anchor]), ([0.3], [anchor])):
        out = TokenLosses(*torch.zeros(2, 0), torch.tensor(values), torch.tensor(roles))
        assert budget.terms(out, state, memory) == {}
    layer = torch.nn.Linear(3, 2)
    start, before = Start(layer), layer.weight.detach().clone()
    shake(layer)
    moved = layer.weight.detach() - before
    budget.after_step(StepContext(layer, 5, 1.0, start), memory)
    torch.testing.assert_close(layer.weight.detach() - before, moved / 2, rtol=1e-5, atol=1e-7)
    assert memory == {"kl_capped": 1}
    budget.after_step(StepContext(layer, 6, 1.0, start), memory)  # no anchor row in this step
    assert memory == {"kl_capped": 1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["levers.budget.kl_cap=0.1", "levers.kl_anchor=none"], r"kl_cap: is measured on anchor"),
        (["levers.budget.kl_cap=0.1", "levers.kl_anchor.on=task"], r"kl_cap: is measured on"),
        (["levers.budget.patience=2"], r"patience"),  # it is of `train`
        (["levers.budget.cap_per_layer=0"], r"cap_per_layer.*0"),
        (["levers.budget.learning_rate=0"], r"learning_rate: 0 .*greater than 0"),
        (["levers.budget.learning_rate=-0.001"], r"learning_rate: -0.001 .*greater than 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        load_recipe(None, words, model="m", data="d.jsonl")
