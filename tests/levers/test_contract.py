"""One contract over every lever and every pair of levers. The only place that knows one by its
name is the table of settings that turn it on: a new lever needs a line there and nothing else.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_run import ALPHABET, gpt2, shake, tiny_run, weights

from holdfast.data.example import Role
from holdfast.levers import Lever, StepState, Term, levers
from holdfast.meters import Reading
from holdfast.step import kl_rows, loss_terms, token_losses
from holdfast.trainer import HoldfastTrainer

ON: dict[str, dict[str, Any]] = {
    "adapter": {"r": 2},
    "balance": {"shares": {"even": 3, "odd": 1}},
    "budget": {"clip": 0.3, "cap": 1e-2, "cap_per_layer": 2e-2, "weight_decay": 0.1},
    "context_frozen": {"enabled": True},
    "ewc": {"weight": 0.5, "rows": 6, "max_new_tokens": 12},
    "forgetting": {"budget": {"canary": "0.01%"}},
    "freeze": {"first_blocks": 1, "presets": ["norms"]},
    "kl_anchor": {"weight": 2.0, "self_generated": {"rows": 8, "max_new_tokens": 12}},
    "l2_sp": {"weight": 0.5},
    "optimizer": {"name": "adamw_torch", "betas": [0.8, 0.95], "decay_to_base": 0.5},
    "replay": {"sources": ["old.jsonl"], "loss": "ntp"},
    "token_gate": {"method": "flow"},
}
NAMES = sorted(levers())
PAIRS = [*((name,) for name in NAMES), *combinations(NAMES, 2)]
each_lever = pytest.mark.parametrize("name", NAMES)
each_pair = pytest.mark.parametrize("names", PAIRS, ids="+".join)


@pytest.fixture(autouse=True)
def _in_a_folder_with_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(7)
    texts = ["".join(draw.choices(ALPHABET, k=draw.randint(5, 18))) for _ in range(20)]
    rows = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "old.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)


def on(*names: str) -> list[Lever]:
    return [levers()[name](**ON[name]) for name in names]


def off(name: str) -> Lever:
    return levers()[name](**levers()[name].OFF)


def by_key(chosen: Sequence[Lever]) -> list[Lever]:
    """In the order in which a recipe gives them."""
    return sorted(chosen, key=lambda lever: lever.key)


@cache
def trained(names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    return after_three_steps(on(*names))


def after_three_steps(chosen: Sequence[Lever]) -> dict[str, torch.Tensor]:
    trainer = tiny_run(by_key(chosen), Path("run"), micro_batches=2)
    trainer.train()
    return weights(trainer.model)


def identical(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_every_lever_is_in_the_table() -> None:
    missing = ", ".join(levers().keys() - ON.keys())
    assert not missing, f"give ON the settings that turn these levers on: {missing}"


@each_lever
def test_turned_on_it_does_something(name: str) -> None:
    assert not identical(trained((name,)), trained(()))


@pytest.mark.parametrize(("name", "beside"), [*((n, None) for n in NAMES), *permutations(NAMES, 2)])
def test_turned_off_it_is_as_if_absent(name: str, beside: str | None) -> None:
    """Bit for bit, alone and beside any other lever."""
    others = (beside,) if beside else ()
    assert identical(after_three_steps([off(name), *on(*others)]), trained(others))


@each_pair
def test_loss_is_the_weighted_sum_of_the_terms(names: tuple[str, ...]) -> None:
    """Each term summed over all micro-batches, divided by its count over all of them."""
    trainer = tiny_run(on(*names), Path("run"), micro_batches=2, steps=1)
    shake(trainer.model)
    terms = [terms_of(trainer, index) for index in range(2)]
    expected = 0.0
    for name in terms[0]:
        first, second = (part[name] for part in terms)
        assert (first.count, first.weight) == (second.count, second.weight)
        expected += first.weight * (first.sum + second.sum).item() / first.count
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


def terms_of(trainer: HoldfastTrainer, index: int) -> dict[str, Term]:
    """The terms of one micro-batch of the first step."""
    mixture = trainer.train_dataset
    parts = [mixture[part]["roles"] for part in range(mixture.micro_batches)]
    totals = {role: sum(int((part == role).sum()) for part in parts) for role in Role}
    state = StepState(0, totals, mixture.micro_batches, trainer.args.seed)
    kl_B = kl_rows(trainer.levers, mixture[index]["input_ids"], state)
    out = token_losses(
        trainer.model, mixture[index], trainer.kl_roles, trainer.reference, kl_B=kl_B
    )
    return loss_terms(out, state, trainer.levers, trainer.lever_memory)


@each_pair
def test_gradients_are_those_of_finite_differences(
    names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Central differences in float64, at the weights with the largest gradient of each term."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    trainer = tiny_run(on(*names), Path("run"), model=gpt2().double(), steps=1)
    shake(trainer.model)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    for name in terms_of(trainer, 0):
        total = terms_of(trainer, 0)[name].sum
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        largest = sorted(
            (
                (float(g.abs().max()), int(g.abs().argmax()), p, g)
                for p, g in zip(parameters, gradients, strict=True)
                if g is not None
            ),
            key=lambda found: -found[0],
        )
        assert largest[0][0] > 1e-3, f"{name} has no gradient"
        for _, place, parameter, gradient in largest[:3]:
            at = parameter.data.view(-1)
            slope = central_difference(partial(total_of, trainer, name), at, place)
            assert slope == pytest.approx(float(gradient.view(-1)[place]), rel=1e-6), name


def total_of(trainer: HoldfastTrainer, name: str) -> float:
    return terms_of(trainer, 0)[name].sum.item()


def central_difference(value: Callable[[], float], at: torch.Tensor, place: int) -> float:
    step = 1e-4
    found = []
    for move in (step, -2 * step):
        at[place] += move
        found.append(value())
    at[place] += step
    return (found[0] - found[1]) / (2 * step)


@each_pair
def test_resumed_it_ends_where_an_uninterrupted_run_ends(names: tuple[str, ...]) -> None:
    """Bit for bit: weights, what levers remember, and every reading after the interruption."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    kept: tuple[list[Reading], list[Reading]] = ([], [])
    whole, resumed = (
        tiny_run(
            on(*names),
            Path("run"),
            steps=4,
            micro_batches=2,
            arguments=saving,
            record=readings.extend,
        )
        for readings in kept
    )
    whole.train()
    resumed.train(resume_from_checkpoint="run/checkpoints/checkpoint-2")
    assert identical(weights(resumed.model), weights(whole.model))
    assert resumed.lever_memory == whole.lever_memory
    assert kept[1] == [reading for reading in kept[0] if reading.step > 2]


@each_lever
def test_settings_never_change_and_survive_json(name: str) -> None:
    kind = levers()[name]
    for lever in (kind(), off(name), *on(name)):
        assert kind.model_validate_json(lever.model_dump_json()) == lever
        for field in kind.model_fields:
            with pytest.raises(ValidationError, match="frozen"):
                setattr(lever, field, getattr(lever, field))


@each_lever
def test_it_says_where_it_comes_from_what_it_acts_on_and_what_it_costs(name: str) -> None:
    facts = sys.modules[levers()[name].__module__].__doc__ or ""
    for fact in (r"^Sources?: ", r"\bActs on: ", r"^Cost: "):
        assert re.search(fact, facts, re.MULTILINE), f"the docstring of {name} needs {fact}"


@each_lever
def test_every_setting_is_explained(name: str) -> None:
    for field, info in levers()[name].model_fields.items():
        assert info.description, f"{name}.{field}: document it with a string beneath it"


def test_a_lever_goes_by_its_file_name_whoever_imports_it() -> None:
    class Toy(Lever):
        """Not in the folder of levers."""

    assert Toy.key == "test_contract"
    assert all(lever.key == name for name, lever in levers().items())
