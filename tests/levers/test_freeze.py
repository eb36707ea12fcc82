"""Freeze: what is held, what an adapter then leaves out, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import gpt2, llama, tiny_run, weights

import tiny
from holdfast.errors import RequestError
from holdfast.levers import wrapped
from holdfast.levers.adapter import Adapter
from holdfast.levers.freeze import Freeze


def held(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.requires_grad}


def names(model: Any, pattern: str) -> set[str]:
    """By a regular expression, written against transformers' names for the architecture."""
    return {name for name, _ in model.named_parameters() if re.search(pattern, name)}


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        ("Llama", {"presets": ["embeddings"]}, r"embed_tokens"),
        ("Llama", {"presets": ["head"]}, r"lm_head"),
        ("Llama", {"presets": ["norms"]}, r"layernorm|\.norm\."),
        ("Llama", {"presets": ["norms", "embeddings"]}, r"layernorm|\.norm\.|embed_tokens"),
        ("Llama", {"first_blocks": 1}, r"layers\.0\."),
        ("Llama", {"patterns": ["*.self_attn.*", "lm_head.weight"]}, r"self_attn|lm_head"),
        ("GPT2", {"presets": ["embeddings"]}, r"wte|wpe"),  # the head is tied to wte
        ("GPT2", {"presets": ["norms"]}, r"\.ln_"),
        ("GPT2", {"first_blocks": 2}, r"\.h\.[01]\."),
        ("Mixtral", {"presets": ["router"]}, r"\.gate\."),
    ],
)
def test_what_is_held(family: str, settings: dict[str, Any], expected: str) -> None:
    model = tiny.tiny(family)
    assert held(Freeze(**settings).wrap(model)) == names(model, expected) != set()


@pytest.mark.parametrize("others", [[], [Adapter(r=2, target="all-linear")]])
def test_what_is_held_does_not_move(tmp_path: Path, others: list[Any]) -> None:
    start = weights(llama())
    trainer = tiny_run([*others, Freeze(first_blocks=1, presets=["norms"])], tmp_path, steps=3)
    trainer.train()
    model = trainer.model.merge_and_unload() if others else trainer.model
    moved = {n for n, now in weights(model).items() if not torch.equal(now, start[n])}
    still = {n for n in start if "layers.0." in n or "norm" in n}
    expected = {n for n in start if "layers.1." in n} if others else set(start)
    assert moved == expected - still


@pytest.mark.parametrize(
    "adapter",
    [
        Adapter(r=2, target="all-linear"),
        Adapter(r=2, target=["up_proj", "q_proj"]),
        Adapter(method="osf"),
        Adapter(method="oft", config={"oft_block_size": 4}),
    ],
    ids=lambda a: f"{a.method}-{a.target}",
)
def test_frozen_blocks_get_no_adapter(adapter: Adapter) -> None:
    """Whatever the order in which the levers are given."""
    for levers in ([Freeze(first_blocks=1), adapter], [adapter, Freeze(first_blocks=1)]):
        model = wrapped(levers, llama())
        adapted = {n for n, m in model.named_modules() if hasattr(m, "get_base_layer")}
        assert adapted, "block 1 has one"
        assert all("layers.1." in name for name in adapted)


def test_frozen_experts_get_no_adapter() -> None:
    model = wrapped([Freeze(first_blocks=1), Adapter(r=2)], tiny.tiny("Mixtral"))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("layers.1." in name for name in trained)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"presets": ["router"]}, r"presets: LlamaForCausalLM has no router; take 'router' out"),
        ({"first_blocks": 3}, r"first_blocks: 3 is more than the 2 blocks .* works: 1"),
        (
            {"patterns": ["model.layers.0.mlp.up_prj.weight"]},
            r"patterns: .* did you mean 'model.layers.0.mlp.up_proj.weight'\?",
        ),
        ({"patterns": ["nothing"]}, r"'nothing' matches no weight .* begin with \*"),
        ({"patterns": ["*"]}, "nothing is left to train; freeze less"),
    ],
)
def test_what_cannot_be_done_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        wrapped([Freeze(**settings), Adapter(method="none")], llama())
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("target", ["mlp", ["up_proj"]])
def test_an_adapter_with_nothing_left_is_refused(target: Any) -> None:
    with pytest.raises(RequestError, match=r"levers.freeze: nothing is left for the adapter"):
        wrapped([Adapter(target=target), Freeze(patterns=["*.mlp.*"])], llama())


def test_off() -> None:
    for model in (llama(), gpt2()):
        assert held(Freeze(**Freeze.OFF).wrap(model)) == set()
