"""A second copy of the weights: in another precision, on another device, and never moving."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from looking import EVERY, IDS, POSITIONS, logits, seen_by
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from holdfast.errors import RequestError
from holdfast.reference import frozen
from holdfast.reference.frozen import Frozen, held_in, size
from holdfast.reference.int8 import Int8Linear


@pytest.mark.parametrize("tied", [True, False])
def test_it_does_not_move(tied: bool) -> None:
    model = tiny.tiny("Llama", tie_word_embeddings=tied).train()
    expected = logits(model)
    reference = Frozen.copy_of(model)
    tiny.moved(model)
    assert (logits(model) - expected).abs().max() > 0.1
    assert torch.equal(seen_by(reference), expected)
    assert not any(p.requires_grad for p in reference.model.parameters())
    assert not reference.view(IDS, POSITIONS, EVERY).head.trained
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    copied = reference.model.get_input_embeddings().weight
    assert (copied is reference.model.get_output_embeddings().weight) is tied


@pytest.mark.parametrize("name", tiny.EXTRA)
def test_every_architecture_is_copied_at_any_precision(name: str) -> None:
    """Expected: the model's own logits; the tolerances are those of 8 and 7 bits a weight."""
    model = tiny.tiny(name)
    expected = logits(model).log_softmax(-1)
    for dtype, most in (("float32", 1e-6), ("bfloat16", 0.05), ("int8", 0.05)):
        seen = seen_by(Frozen.copy_of(model, dtype)).log_softmax(-1)  # type: ignore[arg-type]
        kl = (expected.exp() * (expected - seen)).sum(-1).mean()
        assert 0 <= float(kl.clamp(min=0)) <= most, (dtype, float(kl))
    assert torch.equal(logits(model).log_softmax(-1), expected), "the model itself is as it was"


def held(module: torch.nn.Module) -> int:
    tensors = {t.data_ptr(): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def test_int8_holds_the_layers_in_a_byte_a_weight() -> None:
    model = tiny.tiny("Llama")
    copied = Frozen.copy_of(model, "int8").model
    matrices = [m.weight for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    inside = [m for m in copied.modules() if isinstance(m, Int8Linear)]
    assert len(inside) == len(matrices) == 2 * 7
    saved = sum(3 * w.numel() - 4 * w.shape[0] for w in matrices)
    assert held(model) - held(copied) == saved


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", ["Llama", "GPT2", "Qwen2"])
def test_the_size_told_beforehand_is_that_of_the_copy(name: str, dtype: Any) -> None:
    model = tiny.tiny(name)
    copied = Frozen.copy_of(model, dtype).model
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert size(model, dtype, "cpu") + buffers == held(copied)


def test_a_copy_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: the copy, gradients and two moments are four times the weights."""
    model = tiny.tiny("Llama")
    weights = 4 * sum(p.numel() for p in model.parameters())
    for free, device, fits in (
        (4 * weights, None, True),
        (4 * weights - 1, None, False),
        (4 * weights, "cpu", True),
    ):
        monkeypatch.setattr(frozen, "free_memory", lambda _device, free=free: free)
        with nullcontext() if fits else pytest.raises(RequestError, match=r"offload.*int8.*cache"):
            frozen.check_room(model, "float32", device)
    monkeypatch.undo()
    assert frozen.free_memory(torch.device("cpu")) > 2**20


def test_a_row_of_zeros_stays_zero_in_int8() -> None:
    layer = Int8Linear(torch.tensor([[0.0, 0.0], [1.0, -2.0]]), torch.tensor([0.5, 0.0]))
    out = layer(torch.tensor([[1.0, 1.0]]))
    torch.testing.assert_close(out, torch.tensor([[0.5, -1.0]]), rtol=0, atol=1 / 127)


def test_int8_of_a_model_with_an_adapter_is_refused() -> None:
    tuned = get_peft_model(tiny.tiny("Llama"), LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(RequestError, match=r"reference_dtype: int8.*bfloat16"):
        Frozen.copy_of(tuned, "int8")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("device", ["cpu", "offload"])
def test_wherever_it_lies_it_sees_the_same(device: str, tied: bool) -> None:
    model = tiny.tiny("Llama", tie_word_embeddings=tied)
    expected = logits(model)
    reference = Frozen.copy_of(model, device=device)
    tiny.moved(model)
    assert torch.equal(seen_by(reference), expected)
    on_meta = {p.device.type for p in reference.model.model.layers.parameters()}
    assert on_meta == ({"meta"} if device == "offload" else {"cpu"})


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "cuda:-3"])
def test_a_device_that_is_not_there_is_named(device: str) -> None:
    with pytest.raises(RequestError, match=rf"reference_device: '{device}'.*cpu.*offload"):
        Frozen.copy_of(tiny.tiny("Llama"), device=device)


@pytest.mark.parametrize(
    ("asked", "weights", "home", "held"),
    [
        ("auto", torch.float32, "cpu", torch.float32),
        ("auto", torch.float32, "cuda", torch.bfloat16),
        ("float32", torch.bfloat16, "cuda", torch.float32),
        ("bfloat16", torch.float32, "cpu", torch.bfloat16),
        ("int8", torch.float32, "cuda", torch.bfloat16),
    ],
)
def test_what_it_is_held_in(asked: Any, weights: Any, home: str, held: Any) -> None:
    assert held_in(asked, weights, home) is held


class Watch(TorchDispatchMode):
    """Notes the dtype of every new tensor that has the shape of some weight of a model's."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.shapes = {p.shape for p in model.parameters() if p.ndim == 2}
        self.own = {p.data_ptr() for p in model.parameters()}
        self.made = set[torch.dtype]()

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kw: Any = None) -> Any:
        out = func(*args, **(kw or {}))
        new = isinstance(out, torch.Tensor) and out.data_ptr() not in self.own
        if new and out.shape in self.shapes:
            self.made.add(out.dtype)
        return out


def test_on_the_way_to_bfloat16_no_third_copy_is_made() -> None:
    model = tiny.tiny("Llama", tie_word_embeddings=False)
    with Watch(model) as watch:
        Frozen.copy_of(model, "bfloat16")
    assert watch.made == {torch.bfloat16}
