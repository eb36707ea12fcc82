"""The optimizer: what reaches transformers, what is refused, and decay towards the start."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_run import Jolt, llama, tiny_run, weights
from transformers import TrainerCallback
from transformers.training_args import OptimizerNames

from holdfast.errors import RequestError
from holdfast.levers import wrapped
from holdfast.levers.adapter import Adapter
from holdfast.levers.budget import Budget
from holdfast.levers.freeze import Freeze
from holdfast.levers.optimizer import ELSEWHERE, MUON, OFFERED, Optimizer

FLAT = {"lr_scheduler_type": "constant", "warmup_steps": 0}


def run(folder: Path, *levers: Any, steps: int = 2, **arguments: Any) -> Any:
    trainer = tiny_run(levers, folder, steps=steps, arguments=FLAT | arguments)
    trainer.train()
    return trainer


def inner(trainer: Any) -> Any:
    """The optimizer of torch, under accelerate's wrapper."""
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def test_every_name_is_one_of_transformers_or_is_explained() -> None:
    theirs = {o.value for o in OptimizerNames}
    assert OFFERED.keys() - {MUON} <= theirs
    needing_more = {"adamw_torch_xla", "adamw_torch_npu_fused", "adamw_anyprecision", "grokadamw"}
    bitsandbytes = {n for n in theirs - OFFERED.keys() if "rmsprop" in n or n.startswith("paged")}
    rest = theirs - OFFERED.keys() - needing_more - bitsandbytes
    assert all(any(part in name for part in ELSEWHERE) for name in rest)


@pytest.mark.parametrize(
    ("settings", "kind", "expected"),
    [
        ({}, torch.optim.AdamW, {"betas": (0.9, 0.999), "eps": 1e-8, "fused": True}),
        (
            {"name": "adamw_torch", "betas": (0.8, 0.95), "eps": 1e-5},
            torch.optim.AdamW,
            {"betas": (0.8, 0.95), "eps": 1e-5, "fused": None},
        ),
        (
            {"name": "sgd", "args": {"momentum": 0.5, "nesterov": True}},
            torch.optim.SGD,
            {"momentum": 0.5, "nesterov": True},
        ),
        ({"name": "rmsprop", "args": {"alpha": 0.7}}, torch.optim.RMSprop, {"alpha": 0.7}),
        (
            {"name": "muon", "args": {"momentum": 0.8}},
            torch.optim.Muon,
            {"momentum": 0.8, "adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0, "lr": 1e-2},
        ),
    ],
)
def test_settings_reach_the_optimizer(
    tmp_path: Path, settings: dict[str, Any], kind: type, expected: dict[str, Any]
) -> None:
    trainer = run(tmp_path, Adapter(r=2), Optimizer(**settings))
    assert type(inner(trainer)) is kind
    group = inner(trainer).param_groups[0]
    assert {key: group[key] for key in expected} == expected
    assert trainer.start.displacement().relative > 0


def test_muon_steps_as_torchs_own(tmp_path: Path) -> None:
    """One step, against torch.optim.Muon on the same gradients."""
    kept: list[torch.Tensor] = []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: Any, **kwargs: Any) -> None:
            kept.extend(p.grad.clone() for p in model.parameters() if p.requires_grad)

    levers = [Adapter(r=2), Optimizer(name=MUON)]
    trainer = tiny_run(levers, tmp_path, steps=1, arguments=FLAT, callbacks=[Keep()])
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    copies = [p.detach().clone().requires_grad_() for p in trained]
    trainer.train()
    for copied, gradient in zip(copies, kept, strict=True):
        copied.grad = gradient
    torch.optim.Muon(copies, lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    for copied, now in zip(copies, trained, strict=True):
        torch.testing.assert_close(now.detach(), copied.detach(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", ["none", "lora"])
def test_decay_to_base_shrinks_the_displacement(tmp_path: Path, method: str) -> None:
    """One step of SGD with and without: W1 - W0 times 1 - lr d, written out on merged weights."""
    decay, rate, start = 20.0, 1e-2, weights(llama())
    found = []
    for d in (0.0, decay):
        levers = [Adapter(method=method, r=2), Optimizer(name="sgd", decay_to_base=d)]
        model = run(tmp_path / str(d), *levers, steps=1).model
        model = model.merge_and_unload() if method == "lora" else model
        found.append({name: now - start[name] for name, now in weights(model).items()})
    free, decayed = found
    assert max(float(change.abs().max()) for change in free.values()) > 1e-4
    for name, change in free.items():
        expected = (1 - rate * decay) * change
        torch.testing.assert_close(decayed[name], expected, rtol=1e-4, atol=1e-7)


def test_a_refused_step_does_not_decay_either(tmp_path: Path) -> None:
    found = []
    for jolts in ((), (1,)):
        levers = [
            Budget(clip=0.0, warmup=0.0, schedule="constant_with_warmup"),
            Optimizer(name="sgd", decay_to_base=20.0),
            Jolt(factor=float("nan"), steps=jolts),
        ]
        trainer = run(tmp_path / str(jolts), *levers, steps=1 + len(jolts))
        found.append(weights(trainer.model))
    assert len(trainer.refused) == 1
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adamw_torhc"}, r"did you mean 'adamw_torch'\?"),
        ({"name": "galore_adamw_layerwise"}, "steps within backward"),
        ({"name": "adalomo"}, "steps within backward"),
        ({"name": "schedule_free_adamw"}, "not the ones to measure"),
        ({"name": "sgd", "betas": (0.5, 0.9)}, "sgd takes no betas"),
        ({"name": "lion_8bit", "eps": 1e-4}, "lion_8bit takes no eps"),
        ({"name": "muon", "betas": (0.5, 0.9)}, "muon takes no betas"),
        ({"args": {"rank": 4}}, "adamw_torch_fused takes no args.rank; leave args out"),
        (
            {"name": "galore_adamw", "args": {"rnk": 4}},
            r"takes no args.rnk; did you mean 'rank'\?",
        ),
        ({"target_modules": ["mlp"]}, "takes no target_modules"),
        ({"betas": (1.0, 0.9)}, "less than 1"),
        ({"eps": 0.0}, "greater than 0"),
        ({"decay_to_base": -1.0}, "greater than or equal to 0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Optimizer(**settings)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("apollo_adamw", "apollo-torch"),
        ("galore_adamw", "galore-torch"),
        ("adamw_8bit", "bitsandbytes"),
        ("adamw_torch_8bit", "torchao"),
        ("stable_adamw", "torch-optimi"),
    ],
)
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    monkeypatch.setattr("holdfast.levers.optimizer.find_spec", lambda _module: None)
    with pytest.raises(RequestError, match=f"'{name}' needs the package {package}; `pip install"):
        Optimizer(name=name).wrap(llama())


def test_low_rank_optimizers_are_given_their_layers() -> None:
    found = Optimizer(name="galore_adamw", args={"rank": 4, "scale": 0.5}).arguments(None)
    assert (found["optim_args"], found["optim_target_modules"]) == (
        "rank=4,scale=0.5",
        "all-linear",
    )
    named = Optimizer(name="apollo_adamw", target_modules=["mlp"]).arguments(None)
    assert named["optim_target_modules"] == ["mlp"]


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="an extra: quant")
def test_eight_bits(tmp_path: Path) -> None:
    trainer = run(tmp_path, Adapter(r=2), Optimizer(name="adamw_8bit", betas=(0.8, 0.95)))
    assert type(inner(trainer)).__module__.startswith("bitsandbytes")
    assert inner(trainer).param_groups[0]["betas"] == (0.8, 0.95)
    assert trainer.start.displacement().relative > 0


def test_muon_is_for_hidden_matrices() -> None:
    for levers, named in (
        ([Optimizer(name=MUON)], "model.embed_tokens.weight"),
        ([Optimizer(name=MUON), Freeze(presets=["embeddings", "head"])], "layernorm.weight"),
    ):
        with pytest.raises(RequestError, match=rf"muon' is for matrices .*{named}"):
            wrapped(levers, llama())
    wrapped([Optimizer(name=MUON), Freeze(presets=["embeddings", "head", "norms"])], llama())


def test_a_decay_beyond_the_start_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"decay_to_base: 200 times .* a value that works: 10"):
        run(tmp_path, Optimizer(decay_to_base=200.0))
