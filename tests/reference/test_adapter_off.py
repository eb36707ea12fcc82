"""The base's view through a switched-off adapter: the start of this stage, whatever comes after."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from looking import EVERY, IDS, POSITIONS, logits, seen_by
from peft import IA3Config, LoraConfig, get_peft_model

import tiny
from holdfast import model as models
from holdfast.reference.adapter_off import AdapterOff
from holdfast.reference.frozen import Frozen


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(r=4, **{"target_modules": ["up_proj", "q_proj"], **settings})


METHODS: dict[str, Callable[[], Any]] = {
    "lora": lambda: lora(lora_dropout=0.5),
    "dora": lambda: lora(use_dora=True),
    "ia3": lambda: IA3Config(target_modules=["up_proj"], feedforward_modules=["up_proj"]),
    "head trained whole": lambda: lora(modules_to_save=["lm_head"]),
    "tokens trained": lambda: lora(trainable_token_indices=[3, 5]),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_it_is_the_base_however_far_the_adapter_moved(method: str, training: bool) -> None:
    base = tiny.tiny("Llama", tie_word_embeddings=False)
    expected = logits(base)
    tuned = get_peft_model(base, METHODS[method]()).train(training)
    reference = AdapterOff(tuned)
    tiny.moved(tuned)
    trained = {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert (logits(tuned.eval()) - expected).abs().max() > 0.1
    tuned.train(training)
    torch.testing.assert_close(seen_by(reference), expected, rtol=0, atol=1e-6)
    assert all(module.training is training for module in tuned.modules())
    assert {name for name, p in tuned.named_parameters() if p.requires_grad} == trained
    assert (logits(tuned.eval()) - expected).abs().max() > 0.1


def test_it_sees_the_positions_asked_for_in_row_major_order() -> None:
    """Expected: the whole view, masked. Rows without a position do not pass through the model."""
    tuned = get_peft_model(tiny.tiny("Llama"), lora())
    reference = AdapterOff(tuned)
    whole = reference.view(IDS, POSITIONS, EVERY).hidden_MH.reshape(2, 12, -1)
    some = torch.zeros_like(EVERY)
    some[1, [2, 7, 11]] = True
    rows: list[int] = []
    hook = tuned.register_forward_pre_hook(
        lambda _module, _args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    torch.testing.assert_close(reference.view(IDS, POSITIONS, some).hidden_MH, whole[some])
    none = reference.view(IDS, POSITIONS, torch.zeros_like(EVERY))
    hook.remove()
    assert rows == [1]
    assert none.hidden_MH.shape == (0, tiny.SIZE["hidden_size"])


def test_training_mode_is_restored_when_it_fails() -> None:
    tuned = get_peft_model(tiny.tiny("Llama"), lora()).train()
    reference = AdapterOff(tuned)
    tiny.moved(tuned)
    before = logits(tuned)
    with pytest.raises(IndexError):
        reference.view(IDS + 10_000, POSITIONS, EVERY)
    assert all(module.training for module in tuned.modules())
    torch.testing.assert_close(logits(tuned), before)


def test_the_gradient_of_a_step_is_untouched_by_a_look_at_the_base() -> None:
    """Switching off and on between forward and backward leaves the gradient as it is.

    Expected: the gradient of the same divergence to a view that was noted before.
    """
    tuned = get_peft_model(tiny.tiny("Llama"), lora())
    reference = AdapterOff(tuned)
    noted = seen_by(reference).softmax(-1)
    tiny.moved(tuned)
    gradients = []
    for look in (False, True):
        out = tuned(input_ids=IDS, position_ids=POSITIONS).logits.log_softmax(-1)
        base = seen_by(reference).softmax(-1) if look else noted
        torch.nn.functional.kl_div(out, base, reduction="sum").backward()
        trained = {n: p for n, p in tuned.named_parameters() if p.requires_grad}
        gradients.append({n: p.grad.clone() for n, p in trained.items()})
        tuned.zero_grad()
    assert gradients[0]
    for name, gradient in gradients[0].items():
        assert gradient.any()
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)


def stacked() -> tuple[Any, torch.Tensor]:
    """Stage one trained and frozen, stage two on top of it; and the logits of stage one merged."""
    model = get_peft_model(tiny.tiny("Llama"), lora(lora_dropout=0.5), adapter_name="one")
    tiny.moved(model)
    end_of_one = logits(copy.deepcopy(model).eval().merge_and_unload())
    model.add_adapter("two", lora(target_modules=["up_proj", "down_proj"]))
    model.base_model.set_adapter(["one", "two"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".two." in name)
    return model, end_of_one


def test_a_stage_stacked_on_an_earlier_one_is_held_to_its_own_start() -> None:
    """Expected: the base merged with stage one alone by peft, never the original base."""
    original = logits(tiny.tiny("Llama"))
    model, end_of_one = stacked()
    model.train()
    references = [AdapterOff(model), Frozen.copy_of(model)]
    tiny.moved(model, seed=2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for reference in references:
        torch.testing.assert_close(seen_by(reference), end_of_one, rtol=1e-4, atol=1e-4)
        assert (seen_by(reference) - original).abs().max() > 0.1
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".two." in name for name in trained)


def test_a_second_stage_on_a_merged_one_is_held_to_its_own_start() -> None:
    first = get_peft_model(tiny.tiny("Llama"), lora())
    stage_one = AdapterOff(first)
    original = seen_by(stage_one)
    tiny.moved(first)
    second = get_peft_model(first.merge_and_unload(), lora())
    end_of_one = logits(second)
    stage_two = AdapterOff(second)
    tiny.moved(second, seed=2)
    torch.testing.assert_close(seen_by(stage_two), end_of_one)
    assert (end_of_one - original).abs().max() > 0.1


def unmoved_adapter_trained_on() -> Any:
    """A trained adapter that is trained further: without it the model is the original base."""
    model = get_peft_model(tiny.tiny("Llama"), lora())
    tiny.moved(model, spread=1e-3)
    return model


def both_stages_trained() -> Any:
    model, _ = stacked()
    model.base_model.set_adapter(["one", "two"])  # peft makes all that is active trainable
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no adapter": (lambda: tiny.tiny("Llama"), "no adapter"),
    "an adapter that is trained on": (unmoved_adapter_trained_on, "changes the model"),
    "in bfloat16": (lambda: unmoved_adapter_trained_on().bfloat16(), "changes the model"),
    "both stages trained": (both_stages_trained, "changes the model"),
    "an adapter that takes a part of the base": (
        lambda: get_peft_model(tiny.tiny("Llama"), lora(init_lora_weights="pissa")),
        "changes the model",
    ),
    "biases of the base trained": (
        lambda: get_peft_model(tiny.tiny("GPT2"), lora(target_modules=["c_fc"], bias="all")),
        "outside the adapters",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_where_switching_off_is_not_the_start_of_this_stage_it_refuses(name: str) -> None:
    make, said = REFUSED[name]
    model = make().train()
    now = logits(model.eval())
    model.train()
    with pytest.raises(ValueError, match=said):
        AdapterOff(model)
    assert model.training
    frozen = Frozen.copy_of(model)
    tiny.moved(model, seed=3)
    torch.testing.assert_close(seen_by(frozen), now.float(), rtol=2e-2, atol=2e-2)


def test_an_adapter_in_bfloat16_is_neutral() -> None:
    model = get_peft_model(tiny.tiny("Llama").bfloat16(), lora())
    expected = logits(model)
    reference = AdapterOff(model)
    tiny.moved(model)
    torch.testing.assert_close(seen_by(reference), expected.float(), rtol=2e-2, atol=2e-2)
    assert models.causal_lm(model).dtype is torch.bfloat16
