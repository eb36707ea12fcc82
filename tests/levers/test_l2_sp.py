"""L2-SP against the written-out matrices that peft would merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_run import llama, shake, tiny_run, tokenizer
from torch import Tensor, nn

import tiny
from holdfast.displacement import Moved, Product, moved
from holdfast.errors import RequestError
from holdfast.levers import Setup, StepState, TokenLosses
from holdfast.levers.adapter import Adapter
from holdfast.levers.l2_sp import L2Sp

NO_LOSSES = TokenLosses(*torch.zeros(4, 0))
ELSEWHERE = {"init_lora_weights": False}


def merged(model: Any) -> list[Tensor]:
    """What peft itself would add to each matrix, in float64; and what is trained as it is."""
    found, inside = [], set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            found.append(module.get_delta_weight("default").detach().double().clone())
            inside |= {id(p) for n, p in module.named_parameters() if "base_layer" not in n}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]
    return found + [p.detach().double().clone() for p in rest]


def value(changes: dict[str, Moved]) -> Tensor:
    return torch.stack([change.quadratic() for change in changes.values()]).sum()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Llama", {"method": "none"}),
        ("Llama", {}),
        ("Llama", {"config": {"use_rslora": True, **ELSEWHERE}}),
        ("Llama", {"config": {"modules_to_save": ["lm_head"]}}),
        ("Llama", {"target": ["embed_tokens", "q_proj"]}),
        ("GPT2", {"target": "all-linear", "config": ELSEWHERE}),
        ("Mixtral", {}),
        ("Mixtral", {"config": ELSEWHERE}),
        ("Llama", {"method": "loha"}),
        ("Llama", {"method": "lokr"}),
        ("Llama", {"method": "adalora", "r": None, "config": {"total_step": 10}}),
    ],
)
def test_it_is_the_squared_distance_of_what_is_merged(name: str, settings: dict[str, Any]) -> None:
    """And its gradient that of central differences along a random direction, in float64."""
    model: Any = Adapter(**{"r": 3} | settings).wrap(tiny.tiny(name).double())
    model.double()
    before = merged(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        changes = moved(model, "levers.l2_sp")
        assert value(changes).item() == 0.0
        tiny.moved(model)
        distances = [(a - b).square().sum() for a, b in zip(merged(model), before, strict=True)]
        expected = float(torch.stack(distances).sum())
        assert expected > 0
        assert value(changes).item() == pytest.approx(expected, rel=1e-9)
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(value(changes), trained, allow_unused=True)
        random = torch.Generator().manual_seed(2)
        ways = [torch.randn(p.shape, generator=random, dtype=p.dtype) for p in trained]
        slope = sum(
            float((g * way).sum()) for g, way in zip(gradients, ways, strict=True) if g is not None
        )
        ends = []
        for step in (1e-5, -2e-5):
            for p, way in zip(trained, ways, strict=True):
                p.data += step * way
            ends.append(value(changes).item())
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 4), st.booleans(), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_small_moves_from_a_start_elsewhere_do_not_cancel(
    out: int, into: int, r: int, elsewhere: bool, seed: int
) -> None:
    """By a thousandth, in float32: a difference of squares would have no digit left."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(r=r, target_modules=["0"], init_lora_weights=not elsewhere)
        model: Any = get_peft_model(nn.Sequential(nn.Linear(into, out)), config)
    (change,) = moved(model, "levers.l2_sp").values()
    assert isinstance(change, Product)
    start = [change.b_start.double(), change.a_start.double()]
    tiny.moved(model, 1e-3, seed)
    expected = change.scale * (change.b.double() @ change.a.double() - start[0] @ start[1])
    assert change.quadratic().item() == pytest.approx(expected.square().sum().item(), rel=2e-3)


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("lora", {"use_dora": True}),
        ("oft", {"oft_block_size": 8}),
        ("ia3", {"feedforward_modules": ["up_proj", "down_proj"]}),
    ],
)
def test_a_change_that_is_no_matrix_is_refused_in_one_line(
    method: str, config: dict[str, Any]
) -> None:
    target = ["up_proj", "down_proj"]
    model = Adapter(method=method, target=target, config=config).wrap(llama())
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RequestError, match=r"levers\.l2_sp: .*not a matrix added") as caught:
        moved(model, "levers.l2_sp")
    assert len(caught.value.problems) == 1
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_its_term_is_counted_once_a_step() -> None:
    lever = L2Sp(weight=0.3)
    model = Adapter(method="none").wrap(llama())
    lever.prepare(Setup(model, tokenizer(), Path(), 0, 24))
    before = merged(model)
    shake(model)
    (term,) = lever.terms(NO_LOSSES, StepState(0, {}, micro_batches=4), {}).values()
    distance = sum(
        float((a - b).square().sum()) for a, b in zip(merged(model), before, strict=True)
    )
    assert term.sum.item() == pytest.approx(distance / 2, rel=1e-5)
    assert (term.count, term.weight) == (4, 0.3)


def test_a_strong_pull_keeps_the_weights_nearer(tmp_path: Path) -> None:
    found = {}
    for weight in (0.0, 100.0):
        trainer = tiny_run([Adapter(r=2), L2Sp(weight=weight)], tmp_path / str(weight), steps=6)
        trainer.train()
        found[weight] = trainer.start.displacement().relative
    assert found[100.0] < 0.7 * found[0.0]


def test_off() -> None:
    lever = L2Sp()
    lever.prepare(Setup(llama(), tokenizer(), Path(), 0, 24))
    assert lever == L2Sp(**L2Sp.OFF), "off unless asked for, and nothing is remembered"
    assert lever.terms(NO_LOSSES, StepState(0, {}, 1), {}) == {}
