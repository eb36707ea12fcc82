"""Displacement against the written-out matrices in float64."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

import tiny
from holdfast.errors import RequestError
from holdfast.meters.drift import Displacement, Start

sizes = st.integers(1, 7)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().double().clone()


def adapted(
    out: int, into: int, rank: int, seed: int, zero_start: bool, **fields: Any
) -> tuple[Any, torch.Tensor]:
    """A linear layer with a LoRA pair, and its base weight."""
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(into, out))
    config = LoraConfig(r=rank, target_modules=["0"], init_lora_weights=zero_start, **fields)
    model = get_peft_model(base, config)
    return model, wide(base[0].base_layer.weight)


def product(model: Any) -> torch.Tensor:
    """What peft itself would merge into the base weight."""
    return wide(model.base_model.model[0].get_delta_weight("default"))


@given(
    sizes, sizes, sizes, st.integers(0, 1000), st.booleans(), st.booleans(), st.floats(0.5, 40.0)
)
@settings(max_examples=60, deadline=None)
def test_a_lora_pair_is_as_far_as_its_product(
    out: int, into: int, rank: int, seed: int, zero_start: bool, rslora: bool, alpha: float
) -> None:
    with torch.random.fork_rng():
        model, base = adapted(
            out, into, rank, seed, zero_start, lora_alpha=alpha, use_rslora=rslora
        )
    start, before = Start(model), product(model)
    assert start.displacement().relative == 0.0
    tiny.moved(model, seed=seed + 1)
    found = start.displacement()
    expected = float((product(model) - before).norm())
    assert found.change == {"0": pytest.approx(expected, rel=1e-4, abs=1e-6)}
    assert found.start == {"0": pytest.approx(float(base.norm()), rel=1e-5)}
    assert found.relative == pytest.approx(expected / float(base.norm()), rel=1e-4, abs=1e-6)


@given(sizes, sizes, sizes, st.integers(0, 1000), st.floats(0.0, 1.0))
@settings(max_examples=40, deadline=None)
def test_scaling_a_pair_that_began_at_zero_scales_its_product(
    out: int, into: int, rank: int, seed: int, factor: float
) -> None:
    with torch.random.fork_rng():
        model, _ = adapted(out, into, rank, seed, zero_start=True)
    start = Start(model)
    tiny.moved(model, seed=seed + 1)
    before = product(model)
    start.scale(factor)
    torch.testing.assert_close(product(model), factor * before, rtol=1e-5, atol=1e-7)
    expected = factor * float(before.norm())
    assert start.displacement().change["0"] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_scaling_a_pair_that_began_elsewhere_goes_to_its_start_and_stays_at_its_end() -> None:
    with torch.random.fork_rng():
        model, _ = adapted(5, 4, 2, seed=0, zero_start=False)
    start, first = Start(model), product(model)
    tiny.moved(model)
    last = product(model)
    start.scale(1.0)
    torch.testing.assert_close(product(model), last, rtol=1e-5, atol=1e-6)
    start.scale(0.0)
    torch.testing.assert_close(product(model), first, rtol=1e-5, atol=1e-6)
    assert start.displacement().relative < 1e-6


@given(st.lists(sizes, min_size=1, max_size=4), st.integers(0, 1000), st.floats(0.0, 1.0))
@settings(max_examples=40, deadline=None)
def test_all_weights_together_when_all_are_trained(
    widths: list[int], seed: int, factor: float
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(*(nn.Linear(w, v) for w, v in pairwise(widths)))
        model.append(nn.Linear(2, 3))

    def flat() -> torch.Tensor:
        return torch.cat([wide(p).flatten() for p in model.parameters()])

    before, start = flat(), Start(model)
    tiny.moved(model, seed=seed + 1)
    expected = float((flat() - before).norm() / before.norm())
    found = start.displacement()
    assert found.relative == pytest.approx(expected, rel=1e-4)
    assert set(found.change) == {name for name, _ in model.named_parameters()}
    moved = flat()
    start.scale(factor)
    torch.testing.assert_close(flat(), before + factor * (moved - before), rtol=1e-5, atol=1e-6)
    assert start.displacement().relative == pytest.approx(factor * expected, rel=1e-3, abs=1e-6)


def test_fused_experts_are_as_far_as_the_products_of_all() -> None:
    """A mixture of experts, against the model's own weights after peft has merged the adapter."""
    model = tiny.tiny("Mixtral")
    fused = [n for n, p in model.named_parameters() if p.ndim == 3]
    before = {n: wide(p) for n, p in model.named_parameters()}
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=fused)
    wrapped = get_peft_model(model, config)
    tiny.moved(wrapped)  # B no longer begins at zero
    start, at_start = Start(wrapped), merged(wrapped)
    tiny.moved(wrapped, seed=2)
    found, at_end = start.displacement(), merged(wrapped)
    matrices = [n for n in before if n in fused or "q_proj" in n]
    assert set(found.change) == {n.removesuffix(".weight") for n in matrices}
    assert any("gate_up_proj" in n for n in matrices)
    for name in matrices:
        expected = float((at_end[name] - at_start[name]).norm())
        assert found.change[name.removesuffix(".weight")] == pytest.approx(expected, rel=1e-4)
        norm = float(before[name].norm())
        assert found.start[name.removesuffix(".weight")] == pytest.approx(norm, rel=1e-5)


def merged(wrapped: Any) -> dict[str, torch.Tensor]:
    """The weights with the adapter merged into them, by their names in the base."""
    wrapped.merge_adapter()
    weights = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): wide(parameter)
        for name, parameter in wrapped.named_parameters()
        if "lora_" not in name
    }
    wrapped.unmerge_adapter()
    return weights


def test_a_head_trained_beside_an_adapter_counts_as_it_is() -> None:
    config = LoraConfig(r=2, target_modules=["up_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(tiny.tiny("Llama"), config)
    start, head = Start(model), wide(model.get_output_embeddings().weight)
    tiny.moved(model)
    (name,) = (name for name in start.displacement().change if "lm_head" in name)
    expected = float((wide(model.get_output_embeddings().weight) - head).norm())
    assert start.displacement().change[name] == pytest.approx(expected, rel=1e-5)


def test_readings_are_relative_and_leave_out_what_began_at_zero() -> None:
    found = Displacement({"a": 1.0, "b": 2.0, "bias": 3.0}, {"a": 4.0, "b": 3.0, "bias": 0.0})
    readings = {r.name: r.value for r in found.readings(9)}
    assert readings == {"a": 0.25, "b": 2 / 3, "total": pytest.approx(math.sqrt(14) / 5)}
    assert all((r.meter, r.split, r.step, r.stderr) == ("drift", "train", 9, None)
               for r in found.readings(9))  # fmt: skip
    assert math.isnan(Displacement({"a": 1.0}, {"a": 0.0}).relative)


def singular(change: torch.Tensor) -> list[float]:
    values: list[float] = torch.linalg.svdvals(change.double()).tolist()
    return values


@given(sizes, sizes, st.integers(1, 3), st.integers(0, 1000), st.booleans())
@settings(max_examples=25, deadline=None)
def test_singular_values_of_a_pair_are_those_of_its_product(
    out: int, into: int, rank: int, seed: int, zero_start: bool
) -> None:
    with torch.random.fork_rng():
        model, _ = adapted(out, into, rank, seed, zero_start)
    start, before = Start(model), product(model)
    tiny.moved(model, seed=seed + 1)
    expected = singular(product(model) - before)
    found = sorted(start.spectra()["0"][0].tolist(), reverse=True)
    count = min(len(found), len(expected))
    assert found[:count] == pytest.approx(expected[:count], rel=1e-4, abs=1e-6)
    assert max([0.0, *found[count:], *expected[count:]]) < 1e-6


def test_singular_values_of_all_else_are_those_of_the_change() -> None:
    """Experts of a fused parameter, a matrix, a DoRA layer; no vector has any."""
    model = tiny.tiny("Mixtral")
    start = Start(model)
    before = {n: wide(p) for n, p in model.named_parameters()}
    tiny.moved(model)
    spectra = start.spectra()
    assert set(spectra) == {n for n, p in model.named_parameters() if p.ndim > 1}
    for name, values in spectra.items():
        change = wide(model.get_parameter(name)) - before[name]
        stack = change if change.ndim == 3 else change[None]
        assert len(values) == len(stack)
        for one, expected in zip(values, stack, strict=True):
            assert one.tolist() == pytest.approx(singular(expected), rel=1e-4, abs=1e-5)
    with torch.random.fork_rng():
        dora, base = adapted(5, 4, 2, 0, zero_start=True, use_dora=True)
    start = Start(dora)
    tiny.moved(dora)
    dora.merge_adapter()
    change = wide(dora.base_model.model[0].base_layer.weight) - base
    dora.unmerge_adapter()
    found, expected = start.spectra()["0"][0].tolist(), singular(change)
    assert found[: len(expected)] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert max([0.0, *found[len(expected) :]]) < 1e-6  # the row of the bias, which is not trained


def test_each_expert_moves_by_itself() -> None:
    """Both kinds of training, against the weights of one expert after another."""
    plain = tiny.tiny("Mixtral")
    fused = [n for n, p in plain.named_parameters() if p.ndim == 3]
    before = {n: wide(plain.get_parameter(n)) for n in fused}
    whole = Start(plain)
    with torch.no_grad():
        plain.get_parameter(fused[0])[2] += 0.5
    change, size = whole.experts()[fused[0]]
    assert change.tolist() == pytest.approx(
        [0.0, 0.0, float((0.5 * torch.ones_like(before[fused[0]][2])).norm()), 0.0], rel=1e-4
    )
    assert size.tolist() == pytest.approx([float(e.norm()) for e in before[fused[0]]], rel=1e-5)

    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=fused)
    wrapped = get_peft_model(tiny.tiny("Mixtral"), config)
    start = Start(wrapped)
    tiny.moved(wrapped)
    after = merged(wrapped)
    found = start.experts()
    assert set(found) == set(fused)
    for name, (change, size) in found.items():
        expected = [float(e.norm()) for e in after[name] - before[name]]
        assert change.tolist() == pytest.approx(expected, rel=1e-4)
        assert size.tolist() == pytest.approx([float(e.norm()) for e in before[name]], rel=1e-5)


def test_blocks_are_their_tensors_together() -> None:
    change = {"model.layers.0.a.weight": 3.0, "model.layers.0.experts.7.b": 4.0, "embed": 9.0}
    sizes = {"model.layers.0.a.weight": 6.0, "model.layers.0.experts.7.b": 8.0, "embed": 1.0}
    found = Displacement(change, sizes)
    assert found.by_block == {"model.layers.0": 0.5}
    assert {r.name: r.value for r in found.readings(1) if r.meter == "drift_block"} == {
        "model.layers.0": 0.5
    }


class TestOfTuned:
    """Two checkpoints that some other tool made."""

    def test_an_adapter_adds_all_that_it_does(self) -> None:
        """Trained or not: as far as its merged weights are from the base's."""
        base = tiny.tiny("Llama")
        config = LoraConfig(r=2, target_modules=["up_proj"], modules_to_save=["lm_head"])
        model = get_peft_model(tiny.tiny("Llama"), config)
        tiny.moved(model)
        model.requires_grad_(False)
        found, after = Start.of_tuned(model, base).displacement(), merged(model)
        names = [n for n, _ in base.named_parameters() if "up_proj" in n or "lm_head" in n]
        assert len(names) == 3
        assert set(found.change) == {n.removesuffix(".weight") if "up" in n else n for n in names}
        for name in names:
            key = name.removesuffix(".weight") if "up" in name else name
            now = after[name] if name in after else after["lm_head.modules_to_save.default.weight"]
            expected = float((now - wide(base.get_parameter(name))).norm())
            assert found.change[key] == pytest.approx(expected, rel=1e-4)
            norm = float(wide(base.get_parameter(name)).norm())
            assert found.start[key] == pytest.approx(norm, rel=1e-5)

    @pytest.mark.parametrize("fields", [{"use_dora": True}, {}])
    def test_any_adapter_by_itself(self, fields: dict[str, Any]) -> None:
        """Without the base, which lies below it; a LoRA pair that did not begin at zero."""
        with torch.random.fork_rng():
            model, base = adapted(5, 4, 2, 0, zero_start=bool(fields), **fields)
        tiny.moved(model)
        found = Start.of_tuned(model)
        model.merge_adapter()
        change = wide(model.base_model.model[0].base_layer.weight) - base
        model.unmerge_adapter()
        assert found.displacement().change == {"0": pytest.approx(float(change.norm()), rel=1e-4)}
        values = singular(change)
        assert found.spectra()["0"][0, 0] == pytest.approx(values[0], rel=1e-4)

    def test_full_weights_are_compared_by_name(self) -> None:
        base, model = tiny.tiny("Llama"), tiny.tiny("Llama")
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight += 0.1
        found = Start.of_tuned(model, base)
        name = "model.layers.1.mlp.up_proj.weight"
        size = math.sqrt(base.get_parameter(name).numel())
        assert found.displacement().change == {name: pytest.approx(0.1 * size, rel=1e-4)}
        assert found.spectra()[name][0, 0] == pytest.approx(0.1 * size, rel=1e-4)
        assert Start.of_tuned(base, base).displacement().relative == 0.0

    def test_of_a_resized_vocabulary_the_rows_of_both(self) -> None:
        base, model = tiny.tiny("Llama"), tiny.tiny("Llama")
        model.resize_token_embeddings(tiny.VOCABULARY + 4)
        with torch.no_grad():
            model.get_input_embeddings().weight[:2] += 1.0
        found = Start.of_tuned(model, base).displacement()
        assert found.change == {"model.embed_tokens.weight": pytest.approx(math.sqrt(2 * 32))}

    def test_another_architecture_is_refused(self) -> None:
        with pytest.raises(RequestError, match=r"_proj.weight' is \(.*48.*\) .* \(.*64.*\) in the"):
            Start.of_tuned(tiny.tiny("Llama"), tiny.tiny("Llama", intermediate_size=64))
        with pytest.raises(RequestError, match="not there in the base"):
            Start.of_tuned(tiny.tiny("Qwen2"), tiny.tiny("Llama"))
