"""The KL anchor: nothing at zero drift, the base's own view ever after."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import llama, shake, tiny_run, tokenizer

from holdfast.data.example import Role
from holdfast.levers import Setup, StepState, Term
from holdfast.levers.adapter import Adapter
from holdfast.levers.kl_anchor import KlAnchor
from holdfast.trainer import HoldfastTrainer, token_losses

FEW = {"rows": 8, "max_new_tokens": 12}


def anchored(folder: Path, method: str, **settings: Any) -> HoldfastTrainer:
    config = settings.pop("config", {})
    anchor = KlAnchor(weight=2.0, self_generated=FEW, **settings)
    return tiny_run([Adapter(method=method, r=2, config=config), anchor], folder, steps=1)


def terms(trainer: HoldfastTrainer) -> dict[str, Term]:
    """The anchor's terms in the first step, which has one micro-batch."""
    batch = trainer.train_dataset[0]
    totals = {role: int((batch["roles"] == role).sum()) for role in Role}
    out = token_losses(trainer.model, batch, trainer.kl_roles, trainer.reference)
    found: dict[str, Term] = trainer.levers[1].terms(out, StepState(0, totals, 1), {})
    return found


@pytest.mark.parametrize(("method", "largest"), [("lora", 0.0), ("none", 1e-6)])
def test_at_zero_drift_it_neither_costs_nor_pulls(
    tmp_path: Path, method: str, largest: float
) -> None:
    """To the bit where the head is frozen; a trained head's softmax rounds."""
    trainer = anchored(tmp_path, method, on="both")
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    for term in terms(trainer).values():
        assert term.count > 10
        assert term.sum.item() == 0.0
    total = sum(term.sum for term in terms(trainer).values())
    gradients = torch.autograd.grad(total, trained, allow_unused=True)
    assert max(float(g.abs().max()) for g in gradients if g is not None) <= largest


@pytest.mark.parametrize("method", ["lora", "none"])
@pytest.mark.parametrize(
    ("on", "roles"),
    [("anchor", [Role.ANCHOR]), ("task", [Role.TASK]), ("both", [Role.TASK, Role.ANCHOR])],
)
def test_it_is_the_kl_of_the_base_at_the_positions_asked_for(
    tmp_path: Path, method: str, on: str, roles: list[Role]
) -> None:
    """Against torch's kl_div over whole logits, the base being a model never touched."""
    trainer = anchored(tmp_path, method, on=on)
    shake(trainer.model)
    batch = trainer.train_dataset[0]
    seen = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    with torch.no_grad():
        tuned, base = (
            model(**seen, use_cache=False).logits.log_softmax(-1)
            for model in (trainer.model, llama())
        )
    kl = torch.nn.functional.kl_div(tuned, base, reduction="none", log_target=True).sum(-1)
    found = terms(trainer)
    assert list(found) == [f"kl_anchor/{role.name.lower()}" for role in roles]
    for role, term in zip(roles, found.values(), strict=True):
        there = batch["roles"] == role
        assert (term.count, term.weight) == (int(there.sum()), 2.0)
        assert term.sum.item() == pytest.approx(kl[there].sum().item(), rel=1e-4)
        assert term.sum.item() > 0.01


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora", {"reference": "adapter_off"}),
        ("lora", {"config": {"modules_to_save": ["lm_head"]}}),
        ("lora", {"reference": "frozen"}),
        ("none", {}),
    ],
)
def test_its_reference_stays_the_base(
    tmp_path: Path, method: str, settings: dict[str, Any]
) -> None:
    """Whatever is trained, the head included; and training goes on with the adapter in place."""
    trainer = anchored(tmp_path, method, **settings)
    batch, base = trainer.train_dataset[0], llama()
    seen = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    trainer.train()
    shake(trainer.model)
    tuned = copy.deepcopy(trainer.model)(**seen).logits
    reference = trainer.reference
    assert reference is not None
    hidden = reference.hidden_states(**seen)
    assert not hidden.requires_grad
    with torch.no_grad():
        assert torch.equal(reference.head()(hidden), base(**seen, use_cache=False).logits)
    assert trainer.model.training
    assert torch.equal(trainer.model(**seen).logits, tuned)
    assert (tuned - base(**seen).logits).abs().max() > 1e-2


def setup(folder: Path, model: Any, lesson_tokens: int = 0) -> Setup:
    return Setup(model, tokenizer(), folder, 0, max_length=24, lesson_tokens=lesson_tokens)


def rows(anchor: KlAnchor, made: Setup) -> list[tuple[list[int], list[bool]]]:
    (stream,) = anchor.streams(made)
    assert (stream.role, stream.share) == (Role.ANCHOR, anchor.self_generated.fraction)
    return [(list(ids), list(mask)) for ids, mask in map(stream.fetch, range(len(stream.lengths)))]


def test_its_rows_are_written_by_the_base_once(tmp_path: Path) -> None:
    anchor = KlAnchor(self_generated=FEW)
    first = rows(anchor, setup(tmp_path, llama()))
    assert len(first) == 8
    assert all(ids[0] == 62 and mask == [False] + [True] * (len(ids) - 1) for ids, mask in first)
    assert max(len(ids) for ids, _ in first) <= 13
    assert rows(anchor, setup(tmp_path, None)) == first, "read back without a model"
    assert rows(anchor, setup(tmp_path / "again", llama())) == first, "seeded"
    other = KlAnchor(self_generated=FEW | {"temperature": 2.0})
    assert rows(other, setup(tmp_path, llama())) != first, "other settings, other rows"


@pytest.mark.parametrize(
    ("lesson_tokens", "settings", "count"),
    # a quarter of the tokens is a third of the lesson's: 3000 / 3 / 12 a row
    [(3000, {}, 83), (0, {}, 16), (3000, {"max_rows": 40}, 40), (3000, {"rows": 5}, 5)],
)
def test_it_writes_as_many_rows_as_the_run_reads(
    tmp_path: Path, lesson_tokens: int, settings: dict[str, int], count: int
) -> None:
    anchor = KlAnchor(self_generated={"max_new_tokens": 12, **settings})
    assert len(rows(anchor, setup(tmp_path, llama(), lesson_tokens))) == count


def test_off(tmp_path: Path) -> None:
    anchor, made = KlAnchor(**KlAnchor.OFF), setup(tmp_path, None)
    anchor.prepare(made)
    assert made.reference is None
    assert anchor.streams(made) == ()
    assert anchor.kl_roles() == frozenset()


def test_on_the_lesson_alone_it_needs_no_rows(tmp_path: Path) -> None:
    assert KlAnchor(on="task").streams(setup(tmp_path, None)) == ()
