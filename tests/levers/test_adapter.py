"""The adapter: which matrices get one, which never do, and what peft is asked for."""

from __future__ import annotations

import copy
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from tiny_run import gpt2, llama, shake, tiny_run, tokenizer, weights

from holdfast.data.example import Example
from holdfast.errors import RequestError
from holdfast.levers import Setup, wrapped
from holdfast.levers.adapter import Adapter
from holdfast.levers.budget import Budget
from holdfast.levers.freeze import Freeze
from holdfast.levers.kl_anchor import KlAnchor
from holdfast.meters import Reading
from holdfast.model import Model, load_model
from holdfast.recipe import load_recipe
from holdfast.reference.adapter_off import AdapterOff
from holdfast.reference.frozen import Frozen
from holdfast.run import train

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
    "Glm4Moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 0,
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
    "Glm4Moe": (FUSED | {name.replace("expert", "experts") for name in SHARED}, SPLIT),
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


def test_none_leaves_the_model_as_it_is() -> None:
    model = llama()
    assert Adapter(method="none").wrap(model) is model
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("settings", "rank", "scale"),
    [({"method": "lora"}, 16, 2.0), ({"r": 4}, 4, 2.0), ({"r": 4, "alpha": 2.0}, 4, 0.5)],
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
        ({"method": "osf", "r": 4}, r"adapter.r: 'osf' has no r: its config.effective_rank is"),
        ({"method": "oft", "alpha": 2.0}, r"adapter.alpha: 'oft' has no alpha; leave it out"),
        ({"method": "loha", "dropout": 0.1}, r"adapter.dropout: 'loha' has no dropout"),
        ({"config": {"init_lora_weights": "eva"}}, r"init_lora_weights: 'eva' needs a preparation"),
        ({"method": "fourierft", "config": {"n_frequency": 4}}, "begins away from the base; set"),
        (
            {"config": {"init_lora_weights": "pissa", "modules_to_save": ["lm_head"]}},
            r"init_lora_weights 'pissa' changes the base, and with .*lm_head.* beside A and B",
        ),
        (
            {"config": {"init_lora_weights": "pissa", "use_dora": True}},
            "changes the base, and with .*magnitude.* beside A and B",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Adapter(**settings).wrap(llama())


RECIPES: list[dict[str, Any]] = [
    {"r": 2},
    {"method": "rslora", "r": 2, "target": "all-linear"},
    {"method": "dora", "r": 2, "target": "attention"},
    {"method": "oft", "config": {"oft_block_size": 4}},
    {"method": "osf"},
    {"method": "osf", "config": {"effective_rank": 0.75}},
    {"method": "corda", "r": 2, "covariance_rows": 12},
    {"method": "corda", "r": 2, "covariance_rows": 12, "config": {"use_rslora": True}},
    {"r": 2, "config": {"init_lora_weights": "pissa"}},
    {"r": 2, "config": {"init_lora_weights": "olora"}},
    {"r": 2, "config": {"init_lora_weights": "orthogonal"}},
]
ANCHOR = {"weight": 1.0, "self_generated": {"rows": 8, "max_new_tokens": 12}}
IDS = torch.arange(12).unsqueeze(0)


@pytest.mark.parametrize("settings", RECIPES, ids=str)
def test_from_the_base_through_a_run_to_plain_peft(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    """No drift at the start; what is saved gives the same logits on the original base, and its
    merged matrices are as far from the base's as the run read off.
    """
    adapter, readings = Adapter(**settings), list[Reading]()
    trainer = tiny_run([adapter, KlAnchor(**ANCHOR)], tmp_path, record=readings.extend)
    base = weights(llama())
    trainer.train()
    drift, *after = (r.value for r in readings if r.name.startswith("kl_anchor"))
    assert abs(drift) < 1e-6 < max(after)
    model = trainer.model.eval()
    tuned = model(IDS).logits
    adapter.save(model, tmp_path / "adapter")
    assert torch.equal(model(IDS).logits, tuned), "saving has left the model as it was"
    again = PeftModel.from_pretrained(llama(), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(again(IDS).logits, tuned, rtol=1e-4, atol=1e-5)
    merged = weights(again.merge_and_unload())
    change = {n: float((merged[n] - base[n]).norm()) for n in merged}
    moved = {n: c for n, c in change.items() if c > 1e-3}
    displacement = trainer.start.displacement()
    found = {f"{n}.weight": c for n, c in displacement.change.items()}
    assert {n: found[n] for n in moved} == pytest.approx(moved, rel=1e-2)
    assert len(moved) >= len(found) - 2, "most matrices moved by more than rounding"


@pytest.mark.parametrize("init", ["corda", "pissa"])
def test_where_the_base_itself_is_changed_the_reference_is_a_copy(
    tmp_path: Path, init: str
) -> None:
    """Off, such an adapter leaves something else than the base; the copy is the base."""
    config = {} if init == "corda" else {"init_lora_weights": init}
    method = "corda" if init == "corda" else "lora"
    adapter = Adapter(method=method, r=4, covariance_rows=12, config=config)
    trainer = tiny_run([adapter, KlAnchor(**ANCHOR)], tmp_path)
    model, base = trainer.model.eval(), llama().eval()
    start = base(IDS).logits
    with model.disable_adapter():
        assert (model(IDS).logits - start).abs().max() > 0.1
    assert isinstance(trainer.reference, Frozen)
    shake(model)
    view = trainer.reference.view(IDS, torch.arange(12)[None], torch.ones(1, 12, dtype=torch.bool))
    ours = view.hidden_MH @ base.lm_head.weight.T
    torch.testing.assert_close(ours, start[0], rtol=1e-4, atol=1e-4)


def test_corda_trains_what_the_bases_text_uses_least(tmp_path: Path) -> None:
    """B0 A0 x over the rows, against peft's default of the same method, which takes the most."""
    energy = {}
    for mode in ("kpm", "ipm"):
        setup = Setup(llama(), tokenizer(), tmp_path, 0, max_length=24)
        config = {"corda_config": {"corda_method": mode}}
        adapter = Adapter(method="corda", r=4, covariance_rows=24, config=config)
        assert adapter.streams(setup) == ()
        inputs: list[torch.Tensor] = []
        model = adapter.wrap(setup.model)
        pair = model.base_model.model.model.layers[0].mlp.up_proj
        pair.register_forward_hook(lambda _m, put, _o, kept=inputs: kept.append(put[0][0]))
        for row in adapter._rows:
            model(torch.tensor([row.input_ids]))
        taken = torch.cat(inputs) @ pair.get_delta_weight("default").T
        energy[mode] = float(taken.square().sum().detach())
    assert energy["kpm"] < 0.05 * energy["ipm"]


def test_corda_resumed_ends_where_an_uninterrupted_run_ends(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    adapters = [Adapter(method="corda", r=2, covariance_rows=12) for _ in range(2)]
    whole, resumed = (tiny_run([a], tmp_path, steps=4, arguments=saving) for a in adapters)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "checkpoint-2"))
    ours, theirs = weights(resumed.model), weights(whole.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_osf_frozen_directions_get_no_gradient() -> None:
    """effective_rank counts what stays: at 0.75 of 32 directions, 8 are trained."""
    model = Adapter(method="osf", config={"effective_rank": 0.75}).wrap(llama())
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert layer.osf_svd_params["default"]["S_low"].shape == (8,)
    model(IDS, labels=IDS).loss.backward()
    u, _, v = torch.linalg.svd(layer.base_layer.weight, full_matrices=False)
    low = layer.osf_svd_params["default"]
    assert low["U_low"].grad.norm() > 1e-3
    assert (u[:, :24].T @ low["U_low"].grad).abs().max() < 1e-5
    assert (low["V_low"].grad @ v[:24].T).abs().max() < 1e-5


@pytest.mark.parametrize("settings", RECIPES, ids=str)
def test_without_weights_the_shapes_are_the_same(settings: dict[str, Any]) -> None:
    """What `--dry-run` counts, and what refuses a setting before anything is read."""
    with torch.device("meta"):
        bare = type(llama())(llama().config)
    adapter = Adapter(**settings)
    adapter._rows = [Example(list(range(20)), [True] * 20)] * 2
    ours, theirs = (
        {n: p.shape for n, p in adapter.wrap(m).named_parameters() if p.requires_grad}
        for m in (bare, llama())
    )
    assert ours == theirs


def test_a_wrong_setting_is_refused_before_the_base_is_loaded(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: Any) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("holdfast.run.load", loaded)
    for words, message in (
        (["levers.adapter.config={use_rslor: true}"], "did you mean 'use_rslora'"),
        (["levers.freeze.presets=[router]"], "has no router"),
    ):
        recipe = load_recipe(None, words, model="tiny", data="lesson.jsonl", out="run")
        with pytest.raises(RequestError, match=message):
            train(recipe)
        assert not (here / "run").exists()


def test_four_bits_need_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.levers.adapter.find_spec", lambda _module: None)
    with pytest.raises(RequestError, match=r"'qlora' needs bitsandbytes; `pip install holdfast\[q"):
        Adapter(method="qlora").wrap(llama())


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="an extra: quant")
def test_four_bits(tmp_path: Path) -> None:
    """Gradients against the same adapter on the dequantized base, and the way back from disk."""
    from peft.utils.integrations import dequantize_module_weight

    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    settings = Model(path=str(tmp_path / "base"))
    base = load_model(settings, adapter=True, tokenizer=tokenizer(), four_bit_on="cpu")
    half = wrapped([Adapter(method="qlora"), Freeze(first_blocks=1)], copy.deepcopy(base))
    trained = [n for n, p in half.named_parameters() if p.requires_grad]
    assert trained
    assert all("layers.1." in name for name in trained)
    plain = llama(hidden_size=64, intermediate_size=128)
    with torch.no_grad():
        for ours, theirs in zip(plain.modules(), base.modules(), strict=True):
            if type(theirs).__name__ == "Linear4bit":
                ours.weight.copy_(dequantize_module_weight(theirs))
    adapter = Adapter(method="qlora", r=2)
    trainer = tiny_run([adapter, Budget(cap=0.1), KlAnchor(**ANCHOR)], tmp_path, model=base)
    assert isinstance(trainer.reference, AdapterOff)
    model = trainer.model
    twin = Adapter(r=2).wrap(plain)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    start = {n: p for n, p in model.state_dict().items() if n in trained}
    twin.load_state_dict(start, strict=False)
    for one in (model, twin):
        shake(one)
        one.zero_grad()
        one.train()(IDS, labels=IDS).loss.backward()
    grads = [
        {n: p.grad for n, p in one.named_parameters() if p.requires_grad} for one in (model, twin)
    ]
    assert all(float(g.norm()) > 1e-3 for n, g in grads[1].items() if "lora_A" in n)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)
    sizes = trainer.start.displacement().start
    name = "model.layers.0.mlp.up_proj"
    assert sizes[name] == pytest.approx(float(plain.get_submodule(name).weight.norm()), rel=1e-5)
    trainer.train()
    assert trainer.start.displacement().relative > 0


@pytest.mark.parametrize(
    ("settings", "parameters", "method"),
    [
        ({}, 49_999_999, "none"),
        ({}, 50_000_000, "lora"),
        ({"r": 4}, 1000, "lora"),
        ({"method": "oft"}, 1000, "oft"),
        ({"method": "auto"}, 1000, "none"),
    ],
)
def test_auto_trains_a_small_model_whole(
    settings: dict[str, Any], parameters: int, method: str
) -> None:
    assert Adapter(**settings).settled(parameters).method == method


def test_auto_is_settled_where_no_plan_was_made() -> None:
    """Tiny: all of it. With a field given: an adapter."""
    assert type(Adapter().wrap(llama())) is type(llama())
    assert hasattr(Adapter(target="mlp").wrap(llama()), "peft_config")
