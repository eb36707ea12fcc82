"""The adapter: which matrices get one, which never do, and what peft is asked for."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import transformers
from tiny_run import gpt2, llama, shake, weights

from holdfast.errors import RequestError
from holdfast.levers.adapter import Adapter

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 62,
    "eos_token_id": 63,
    "pad_token_id": 63,
}
EXPERTS = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}
GATED = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
SPLIT = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
FUSED = {"mlp.experts", "mlp.experts.base_layer"}  # gate_up_proj and down_proj, one in the other
SHARED = {f"mlp.shared_expert.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
MATRICES = {
    "Llama": (GATED, SPLIT),
    "Qwen3": (GATED, SPLIT),
    "GPT2": ({"mlp.c_fc", "mlp.c_proj"}, {"attn.c_attn", "attn.c_proj"}),
    "GPTNeoX": (
        {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
        {"attention.query_key_value", "attention.dense"},
    ),
    "Mixtral": (FUSED, SPLIT),
    "Qwen2Moe": (FUSED | SHARED, SPLIT),
}
"""(MLP, attention) matrices of a layer, as transformers 5 names them; no head, no router."""


def build(family: str) -> Any:
    if family == "GPT2":
        return gpt2()
    config = getattr(transformers, f"{family}Config")
    return getattr(transformers, f"{family}ForCausalLM")(config(**TINY, **EXPERTS.get(family, {})))


def adapted(model: Any) -> list[set[str]]:
    """The adapted modules of each layer; one outside the layers would be an error."""
    layers: list[set[str]] = [set(), set()]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found = re.search(r"\.(?:h|layers)\.(\d)\.(.+)\.lora_[AB]\.", name)
            assert found, name
            layers[int(found[1])].add(found[2])
    return layers


@pytest.mark.parametrize("family", MATRICES)
def test_presets(family: str) -> None:
    mlp, attention = MATRICES[family]
    expected = {"mlp": mlp, "attention": attention, "all-linear": mlp | attention}
    model = build(family)
    for preset, matrices in expected.items():
        wrapped = Adapter(r=2, target=preset).wrap(copy.deepcopy(model))
        assert adapted(wrapped) == [matrices, matrices], preset


def test_module_names() -> None:
    names = Adapter(target=["q_proj", "up_proj"]).wrap(llama())
    assert adapted(names) == [{"self_attn.q_proj", "mlp.up_proj"}] * 2


def test_none_trains_every_weight_of_the_model_as_it_is() -> None:
    model = llama().requires_grad_(False)
    assert Adapter(method="none").wrap(model) is model
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("settings", "rank", "scale"),
    [({}, 16, 2.0), ({"r": 4}, 4, 2.0), ({"r": 4, "alpha": 2.0}, 4, 0.5)],
)
def test_rank_and_scale(settings: dict[str, Any], rank: int, scale: float) -> None:
    """W' = W + alpha / r B A, alpha 2 r unless given."""
    pair = Adapter(**settings).wrap(llama()).base_model.model.model.layers[0].mlp.up_proj
    assert pair.lora_A["default"].weight.shape == (rank, 32)
    assert pair.scaling["default"] == scale


def test_a_field_of_pefts_own() -> None:
    """With rsLoRA the scale is alpha / sqrt(r): 8 / 2."""
    wrapped = Adapter(r=4, config={"use_rslora": True}).wrap(llama())
    assert wrapped.base_model.model.model.layers[0].mlp.up_proj.scaling["default"] == 4.0


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("oft", {"oft_block_size": 4}),
        ("LoHa", {}),
        ("ia3", {"target_modules": ["down_proj"], "feedforward_modules": ["down_proj"]}),
    ],
)
def test_other_methods_begin_at_the_base_and_can_be_switched_off(
    method: str, config: dict[str, Any]
) -> None:
    base = llama().eval()
    ids = torch.arange(12).unsqueeze(0)
    start = base(ids).logits
    wrapped = Adapter(method=method, config=config).wrap(base).eval()
    torch.testing.assert_close(wrapped(ids).logits, start, rtol=0, atol=1e-5)
    shake(wrapped)
    assert (wrapped(ids).logits - start).abs().max() > 1e-3
    with wrapped.disable_adapter():
        assert torch.equal(wrapped(ids).logits, start)


def test_settings_that_went_through_json_give_the_same_adapter() -> None:
    """An empty rank stays empty: OFT has a block size instead, and takes but one of the two."""
    asked = Adapter(method="oft", config={"oft_block_size": 8})
    again = Adapter.model_validate_json(asked.model_dump_json())
    assert weights(again.wrap(llama())).keys() == weights(asked.wrap(llama())).keys()
    assert Adapter(method="loha", r=3).wrap(llama()).peft_config["default"].r == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "lorra"}, r"levers.adapter.method: 'lorra' .* did you mean 'lora'\?"),
        ({"config": {"use_rslor": True}}, r"config.use_rslor: .* did you mean 'use_rslora'\?"),
        ({"config": {"bias": "sometimes"}}, "levers.adapter: peft refuses these settings: "),
        (
            {"method": "prompt_tuning", "config": {"num_virtual_tokens": 4}},
            "levers.adapter.method: 'prompt_tuning' puts tokens of its own before each row",
        ),
        ({"target": ["nothing_of_that_name"]}, "levers.adapter: peft refuses these settings: "),
    ],
)
def test_what_cannot_be_done_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Adapter(**settings).wrap(llama())
