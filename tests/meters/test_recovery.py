"""Recovery: the copy learns, the model stays what it was bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import tiny
from holdfast.data.example import Example
from holdfast.errors import RequestError
from holdfast.levers.adapter import Adapter
from holdfast.meters import Reading
from holdfast.meters.probes import Item, read_probes
from holdfast.meters.recovery import borrowed, fallen, read_recovery, recovery_examples

ANSWER = 7


def example(first: int) -> Example:
    """Whatever was asked, the answer is one token."""
    return Example([tiny.BOS, first, first + 1, ANSWER], [False, False, False, True])


def score(model: Any) -> Sequence[Reading]:
    """Items unlike the examples: is the answer the likeliest token?"""
    items = {}
    for first in range(20, 36):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[tiny.BOS, first, first + 1]])).logits[0, -1]
        items[str(first)] = float(int(logits.argmax()) == ANSWER)
    value = sum(items.values()) / len(items)
    return [Reading("probe", "old", "sealed", 9, value, 0.1, len(items), "accuracy",
                    items=items)]  # fmt: skip


EXAMPLES = [example(first) for first in range(10)]


def bits(model: Any) -> dict[str, Any]:
    state = model.state_dict()
    assert not any(tensor.isnan().any() for tensor in state.values())
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.mark.parametrize("adapter", [False, True])
def test_what_ten_examples_bring_back_is_told_and_the_model_is_as_it_was(adapter: bool) -> None:
    model: Any = tiny.tiny("Llama")
    torch.manual_seed(0)  # the adapter's first weights, whichever test ran before
    if adapter:
        model = Adapter(r=4, target="all-linear").wrap(model)
    model.train()
    parameters = dict(model.named_parameters())
    some = next(p for p in parameters.values() if p.requires_grad)
    some.grad = torch.ones_like(some)
    before = bits(model)
    where = {name: p.data_ptr() for name, p in parameters.items()}
    asked = {name: p.requires_grad for name, p in parameters.items()}
    drawn = torch.random.get_rng_state()
    readings = read_recovery(model, EXAMPLES, score, epochs=12, learning_rate=0.02)
    assert torch.equal(drawn, torch.random.get_rng_state())
    found = {r.name: r for r in readings}
    assert found["old/before"].value == score(model)[0].value == 0.0
    assert found["old/after"].value == 1.0
    assert found["old/gain"].value == 1.0
    assert found["old/gain"].stderr
    assert all((r.meter, r.n, r.step) == ("recovery", 16, 9) for r in readings)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == where
    assert {name: p.requires_grad for name, p in model.named_parameters()} == asked
    assert model.training
    assert some.grad is not None
    assert some.grad.eq(1).all()
    assert all(p.grad is None for p in parameters.values() if p is not some)


def test_what_is_not_taught_does_not_come_back() -> None:
    """Ten examples of another answer."""
    model = tiny.tiny("Llama")
    others = [Example([*e.input_ids[:3], ANSWER + 1], e.loss_mask) for e in EXAMPLES]
    found = {r.name: r.value for r in read_recovery(model, others, score, epochs=12,
                                                    learning_rate=0.02)}  # fmt: skip
    assert found["old/after"] == found["old/gain"] == 0.0


def test_a_tied_model_without_anything_trained_is_trained_as_a_whole() -> None:
    model: Any = tiny.tiny("Llama", tie_word_embeddings=True).requires_grad_(False)
    before = bits(model)
    found = {r.name: r.value for r in read_recovery(model, EXAMPLES, score, epochs=12,
                                                    learning_rate=0.02)}  # fmt: skip
    assert found["old/gain"] == 1.0
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_failure_within_gives_the_model_back_too() -> None:
    model = tiny.tiny("Llama")
    before = bits(model)

    def fail() -> None:
        with borrowed(model) as trained, torch.no_grad():
            for parameter in trained:
                parameter += 1.0
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_the_default_rates_are_by_what_is_trained() -> None:
    """One AdamW step moves each number by the learning rate, give or take its epsilon."""
    for adapter, rate in ((False, 1e-5), (True, 2e-4)):
        model: Any = tiny.tiny("Llama")
        if adapter:
            model = Adapter(r=2).wrap(model)
        moved = []

        def watch(now: Any, moved: list[torch.Tensor] = moved) -> Sequence[Reading]:
            trained = [p.detach().clone() for p in now.parameters() if p.requires_grad]
            moved.append(torch.cat([p.flatten() for p in trained]))
            return []

        assert read_recovery(model, EXAMPLES, watch, epochs=1) == []
        assert float((moved[1] - moved[0]).abs().max()) == pytest.approx(rate, rel=0.05)


def test_examples_without_a_response_and_broken_models_are_refused() -> None:
    model = tiny.tiny("Llama")
    with pytest.raises(RequestError, match="no example has a token to learn"):
        read_recovery(model, [Example([1, 2], [False, False])], score)
    with torch.no_grad():
        model.get_input_embeddings().weight[:] = float("nan")
    with pytest.raises(RequestError, match="the loss on the examples is nan"):
        read_recovery(model, EXAMPLES, score)


def test_fallen_items_were_right_and_are_not() -> None:
    def one(name: str, items: dict[str, float], unit: str = "accuracy") -> Reading:
        return Reading("probe", name, "sealed", 0, 0.5, 0.1, 3, unit, items=items)

    before = [one("p", {"a": 1.0, "b": 1.0, "c": 0.0}), one("n", {"a": 1.0}, "nats")]
    after = [one("p", {"a": 0.0, "b": 1.0, "c": 0.0, "new": 0.0}), one("n", {"a": 0.0}, "nats"),
             one("q", {"a": 0.0})]  # fmt: skip
    assert fallen(before, after) == {"p": ["a"]}


def item(number: int, **fields: Any) -> Item:
    plain = {"id": str(number), "probe": "old", "kind": "exact", "prompt": f"{number}=",
             "target": "k", "tags": ["recovery"]}  # fmt: skip
    return Item.model_validate(plain | fields)


def test_items_tagged_recovery_are_the_examples() -> None:
    tokenizer = tiny.letters(chat=tiny.CHAT)
    config = tiny.tiny("Llama").config
    items = [
        item(1),
        item(2, tags=["guardrail"]),
        item(3, kind="choice", choices=["a", "b"], answer=1, delimiter=" ", target=None),
        item(4, prompt=[{"role": "user", "content": "q"}]),
    ]
    text = [
        tokenizer.decode([i for i, on in zip(e.input_ids, e.loss_mask, strict=True) if on])
        for e in recovery_examples(items, tokenizer, config)
    ]
    assert text == ["k\n", " b", "k</s>"]
    first, *_ = recovery_examples(items, tokenizer, config)
    assert first.input_ids[:3] == [tiny.BOS, *tokenizer("1=")["input_ids"]]
    assert first.loss_mask == [False] * 3 + [True] * 2
    bare = item(5, kind="format", target=None, checks=[{"check": "json"}])
    with pytest.raises(RequestError, match="kind format has no answer to learn from"):
        recovery_examples([bare], tokenizer, config)


def test_it_works_on_probe_items_from_end_to_end() -> None:
    """Sixteen fallen items with other prompts than the ten that are practised on."""
    tokenizer, model = tiny.letters(), tiny.tiny("Llama")
    asked = [item(n, tags=["guardrail"], max_new_tokens=4) for n in range(10, 26)]
    examples = recovery_examples(map(item, range(10)), tokenizer, model.config)
    found = {
        r.name: r
        for r in read_recovery(
            model,
            examples,
            lambda now: read_probes(now, tokenizer, asked, 3),
            epochs=12,
            learning_rate=0.01,
        )
    }
    assert found["old/before"].value == 0.0
    assert found["old/after"].value > 0.8
    assert found["old/after"].answers["10"] == "k"
    assert found["old/before"].answers["10"] != "k"
