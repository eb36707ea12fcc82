"""The base's view: as the model was when this stage began, whatever training does since."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model

import tiny
from holdfast import model as models
from holdfast.objective import token_kl
from holdfast.reference.adapter_off import AdapterOff
from holdfast.reference.frozen import Frozen

IDS = torch.arange(24).reshape(2, 12) * 5 % tiny.VOCABULARY
POSITIONS = torch.arange(12).expand(2, -1)

METHODS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(r=4, target_modules=["up_proj", "q_proj"], lora_dropout=0.5),
    "dora": lambda: LoraConfig(r=4, target_modules=["up_proj"], use_dora=True),
    "ia3": lambda: IA3Config(target_modules=["up_proj"], feedforward_modules=["up_proj"]),
    "head trained whole": lambda: LoraConfig(
        r=4, target_modules=["up_proj"], modules_to_save=["lm_head"]
    ),
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS, position_ids=POSITIONS).logits
    return out


def seen_by(reference: Any) -> torch.Tensor:
    return reference.head()(reference.hidden_states(IDS, POSITIONS)).detach()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_adapter_off_is_the_base_however_far_the_adapter_moved(method: str, training: bool) -> None:
    base = tiny.tiny("Llama")
    expected = logits(base)
    tuned = get_peft_model(base, METHODS[method]()).train(training)
    reference = AdapterOff(tuned)
    tiny.moved(tuned)
    assert (logits(tuned) - expected).abs().max() > 0.1
    seen = seen_by(reference)
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-6)
    assert all(module.training is training for module in tuned.modules())
    assert (logits(tuned) - expected).abs().max() > 0.1


def test_training_mode_is_restored_when_the_reference_fails() -> None:
    tuned = get_peft_model(tiny.tiny("Llama"), METHODS["lora"]()).train()
    with pytest.raises(IndexError):
        AdapterOff(tuned).hidden_states(IDS + 10_000, POSITIONS)
    assert all(module.training for module in tuned.modules())


def test_the_gradient_of_a_step_is_untouched_by_a_look_at_the_base() -> None:
    """Switching the adapter off and on between forward and backward leaves its gradient as it is.

    Expected: the gradient of the same KL to logits that were noted before.
    """
    base = tiny.tiny("Llama")
    before = models.hidden_states(base, IDS, POSITIONS).detach()
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules=["up_proj"]))
    tiny.moved(tuned)
    reference = AdapterOff(tuned)
    gradients = []
    for look in (False, True):
        hidden = models.hidden_states(tuned, IDS, POSITIONS).flatten(0, 1)
        seen = reference.hidden_states(IDS, POSITIONS) if look else before
        assert not seen.requires_grad
        token_kl(hidden, models.head(tuned), seen.flatten(0, 1), reference.head()).sum().backward()
        trained = {n: p for n, p in tuned.named_parameters() if p.requires_grad}
        assert trained
        gradients.append({n: p.grad.clone() for n, p in trained.items()})
        tuned.zero_grad()
    for name, gradient in gradients[0].items():
        assert gradient.any()
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)


def test_without_an_adapter_adapter_off_refuses() -> None:
    with pytest.raises(ValueError, match="use the frozen reference"):
        AdapterOff(tiny.tiny("Llama"))


@pytest.mark.parametrize("tied", [True, False])
def test_a_frozen_copy_does_not_move(tied: bool) -> None:
    model = tiny.tiny("Llama", tie_word_embeddings=tied).train()
    expected = logits(model)
    reference = Frozen(model)
    tiny.moved(model)
    assert (logits(model) - expected).abs().max() > 0.1
    assert torch.equal(seen_by(reference), expected)
    assert not any(p.requires_grad for p in reference.model.parameters())
    assert not reference.head().trained
    assert model.training


def test_a_second_stage_is_held_to_its_own_start(tmp_path: Path) -> None:
    """Stage one is merged and saved; stage two begins there, and so does its reference."""
    first = get_peft_model(tiny.tiny("Llama"), LoraConfig(r=4, target_modules=["up_proj"]))
    original = logits(tiny.tiny("Llama"))
    tiny.moved(first)
    end_of_first = logits(first)
    folder = tiny.save(tmp_path / "merged", first.merge_and_unload(), tiny.letters())
    settings = models.Model(path=str(folder))
    for wrap, reference in (
        (lambda m: get_peft_model(m, LoraConfig(r=4, target_modules=["up_proj"])), AdapterOff),
        (lambda m: m.requires_grad_(True), Frozen),
    ):
        start = models.load_model(settings, adapter=True, tokenizer=tiny.letters())
        second = wrap(start)
        base = reference(second)
        tiny.moved(second, seed=2)
        torch.testing.assert_close(seen_by(base), end_of_first, rtol=1e-4, atol=1e-5)
        assert (seen_by(base) - original).abs().max() > 0.1
